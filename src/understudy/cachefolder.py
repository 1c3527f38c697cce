"""What the cache folder holds, how large it may grow, and what makes room: the least recently used goes first.

Everything in it can be made again. Whatever is removed under a running process stays readable to it or is computed
anew. Imported by `data` and by the commands that look after the cache. No torch here.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from understudy import storage
from understudy.errors import ConfigError

LIMIT = "UNDERSTUDY_CACHE_LIMIT"
"""Environment variable: how large the cache may grow, such as 20GB or 500MB."""
DEFAULT_LIMIT = 20_000_000_000
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MARKERS = {"stores": "manifest.json", "outputs": "card.json"}
"""Kinds whose entries are folders, and the file in each that says what it holds; its time is that of the last use."""
_FILES = ("listings", "examined", "numerics", "costs")
"""Kinds whose entries are single files."""
_EVICTED = ("stores", "unfinished", "outputs", "listings", "examined")
"""Kinds that make room; numerics and costs are tiny, and the same run chooses the same as long as they are kept."""


@dataclass(frozen=True)
class Entry:
    """One thing that is kept."""

    kind: str
    """stores, unfinished (a store that a process is building, or died over), outputs, listings, examined,
    numerics, costs."""
    path: Path
    nbytes: int
    used: float
    """When it was last used, in seconds since 1970."""
    said: dict[str, Any] = field(default_factory=dict)
    """What its card or manifest says; empty where there is none that can be read."""


def limit() -> int:
    """Return how many bytes the cache may hold: `$UNDERSTUDY_CACHE_LIMIT`, or 20 GB.

    Raises:
        ConfigError: the variable holds no size.
    """
    given = os.environ.get(LIMIT, "").strip()
    return parse_size(given, f"The environment variable {LIMIT}") if given else DEFAULT_LIMIT


def parse_size(text: str, what: str) -> int:
    """Return the bytes that a text such as "20GB", "500 MB", "1.5g" or "1000" stands for.

    Args:
        text: a number and a unit; K, M, G and T are powers of 1000.
        what: begins the sentence of the error.

    Raises:
        ConfigError: the text is no size.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMGT]?)B?", text.strip(), re.ASCII | re.IGNORECASE)
    if not match:
        raise ConfigError(f"{what} takes a size such as 20GB or 500MB, not {text!r}.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def size_text(nbytes: float) -> str:
    """Return bytes as a reader wants them, such as "1.5 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.1f} {name}"
    return f"{nbytes:.0f} B"


def entries(cache: Path | None = None) -> list[Entry]:
    """Return all that is kept, the least recently used first; what another process removes meanwhile is left out.

    Args:
        cache: the folder; `storage.cache_dir()` by default.
    """
    cache = cache or storage.cache_dir()
    found = [*_folders(cache), *_single_files(cache)]
    return sorted(found, key=lambda entry: (entry.used, entry.path))


def touch(folder: Path) -> None:
    """Note that a folder of the cache is in use; where that cannot be written, it only counts as used earlier."""
    with contextlib.suppress(OSError, KeyError):
        os.utime(folder / _MARKERS[folder.parent.name])


def remove(entry: Entry) -> bool:
    """Remove an entry; tell whether it is gone."""
    if entry.kind == "unfinished":
        return _remove_unfinished(entry.path)
    if entry.kind not in _MARKERS:
        with contextlib.suppress(OSError):
            entry.path.unlink(missing_ok=True)
        return not entry.path.exists()
    with contextlib.suppress(OSError):  # without it nobody takes a folder that is half removed for a whole one
        (entry.path / _MARKERS[entry.kind]).unlink(missing_ok=True)
    shutil.rmtree(entry.path, ignore_errors=True)
    return not entry.path.exists()


def make_room(needed: int, cache: Path | None = None, *, in_use: Iterable[Path] = ()) -> list[Entry]:
    """Remove the least recently used until `needed` more bytes fit below the limit; return what was removed.

    What is in use stays even where the limit is exceeded: a run that needs more than the limit goes on, and what it
    kept is the next to go.

    Args:
        needed: bytes that are about to be written.
        cache: the folder; `storage.cache_dir()` by default.
        in_use: entries to keep, by path.

    Raises:
        ConfigError: the limit is no size.
    """
    return evict(limit() - needed, cache, in_use=in_use)


def evict(allowed: int, cache: Path | None = None, *, in_use: Iterable[Path] = ()) -> list[Entry]:
    """Remove the least recently used until at most `allowed` bytes are left; otherwise as `make_room`."""
    spared = set(in_use)
    there = entries(cache)
    total = sum(entry.nbytes for entry in there)
    removed = []
    for entry in there:
        if total <= allowed:
            break
        if entry.kind in _EVICTED and entry.path not in spared and remove(entry):
            removed.append(entry)
            total -= entry.nbytes
    return removed


def _remove_unfinished(folder: Path) -> bool:
    """Remove what a dead process left half built: nobody holds the lock of it."""
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return False
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()
    return not folder.exists()


def _folders(cache: Path) -> Iterator[Entry]:
    for kind, marker in _MARKERS.items():
        for folder in _listed(cache / kind):
            if not folder.is_dir():
                continue
            status = {path.name: found for path in _listed(folder) if (found := _status(path))}
            nbytes = sum(one.st_size for one in status.values())
            own = _status(folder)
            noted = [status[marker]] if marker in status else [*status.values(), *([own] if own else [])]
            used = max((one.st_mtime for one in noted), default=0.0)
            unfinished = folder.suffix == ".building"
            yield Entry("unfinished" if unfinished else kind, folder, nbytes, used, _said(folder / marker))


def _single_files(cache: Path) -> Iterator[Entry]:
    for kind in _FILES:
        for path in _listed(cache / kind):
            status = _status(path)
            if path.suffix == ".json" and status:
                yield Entry(kind, path, status.st_size, status.st_mtime)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _said(path: Path) -> dict[str, Any]:
    try:
        said = storage.read_json(path)
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
