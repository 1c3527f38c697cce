"""The file of decoded frames: built once for the same images and geometry, then mapped. Imported by `store.py`.

A finished folder `stores/<key>` holds `frames.u8`, `[rows, channels, side, side]` uint8 without a header, and
`manifest.json`. It is built under another name and renamed, under a lock for its key, so a process that dies leaves
nothing that is taken for finished, and of two that want the same one builds and the other waits.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from understudy import storage
from understudy.data.listing import in_order
from understudy.errors import UnderstudyError
from understudy.progress import Progress

_FORMAT = "understudy-store/1"


class Geometry(NamedTuple):
    """What every frame of a store looks like."""

    side: int
    channels: Literal[1, 3]
    fit: Literal["crop", "squash"]

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame."""
        return self.channels * self.side * self.side


class Kept(NamedTuple):
    """A finished folder of frames."""

    path: Path
    rows: int
    skipped: dict[str, str]
    """Images that turned out to be undecodable, by name: why."""
    reused: bool = True
    """Whether it was there already."""

    def map(self, geometry: Geometry) -> NDArray[np.uint8]:
        """Return the frames, read-only, their bytes left in the file until they are read."""
        shape = (self.rows, geometry.channels, geometry.side, geometry.side)
        return np.memmap(self.path, np.uint8, "r", shape=shape)


Decoded = NDArray[np.uint8] | str
"""A frame, or why there is none."""


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

    def waiting() -> None:
        progress("decode", done=0, total=len(names), note="another process is at it")

    with storage.disk_errors(stores):
        stores.mkdir(parents=True, exist_ok=True)
        with _alone(stores, key, waiting=waiting):
            kept = find(stores, key, geometry)  # by another process, while this one waited
            if kept:
                return kept
            _clean(stores)
            _check_space(stores, len(names) * geometry.frame_bytes)
            _write(stores, key, _reported(names, in_order(decode, names, workers=workers), progress), accept)
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


def _reported(names: Sequence[str], decoded: Iterator[Decoded], progress: Progress) -> Iterator[tuple[str, Decoded]]:
    bad = 0
    for done, (name, frame) in enumerate(zip(names, decoded, strict=True), 1):
        yield name, frame
        bad += isinstance(frame, str)
        if done % 64 == 0 or done == len(names):
            progress("decode", done=done, total=len(names), note=f"{bad} skipped" if bad else "")


@contextmanager
def _alone(stores: Path, key: str, *, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of `key`; the system frees it when a process dies. The empty file stays: to remove it is a race."""
    lock = FileLock(stores / f"{key}.lock")
    while True:
        try:
            lock.acquire(timeout=1)
            break
        except Timeout:
            waiting()
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
            "Free some space, set UNDERSTUDY_CACHE to a folder on a larger disk, or choose a smaller image_size."
        )
