"""What a reader must know before trusting the numbers: failures, the gate's doubts, leaks, skipped files.

Only the report imports it; the terminal and the page show the same notes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from understudy.record import DataSummary, Export, Finding, Record
from understudy.report import numbers


@dataclass(frozen=True)
class Note:
    """One sentence, and how much it weighs."""

    level: Literal["stop", "warn", "info"]
    text: str


def notes(record: Record) -> list[Note]:
    """Return the notes on the data, the teacher and the files for devices, the heaviest first."""
    data = _of_data(record.data) if record.data else []
    files = [Note("warn", f"{one.path}: {one.note}") for one in record.exports if one.one_by_one is not None]
    found = [*map(_of_finding, _doubts(record)), *data, *files]
    return sorted(found, key=lambda note: ("stop", "warn", "info").index(note.level))


def status_notes(record: Record) -> list[Note]:
    """Return a note on a run that has not ended well, or not ended."""
    if record.status == "failed":
        why = f": {record.failure}" if record.failure else "."
        return [Note("stop", f"The run stopped before its end{why}")]
    if record.status == "running":
        return [Note("warn", "The run has not ended; what is missing here is shown as a dash.")]
    return []


def export_line(export: Export) -> str:
    """Say in one line what was exported and how it compares with PyTorch."""
    frames = export.on_frames
    return (
        f"{export.path} ({numbers.size(export.bytes)}): on {export.runtime} it gives PyTorch's answer for "
        f"{numbers.percent(frames.agreement)} of {numbers.count(frames.images, 'image')}, "
        f"{numbers.milliseconds(export.latency.p50)} per image."
    )


def _doubts(record: Record) -> list[Finding]:
    return [finding for finding in (*record.gate, *record.suitability) if not finding.ok]


def _of_finding(finding: Finding) -> Note:
    return Note("stop" if finding.severity == "refuse" else "warn", finding.text)


def _of_data(data: DataSummary) -> list[Note]:
    found = [Note("info", text) for text in data.notes]
    if data.duplicates_total:
        groups = numbers.count(data.duplicates_total, "group")
        text = f"{groups} of identical images lie in more than one split: the test figures may flatter every model."
        found.append(Note("warn", text))
    if data.skipped_total:
        were = "was" if data.skipped_total == 1 else "were"
        found.append(Note("warn", f"{numbers.count(data.skipped_total, 'file')} {were} left out: {_reasons(data)}."))
    return found


def _reasons(data: DataSummary) -> str:
    first = [f"{name} ({reason})" for name, reason in list(data.skipped.items())[:3]]
    more = data.skipped_total - len(first)
    return ", ".join([*first, *([f"and {more:,} more"] if more and first else [])]) or "see the record"
