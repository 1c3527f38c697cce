"""Shapes that tests build projectors for, and what is drawn of these shapes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from understudy.distillation.memory import Contrast
from understudy.distillation.projectors import Shapes

BATCH, SAMPLES, CLASSES = 4, 11, 3
MAPS = Shapes(student=((3, 8, 8),), teacher=((6, 4, 4),))
STAGES = Shapes(student=((3, 8, 8), (4, 4, 4), (8, 2, 2)), teacher=((6, 8, 8), (4, 8, 8), (10, 4, 4)))
EMBEDDINGS = Shapes(student=((5,),), teacher=((6,),))


def two_heads() -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(3, CLASSES), nn.Linear(6, CLASSES).requires_grad_(False)


def small_contrast(negatives: int | None = None) -> Contrast:
    return Contrast(EMBEDDINGS._replace(samples=SAMPLES), width=7, negatives=negatives)


def drawn(shapes: Shapes, seed: int = 0, *, gradient: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Draw the student's and the teacher's features for every pair of layers."""
    torch.manual_seed(100 + seed)
    student = [torch.randn(BATCH, *shape, requires_grad=gradient) for shape in shapes.student]
    return student, [torch.randn(BATCH, *shape) for shape in shapes.teacher]
