"""The top of the page: title, verdict in plain words, final table, what to know before trusting it.

Only the report imports it.
"""

from __future__ import annotations

from understudy.record import Record, Verdict
from understudy.report import numbers, roles
from understudy.report.gain import gain_figure
from understudy.report.markup import Child, Html, join, tag
from understudy.report.notes import Note, notes
from understudy.report.tables import Measure, Row, final_table, measures

OUTCOMES = {"BEATS": ("beats", "▲"), "NO GAIN": ("no-gain", "■"), "INCONCLUSIVE": ("inconclusive", "?")}
LEVELS = {"stop": "Stop", "warn": "Warning", "info": "Note"}


def section(title: str, *children: Child, identifier: str | None = None) -> Html:
    """Build a titled section."""
    return tag("section", {"id": identifier}, tag("h2", None, title), *children)


def header(record: Record) -> Html:
    """Build the title and the line below it: who learned from whom, on what, when."""
    teacher, student = roles.architecture(record, "teacher"), roles.architecture(record, "student")
    what = f"{student} taught by {teacher}" if record.kind == "distill" else f"{teacher} trained"
    parts = [what, record.data.source if record.data else "", record.created[:10]]
    parts += [numbers.duration(record.seconds)] if record.seconds else []
    line = tag("p", {"class": "subtitle"}, " · ".join(part for part in parts if part))
    mark = tag("p", {"class": "eyebrow"}, "understudy")
    return tag("header", None, mark, tag("h1", None, record.name or "A run without a name"), line)


def verdict_section(record: Record) -> Html:
    """Build what the run found, big: the outcome, its sentence, its picture and the headline figures."""
    if record.verdict is not None:
        return _verdict(record, record.verdict)
    title, text = _without_verdict(record)
    parts = (tag("h2", {"class": "outcome"}, title), tag("p", {"class": "sentence"}, text))
    return tag("section", {"class": "verdict none"}, tag("div", None, *parts))


def _verdict(record: Record, verdict: Verdict) -> Html:
    style, sign = OUTCOMES[verdict.outcome]
    outcome = tag("h2", {"class": "outcome"}, tag("span", {"aria-hidden": "true"}, sign), f" {verdict.outcome}")
    words = tag(
        "div",
        None,
        outcome,
        tag("p", {"class": "sentence"}, numbers.tied(verdict.text)),
        _gap(verdict),
    )
    figure = tag("figure", None, gain_figure(verdict))
    return tag("section", {"class": f"verdict {style}"}, words, figure, _headlines(record))


def _gap(verdict: Verdict) -> Html | None:
    gap = verdict.gap_closed
    if gap is None or not numbers.known(gap) or gap <= 0:
        return None
    if gap > 1:
        return tag("p", None, "It does better than its teacher.")
    return tag("p", None, f"That closes {100 * gap:.0f} % of the gap between the student alone and its teacher.")


def _without_verdict(record: Record) -> tuple[str, str]:
    summary = record.summary.get("teacher")
    if record.status == "failed":
        return "Stopped", (record.failure or "The run stopped before its end.") + " What was finished is shown below."
    if record.kind == "distill" or summary is None:
        return "No verdict yet", "The run has not come to its verdict. What was finished is shown below."
    images = roles.test_images(record)
    of = f" of {numbers.count(images, 'test image')}" if images else ""
    share, interval = numbers.percent(summary.accuracy.value), numbers.percent_range(summary.accuracy)
    return "Trained", f"The model answers {share}{of} correctly (95 % interval {interval})."


def _headlines(record: Record) -> Html | None:
    student = final_table(record)[-1]
    ratios = student.ratios
    if ratios is None:
        return None
    figures = [
        (numbers.times(ratios.bytes, "smaller", "larger"), "file than the teacher's"),
        (numbers.times(ratios.latency, "faster", "slower"), "per image than the teacher"),
        (numbers.percent(student.accuracy.value if student.accuracy else None), "of test images right"),
        (numbers.percent(student.agreement), "agree with the teacher"),
    ]
    shown = [(figure, words) for figure, words in figures if figure and figure != numbers.MISSING]
    items = [tag("div", None, tag("dt", None, words), tag("dd", None, figure)) for figure, words in shown]
    return tag("dl", {"class": "headlines"}, *items)


def table_section(record: Record) -> Html | None:
    """Build the final table: measures down, models across; None while no model has been tested."""
    if not record.summary:
        return None
    rows = final_table(record)
    heads = [tag("th", {"scope": "col", "class": row.role}, row.title, _small(_about(row))) for row in rows]
    head = tag("thead", None, tag("tr", None, tag("td", None), *heads))
    lines = measures(rows)
    groups = [_group("Answers on the test images", [one for one in lines if not one.cost], rows)]
    groups.append(_group("Cost", [one for one in lines if one.cost], rows))
    table = tag("table", {"class": "final"}, head, *groups)
    return section("Final table", table, _table_note(record), _glossary(lines), identifier="table")


def _about(row: Row) -> str:
    seeds = f", {row.seeds} seeds" if row.seeds > 1 else ""
    return f"{row.architecture}{seeds}"


def _small(text: str) -> Html | None:
    return tag("small", None, text) if text else None


def _group(title: str, lines: list[Measure], rows: list[Row]) -> Html:
    head = tag("tr", {"class": "group"}, tag("th", {"scope": "rowgroup", "colspan": str(len(rows) + 1)}, title))
    return tag("tbody", None, head, *(_line(measure, rows) for measure in lines))


def _line(measure: Measure, rows: list[Row]) -> Html:
    cells = [tag("td", {"class": row.role}, measure.value(row), _small(_note_below(measure, row))) for row in rows]
    return tag("tr", None, tag("th", {"scope": "row"}, measure.label), *cells)


def _note_below(measure: Measure, row: Row) -> str:
    wanted = measure.note is not None and (row.role == "student" or not measure.cost)
    return measure.note(row) if measure.note and wanted else ""


def _table_note(record: Record) -> Html | None:
    summary = next(iter(record.summary.values()), None)
    if summary is None:
        return None
    latency, images = summary.profile.latency, roles.test_images(record)
    threads = numbers.count(latency.threads, "thread")
    tested = f"{numbers.count(images, 'test image')}. " if images else ""
    text = f"{tested}Latency: one image at a time, {latency.runtime}, {threads}, {numbers.count(latency.runs, 'run')}."
    return tag("p", {"class": "aside"}, text)


def _glossary(lines: list[Measure]) -> Html:
    items = [join([tag("dt", None, measure.label), tag("dd", None, measure.meaning)]) for measure in lines]
    return tag(
        "details", None, tag("summary", None, "What these measures mean"), tag("dl", {"class": "glossary"}, *items)
    )


def notes_section(record: Record) -> Html | None:
    """Build the list of notes; None where there are none."""
    found = notes(record)
    if not found:
        return None
    return section(
        "Before trusting these numbers",
        tag("ul", {"class": "notes"}, *map(_note, found)),
        _leaks(record),
        _skipped(record),
    )


def _note(note: Note) -> Html:
    return tag(
        "li", {"class": note.level}, tag("strong", None, LEVELS[note.level]), tag("span", None, numbers.tied(note.text))
    )


def _leaks(record: Record) -> Html | None:
    if record.data is None or not record.data.duplicates:
        return None
    groups = [tag("li", None, " = ".join(group)) for group in record.data.duplicates]
    return _listing("Identical images in more than one split", groups, record.data.duplicates_total)


def _skipped(record: Record) -> Html | None:
    if record.data is None or not record.data.skipped:
        return None
    files = [tag("li", None, f"{name}: {reason}") for name, reason in record.data.skipped.items()]
    return _listing("Files left out", files, record.data.skipped_total)


def _listing(title: str, items: list[Html], total: int) -> Html:
    more = tag("li", None, f"and {total - len(items):,} more") if total > len(items) else None
    return tag(
        "details", None, tag("summary", None, f"{title} ({total:,})"), tag("ul", {"class": "files"}, *items, more)
    )
