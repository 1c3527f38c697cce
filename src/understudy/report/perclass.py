"""What happens to each class: confusion matrices and recall, as tables that colours only underline.

Only the report imports it. With many classes only the most confused ones are shown, and the page says so.
"""

from __future__ import annotations

from understudy.record import Record, Role
from understudy.report import numbers, roles, svg
from understudy.report.markup import Html, join, tag
from understudy.report.svg import Scale

MOST = 20
SHADES = 9


def most_confused(record: Record) -> list[int]:
    """Return the classes to show, in their own order: all, or the `MOST` with the most mistakes from or to them."""
    if len(roles.classes(record)) <= MOST:
        return list(range(len(roles.classes(record))))
    total = [0] * len(roles.classes(record))
    for matrix in (roles.confusion(record, role) for role in roles.roles(record)):
        for truth, row in enumerate(matrix):
            wrong = ((answer, images) for answer, images in enumerate(row) if images and answer != truth)
            for answer, images in wrong:
                total[truth] += images
                total[answer] += images
    worst = sorted(range(len(total)), key=lambda one: -total[one])[:MOST]
    return sorted(worst)


def limited(record: Record) -> Html | None:
    """Say that only some classes are shown, where that is so."""
    total = len(roles.classes(record))
    if total <= MOST:
        return None
    return tag("p", {"class": "aside"}, f"Of {total:,} classes, the {MOST} most often confused are shown.")


def confusion_tables(record: Record) -> list[Html]:
    """Build one table of counts per role, all seeds added up; rows are the truth."""
    shown = most_confused(record)
    matrices = [(role, roles.confusion(record, role)) for role in roles.roles(record)]
    return [_confusion(record, role, matrix, shown) for role, matrix in matrices if matrix]


def _confusion(record: Record, role: Role, matrix: list[list[int]], shown: list[int]) -> Html:
    names = roles.classes(record)
    seeds = len(roles.measured(record, role))
    each = f"{sum(map(sum, matrix)):,} answers" + (f", {seeds} seeds together" if seeds > 1 else "")
    heads = [tag("th", {"scope": "col", "title": names[one]}, tag("span", None, names[one])) for one in shown]
    corner = tag("td", {"class": "corner"}, "truth ↓", tag("br"), "answer →")
    rows = [_confusion_row(names[one], one, matrix[one], shown) for one in shown]
    caption = tag("caption", None, roles.TITLES[role], tag("small", None, each))
    table = tag(
        "table",
        {"class": "confusion"},
        caption,
        tag("thead", None, tag("tr", None, corner, *heads)),
        tag("tbody", None, *rows),
    )
    return scrolling(table, f"Confusion matrix: {roles.TITLES[role]}")


def _confusion_row(name: str, truth: int, counts: list[int], shown: list[int]) -> Html:
    total = sum(counts)
    cells = [_confusion_cell(counts[one], total, one == truth) for one in shown]
    return tag("tr", None, tag("th", {"scope": "row", "title": name}, tag("span", None, name)), *cells)


def _confusion_cell(images: int, total: int, right: bool) -> Html:
    share = images / total if total else 0.0
    shade = min(SHADES, -(-round(share * 1000) * SHADES // 1000)) if images else 0
    style = f"{'right' if right else 'wrong'} s{shade}"
    title = f"{numbers.count(images, 'image')}, {numbers.percent(share)} of this class"
    return tag("td", {"class": style, "title": title}, f"{images:,}" if images or right else "·")


def scrolling(table: Html, name: str) -> Html:
    """Let a wide table scroll by itself, also by keyboard, so that the page never does."""
    return tag("div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": name}, table)


def recall_table(record: Record) -> Html:
    """Build the table of recall per class, with a strip that shows the roles side by side."""
    which = roles.roles(record)
    heads = [tag("th", {"scope": "col", "class": role}, roles.TITLES[role]) for role in which]
    cells = [tag("th", {"scope": "col"}, "Class"), *heads]
    rows = [_recall_row(record, roles.classes(record)[one], which) for one in most_confused(record)]
    strip = tag("th", {"scope": "col", "class": "strip"}, "│ teacher  ▲ alone  ● distilled")
    table = tag(
        "table", {"class": "recall"}, tag("thead", None, tag("tr", None, *cells, strip)), tag("tbody", None, *rows)
    )
    return scrolling(table, "Recall per class")


def _recall_row(record: Record, name: str, which: tuple[Role, ...]) -> Html:
    values = {role: roles.mean_of(record, role, lambda metrics: metrics.recall.get(name)) for role in which}
    cells = [tag("td", None, numbers.percent(value)) for value in values.values()]
    return tag(
        "tr", None, tag("th", {"scope": "row"}, name), *cells, tag("td", {"class": "strip"}, _strip(name, values))
    )


def _strip(name: str, values: dict[Role, float | None]) -> Html:
    scale = Scale(0, 1, 8, 212)
    marks = [_mark(role, scale(value)) for role, value in values.items() if value is not None and numbers.known(value)]
    said = ", ".join(f"{roles.TITLES[role]} {numbers.percent(value)}" for role, value in values.items())
    return svg.drawing(f"Recall of {name}: {said}", 220, 20, svg.line((8, 10), (212, 10), "grid"), join(marks))


def _mark(role: Role, x: float) -> Html:
    if role == "teacher":
        return svg.line((x, 3), (x, 17), "mark teacher")
    if role == "baseline":
        return svg.polygon([(x - 4.5, 14.5), (x, 6), (x + 4.5, 14.5)], "mark baseline")
    return svg.dot((x, 10), 4, "mark student")
