"""How tests of the store of frames open it, and a small folder of images to open."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagefiles import make_folder
from understudy.config import DataConfig
from understudy.data.store import open_store

PETS = {"cat": 12, "dog": 14}


def opened(folder, cache: Path, *, progress=None, workers=None, **options):
    how = {"progress": progress} if progress else {}
    return open_store(DataConfig(source=str(folder), **options), cache=cache, workers=workers, **how)


class Log:
    """A `Progress` that remembers."""

    def __init__(self):
        self.calls = []

    def __call__(self, task, /, *, done, total, note=""):
        self.calls.append((task, done, total, note))

    def count(self, task):
        return max((done for name, done, _, _ in self.calls if name == task), default=0)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "data", PETS)
