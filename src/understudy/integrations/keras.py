"""Distillation in Keras 3: the right losses for `keras.distillation.Distiller`, and a distiller of our own.

Ours runs the student once a step; Keras' runs it twice where a loss looks at layers. Everything is written in
`keras.ops` and works on torch, JAX and TensorFlow, whichever Keras was told to use (`KERAS_BACKEND`). Models give
logits, not probabilities. Imported by users only.

Keras' own `LogitsDistillation()` is not knowledge distillation as it stands (3.15): its default loss, the name
"kl_divergence", becomes a function, and only an instance of `keras.losses.KLDivergence` gets the softmax and the factor
T^2. So logits / T, clipped to [1e-7, 1], are taken for probabilities. Take `KD` instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from understudy.errors import ConfigError, ModelError
from understudy.integrations.keraslosses import (
    DKD,
    KD,
    AttentionTransfer,
    Hint,
    LogitMSE,
    Model,
    Tensor,
    gives_logits,
    keras,
    ops,
)

__all__ = ["DKD", "KD", "AttentionTransfer", "Distiller", "Hint", "LogitMSE"]

_PARTS = ("student_loss", "distillation_loss")
"""Metrics that only training has."""


class Distiller(keras.Model):  # type: ignore[misc]
    """Trains a student with a teacher's help by `compile` and `fit`, on every backend.

        distiller = Distiller(teacher, student, KD(temperature=4), alpha=0.5)
        distiller.compile("adam", metrics=["accuracy"])
        distiller.fit(images, labels, validation_data=(more_images, more_labels))
        distiller.student.save("student.keras")

    total = ce_weight x loss with the labels + kd_weight x sum of the weighted `losses` + the student's regularisers.

    The student is run once a step, also where losses look at its layers; the teacher once, with training=False. The
    teacher is frozen in place, and is neither in `trainable_variables` nor in what `save_weights` writes; save
    `distiller.student`. Validation is that of the student alone: the plain loss, and no teacher is run. `sample_weight`
    and `class_weight` count in the loss with the labels only.

    Here `alpha` is the share of the *distillation* term. Beware of Keras: the `student_loss_weight` of
    `keras.distillation.Distiller` and the `alpha` of its well-known example are the share of the loss with the labels.
    So its alpha = 0.1 is 0.9 here.

    Args:
        teacher: a trained model from images to logits.
        student: the model to train, from the same images to logits of the same classes.
        losses: one or several of this file, of Keras, or your own `DistillationLoss`; `KD()` by default.
        weights: one for each of the losses; 1 by default.
        alpha: sugar for `ce_weight=1 - alpha, kd_weight=alpha`.
        ce_weight: weight of the loss with the labels; 0.5 by default.
        kd_weight: times the weight of every one of the losses; 0.5 by default.
        name: of the Keras model.

    Raises:
        ConfigError: weights that do not make sense, or an unknown layer.
        ModelError: an untrained teacher, or networks that the losses cannot compare.
    """

    def __init__(
        self,
        teacher: Model,
        student: Model,
        losses: keras.distillation.DistillationLoss | Sequence[keras.distillation.DistillationLoss] | None = None,
        *,
        weights: Sequence[float] | None = None,
        alpha: float | None = None,
        ce_weight: float | None = None,
        kd_weight: float | None = None,
        name: str = "distiller",
    ) -> None:
        super().__init__(name=name)
        gives_logits(student, "student")
        if not teacher.built:
            raise ModelError("The teacher has no weights yet: load them, or train it, before it teaches.")
        teacher.trainable = False
        self.ce_weight, self.kd_weight = _weights(alpha, ce_weight, kd_weight)
        self.student = student
        self.built = student.built  # so that saved weights can be loaded at once
        self._lesson = _Lesson.of(teacher, student, losses, weights)
        self.projectors = [loss.projector for loss in self._lesson.losses if isinstance(loss, Hint)]
        self.student_loss = keras.metrics.Mean(name="student_loss")
        self.distillation_loss = keras.metrics.Mean(name="distillation_loss")

    def compile(
        self,
        optimizer: Any = "adam",
        loss: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
        """Configure training as `keras.Model.compile` does.

        Args:
            optimizer: as in Keras, like all that is not named here.
            loss: with the labels, of logits; by default the cross-entropy with class numbers.
            metrics: as in Keras; they are given the labels and the student's logits.
            weighted_metrics: likewise.
            run_eagerly: do not compile.
            steps_per_execution: how many steps run at once.
            jit_compile: whether to compile.
            auto_scale_loss: in half precision.

        Raises:
            ConfigError: the loss takes probabilities.
        """
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if loss is None else loss
        _takes_logits(loss)
        super().compile(
            optimizer=optimizer,
            loss=loss,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=auto_scale_loss,
        )

    @property
    def non_trainable_variables(self) -> list[Any]:
        """The student's, and the teacher's: JAX must be given all that a step reads."""
        return [*super().non_trainable_variables, *self._lesson.teacher.variables]

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Return the student's logits [batch, classes]; in training a list of them and of what losses look at."""
        if not training:
            return self.student(inputs, training=False)
        return self._lesson.run_student(inputs, training=True)

    def compute_loss(
        self,
        x: Tensor = None,
        y: Tensor = None,
        y_pred: Tensor = None,
        sample_weight: Tensor = None,
        training: bool = True,
    ) -> Tensor:
        """Return the total in training, the plain loss otherwise; Keras calls it once a step.

        Args:
            x: images.
            y: labels.
            y_pred: what `call` returned.
            sample_weight: weights of the examples in the loss with the labels.
            training: whether this is a step of training.
        """
        if not training:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        by_labels = super().compute_loss(x, y, y_pred[0], sample_weight, training)
        by_teacher = self._lesson.loss(x, y_pred, y)
        size = ops.shape(y_pred[0])[0]
        self.student_loss.update_state(by_labels, sample_weight=size)
        self.distillation_loss.update_state(by_teacher, sample_weight=size)
        own = sum(ops.sum(loss) for loss in self.losses)  # in by_labels as well, where ce_weight must not scale them
        return self.ce_weight * by_labels + (1 - self.ce_weight) * own + self.kd_weight * by_teacher

    def compute_metrics(self, x: Tensor, y: Tensor, y_pred: Tensor, sample_weight: Tensor = None) -> dict[str, Tensor]:
        """Return the metrics by name, of the student's logits; in validation without the parts of the training loss."""
        if isinstance(y_pred, list):
            return dict(super().compute_metrics(x, y, y_pred[0], sample_weight))
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        return {name: value for name, value in results.items() if name not in _PARTS}

    def get_config(self) -> dict[str, Any]:
        """Refuse to be saved whole.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "A distiller is not saved whole: save `distiller.student`, or give ModelCheckpoint save_weights_only=True."
        )


@dataclass(frozen=True)
class _Lesson:
    """Teacher, losses, and networks that are run once for all that the losses look at.

    Not a Keras object, so Keras neither trains nor saves what is in it.
    """

    teacher: Model
    losses: tuple[Any, ...]
    weights: tuple[float, ...]
    looks: tuple[tuple[str | None, str | None], ...]
    """The layers that each of the losses looks at, the teacher's first; None for the logits."""
    run_teacher: _Run
    run_student: _Run

    @classmethod
    def of(cls, teacher: Model, student: Model, losses: Any, weights: Sequence[float] | None) -> _Lesson:
        """Check what is asked for, and make what it needs.

        Raises:
            ConfigError: not one weight a loss, no loss, or an unknown layer.
            ModelError: networks that the losses cannot compare.
        """
        every = tuple(losses) if isinstance(losses, (list, tuple)) else (losses or KD(),)
        if not every or (weights is not None and len(weights) != len(every)):
            raise ConfigError(f"There are {len(every)} losses and {len(weights or ())} weights; give each loss one.")
        for loss in every:
            loss.validate_model_compatibility(teacher, student)
            if isinstance(loss, Hint):
                loss.build(teacher, student)
        looks = tuple((_name(loss, "teacher_layer_name"), _name(loss, "student_layer_name")) for loss in every)
        by_role = [
            _Run.of(model, names) for model, names in zip((teacher, student), zip(*looks, strict=True), strict=True)
        ]
        return cls(teacher, every, tuple(weights or [1.0] * len(every)), looks, *by_role)

    def loss(self, images: Tensor, seen: list[Tensor], labels: Tensor) -> Tensor:
        """Run the teacher and return the weighted sum of the losses, given what the student showed."""
        shown = self.run_teacher(images, training=False)
        total = 0.0
        for loss, weight, (of_teacher, of_student) in zip(self.losses, self.weights, self.looks, strict=True):
            pair = self.run_teacher.at(shown, of_teacher), self.run_student.at(seen, of_student)
            loss.validate_outputs(*pair)
            total += weight * loss.compute_loss(*pair, labels=labels)
        return total


@dataclass(frozen=True)
class _Run:
    """A network that shows its logits and, from the same run, what some of its layers give."""

    model: Model
    layers: tuple[str, ...]

    @classmethod
    def of(cls, model: Model, names: Sequence[str | None]) -> _Run:
        """Make what shows the logits and the named layers; None names the logits."""
        layers = tuple(dict.fromkeys(name for name in names if name is not None))
        if not layers:
            return cls(model, ())
        outputs = [model.outputs[0], *(model.get_layer(name).output for name in layers)]
        # a list of one would not be what a batch looks like
        inputs = model.inputs[0] if len(model.inputs) == 1 else model.inputs
        return cls(keras.Model(inputs, outputs), layers)

    def __call__(self, images: Tensor, *, training: bool) -> list[Tensor]:
        """Return the logits, and then what the layers give."""
        shown = self.model(images, training=training)
        return list(shown) if self.layers else [shown]

    def at(self, shown: list[Tensor], layer: str | None) -> Tensor:
        """Return what one layer gave, or the logits."""
        return shown[0] if layer is None else shown[1 + self.layers.index(layer)]


def _weights(alpha: float | None, ce_weight: float | None, kd_weight: float | None) -> tuple[float, float]:
    if alpha is None:
        weights = 0.5 if ce_weight is None else ce_weight, 0.5 if kd_weight is None else kd_weight
        if not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            told = "ce_weight {:g}, kd_weight {:g}".format(*weights)
            raise ConfigError(f"Weights must be numbers of 0 or more and not both 0: {told}.")
        return weights
    if ce_weight is not None or kd_weight is not None:
        raise ConfigError("Say either alpha or ce_weight and kd_weight, not both.")
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is the share of the distillation term, between 0 and 1, not {alpha:g}.")
    return 1 - alpha, alpha


def _takes_logits(loss: Any) -> None:
    """Refuse a loss of Keras that takes probabilities.

    Raises:
        ConfigError: it does.
    """
    found = keras.losses.get(loss) if isinstance(loss, str) else loss
    plain = found in (keras.losses.sparse_categorical_crossentropy, keras.losses.categorical_crossentropy)
    if plain or (isinstance(found, keras.losses.Loss) and found.get_config().get("from_logits") is False):
        raise ConfigError(
            "This loss takes probabilities and the student gives logits: "
            "say loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), or leave it out."
        )


def _name(loss: Any, which: str) -> str | None:
    """Return the layer that a loss looks at; Keras' protocol is an attribute that may be there."""
    found: str | None = getattr(loss, which, None)
    return found
