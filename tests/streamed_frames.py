"""Frames that are streamed because nothing may be stored, and a mixed folder to stream.

The mixed folder holds what users have: JPEG and PNG, grey and colour, one turned by EXIF, some much larger than the
frames.
"""

from __future__ import annotations

import threading

import pytest
from PIL import Image

from imagefiles import encode, put, texture
from opened_store import opened

TINY = 1e-9
"""A budget of one byte."""


def streamed(folder, cache, **options):
    return opened(folder, cache, store_budget=TINY, **options)


@pytest.fixture
def mixed(tmp_path):
    root = tmp_path / "mixed"
    for number in range(12):
        for kind, place in (("JPEG", "cat"), ("PNG", "dog")):
            channels = 1 if number % 3 else 3
            pixels = texture(2 * number + (kind == "PNG"), 150 if number % 2 else 30, 170, channels)
            put(root / place / f"{number}.{kind.lower()}", encode(Image.fromarray(pixels), kind))
    turned = Image.Exif()
    turned[0x0112] = 6
    put(root / "cat" / "turned.jpeg", encode(Image.fromarray(texture(99, 60, 80)), "JPEG", exif=turned))
    return root


def decoders():
    """Return the threads that decode."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
