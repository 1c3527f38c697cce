"""Whole sweeps on tiny data: what is trained, what is chosen, what is tested, and what a second start finds done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import small_runs
from small_runs import SEEDS, digest, photos, snapshot, tiny
from sweep_runs import GRID, Watched, _quick, cell, figures, swept, table
from understudy import api
from understudy.errors import Interrupted, RunError, UnderstudyError
from understudy.sweep import executors
from understudy.sweep.trials import Trial

__all__ = ["_quick", "photos"]  # fixtures

TEST_IMAGES = 2 * small_runs.COUNTS["test"]


@pytest.fixture(scope="module")
def watched(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[api.DistillResult, Watched]]:
    with pytest.MonkeyPatch.context() as patch:
        small_runs.without_export(patch)
        seen = Watched(patch)
        yield swept(photos, tmp_path_factory.mktemp("runs") / "sweep"), seen


@pytest.fixture(scope="module")
def finished(watched: tuple[api.DistillResult, Watched]) -> api.DistillResult:
    return watched[0]


@pytest.fixture
def copied(finished: api.DistillResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def trials(folder: Path) -> dict[str, Any]:
    return {name: seen for name, seen in snapshot(folder / "cells").items() if "checkpoint" not in name}


# --- what is trained ---


def test_every_distinct_student_is_trained_once(watched: tuple[api.DistillResult, Watched]) -> None:
    result, seen = watched
    names = seen.trained
    assert names[0] == "teacher"
    assert len(names) == len(set(names)) == 1 + len(SEEDS) * (1 + 2)  # alone, and alpha 0.5 at two temperatures
    assert table(result).trainings == len(names) - 1


def test_alpha_0_is_the_student_alone_at_every_temperature(finished: api.DistillResult) -> None:
    sweep = table(finished)
    alone = [one for one in sweep.cells if one.kd_weight == 0]
    assert [one.temperature for one in alone] == [1, 4]
    assert alone[0].key == alone[1].key == sweep.alone
    for seed in SEEDS:
        baseline = finished.record.models[f"baseline-{seed}"]
        assert baseline.val is not None
        assert alone[0].accuracy[str(seed)] == pytest.approx(baseline.val.accuracy)
        assert list(baseline.epochs[0].parts) == ["ce"]


def test_cells_differ_in_what_they_say_and_in_nothing_else(finished: api.DistillResult) -> None:
    found = {}
    for path in finished.folder.glob("cells/*/student-0/trial.json"):
        outcome = json.loads(path.read_text())
        found[outcome["key"]] = outcome["trained"]
    assert len(found) == 2
    assert len({one["initial"] for one in found.values()}) == 1  # the same initial weights
    assert len({one["weights_hash"] for one in found.values()}) == 2
    assert {one["initial"] for one in found.values()} == {finished.record.models["baseline-0"].initial}


# --- what is chosen ---


def test_the_best_cell_on_validation_is_chosen(finished: api.DistillResult) -> None:
    sweep = table(finished)
    scores = {
        one.key: (np.mean(list(one.accuracy.values())), -np.mean(list(one.nll.values())))
        for one in sweep.cells
        if one.kd_weight
    }
    assert sweep.chosen == max(scores, key=lambda key: scores[key])


def test_the_figures_are_those_of_the_trials(finished: api.DistillResult) -> None:
    sweep = table(finished)
    for one in sweep.cells:
        role = "student" if one.kd_weight else "baseline"
        for seed in SEEDS:
            outcome = json.loads((finished.folder / "cells" / one.key / f"{role}-{seed}" / "trial.json").read_text())
            assert one.accuracy[str(seed)] == outcome["accuracy"]
            best = max(row["val_accuracy"] for row in outcome["trained"]["epochs"])
            assert outcome["accuracy"] == best


def test_the_chosen_students_are_the_run_s(finished: api.DistillResult) -> None:
    sweep = table(finished)
    for seed in SEEDS:
        for role, key in (("student", sweep.chosen), ("baseline", sweep.alone)):
            mine = finished.folder / f"{role}-{seed}" / "model.safetensors"
            theirs = finished.folder / "cells" / str(key) / f"{role}-{seed}" / "model.safetensors"
            assert digest(mine) == digest(theirs) == finished.record.models[f"{role}-{seed}"].weights_hash
    objective, chosen = finished.record.objective, cell(sweep, sweep.chosen)
    assert objective is not None
    assert (objective.kd_weight, objective.temperature) == (chosen.kd_weight, chosen.temperature)
    assert objective.effective_kd_weight == chosen.kd_weight * chosen.temperature**2


def test_only_the_chosen_cell_is_tested_and_last(watched: tuple[api.DistillResult, Watched]) -> None:
    result, seen = watched
    with np.load(result.folder / "predictions.npz") as file:
        tested = {name.removeprefix("test/") for name in file if name.startswith("test/")}
    expected = {"teacher", *(f"{role}-{seed}" for role in ("baseline", "student") for seed in SEEDS)}
    assert tested == expected == set(result.record.models)
    assert seen.seen.count(TEST_IMAGES) == len(expected)
    after = seen.seen[seen.seen.index(TEST_IMAGES) :]
    assert set(after[: len(expected)]) == {TEST_IMAGES}  # all choices were made before the first one was looked at


def test_the_verdict_is_that_of_the_chosen_cell(finished: api.DistillResult) -> None:
    tests = {name: model.test for name, model in finished.record.models.items()}
    gains = [tests[f"student-{seed}"].accuracy - tests[f"baseline-{seed}"].accuracy for seed in SEEDS]  # type: ignore[union-attr]
    assert finished.verdict.gain.value == pytest.approx(np.mean(gains))


# --- a second start ---


def test_a_second_start_does_nothing(copied: Path, photos: Path) -> None:
    before = snapshot(copied)
    with pytest.MonkeyPatch.context() as patch:
        seen = Watched(patch)
        again = swept(photos, copied)
    assert not seen.trained
    assert TEST_IMAGES not in seen.seen
    assert {name: was for name, was in before.items() if "/" in name} == {
        name: now for name, now in snapshot(copied).items() if "/" in name
    }
    assert again.record.status == "done"


def test_other_workers_are_no_other_sweep(copied: Path, photos: Path) -> None:
    assert swept(photos, copied, sweep={**GRID, "workers": 2}).record.status == "done"
    with pytest.raises(RunError, match="another run"):
        swept(photos, copied, sweep={**GRID, "temperature": [1, 5]})


def test_a_stopped_sweep_goes_on_where_it_was(photos: Path, finished: api.DistillResult, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += len(list(folder.glob("cells/*/*/trial.json"))) >= 3
        return asked == 5  # in the middle of the fourth

    with pytest.raises(Interrupted):
        api.run(tiny(photos, sweep=GRID), folder, stop=stop)
    done = trials(folder)
    assert len([name for name in done if name.endswith("trial.json")]) == 3
    (checkpoint,) = folder.glob("cells/*/*/checkpoint-*")
    done.pop(f"{checkpoint.parent.relative_to(folder / 'cells')}/metrics.jsonl", None)  # which grows
    with pytest.MonkeyPatch.context() as patch:
        seen = Watched(patch)
        result = api.resume(folder)
    assert len(seen.trained) == 3
    assert str(checkpoint.parent.relative_to(folder)) == seen.trained[0]
    after = trials(folder)
    assert {name: after[name] for name in done} == done
    assert figures(table(result)) == figures(table(finished))
    assert small_runs.weights(folder) == small_runs.weights(finished.folder)


def test_a_trial_whose_weights_are_lost_is_trained_again(copied: Path, finished: api.DistillResult) -> None:
    key = str(table(finished).chosen)
    (copied / "cells" / key / "student-1" / "model.safetensors").unlink()
    (copied / "student-1" / "model.safetensors").unlink()
    with pytest.MonkeyPatch.context() as patch:
        seen = Watched(patch)
        result = api.resume(copied)
    assert seen.trained == [f"cells/{key}/student-1"]
    assert small_runs.weights(copied) == small_runs.weights(finished.folder)
    assert result.record.verdict == finished.record.verdict


def test_a_damaged_trial_is_trained_again(photos: Path, copied: Path, finished: api.DistillResult) -> None:
    path = copied / "cells" / str(table(finished).chosen) / "student-0" / "trial.json"
    path.write_text(path.read_text()[:50])
    (copied / "student-0" / "model.json").unlink()
    result = swept(photos, copied)
    assert json.loads(path.read_text())["seed"] == 0
    assert figures(table(result)) == figures(table(finished))


# --- in other processes ---


@pytest.mark.slow
def test_processes_give_the_same_table_and_the_same_weights(
    photos: Path, finished: api.DistillResult, tmp_path: Path
) -> None:
    result = swept(photos, tmp_path / "run", sweep={**GRID, "workers": 2})
    assert table(result).executor == "2 processes"
    assert figures(table(result)) == figures(table(finished))
    assert small_runs.weights(result.folder) == small_runs.weights(finished.folder)


@pytest.mark.slow
def test_a_mistake_in_another_process_is_said_as_here(finished: api.DistillResult, tmp_path: Path) -> None:
    """A machine of a cluster that does not see the run folder is in the same place."""
    trial = Trial(folder=tmp_path / "gone", record=finished.record, key="kd", role="student", seed=0, inputs="")
    crew = executors.LocalProcesses(1, threads=1, stop=lambda: False, tell=print, log=tmp_path / "log.txt")
    with crew, pytest.raises(UnderstudyError, match=r"does not see .*gone\. A sweep on several machines needs"):
        list(crew.run([trial]))


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_and_goes_on(
    photos: Path, finished: api.DistillResult, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    over = {"sweep": {**GRID, "workers": 2}, "checkpoint_seconds": 0.0}
    words = small_runs.words(photos, **over)
    command = [sys.executable, "-m", "understudy.cli", "sweep", *words, "--out", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        while not list(folder.glob("cells/*/*/trial.json")):
            assert parent.poll() is None
            time.sleep(0.02)
        workers = psutil.Process(parent.pid).children(recursive=True)
        os.kill(parent.pid, signal.SIGKILL)
    assert len(workers) == 2
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert len(gone) == 2
    assert not alive
    done = {
        name: was for name, was in trials(folder).items() if (folder / "cells" / name).with_name("trial.json").exists()
    }
    assert done
    result = api.resume(folder)
    after = trials(folder)
    assert {name: after[name] for name in done} == done
    assert figures(table(result)) == figures(table(finished))
    assert small_runs.weights(folder) == small_runs.weights(finished.folder)


@pytest.mark.slow
def test_ray_gives_the_same_table_and_the_same_weights(
    photos: Path, finished: api.DistillResult, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    result = swept(photos, tmp_path / "run", sweep={"alpha": [0, 0.5], "temperature": [1, 4], "ray": "local"})
    assert table(result).executor == "Ray (local)"
    assert figures(table(result)) == figures(table(finished))
    assert small_runs.weights(result.folder) == small_runs.weights(finished.folder)
