"""Small image folders for tests, and the bytes of image files that are hard to come by."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

LONG_AGO = 1_600_000_000


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def texture(seed: int, height: int = 12, width: int = 12, channels: int = 1) -> np.ndarray:
    """Smooth, different for every seed: uint8 [height, width] or [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), np.uint8)
    image = Image.fromarray(coarse[..., 0] if channels == 1 else coarse)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def png(seed: int, *, side: int = 12, channels: int = 1) -> bytes:
    return encode(Image.fromarray(texture(seed, side, side, channels)), "PNG")


def put(path: Path, data: bytes, *, aged: bool = True) -> Path:
    """Write a file; by default it looks as if it had lain there for years."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if aged:
        os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def make_folder(root: Path, counts: Mapping[str, int], *, side: int = 12, channels: int = 1, seed: int = 0) -> Path:
    """Fill `root` with different images: `counts` maps a folder such as "train/cat" to a number of them."""
    for folder, count in counts.items():
        for number in range(count):
            put(root / folder / f"{number:03d}.png", png(seed, side=side, channels=channels))
            seed += 1
    return root


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header claims any size: 100 bytes that would decode to gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


@contextmanager
def ordinary_user() -> Iterator[Path]:
    """Yield a folder and become a user whom file permissions bind; skips where that is impossible."""
    if not hasattr(os, "geteuid"):
        pytest.skip("no Unix permissions here")
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        if root:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


def shared_folder(name: str) -> Path:
    """Return a folder of the shared test data, or skip the test."""
    given = os.environ.get("UNDERSTUDY_TEST_DATA")
    folder = (Path(given) if given else Path(__file__).parents[2] / "shared" / "data") / name
    if not folder.is_dir():
        pytest.skip(f"the shared test data have no {name} (set UNDERSTUDY_TEST_DATA)")
    return folder
