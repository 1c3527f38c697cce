"""Projectors of all stages of the two networks at once: lists of maps in, one tuple of arguments for every loss call.

Used by the table of methods and the distiller; the contract of a projector is in `projectors`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from understudy.distillation.projectors import Projector, Shapes, map_channels, normed, pointwise, smaller_size
from understudy.errors import ModelError

WIDEST = 512
"""Channels of ReviewKD's fusion, where the teacher has more."""


class Flow(Projector):
    """Pairs of consecutive stages, whose products show how the one became the other. For fsp.

    Where the channels of a stage differ, a 1x1 convolution without bias takes the student's to the teacher's; it is
    the same in both pairs that the stage is part of. The four maps of a pair are max-pooled to the smallest of them.

    Source:
        Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning",
        2017, section 3.2. The paper needs equal channels in both networks: the convolution is the deviation.

    Raises:
        ModelError: the layers do not give maps, or there are fewer than two pairs of them.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        channels = map_channels(shapes)
        if len(channels) < 2:
            raise ModelError("This method compares how one stage becomes the next: choose two layers or more.")
        self.fit = nn.ModuleList(
            nn.Identity() if student == teacher else pointwise(student, teacher, bias=False)
            for student, teacher in channels
        )

    def forward(self, student_maps: list[Tensor], teacher_maps: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return (student's first, student's second, teacher's first, teacher's second) for consecutive stages.

        Each is [batch, teacher's channels of its stage, height, width], height and width equal within a tuple.
        """
        fitted = [fit(values) for fit, values in zip(self.fit, student_maps, strict=True)]
        stages = list(zip(fitted, teacher_maps, strict=True))
        return [_smallest(first[0], second[0], first[1], second[1]) for first, second in pairwise(stages)]


class Review(Projector):
    """The student's stages, fused from the deepest to the shallowest, against the teacher's. For review.

    At the deepest stage the student's map goes by a 1x1 convolution to a middle width, and by a 3x3 convolution to the
    teacher's channels, each with batch norm. At every other stage the middle map of the stage below is enlarged and
    mixed in, with two weights for each place that a 1x1 convolution and a sigmoid find. Middle width: the teacher's
    most channels, at most 512.

    Source:
        Chen et al., "Distilling Knowledge via Knowledge Review", 2021, section 3.3 (attention-based fusion). The
        published code takes the student's last channels for the middle width and the embedding as one more stage; here
        the stages are those that are given.

    Raises:
        ModelError: the layers do not give maps.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        channels = map_channels(shapes)
        width = min(WIDEST, max(teacher for _, teacher in channels))
        self.reduce = nn.ModuleList(normed(student, width) for student, _ in channels)
        self.expand = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, teacher, 3, padding=1, bias=False), nn.BatchNorm2d(teacher))
            for _, teacher in channels
        )
        self.attend = nn.ModuleList(nn.Conv2d(2 * width, 2, 1) for _ in channels[:-1])

    def forward(self, student_maps: list[Tensor], teacher_maps: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return (student's, teacher's) maps of equal shape, the deepest stage first; the teacher's as they came.

        Lists are from the shallowest to the deepest.
        """
        results: list[tuple[Tensor, Tensor]] = []
        below: Tensor | None = None
        for stage in reversed(range(len(self.reduce))):
            fused = self.reduce[stage](student_maps[stage])
            if below is not None:
                fused = self._fuse(stage, fused, below)
            below = _resize(fused, teacher_maps[stage])
            results.append((self.expand[stage](below), teacher_maps[stage]))
        return results

    def _fuse(self, stage: int, here: Tensor, below: Tensor) -> Tensor:
        below = _resize(below, here)
        shares = torch.sigmoid(self.attend[stage](torch.cat([here, below], dim=1)))
        return here * shares[:, :1] + below * shares[:, 1:]


def _smallest(*maps: Tensor) -> tuple[Tensor, ...]:
    size = smaller_size(*maps)
    return tuple(values if values.shape[2:] == size else F.adaptive_max_pool2d(values, size) for values in maps)


def _resize(values: Tensor, like: Tensor) -> Tensor:
    size = like.shape[2:]
    return values if values.shape[2:] == size else F.interpolate(values, size, mode="nearest")
