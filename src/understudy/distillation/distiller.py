"""`Distiller`: teacher, student and terms to a total loss with named parts. The one object every training loop uses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from understudy.distillation import methods
from understudy.distillation.inputs import Inputs, answer
from understudy.distillation.methods.method import (
    check_smoothing,
    check_temperature,
    over_labelled,
    refuse_beside_terms,
    shares,
)
from understudy.distillation.projectors import Projector
from understudy.distillation.teacher import Teacher, check_student, share
from understudy.distillation.terms import Input, Term, at
from understudy.distillation.watching import Heard, Values, Watch
from understudy.errors import ConfigError, ModelError

_READY: tuple[Input, ...] = ("labels", "teacher_logits", "teacher_embedding", "positions")
"""What a step may bring along."""
_TEACHERS_INSIDE = ("teacher_embedding", "teacher_map", "teacher_maps")


class Losses(NamedTuple):
    """What one step yields."""

    total: Tensor
    """The weighted sum of the parts, a scalar: call `backward()` on it."""
    parts: dict[str, Tensor]
    """The mean over the batch of every term, unweighted, detached."""
    logits: Tensor
    """The student's logits [batch, classes], detached: it has run once, so a metric need not run it again."""


class Distiller(nn.Module):
    """The objective that a student is trained with.

        distiller = Distiller(teacher, student, method="kd", temperature=4, alpha=0.5)
        losses = distiller(images, labels)
        losses.total.backward()

    `parameters()` hold the student and, where terms compare features, the projectors that fit them to the teacher's:
    give all of them to the optimizer, and save `distiller.student`. The teacher is frozen, moves along with `.to()`,
    and is never saved. Without a teacher, the objective is the cross-entropy with the labels: plain training.

    Images may be any tensor that both networks take as their only argument, or, as in text, a mapping of tensors that
    both take as keyword arguments: `distiller({"input_ids": ids, "attention_mask": mask}, labels)`. A network may
    return its logits or, as those of Hugging Face's transformers do, an object that has `logits`.

    Args:
        teacher: a trained module from images to logits, or None; frozen in place.
        student: the module to train.
        method: a row of `METHODS`, or several joined by "+"; "kd" by default, and plain training without a teacher.
        temperature: T of the terms that take one; each method's own by default.
        alpha: sugar for `ce_weight=1 - alpha, kd_weight=alpha`.
        ce_weight: weight of the cross-entropy with the labels; 0.5 by default.
        kd_weight: times the weight of every other term; 0.5 by default.
        label_smoothing: of the cross-entropy.
        terms: your own terms instead of a method's and its weights.
        example: some images [2 or more, channels, height, width], or such a mapping, for methods that compare features.
        samples: number of training images, for methods that remember each of them.

    Raises:
        ConfigError: an unknown method, one that needs a teacher where there is none, settings that do not make sense,
            features that cannot be compared, a teacher that is part of the student, or a student that cannot learn.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        *,
        method: str | None = None,
        temperature: float | None = None,
        alpha: float | None = None,
        ce_weight: float | None = None,
        kd_weight: float | None = None,
        label_smoothing: float = 0.0,
        terms: Sequence[Term] | None = None,
        example: Inputs | None = None,
        samples: int = 0,
    ) -> None:
        super().__init__()
        settings = {"temperature": temperature, "alpha": alpha, "ce_weight": ce_weight, "kd_weight": kd_weight}
        if terms is None:
            terms = _terms_of(method, settings, label_smoothing, has_teacher=teacher is not None)
        else:
            refuse_beside_terms(method, settings)
        self.terms = tuple(terms)
        _check_names(self.terms)
        self._asked = {name for term in self.terms for name in term.takes if name.startswith("teacher")}
        check_student(student, teacher if self._asked else None)
        self.student = student
        # in a tuple, so that torch registers neither parameters nor buffers of the teacher
        self._teacher = (Teacher(teacher) if teacher is not None and not share(teacher, student) else None,)
        self._watch = self._watching(example, samples)
        self.projectors = self._watch.projectors() if self._watch else nn.ModuleDict()
        if self._watch:
            self._watch.listen()
        self._listens, self._is_released = True, False
        self._is_steady = all(term.is_steady for term in self.terms)
        self._progress = 0.0
        rows = methods.split(method) if method else []
        self._doubtful = tuple((row.name, row.fewest_classes) for row in rows if row.fewest_classes > 2)

    @property
    def teacher(self) -> Teacher | None:
        """The frozen teacher."""
        return self._teacher[0]

    @property
    def is_steady(self) -> bool:
        """Whether no weight and no temperature changes while training goes on."""
        return self._is_steady

    def advance(self, progress: float) -> None:
        """Say which share of training is done, in [0, 1]; schedules follow."""
        self._progress = progress

    def dismiss_teacher(self) -> None:
        """Let go of the teacher: its answers will be given ready."""
        if self._watch and not self._is_released:
            self.listen()  # the student's hooks could not be put on afterwards
            self._watch.teacher.dismiss()
        self._teacher = (None,)

    def listen(self, *, on: bool = True) -> None:
        """Put the hooks on both networks, where they are from the start, or take them off until the next step.

        Raises:
            ConfigError: after `release`; or to take them off after `dismiss_teacher`.
        """
        if self._is_released:
            raise ConfigError("This distiller was released, and its hooks are gone; make a new one.")
        if self._watch is None or on == self._listens:
            return
        if self._watch.teacher.module is None:
            raise ConfigError("This distiller's teacher was dismissed, so its hooks stay on until `release`.")
        if on:
            self._watch.listen()
        else:
            self._watch.pause()
        self._listens = on

    def release(self) -> None:
        """Take the hooks off both networks, at the end of training; the distiller cannot be used afterwards."""
        if self._watch:
            self._watch.student.dismiss()
            self._watch.teacher.dismiss()
            self._is_released = True

    def _watching(self, example: Inputs | None, samples: int) -> Watch | None:
        inside = [term for term in self.terms if term.takes_features]
        if not inside:
            return None
        by_teacher = [term for term in inside if any(name in _TEACHERS_INSIDE for name in term.takes)]
        if by_teacher and self.teacher is None:
            raise ConfigError(f"The term '{by_teacher[0].name}' compares features: give the distiller a teacher.")
        if example is None:
            raise ConfigError(f"The term '{inside[0].name}' needs a probe: give the distiller images as `example`.")
        return Watch(self.student, self.teacher.model if self.teacher else None, inside, example, samples)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the teacher along with the student."""
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self,
        images: Inputs,
        labels: Tensor | None = None,
        *,
        teacher_logits: Tensor | None = None,
        teacher_embedding: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Losses:
        """Run the student once, the teacher only where it is needed, and weigh the terms.

        Args:
            images: [batch, channels, height, width], the same view for both networks; or their keyword arguments.
            labels: int64 [batch], or shares, float [batch, classes]; may be None where no term takes them.
            teacher_logits: ready answers [batch, classes]; the teacher is then not run unless a term needs more.
            teacher_embedding: ready as well, [batch, width].
            positions: of the images within the training split, int64 [batch], for terms that remember images.

        Returns:
            The total, the parts by name, and the student's logits.

        Raises:
            ModelError: teacher and student have different numbers of classes, or a network returns no logits.
            ConfigError: a term lacks something that it takes, or the distiller was released.
        """
        ready: dict[Input, Tensor | None] = {
            "labels": labels,
            "teacher_logits": teacher_logits,
            "teacher_embedding": teacher_embedding,
            "positions": positions,
        }
        logits, values = self._run(images, ready)
        total: Tensor | None = None
        parts = {}
        for term, value in values:
            total = _add(total, value, at(term.weight, self._progress))
            parts[term.name] = value.detach()
        if total is None:
            raise ConfigError("There is no term to minimise.")
        for own in self._own_losses():
            total = total + own
        return Losses(total, parts, logits.detach())

    def weighted(self, images: Inputs, ready: dict[Input, Tensor | None]) -> dict[str, Tensor]:
        """Return every term times its weight, with gradients, to look at them one by one.

        Args:
            images: as for `forward`.
            ready: its other inputs by name.
        """
        _, values = self._run(images, dict.fromkeys(_READY) | ready)
        return {term.name: value * at(term.weight, self._progress) for term, value in values}

    def _run(self, images: Inputs, values: dict[Input, Tensor | None]) -> tuple[Tensor, list[tuple[Term, Tensor]]]:
        """Return the student's logits, and every term with its mean over the batch."""
        if self._watch is not None:
            self._get_ready()
        logits = answer(self.student, images)
        values["images"] = images if isinstance(images, Tensor) else None
        values["student_logits"] = logits
        ran = self._ask_teacher(images, values)
        if values["teacher_logits"] is not None:
            _same_classes(logits, values["teacher_logits"])
        self._warn_of_few(logits.shape[1])
        if self._watch is None:
            with _in_full_precision(logits):
                return logits, [(term, self._mean(term, _take(term, values))) for term in self.terms]
        return logits, self._look_inside(self._watch, logits, values, teacher_ran=ran)

    def _warn_of_few(self, classes: int) -> None:
        """Say once which methods have little to say of so few classes; compiled code says nothing."""
        if not self._doubtful or torch.compiler.is_compiling():
            return
        for name, fewest in self._doubtful:
            if classes < fewest:
                warnings.warn(f"With {classes} classes {name} says little or nothing: take kd.", stacklevel=2)
        self._doubtful = ()

    def _get_ready(self) -> None:
        """Put the hooks on where they were taken off.

        Raises:
            ConfigError: the networks can no longer be looked into.
        """
        if not self._listens or self._is_released:
            self.listen()
        blind = next((term for term in self.terms if term.runs_teacher), None)
        if blind is not None and self.teacher is None:
            raise ConfigError(f"The term '{blind.name}' compares feature maps: do not dismiss the distiller's teacher.")

    def _ask_teacher(self, images: Inputs, values: dict[Input, Tensor | None]) -> bool:
        """Run the teacher where a term takes something of it that is not ready; tell whether it ran."""
        if self.teacher is None or all(values.get(name) is not None for name in self._asked):
            return False
        values["teacher_logits"] = self.teacher(images)
        return True

    def _look_inside(
        self, watch: Watch, logits: Tensor, values: dict[Input, Tensor | None], *, teacher_ran: bool
    ) -> list[tuple[Term, Tensor]]:
        student, teacher = watch.student.take(), watch.teacher.take() if teacher_ran else {}
        values["student_embedding"] = watch.student.embedding(student)
        if values["positions"] is not None:
            values["positions"] = values["positions"].to(logits.device)
        if values["teacher_embedding"] is None:
            values["teacher_embedding"] = watch.teacher.embedding(teacher)
        found = [self._fitted(watch, term, values, student, teacher) for term in self.terms]
        # only now, so that projectors run in the precision of the networks
        with _in_full_precision(logits):
            return [
                (term, _sum([self._mean(term, one) for one in given], term.fade))
                for term, given in zip(self.terms, found, strict=True)
            ]

    def _fitted(
        self, watch: Watch, term: Term, values: dict[Input, Tensor | None], student: Heard, teacher: Heard
    ) -> list[Sequence[Tensor]]:
        """Return the arguments of a term's loss, once for every time that it is taken."""
        if not term.takes_features:
            return [_take(term, values)]
        given = [_present(term, one) for one in watch.gather(term, values, student, teacher)]
        if term.name not in self.projectors:
            return list(given)
        fitted: list[Sequence[Tensor]] = []
        for projector, one in zip(self._projectors_of(term), given, strict=True):
            made = projector(*one)
            fitted += made if isinstance(made, list) else [made]
        return fitted

    def _projectors_of(self, term: Term) -> nn.ModuleList:
        found = self.projectors[term.name]
        assert isinstance(found, nn.ModuleList)
        return found

    def _own_losses(self) -> list[Tensor]:
        every = [one for term in self.projectors.values() for one in term.children() if isinstance(one, Projector)]
        return [projector.own_loss for projector in every if projector.own_loss is not None]

    def _mean(self, term: Term, given: Sequence[Tensor]) -> Tensor:
        if term.temperature is None:
            return term.loss(*given).mean()
        return term.loss(*given, temperature=at(term.temperature, self._progress)).mean()


def _in_full_precision(logits: Tensor) -> AbstractContextManager[object]:
    """Return the context of losses: products of matrices in half precision would spoil them."""
    device = logits.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _sum(parts: list[Tensor], fade: float) -> Tensor:
    """Return the sum over pairs of layers, given from shallow to deep, each weighed by `fade` less than the next."""
    last = len(parts) - 1
    return torch.stack([part * fade ** (last - number) for number, part in enumerate(parts)]).sum()


def _take(term: Term, values: Values) -> list[Tensor]:
    return _present(term, [values[name] for name in term.takes])


def _present(term: Term, given: Sequence[Tensor | list[Tensor] | None]) -> list[Tensor]:
    """Return what a term is given.

    Raises:
        ConfigError: something is missing.
    """
    for name, value in zip(term.takes, given, strict=True):
        if value is None:
            raise ConfigError(f"The term '{term.name}' takes {name.replace('_', ' ')}; none given.")
    return given  # type: ignore[return-value]


def _add(total: Tensor | None, part: Tensor, weight: float) -> Tensor:
    """Return total + weight x part in as few operations as there can be: they cost as much as a tiny student."""
    if total is not None:
        return torch.add(total, part, alpha=weight)
    return part if weight == 1 else part * weight


def _same_classes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ModelError(
            f"The student answers {list(student_logits.shape)} and the teacher {list(teacher_logits.shape)} "
            "([batch, classes]); both need the same classes in the same order."
        )


def _check_names(terms: Sequence[Term]) -> None:
    names = [term.name for term in terms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"Two terms are called '{twice}'; give one of them another name.")


def _terms_of(
    method: str | None, settings: dict[str, float | None], label_smoothing: float, *, has_teacher: bool
) -> Sequence[Term]:
    """Return the terms of a method; without one, of "kd", or of plain training where there is no teacher."""
    ce_weight, kd_weight = shares(settings["alpha"], settings["ce_weight"], settings["kd_weight"])
    check_temperature(settings["temperature"])
    check_smoothing(label_smoothing)
    if method is None and not has_teacher:
        return [over_labelled(methods.label_term(label_smoothing=label_smoothing))]
    rows = methods.split(method or "kd")
    needing = next((row.name for row in rows if row.needs_teacher), None)
    if needing and not has_teacher:
        raise ConfigError(f"The method '{needing}' needs a teacher: give one, or leave `method` out to train plainly.")
    made = methods.terms(
        method or "kd",
        temperature=settings["temperature"],
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        label_smoothing=label_smoothing,
    )
    return [over_labelled(term) if term.name == "ce" else term for term in made]
