"""Whole sweeps of tiny runs, and what happened during one; for the tests of whole sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import small_runs
from small_runs import tiny
from understudy import api
from understudy.data.batches import Split
from understudy.record import Sweep, SweepCell
from understudy.train import Training

GRID = {"alpha": [0, 0.5], "temperature": [1, 4], "workers": 1}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small_runs.without_export(monkeypatch)


class Watched:
    """What happened during a sweep: names of trainings, and how many images each evaluation saw, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.trained: list[str] = []
        self.seen: list[int] = []
        train, whole = Training.run, Split.whole

        def run(training: Training) -> Any:
            fit = train(training)
            self.trained.append(training.task)
            return fit

        def look(split: Split, *rest: Any) -> Any:
            self.seen.append(len(split))
            return whole(split, *rest)

        patch.setattr(Training, "run", run)
        patch.setattr(Split, "whole", look)


def swept(photos: Path, folder: Path, **over: Any) -> api.DistillResult:
    return api.run(tiny(photos, **{"sweep": GRID, **over}), folder)


def table(result: api.DistillResult) -> Sweep:
    assert result.record.sweep is not None
    return result.record.sweep


def figures(sweep: Sweep) -> dict[str, Any]:
    """Return what does not depend on who carried out the trials."""
    return sweep.model_dump(exclude={"executor": True, "cells": {"__all__": {"epoch_seconds"}}})


def cell(sweep: Sweep, key: str | None) -> SweepCell:
    return next(one for one in sweep.cells if one.key == key)
