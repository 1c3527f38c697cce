"""What is shown of a sweep: the grid on a terminal, the heat map and the table on the page, and the words."""

from __future__ import annotations

import io
import itertools
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from understudy.record import Interval, Record, Sweep, SweepCell
from understudy.report import render, sweep, terminal

ALPHAS, HEATS = (0.0, 0.5, 1.0), (1.0, 4.0, 16.0)


def spread(value: float, half: float = 0.01) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)


def one(alpha: float, heat: float, share: float, **over: Any) -> SweepCell:
    taught = alpha > 0
    base: dict[str, Any] = {
        "key": f"kd-{alpha:g}-t{heat:g}" if taught else "alone",
        "student": "cnn3",
        "lr": 0.001,
        "method": "kd",
        "status": "done",
        "accuracy": {"0": share - 0.01, "1": share + 0.01},
        "nll": {"0": 0.5, "1": 0.6},
        "mean": spread(share),
        "gain": spread(share - 0.8, 0.02) if taught else None,
    }
    return SweepCell(temperature=heat, ce_weight=1 - alpha, kd_weight=alpha, **{**base, **over})


def a_sweep(**over: Any) -> Sweep:
    """Return 3 x 3 cells; alpha 0.5 at T 4 is the best, at T 16 as good as that."""
    good = {(0.5, 4.0): 0.9, (0.5, 16.0): 0.899, (0.5, 1.0): 0.855}
    cells = [one(a, t, good.get((a, t), 0.86 if a else 0.8)) for a in ALPHAS for t in HEATS]
    base: dict[str, Any] = {
        "search": "grid",
        "varied": ["alpha", "temperature"],
        "seeds": [0, 1],
        "cells": cells,
        "chosen": "kd-0.5-t4",
        "alone": "alone",
        "noise": 0.02,
        "trainings": 14,
        "images": 500,
        "executor": "2 processes",
    }
    return Sweep(**{**base, **over})


def a_record(found: Sweep | None) -> Record:
    return Record(name="run", created="2026-01-01T00:00:00+00:00", config={}, sweep=found)


def on_screen(record: Record) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal(record))
    return console.export_text().replace("\u00a0", " ")


class Page(HTMLParser):
    """The texts and elements of a page."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(render(record).replace("\u00a0", " "))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def boxes(self) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == "rect" and "heat" in str(found.get("class"))]


# --- the terminal ---


def test_the_grid_has_a_row_for_each_alpha_and_marks_the_choice() -> None:
    lines = on_screen(a_record(a_sweep())).splitlines()
    assert re.search(r"T 1 +T 4 +T 16", lines[0])
    values = {line.split()[1]: re.findall(r"[\d.]+ %", line) for line in lines if line.startswith("alpha")}
    assert values == {"1": ["86.0 %", "86.0 %", "86.0 %"], "0.5": ["85.5 %", "90.0 %", "89.9 %"]}
    assert sum("→ 90.0 %" in line for line in lines) == 1
    assert any(re.fullmatch(r"alone +80\.0 % *", line) for line in lines)  # once, whatever the temperature
    assert sum("± 1.0" in line for line in lines) == 3


def test_the_grid_fits_into_80_columns() -> None:
    heats = (1.0, 2.0, 4.0, 8.0, 16.0)
    cells = [one(alpha, heat, 0.95) for alpha in (0.0, 0.25, 0.5, 0.75, 1.0) for heat in heats]
    text = on_screen(a_record(a_sweep(cells=cells, chosen="kd-0.5-t4")))
    assert "T 16" in text
    assert text.count("95.0 %") == 21
    assert "…" not in text


def test_a_sweep_that_goes_on_shows_what_there_is() -> None:
    cells = a_sweep().cells
    cells[4] = one(0.5, 4, 0, status="waiting", mean=None, gain=None, accuracy={}, nll={})
    text = on_screen(a_record(a_sweep(cells=cells, chosen=None, alone=None)))
    assert "not finished" in text
    assert "Chosen" not in text
    assert "→" not in text


def test_a_search_is_shown_as_a_list_the_best_first() -> None:
    cells = [one(round(0.01 * number, 2), 3.0, 0.5 + 0.01 * number) for number in range(1, 30)]
    text = on_screen(a_record(a_sweep(search="tpe", cells=cells, chosen=cells[-1].key)))
    shares = [float(share) for share in re.findall(r"([\d.]+) % ±", text)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 79.0
    assert "17 more" in text


# --- the words ---


def test_the_words_say_on_which_images_the_choice_was_made_and_how_sure_it_is() -> None:
    words = " ".join(sweep.sentences(a_sweep())).replace("\u00a0", " ")
    assert "7 distinct cells, 2 seeds each, on 500 validation images: 14 students trained by 2 processes." in words
    assert "Chosen on validation: alpha 0.5, T 4, +10.0 points against the same student alone." in words
    assert "The test images had no part in the choice." in words
    assert "up to 2.0 points (95 %), so 1 of the 5 other cells cannot be told from the chosen one" in words


def test_the_words_admit_that_nothing_helped() -> None:
    cells = [one(0, 4, 0.8), one(0.5, 4, 0.79)]
    words = " ".join(sweep.sentences(a_sweep(cells=cells)))
    assert "−1.0 points against the same student alone; no cell did better there than the student alone" in words


def test_the_words_name_the_learning_rate_of_the_student_alone() -> None:
    cells = [one(0, 4, 0.8, lr=0.01), one(0.5, 4, 0.9, lr=0.1)]
    words = " ".join(sweep.sentences(a_sweep(cells=cells, varied=["alpha", "lr"])))
    assert "alpha 0.5, lr 0.1, +10.0 points against the same student alone at learning rate 0.01, its best" in words


def test_the_words_say_that_one_seed_tells_little() -> None:
    words = " ".join(sweep.sentences(a_sweep(seeds=[0], noise=None)))
    assert "how much of a difference is luck; use --seeds 3" in words


def test_the_words_count_what_ended_early() -> None:
    cells = [*a_sweep().cells, one(0.7, 4, 0.1, status="pruned"), one(0.9, 4, 0, status="failed", failure="Too hot.")]
    words = " ".join(sweep.sentences(a_sweep(cells=cells))).replace("\u00a0", " ")
    assert "1 cell stopped early" in words
    assert "1 cell failed. The first: Too hot." in words


# --- the page ---


def test_the_heat_map_has_a_box_for_each_training_with_its_number() -> None:
    page = Page(a_record(a_sweep()))
    boxes = page.boxes()
    assert len(boxes) == 6 + 1  # the student alone is one box for all temperatures
    widths = [float(str(box["width"])) for box in boxes]
    assert widths.count(min(widths)) == 6
    assert max(widths) > 2.9 * min(widths)
    for text in ("90.0 %", "85.5 %", "80.0 % alone", "± 1.0"):
        assert text in page.texts


def test_better_cells_are_darker_and_the_chosen_one_is_framed() -> None:
    boxes = Page(a_record(a_sweep())).boxes()
    assert [box["class"] for box in boxes if "chosen" in str(box["class"])] == ["heat s9 chosen"]
    assert sum("s1" in str(box["class"]) for box in boxes) == 1  # the student alone, the worst


def test_the_drawing_says_in_words_what_it_shows() -> None:
    page = Page(a_record(a_sweep()))
    (said,) = [found["aria-label"] for name, found in page.elements if name == "svg"]
    assert str(said).startswith("Validation accuracy by alpha and temperature: ")
    assert "alpha 0.5, T 4; 90.0 %; 95 % interval 89.0 to 91.0; gain +10.0 points; chosen" in str(said)


def test_the_table_lists_every_training_once_the_best_first() -> None:
    page = render(a_record(a_sweep()))
    body = page[page.index("All cells of the sweep") :]
    rows = re.findall(r"<tr.*?</tr>", body[: body.index("</table>")])[1:]
    assert len(rows) == 7
    assert "chosen" in rows[0]
    assert ">alone<" in rows[-1]


def test_other_settings_get_a_drawing_each() -> None:
    values = itertools.product((0.1, 0.2), ALPHAS, HEATS)
    cells = [one(alpha, heat, 0.9, lr=lr, key=f"{alpha}{heat}{lr}") for lr, alpha, heat in values]
    found = a_sweep(cells=cells, varied=["alpha", "temperature", "lr"], chosen=cells[-1].key, alone=cells[0].key)
    assert [grid.title for grid in sweep.grids(found)] == ["learning rate 0.1", "learning rate 0.2"]
    page = Page(a_record(found))
    assert sum(name == "svg" for name, _ in page.elements) == 2
    assert "learning rate 0.2" in page.texts


def test_names_cannot_become_markup() -> None:
    evil = "<script>alert(1)</script>"
    cells = [one(0, 4, 0.8, student=evil), one(0.5, 4, 0.9, student=evil, method=evil, failure=evil, status="failed")]
    found = a_sweep(cells=cells, varied=["student", "method"], chosen=None, executor=evil)
    page = Page(a_record(found))
    assert evil in page.texts
    assert not any(name == "script" for name, _ in page.elements)
    assert "\x1b" not in on_screen(a_record(a_sweep(cells=[one(0.5, 4, 0.9, student="\x1b[31m")], varied=["student"])))


@pytest.mark.parametrize("found", [None, a_sweep(cells=[], chosen=None)], ids=["no sweep", "nothing yet"])
def test_a_run_without_a_sweep_says_nothing_of_one(found: Sweep | None) -> None:
    assert "<h2>The search</h2>" not in render(a_record(found))
    assert "validation" not in on_screen(a_record(found))


def test_cells_that_are_all_equal_can_be_drawn() -> None:
    cells = [one(alpha, heat, 0.5) for alpha in ALPHAS for heat in HEATS]
    assert {box["class"] for box in Page(a_record(a_sweep(cells=cells, chosen=None))).boxes()} == {"heat s1"}
