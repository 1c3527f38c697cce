"""The parts of a sweep without any training: cells, means and intervals, the choice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from scipy import stats

import small_runs
from understudy import config
from understudy.config import DistillConfig, SweepConfig
from understudy.errors import TrainingError
from understudy.record import SweepCell
from understudy.sweep import search, table
from understudy.sweep.cells import Cell, Space, space

SEEDS = [0, 1, 2]


def spaced(sweep: dict[str, Any], **over: Any) -> Space:
    asked = small_runs.tiny("photos", sweep=sweep, **over)
    assert asked.sweep is not None
    return space(asked, asked.sweep)


# --- cells ---


def test_a_sweep_that_names_nothing_varies_alpha_and_temperature() -> None:
    cells = spaced({}).grid()
    assert len(cells) == 25
    assert {cell.distill.kd_weight for cell in cells} == {0, 0.25, 0.5, 0.75, 1}
    assert {cell.distill.temperature for cell in cells} == {1, 2, 4, 8, 16}
    assert search.trainings_of_grid(spaced({}), 1) == 21  # 20 cells that learn from the teacher, and one alone
    assert search.trainings_of_grid(spaced({}), 3) == 63


def test_what_is_not_varied_keeps_its_value() -> None:
    (cell,) = spaced({"alpha": 0.75}, distill={"temperature": 7.0}, train={"lr": 0.5}).grid()
    assert cell == Cell(DistillConfig(temperature=7.0, alpha=0.75), 0.5, "mnist_small")  # type: ignore[call-arg]
    other = config.validate({**small_runs.values("p"), "distill": {"ce_weight": 100.0, "kd_weight": 3.0}})
    (cell,) = space(other, SweepConfig(temperature=(2.0,))).grid()
    assert (cell.distill.ce_weight, cell.distill.kd_weight) == (100, 3)


def test_equal_cells_are_one() -> None:
    cells = spaced({"alpha": [0.5, 0.5, 1], "temperature": [2, 2.0]}).grid()
    assert len(cells) == 2


def test_every_student_and_learning_rate_has_its_own_baseline() -> None:
    found = spaced({"lr": [0.1, 0.01], "student": ["a", "b"], "temperature": [1, 2]})
    assert [(cell.student, cell.lr) for cell in found.alone()] == [("a", 0.1), ("a", 0.01), ("b", 0.1), ("b", 0.01)]
    assert search.trainings_of_grid(found, 2) == 2 * (4 + 8)


def test_keys_name_trainings() -> None:
    cells = spaced({"alpha": [0, 0.5], "temperature": [1, 4], "lr": [0.1, 0.2]}).grid()
    assert len({cell.key for cell in cells}) == 2 + 4
    assert all(set(cell.key) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_") for cell in cells)
    odd = Cell(DistillConfig(), 0.1, "../My Module:make")
    assert "/" not in odd.key
    assert odd.key != Cell(DistillConfig(), 0.1, "My Module:make").key


def test_a_cell_changes_its_own_settings_only() -> None:
    given = small_runs.tiny("photos", sweep={})
    changed = Cell(DistillConfig(temperature=9.0), 0.25, "cnn3").configure(given).model_dump()
    asked = given.model_dump()
    assert (changed["train"].pop("lr"), changed["student"].pop("model")) == (0.25, "cnn3")
    assert changed.pop("distill")["temperature"] == 9
    for values in (asked, asked["train"], asked["student"]):
        for key in ("distill", "lr", "model"):
            values.pop(key, None)
    asked["teacher"], changed["teacher"] = None, None
    assert changed == asked


# --- means, noise, choice ---


def row(key: str, accuracy: Iterable[float], *, kd: float = 0.5, nll: float = 1.0, **over: Any) -> SweepCell:
    values = {str(seed): value for seed, value in enumerate(accuracy)}
    base: dict[str, Any] = {"student": "s", "lr": 0.1, "method": "kd", "temperature": 4.0, "status": "done"}
    cell = SweepCell(key=key, ce_weight=1 - kd, kd_weight=kd, accuracy=values, **{**base, **over})
    cell.nll = dict.fromkeys(values, nll)
    return cell


def test_the_interval_is_student_s() -> None:
    values = [0.8, 0.9, 0.85, 0.7]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = table.over_seeds(values)
    assert (found.value, found.low, found.high) == pytest.approx((0.8125, low, high))


def test_one_seed_has_no_width() -> None:
    found = table.over_seeds([0.8])
    assert (found.value, found.low, found.high) == (0.8, 0.8, 0.8)


def test_shares_stay_shares_and_gains_need_not() -> None:
    rows = [row("alone", [0.99, 0.5], kd=0), row("best", [1.0, 0.9])]
    table.fill(rows, 1_000)
    assert rows[1].mean is not None
    assert rows[1].mean.high == 1.0
    assert rows[1].gain is not None
    assert rows[1].gain.low < 0
    assert rows[1].gain.high > 1


def test_gains_are_taken_seed_by_seed_from_the_best_learning_rate() -> None:
    rows = [
        row("slow", [0.2, 0.2], kd=0),
        row("fast", [0.5, 0.7], kd=0, lr=0.2),
        row("cell", [0.6, 0.8]),
        row("other", [0.9, 0.9], kd=0, student="other"),
    ]
    table.fill(rows, 1_000)
    assert rows[2].gain is not None
    assert rows[2].gain.value == pytest.approx(0.1)
    # each seed gains the same, to the last image: half an image gained and half one lost remain in doubt
    assert rows[2].gain.high - rows[2].gain.value == pytest.approx(1.959964 / 1_000)
    assert rows[2].gain.value - rows[2].gain.low == pytest.approx(1.959964 / 1_000)
    assert [rows[number].gain for number in (0, 1, 3)] == [None] * 3


def test_seeds_that_agree_by_chance_are_no_proof() -> None:
    """Oracle: equal models, each with a few wrong answers of its own; at most 5 % may look better or worse."""
    rng, images = np.random.default_rng(0), 200
    found, plain = [], []
    for _ in range(2_000):
        right = rng.random((2, 3, images)) < 0.99
        differences = list((right[0].mean(1) - right[1].mean(1)).tolist())
        found.append(table.gain_over_seeds(differences, images))
        plain.append(table.over_seeds(differences))
    wrong = [np.mean([one.low > 0 or one.high < 0 for one in rows]) for rows in (found, plain)]
    assert wrong[0] <= 0.05
    assert wrong[1] > wrong[0]


def test_many_images_leave_the_seeds_interval() -> None:
    differences = [0.01, 0.03, -0.01, 0.02]
    found, plain = table.gain_over_seeds(differences, 10**6), table.over_seeds(differences)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=1e-6)
    assert table.gain_over_seeds([0.2], 10) == table.over_seeds([0.2])


def test_the_noise_is_what_seeds_do_to_a_difference() -> None:
    """Oracle: simulate equal cells; 95 % of the differences between two means lie within the noise."""
    rng = np.random.default_rng(0)
    within = []
    for _ in range(400):
        seeds = rng.normal(0, 0.05, 3)  # common to all cells, so no noise of a difference
        values = 0.8 + seeds + rng.normal(0, 0.01, (5, 3))
        rows = [row(str(number), one) for number, one in enumerate(values)]
        found = table.noise(rows, SEEDS)
        assert found is not None
        within.append(abs(values[0].mean() - values[1].mean()) < found)
    assert np.mean(within) == pytest.approx(0.95, abs=0.03)


def test_there_is_no_noise_to_tell_from_one_seed_or_one_cell() -> None:
    assert table.noise([row("a", [0.5]), row("b", [0.6])], [0]) is None
    assert table.noise([row("a", [0.5, 0.6]), row("a", [0.5, 0.6])], [0, 1]) is None
    assert table.noise([row("a", [0.5, 0.6]), row("b", [0.5], status="pruned")], [0, 1]) is None


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([row("a", [0.5]), row("b", [0.6]), row("c", [0.55])], "b"),
        ([row("a", [0.6], nll=0.9), row("b", [0.6], nll=0.5)], "b"),
        ([row("a", [0.6]), row("b", [0.6])], "a"),
        ([row("a", [0.6]), row("b", [0.9], status="pruned"), row("c", [0.9], status="failed")], "a"),
        ([row("alone", [0.9], kd=0), row("a", [0.6])], "a"),
        ([row("a", [0.9, 0.1]), row("b", [0.6, 0.6])], "b"),
    ],
    ids=["accuracy", "then nll", "then the first", "only the finished", "only with a teacher", "the mean"],
)
def test_the_choice(rows: list[SweepCell], chosen: str) -> None:
    table.fill(rows, 1_000)
    assert table.choose(rows).key == chosen


def test_no_choice_says_why() -> None:
    failed = row("a", [], status="failed", failure="Too hot.")
    with pytest.raises(TrainingError, match=r"came to its end: Too hot\."):
        table.choose([failed])
    with pytest.raises(TrainingError, match="s alone, which the cells are compared with, failed"):
        table.choose_alone([failed], "s")
