"""From a view of an image to what a network eats. Torch only; models and exporters build on it.

Views are shared by teacher and student; each network brings its own size, channels and normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ITU-R 601 as Pillow's mode "L" has it: 16-bit fixed point
_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)


class Preprocess(nn.Module):
    """Channels, size and normalisation of one network.

    Grey views are repeated where the network has 3 channels, colour views become grey (ITU-R 601 weights, as Pillow's
    mode "L") where it has 1. Views of another size are resized to `size` x `size`, antialiased bilinear. At last
    `(view - mean) / std`. What is not needed is not done: with mean 0 and std 1, a view that fits comes back as it is.

    Args:
        channels: of the network's first layer, 1 or 3.
        size: side in pixels of the square that the network sees.
        mean: per channel of the network, or one for all; of values in [0, 1].
        std: likewise, above 0.

    Raises:
        ValueError: other numbers of channels, means or deviations.
    """

    mean: Tensor
    std: Tensor
    luma: Tensor

    def __init__(self, *, channels: int, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if channels not in (1, 3) or size < 1:
            raise ValueError(f"channels is 1 or 3 and size at least 1, not {channels} and {size}")
        if len(mean) not in (1, channels) or len(std) not in (1, channels):
            raise ValueError(f"mean and std have 1 or {channels} values, not {len(mean)} and {len(std)}")
        if min(std) <= 0:
            raise ValueError(f"std must be above 0, not {tuple(std)}")
        self.channels = channels
        self.size = size
        self.identity = set(mean) == {0} and set(std) == {1}
        self.register_buffer("mean", torch.tensor(mean).float().view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).float().view(1, -1, 1, 1), persistent=False)
        self.register_buffer("luma", torch.tensor(_LUMA).view(1, 3, 1, 1), persistent=False)

    def forward(self, views: Tensor) -> Tensor:
        """Turn views, float [batch, 1 or 3, height, width] in [0, 1], into [batch, channels, size, size].

        Raises:
            ValueError: views with another number of channels.
        """
        if views.shape[1] not in (1, 3):
            raise ValueError(f"views have 1 or 3 channels, not {views.shape[1]}")
        if views.shape[1] > self.channels:
            views = (views * self.luma).sum(1, keepdim=True)
        if views.shape[-2:] != (self.size, self.size):
            side = [self.size, self.size]
            views = F.interpolate(views, side, mode="bilinear", antialias=True, align_corners=False)
        if not self.identity:
            views = (views - self.mean) / self.std
        # last, so that a grey view is resized once and stays a view of one channel where it can
        return views.expand(-1, self.channels, -1, -1) if views.shape[1] < self.channels else views
