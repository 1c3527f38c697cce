"""Batches ready on the device: indices into the store become views in a few batched operations.

No Python runs per image. The order of the images is a function of (seed, epoch), the views of (view seed, view
number, image), so training can go on in the middle of an epoch. Imported by `train.py` and the pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from understudy.data import mixing, views
from understudy.data.frames import Frames
from understudy.data.mixing import Mix, Pairs
from understudy.data.views import Draw, Later, ViewPolicy

if TYPE_CHECKING:
    from understudy.data.outputs import Table

_DRAWN_AT_ONCE = 1 << 20  # images; drawing takes 200 bytes of memory for each
_MOVED = 1024  # frames that go to a device in one go


class Batch(NamedTuple):
    """What one training step needs."""

    images: Tensor
    """float32 [batch, channels, size, size] in [0, 1], on the device."""
    labels: Tensor
    """int64 [batch], on the device; of mixed images, shares: float32 [batch, classes]."""
    positions: Tensor
    """int64 [batch]: places within the split, for whatever is kept per sample."""
    teacher_logits: Tensor | None = None
    """float32 [batch, classes], on the device; None where none are kept."""
    teacher_embedding: Tensor | None = None
    """float32 [batch, width], on the device; None where none are kept."""


class Split:
    """One split of a store, on a device.

    Args:
        frames: uint8 [all images, channels, side, side], in memory, or read by rows from wherever they are.
        labels: int64 [all images]; -1 for none.
        ids: uint64 [all images], the stable ids that views depend on.
        rows: int64, the images of this split.
        size: side in pixels of a view.
        device: where batches are made.
        classes: how many there are; by default, as many as the labels show.
    """

    def __init__(
        self,
        frames: Tensor | Frames,
        labels: np.ndarray,
        ids: np.ndarray,
        rows: np.ndarray,
        *,
        size: int,
        device: torch.device,
        classes: int | None = None,
    ) -> None:
        self._frames = frames
        self._rows = torch.from_numpy(rows)
        self.labels = torch.from_numpy(labels[rows])
        self.is_labelled = bool((self.labels >= 0).all())
        self.ids = ids[rows]
        self.size = size
        self.device = device
        self.classes = classes or int(labels.max()) + 1
        self._moved_labels = self.labels.to(device)
        if device.type != "cpu" and self._fits(device):
            self._frames, self._rows = torch.cat(list(self._moved())), torch.arange(len(rows))

    def __len__(self) -> int:
        return len(self._rows)

    def _fits(self, device: torch.device) -> bool:
        if device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(device)
        return len(self._rows) * int(np.prod(self._frames.shape[1:])) < free // 4

    def _moved(self) -> Iterator[Tensor]:
        """Yield all frames on the device, some at a time: they may be more than the memory beside it."""
        with closing(self.ahead(torch.split(torch.arange(len(self)), _MOVED))) as parts:
            yield from parts

    def frames(self, positions: Tensor) -> Tensor:
        """Return frames, uint8 [positions, channels, side, side], on the device."""
        rows = self._rows[positions]
        if isinstance(self._frames, Frames):
            return self._send(self._frames.read(rows.numpy()))
        return self._frames.index_select(0, rows.to(self._frames.device)).to(self.device, non_blocking=True)

    def ahead(self, reads: Iterable[Tensor]) -> Generator[Tensor]:
        """Yield `frames(positions)` for all `reads`; frames that must be decoded are made ready ahead of the reader."""
        if isinstance(self._frames, Frames):
            rows = (self._rows[positions].numpy() for positions in reads)
            with closing(self._frames.ahead(rows)) as batches:
                yield from map(self._send, batches)
        else:
            yield from map(self.frames, reads)

    def _send(self, frames: np.ndarray) -> Tensor:
        sent = torch.from_numpy(frames)
        if self.device.type == "cuda":
            sent = sent.pin_memory()  # else the copy waits for the device
        return sent.to(self.device, non_blocking=True)

    def whole(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the unchanged views of all images in order, float32 [batch, channels, size, size]."""
        with closing(self.ahead(torch.split(torch.arange(len(self)), batch_size))) as batches:
            for frames in batches:
                yield views.whole(frames, self.size)

    def draw(
        self, policy: ViewPolicy, *, seed: int, view: int, mix: Mix | None = None
    ) -> tuple[Draw | Later, Pairs | None]:
        """Draw the parameters of one view of all images at once; of very many images, of each batch when it comes."""
        many = len(self) > _DRAWN_AT_ONCE
        drawn = (
            Later(self.ids, policy, seed, view)
            if many
            else views.draw(self.ids, policy, seed=seed, view=view).to(self.device)
        )
        pairs = mixing.pair(self.ids, mix, seed=seed, view=view, size=self.size).to(self.device) if mix else None
        return drawn, pairs

    def batch(self, positions: Tensor, drawn: Draw | Later, pairs: Pairs | None = None) -> Batch:
        """Return the views of `positions` under the parameters that `drawn` and `pairs` hold for the whole split."""
        (batch,) = self.batches([positions], drawn, pairs)
        return batch

    def batches(self, reads: Iterable[Tensor], drawn: Draw | Later, pairs: Pairs | None = None) -> Generator[Batch]:
        """Yield `batch(positions, drawn, pairs)` for all `reads`, their frames made ready ahead of the reader."""
        begun: deque[Tensor] = deque()
        partner = None if pairs is None else pairs.partner.cpu()

        def needed() -> Iterator[Tensor]:
            for positions in reads:
                begun.append(positions)
                yield positions if partner is None else torch.cat([positions, partner[positions]])

        with closing(self.ahead(needed())) as batches:
            for frames in batches:
                yield self._batch(begun.popleft(), frames, drawn, pairs)

    def _batch(self, positions: Tensor, frames: Tensor, drawn: Draw | Later, pairs: Pairs | None) -> Batch:
        """Return the views of `frames`: those of `positions`, then those of their partners where there are `pairs`."""
        moved = positions.to(self.device)
        images = views.apply(frames[: len(moved)], drawn[moved], self.size)
        labels = self._moved_labels[moved]
        if pairs is None:
            return Batch(images, labels, positions)
        mixed = pairs[moved]
        partners = views.apply(frames[len(moved) :], drawn[mixed.partner], self.size)
        labels = mixed.labels(labels, self._moved_labels[mixed.partner], self.classes)
        return Batch(mixed.images(images, partners), labels, positions)


class Epochs:
    """A split as a training meets it: shuffled by (seed, epoch), seen through view number `epoch` modulo `views`.

    A rest of an epoch smaller than half a batch is left out (another one each epoch), since batch normalisation needs
    more than a few images. An epoch is one pass through the split; where it has more `steps` than that, or fewer, pass
    follows pass without regard to epochs, each in an order and through a view of its own.

    Args:
        split: the images.
        policy: how far views differ from images.
        view_seed: of the views.
        batch_size: at most the number of images.
        views: how many distinct views an image has; None for another one in every epoch.
        mix: MixUp or CutMix.
        outputs: from the number of a view to the teacher's answers, for batches that bring them along.
        steps: of an epoch; by default those of one pass.
    """

    def __init__(
        self,
        split: Split,
        *,
        policy: ViewPolicy,
        view_seed: int,
        batch_size: int,
        views: int | None = None,
        mix: Mix | None = None,
        outputs: Callable[[int], Table] | None = None,
        steps: int | None = None,
    ) -> None:
        self.split = split
        self.policy = policy
        self.view_seed = view_seed
        self.views = views
        self.mix = mix
        self.outputs = outputs
        self.batch_size = min(batch_size, len(split))
        full, rest = divmod(len(split), self.batch_size)
        self._pass_steps = full + (2 * rest >= self.batch_size)
        self.steps = steps or self._pass_steps

    def order(self, seed: int, number: int) -> Tensor:
        """Return the places of pass `number` in the order in which they are met, int64 [len(split)]."""
        generator = torch.Generator().manual_seed(hash_seed(seed, number))
        return torch.randperm(len(self.split), generator=generator)

    def view(self, number: int) -> int:
        """Return the number of the view that a pass sees."""
        return number if self.views is None else number % self.views

    def epoch(self, seed: int, epoch: int, *, start: int = 0, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Yield the batches of an epoch from step `start` on.

        Args:
            seed: of the order.
            epoch: 0 for the first.
            start: the first step to yield.
            shard: (rank, world): every `world`-th image of each batch, from `rank` on.
        """
        for number, first, last in self._passes(epoch, start):
            yield from self._pass(seed, number, first, last, shard)

    def _passes(self, epoch: int, start: int) -> Iterator[tuple[int, int, int]]:
        """Yield what an epoch is made of: the number of a pass, its first step, and the step before which it ends."""
        step, end = epoch * self.steps + start, (epoch + 1) * self.steps
        while step < end:
            number, first = divmod(step, self._pass_steps)
            last = min(self._pass_steps, first + end - step)
            yield number, first, last
            step += last - first

    def _pass(self, seed: int, number: int, first: int, last: int, shard: tuple[int, int]) -> Iterator[Batch]:
        """Yield the batches of a pass from step `first` to the one before `last`."""
        order, view = self.order(seed, number), self.view(number)
        table = self.outputs(view) if self.outputs else None
        drawn, pairs = self.split.draw(self.policy, seed=self.view_seed, view=view, mix=self.mix)
        rank, world = shard
        reads = [part[rank::world] for part in torch.split(order, self.batch_size)[first:last]]
        with closing(self.split.batches(reads, drawn, pairs)) as batches:
            for batch in batches:
                yield batch if table is None else _answered(batch, table)


def _answered(batch: Batch, table: Table) -> Batch:
    answers = table.rows(batch.positions)
    return batch._replace(teacher_logits=answers.logits, teacher_embedding=answers.embedding)


def hash_seed(first: int, second: int) -> int:
    """Return one seed below 2^63 from two, so that (0, 1) and (1, 0) differ."""
    numbers = views.uniforms(np.array([second], np.uint64), seed=first, view=0, columns=2)
    high, low = (int(number * 2**24) for number in numbers[0])
    return (high << 24) | low
