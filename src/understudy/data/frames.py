"""Frames by their rows, and the file of decoded frames: built once for the same images and geometry, then mapped.

A finished folder `stores/<key>` holds `frames.u8`, `[rows, channels, side, side]` uint8 without a header, and
`manifest.json`. It is built under another name and renamed, under a lock for its key, so a process that dies leaves
nothing that is taken for finished, and of two that want the same one builds and the other waits.

Imported by `store.py`, `streaming.py` and whoever reads frames. Nothing here imports torch.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from understudy import cachefolder, storage
from understudy.data.listing import in_order
from understudy.errors import DataError, UnderstudyError
from understudy.progress import Progress

_FORMAT = "understudy-store/1"
_RESERVE = 5_000_000_000  # bytes of the disk that are left to others


class Geometry(NamedTuple):
    """What every frame of a store looks like."""

    side: int
    channels: Literal[1, 3]
    fit: Literal["crop", "squash"]

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame."""
        return self.channels * self.side * self.side


Decoded = NDArray[np.uint8] | str
"""A frame, or why there is none."""


class Frames(ABC):
    """N frames, read by their rows, wherever they come from; `frames[rows]` reads as from an array.

    Args:
        rows: N.
        geometry: of every frame.
    """

    def __init__(self, rows: int, geometry: Geometry) -> None:
        self.shape = (rows, geometry.channels, geometry.side, geometry.side)

    @property
    def nbytes(self) -> int:
        """Bytes of all frames."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | np.int64 | slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        wanted = np.arange(len(self))[rows]
        return self.read(wanted.reshape(-1)).reshape(*wanted.shape, *self.shape[1:])

    @abstractmethod
    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return frames, uint8 `[len(rows), channels, side, side]`, in memory of their own.

        Raises:
            DataError: what is behind them was changed or removed.
        """

    @abstractmethod
    def ahead(self, reads: Iterable[NDArray[np.int64]], *, depth: int = 2) -> Generator[NDArray[np.uint8]]:
        """Yield `read(rows)` for all `reads` in order, while up to `depth` of the coming ones are made ready.

        Close the generator when it is not read to its end: it may hold threads.
        """


@final
class StoredFrames(Frames):
    """Frames in a file without a header, mapped: their bytes stay there until they are read.

    Args:
        path: of the file.
        rows: N.
        geometry: of every frame.
    """

    def __init__(self, path: Path, rows: int, geometry: Geometry) -> None:
        super().__init__(rows, geometry)
        self.path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), self.nbytes, access=mmap.ACCESS_READ)
        self._array = np.frombuffer(self._map, np.uint8).reshape(self.shape)

    def check(self) -> None:
        """Refuse a file that was cut short since it was mapped: to read on would kill the process without a word.

        Takes some microseconds. A file that was deleted lives on until it is no longer mapped.

        Raises:
            DataError: the file was truncated.
        """
        if self._map.size() < self.nbytes:
            raise DataError(
                f"{self.path} was truncated while it was in use. Run the same command again: it is decoded anew."
            )

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return frames; see `Frames.read`."""
        self.check()
        return self._array.take(rows, axis=0)

    def ahead(self, reads: Iterable[NDArray[np.int64]], *, depth: int = 2) -> Generator[NDArray[np.uint8]]:
        """Yield `read(rows)` for all `reads`; nothing is made ready, since a copy takes less than a thread would."""
        for rows in reads:
            yield self.read(rows)


class Kept(NamedTuple):
    """A finished folder of frames."""

    path: Path
    rows: int
    skipped: dict[str, str]
    """Images that turned out to be undecodable, by name: why."""
    reused: bool = True
    """Whether it was there already."""


def find(stores: Path, key: str, geometry: Geometry) -> Kept | None:
    """Return the finished folder of `key`, or None where there is none or it is damaged."""
    folder = stores / key
    try:
        manifest: Any = json.loads((folder / "manifest.json").read_bytes())
        kept = Kept(folder / "frames.u8", int(manifest["rows"]), dict(manifest["skipped"]))
        complete = manifest["format"] == _FORMAT and kept.path.stat().st_size == kept.rows * geometry.frame_bytes
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if complete else None


def room(stores: Path) -> int:
    """Return the bytes that decoded images may take where nobody said: 10 % of the disk, at most 5 GB, stay free.

    A hundredth of what is free is always granted: on a disk that is nearly full, small data are stored all the same.
    """
    there = next(place for place in (stores, *stores.parents) if place.exists())
    free, total = storage.free_bytes(there), shutil.disk_usage(there).total
    return max(free - min(total // 10, _RESERVE), free // 100)


def obtain(
    stores: Path,
    key: str,
    geometry: Geometry,
    names: Sequence[str],
    decode: Callable[[str], Decoded],
    *,
    accept: Callable[[dict[str, str]], None],
    workers: int,
    progress: Progress,
) -> Kept:
    """Return the frames of `key`; where there are none yet, decode the images in the order of `names`.

    Args:
        stores: the folder of all stores.
        key: names the images and the geometry.
        geometry: of the frames.
        names: the images, in the order of the rows.
        decode: from a name to its frame or to why there is none; called from several threads.
        accept: called with what was skipped, before the folder counts as finished; may raise.
        workers: threads that decode.
        progress: told of the images decoded.

    Raises:
        UnderstudyError: the disk is too small or cannot be written.
    """
    kept = find(stores, key, geometry)
    if kept:
        return kept

    with storage.disk_errors(stores):
        stores.mkdir(parents=True, exist_ok=True)
        with alone(stores / f"{key}.lock", lambda: waiting("decode", len(names), progress)):
            kept = find(stores, key, geometry)  # by another process, while this one waited
            if kept:
                return kept
            _clean(stores)
            cachefolder.make_room(len(names) * geometry.frame_bytes, stores.parent)
            _check_space(stores, len(names) * geometry.frame_bytes)
            _write(stores, key, decoded("decode", names, decode, workers=workers, progress=progress), accept)
    kept = find(stores, key, geometry)
    if kept is None:
        raise UnderstudyError(f"The decoded images in {stores / key} are not as they were written. Is the disk sound?")
    return kept._replace(reused=False)


def _write(
    stores: Path, key: str, frames: Iterable[tuple[str, Decoded]], accept: Callable[[dict[str, str]], None]
) -> None:
    building, final = stores / f"{key}.building", stores / key
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        skipped: dict[str, str] = {}
        rows = 0
        with (building / "frames.u8").open("wb") as file:
            for name, frame in frames:
                if isinstance(frame, str):
                    skipped[name] = frame
                else:
                    file.write(frame.tobytes())
                    rows += 1
            file.flush()
            os.fsync(file.fileno())
        accept(skipped)
        storage.write_json(building / "manifest.json", {"format": _FORMAT, "rows": rows, "skipped": skipped})
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        building.rename(final)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def decoded(
    task: str, names: Sequence[str], decode: Callable[[str], Decoded], *, workers: int, progress: Progress
) -> Iterator[tuple[str, Decoded]]:
    """Yield every image's name with its frame, or with why there is none, in order; tell of the progress."""
    bad = 0
    results = in_order(decode, names, workers=workers)
    for done, (name, frame) in enumerate(zip(names, results, strict=True), 1):
        yield name, frame
        bad += isinstance(frame, str)
        if done % 64 == 0 or done == len(names):
            progress(task, done=done, total=len(names), note=f"{bad} skipped" if bad else "")


def waiting(task: str, total: int, progress: Progress) -> None:
    """Tell that another process does the same work, so that this one waits for it."""
    progress(task, done=0, total=total, note="another process is at it")


@contextmanager
def alone(path: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Hold a lock, `waits` called each second before; the system frees it when a process dies.

    The empty file stays: to remove it is a race.
    """
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=1)
            break
        except Timeout:
            waits()
    try:
        yield
    finally:
        lock.release()


def _clean(stores: Path) -> None:
    """Remove what dead processes left half built: nobody holds the lock of it."""
    for building in stores.glob("*.building"):
        lock = FileLock(building.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            shutil.rmtree(building, ignore_errors=True)
        finally:
            lock.release()


def _check_space(stores: Path, needed: int) -> None:
    free = storage.free_bytes(stores)
    if needed > free:
        raise UnderstudyError(
            f"The decoded images need {needed / 1e6:,.0f} MB in {stores}, where {free / 1e6:,.0f} MB are free. "
            "Free some space, set UNDERSTUDY_CACHE to a folder on a larger disk, choose a smaller image_size, or lower "
            "data.store_budget, beyond which nothing is stored."
        )
