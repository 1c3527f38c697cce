"""A teacher that learned from the very images that are to judge it: counted, said, and known of its copies as well."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from small_runs import distilled, stripes, tiny, without_export
from understudy import api
from understudy.errors import ConfigError, RunError
from understudy.pipeline import exportable, seen
from understudy.pipeline.folder import Run

SHARED = 5
"""Test images of the one folder that are training images of the other, by other names."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which a teacher was trained alone, on images of its own."""
    folder = tmp_path_factory.mktemp("teacher")
    return api.run(tiny(stripes(folder / "own")), folder / "run", kind="train").folder


@pytest.fixture(scope="module")
def others(teacher: Path) -> Path:
    """Other images, of which some that are to judge are the teacher's."""
    root = stripes(teacher.parent / "others", seed=1)
    for number in range(SHARED):
        shutil.copyfile(teacher.parent / f"own/train/cat/{number:03d}.png", root / f"test/cat/{number:03d}.png")
    shutil.copyfile(teacher.parent / "own/train/dog/000.png", root / "val/dog/000.png")
    return root


def said(result: api.DistillResult) -> list[str]:
    return [finding.text for finding in result.record.gate if finding.check == "seen"]


def test_images_that_a_teacher_learned_from_are_counted(
    teacher: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_export(monkeypatch)
    result = distilled(others, tmp_path / "run", teacher={"model": str(teacher)}, seeds=[0])
    [text] = said(result)
    assert text.startswith(
        f"The teacher learned from 1 of the 50 validation images and {SHARED} of the 40 test images:"
    )
    assert not next(finding for finding in result.record.gate if finding.check == "seen").ok
    copied = tmp_path / "run" / "teacher" / "model.safetensors"  # which knows it of the first one
    again = distilled(others, tmp_path / "again", teacher={"model": str(copied)}, seeds=[0])
    assert said(again) == [text]


def test_nothing_is_said_of_images_of_ones_own(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_export(monkeypatch)
    result = distilled(teacher.parent / "own", tmp_path / "run", teacher={"model": str(teacher)}, seeds=[0])
    assert said(result) == []
    learned = np.load(teacher / "teacher" / seen.FILE)
    assert len(learned) == len(set(learned)) == 80


def test_nothing_is_said_where_nothing_is_known(
    teacher: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_export(monkeypatch)
    for name in ("model.safetensors", "model.json"):
        shutil.copyfile(teacher / "teacher" / name, tmp_path / name)
    given = {"model": str(tmp_path / "model.safetensors")}
    assert said(distilled(others, tmp_path / "run", teacher=given, seeds=[0])) == []
    (tmp_path / seen.FILE).write_bytes(b"damaged")
    assert said(distilled(others, tmp_path / "other", teacher=given, seeds=[0])) == []


def test_a_new_network_is_not_ready_to_teach(others: Path, tmp_path: Path) -> None:
    ready = {"model": "mnist_small", "ready": True}
    with pytest.raises(ConfigError, match=r"A new mnist_small has learned nothing.*leave --teacher-ready out"):
        api.run(tiny(others, teacher=ready), tmp_path / "run")


def test_a_run_with_a_teacher_alone_says_so_to_who_wants_its_student(teacher: Path) -> None:
    told = "trained a teacher alone, so it holds no student. Let it teach one: understudy distill DATA --teacher"
    with Run.opened(teacher, None) as run, pytest.raises(RunError, match=told):
        exportable.find(run, "student")
    with pytest.raises(RunError, match=told):
        api.compress(teacher)


def test_what_was_known_of_another_model_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / seen.FILE).write_bytes(b"of another model")
    seen.take_over(tmp_path / "elsewhere" / "model.safetensors", tmp_path)
    assert list(tmp_path.iterdir()) == []
