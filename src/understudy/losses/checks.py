"""What every loss does first: take its inputs in full precision, look at their shapes. Used inside `losses` only."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(values: Tensor) -> Tensor:
    """Return values in float32, or as they are in float64: half precision underflows, checks of gradients need more."""
    return values if values.dtype == torch.float64 else values.float()


def logits(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in full precision, the teacher's without gradient.

    Raises:
        ValueError: they are not both [batch, classes].
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
        raise ValueError(
            f"logits must both be [batch, classes]: student {tuple(student_logits.shape)}, "
            f"teacher {tuple(teacher_logits.shape)}"
        )
    return widen(student_logits), widen(teacher_logits.detach())


def same_shape(student: Tensor, teacher: Tensor, *, dimensions: int, what: str) -> tuple[Tensor, Tensor]:
    """Return both in full precision, the teacher's without gradient.

    Args:
        student: any floating dtype.
        teacher: likewise.
        dimensions: how many both have.
        what: the shape in words for the error, such as "maps must both be [batch, channels, height, width]".

    Raises:
        ValueError: the shapes differ, or have another number of dimensions.
    """
    if student.shape != teacher.shape or student.ndim != dimensions:
        raise ValueError(f"{what}: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    return widen(student), widen(teacher.detach())


def hard_labels(labels: Tensor, student_logits: Tensor) -> Tensor:
    """Return the class numbers.

    Raises:
        ValueError: they are not int64 [batch]: shares of mixed images have no single class.
    """
    if labels.is_floating_point() or labels.shape != student_logits.shape[:1]:
        raise ValueError(
            f"labels must be class numbers [batch], one for each row of logits {tuple(student_logits.shape)}, "
            f"not {tuple(labels.shape)} of {labels.dtype}"
        )
    return labels


def positive_temperature(temperature: float) -> None:
    """Refuse a temperature that softens nothing.

    Raises:
        ValueError: it is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
