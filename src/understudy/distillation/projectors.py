"""Modules that make a student's features fit its teacher's: the base, and those that look at one pair of layers.

They are built from the shapes that a probe has seen, trained with the student, and never part of its file. Each one's
`forward` takes what its term takes and returns the arguments of the term's loss. Used by the table of methods and the
distiller.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from understudy.errors import ModelError
from understudy.losses.contrastive import VARIANCE_FLOOR


class Shapes(NamedTuple):
    """What a projector is built from: one pair of layers, or all of them for a projector of lists."""

    student: tuple[tuple[int, ...], ...]
    """Shapes of the student's layers without the batch: (channels, height, width) or (features,)."""
    teacher: tuple[tuple[int, ...], ...]
    """Likewise of the teacher's, one for each of the student's."""
    samples: int = 0
    """Number of training images, for projectors that remember them."""
    student_head: nn.Linear | None = None
    """The student's final layer, for projectors that look through it."""
    teacher_head: nn.Linear | None = None
    """The teacher's final layer, likewise."""
    student_network: nn.Module | None = None
    """The student itself, for projectors that train another one of its kind."""


class Projector(nn.Module):
    """What every projector is. Teacher's tensors arrive detached; nothing of the teacher's is registered."""

    own_loss: Tensor | None = None
    """A scalar that the projector itself has to minimise, set by `forward` in training; to be added to the total."""


def meet(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return two maps [batch, channels, height, width] of one size: the larger is averaged down to the smaller.

    Height and width are looked at one by one. What fits comes back as it is, and so do embeddings [batch, features].
    """
    if student.ndim != 4 or teacher.ndim != 4:
        return student, teacher
    size = smaller_size(student, teacher)
    return _average(student, size), _average(teacher, size)


def smaller_size(*maps: Tensor) -> tuple[int, int]:
    """Return the least height and the least width of maps [batch, channels, height, width]."""
    return min(values.shape[2] for values in maps), min(values.shape[3] for values in maps)


def map_channels(shapes: Shapes) -> list[tuple[int, int]]:
    """Return the channels of student and teacher for every pair of maps.

    Raises:
        ModelError: a layer gives no map.
    """
    pairs = list(zip(shapes.student, shapes.teacher, strict=True))
    for student, teacher in pairs:
        if len(student) != 3 or len(teacher) != 3:
            raise ModelError(
                f"This method compares maps [channels, height, width], but the layers give {list(student)} (student) "
                f"and {list(teacher)} (teacher): choose layers before the pooling."
            )
    return [(student[0], teacher[0]) for student, teacher in pairs]


def widths(shapes: Shapes) -> tuple[int, int, bool]:
    """Return the student's and the teacher's channels or features, and whether the one pair of layers gives maps.

    Raises:
        ModelError: one gives a map and the other an embedding, or something else.
    """
    ((student, teacher),) = zip(shapes.student, shapes.teacher, strict=True)
    if len(student) != len(teacher) or len(student) not in (1, 3):
        raise ModelError(
            "This method compares two maps [channels, height, width] or two embeddings [features], but the layers "
            f"give {list(student)} (student) and {list(teacher)} (teacher)."
        )
    return student[0], teacher[0], len(student) == 3


def pointwise(inputs: int, outputs: int, *, maps: bool = True, bias: bool = True) -> nn.Module:
    """Return the linear layer of every place of a map, a 1x1 convolution; or that of an embedding."""
    return nn.Conv2d(inputs, outputs, 1, bias=bias) if maps else nn.Linear(inputs, outputs, bias=bias)


def normed(inputs: int, outputs: int, *, maps: bool = True) -> nn.Sequential:
    """Return a pointwise layer and its batch norm."""
    norm = nn.BatchNorm2d(outputs) if maps else nn.BatchNorm1d(outputs)
    return nn.Sequential(pointwise(inputs, outputs, maps=maps, bias=False), norm)


class Meet(Projector):
    """No parameters: maps of one size, whatever their channels. For attention, nst and similarity."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        widths(shapes)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both [batch, their own channels, height, width] at the smaller size; embeddings as they are."""
        return meet(student, teacher)


class Regressor(Projector):
    """From the student's channels to the teacher's by one pointwise layer with bias, after meeting. For hint.

    Source:
        Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, section 2.2. Deviation: the paper's regressor is a
        convolution with a kernel as large as the sizes differ; here the sizes meet by averages and the kernel is 1x1.

    Raises:
        ModelError: the layers give neither two maps nor two embeddings.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        student, teacher, maps = widths(shapes)
        self.regress = pointwise(student, teacher, maps=maps)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both [batch, teacher's channels, height, width], or [batch, teacher's features]."""
        student, teacher = meet(student, teacher)
        return self.regress(student), teacher


class Bottleneck(Projector):
    """From the student's last map to the teacher's by 1x1, 3x3 and 1x1 convolutions. For simkd.

    The student answers through it and the teacher's head: `head(project(map).mean((2, 3)))`.

    Source:
        Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", 2022, section 3; inner width half of
        the teacher's channels. Where one map is larger it is averaged down, here as there.

    Raises:
        ModelError: the layers do not give two maps.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        ((student, teacher),) = map_channels(shapes)
        inner = max(1, teacher // 2)
        self.project = nn.Sequential(
            *normed(student, inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            *normed(inner, teacher),
            nn.ReLU(),
        )

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both [batch, teacher's channels, height, width]."""
        student, teacher = meet(student, teacher)
        return self.project(student), teacher


class ABConnector(Projector):
    """From the student's pre-activations to the teacher's by a 1x1 convolution and a batch norm. For ab.

    Source:
        Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", 2019:
        the connector r.

    Raises:
        ModelError: the layers do not give two maps.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        ((student, teacher),) = map_channels(shapes)
        self.connect = normed(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both [batch, teacher's channels, height, width]."""
        student, teacher = meet(student, teacher)
        return self.connect(student), teacher


class Connector(Projector):
    """As `ABConnector`, with the teacher's margin: the mean of the negative responses of a channel. For ofd.

    The buffer `margin` [teacher's channels], at most 0, is the mean over all negative values of the batches seen in
    training mode, the present one included; 0 for a channel that was never negative.

    Source:
        Heo et al., "A Comprehensive Overhaul of Feature Distillation", 2019, section 3 (margin ReLU: the expectation of
        the negative response). Deviation: the paper takes the expectation of a Gaussian with the mean and deviation of
        the batch norm before the ReLU; here it is measured, so that teachers without such a batch norm have one, too.
        The first steps see the margin of few batches.

    Raises:
        ModelError: the layers do not give two maps.
    """

    margin: Tensor
    negatives: Tensor

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        ((student, teacher),) = map_channels(shapes)
        self.connect = normed(student, teacher)
        self.register_buffer("margin", torch.zeros(teacher))
        self.register_buffer("negatives", torch.zeros(teacher, dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return both [batch, teacher's channels, height, width], and the margin."""
        student, teacher = meet(student, teacher)
        if self.training:
            self._measure(teacher)
        # a copy: the next batch moves the buffer while this one may still wait for its gradient
        return self.connect(student), teacher, self.margin.clone()

    @torch.no_grad()
    def _measure(self, teacher: Tensor) -> None:
        sums = teacher.float().clamp_max(0).sum((0, 2, 3))
        counts = (teacher < 0).sum((0, 2, 3))
        self.negatives += counts
        self.margin += (sums - counts * self.margin) / self.negatives.clamp_min(1)


class Variational(Projector):
    """Mean and variance of the teacher's features given the student's. For vid.

    The mean is learned by three pointwise layers of the teacher's width with batch norm and ReLU between; the variance
    is learned for each channel and starts at 5. Embeddings work, too.

    Source:
        Ahn et al., "Variational Information Distillation for Knowledge Transfer", 2019; widths as in published code.

    Raises:
        ModelError: the layers give neither two maps nor two embeddings.
    """

    def __init__(self, shapes: Shapes, *, variance: float = 5.0) -> None:
        super().__init__()
        student, teacher, maps = widths(shapes)
        self.mean = nn.Sequential(
            *normed(student, teacher, maps=maps),
            nn.ReLU(),
            *normed(teacher, teacher, maps=maps),
            nn.ReLU(),
            pointwise(teacher, teacher, maps=maps),
        )
        # the inverse of softplus, which the loss takes
        self.scale = nn.Parameter(torch.full((teacher,), math.log(math.expm1(variance - VARIANCE_FLOOR))))

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean, the raw scale [channels] and the teacher's features, shaped as the mean."""
        student, teacher = meet(student, teacher)
        return self.mean(student), self.scale, teacher


def _average(values: Tensor, size: tuple[int, int]) -> Tensor:
    return values if values.shape[2:] == size else F.adaptive_avg_pool2d(values, size)
