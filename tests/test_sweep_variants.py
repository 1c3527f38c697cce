"""Whole sweeps over rates, methods, students and a search's cells; how often their teacher answers; what goes wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import small_runs
from small_runs import photos, tiny
from sweep_runs import GRID, Watched, _quick, cell, figures, swept, table
from understudy import api
from understudy.errors import ConfigError, RunError, TrainingError
from understudy.evaluate import suitability
from understudy.models import zoo
from understudy.pipeline import Run, teaching, trainings
from understudy.sweep import executors

__all__ = ["_quick", "photos"]  # fixtures


# --- what else is varied ---


def test_a_learning_rate_is_compared_with_the_student_alone_at_its_own_best(photos: Path, tmp_path: Path) -> None:
    given = {"lr": [1e-5, 1e-2], "alpha": [0.5], "workers": 1}
    result = swept(photos, tmp_path / "run", sweep=given, seeds=[0], train={"epochs": 3})
    sweep = table(result)
    alone = {one.key: one.accuracy["0"] for one in sweep.cells if one.kd_weight == 0}
    assert len(alone) == 2
    assert not any(one.asked for one in sweep.cells if one.kd_weight == 0)
    assert alone[str(sweep.alone)] == max(alone.values()) > min(alone.values())
    assert cell(sweep, sweep.alone).lr == 1e-2
    assert cell(sweep, sweep.chosen).gain is not None
    assert result.record.models["teacher"].epochs[0].lr != 1e-5  # the teacher keeps its own


def test_the_first_steps_of_a_cell_are_looked_at_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every term is said to drown the others where a share of 0 is too much; only the first seed is looked at."""
    monkeypatch.setattr(suitability, "MOST_SHARE", 0.0)
    asked = {"method": ["kd", "logit_mse"], "workers": 1}
    result = api.run(tiny(photos, sweep=asked, train={"epochs": 1}), tmp_path / "run")
    assert result.record.sweep is not None
    for cell in result.record.sweep.cells:  # noqa: F402
        assert bool(cell.doubts) == bool(cell.kd_weight)
        assert all("%" in text for text in cell.doubts)
    trials = sorted((tmp_path / "run" / "cells").glob("*/student-*/trial.json"))
    looked_at = [path.parent.name for path in trials if json.loads(path.read_text())["doubts"]]
    assert set(looked_at) == {"student-0"}


def test_students_are_compared_each_with_itself(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.SMALL, "twin", zoo.SMALL["mnist_small"])
    given = {"student": ["twin", "mnist_small"], "workers": 1}
    result = swept(photos, tmp_path / "run", sweep=given, seeds=[0])
    sweep = table(result)
    assert sweep.trainings == 4
    assert cell(sweep, sweep.chosen).student == cell(sweep, sweep.alone).student
    assert result.record.models["student-0"].architecture == cell(sweep, sweep.chosen).student
    for one in sweep.cells:
        if one.kd_weight:
            alone = next(other for other in sweep.cells if other.student == one.student and not other.kd_weight)
            assert one.gain is not None
            assert one.gain.value == pytest.approx(one.accuracy["0"] - alone.accuracy["0"])


def test_the_teacher_answers_once_for_all_cells(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    seen = Watched(monkeypatch)
    load, loaded_before = teaching._load, []

    def counted(*rest: Any, embedding: bool) -> Any:
        loaded_before.append(len(seen.trained))
        return load(*rest, embedding=embedding)

    monkeypatch.setattr(teaching, "_load", counted)
    result = swept(photos, tmp_path / "run")
    assert len(seen.trained) == 7
    assert set(loaded_before) == {1}  # when the teacher was trained, and no student yet
    assert result.record.outputs is not None
    assert result.record.outputs.computed == 2 * 2 * small_runs.COUNTS["train"]  # epochs x images


def test_a_teacher_that_runs_along_teaches_all_cells(photos: Path, tmp_path: Path) -> None:
    given = {"alpha": [0.5], "temperature": [1, 4], "workers": 1}
    result = swept(photos, tmp_path / "run", sweep=given, seeds=[0], train={"views": "online"})
    assert table(result).trainings == 3
    assert list(result.record.models["student-0"].epochs[0].parts) == ["ce", "kd"]


def test_a_search_by_optuna_ends_in_a_verdict(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    given = {"alpha": [0.2, 0.9], "lr": [1e-4, 1e-2], "trials": 5, "workers": 1}
    result = swept(photos, tmp_path / "run", sweep=given)
    sweep = table(result)
    assert sweep.search == "tpe"
    assert len([one for one in sweep.cells if one.asked]) == 5
    chosen = cell(sweep, sweep.chosen)
    alone = {one.lr for one in sweep.cells if one.kd_weight == 0}
    assert alone == {1e-4, 1e-2, chosen.lr}  # the student alone may have the chosen learning rate as well
    assert result.verdict.seeds == 2
    with pytest.MonkeyPatch.context() as patch:
        seen = Watched(patch)
        shutil.rmtree(result.folder / "student-0")
        again = api.resume(result.folder)
    assert not seen.trained
    assert figures(table(again)) == figures(sweep)


# --- what goes wrong ---


@pytest.fixture
def diverging(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let students of these temperatures diverge; return the list of temperatures to fill."""
    hot: list[float] = []
    train = trainings.student

    def student(run: Run, *rest: Any, **named: Any) -> None:
        if run.config.distill.temperature in hot:
            raise TrainingError("The loss is not a number.")
        train(run, *rest, **named)

    monkeypatch.setattr(trainings, "student", student)
    return hot


def test_a_cell_that_diverges_does_not_end_the_sweep(photos: Path, tmp_path: Path, diverging: list[float]) -> None:
    diverging.append(4.0)
    sweep = table(swept(photos, tmp_path / "run", seeds=[0]))
    failed = [one for one in sweep.cells if one.status == "failed"]
    assert [(one.temperature, one.failure, one.mean) for one in failed] == [(4.0, "The loss is not a number.", None)]
    assert cell(sweep, sweep.chosen).temperature == 1.0


def test_a_sweep_in_which_all_diverges_says_why(photos: Path, tmp_path: Path, diverging: list[float]) -> None:
    diverging += [1.0, 4.0]
    with pytest.raises(TrainingError, match=r"No cell of the sweep came to its end: The loss is not a number"):
        swept(photos, tmp_path / "run", seeds=[0])


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"alpha": [0, 1.5]}, "'sweep.alpha.1'.*less than or equal to 1"),
        ({"alpha": [0.0]}, "would learn from the teacher; give an alpha above 0"),
        ({"temperature": [0]}, "'sweep.temperature.0'.*greater than 0"),
        ({"method": ["kdd"]}, "Unknown method 'kdd'. Did you mean 'kd'"),
        ({"students": ["cnn3"]}, "Unknown setting 'sweep.students'. Did you mean 'student'"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_long(
    sweep: dict[str, Any], said: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        swept(photos, tmp_path / "run", sweep=sweep)
    assert not (tmp_path / "run" / "teacher").exists()


@pytest.mark.parametrize(("given", "library"), [({"trials": 4}, "optuna"), ({"ray": "local"}, "ray")])
def test_a_missing_extra_is_named_before_anything_long(
    given: dict[str, Any], library: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"pip install 'understudy\[{library}\]'"):
        swept(photos, tmp_path / "run", sweep=given)
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_process_that_dies_is_said_in_a_sentence(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = shutil.which("false")
    assert dies is not None
    monkeypatch.setattr(executors.sys, "executable", dies)  # type: ignore[attr-defined]
    with pytest.raises(RunError, match=r"has died.*--workers.*log\.txt"):
        swept(photos, tmp_path / "run", sweep={**GRID, "workers": 2})
