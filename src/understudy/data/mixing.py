"""MixUp and CutMix: partner and ratio are functions of (seed, view number, image), so that mixed views can be kept.

Usual implementations pair the images of a batch with one another, so the same image meets another partner whenever the
batch is composed differently. Imported by `batches.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from understudy.data.views import uniforms

_STREAM = 0x6D69786564  # so that these numbers are other ones than those of the views


@dataclass(frozen=True)
class Mix:
    """How two images become one.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018, equation 2; Yun et al., "CutMix", 2019,
    equations 1 and 2.
    """

    kind: Literal["mixup", "cutmix"]
    alpha: float = 1.0
    """The share of an image is drawn from Beta(alpha, alpha); 1 draws uniformly."""

    def describe(self) -> dict[str, Any]:
        """Return the settings by name, for records and fingerprints."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Pairs:
    """With whom, and how much, the images of a split are mixed in one view; one row each."""

    partner: Tensor
    """int64 [images]: places within the split; an image may be its own partner."""
    share: Tensor
    """float32 [images]: how much of the result is the image itself, in [0, 1]."""
    box: Tensor | None
    """int64 [images, 4]: left, top, right, bottom in pixels of what is the partner's; None for MixUp."""

    def to(self, device: torch.device) -> Pairs:
        """Return the same pairs on a device."""
        box = None if self.box is None else self.box.to(device)
        return Pairs(self.partner.to(device), self.share.to(device), box)

    def __getitem__(self, rows: Tensor) -> Pairs:
        return Pairs(self.partner[rows], self.share[rows], None if self.box is None else self.box[rows])

    def images(self, own: Tensor, other: Tensor) -> Tensor:
        """Mix views, both float32 [images, channels, size, size], row by row."""
        if self.box is None:
            return torch.lerp(other, own, self.share.view(-1, 1, 1, 1))
        return torch.where(_inside(self.box, own.shape[-1])[:, None], other, own)

    def labels(self, own: Tensor, other: Tensor, classes: int) -> Tensor:
        """Mix class numbers, both int64 [images], into shares, float32 [images, classes]."""
        share = self.share[:, None]
        shares = torch.zeros(len(own), classes, device=own.device)
        shares.scatter_add_(1, own[:, None], share)
        return shares.scatter_add_(1, other[:, None], 1 - share)


def pair(ids: np.ndarray, mix: Mix, *, seed: int, view: int, size: int) -> Pairs:
    """Draw partner and share of every image of a split at once.

    Args:
        ids: uint64 [images], the stable ids.
        mix: how they are mixed.
        seed: of the views.
        view: number of the view.
        size: side of a view in pixels.
    """
    numbers = uniforms(ids, seed=seed ^ _STREAM, view=view, columns=4)
    partner = np.minimum((numbers[:, 0].astype(np.float64) * len(ids)).astype(np.int64), len(ids) - 1)
    share = torch.from_numpy(_beta(numbers[:, 1], mix.alpha))
    if mix.kind == "mixup":
        return Pairs(torch.from_numpy(partner), share, None)
    box = _boxes(share, torch.from_numpy(numbers[:, 2:]), size)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    return Pairs(torch.from_numpy(partner), 1 - area / size**2, box)


def _beta(uniform: np.ndarray, alpha: float) -> np.ndarray:
    """Turn uniform numbers into ones from Beta(alpha, alpha) by the inverse of its distribution function."""
    if alpha == 1:
        return uniform
    from scipy.special import betaincinv

    return np.asarray(betaincinv(alpha, alpha, uniform), np.float32)


def _boxes(share: Tensor, centre: Tensor, size: int) -> Tensor:
    """Return squares of area 1 - share about a centre, cut off at the edges, in whole pixels."""
    half = torch.sqrt(1 - share)[:, None] / 2
    corners = torch.cat([centre - half, centre + half], 1)
    return (corners.clamp(0, 1) * size).round().long()


def _inside(box: Tensor, size: int) -> Tensor:
    """Return bool [images, size, size]: which pixels lie in the boxes."""
    axis = torch.arange(size, device=box.device)
    left, top, right, bottom = (edge[:, None] for edge in box.unbind(1))
    across, down = (axis >= left) & (axis < right), (axis >= top) & (axis < bottom)
    return down[:, :, None] & across[:, None, :]
