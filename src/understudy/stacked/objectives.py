"""What each student of a stack minimises: equal losses of several students are one call. Imported by `stepper.py`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from understudy.distillation.schedules import Schedule
from understudy.distillation.terms import Input, Term

_TAKEN = {"student_logits", "teacher_logits", "labels"}


def stackable(terms: Sequence[Term]) -> bool:
    """Tell whether an objective compares nothing but logits, with weights and temperatures that stay what they are."""
    return all(_TAKEN.issuperset(term.takes) and term.projector is None and term.is_steady for term in terms)


class Parts(NamedTuple):
    """The losses of one step."""

    total: Tensor
    """The weighted sum of the terms of each student, [students]."""
    parts: Tensor
    """The mean over the batch of every term, unweighted, detached, [students, names]; 0 where a student has no such."""


class _Shared(NamedTuple):
    """One loss of several students."""

    column: int
    loss: Callable[..., Tensor]
    takes: tuple[Input, ...]
    rows: Tensor
    """int64 [students with it]."""
    weights: Tensor
    """float32 [students with it]."""


class Objectives:
    """The objectives of all students.

    Args:
        terms: of each student; `stackable` says of each that it can be here.
        device: where logits come from.

    Attributes:
        names: of all terms, in the order of `Parts.parts`.
    """

    def __init__(self, terms: Sequence[Sequence[Term]], device: torch.device) -> None:
        self.names = list(dict.fromkeys(term.name for own in terms for term in own))
        self._students = len(terms)
        found: dict[Hashable, list[tuple[int, Term]]] = {}
        for row, own in enumerate(terms):
            for term in own:
                found.setdefault((term.name, term.takes, term.temperature, _spelled(term.loss)), []).append((row, term))
        self._shared = [self._share(users, device) for users in found.values()]

    def __len__(self) -> int:
        """Return how many different losses there are: each costs some operations a step."""
        return len(self._shared)

    def _share(self, users: list[tuple[int, Term]], device: torch.device) -> _Shared:
        term = users[0][1]
        rows = torch.tensor([row for row, _ in users], device=device)
        weights = torch.tensor([_number(own.weight) for _, own in users], device=device)
        options = {} if term.temperature is None else {"temperature": term.temperature}
        return _Shared(self.names.index(term.name), partial(term.loss, **options), term.takes, rows, weights)

    def __call__(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Parts:
        """Weigh the terms of all students.

        Args:
            logits: [students, batch, classes].
            labels: as a batch has them, the same for all.
            teacher_logits: [batch, classes], the same for all; None where no term takes them.
        """
        parts = logits.new_zeros(self._students, len(self.names), dtype=torch.float32)
        total = logits.new_zeros(self._students, dtype=torch.float32)
        for shared in self._shared:
            own = logits if len(shared.rows) == self._students else logits[shared.rows]
            values = torch.vmap(partial(_mean, shared, labels, teacher_logits))(own)
            total = total.index_add(0, shared.rows, values * shared.weights)
            parts[shared.rows, shared.column] = values.detach()
        return Parts(total, parts)


def _mean(shared: _Shared, labels: Tensor, teacher_logits: Tensor | None, student_logits: Tensor) -> Tensor:
    """Return the mean over the batch of one student's loss."""
    given = {"student_logits": student_logits, "teacher_logits": teacher_logits, "labels": labels}
    return shared.loss(*(given[name] for name in shared.takes)).mean()


def _number(weight: float | Schedule) -> float:
    assert not isinstance(weight, Schedule)
    return float(weight)


def _spelled(loss: Callable[..., Tensor]) -> Hashable:
    """Return what is equal for losses that compute the same."""
    if isinstance(loss, partial):
        return loss.func, loss.args, tuple(sorted(loss.keywords.items()))
    return loss
