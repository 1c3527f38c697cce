"""The cost model against sums done by hand; the plan and the dry run against what lies on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small_runs
from understudy import api, cli, config, costs, storage
from understudy.costs import Constants, Devices, Job, Network
from understudy.data.store import open_store
from understudy.errors import ConfigError
from understudy.numerics import Choice, Numerics
from understudy.pipeline import Plan, forecasting, measuring

TEACHER = Network(step=0.010, answer=0.003, judge=0.002, weight_bytes=1000, memory_bytes=5_000_000)
STUDENT = Network(step=0.001, answer=0.0005, judge=0.0002, weight_bytes=100, memory_bytes=4_000_000)
CONSTANTS = Constants(TEACHER, STUDENT, list=0.1, decode=0.2, pack=0.001, start=7.0, profile=11.0, export=13.0)
JOB = Job(
    train=128, val=20, test=30, frame_bytes=64, row_bytes=20, epochs=5, views=4, seeds=3, batch=64, teacher_epochs=2
)


def seconds(job: Job = JOB, constants: Constants = CONSTANTS, devices: Devices | None = None) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in costs.predict(job, constants, devices).stages}


def test_the_stages_add_up_to_sums_done_by_hand() -> None:
    assert seconds() == pytest.approx(
        {
            "data": 7 + 178 * (0.1 + 0.2),
            "teacher": 2 * (128 * 0.010 + 20 * 0.002) + 20 * 0.002,
            "outputs": 4 * 128 * (0.003 + 0.001),
            "baseline": 3 * 5 * (128 * 0.001 + 20 * 0.0002),
            "student": 3 * 5 * (128 * 0.001 + 20 * 0.0002),
            "evaluate": 11 + 50 * (0.002 + 6 * 0.0002),
            "export": 13,
        }
    )
    assert costs.predict(JOB, CONSTANTS).seconds == pytest.approx(sum(seconds().values()))


def test_disk_is_frames_answers_and_weights() -> None:
    predicted = costs.predict(JOB, CONSTANTS)
    assert {stage.name: stage.disk_bytes for stage in predicted.stages} == {
        "data": 178 * 64,
        "teacher": 1000,
        "outputs": 4 * 128 * 20,
        "baseline": 300,
        "student": 300,
        "evaluate": 0,
        "export": 100,
    }
    assert predicted.disk_bytes == sum(stage.disk_bytes for stage in predicted.stages)


def test_what_is_kept_costs_nothing_more() -> None:
    kept = costs.predict(replace(JOB, to_list=0, to_decode=0, to_answer=0), CONSTANTS)
    assert kept["data"].seconds == CONSTANTS.start
    assert (kept["data"].disk_bytes, kept["outputs"].seconds, kept["outputs"].disk_bytes) == (0, 0, 0)


def test_a_teacher_that_runs_along_answers_every_image_in_every_epoch_of_every_seed() -> None:
    online = costs.predict(replace(JOB, views=None), CONSTANTS)
    assert online["outputs"].seconds == pytest.approx(128 * 5 * 3 * 0.003)
    assert online["outputs"].disk_bytes == 0


def test_frames_that_are_not_stored_are_decoded_in_every_epoch() -> None:
    streamed, stored = costs.predict(replace(JOB, stored=False), CONSTANTS), costs.predict(JOB, CONSTANTS)
    more = 5 * (128 + 20) * CONSTANTS.decode
    assert streamed["baseline"].seconds - stored["baseline"].seconds == pytest.approx(3 * more)
    assert streamed["data"].disk_bytes == 0


def test_devices_divide_answers_and_batches_and_exchange_gradients() -> None:
    alone, four = seconds(), seconds(devices=Devices(4, bytes_per_second=1000.0))
    assert four["outputs"] == pytest.approx(alone["outputs"] / 4)
    exchanged = 2 * 2 * (2 * 3 / 4 * 1000 / 1000)  # epochs x steps x two rounds of three quarters of the gradients
    assert four["teacher"] == pytest.approx(2 * (128 * 0.010 / 4 + 20 * 0.002) + exchanged + 20 * 0.002)
    assert all(four[name] == alone[name] for name in ("data", "evaluate", "export"))
    assert Devices(1).exchange(10**9) == 0


def test_a_device_needs_two_images_of_a_batch() -> None:
    costs.predict(JOB, CONSTANTS, Devices(32))
    with pytest.raises(ConfigError, match="33 devices need batches of at least 66 images"):
        costs.predict(JOB, CONSTANTS, Devices(33))


def test_rows_are_read_from_the_file_only_where_a_view_is_too_large_for_the_memory() -> None:
    slow = replace(CONSTANTS, read=1.0)
    assert seconds(JOB, slow) == seconds()
    large = replace(JOB, row_bytes=costs.IN_MEMORY // 128 + 1)
    assert seconds(large, slow)["student"] - seconds(large)["student"] == pytest.approx(3 * 5 * 128 * 1.0)
    assert seconds(large, slow)["baseline"] == seconds()["baseline"]


def test_every_epoch_costs_something_beside_its_images() -> None:
    slow = replace(CONSTANTS, student=replace(STUDENT, epoch=0.25))
    assert seconds(JOB, slow)["baseline"] - seconds()["baseline"] == pytest.approx(3 * 5 * 0.25)


def test_checkpoints_take_their_share_of_a_training() -> None:
    writing = replace(CONSTANTS, write_byte=0.001)
    written = 4 * 1000 * 0.001
    trained = 2 * (128 * 0.010 + 20 * 0.002)
    assert seconds(JOB, writing)["teacher"] == pytest.approx(trained * (1 + written / 30) + written + 20 * 0.002)


def test_memory_grows_by_what_was_measured_for_each_image() -> None:
    measured = replace(CONSTANTS, base_bytes=10**6, listed_bytes=100, drawn_bytes=10)
    predicted = costs.predict(JOB, measured)
    assert predicted["data"].memory_bytes == 10**6 + 178 * 100 + 128 * 10
    assert predicted.memory_bytes == 5_000_000 + 178 * 100 + 128 * 10
    assert predicted["student"].memory_bytes - predicted["baseline"].memory_bytes == 128 * 20


def test_the_model_needs_no_torch() -> None:
    script = "import sys, understudy.costs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# --- plan and dry run ---


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "_measure", lambda bench: CONSTANTS)
    folder = small_runs.stripes(tmp_path / "photos")
    for path in folder.rglob("*.png"):  # a file that was changed a moment ago is never taken for known
        os.utime(path, (1e9, 1e9))
    return folder


def dry(photos: Path, folder: Path, **over: Any) -> forecasting.Forecast:
    return api.dry_run(small_runs.tiny(photos, **over), folder)


def steps(plan: Plan) -> dict[str, Any]:
    return {step.stage: step for step in plan.steps}


def test_a_dry_run_counts_the_images_and_leaves_no_run_folder(photos: Path, tmp_path: Path) -> None:
    found = dry(photos, tmp_path / "run")
    assert found.counts == {split: {"cat": count, "dog": count} for split, count in small_runs.COUNTS.items()}
    assert not (tmp_path / "run").exists()
    job = Job(80, 50, 40, 100, 4, epochs=2, views=2, seeds=2, batch=16, teacher_epochs=3, teacher_batch=16)
    by_hand = costs.predict(replace(job, to_list=0, to_decode=0), CONSTANTS)
    assert found.plan.seconds == pytest.approx(by_hand.seconds)
    assert found.disk_bytes == by_hand.disk_bytes


def test_a_dry_run_knows_what_a_run_has_done(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_runs.without_export(monkeypatch)
    small_runs.distilled(photos, tmp_path / "run")
    before = small_runs.snapshot(tmp_path / "run")
    found = steps(dry(photos, tmp_path / "run").plan)
    assert small_runs.snapshot(tmp_path / "run") == before
    assert [found[name].seconds for name in ("teacher", "outputs", "baseline", "student", "evaluate")] == [0] * 5
    assert "(done)" in found["teacher"].what
    assert "kept before" in found["outputs"].what
    other = steps(dry(photos, tmp_path / "run", seeds=[0, 1, 2]).plan)
    assert other["teacher"].seconds > 0  # another run, which that folder does not hold


def test_a_large_folder_is_judged_by_a_few_of_its_images(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasting, "_FEW", 10)
    found = dry(photos, tmp_path / "run")
    assert found.sampled == 64
    assert found.counts == {split: {"cat": count, "dog": count} for split, count in small_runs.COUNTS.items()}
    data = steps(found.plan)["data"]
    assert "170" not in data.what
    assert "to be decoded" in data.what
    assert data.disk_bytes == 170 * 100
    assert data.seconds > CONSTANTS.start
    left = [path for path in storage.cache_dir().rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert {path.parent.name for path in left} <= {"costs", "numerics"}
    open_store(small_runs.tiny(photos).data)
    known = dry(photos, tmp_path / "run")
    assert (known.sampled, steps(known.plan)["data"].seconds) == (0, CONSTANTS.start)


def test_a_sample_stands_for_all_classes_and_images_not_for_its_own(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = small_runs.stripes(tmp_path / "three", classes=("ant", "bee", "cow"))
    measured: list[tuple[int, int]] = []
    chosen: list[tuple[int, int]] = []

    def measure(bench: measuring.Bench) -> Constants:
        measured.append((bench.classes, len(bench.networks["student"]().classes)))
        return CONSTANTS

    def choose(*given: object, classes: int, steps: int, **rest: object) -> Choice:
        chosen.append((classes, steps))
        return Choice(Numerics(), 0.1)

    monkeypatch.setattr(forecasting, "_FEW", 10)
    monkeypatch.setattr(measuring, "_measure", measure)
    monkeypatch.setattr("understudy.numerics.choose", choose)
    dry(three, tmp_path / "run")
    assert measured == [(3, 3)]
    assert chosen[-2:] == [(3, 3 * 120 // 16), (3, 2 * 2 * 2 * 120 // 16)]


def test_the_figures_as_text_and_as_json(photos: Path, tmp_path: Path) -> None:
    found = dry(photos, tmp_path / "run")
    values = json.loads(json.dumps(found.as_dict()))
    assert values["total"]["seconds"] == pytest.approx(sum(stage["seconds"] for stage in values["stages"]))
    assert [stage["stage"] for stage in values["stages"]] == [step.stage for step in found.plan.steps]
    text = found.text()
    assert all(f"  {step.stage:<9} " in text for step in found.plan.steps)
    assert "cat 40, dog 40" in text


def test_the_command_prints_nothing_but_the_answer(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["distill", *small_runs.words(photos), "--out", str(tmp_path / "run"), "--dry-run", "--json"]
    monkeypatch.setattr(sys, "argv", ["understudy", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["images"]["train"] == {"cat": 40, "dog": 40}
    assert not (tmp_path / "run").exists()


def test_json_without_a_dry_run_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["distill", *small_runs.words(photos), "--out", str(tmp_path / "run"), "--json"]
    monkeypatch.setattr(sys, "argv", ["understudy", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "Error: --json prints what --dry-run finds: give both, or neither.\n"
    assert not (tmp_path / "run").exists()


def test_a_plan_leaves_out_times_below_a_second() -> None:
    plan = Plan([forecasting.Step("teacher", "trained", 89.4), forecasting.Step("export", "ONNX", 0.4)])
    assert plan.text() == "Plan\n  teacher   trained, about 89 s\n  export    ONNX\n  in all about 90 s"


# --- measuring ---


def test_the_end_of_an_epoch_is_told_apart_from_steps() -> None:
    gaps = np.full(20, 0.5)
    gaps[0] = 9.0  # the first step sets things up
    gaps[5::6] = 2.0
    assert measuring._told_apart(gaps) == (0.5, 1.5)
    assert measuring._told_apart(gaps[:5]) == (0.5, 0.0)


def test_constants_are_measured_once_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    photos = small_runs.stripes(tmp_path / "photos")
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    asked = config.validate({**small_runs.values(photos), "threads": 1})
    first = api.dry_run(asked, tmp_path / "run").plan
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    (kept,) = (tmp_path / "cache" / "costs").iterdir()
    values = json.loads(kept.read_text())
    for role in ("teacher", "student"):
        assert all(values[role][name] > 0 for name in ("step", "answer", "judge", "memory_bytes"))
    assert values["student"]["weight_bytes"] == values["teacher"]["weight_bytes"] > 0
    monkeypatch.setattr(measuring, "_measure", None)
    again = api.dry_run(asked, tmp_path / "run").plan
    assert [step.seconds for step in again.steps] == [step.seconds for step in first.steps]
