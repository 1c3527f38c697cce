"""Batches ready on the device: indices into the store become views in a few batched operations.

No Python runs per image. The order of the images is a function of (seed, epoch), the views of (view seed, view
number, image), so training can go on in the middle of an epoch. Imported by `train.py` and the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from understudy.data import views
from understudy.data.views import Draw, ViewPolicy


class Batch(NamedTuple):
    """What one training step needs."""

    images: Tensor
    """float32 [batch, channels, size, size] in [0, 1], on the device."""
    labels: Tensor
    """int64 [batch], on the device."""
    positions: Tensor
    """int64 [batch]: places within the split, for whatever is kept per sample."""


class Split:
    """One split of a store, on a device.

    Args:
        frames: uint8 [all images, channels, side, side]; may be mapped from a file.
        labels: int64 [all images].
        ids: uint64 [all images], the stable ids that views depend on.
        rows: int64, the images of this split.
        size: side in pixels of a view.
        device: where batches are made.
    """

    def __init__(
        self, frames: Tensor, labels: np.ndarray, ids: np.ndarray, rows: np.ndarray, *, size: int, device: torch.device
    ) -> None:
        self._frames = frames
        self._rows = torch.from_numpy(rows)
        self.labels = torch.from_numpy(labels[rows])
        self.ids = ids[rows]
        self.size = size
        self.device = device
        self._moved_labels = self.labels.to(device)
        if device.type != "cpu" and self._fits(device):
            self._frames, self._rows = frames[self._rows].to(device), torch.arange(len(rows))

    def __len__(self) -> int:
        return len(self._rows)

    def _fits(self, device: torch.device) -> bool:
        if device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(device)
        return len(self._rows) * self._frames[0].numel() < free // 4

    def frames(self, positions: Tensor) -> Tensor:
        """Return stored frames, uint8 [positions, channels, side, side], on the device."""
        rows = self._rows[positions]
        return self._frames[rows.to(self._frames.device)].to(self.device, non_blocking=True)

    def whole(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the unchanged views of all images in order, float32 [batch, channels, size, size]."""
        for positions in torch.split(torch.arange(len(self)), batch_size):
            yield views.whole(self.frames(positions), self.size)

    def batch(self, positions: Tensor, drawn: Draw) -> Batch:
        """Return the views of `positions` under the parameters that `drawn` holds for the whole split."""
        moved = positions.to(self.device)
        images = views.apply(self.frames(positions), drawn[moved], self.size)
        return Batch(images, self._moved_labels[moved], positions)


class Epochs:
    """A split as a training meets it: shuffled by (seed, epoch), seen through view number `epoch`.

    A rest of an epoch smaller than half a batch is left out (another one each epoch), since batch normalisation needs
    more than a few images.
    """

    def __init__(self, split: Split, *, policy: ViewPolicy, view_seed: int, batch_size: int) -> None:
        self.split = split
        self.policy = policy
        self.view_seed = view_seed
        self.batch_size = min(batch_size, len(split))
        full, rest = divmod(len(split), self.batch_size)
        self.steps = full + (2 * rest >= self.batch_size)

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the places of epoch `epoch` in the order in which they are met, int64 [len(split)]."""
        generator = torch.Generator().manual_seed(hash_seed(seed, epoch))
        return torch.randperm(len(self.split), generator=generator)

    def epoch(self, seed: int, epoch: int, *, start: int = 0, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Yield the batches of an epoch from step `start` on.

        Args:
            seed: of the order.
            epoch: 0 for the first; also the number of the view.
            start: the first step to yield.
            shard: (rank, world): every `world`-th image of each batch, from `rank` on.
        """
        order = self.order(seed, epoch)
        drawn = views.draw(self.split.ids, self.policy, seed=self.view_seed, view=epoch).to(self.split.device)
        rank, world = shard
        for step in range(start, self.steps):
            positions = order[step * self.batch_size : (step + 1) * self.batch_size][rank::world]
            yield self.split.batch(positions, drawn)


def hash_seed(first: int, second: int) -> int:
    """Return one seed below 2^63 from two, so that (0, 1) and (1, 0) differ."""
    numbers = views.uniforms(np.array([second], np.uint64), seed=first, view=0, columns=2)
    high, low = (int(number * 2**24) for number in numbers[0])
    return (high << 24) | low


def mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Return a uint8 tensor whose bytes stay in the file until they are read; writes to it never reach the file."""
    total = int(np.prod(shape))
    return torch.from_file(str(path), shared=False, size=total, dtype=torch.uint8).view(shape)
