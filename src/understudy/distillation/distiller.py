"""`Distiller`: teacher, student and terms to a total loss with named parts. The one object every training loop uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from understudy.distillation import methods
from understudy.distillation.methods import Term
from understudy.distillation.teacher import Teacher
from understudy.errors import ConfigError, ModelError


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

    `parameters()` and `state_dict()` hold the student alone: the teacher is frozen, moves along with `.to()`, and is
    never saved. Without a teacher, the objective is the cross-entropy with the labels: plain training.

    Args:
        teacher: a trained module from images to logits, or None; frozen in place.
        student: the module to train.
        method: a row of `METHODS`.
        temperature: T of the distillation term.
        alpha: sugar for `ce_weight=1 - alpha, kd_weight=alpha`.
        ce_weight: weight of the cross-entropy with the labels; 0.5 by default.
        kd_weight: weight of the distillation term; 0.5 by default.
        label_smoothing: of the cross-entropy.
        terms: your own terms instead of a method's.

    Raises:
        ConfigError: an unknown method, or weights that do not make sense.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        *,
        method: str = "kd",
        temperature: float = 4.0,
        alpha: float | None = None,
        ce_weight: float | None = None,
        kd_weight: float | None = None,
        label_smoothing: float = 0.0,
        terms: Sequence[Term] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        # in a tuple, so that torch registers neither parameters nor buffers of the teacher
        self._teacher = (Teacher(teacher) if teacher is not None else None,)
        if terms is None and teacher is None:
            terms = [methods.label_term(label_smoothing=label_smoothing)]
        elif terms is None:
            ce_weight, kd_weight = _weights(alpha, ce_weight, kd_weight)
            terms = methods.terms(
                method,
                temperature=temperature,
                ce_weight=ce_weight,
                kd_weight=kd_weight,
                label_smoothing=label_smoothing,
            )
        self.terms = tuple(terms)

    @property
    def teacher(self) -> Teacher | None:
        """The frozen teacher."""
        return self._teacher[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the teacher along with the student."""
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, images: Tensor, labels: Tensor | None = None, *, teacher_logits: Tensor | None = None) -> Losses:
        """Run the student once, the teacher only where it is needed, and weigh the terms.

        Args:
            images: [batch, channels, height, width], the same view for both networks.
            labels: int64 [batch]; may be None where no term compares with labels.
            teacher_logits: ready answers [batch, classes]; the teacher is then not run.

        Returns:
            The total, the parts by name, and the student's logits.

        Raises:
            ModelError: teacher and student have different numbers of classes.
            ConfigError: a term has nothing to compare with.
        """
        logits = self.student(images)
        targets = {"labels": labels, "teacher": self._answers(images, teacher_logits)}
        total: Tensor | None = None
        parts = {}
        for term in self.terms:
            target = targets[term.target]
            if target is None:
                raise ConfigError(f"The term '{term.name}' compares the student with the {term.target}; none given.")
            if term.target == "teacher":
                _same_classes(logits, target)
            part = term.loss(logits, target).mean()
            total = _add(total, part, term.weight)
            parts[term.name] = part.detach()
        if total is None:
            raise ConfigError("There is no term to minimise.")
        return Losses(total, parts, logits.detach())

    def _answers(self, images: Tensor, ready: Tensor | None) -> Tensor | None:
        if ready is not None or self.teacher is None or all(term.target != "teacher" for term in self.terms):
            return ready
        answers: Tensor = self.teacher(images)
        return answers


def _add(total: Tensor | None, part: Tensor, weight: float) -> Tensor:
    """Return total + weight x part in as few operations as there can be: they cost as much as a tiny student."""
    if total is not None:
        return torch.add(total, part, alpha=weight)
    return part if weight == 1 else part * weight


def _weights(alpha: float | None, ce_weight: float | None, kd_weight: float | None) -> tuple[float, float]:
    if alpha is not None:
        if ce_weight is not None or kd_weight is not None:
            raise ConfigError("Say either alpha or ce_weight and kd_weight, not both.")
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha is the share of the distillation term, between 0 and 1, not {alpha:g}.")
        return 1 - alpha, alpha
    return 0.5 if ce_weight is None else ce_weight, 0.5 if kd_weight is None else kd_weight


def _same_classes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ModelError(
            f"The student answers {list(student_logits.shape)} and the teacher {list(teacher_logits.shape)} "
            "([batch, classes]); both need the same classes in the same order."
        )
