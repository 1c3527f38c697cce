"""The parts of a sweep without any training: grid and Optuna, a cluster without one, the progress."""

from __future__ import annotations

import math
import os
import socket
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

import small_runs
from understudy.config import SweepConfig
from understudy.errors import Interrupted, RunError, UnderstudyError
from understudy.progress import silent
from understudy.record import Record, Sweep
from understudy.sweep import cluster, search, table
from understudy.sweep.book import Book
from understudy.sweep.cells import Cell, Space, space
from understudy.sweep.trials import Outcome, QuietRun, Reply, Trial, outcome_of

SEEDS = [0, 1, 2]


# --- searches ---


class Fake:
    """An executor that trains nothing: the accuracy of a cell is a function of its alpha and of its seed."""

    def __init__(self, accuracy: Callable[[float, int], float | None]) -> None:
        self.accuracy = accuracy
        self.done: list[tuple[str, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ended: object) -> None:
        pass

    def run(self, trials: Iterable[Trial]) -> Iterator[Outcome]:
        for trial in reversed(list(trials)):  # in any order
            self.done.append((trial.key, trial.seed))
            found = self.accuracy(trial.record.config["distill"]["kd_weight"], trial.seed)
            failure = None if found is not None else "diverged"
            place = Outcome(key=trial.key, seed=trial.seed, inputs=trial.inputs, accuracy=found or 0, failure=failure)
            (trial.place).mkdir(parents=True)
            (trial.place / "trial.json").write_text(place.model_dump_json())
            (trial.place / "model.safetensors").touch()
            (trial.place / "model.json").touch()
            yield place


def a_book(folder: Path, sweep: dict[str, Any], seeds: list[int] = SEEDS) -> tuple[Book, Sweep, Space, SweepConfig]:
    given = small_runs.tiny("photos", sweep=sweep, seeds=seeds)
    record = Record(name="run", created="", config={})
    run = QuietRun(folder, given, record, silent, lambda: False)
    found = Sweep(search="grid", varied=["alpha"], seeds=seeds)

    def describe(cell: Cell, seed: int) -> Trial:
        values = cell.configure(given).model_dump(mode="json")
        own = Record(name="run", created="", config=values)
        role = "student" if cell.role == "student" else "baseline"
        return Trial(folder=folder, record=own, key=cell.key, role=role, seed=seed, inputs=cell.key)

    assert given.sweep is not None
    return Book(run, found, describe), found, space(given, given.sweep), given.sweep


def test_the_grid_trains_each_student_once_and_seed_by_seed(tmp_path: Path) -> None:
    book, sweep, cells, _ = a_book(tmp_path, {})
    fake = Fake(lambda alpha, seed: alpha / 2)
    search.by_grid(cells, book, fake)
    assert len(fake.done) == len(set(fake.done)) == 63
    assert len(sweep.cells) == 25
    assert {cell.status for cell in sweep.cells} == {"done"}
    chosen = book.best()
    assert chosen.distill.kd_weight == 1
    assert book.settle(chosen).distill.kd_weight == 0
    assert (sweep.chosen, sweep.trainings) == (chosen.key, 63)


def test_a_second_search_finds_all_done(tmp_path: Path) -> None:
    cold = Fake(lambda alpha, seed: alpha)
    first, one, cells, _ = a_book(tmp_path, {"alpha": [0, 0.5]})
    search.by_grid(cells, first, cold)
    warm = Fake(lambda alpha, seed: math.nan)
    second, two, cells, _ = a_book(tmp_path, {"alpha": [0, 0.5]})
    search.by_grid(cells, second, warm)
    assert warm.done == []
    assert one == two


def by_optuna(
    folder: Path, asked: dict[str, Any], accuracy: Callable[[float, int], float | None]
) -> tuple[Sweep, Fake]:
    pytest.importorskip("optuna")
    book, sweep, cells, how = a_book(folder, asked)
    fake = Fake(accuracy)
    search.by_optuna(cells, how, book, fake)
    return sweep, fake


TPE = {"alpha": [0.1, 1.0], "temperature": [1, 16], "trials": 20}


def near_03(alpha: float, seed: int) -> float:
    return 1 - abs(alpha - 0.3) + 0.001 * seed


def test_optuna_asks_for_cells_within_the_values_given(tmp_path: Path) -> None:
    sweep, _ = by_optuna(tmp_path, TPE, near_03)
    asked = [cell for cell in sweep.cells if cell.asked]
    assert len(asked) == 20
    assert all(0.1 <= cell.kd_weight <= 1 and 1 <= cell.temperature <= 16 for cell in asked)
    assert len({cell.kd_weight for cell in asked}) > 10


def test_bad_cells_are_stopped_after_their_first_seed(tmp_path: Path) -> None:
    sweep, fake = by_optuna(tmp_path, TPE, near_03)
    pruned = [cell for cell in sweep.cells if cell.status == "pruned"]
    done = [cell for cell in sweep.cells if cell.status == "done" and cell.kd_weight]
    assert len(pruned) >= 3
    assert all(list(cell.accuracy) == ["0"] for cell in pruned)
    assert all(list(cell.accuracy) == ["0", "1", "2"] for cell in done)
    assert len(fake.done) == len(pruned) + 3 * len(done) + 3  # and the student alone
    assert min(cell.accuracy["0"] for cell in pruned) < np.median([cell.accuracy["0"] for cell in done])
    assert table.choose(sweep.cells).status == "done"


def test_the_search_goes_where_it_is_good(tmp_path: Path) -> None:
    sweep, _ = by_optuna(tmp_path, {**TPE, "trials": 30}, near_03)
    distances = [abs(cell.kd_weight - 0.3) for cell in sweep.cells if cell.asked]
    assert np.mean(distances[-12:]) < 0.7 * np.mean(distances[:12])


def test_a_killed_search_asks_for_the_same_cells_and_repeats_none(tmp_path: Path) -> None:
    whole, _ = by_optuna(tmp_path / "whole", TPE, near_03)
    calls = 0

    def killed(alpha: float, seed: int) -> float:
        nonlocal calls
        calls += 1
        if calls > 17:
            raise KeyboardInterrupt
        return near_03(alpha, seed)

    with pytest.raises(KeyboardInterrupt):
        by_optuna(tmp_path / "killed", TPE, killed)
    again, fake = by_optuna(tmp_path / "killed", TPE, near_03)
    assert again == whole
    assert len(fake.done) == whole.trainings - 17


def test_another_seed_searches_elsewhere(tmp_path: Path) -> None:
    one, _ = by_optuna(tmp_path / "one", TPE, near_03)
    two, _ = by_optuna(tmp_path / "two", {**TPE, "search_seed": 1}, near_03)
    assert {cell.kd_weight for cell in one.cells if cell.asked} != {cell.kd_weight for cell in two.cells if cell.asked}


def test_cells_that_diverge_do_not_end_the_search(tmp_path: Path) -> None:
    sweep, _ = by_optuna(tmp_path, TPE, lambda alpha, seed: None if alpha > 0.6 else near_03(alpha, seed))
    failed = [cell for cell in sweep.cells if cell.status == "failed"]
    assert failed
    assert all(cell.kd_weight > 0.6 for cell in failed)
    assert table.choose(sweep.cells).kd_weight <= 0.6


@pytest.mark.parametrize(
    ("cells", "sizes"), [(1, [1]), (4, [4]), (6, [4, 2]), (20, [4] * 5), (50, [10] * 5), (101, [21, 21, 21, 21, 17])]
)
def test_rounds(cells: int, sizes: list[int]) -> None:
    assert search.rounds(cells) == sizes


# --- a cluster, without one ---


def test_a_file_stops_the_trials_of_all_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(cluster.time, "monotonic", lambda: now)  # type: ignore[attr-defined]
    stop = cluster.flagged(tmp_path / "stop")
    assert not stop()
    (tmp_path / "stop").touch()
    now += 0.5
    assert not stop()  # it looks once a second
    now += 0.6
    assert stop()
    (tmp_path / "stop").unlink()
    now += 2
    assert stop()  # once stopped, always stopped


def test_a_cluster_that_is_not_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(RunError, match=rf"There is no Ray cluster at '{address}'.*ray start --head"):
            cluster.check(address)
        free.listen()
        cluster.check(address)
    for other in ("local", "auto", "ray://nowhere:10001"):
        cluster.check(other)


def test_a_trial_elsewhere_answers_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", "before")
    record = Record(name="run", created="", config={})
    trial = Trial(folder=tmp_path / "gone", record=record, key="k", role="student", seed=0, inputs="")
    answer = cluster.carry_out_there(trial.model_dump_json(), str(tmp_path / "stop"), str(tmp_path / "cache"))
    with pytest.raises(UnderstudyError, match="does not see"):
        outcome_of(Reply.model_validate_json(answer))
    assert os.environ["UNDERSTUDY_CACHE"] == str(tmp_path / "cache")
    (tmp_path / "stop").touch()
    answer = cluster.carry_out_there(trial.model_dump_json(), str(tmp_path / "stop"), str(tmp_path / "cache"))
    with pytest.raises(Interrupted):
        outcome_of(Reply.model_validate_json(answer))


def test_a_fault_elsewhere_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"KeyError: 'x'\nTraceback") as told:
        outcome_of(Reply(fault="Traceback (most recent call last):\n  here\nKeyError: 'x'\n"))
    assert "here" in str(told.value)


# --- progress ---


def test_the_progress_is_that_of_all_trainings_and_ends(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []

    def progress(task: str, /, *, done: int, total: int, note: str = "") -> None:
        assert task == "sweep"
        told.append((done, total, note))

    book, _, cells, _ = a_book(tmp_path, {"alpha": [0, 0.5]}, seeds=[0, 1])
    book._run.progress = progress
    book.expect(4)
    search.by_grid(cells, book, Fake(lambda alpha, seed: 0.5 + alpha / 2))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert all(done < total for done, total, _ in told)
    assert told[-1][2] == "4 of 4 trainings, best so far 75.0% with alpha 0.5"
    book.measure([(cells.cell((0, 1), 9.0, "kd", 0.5, "more"), 0)], Fake(lambda alpha, seed: 0.1))
    assert told[-1][:2] == (500, 501)  # one more than expected
    book.settle(book.best())
    assert told[-1] == (1, 1, "chosen: alpha 0.5")
    book.tell("cells/other/student-1", 0.5)
    book.tell("outputs", 0.9)  # of the smaller tasks nothing is said
    assert told[-1][0] == 550
