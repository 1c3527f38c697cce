"""Whole runs by their teachers: trained alone, taken as they are, refused, forced, and functions of the user's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import small_runs
from finished_run import MODELS, finished, no_export, photos
from small_runs import STAGES, stripes, tiny, weights, work_done
from understudy import api
from understudy import record as records
from understudy.errors import ConfigError, ModelError, RunError
from understudy.models import build, files
from understudy.models.classifier import Classifier

__all__ = ["finished", "no_export", "photos"]  # fixtures

# --- the teacher ---


def test_a_teacher_alone(photos: Path, finished: api.DistillResult, tmp_path: Path) -> None:
    result = api.run(tiny(photos), tmp_path / "run", kind="train")
    record = result.record
    assert (record.kind, record.status) == ("train", "done")
    assert list(record.stages) == ["teacher", "gate", "evaluate"]
    assert weights(result.folder) == {"teacher": weights(finished.folder)["teacher"]}
    assert list(record.summary) == ["teacher"]
    assert (record.verdict, record.chosen, record.exports, record.objective) == (None, None, [], None)
    assert record.models["teacher"].test == finished.record.models["teacher"].test
    assert result.report.is_file()
    with pytest.raises(RunError, match="no verdict"):
        _ = result.verdict
    with pytest.raises(ModelError, match="no student"):
        _ = result.student


@pytest.mark.parametrize("form", ["run folder", "weights file"])
@pytest.mark.usefixtures("no_export")
def test_a_trained_teacher_is_taken_as_it_is(
    form: str, photos: Path, finished: api.DistillResult, tmp_path: Path
) -> None:
    given = finished.folder if form == "run folder" else finished.folder / "teacher/model.safetensors"
    result = small_runs.distilled(photos, tmp_path / "run", teacher={"model": str(given)})
    teacher = result.record.models["teacher"]
    assert (teacher.epochs, teacher.best_epoch, teacher.seconds) == ([], None, 0)
    assert weights(result.folder) == weights(finished.folder)
    checks = {finding.check: finding.ok for finding in result.record.gate}
    assert checks.keys() >= {"classes", "chance", "head", "baseline"}
    assert checks["classes"]
    assert checks["chance"]
    assert list(result.record.stages) == STAGES


def _teacher_file(path: Path, classes: tuple[str, ...], finished: api.DistillResult) -> Path:
    """A trained network under other names of its classes; where there are more, it has another head."""
    model, card = files.load(finished.folder, prefer="teacher")
    net = model.net
    if len(classes) != 2:
        net = build.build("mnist_small", classes=classes, spec=card.input, seed=0).net
    other = Classifier(net, architecture="mnist_small", classes=classes, spec=card.input, network_channels=1)
    files.save(other, path, role="teacher")
    return path


def test_a_teacher_with_its_classes_in_another_order_is_refused(
    photos: Path, finished: api.DistillResult, tmp_path: Path
) -> None:
    path = _teacher_file(tmp_path / "teacher.safetensors", ("dog", "cat"), finished)
    with pytest.raises(ModelError, match="--force") as caught:
        small_runs.distilled(photos, tmp_path / "run", teacher={"model": str(path)})
    assert "dog" in str(caught.value)
    assert records.load(tmp_path / "run").failure == str(caught.value)
    assert not weights(tmp_path / "run").keys() - {"teacher"}  # no student was trained


@pytest.mark.usefixtures("no_export")
def test_force_goes_on_with_a_teacher_that_was_refused(
    photos: Path, finished: api.DistillResult, tmp_path: Path
) -> None:
    path = _teacher_file(tmp_path / "teacher.safetensors", ("dog", "cat"), finished)
    result = small_runs.distilled(photos, tmp_path / "run", teacher={"model": str(path)}, force=True)
    assert result.record.status == "done"
    refused = [finding for finding in result.record.gate if not finding.ok and finding.severity == "refuse"]
    assert "classes" in {finding.check for finding in refused}


@pytest.mark.usefixtures("no_export")
def test_force_goes_on_in_the_folder_where_the_gate_refused(
    photos: Path, finished: api.DistillResult, tmp_path: Path
) -> None:
    """The sentence of the refusal says to use --force: what was done until then is not done again."""
    labels = np.arange(40) % 2  # a teacher that knows nothing: trained on labels drawn by lot
    source = stripes(tmp_path / "photos", seed=3)
    folders = [source / split / name for split in ("train",) for name in ("cat", "dog")]
    for number, label in enumerate(labels):
        if label:
            one, two = (folder / f"{number:03d}.png" for folder in folders)
            spare = one.with_suffix(".spare")
            os.rename(one, spare)
            os.rename(two, one)
            os.rename(spare, two)
    with pytest.raises(ModelError, match="--force"):
        small_runs.distilled(source, tmp_path / "run")
    before = records.load(tmp_path / "run")
    assert list(before.stages) == ["teacher", "gate"]
    result = small_runs.distilled(source, tmp_path / "run", force=True)
    assert result.record.status == "done"
    assert work_done(result.record)["teacher"] == work_done(before)["teacher"]


def test_a_teacher_with_another_number_of_classes_is_refused_even_by_force(
    photos: Path, finished: api.DistillResult, tmp_path: Path
) -> None:
    path = _teacher_file(tmp_path / "teacher.safetensors", ("cat", "dog", "owl"), finished)
    for force in (False, True):
        with pytest.raises(ModelError, match="3"):
            small_runs.distilled(photos, tmp_path / f"run-{force}", teacher={"model": str(path)}, force=force)
        assert records.load(tmp_path / f"run-{force}").status == "failed"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's, in the current folder."""
    (tmp_path / "striped_teachers.py").write_text(
        "from torch import nn\n"
        "def fresh(num_classes, channels, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size ** 2, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "striped_teachers"
    import sys

    sys.modules.pop("striped_teachers", None)


def test_a_ready_teacher_that_was_never_trained_is_refused(photos: Path, module: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--force"):
        small_runs.distilled(photos, tmp_path / "run", teacher={"model": f"{module}:fresh", "ready": True})
    record = records.load(tmp_path / "run")
    assert list(record.stages) == ["teacher", "gate"]
    assert any(not finding.ok and finding.severity == "refuse" for finding in record.gate)
    assert record.models["teacher"].epochs == []


@pytest.mark.usefixtures("no_export")
def test_a_function_that_is_not_ready_is_trained(photos: Path, module: str, tmp_path: Path) -> None:
    teacher = {"model": f"{module}:fresh", "epochs": 8}
    record = small_runs.distilled(photos, tmp_path / "run", teacher=teacher).record
    assert len(record.models["teacher"].epochs) == 8
    assert record.models["teacher"].architecture == f"{module}:fresh"
    assert record.status == "done"


@pytest.mark.slow
def test_a_teacher_of_another_input_size_keeps_it(tmp_path: Path) -> None:
    """The teacher sees 16 px, the student 8; both are judged on the same images."""
    source = stripes(tmp_path / "photos", side=20)
    taught = api.run(tiny(source, data={"image_size": 16}), tmp_path / "teacher", kind="train")
    over = {"data": {"image_size": 8}, "teacher": {"model": str(taught.folder)}}
    result = small_runs.distilled(source, tmp_path / "run", **over)
    assert result.record.data is not None
    assert (result.record.data.frame, result.record.data.image_size) == (18, 8)
    sizes = {}
    for name in MODELS:
        sizes[name] = files.read_card(result.folder / name / "model.safetensors").input.size
    assert sizes == {name: 16 if name == "teacher" else 8 for name in MODELS}
    assert result.record.models["teacher"].test == taught.record.models["teacher"].test
    assert result.record.exports[0].on_frames.agreement == 1


def test_an_unknown_method_is_refused_before_anything_is_trained(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kd"):
        small_runs.distilled(photos, tmp_path / "run", distill={"method": "kdd"})
    assert weights(tmp_path / "run") == {}
