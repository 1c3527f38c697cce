"""Runs with more than one teacher: ensembles, assistants between teacher and student, generations of students."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from chain_runs import ASSISTANT, TOGETHER, TWO, _quick, distilled, taught_by
from small_runs import photos, stop_in, tiny, weights, work_done
from test_ensemble import oracle
from understudy import api
from understudy import record as records
from understudy.config import RunConfig
from understudy.errors import Interrupted, ModelError
from understudy.models import files
from understudy.pipeline import Run, teaching
from understudy.pipeline.materials import gather
from understudy.record import Record
from understudy.report import terminal

__all__ = ["_quick", "photos"]  # fixtures

ANSWERS = 2 * 80  # views x training images
ASSISTED = ["teacher", "gate", "assistant-1", "baseline-0", "student-0", "evaluate", "export"]
BORN_AGAIN = ["teacher", "gate", "baseline-0", "generation-1-0", "student-0", "evaluate", "export"]


@pytest.fixture(scope="module")
def plain(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> api.DistillResult:
    return distilled(photos, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def assisted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> api.DistillResult:
    """A run with an assistant. Tests only look at it."""
    return distilled(photos, tmp_path_factory.mktemp("assisted") / "run", distill=ASSISTANT)


@pytest.fixture(scope="module")
def born_again(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> api.DistillResult:
    return distilled(photos, tmp_path_factory.mktemp("again") / "run", distill={"generations": 2})


@pytest.fixture(scope="module")
def together(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> api.DistillResult:
    """A run with two teachers, the second of which counts three times as much."""
    return distilled(photos, tmp_path_factory.mktemp("together") / "run", teacher=TWO)


# --- an assistant ---


def test_an_assistant_stands_between_teacher_and_student(assisted: api.DistillResult) -> None:
    record = assisted.record
    assert (record.status, list(record.stages)) == ("done", ASSISTED)
    assert {name: model.taught_by for name, model in record.models.items()} == {
        "teacher": "",
        "assistant-1": "teacher",
        "baseline-0": "",
        "student-0": "assistant-1",
    }
    assistant = record.models["assistant-1"]
    assert (assistant.role, assistant.architecture, assistant.seed) == ("assistant", "mnist_small", 0)
    assert list(assistant.epochs[0].parts) == ["ce", "kd"]


def test_an_assistant_is_what_the_teacher_makes_of_such_a_student(
    plain: api.DistillResult, assisted: api.DistillResult
) -> None:
    """In a run where it is the student itself: same objective, same budget, seed 0."""
    assert weights(assisted.folder)["assistant-1"] == weights(plain.folder)["student-0"]


def test_the_student_is_what_the_assistant_would_make_of_it(
    photos: Path, plain: api.DistillResult, assisted: api.DistillResult, tmp_path: Path
) -> None:
    """In a run whose teacher is the assistant's file; and not what the teacher itself makes of it."""
    found = weights(assisted.folder)["student-0"]
    assert found == taught_by(photos, tmp_path / "run", assisted.folder / "assistant-1/model.safetensors")
    assert found != weights(plain.folder)["student-0"]


def test_student_and_baseline_start_from_the_same_weights(
    assisted: api.DistillResult, born_again: api.DistillResult, plain: api.DistillResult
) -> None:
    for result in (assisted, born_again):
        models = result.record.models
        assert models["student-0"].initial == models["baseline-0"].initial
        assert weights(result.folder)["baseline-0"] == weights(plain.folder)["baseline-0"]
        assert result.verdict.per_seed.keys() == {"0"}


@pytest.mark.slow
def test_each_teacher_of_a_chain_is_asked_once_and_under_its_own_name(
    photos: Path, plain: api.DistillResult, assisted: api.DistillResult, tmp_path: Path
) -> None:
    first, kept = plain.record.outputs, assisted.record.more_outputs
    assert first is not None
    assert (list(kept), kept["assistant-1"].computed, kept["assistant-1"].images) == (["assistant-1"], ANSWERS, 80)
    again = distilled(photos, tmp_path / "run", distill={**ASSISTANT, "temperature": 5}).record
    assert again.outputs is not None
    assert again.outputs.computed == 0  # another objective, the same teacher
    assert again.more_outputs["assistant-1"].computed == ANSWERS  # which makes another assistant


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("assistant-1", marks=pytest.mark.slow),
        "baseline-0",
        pytest.param("student-0", marks=pytest.mark.slow),
    ],
)
def test_a_chain_that_was_stopped_goes_on_to_the_same_weights(
    where: str, photos: Path, assisted: api.DistillResult, tmp_path: Path
) -> None:
    progress, stop = stop_in(where)
    config = tiny(photos, seeds=[0], distill=ASSISTANT)
    with pytest.raises(Interrupted):
        api.run(config, tmp_path / "run", progress=progress, stop=stop)
    before = work_done(records.load(tmp_path / "run"))
    assert list(before) == ASSISTED[: ASSISTED.index(where)]
    after = api.resume(tmp_path / "run").record
    assert weights(tmp_path / "run") == weights(assisted.folder)
    assert {name: done for name, done in work_done(after).items() if name in before} == before


def test_a_second_call_does_nothing_again(
    photos: Path, assisted: api.DistillResult, born_again: api.DistillResult, together: api.DistillResult
) -> None:
    for result in (assisted, born_again, together):
        assert work_done(api.resume(result.folder).record) == work_done(result.record)


# --- generations ---


def test_a_generation_is_taught_by_the_one_before(
    photos: Path, plain: api.DistillResult, born_again: api.DistillResult, tmp_path: Path
) -> None:
    record, found = born_again.record, weights(born_again.folder)
    assert list(record.stages) == BORN_AGAIN
    assert [record.models[name].taught_by for name in ("generation-1-0", "student-0")] == ["teacher", "generation-1-0"]
    assert found["generation-1-0"] == weights(plain.folder)["student-0"]
    assert found["student-0"] == taught_by(
        photos, tmp_path / "run", born_again.folder / "generation-1-0/model.safetensors"
    )
    assert record.chosen == "student-0"


# --- several teachers ---


def test_every_teacher_is_trained_and_checked(plain: api.DistillResult, together: api.DistillResult) -> None:
    record = together.record
    assert list(record.stages) == TOGETHER
    assert {name: model.role for name, model in record.models.items()} == {
        "teacher-1": "member",
        "teacher-2": "member",
        "teacher": "teacher",
        "baseline-0": "baseline",
        "student-0": "student",
    }
    assert record.models["teacher"].shares == {"teacher-1": 0.25, "teacher-2": 0.75}
    assert [record.models[name].seed for name in ("teacher-1", "teacher-2")] == [5, 6]
    assert weights(together.folder)["teacher-1"] == weights(plain.folder)["teacher"]
    checks = {finding.check for finding in record.gate}
    assert checks >= {f"{check} of teacher-{number}" for check in ("classes", "head", "chance") for number in (1, 2)}


def test_the_ensemble_is_judged_by_the_slow_mean_of_its_members(together: api.DistillResult) -> None:
    with np.load(together.folder / "predictions.npz") as file:
        logits = dict(file)
    for split in ("val", "test"):
        members = [logits[f"{split}/teacher-{number}"].tolist() for number in (1, 2)]
        np.testing.assert_allclose(logits[f"{split}/teacher"], oracle(members, [1, 3]), atol=1e-5)
    models, summary = together.record.models, together.record.summary["teacher"]
    assert models["teacher"].test is not None
    assert summary.accuracy.value == pytest.approx(models["teacher"].test.accuracy)
    assert summary.profile.parameters == 2 * ((9 * 16 + 16) + (16 * 9 * 32 + 32) + (32 * 9 * 2 + 2))  # of both
    sizes = [(together.folder / f"teacher-{number}/model.safetensors").stat().st_size for number in (1, 2)]
    assert summary.profile.bytes == sum(sizes)


def test_kept_answers_of_an_ensemble_are_the_slow_mean_and_those_of_one_that_runs_along(
    together: api.DistillResult, plain: api.DistillResult
) -> None:
    run = Run(together.folder, tiny_of(together), together.record, lambda *_, **__: None, lambda: False)
    materials = gather(run)
    kept = teaching.find(run, materials)
    assert kept is not None
    found = kept.view(0).rows(torch.arange(80)).logits
    assert kept.work.images == 0
    images = torch.cat(list(materials.splits["train"].whole(80)))  # without augmentation, a view is the image
    along = teaching.running(run, materials)
    members = [files.load(together.folder / f"teacher-{number}/model.safetensors")[0] for number in (1, 2)]
    with torch.no_grad():
        expected = torch.tensor(oracle([member(images).tolist() for member in members], [1, 3]))
        torch.testing.assert_close(along(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=1e-3)  # kept as float16


def tiny_of(result: api.DistillResult) -> RunConfig:
    return RunConfig.model_validate(result.record.config)


@pytest.mark.slow
def test_answers_are_found_again_for_the_same_shares_only(
    photos: Path, together: api.DistillResult, tmp_path: Path
) -> None:
    def computed(folder: Path, second: dict[str, Any]) -> int:
        outputs = distilled(photos, folder, teacher={"also": [{"model": "mnist_small", **second}]}).record.outputs
        assert outputs is not None
        return outputs.computed

    assert computed(tmp_path / "same", {"share": 3}) == 0
    assert computed(tmp_path / "other", {"share": 2}) == ANSWERS


@pytest.mark.slow
def test_a_teacher_that_is_lost_is_made_again_and_so_is_nothing_else(
    photos: Path, together: api.DistillResult, tmp_path: Path
) -> None:
    result = distilled(photos, tmp_path / "run", teacher=TWO)
    (result.folder / "teacher-2/model.safetensors").unlink()
    after = api.resume(result.folder).record
    before, again = work_done(result.record), work_done(after)
    assert {name for name in again if again[name] != before[name]} == {"teacher-2", "gate-2"}
    assert weights(result.folder) == weights(together.folder)


# --- what does not fit together ---


def test_an_ensembles_run_is_no_teacher(photos: Path, together: api.DistillResult, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"ensemble.*teacher-1"):
        distilled(photos, tmp_path / "run", teacher={"model": str(together.folder)})


# --- the plan, the report ---


def test_what_is_done_costs_no_more(assisted: api.DistillResult, together: api.DistillResult) -> None:
    for result in (assisted, together):
        steps = api.dry_run(tiny_of(result), result.folder).plan.steps
        assert {step.stage for step in steps if step.seconds} <= {"data"}


def page_of(result: api.DistillResult) -> str:
    return result.report.read_text(encoding="utf-8")


def said(record: Record) -> str:
    told = io.StringIO()
    Console(width=80, file=told).print(terminal(record))
    return told.getvalue()


def test_the_report_says_who_taught_whom(
    plain: api.DistillResult, assisted: api.DistillResult, together: api.DistillResult
) -> None:
    assert "Who taught whom" not in page_of(plain)
    assert "Taught " not in said(plain.record)
    assert "Who taught whom" in page_of(assisted)
    assert "assistant-1" in page_of(assisted)
    assert "mnist_small taught by ensemble of 2" in page_of(together)
    assert "mean of teacher-1 (25.0 %), teacher-2 (75.0 %)" in page_of(together).replace("\xa0", " ")
    assert "→ assistant-1" in said(assisted.record)
    assert "teacher-2" in said(together.record)
    assert max(map(len, said(together.record).splitlines())) <= 80  # of a usual terminal
    assert "…" not in said(together.record)
