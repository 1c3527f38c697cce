"""What is known of every image file without decoding it, kept between runs. Imported by `understudy.data.store`.

A file is read once: as long as its size and time of change stay the same, its hash and header come from the cache.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from understudy import storage
from understudy.data.decode import DECODE_VERSION, BadImage, inspect_bytes, read
from understudy.errors import UnderstudyError
from understudy.progress import Progress

T = TypeVar("T")
R = TypeVar("R")

_FORMAT = f"understudy-listing/{DECODE_VERSION}"
# A file changed this shortly before it was read may change again within the resolution of its time stamp.
_UNSETTLED_NS = 2_000_000_000


class Entry(NamedTuple):
    """One image file, or one array, which has neither size nor time of change."""

    size: int
    """Bytes of the file."""
    mtime_ns: int
    """When it was changed; with the size, what tells that it is still the same."""
    hash: str
    """32 hexadecimal digits, as `storage.hash_file`; empty where the file is unreadable."""
    width: int
    height: int
    is_grey: bool
    bad: str
    """Why it cannot be used; empty where nothing is known against it."""


def hash_bytes(data: bytes) -> str:
    """Return 32 hexadecimal digits that name the bytes, as `storage.hash_file` does."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def list_files(root: Path, names: Sequence[str], *, cache: Path, workers: int, progress: Progress) -> dict[str, Entry]:
    """Return what is known of every file, by name; reads those only that are new or changed.

    Args:
        root: the folder.
        names: paths relative to it.
        cache: the folder for what is kept between runs.
        workers: threads that read.
        progress: told of the files read.
    """
    kept = cache / "listings" / f"{storage.fingerprint(os.path.abspath(root))}.json"
    loaded = _load(kept)
    known = dict(loaded)
    entries: dict[str, Entry] = {}
    fresh: list[str] = []
    for name in names:
        status = _status(root / name)
        if name in known and status is not None and known[name][:2] == (status.st_size, status.st_mtime_ns):
            entries[name] = known[name]
        else:
            fresh.append(name)
    now = time.time_ns()
    for done, (name, seen) in enumerate(in_order(lambda name: (name, _look(root / name)), fresh, workers=workers), 1):
        entries[name] = seen
        if seen.hash and seen.mtime_ns < now - _UNSETTLED_NS:
            known[name] = seen
        if done % 64 == 0 or done == len(fresh):
            progress("read images", done=done, total=len(fresh))
    known = {name: known[name] for name in names if name in known}
    if known != loaded:
        save_for_speed(kept, {"format": _FORMAT, "files": known})
    return {name: entries[name] for name in names}


def list_arrays(names: Sequence[str], arrays: NDArray[np.uint8]) -> dict[str, Entry]:
    """Return the same of images that are arrays, uint8 `[N, H, W, 1 or 3]`."""
    _, height, width, channels = arrays.shape
    rows = (hash_bytes(np.ascontiguousarray(row).tobytes()) for row in arrays)
    grey = channels == 1
    return {name: Entry(0, 0, digest, width, height, grey, "") for name, digest in zip(names, rows, strict=True)}


def in_order(function: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """Yield `function(item)` in the order of `items`, computed by threads that stay a few items ahead.

    Threads, not processes: Pillow and hashlib let go of the interpreter lock where the time is spent.
    """
    pool = ThreadPoolExecutor(workers)
    ahead: deque[Future[R]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) >= 16 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def save_for_speed(path: Path, value: Any) -> None:
    """Keep a JSON-able value that only saves time later; a full disk is no reason to stop.

    Raises:
        UnderstudyError: the disk cannot be written for another reason.
    """
    try:
        storage.write_text(path, json.dumps(value, separators=(",", ":")))
    except UnderstudyError as error:
        if not disk_is_full(error):
            raise


def disk_is_full(error: UnderstudyError) -> bool:
    """Tell whether an error of `storage.disk_errors` came from a full disk, or from a quota."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _look(path: Path) -> Entry:
    status = _status(path)
    size, mtime_ns = (status.st_size, status.st_mtime_ns) if status else (0, 0)
    try:
        if status and not stat.S_ISREG(status.st_mode):  # a named pipe would be waited for, forever
            raise BadImage("unreadable: not a regular file")
        data = read(path)
    except BadImage as error:
        return Entry(size, mtime_ns, "", 0, 0, False, str(error))
    digest = hash_bytes(data)
    try:
        return Entry(size, mtime_ns, digest, *inspect_bytes(data), "")
    except BadImage as error:
        return Entry(size, mtime_ns, digest, 0, 0, False, str(error))


def _load(path: Path) -> dict[str, Entry]:
    """Read a kept listing; whatever is wrong with it, the files themselves are there to be read again."""
    try:
        kept: Any = json.loads(path.read_bytes())
        if kept["format"] != _FORMAT:
            return {}
        return {name: _entry(row) for name, row in kept["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _entry(row: list[Any]) -> Entry:
    size, mtime_ns, digest, width, height, is_grey, bad = row
    if len(bytes.fromhex(digest)) != 16:
        raise ValueError(digest)
    return Entry(int(size), int(mtime_ns), digest, int(width), int(height), bool(is_grey), str(bad))
