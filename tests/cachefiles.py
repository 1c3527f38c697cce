"""A cache folder of a test's own, and files of any age to lie in it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

DAY = 86400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, without a limit that the machine may have set."""
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNDERSTUDY_CACHE_LIMIT", raising=False)
    return tmp_path / "cache"


def store(cache: Path, name: str, *, side: int = 10, images: int = 10, age: float = 0.0) -> Path:
    """Put decoded grey images into a cache, last used `age` days ago."""
    folder = cache / "stores" / name
    folder.mkdir(parents=True)
    (folder / "frames.u8").write_bytes(bytes(images * side * side))
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"format": "understudy-store/1", "rows": images, "skipped": {}}))
    return aged(manifest, age).parent


def small(cache: Path, kind: str, name: str, *, nbytes: int = 20, age: float = 0.0) -> Path:
    path = cache / kind / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps("x" * (nbytes - 2)))
    return aged(path, age)


def aged(path: Path, days: float) -> Path:
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path
