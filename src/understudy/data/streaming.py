"""Frames that are decoded as they are read, for images whose frames would exceed the disk's budget.

What is decoded here is bit by bit what a store would hold, so training is the same, only slower. The images are decoded
once beforehand to learn which are bad; the answer, not the frames, is kept in `examined/<key>.json`. Imported by
`store.py`. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from understudy import storage
from understudy.data import frames
from understudy.data.frames import Decoded, Frames, Geometry
from understudy.data.listing import Entry, hash_bytes, save_for_speed
from understudy.data.sources import printable
from understudy.errors import DataError
from understudy.progress import Progress

_FORMAT = "understudy-examined/1"
_CHUNK = 8  # images that a thread decodes in one go: few, so that all threads end a batch together


@final
class StreamedFrames(Frames):
    """Frames that threads decode whenever they are read; Pillow lets go of the interpreter lock while it decodes.

    Args:
        names: the images, in the order of the rows.
        decode: from a name to its frame or to why there is none; called from several threads.
        geometry: of every frame.
        workers: threads that decode.
    """

    def __init__(
        self, names: Sequence[str], decode: Callable[[str], Decoded], geometry: Geometry, *, workers: int
    ) -> None:
        super().__init__(len(names), geometry)
        self._names = names
        self._decode = decode
        self._workers = workers

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return frames; see `Frames.read`."""
        (batch,) = self.ahead([rows])
        return batch

    def ahead(self, reads: Iterable[NDArray[np.int64]], *, depth: int = 2) -> Generator[NDArray[np.uint8]]:
        """Yield `read(rows)` for all `reads` in order, while threads decode up to `depth` of the coming ones."""
        pool = ThreadPoolExecutor(self._workers, "decode")
        begun: deque[_Begun] = deque()
        try:
            for rows in reads:
                begun.append(self._begin(pool, rows))
                if len(begun) > depth:
                    yield begun.popleft().finish()
            while begun:
                yield begun.popleft().finish()
        finally:
            pool.shutdown(cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, rows: NDArray[np.int64]) -> _Begun:
        batch = np.empty((len(rows), *self.shape[1:]), np.uint8)
        starts = range(0, len(rows), _CHUNK)
        parts = [pool.submit(self._fill, batch[at : at + _CHUNK], rows[at : at + _CHUNK]) for at in starts]
        return _Begun(batch, parts)

    def _fill(self, part: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        for place, row in zip(part, rows, strict=True):
            frame = self._decode(self._names[row])
            if isinstance(frame, str):
                name = printable(self._names[row])
                raise DataError(f"The image {name} was sound before and now is {frame}. Run the same command again.")
            place[...] = frame


class _Begun(NamedTuple):
    """A batch that threads are filling."""

    batch: NDArray[np.uint8]
    parts: list[Future[None]]

    def finish(self) -> NDArray[np.uint8]:
        for part in self.parts:
            part.result()
        return self.batch


class Examined(NamedTuple):
    """Which images are bad."""

    skipped: dict[str, str]
    """By name: why."""
    reused: bool
    """Whether it was known already."""


def examine(
    folder: Path,
    key: str,
    names: Sequence[str],
    decode: Callable[[str], Decoded],
    *,
    workers: int,
    progress: Progress,
) -> Examined:
    """Decode every image to learn which are bad, or find it known.

    Args:
        folder: where the answers are kept.
        key: names the images and the geometry.
        names: the images.
        decode: as for `StreamedFrames`.
        workers: threads that decode.
        progress: told of the images decoded.

    Raises:
        UnderstudyError: the folder cannot be written; a full disk only means that the answer is not kept.
    """
    kept = folder / f"{key}.json"
    known = _load(kept)
    if known is not None:
        return Examined(known, reused=True)
    with storage.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with frames.alone(folder / f"{key}.lock", lambda: frames.waiting("examine", len(names), progress)):
            known = _load(kept)  # by another process, while this one waited
            if known is not None:
                return Examined(known, reused=True)
            results = frames.decoded("examine", names, decode, workers=workers, progress=progress)
            skipped = {name: frame for name, frame in results if isinstance(frame, str)}
            save_for_speed(kept, {"format": _FORMAT, "skipped": skipped})
    return Examined(skipped, reused=False)


def _load(path: Path) -> dict[str, str] | None:
    try:
        kept: Any = json.loads(path.read_bytes())
        if kept["format"] != _FORMAT:
            return None
        return {str(name): str(why) for name, why in kept["skipped"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_unchanged(path: Path, entry: Entry) -> bytes:
    """Read a file that was listed before; it is hashed again only where its size or time of change is another.

    Raises:
        DataError: the file cannot be read any more, or is another one.
    """
    try:
        with path.open("rb") as file:
            mtime_ns = os.fstat(file.fileno()).st_mtime_ns
            data = file.read()
    except OSError as error:
        raise DataError(
            f"{path} could be read when the run began and now cannot ({error.strerror or error}). "
            "Bring it back, then run the same command again."
        ) from None
    if (len(data), mtime_ns) != (entry.size, entry.mtime_ns) and hash_bytes(data) != entry.hash:
        raise DataError(
            f"{path} has changed since the run began. Put it back as it was, then run the same command again; "
            "with the file as it is now, the data are others and training begins anew."
        )
    return data
