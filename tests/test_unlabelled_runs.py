"""Whole runs with images without a label: who sees them, what is recorded, and what they do not go with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from small_runs import distilled, snapshot, stripes, tiny, without_export
from understudy import answer, api
from understudy import record as records
from understudy.errors import ConfigError

FREE = 24
"""Images without a label beside the tiny run's 80 with one."""


# ------------------------------------------------------------------------------------------------ whole runs


def with_free(root: Path) -> Path:
    """Return the tiny run's folder with some of its kind beside, of no known class."""
    stripes(root)
    stripes(root / "other", seed=1)
    (root / "unlabelled").mkdir()
    for number, path in enumerate(sorted((root / "other" / "train").rglob("*.png"))[:: 80 // FREE][:FREE]):
        path.rename(root / "unlabelled" / f"{number:03d}.png")
    for path in sorted((root / "other").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (root / "other").rmdir()
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return with_free(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_export(monkeypatch):
    without_export(monkeypatch)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        without_export(patch)
        distilled(data, folder, distill={"pseudo_labels": 0.6}, seeds=[0])
    return folder


def test_run_learns_from_them(run):
    record = records.load(run)
    assert record.status == "done"
    assert record.data is not None
    assert (sum(record.data.counts["train"].values()), record.data.unlabelled) == (80, FREE)
    assert f"Training images without a label, seen by models only that are taught: {FREE}." in record.data.notes
    assert record.data.notes[-1] == (
        "The student alone, and a teacher trained here, learn from the 80 labelled training images only, in as many "
        "optimiser steps as the distilled student takes through all 104."
    )
    assert record.outputs is not None
    assert record.outputs.images == 80 + FREE
    assert record.outputs.computed == 2 * (80 + FREE)
    told = re.search(r"at least 0\.6 sure of (\d+) of 24 images without a label", (run / "log.txt").read_text())
    assert told
    assert 0 < int(told[1]) <= FREE


def test_finished_run_is_not_done_again(run):
    before = snapshot(run)
    api.resume(run)
    after = snapshot(run)
    models = [name for name in before if name.endswith(".safetensors")]
    assert models
    assert {name: after[name] for name in models} == {name: before[name] for name in models}


def _steps(monkeypatch, source: Path, folder: Path, **over: object) -> dict[str, tuple[int, int]]:
    """Return steps and images of every training of a run."""
    from understudy.pipeline import trainings

    seen = {}

    class Watched(trainings.Training):
        def run(self):
            seen[self.task] = (self.total_steps, len(self.data.split))
            return super().run()

    monkeypatch.setattr(trainings, "Training", Watched)
    distilled(source, folder, seeds=[0], **over)
    return seen


def test_all_trainings_take_as_many_steps(monkeypatch, data, tmp_path):
    found = _steps(monkeypatch, data, tmp_path)
    assert found == {"teacher": (3 * 7, 80), "baseline-0": (2 * 7, 80), "student-0": (2 * 7, 104)}


def test_left_out_they_change_no_weights(monkeypatch, data, tmp_path):
    plain = distilled(stripes(tmp_path / "plain"), tmp_path / "a", seeds=[0]).record
    left = distilled(data, tmp_path / "b", seeds=[0], data={"drop_unlabelled": True}).record
    assert plain.data is not None
    assert left.data is not None
    assert plain.data.fingerprint == left.data.fingerprint
    for name, model in plain.models.items():
        assert left.models[name].weights_hash == model.weights_hash


def test_share_of_labels_in_a_run(monkeypatch, tmp_path):
    folder = stripes(tmp_path / "data")
    found = _steps(monkeypatch, folder, tmp_path / "run", data={"label_share": 0.1})
    assert found == {"teacher": (3 * 5, 8), "baseline-0": (2 * 5, 8), "student-0": (2 * 5, 80)}
    record = records.load(tmp_path / "run")
    assert record.data is not None
    assert record.data.counts["train"] == {"cat": 4, "dog": 4}


def test_a_teacher_trained_alone_never_sees_them(data, tmp_path):
    record = api.run(tiny(data), tmp_path / "run", kind="train").record
    assert record.data is not None
    assert record.data.notes == ["Images without a label were left out: 24."]


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({"distill": {"method": "dkd"}}, r"term 'dkd' takes the class of each image"),
        ({"train": {"mix": "mixup"}}, r"--mix mixup mixes labels, and some training images have none"),
        ({"sweep": {"method": ["kd", "nkd"]}}, r"takes the class of each image"),
    ],
)
def test_what_they_do_not_go_with_is_refused_before_anything_long(data, tmp_path, over, sentence):
    config = tiny(data, **over)
    with pytest.raises(ConfigError, match=sentence):
        api.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "teacher" / "model.safetensors").exists()


def test_evaluation_passes_over_them(run, data):
    found = answer.evaluate(run, str(data), split="all")
    assert found.metrics.images == 80 + 50 + 40


def test_forecast_counts_them(data, tmp_path):
    found = api.dry_run(tiny(data), tmp_path / "run")
    assert found.as_dict()["images"]["unlabelled"] == {"none": FREE}
    assert f"  unlabelled{FREE:>9}  none {FREE}" in found.text()
    assert f"80 train, 50 val, 40 test, {FREE} unlabelled images" in found.text()


def test_assistant_sees_them(monkeypatch, data, tmp_path):
    found = _steps(monkeypatch, data, tmp_path, distill={"assistants": ["mnist_small"]})
    assert found["assistant-1"] == found["student-0"] == (2 * 7, 104)


def test_trials_of_a_sweep_see_what_their_role_sees(monkeypatch, data, tmp_path):
    sweep = {"alpha": [0.0, 0.5], "temperature": [2.0], "stacked": "never", "workers": 1}
    found = _steps(monkeypatch, data, tmp_path, sweep=sweep)
    trials = {task.rsplit("/", 1)[-1]: what for task, what in found.items() if task.startswith("cells/")}
    assert trials == {"baseline-0": (2 * 7, 80), "student-0": (2 * 7, 104)}
