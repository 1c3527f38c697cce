"""A finished run of striped images, trained once in a process however many files of tests import it."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import pytest

import small_runs
from small_runs import stripes
from understudy import api

MODELS = ["teacher", "baseline-0", "student-0", "baseline-1", "student-1"]


@cache
def _photos(base: Path) -> Path:
    return stripes(base / "striped" / "photos")


@cache
def _finished(base: Path) -> api.DistillResult:
    return small_runs.distilled(_photos(base), base / "finished" / "run")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _photos(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> api.DistillResult:
    """A finished run. Tests only look at it."""
    return _finished(tmp_path_factory.getbasetemp())


@pytest.fixture
def copied(finished: api.DistillResult, tmp_path: Path) -> Path:
    """A copy of the finished run, to be disturbed."""
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    small_runs.without_export(monkeypatch)
