"""The rows of the table that every loss goes through; `test_losses.py` is the suite. Each family has a file of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BATCH, CLASSES = 7, 5

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One loss with options, its inputs, and the same value computed slowly by other means."""

    name: str
    """Starts with the name of the loss in the catalogue; options follow after a space."""
    loss: Callable[..., Tensor]
    """Takes the inputs in order."""
    inputs: Callable[[torch.Generator], Inputs]
    """Draws the student's tensors, then the teacher's, then what has no gradient (labels, ids); float64."""
    slow: Callable[..., Tensor]
    """An independent oracle with loops, float64, written from the paper; same inputs, same shape as the loss."""
    students: int = 1
    """How many of the inputs are the student's."""
    teachers: int = 1
    """How many, after the student's, are the teacher's: no gradient may reach them."""
    per_example: bool = True
    """Whether it returns [batch]; a scalar otherwise."""
    zero_at_equality: bool = True
    """Whether it is 0 where the teacher's inputs equal the student's."""
    ignores_shift: bool = False
    """Whether a constant added to each of the student's tensors changes nothing."""
    ignores_scale: bool = False
    """Whether a positive factor on each of the student's tensors changes nothing."""
    ignores_order: bool = True
    """Whether permuting the batch permutes the values (or leaves the scalar)."""
    smooth: bool = True
    """Whether the gradient can be checked by finite differences at random inputs."""


def draw_logits(generator: torch.Generator) -> Inputs:
    """Draw the student's and the teacher's logits, float64 [batch, classes]."""
    student, teacher = 3 * torch.randn(2, BATCH, CLASSES, generator=generator, dtype=torch.float64)
    return student, teacher


def draw_labelled_logits(generator: torch.Generator) -> Inputs:
    """Draw logits and class numbers, int64 [batch]."""
    return *draw_logits(generator), torch.randint(CLASSES, (BATCH,), generator=generator)
