"""Teacher outputs, kept: the teacher runs once for each view of an image, whoever needs it first; then they are read.

Outputs lie in `outputs/<key>/view-<number>.rows` of the cache; the key names teacher, images and views, so another
teacher or another image means other files, never stale ones. Several processes may fill a view at once. Where nothing
can be written, a view is kept in memory while it is used. Imported by the pipeline; `batches.py` takes tables.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from understudy import cachefolder, storage
from understudy.data import kept, packing
from understudy.data.batches import Split
from understudy.data.kept import Folder
from understudy.data.mixing import Mix
from understudy.data.packing import Packing
from understudy.data.rowfile import RowFile
from understudy.data.views import ViewPolicy
from understudy.errors import Interrupted, ModelError, UnderstudyError
from understudy.progress import Progress, silent

_IN_MEMORY = 256 << 20  # bytes of a view; a larger one is read row by row
_LARGEST_BLOCK, _SMALLEST_BLOCK, _BLOCK_PIXELS = 64, 16, 1 << 20  # larger ones do not fit a CPU's cache
_SAMPLE = 512  # images that decide how many logits are kept


class Answers(NamedTuple):
    """What a teacher says of a batch."""

    logits: Tensor
    """[batch, classes]."""
    embedding: Tensor | None = None
    """[batch, length], pooled features before the head, where they are wanted."""


Answer = Callable[[Tensor], Answers]
"""From views, float32 [batch, channels, size, size] in [0, 1] on the device, to a teacher's answers."""


@dataclass(frozen=True)
class Viewed:
    """Which views of a split: all that they depend on but the number of the view."""

    split: Split
    policy: ViewPolicy
    seed: int
    mix: Mix | None = None
    geometry: tuple[Any, ...] = ()
    """JSON-able; how images became frames."""

    def describe(self) -> dict[str, Any]:
        """Return what names the images and views, whatever the order in which the images were found."""
        return {
            "images": hashlib.blake2b(self.split.ids.astype("<u8").tobytes(), digest_size=16).hexdigest(),
            "geometry": self.geometry,
            "size": self.split.size,
            "policy": self.policy.describe(),
            "seed": self.seed,
            "mix": self.mix.describe() if self.mix else None,
        }

    def through(self, view: int) -> Callable[[slice], Tensor]:
        """Return a function from a span of rows to their images, seen through one view."""
        drawn, pairs = self.split.draw(self.policy, seed=self.seed, view=view, mix=self.mix)

        def images(span: slice) -> Tensor:
            return self.split.batch(torch.arange(span.start, span.stop), drawn, pairs).images

        return images


@dataclass
class Work:
    """What was computed rather than read."""

    images: int = 0
    seconds: float = 0.0


@dataclass(eq=False)
class Outputs:
    """The outputs of one teacher for the views of one split.

    `open_outputs` makes it.
    """

    viewed: Viewed
    kept: Folder
    load: Callable[[], Answer]
    """Loads the teacher; called when an answer is missing."""
    progress: Progress = silent
    stop: Callable[[], bool] = lambda: False
    """Asked between batches; True raises `Interrupted`. What was computed is kept."""
    notice: Callable[[str], None] = lambda text: None
    """Told in a sentence that outputs cannot be kept."""
    shard: tuple[int, int] = (0, 1)
    """(rank, world): of several processes, each computes its share."""
    any: Callable[[bool], bool] = lambda flag: flag
    """Waits for all processes; tells whether any of them says so."""
    in_use: tuple[Path, ...] = ()
    """What else of the cache is in use, such as the folder of the decoded images: it is not removed to make room."""
    work: Work = field(default_factory=Work)
    _answer: Answer | None = None
    _keeps: bool = True
    _place: tuple[int, int] = (0, 1)
    """Which of how many views is at work, for the progress."""

    @property
    def packing(self) -> Packing:
        """How answers are kept."""
        return self.kept.packing

    @property
    def keeps(self) -> bool:
        """Whether answers can be written."""
        return self._keeps

    @property
    def nbytes(self) -> int:
        """Bytes of one view."""
        return self.kept.view(0).nbytes

    def missing(self, view: int) -> int:
        """Return how many images of a view have no sound answer yet."""
        file = self.kept.view(view)
        return sum(file.span(block).stop - file.span(block).start for block in file.missing())

    def view(self, number: int) -> Table:
        """Return the teacher's answers for a view; what is missing is computed and kept.

        Raises:
            Interrupted: `stop` said so.
            ModelError: the teacher's answers are not numbers.
            UnderstudyError: a view too large for the memory cannot be written.
        """
        cachefolder.touch(self.kept.path)
        file = self.kept.view(number)
        if file.nbytes > _IN_MEMORY:
            return self._large(file, number)
        rows, missing = file.load()
        if self._fill(file, number, missing, rows):
            rows, missing = file.load()  # what the other processes have written
            self._together(file, number, missing, rows)
        file.close()
        return _InMemory(rows, self.packing, self.viewed.split.device)

    def prepare(self, numbers: Sequence[int]) -> None:
        """Compute what is missing of some views, then let go of the teacher; raises as `view`."""
        for place, number in enumerate(numbers):
            self._place = place, len(numbers)
            self.view(number)
            if not self._keeps:
                break  # what cannot be kept is computed when it is used
        self._place = 0, 1
        self.release()

    def again(self, view: int, block: int) -> NDArray[np.float64] | None:
        """Ask the teacher once more for a block that is kept; return how far each row is off, see `Packing.error`.

        None where the block is missing. Raises as `view`.
        """
        file = self.kept.view(view)
        rows = file.read(block)
        if rows is None:
            return None
        self._answer = self._answer or self.load()
        answers = _call(self._answer, self.viewed.through(view)(file.span(block)))
        return self.packing.error(rows, _numbers(answers.logits))

    def release(self) -> None:
        """Let go of the teacher; it is loaded again when it is needed."""
        self._answer = None

    def _large(self, file: RowFile, number: int) -> Table:
        if self._fill(file, number, file.missing(), None):
            self._together(file, number, file.missing(), None)

        def mend() -> None:
            self._compute(file, number, file.missing(), None)

        return _InFile(file, self.packing, self.viewed.split.device, mend)

    def _fill(self, file: RowFile, number: int, missing: list[int], rows: NDArray[np.void] | None) -> bool:
        """Compute this process's share of what is missing; tell whether there are other processes."""
        rank, world = self.shard
        self._together(file, number, [block for block in missing if block % world == rank], rows)
        return world > 1

    def _together(self, file: RowFile, number: int, blocks: list[int], rows: NDArray[np.void] | None) -> None:
        """Compute blocks as all processes do; where one is stopped, all are."""
        stopped = False
        try:
            self._compute(file, number, blocks, rows)
        except Interrupted:
            stopped = True
        if self.any(stopped):
            raise Interrupted

    def _compute(self, file: RowFile, number: int, blocks: list[int], rows: NDArray[np.void] | None) -> None:
        """Run the teacher on blocks of a view, but for those that another process has written meanwhile."""
        if not blocks:
            return
        start = time.monotonic()
        self._make_room(file.nbytes * len(blocks) // file.blocks)
        self._answer = self._answer or self.load()
        images = self.viewed.through(number)
        before, total = self._place[0] * len(blocks), self._place[1] * len(blocks)
        note = f"teacher on view {number + 1}"
        first = os.getpid() % len(blocks)  # another process that fills the same view begins elsewhere
        for done, block in enumerate(blocks[first:] + blocks[:first]):
            self.progress("outputs", done=before + done, total=total, note=note)
            if self.stop():
                raise Interrupted
            packed = file.read(block)
            if packed is None:
                packed = _ask(self._answer, images(file.span(block)), self.packing)
                self._keep(file, block, packed)
                self.work.images += len(packed)
            if rows is not None:
                rows[file.span(block)] = packed
        self.progress("outputs", done=before + len(blocks), total=total, note=note)
        self.work.seconds += time.monotonic() - start

    def _make_room(self, nbytes: int) -> None:
        if self._keeps:
            cachefolder.make_room(nbytes, self.kept.path.parents[1], in_use=(self.kept.path, *self.in_use))

    def _keep(self, file: RowFile, block: int, packed: NDArray[np.void]) -> None:
        if not self._keeps:
            return
        try:
            file.write(block, packed)
        except OSError as error:
            if file.nbytes > _IN_MEMORY:
                raise UnderstudyError(
                    f"The teacher's outputs cannot be written to {file.path} ({error.strerror}). Free some space, set "
                    "UNDERSTUDY_CACHE to another folder, or take --views online, which keeps none."
                ) from None
            self._keeps = False
            self.notice(
                f"The teacher's outputs cannot be kept in {file.path.parent} ({error.strerror}): the teacher runs "
                "again for every training."
            )


class Table(ABC):
    """The answers for one view."""

    @abstractmethod
    def rows(self, positions: Tensor) -> Answers:
        """Return the answers for places within the split, int64 [batch]: float32 on the device."""


class _InMemory(Table):
    def __init__(self, rows: NDArray[np.void], packing: Packing, device: torch.device) -> None:
        self._rows, self._packing, self._device = rows, packing, device
        whole = packing.top is None
        # in float32 already: to convert a batch in every step takes as long as to look it up
        self._logits = torch.from_numpy(np.asarray(rows["logits"], np.float32)).to(device) if whole else None
        self._embedding = _embedding(rows, packing, device) if whole else None

    def rows(self, positions: Tensor) -> Answers:
        if self._logits is None:
            return _unpack(self._rows[positions.numpy()], self._packing, self._device)
        places = positions.to(self._device)
        embedding = None if self._embedding is None else self._embedding.index_select(0, places)
        return Answers(self._logits.index_select(0, places), embedding)


class _InFile(Table):
    def __init__(self, file: RowFile, packing: Packing, device: torch.device, mend: Callable[[], None]) -> None:
        self._file, self._packing, self._device, self._mend = file, packing, device, mend

    def rows(self, positions: Tensor) -> Answers:
        taken = self._file.take(positions.numpy())
        if taken is None:  # somebody cut the file short
            self._file.close()
            self._mend()
            taken = self._file.take(positions.numpy())
        if taken is None:
            raise UnderstudyError(f"{self._file.path} changes while it is read. Does something else clean the cache?")
        return _unpack(taken, self._packing, self._device)


@dataclass(frozen=True)
class Source:
    """A teacher, before it is loaded."""

    identity: dict[str, Any]
    """JSON-able; all that the answers depend on: weights, architecture, preprocessing, precision, versions."""
    card: dict[str, Any]
    """JSON-able; what a reader of the cache is told."""
    load: Callable[[], Answer]
    """Loads it."""
    temperatures: tuple[float, ...] = (1.0, 4.0)
    """That students will be taught with; with many classes they decide how many logits are kept."""
    embedding: bool = False
    """Whether its answers bring the pooled embedding."""


def find_outputs(viewed: Viewed, teacher: Source, cache: Path | None = None) -> Outputs | None:
    """Return the outputs of a teacher for some views, if there are any; the teacher is not loaded.

    Args:
        viewed: images and views.
        teacher: whose outputs.
        cache: the folder for what is kept; `storage.cache_dir()` by default.
    """
    found = kept.read(_folder(viewed, teacher, cache))
    if found is None or (found.rows, found.block) != (len(viewed.split), block_rows(viewed.split.size)):
        return None
    return Outputs(viewed, found, teacher.load)


def open_outputs(viewed: Viewed, teacher: Source, cache: Path | None = None) -> Outputs:
    """Return the outputs of a teacher for some views, as far as there are any; arguments as for `find_outputs`."""
    found = find_outputs(viewed, teacher, cache)
    if found is not None:
        return found
    answer = teacher.load()
    packed = _measured(viewed, answer, teacher.temperatures)
    folder = Folder(_folder(viewed, teacher, cache), packed, len(viewed.split), block_rows(viewed.split.size))
    with contextlib.suppress(OSError, UnderstudyError):  # no cache only means to compute again next time
        kept.write(folder, teacher.card)
    outputs = Outputs(viewed, folder, teacher.load)
    outputs._answer = answer
    return outputs


def _folder(viewed: Viewed, teacher: Source, cache: Path | None) -> Path:
    inputs = {
        "format": kept.FORMAT,
        "teacher": teacher.identity,
        "viewed": viewed.describe(),
        "temperatures": sorted(teacher.temperatures),
        "embedding": teacher.embedding,
    }
    return (cache or storage.cache_dir()) / "outputs" / storage.fingerprint(inputs)


def block_rows(size: int) -> int:
    """Return how many images of a side in pixels are answered, checked and written together."""
    fitting = max(1, _BLOCK_PIXELS // size**2)
    return max(_SMALLEST_BLOCK, min(_LARGEST_BLOCK, 1 << (fitting.bit_length() - 1)))


def _measured(viewed: Viewed, answer: Answer, temperatures: tuple[float, ...]) -> Packing:
    """Let the teacher answer a few images and choose how its answers are kept."""
    block, count = block_rows(viewed.split.size), len(viewed.split)
    spans = [slice(start, min(start + block, count)) for start in range(0, min(count, _SAMPLE), block)]
    images = viewed.through(0)
    first = _call(answer, images(spans[0]))
    length = 0 if first.embedding is None else first.embedding.shape[1]
    if first.logits.shape[1] <= packing.DENSE_UP_TO:
        return Packing(first.logits.shape[1], embedding=length)
    sample = np.concatenate([_numbers(_call(answer, images(span)).logits) for span in spans])
    return packing.choose(sample, temperatures, embedding=length)


def _ask(answer: Answer, images: Tensor, packing: Packing) -> NDArray[np.void]:
    answers = _call(answer, images)
    embedding = None if answers.embedding is None else _numbers(answers.embedding)
    return packing.pack(_numbers(answers.logits), embedding)


def _call(answer: Answer, images: Tensor) -> Answers:
    with torch.inference_mode():
        answers = answer(images)
    if not all(bool(torch.isfinite(part).all()) for part in answers if part is not None):
        raise ModelError("The teacher's answers are not numbers. Check its weights, or try --precision fp32.")
    return answers


def _numbers(tensor: Tensor) -> NDArray[np.float32]:
    return np.asarray(tensor.float().cpu().numpy())


def _unpack(rows: NDArray[np.void], packing: Packing, device: torch.device) -> Answers:
    return Answers(torch.from_numpy(packing.logits(rows)).to(device), _embedding(rows, packing, device))


def _embedding(rows: NDArray[np.void], packing: Packing, device: torch.device) -> Tensor | None:
    if not packing.embedding:
        return None
    return torch.from_numpy(np.asarray(rows["embedding"], np.float32)).to(device)
