"""Whole runs told as JSON lines and to trackers: what they say, after kills, side by side; and no weight changes."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import LoggerType

import small_runs
import test_resume
from small_runs import lines, photos, tiny, weights, words
from understudy import api, config
from understudy import record as records
from understudy.config import RunConfig
from understudy.errors import ConfigError
from understudy.tracking import others, places, require

__all__ = ["photos"]  # a fixture

begin = test_resume.begin
MODELS = ("teacher", "baseline-0", "student-0")
OVER: dict[str, Any] = {"seeds": [0]}


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> api.DistillResult:
    with pytest.MonkeyPatch.context() as patch:
        small_runs.without_export(patch)
        return small_runs.distilled(photos, tmp_path_factory.mktemp("finished") / "run", **OVER, log_weights=True)


# what a run writes


def test_every_training_of_a_run_writes_a_line_for_each_epoch(finished: api.DistillResult) -> None:
    for name in MODELS:
        trained = finished.record.models[name]
        read = lines(finished.folder / name / "metrics.jsonl", timed=True)
        assert [line["epoch"] for line in read] == list(range(1, len(trained.epochs) + 1))
        for line, epoch in zip(read, trained.epochs, strict=True):
            assert line == {"task": name, "seed": trained.seed, **epoch.model_dump(), "parameters": line["parameters"]}


def test_terms_stand_with_their_weights_and_add_up_to_the_loss(finished: api.DistillResult) -> None:
    for line in lines(finished.folder / "student-0" / "metrics.jsonl"):
        assert line["weights"] == {"ce": 0.75, "kd": 0.25}
        assert line["train_loss"] == pytest.approx(
            sum(line["weights"][name] * line["parts"][name] for name in line["parts"])
        )
    for name in ("teacher", "baseline-0"):
        assert lines(finished.folder / name / "metrics.jsonl")[0]["weights"] == {"ce": 1.0}


# after kills


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_has_the_same_lines(
    photos: Path, begin: test_resume.Begin, tmp_path: Path
) -> None:
    over = {**test_resume.LONG, **OVER, "log_weights": True}
    whole = small_runs.distilled(photos, tmp_path / "whole", **{**over, "checkpoint_seconds": 1e9})
    run = tmp_path / "run"
    test_resume.killed(begin("distill", *words(photos, **over), "--out", run), "teacher", run)
    for point in ("baseline-0", "student-0"):
        test_resume.killed(begin("resume", run), point, run)
    api.resume(run)
    for name in MODELS:
        assert lines(run / name / "metrics.jsonl") == lines(whole.folder / name / "metrics.jsonl"), name


# side by side


@pytest.mark.slow
def test_the_processes_of_a_sweep_write_a_file_each(photos: Path, tmp_path: Path) -> None:
    swept = {"alpha": [0.0, 0.5], "temperature": [1.0, 4.0], "workers": 2}
    result = small_runs.distilled(photos, tmp_path / "run", seeds=[0, 1], sweep=swept)
    files = sorted(result.folder.glob("cells/*/*/metrics.jsonl"))
    assert len(files) == 6  # alone, and two temperatures, of two seeds
    for file in files:
        name = str(file.parent.relative_to(result.folder))
        assert [(line["task"], line["epoch"]) for line in lines(file)] == [(name, 1), (name, 2)]
        kept = json.loads((file.parent / "trial.json").read_text())["trained"]["epochs"]
        assert [line["val_nll"] for line in lines(file)] == [epoch["val_nll"] for epoch in kept]


def test_students_trained_together_have_lines_as_each_alone(photos: Path, tmp_path: Path) -> None:
    swept = {"alpha": [0.0, 0.5], "stacked": "always"}
    with pytest.MonkeyPatch.context() as patch:
        small_runs.without_export(patch)
        result = small_runs.distilled(photos, tmp_path / "run", **OVER, sweep=swept)
    assert result.record.sweep is not None
    assert "together" in result.record.sweep.executor
    files = sorted(result.folder.glob("cells/*/*/metrics.jsonl"))
    assert len(files) == 2
    for file in files:
        kept = json.loads((file.parent / "trial.json").read_text())["trained"]["epochs"]
        assert lines(file, timed=True) == [
            {"task": str(file.parent.relative_to(result.folder)), "seed": 0, **epoch} for epoch in kept
        ]


# what is asked for


def test_trackers_are_settings_of_a_run(photos: Path) -> None:
    assert tiny(photos).track == ()
    assert tiny(photos, track="mlflow").track == ("mlflow",)
    assert tiny(photos, track=["mlflow", "wandb", "mlflow"]).track == ("mlflow", "wandb")
    with pytest.raises(ConfigError, match=r"Setting 'track\.1'.*'tensorboard'.*given: 'tensorbord'"):
        tiny(photos, track=["mlflow", "tensorbord"])


def test_our_names_are_accelerates() -> None:
    known = {str(name.value) for name in LoggerType} - {"all"}
    assert set(places.WAYS) == known == set(LOGGER_TYPE_TO_CLASS)
    assert set(RunConfig.model_fields["track"].annotation.__args__[0].__args__) == known  # type: ignore[union-attr]


def test_a_missing_library_is_one_sentence_before_any_work(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'mlflow'.*pip install 'understudy\[mlflow\]'"):
        require(["mlflow"])
    with pytest.raises(ConfigError, match=r"'comet_ml'.*pip install comet-ml, or leave out --track comet_ml\."):
        api.run(tiny(photos, track=["comet_ml"]), tmp_path / "run")
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_finished_run_may_be_told_of_elsewhere_without_being_another_run(
    finished: api.DistillResult, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_runs.without_export(monkeypatch)
    again = api.run(tiny(photos, **OVER, track=["tensorboard"]), finished.folder)
    assert again.record.stages == finished.record.stages


def test_settings_from_a_file_may_name_trackers(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  source: digits\ntrack: [tensorboard]\nlog_weights: true\n")
    asked = config.load(file)
    assert (asked.track, asked.log_weights) == (("tensorboard",), True)


# the real ones


REAL = pytest.mark.filterwarnings("ignore:::mlflow", "ignore:::wandb", "ignore:::tensorboard", "ignore:::sqlalchemy")


@pytest.fixture(scope="module")
def tracked(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> api.DistillResult:
    """A run of another process, so that no tracker's threads and settings stay behind; no network there either."""
    run = tmp_path_factory.mktemp("tracked") / "run"
    over = {**OVER, "log_weights": True}
    names = ["tensorboard", "mlflow", "wandb"]
    told = [word for name in names for word in ("--track", name)]
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import conftest, pytest, small_runs;"
        "import atexit; atexit.register(lambda: print('reached for', conftest._tried));"
        "from understudy import cli; small_runs.without_export(pytest.MonkeyPatch()); cli.main()"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), "distill", *words(photos, **over), *told]
    done = subprocess.run([*command, "--out", str(run)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "reached for []"
    assert done.stderr == ""
    return api.DistillResult(run, records.load(run))


@pytest.mark.slow
def test_no_tracker_changed_a_weight(tracked: api.DistillResult, finished: api.DistillResult) -> None:
    assert weights(tracked.folder) == weights(finished.folder)
    for name in MODELS:
        assert lines(tracked.folder / name / "metrics.jsonl") == lines(finished.folder / name / "metrics.jsonl")


@pytest.mark.slow
def test_tensorboard_shows_the_same_figures(tracked: api.DistillResult) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    for name in MODELS:
        read = accumulator.EventAccumulator(str(tracked.folder / "tracking/tensorboard" / name))
        read.Reload()
        written = lines(tracked.folder / name / "metrics.jsonl")
        for figure in ("train_loss", "val_accuracy", "val_nll", "lr"):
            shown = [(event.step, event.value) for event in read.Scalars(figure)]
            assert [step for step, _ in shown] == [line["epoch"] for line in written]
            assert [value for _, value in shown] == pytest.approx([line[figure] for line in written], rel=1e-6)
        assert [event.value for event in read.Scalars("loss/ce")] == pytest.approx(
            [line["parts"]["ce"] for line in written], rel=1e-6
        )
        parameters = written[-1]["parameters"]
        assert {f"{part}/{one}" for one in parameters for part in ("parameter", "gradient")} <= set(
            read.Tags()["histograms"]
        )
        one = next(iter(parameters))
        assert read.Scalars(f"gradient_norm/{one}")[-1].value == pytest.approx(parameters[one]["gradient"], rel=1e-6)


@pytest.mark.slow
def test_mlflow_keeps_the_same_figures_in_a_file_of_the_run(tracked: api.DistillResult) -> None:
    with sqlite3.connect(tracked.folder / "tracking/mlflow.db") as base:
        runs = dict(base.execute("select name, run_uuid from runs where status = 'FINISHED'").fetchall())
        assert set(runs) == set(MODELS)
        for name, identity in runs.items():
            asked = "select step, value from metrics where key = 'val_nll' and run_uuid = ? order by step"
            shown = base.execute(asked, (identity,)).fetchall()
            written = lines(tracked.folder / name / "metrics.jsonl")
            assert shown == [(line["epoch"], line["val_nll"]) for line in written]
            settings = dict(base.execute("select key, value from params where run_uuid = ?", (identity,)).fetchall())
            assert (settings["task"], settings["train.epochs"]) == (name, "2")
    base.close()


@pytest.mark.slow
def test_wandb_writes_a_folder_for_each_training_and_sends_nothing(tracked: api.DistillResult) -> None:
    folders = sorted((tracked.folder / "tracking/wandb").glob("offline-run-*"))
    assert len(folders) == len(MODELS)
    for folder in folders:
        (file,) = folder.glob("run-*.wandb")
        data = file.read_bytes()
        assert b"val_accuracy" in data
        assert any(name.encode() in data for name in MODELS)


@pytest.mark.slow
def test_trackers_write_nowhere_else(tracked: api.DistillResult) -> None:
    below = {path.name for path in tracked.folder.parent.iterdir()}
    assert below == {"run"}
    assert {path.name for path in (tracked.folder / "tracking").iterdir()} <= {
        *(".lock", "tensorboard", "mlflow", "mlflow.db", "mlflow.db-shm", "mlflow.db-wal", "wandb")
    }
