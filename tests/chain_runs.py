"""How tests of chains and ensembles make tiny runs with more than one teacher, without an export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import small_runs
from small_runs import weights
from understudy import api

TOGETHER = ["teacher-1", "gate-1", "teacher-2", "gate-2", "teacher", "baseline-0", "student-0", "evaluate", "export"]
ASSISTANT = {"assistants": ["mnist_small"]}
TWO = {"also": [{"model": "mnist_small", "share": 3}]}


@pytest.fixture(scope="module", autouse=True)
def _quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No export, and a cache of each file's own: what is computed and what is found there is part of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        small_runs.without_export(patch)
        patch.setenv("UNDERSTUDY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def distilled(photos: Path, folder: Path, **over: Any) -> api.DistillResult:
    return small_runs.distilled(photos, folder, **{"seeds": [0], **over})


def taught_by(photos: Path, folder: Path, file: Path) -> str:
    """Return the hash of the student that a weights file teaches in a run of its own."""
    return weights(distilled(photos, folder, teacher={"model": str(file)}).folder)["student-0"]
