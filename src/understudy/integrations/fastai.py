"""Distillation in fastai: a callback that teaches the student of any `Learner`. Imported by users only.

    from understudy.integrations.fastai import DistillationCallback

    student = Learner(dls, resnet18(num_classes=2), metrics=accuracy)
    student.fit_one_cycle(10, 1e-3, cbs=DistillationCallback(teacher, method="kd", temperature=4, alpha=0.5))

fastai's loop stays as it is. In each training step the distiller runs in the place of the model, so that the student
answers once; neither the model, nor the loss function, nor the optimizer of the learner is another one outside of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from understudy.distillation import Distiller, Losses, Term, methods
from understudy.errors import ConfigError

try:
    from fastai.callback.core import Callback
    from fastai.callback.mixup import MixHandler
    from fastai.callback.schedule import LRFinder
    from fastai.data.load import DataLoader
    from fastai.learner import Learner, ValueMetric
    from fastai.optimizer import OptimWrapper
except ModuleNotFoundError as error:
    raise ConfigError("fastai is not installed: pip install 'understudy[fastai]'") from error

_PROBE = 8
"""Images that the networks are looked at with."""


@dataclass
class _Lesson:
    """What lasts for one fit."""

    distiller: Distiller
    optimizer: Any
    """Of the projectors; None where there are none."""
    is_trial: bool
    """The learner only looks for a learning rate: what the projectors learn on the way is forgotten."""


class DistillationCallback(Callback):  # type: ignore[misc]  # fastai has no types
    """Trains a learner's student with a teacher, by any method of `METHODS`.

        student.fit_one_cycle(5, 1e-3, cbs=DistillationCallback(teacher, method="kd+attention", alpha=0.5))

    - The training loss is the distiller's total. Its cross-entropy is the learner's own loss function, with whatever
      that does: label smoothing, class weights, MixUp. The validation loss is that function alone, so that it compares
      with training without a teacher.
    - A copy of the teacher answers: yours keeps its mode, device, hooks and gradients. It sees the batch as the student
      does, augmented, mixed and *normalised as the student's data are*; a teacher that wants other statistics or
      another size has to be given as a module that starts with its own transform (`Preprocess`).
    - Projectors learn in an optimizer of the learner's kind. It follows the learning rate, momentum and weight decay of
      the learner's last parameter group, so it has every schedule; the learner's own optimizer and what is saved of it
      stay as they are without distillation. Frozen groups stay frozen; projectors learn nevertheless.
    - Weights and temperatures that are schedules follow the progress of the fit.
    - Hooks are on the student within a step only. Nothing of the teacher is saved or exported with the learner. Use the
      same callback for several fits: projectors of the same student go on learning.

    Methods that remember each image (crd) need a `DataLoader` of fastai's over data with a length. While training,
    `learn.pred` has no gradient. One process: projectors are not synchronised between several.

    Args:
        teacher: a trained `Learner` or module, from images to logits of the same classes in the same order.
        method: a row of `METHODS`, or several joined by "+".
        temperature: T of the terms that take one; each method's own by default.
        alpha: sugar for `ce_weight=1 - alpha, kd_weight=alpha`.
        ce_weight: weight of the learner's own loss; 0.5 by default.
        kd_weight: times the weight of every other term; 0.5 by default.
        terms: your own terms instead of a method's; the learner's loss function then only validates.

    Raises:
        ConfigError: no such method, or a teacher that is neither a learner nor a module; and when training starts, what
            `Distiller` refuses, classes in another order, or mixed images where a method needs one label for each.
        ModelError: when training starts, the student and the teacher have different numbers of classes.
    """

    # the last before the model runs, so that no other callback meets what stands in its place; the last before the
    # step, too: after those that cancel it
    order, run_valid = 10_000, False
    _stateattrs = ("_teacher", "_lesson", "_kept", "_positions")
    """Left out when a learner is exported."""
    _teacher: Any = None
    _lesson: _Lesson | None = None
    _kept: tuple[nn.Module, dict[str, Tensor]] | None = None
    """A student, and the state of the projectors that were trained with it."""
    _model: nn.Module | None = None
    """The learner's, while this callback stands in its place."""
    _loss_func: Any = None
    _total: Tensor | None = None
    _positions: Sequence[int] | None = None

    def __init__(
        self,
        teacher: nn.Module | Learner,
        *,
        method: str = "kd",
        temperature: float | None = None,
        alpha: float | None = None,
        ce_weight: float | None = None,
        kd_weight: float | None = None,
        terms: Sequence[Term] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(teacher, nn.Module | Learner):
            raise ConfigError(f"The teacher is a fastai Learner or a torch module, not a {type(teacher).__name__}.")
        self._teacher = teacher
        self._rows = () if terms is not None else tuple(methods.split(method))
        self._terms = terms
        self._distiller = partial(
            Distiller,
            method=method,
            temperature=temperature,
            alpha=alpha,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            terms=terms,
        )
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    @property
    def part_metrics(self) -> list[ValueMetric]:
        """Columns for fastai's table: the mean of each part of the loss over an epoch's training steps, unweighted.

        `Learner(dls, model, metrics=[accuracy, *distillation.part_metrics])`.
        """
        own = [term.name for term in self._all_terms()]
        names = own if self._terms is not None else ["ce", *own]
        return [ValueMetric(partial(self.mean_of, name), f"train_{name}") for name in names]

    def mean_of(self, part: str) -> float | None:
        """Return the mean of a part of the loss over the steps of the last epoch, unweighted; None before any."""
        return float(self._sums[part]) / self._steps if part in self._sums else None

    def before_fit(self) -> None:
        """Clear away what a fit has left that ended by an error."""
        self._end()

    def before_train(self) -> None:
        """Forget the last epoch's parts; note which image comes when, for methods that remember each."""
        self._sums, self._steps = {}, 0
        if any("positions" in term.takes for term in self._all_terms()):
            self.learn.dl, self._positions = _in_known_order(self.learn.dl)

    def before_batch(self) -> None:
        """Let the distiller run in the place of the model, once."""
        if self.learn.yb:
            self._model, self.learn.model = self.learn.model, self._answer

    def after_cancel_batch(self) -> None:
        """Give the learner back what is its own."""
        self._give_back()

    def before_step(self) -> None:
        """Move the projectors, by the hyper-parameters of the learner's last group at this step."""
        optimizer = self._lesson.optimizer if self._lesson else None
        if optimizer is None:
            return
        optimizer.set_hypers(**{name: [value] for name, value in self.learn.opt.hypers[-1].items()})
        scaler = vars(self.learn).get("scaler")  # mixed precision
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)

    def after_step(self) -> None:
        """Clear the projectors' gradients, whether or not the step was skipped."""
        if self._lesson and self._lesson.optimizer is not None:
            self._lesson.optimizer.zero_grad()

    def after_fit(self) -> None:
        """Let go of the copy of the teacher; keep what the projectors have learned."""
        self._end()

    def _all_terms(self) -> list[Term]:
        """Return the terms, those of methods without the cross-entropy and at their usual weights."""
        if self._terms is not None:
            return list(self._terms)
        return [term for method in self._rows for term in method.terms()]

    def _answer(self, *inputs: Tensor) -> Tensor:
        """Return the student's logits, as the learner's model does; the loss is ready then."""
        self._give_back()  # at once: whatever happens from here on, the learner is itself
        losses = self._distil(inputs)
        self._total = losses.total
        self._loss_func, self.learn.loss_func = self.learn.loss_func, self._loss
        return losses.logits

    def _loss(self, predictions: Tensor, *targets: Tensor) -> Tensor:
        """Return the total that is ready; called as the learner's loss function, once."""
        total = self._total
        self._give_back()
        return self.learn.loss_func(predictions, *targets) if total is None else total

    def _give_back(self) -> None:
        if self._model is not None:
            self.learn.model, self._model = self._model, None
        if self._loss_func is not None:
            self.learn.loss_func, self._loss_func = self._loss_func, None
        self._total = None

    def _distil(self, inputs: tuple[Tensor, ...]) -> Losses:
        if len(inputs) != 1:
            raise ConfigError(f"The distiller takes batches of one input, such as images; these have {len(inputs)}.")
        images, labels = _plain(inputs[0]), _plain(self.learn.yb[0])
        if self._lesson is None:
            self._lesson = self._begin(images)
        distiller = self._lesson.distiller
        distiller.advance(min(float(self.learn.pct_train), 1.0))
        with _listening(distiller):
            losses: Losses = distiller(images, labels, positions=self._positions_of(images))
        for name, value in losses.parts.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._steps += 1
        return losses

    def _begin(self, images: Tensor) -> _Lesson:
        """Make what this fit needs, looking at the first images of its first batch."""
        self._check_mixing()
        samples = len(self._positions) if self._positions is not None else 0
        with torch.autocast(images.device.type, enabled=False):
            distiller = self._distiller(
                self._teacher_copied(), self.learn.model, example=images[:_PROBE], samples=samples
            )
        distiller.listen(on=False)
        if self._terms is None:
            distiller.terms = tuple(self._own(term) if term.name == "ce" else term for term in distiller.terms)
        if self._kept and self._kept[0] is self.learn.model:
            distiller.projectors.load_state_dict(self._kept[1])
        distiller.to(images.device)
        parameters = list(distiller.projectors.parameters())
        optimizer = _optimizer_like(self.learn, parameters) if parameters else None
        return _Lesson(distiller, optimizer, any(isinstance(one, LRFinder) for one in self.learn.cbs))

    def _end(self) -> None:
        self._give_back()
        lesson, self._lesson = self._lesson, None
        if lesson is None:
            return
        lesson.distiller.release()
        if not lesson.is_trial:
            self._kept = lesson.distiller.student, lesson.distiller.projectors.state_dict()

    def _own(self, term: Term) -> Term:
        """Return the cross-entropy with the learner's loss function in its place."""

        def loss(logits: Tensor) -> Tensor:
            return _plain(self.learn.loss_func(logits.float(), *self.learn.yb))

        return replace(term, loss=loss, takes=("student_logits",))

    def _teacher_copied(self) -> nn.Module:
        if self._teacher is None:
            raise ConfigError("A learner is exported without its teacher: give it a new DistillationCallback to train.")
        if isinstance(self._teacher, nn.Module):
            return copy.deepcopy(self._teacher)
        _check_classes(_classes(self._teacher), _classes(self.learn))
        network: nn.Module = copy.deepcopy(self._teacher.model)
        return network

    def _check_mixing(self) -> None:
        mixing = next((one.name for one in self.learn.cbs if isinstance(one, MixHandler)), None)
        needing = [term.name for term in self._all_terms() if {"labels", "positions"} & set(term.takes)]
        if mixing and needing:
            raise ConfigError(
                f"'{needing[0]}' needs to know which one image and class it sees, and {mixing} mixes two of them: "
                "leave one of the two out."
            )

    def _positions_of(self, images: Tensor) -> Tensor | None:
        if self._positions is None:
            return None
        size = self.learn.dl.bs
        found = self._positions[self.learn.iter * size : (self.learn.iter + 1) * size]
        if len(found) != len(images):
            raise ConfigError("The loader leaves images out: a method that remembers each of them cannot tell which.")
        return torch.tensor(found, device=images.device)


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor without fastai's subclass, which would follow it through every loss."""
    return tensor.as_subclass(Tensor)


@contextmanager
def _listening(distiller: Distiller) -> Iterator[None]:
    """Keep hooks on both networks for one step: fastai tells nobody when a fit ends by an error."""
    distiller.listen()
    try:
        yield
    finally:
        distiller.listen(on=False)


def _in_known_order(loader: Any) -> tuple[Any, list[int]]:
    """Return a loader of the same batches in an order that is settled now, and the images' positions in that order.

    Raises:
        ConfigError: a loader that does not tell.
    """
    if not isinstance(loader, DataLoader) or not loader.indexed or loader.n is None or not loader.bs:
        raise ConfigError(
            "This method remembers each image, so it needs fastai's DataLoader over data with a length, in batches."
        )
    order = list(loader.get_idxs())
    return loader.new(get_idxs=partial(list, order)), order


def _optimizer_like(learn: Learner, parameters: list[nn.Parameter]) -> Any:
    """Return an optimizer of the learner's kind, with fastai's interface."""
    if isinstance(learn.opt_func, OptimWrapper):  # a ready one, which holds the student's parameters
        return OptimWrapper(parameters, type(learn.opt_func.opt))
    return learn.opt_func(parameters, lr=learn.lr)


def _classes(learn: Learner) -> list[str]:
    """Return the names of a learner's classes; none where its data have no names."""
    return [str(name) for name in getattr(learn.dls, "vocab", None) or []]


def _check_classes(teachers: list[str], students: list[str]) -> None:
    if teachers and students and len(teachers) == len(students) and teachers != students:
        place = next(place for place, pair in enumerate(zip(teachers, students, strict=True)) if pair[0] != pair[1])
        raise ConfigError(
            f"The teacher's class {place} is '{teachers[place]}' and the student's '{students[place]}': "
            "both need the same classes in the same order."
        )
