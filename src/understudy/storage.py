"""Files that survive a crash: atomic writes, hashes, locks, the cache folder. Any part of the package may import it.

No torch here. A file is written to a temporary name in the same folder, flushed to the disk and renamed, so that a
reader sees the old bytes or the new ones, never a part.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from understudy.errors import RunError, UnderstudyError


def cache_dir() -> Path:
    """Return the folder for what is kept between runs: `$UNDERSTUDY_CACHE`, or `~/.cache/understudy`."""
    given = os.environ.get("UNDERSTUDY_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "understudy"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk, or a name too long for it, into one sentence that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UnderstudyError(
                f"The disk is full: {path} could not be written. What was finished before is kept; "
                "free some space, then run the same command again."
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise UnderstudyError(
                f"{path} cannot be written ({os.strerror(error.errno)}). Choose another folder with --out, "
                "or set UNDERSTUDY_CACHE for the cache."
            ) from error
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to the disk and renamed to `path`."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    return json.loads(path.read_bytes())


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits that name a JSON-able value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def hash_file(path: Path) -> str:
    """Return 32 hexadecimal digits that name the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def free_bytes(path: Path) -> int:
    """Return the bytes free on the disk that holds `path` or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """Own `folder` until the block ends; the system frees the lock when a process dies, however it dies.

    Raises:
        RunError: another process owns the folder, or there can be none.
    """
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:  # such as below /proc
            raise RunError(f"No folder can be made at {folder}. Choose another one with --out.") from None
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"Another process is working on {folder}. Wait for it to end, or choose another folder with --out."
            ) from None
    try:
        yield
    finally:
        lock.release()
