"""Runs that are called again: a second call, what was stopped or has failed, and what is not done again."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import small_runs
import understudy
from finished_run import MODELS, copied, finished, no_export, photos
from small_runs import STAGES, stop_in, stripes, tiny, weights, work_done
from understudy import api
from understudy import record as records
from understudy.errors import Interrupted, ModelError, TrainingError

__all__ = ["copied", "finished", "no_export", "photos"]  # fixtures


def interrupt(source: Path, folder: Path, name: str) -> None:
    """Start a run whose epochs tell of themselves, and stop it within the training of a model."""
    progress, stop = stop_in(name)
    with pytest.raises(Interrupted):
        api.run(tiny(source), folder, progress=progress, stop=stop)


# --- a second call ---


def test_a_second_call_does_no_work(copied: Path, photos: Path) -> None:
    before, known = small_runs.snapshot(copied), records.load(copied)
    result = api.run(tiny(photos), copied)
    after = small_runs.snapshot(copied)
    may_change = {"report.html", "record.json", "log.txt"}
    assert {name: seen for name, seen in after.items() if name not in may_change} == {
        name: seen for name, seen in before.items() if name not in may_change
    }
    assert work_done(result.record) == work_done(known)
    assert result.record.status == "done"


def test_a_second_call_leaves_what_was_measured(copied: Path) -> None:
    before = records.load(copied)
    after = api.resume(copied).record
    assert before.environment is not None
    assert after.environment is not None
    assert (after.environment.peak_memory_bytes or 0) >= (before.environment.peak_memory_bytes or 1)
    left_out: Any = {"seconds": True, "environment": {"peak_memory_bytes"}}
    assert after.model_dump(exclude=left_out) == before.model_dump(exclude=left_out)


@pytest.mark.parametrize(
    ("lost", "again"),
    [
        ("teacher/model.safetensors", {"teacher", "gate"}),
        ("baseline-0/model.safetensors", {"baseline-0"}),
        ("student-1/model.safetensors", {"student-1"}),
        ("student-1/model.json", {"student-1"}),
        ("predictions.npz", {"evaluate"}),
        pytest.param("export/student.onnx", {"export"}, marks=pytest.mark.slow),
    ],
)
def test_a_lost_file_is_made_again_and_nothing_else(
    lost: str, again: set[str], copied: Path, finished: api.DistillResult
) -> None:
    (copied / lost).unlink()
    record = api.resume(copied).record
    before, after = work_done(finished.record), work_done(record)
    assert {name for name in after if after[name] != before[name]} == again
    assert weights(copied) == weights(finished.folder)
    assert (copied / lost).is_file()
    assert record.verdict == finished.record.verdict


def test_what_a_kill_left_half_written_is_removed(copied: Path) -> None:
    """The name is that of `storage.atomic_path`; there may be gigabytes of it."""
    torn = copied / "student-0/.checkpoint-0123.safetensors.a1b2c3.tmp"
    torn.write_bytes(b"half")
    api.resume(copied)
    assert not torn.exists()


def test_damaged_weights_are_refused_with_the_file(copied: Path) -> None:
    path = copied / "student-0" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    (copied / "predictions.npz").unlink()
    with pytest.raises(ModelError, match="student-0"):
        api.resume(copied)


@pytest.mark.usefixtures("no_export")
def test_a_finished_run_stays_finished_where_its_images_are_gone(tmp_path: Path) -> None:
    """Say, on a disk that is not plugged in."""
    source = stripes(tmp_path / "photos")
    small_runs.distilled(source, tmp_path / "run")
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(understudy.UnderstudyError, match="photos"):
        api.resume(tmp_path / "run")
    assert records.load(tmp_path / "run").status == "done"
    (tmp_path / "elsewhere").rename(source)
    assert api.resume(tmp_path / "run").record.status == "done"


# --- stopped, and gone on with ---


@pytest.mark.usefixtures("no_export")
def test_a_stopped_run_says_so_and_goes_on(photos: Path, finished: api.DistillResult, tmp_path: Path) -> None:
    interrupt(photos, tmp_path / "run", "student-0")
    halfway = records.load(tmp_path / "run")
    assert (halfway.status, halfway.verdict) == ("failed", None)
    assert list(halfway.stages) == ["teacher", "gate", "baseline-0"]
    assert len(list((tmp_path / "run/student-0").glob("checkpoint-*.safetensors"))) == 1
    record = api.resume(tmp_path / "run").record
    assert (record.status, record.failure) == ("done", None)
    assert weights(tmp_path / "run") == weights(finished.folder)
    kept = work_done(halfway)
    assert {name: work_done(record)[name] for name in kept} == kept
    assert not list((tmp_path / "run").glob("*/checkpoint-*"))


def test_a_run_that_is_to_stop_begins_no_other_stage(photos: Path, finished: api.DistillResult, tmp_path: Path) -> None:
    interrupt(photos, tmp_path / "run", "evaluate test")
    record = records.load(tmp_path / "run")
    assert (record.status, list(record.stages)) == ("failed", STAGES[:-1])
    assert record.exports == []
    result = api.resume(tmp_path / "run")
    assert list(result.record.stages) == STAGES
    assert weights(result.folder) == weights(finished.folder)


def test_the_report_of_a_stopped_run_says_so(photos: Path, tmp_path: Path) -> None:
    interrupt(photos, tmp_path / "run", "baseline-0")
    page = (tmp_path / "run/report.html").read_text()
    assert records.load(tmp_path / "run").failure == "stopped before its end"
    assert "stopped before its end" in page


@pytest.mark.usefixtures("no_export")
def test_images_changed_in_between_make_the_trainings_again(tmp_path: Path) -> None:
    source = stripes(tmp_path / "photos")
    interrupt(source, tmp_path / "run", "student-0")
    before = records.load(tmp_path / "run")
    Image.fromarray(np.full((10, 10), 7, np.uint8)).save(source / "train/cat/000.png")
    record = api.resume(tmp_path / "run").record
    assert before.data is not None
    assert record.data is not None
    assert record.data.fingerprint != before.data.fingerprint
    old, new = work_done(before), work_done(record)
    assert list(record.stages) == STAGES
    assert not any(new[name] == old[name] for name in old)
    fresh = small_runs.distilled(source, tmp_path / "fresh")
    assert weights(tmp_path / "run") == weights(fresh.folder)
    assert record.verdict == fresh.verdict
    assert not list((tmp_path / "run").glob("*/checkpoint-*"))  # nor one of the images as they were


@pytest.mark.usefixtures("no_export")
def test_the_same_seeds_give_the_same_weights(photos: Path, finished: api.DistillResult, tmp_path: Path) -> None:
    again = small_runs.distilled(photos, tmp_path / "again")
    assert weights(again.folder) == weights(finished.folder)
    assert again.verdict == finished.verdict
    other = small_runs.distilled(photos, tmp_path / "other", seeds=[1, 2])
    same = {name for name, digest in weights(other.folder).items() if weights(again.folder).get(name) == digest}
    assert same == {"teacher", "baseline-1", "student-1"}  # a seed's models do not depend on the other seeds


def test_a_loss_that_is_not_a_number_ends_the_run(photos: Path, tmp_path: Path) -> None:
    """The teacher has a rate of its own, so it is finished before the students' goes wrong."""
    over = {"teacher": {"lr": 1e-2}, "train": {"lr": 1e25}}
    with pytest.raises(TrainingError, match="baseline-0") as caught:
        small_runs.distilled(photos, tmp_path / "run", **over)
    record = records.load(tmp_path / "run")
    assert (record.status, record.failure) == ("failed", str(caught.value))
    assert list(record.stages) == ["teacher", "gate"]
    with pytest.raises(TrainingError, match="baseline-0"):
        api.resume(tmp_path / "run")
    assert work_done(records.load(tmp_path / "run")) == work_done(record)


def test_the_report_of_a_failed_run_says_why(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        small_runs.distilled(photos, tmp_path / "run", train={"lr": 1e25})
    failure = records.load(tmp_path / "run").failure
    assert failure is not None
    assert html.escape(failure) in (tmp_path / "run/report.html").read_text()


@pytest.mark.usefixtures("no_export")
def test_a_run_that_failed_goes_on_once_the_cause_is_gone(
    photos: Path, finished: api.DistillResult, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        small_runs.teach_by(patch, lambda student, teacher, *, temperature: student.sum(1) * torch.nan)
        with pytest.raises(TrainingError, match="student-0"):
            small_runs.distilled(photos, tmp_path / "run")
    record = api.resume(tmp_path / "run").record
    assert (record.status, record.failure) == ("done", None)
    assert weights(tmp_path / "run") == weights(finished.folder)


@pytest.mark.usefixtures("no_export")
def test_a_run_keeps_the_numerics_it_began_with(photos: Path, finished: api.DistillResult, tmp_path: Path) -> None:
    """Another machine, or an emptied cache, may measure another choice; the weights must not change halfway."""
    interrupt(photos, tmp_path / "run", "baseline-0")
    record = records.load(tmp_path / "run")
    assert record.environment is not None
    assert set(record.environment.precision.values()) == {"fp32"}
    record.environment.precision["student"] = "bf16 channels-last"
    records.save(record, tmp_path / "run")
    after = api.resume(tmp_path / "run").record
    assert {name: model.precision for name, model in after.models.items()} == {
        name: "fp32" if name == "teacher" else "bf16 channels-last" for name in MODELS
    }
    assert weights(tmp_path / "run")["teacher"] == weights(finished.folder)["teacher"]
