"""The end of a run on a terminal: verdict, final table, notes, readable at 80 columns.

Only the report imports it.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from understudy.record import Record
from understudy.report import numbers
from understudy.report.notes import Note, export_line, notes, status_notes
from understudy.report.tables import Measure, Row, final_table, measures

OUTCOME_STYLES = {"BEATS": "bold green", "NO GAIN": "bold red", "INCONCLUSIVE": "bold yellow"}
MARKS = {"stop": ("✗ ", "bold red"), "warn": ("! ", "bold yellow"), "info": ("· ", "dim")}
SHORT = {"teacher": "Teacher", "baseline": "Alone", "student": "Distilled"}


def terminal(record: Record, *, report: Path | None = None) -> RenderableType:
    """Return what a terminal shows of a run: the table, the verdict, the notes and where the report lies."""
    parts: list[RenderableType] = [_table(final_table(record)) if record.summary else _so_far(record), Text()]
    parts += [_verdict(record), Text()] if record.verdict else []
    parts += [_note(note) for note in [*status_notes(record), *notes(record)]]
    parts += [_line("Exported ", export_line(export)) for export in record.exports]
    parts += [_line("Report   ", str(report))] if report else []
    return Group(*parts)


def plain(text: str) -> str:
    """Replace what could steer a terminal: a file's name may hold escape sequences."""
    return "".join("�" if unicodedata.category(one)[0] == "C" else one for one in text)


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("On the test images")
    for row in rows:
        table.add_column(SHORT[row.role], justify="right", no_wrap=True)
    if len(rows) > 1:
        table.add_column("vs teacher", style="cyan", no_wrap=True)
    table.add_row("", *(Text(plain(row.architecture), style="dim", overflow="ellipsis") for row in rows))
    for measure in measures(rows):
        table.add_row(measure.label, *_cells(measure, rows))
    return table


def _so_far(record: Record) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("Finished so far", "Val", "Test"):
        table.add_column(head, justify="left" if head == "Finished so far" else "right")
    for name, model in record.models.items():
        shares = (metrics.accuracy if metrics else None for metrics in (model.val, model.test))
        table.add_row(Text(plain(name)), *map(numbers.percent, shares))
    return table


def _cells(measure: Measure, rows: list[Row]) -> list[str]:
    values = [measure.value(row) for row in rows]
    if measure.note is None:
        return values
    under = [measure.note(row) for row in rows]
    if measure.cost:
        return [*values, under[-1]] if len(rows) > 1 else values
    return [f"{value}\n{note}" if note else value for value, note in zip(values, under, strict=True)]


def _verdict(record: Record) -> Text:
    assert record.verdict is not None
    outcome = record.verdict.outcome
    return Text.assemble((outcome, OUTCOME_STYLES[outcome]), "  ", plain(record.verdict.text))


def _note(note: Note) -> Text:
    mark, style = MARKS[note.level]
    return Text.assemble((mark, style), plain(note.text))


def _line(label: str, text: str) -> Text:
    return Text.assemble((label, "bold"), plain(text), overflow="fold")
