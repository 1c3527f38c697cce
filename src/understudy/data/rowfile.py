"""A file of rows in blocks with a checksum each: what is torn, cut off or never written reads as missing.

Read and written by position, never mapped: a mapped file that somebody cuts short kills the process that reads it.
Several processes may write the same file at once: a block is one write, and one that got mixed up fails its checksum.
Imported by `outputs.py` and by whoever checks the cache. Nothing here imports torch.
"""

from __future__ import annotations

import errno
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_READ_BYTES = 1 << 24
_CHECK = np.dtype("<u4")


class RowFile:
    """Rows of one type; a file that is not there reads as all missing, and the first write makes it.

    Args:
        path: of the file.
        row: type of a row.
        rows: how many there are.
        block: rows that are written together.
        salt: what the file is for: blocks of another file, or of another place in this one, fail their checksums.
    """

    def __init__(self, path: Path, row: np.dtype[np.void], rows: int, *, block: int, salt: str) -> None:
        self.path = path
        self.row = row
        self.rows = rows
        self.block = block
        self._salt = salt
        self._stride = _CHECK.itemsize + block * row.itemsize
        self._file: io.FileIO | None = None

    @property
    def blocks(self) -> int:
        """How many blocks there are; the last one may be shorter."""
        return -(-self.rows // self.block)

    @property
    def nbytes(self) -> int:
        """Bytes of the file when nothing is missing."""
        return self.blocks * _CHECK.itemsize + self.rows * self.row.itemsize

    def span(self, block: int) -> slice:
        """Return the rows of a block."""
        return slice(block * self.block, min((block + 1) * self.block, self.rows))

    def close(self) -> None:
        """Let go of the file; the next access opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, block: int, rows: NDArray[np.void]) -> None:
        """Write a block.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        payload = np.ascontiguousarray(rows, self.row).tobytes()
        data = self._check(block, payload).to_bytes(_CHECK.itemsize, "little") + payload
        file = self._open(writing=True)
        file.seek(block * self._stride)
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def missing(self) -> list[int]:
        """Return the blocks that are not there or are damaged; reads the whole file, but keeps none of it."""
        return [block for block, found in self._scan() if found is None]

    def damaged(self) -> list[int]:
        """Return the blocks that hold something, but not what was written: torn, overwritten, or of another file."""
        torn = [block for block in self.missing() if any(self._read(self._bytes(block), block * self._stride))]
        return [block for block in torn if self.read(block) is None]  # or another process was writing it just now

    def read(self, block: int) -> NDArray[np.void] | None:
        """Return the rows of a block; None where it is missing."""
        return self._rows(block, memoryview(self._read(self._bytes(block), block * self._stride)))

    def load(self) -> tuple[NDArray[np.void], list[int]]:
        """Return all rows, [rows], and the blocks that are missing, whose rows are zero."""
        loaded = np.zeros(self.rows, self.row)
        missing = []
        for block, found in self._scan():
            if found is None:
                missing.append(block)
            else:
                loaded[self.span(block)] = found
        return loaded, missing

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.void] | None:
        """Return some rows, [len(rows)], without a look at the checksums; None where some are not there any more."""
        blocks, within = np.divmod(rows, self.block)
        places = blocks * self._stride + _CHECK.itemsize + within * self.row.itemsize
        size = self.row.itemsize
        data = b"".join([self._read(size, place) for place in places.tolist()])
        if len(data) != size * len(rows):
            return None
        # a file that was cut short and then written further on has holes, which read as zeros
        empty = ~np.frombuffer(data, np.uint8).reshape(-1, size).any(1)
        if any(self.read(block) is None for block in np.unique(blocks[empty]).tolist()):
            return None
        return np.frombuffer(data, self.row)

    def _scan(self) -> Iterator[tuple[int, NDArray[np.void] | None]]:
        """Yield every block's number with its rows, None where it is missing."""
        together = max(1, _READ_BYTES // self._stride)
        for first in range(0, self.blocks, together):
            data = memoryview(self._read(together * self._stride, first * self._stride))
            for block in range(first, min(first + together, self.blocks)):
                start = (block - first) * self._stride
                yield block, self._rows(block, data[start : start + self._bytes(block)])

    def _bytes(self, block: int) -> int:
        span = self.span(block)
        rows: int = span.stop - span.start
        return _CHECK.itemsize + rows * self.row.itemsize

    def _rows(self, block: int, data: memoryview) -> NDArray[np.void] | None:
        payload = data[_CHECK.itemsize :]
        given = int.from_bytes(data[: _CHECK.itemsize], "little")
        if len(data) != self._bytes(block) or given != self._check(block, payload):
            return None
        return np.frombuffer(payload, self.row)

    def _check(self, block: int, payload: bytes | memoryview) -> int:
        return zlib.crc32(payload, zlib.crc32(f"{self._salt}/{block}".encode()))

    def _read(self, length: int, place: int) -> bytes:
        """Return what the file holds there; nothing where it cannot be read, so that it is computed again."""
        try:
            file = self._open(writing=False)
            file.seek(place)
            data: bytes = file.read(length)
        except OSError:
            return b""
        return data

    def _open(self, *, writing: bool) -> io.FileIO:
        if self._file is not None and (self._file.writable() or not writing):
            return self._file
        self.close()
        if writing:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        self._file = io.FileIO(self.path, "r+" if writing else "r")
        return self._file

    def __del__(self) -> None:
        self.close()
