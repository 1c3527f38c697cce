"""Schedules against values worked out by hand, and what they refuse."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.distillation import schedules
from understudy.distillation.schedules import Schedule

CHANGING = [
    Schedule("linear", 8.0, 2.0, 0.5),
    Schedule("cosine", 8.0, 2.0, 0.5),
    Schedule("warmup", 0.0, 2.0, 0.5),
    Schedule("step", 8.0, 2.0, 0.5),
]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Schedule("constant", 3.0, 3.0), [3, 3, 3, 3, 3]),
        (Schedule("linear", 8.0, 2.0), [8, 6.5, 5, 3.5, 2]),
        (Schedule("linear", 8.0, 2.0, until=0.5), [8, 5, 2, 2, 2]),
        (Schedule("cosine", 8.0, 2.0), [8, 5 + 3 * math.sqrt(0.5), 5, 5 - 3 * math.sqrt(0.5), 2]),
        (Schedule("cosine", 0.0, 1.0, until=0.5), [0, 0.5, 1, 1, 1]),
        (Schedule("warmup", 0.0, 8.0, until=0.5), [0, 4, 8, 8, 8]),
        (Schedule("step", 1.0, 0.1, until=0.5), [1, 1, 0.1, 0.1, 0.1]),
    ],
)
def test_values_at_quarters_of_training(schedule: Schedule, values: list[float]) -> None:
    assert [schedule.value(quarter / 4) for quarter in range(5)] == pytest.approx(values)


@pytest.mark.parametrize("schedule", CHANGING, ids=lambda schedule: schedule.shape)
@given(progress=st.floats(0, 1), later=st.floats(0, 1))
def test_goes_from_start_to_end_one_way_and_stays(schedule: Schedule, progress: float, later: float) -> None:
    direction = math.copysign(1, schedule.end - schedule.start)
    earlier, later = sorted((progress, later))
    assert direction * (schedule.value(later) - schedule.value(earlier)) >= -1e-12
    assert schedule.value(0.0) == schedule.start
    assert schedule.value(max(later, schedule.until)) == pytest.approx(schedule.end)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("cosin", 1.0, 2.0), "shape is one of constant, linear, cosine, warmup, step, not 'cosin'"),
        (("linear", math.nan, 2.0), "finite"),
        (("linear", 1.0, math.inf), "finite"),
        (("linear", 1.0, 2.0, 0.0), "above 0 and at most 1, not 0.0"),
        (("linear", 1.0, 2.0, 1.5), "above 0 and at most 1, not 1.5"),
        (("linear", 1.0, 2.0, math.nan), "above 0 and at most 1"),
        (("constant", 1.0, 2.0), "same start and end, not 1.0 and 2.0"),
        (("warmup", 1.0, 2.0), "starts at 0, not 1.0"),
        (("step", 1.0, 2.0), "until below 1"),
    ],
)
def test_refuses_what_makes_no_sense(fields: tuple[str, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(*fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_is_a_share(progress: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        Schedule("constant", 1.0, 1.0).value(progress)


def test_it_is_a_value() -> None:
    assert Schedule("linear", 1.0, 2.0) == Schedule("linear", 1.0, 2.0, 1.0)
    assert len({Schedule("linear", 1.0, 2.0), Schedule("linear", 1.0, 2.0)}) == 1


def test_it_does_without_torch() -> None:
    names = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(Path(schedules.__file__).read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert names == {"__future__", "dataclasses", "math", "typing"}
