"""What compression made, in the report: every figure of every form, on the page and on a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from browser import Browser, find
from compressed_record import RUNTIME, compressed_record
from report_page import HOSTILE, Page
from sample_record import sample_record
from understudy import report
from understudy.record import Latency, LayerNote, Quantized, Record
from understudy.report import numbers
from understudy.report.compressed import columns, compressed_lines, compressed_section


@pytest.fixture(scope="module")
def record() -> Record:
    return compressed_record()


def rows(record: Record) -> dict[str, list[str]]:
    """Return the cells of the section's table by the heading of their row, as a reader sees them."""
    built = str(compressed_section(record)).split('<table class="compressed">')[1].split("</table>")[0]
    found = {}
    for line in built.split("<tr>")[2:]:
        head, *cells = line.replace("</th>", "</td>").split("</td>")
        found[text(head)] = [text(cell) for cell in cells if "<td" in cell]
    return found


def text(markup: str) -> str:
    """Return the text of markup, its parts set apart."""
    page = Page(markup + ("</td>" if "<td" in markup else "</th>" if "<th" in markup else ""))
    return " | ".join(page.text).replace("\u00a0", " ")


def on_terminal(record: Record, width: int = 80) -> str:
    console = Console(width=width, color_system=None, force_terminal=False, _environ={})
    with console.capture() as shown:
        for part in compressed_lines(record):
            console.print(part)
    return shown.get().replace("\u00a0", " ")


def test_nothing_where_nothing_was_compressed() -> None:
    whole = sample_record()
    assert compressed_section(whole) is None
    assert compressed_lines(whole) == []
    assert "Made smaller" not in report.render(whole)


def test_every_measure_of_every_form_is_in_the_table(record: Record) -> None:
    table = rows(record)
    assert {len(cells) for cells in table.values()} == {6}
    pruned = {name: cells[3] for name, cells in table.items()}
    form = record.compressed[3]
    assert form.test is not None
    assert form.accuracy is not None
    accuracy = numbers.percent(form.accuracy.value) + " | " + numbers.percent_range(form.accuracy)
    assert pruned == {
        "Accuracy": accuracy.replace("\u00a0", " "),
        "Validation accuracy": "—",
        "Change against the form before, points": "−1.2 | −2.8 to +0.4",
        "Answers changed against the form before": "3.4 %",
        "Answers other than the teacher's": "8.3 %",
        "Largest change of a class's recall, points": "−9.0 | truck",
        "Calibration error": f"{form.test.ece:.3f}",
        "NLL": f"{form.test.nll:.3f}",
        "Size": "312 kB",
        "Multiply-accumulates": "6.10 M",
        "Latency P50": "0.0520 ms",
        "Latency P95": "0.0624 ms",
        "Memory": "61.0 MB",
    }
    assert [cells[0] for name, cells in table.items() if "before" in name or "other" in name] == ["—"] * 3


def test_a_gain_is_told_as_a_gain(record: Record) -> None:
    better = record.model_copy(deep=True)
    drop = better.compressed[3].drop
    assert drop is not None
    better.compressed[3].drop = drop.model_copy(update={"value": -0.02, "low": -0.03, "high": -0.01})
    assert rows(better)["Change against the form before, points"][3] == "+2.0 | +1.0 to +3.0"


def test_the_class_that_gained_most_counts_as_much_as_one_that_lost() -> None:
    changed = compressed_record()
    changed.compressed[3].recall_change = {"cat": -0.02, "dog": 0.05, "ship": None}
    assert rows(changed)["Largest change of a class's recall, points"][3] == "+5.0 | dog"
    changed.compressed[3].recall_change = {"cat": None}
    assert rows(changed)["Largest change of a class's recall, points"][3] == "—"


def test_a_refused_form_and_its_reason_are_told(record: Record) -> None:
    page = report.render(record)
    assert "of pruned; refused" in page
    assert "It loses 3.8 points on the validation images, more than the 0.5 allowed." in page
    assert "In use is int8-qat" in page
    shown = on_terminal(record)
    assert "int8-ptq (refused)" in shown
    assert "int8-ptq: It loses 3.8 points" in shown


def test_the_runtime_is_named_where_they_differ(record: Record) -> None:
    assert RUNTIME not in " ".join(rows(record)["Latency P50"])
    mixed = record.model_copy(deep=True)
    mixed.compressed[0].latency = Latency(runtime="PyTorch eager", threads=1, runs=9, p50=5.0, p95=6.0)
    assert rows(mixed)["Latency P50"][0] == "5.00 ms | PyTorch eager"
    assert rows(mixed)["Latency P50"][3] == f"0.0520 ms | {RUNTIME}"
    assert "Not timed on ONNX Runtime 1.31.1, and so not in the picture of latencies: teacher." in report.render(mixed)


def test_roles_without_a_file_of_their_own_stand_with_their_mean(record: Record) -> None:
    forms = record.model_copy(update={"compressed": record.compressed[3:]})
    first, *_ = found = columns(forms)
    assert [one.title for one in found[:3]] == ["Teacher", "Student alone", "Student, distilled"]
    assert [one.about for one in found[:3]] == ["resnet18", "cnn3, mean of 3 seeds", "cnn3, mean of 3 seeds"]
    assert first.accuracy == record.summary["teacher"].accuracy
    assert first.changed_from_teacher is None
    assert found[2].changed_from_teacher == pytest.approx(1 - 0.914)


def test_forms_that_are_only_half_known(record: Record) -> None:
    bare = record.model_copy(deep=True)
    waiting = Latency(runtime="not measured yet", threads=1, runs=0, p50=0, p95=0)
    empty = {"test": None, "accuracy": None, "drop": None, "changed": None, "changed_from_teacher": None}
    bare.compressed[5] = bare.compressed[5].model_copy(update={**empty, "latency": waiting, "memory_bytes": None})
    cells = [cells[5] for cells in rows(bare).values()]
    assert cells.count("—") == 10  # all but the recall, the size and the multiply-accumulates
    assert "not measured yet" not in report.render(bare)
    assert [line.split()[1:4] for line in on_terminal(bare).splitlines() if line.startswith("int8-qat")] == [["—"] * 3]


def test_hostile_names_stay_text(record: Record) -> None:
    hostile = record.model_copy(deep=True)
    for row in hostile.compressed:
        row.before = row.note = HOSTILE
        row.name = HOSTILE + row.name if row.name not in hostile.models else row.name
        row.latency.runtime = HOSTILE
        row.recall_change = {HOSTILE: -0.5}
        layer = LayerNote(name=HOSTILE, low=0, high=1, error=0.1)
        row.quantized = Quantized(way="post-training", images=3, layers=[layer])
    hostile.final = HOSTILE
    page = Page(report.render(hostile))
    plain, steering = Page(report.render(record)), "\x1b[2J"
    assert len(page.all("img")) == len(plain.all("img"))
    assert len(page.all("script")) == len(plain.all("script"))
    hostile.compressed[3].name = hostile.compressed[3].note = steering
    assert steering not in on_terminal(hostile)


def test_the_terminal_fits_80_columns(record: Record) -> None:
    lines = on_terminal(record).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:7]] == [row.name for row in record.compressed]
    assert lines[4].split() == ["pruned", *_cells(record, 3)]
    assert "Made smaller" in _shown(record)


def _cells(record: Record, place: int) -> list[str]:
    accuracy = record.compressed[place].accuracy
    assert accuracy is not None
    change = ["−1.2", "3.4", "%"]
    return [f"{100 * accuracy.value:.1f}", "%", *change, "312", "kB", "0.0520", "ms", "0.0624", "ms"]


def _shown(record: Record) -> str:
    console = Console(width=80, color_system=None, _environ={})
    with console.capture() as shown:
        console.print(report.terminal(record))
    return shown.get()


def test_the_page_is_one_section_that_can_be_linked(record: Record) -> None:
    page = Page(report.render(record))
    assert [one.get("id") for one in page.all("section")].count("compressed") == 1
    assert page.raw["h2"].count("Made smaller") == 1


@pytest.mark.skipif(find() is None, reason="no Chromium on this machine")
@pytest.mark.slow
def test_a_browser_shows_it_in_narrow_windows_too(record: Record, tmp_path: Path) -> None:
    report.write(record, tmp_path / "report.html")
    browser = Browser(tmp_path / "profile")
    try:
        for width in (360, 700, 1100):
            browser.open(tmp_path / "report.html", width=width)
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.evaluate("document.querySelectorAll('#compressed .point').length") == 2 * (6 + 2)
        assert browser.named("Log.entryAdded", "Runtime.exceptionThrown") == []
    finally:
        browser.close()
