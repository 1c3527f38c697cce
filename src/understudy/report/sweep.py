"""What a sweep found: a heat map of alpha by temperature, the table of all cells, and what they mean in words.

Only the report imports it. All figures are of the validation split, and the words say so.
"""

from __future__ import annotations

from dataclasses import dataclass

from understudy.record import Interval, Record, Sweep, SweepCell
from understudy.report import compare, numbers, svg
from understudy.report.markup import Html, join, tag
from understudy.report.overview import section
from understudy.report.perclass import SHADES, scrolling

LEFT, TOP, WIDE, HIGH, COLUMNS = 64.0, 26.0, 92.0, 48.0, 5
HEADS = {"alpha": "alpha", "temperature": "T", "method": "Method", "lr": "Learning rate", "student": "Student"}

LEGEND = (
    "Accuracy on the validation images, mean over seeds, ± half its 95 % interval. Darker is better; the frame marks "
    "the chosen cell."
)


@dataclass(frozen=True)
class Grid:
    """The cells of all alphas and temperatures with the other settings equal."""

    title: str
    """The other settings, where they vary; otherwise empty."""
    alphas: list[float]
    """The largest first, as a drawing has it."""
    temperatures: list[float]
    cells: dict[tuple[float, float], SweepCell]
    """By (alpha, temperature)."""


def grids(sweep: Sweep) -> list[Grid]:
    """Return one grid for each combination of the other settings; none where alpha or temperature did not vary."""
    if sweep.search != "grid" or not {"alpha", "temperature"} <= set(sweep.varied):
        return []
    groups: dict[tuple[str, float, str], list[SweepCell]] = {}
    for cell in sweep.cells:
        if cell.asked:
            groups.setdefault((cell.student, cell.lr, cell.method), []).append(cell)
    return [_grid(sweep, cells) for cells in groups.values()]


def _grid(sweep: Sweep, cells: list[SweepCell]) -> Grid:
    others = {"method": cells[0].method, "lr": f"learning rate {cells[0].lr:g}", "student": cells[0].student}
    return Grid(
        title=", ".join(text for name, text in others.items() if name in sweep.varied),
        alphas=sorted({cell.kd_weight for cell in cells}, reverse=True),
        temperatures=sorted({cell.temperature for cell in cells}),
        cells={(cell.kd_weight, cell.temperature): cell for cell in cells},
    )


def ranked(sweep: Sweep) -> list[SweepCell]:
    """Return all trainings, the best on validation first; those that did not come to their end last."""
    distinct = {cell.key: cell for cell in sweep.cells}
    return sorted(distinct.values(), key=lambda cell: (cell.status != "done", -(cell.mean.value if cell.mean else -1)))


def chosen(sweep: Sweep) -> SweepCell | None:
    """Return the cell that was chosen; None before the choice."""
    return next((cell for cell in sweep.cells if cell.key == sweep.chosen), None)


def half(interval: Interval) -> float:
    """Return half the width of an interval that may be cut off at one end."""
    return max(interval.high - interval.value, interval.value - interval.low)


def state(cell: SweepCell, sweep: Sweep) -> str:
    """Say in a word what stands behind a cell's figures; nothing where there is nothing to say."""
    if cell.key == sweep.chosen:
        return "chosen"
    if cell.status == "done":
        return "compared with" if cell.key == sweep.alone else ""
    return {"pruned": "stopped early", "failed": "failed", "waiting": "not finished"}[cell.status]


def sentences(sweep: Sweep) -> list[str]:
    """Say what was compared, what was chosen and how much of it may be chance."""
    found = [_compared(sweep)]
    picked = chosen(sweep)
    if picked is not None:
        found += [_choice(sweep, picked), _noise(sweep, picked)]
    return [numbers.tied(text) for text in (*found, *_ended_early(sweep))]


def _compared(sweep: Sweep) -> str:
    cells = len({cell.key for cell in sweep.cells if cell.asked})
    each = numbers.count(len(sweep.seeds), "seed")
    trained = numbers.count(sweep.trainings, "student")
    by = f" by {sweep.executor}" if sweep.executor else ""
    return (
        f"{numbers.count(cells, 'distinct cell')}, {each} each, on {numbers.count(sweep.images, 'validation image')}: "
        f"{trained} trained{by}."
    )


def _choice(sweep: Sweep, cell: SweepCell) -> str:
    text = f"Chosen on validation: {cell.words(sweep.varied)}"
    alone = next((other for other in sweep.cells if other.key == sweep.alone), None)
    if cell.gain is not None and alone is not None:
        at = f" at learning rate {alone.lr:g}, its best" if "lr" in sweep.varied else ""
        text += f", {numbers.points(cell.gain.value)} points against the same student alone{at}"
    if cell.gain is not None and cell.gain.value <= 0:
        text += "; no cell did better there than the student alone"
    return f"{text}. The test images had no part in the choice."


def _noise(sweep: Sweep, cell: SweepCell) -> str:
    others = [other for other in ranked(sweep) if other.status == "done" and other.key != cell.key and other.kd_weight]
    if sweep.noise is None or cell.mean is None:
        return "With one seed it cannot be told how much of a difference is luck; use --seeds 3."
    near = sum(cell.mean.value - other.mean.value < sweep.noise for other in others if other.mean)
    return (
        f"Between two equal cells the seeds alone make differences of up to {100 * sweep.noise:.1f} points (95 %), so "
        f"{near} of the {numbers.count(len(others), 'other cell')} cannot be told from the chosen one. The best of "
        "many looks better than it is: trust the verdict, which rests on images that no choice has seen."
    )


def _ended_early(sweep: Sweep) -> list[str]:
    distinct = ranked(sweep)
    pruned = sum(cell.status == "pruned" for cell in distinct)
    failures = [cell.failure for cell in distinct if cell.failure]
    found = []
    if pruned:
        found.append(f"{numbers.count(pruned, 'cell')} stopped early: below the median with the first seed.")
    if failures:
        found.append(f"{numbers.count(len(failures), 'cell')} failed. The first: {failures[0]}")
    return found


def sweep_section(record: Record) -> Html | None:
    """Build the heat maps, the words and the table of all cells; None where the run is no sweep."""
    sweep = record.sweep
    if sweep is None or not sweep.cells:
        return None
    if compare.compares_methods(sweep):
        found = chosen(sweep)
        told = [_compared(sweep), *([_choice(sweep, found)] if found else [])]
        paragraphs = [tag("p", None, numbers.tied(text)) for text in told]
        return section("The methods compared", *paragraphs, *compare.html(record, sweep))
    words = [tag("p", None, text) for text in sentences(sweep)]
    maps = [_figure(grid, sweep) for grid in grids(sweep)]
    table = _table(sweep)
    if maps:
        table = tag("details", None, tag("summary", None, "All cells"), table)
    legend = tag("p", {"class": "aside"}, numbers.tied(LEGEND)) if maps else None
    return section("The search", *words, tag("div", {"class": "stack"}, *maps) if maps else None, legend, table)


def _figure(grid: Grid, sweep: Sweep) -> Html:
    caption = tag("figcaption", None, grid.title) if grid.title else None
    return tag("figure", {"class": "heatmap"}, caption, heat_map(grid, sweep))


def heat_map(grid: Grid, sweep: Sweep) -> Html:
    """Draw alpha by temperature: a box for each cell, darker where more validation images are answered rightly."""
    values = [cell.mean.value for cell in grid.cells.values() if cell.mean]
    low, high = min(values, default=0.0), max(values, default=1.0)
    marks: list[Html] = []
    for row, alpha in enumerate(grid.alphas):
        y = TOP + row * HIGH
        marks.append(svg.label((LEFT - 8, y + HIGH / 2 + 4), f"{alpha:g}", "tick", "end"))
        for column, temperature in enumerate(grid.temperatures):
            cell = grid.cells.get((alpha, temperature))
            if cell is not None and (cell.kd_weight or column == 0):  # alone: one box for all temperatures
                wide = WIDE * (1 if cell.kd_weight else len(grid.temperatures))
                marks.append(_box(cell, sweep, (LEFT + column * WIDE, y), wide, (low, high)))
    bottom = TOP + len(grid.alphas) * HIGH
    width = LEFT + WIDE * max(len(grid.temperatures), COLUMNS)
    return svg.drawing(_describe(grid, sweep), width, bottom + 42, join(marks), _axes(grid, bottom))


def _axes(grid: Grid, bottom: float) -> Html:
    middle = LEFT + WIDE * len(grid.temperatures) / 2
    parts = [svg.label((LEFT - 8, TOP - 10), "alpha", "name", "end")]
    parts += [svg.label((middle, bottom + 36), "temperature T", "name", "middle")]
    for column, temperature in enumerate(grid.temperatures):
        parts.append(svg.label((LEFT + (column + 0.5) * WIDE, bottom + 17), f"{temperature:g}", "tick", "middle"))
    return join(parts)


def _box(cell: SweepCell, sweep: Sweep, corner: svg.Point, wide: float, span: tuple[float, float]) -> Html:
    shade = _shade(cell, span)
    style = f"heat s{shade}" + (" chosen" if cell.key == sweep.chosen else "")
    x, y = corner[0] + wide / 2, corner[1] + HIGH / 2
    inset = 2.0  # so that the frame of the chosen cell is not hidden by its neighbours
    box = svg.box((corner[0] + inset, corner[1] + inset), wide - 2 * inset, HIGH - 2 * inset, style, told(cell, sweep))
    if cell.mean is None:
        return join([box, svg.label((x, y + 4), state(cell, sweep) or numbers.MISSING, "tick", "middle")])
    value = numbers.percent(cell.mean.value) + ("" if cell.kd_weight else f"{numbers.SPACE}alone")
    under = state(cell, sweep) if cell.status != "done" else spread(cell)
    return join([box, svg.label((x, y - 2), value, "value", "middle"), svg.label((x, y + 14), under, "tick", "middle")])


def spread(cell: SweepCell) -> str:
    """Write half the interval of a cell as `± 1.4`; nothing for a single seed."""
    return f"±{numbers.SPACE}{100 * half(cell.mean):.1f}" if cell.mean and len(cell.accuracy) > 1 else ""


def told(cell: SweepCell, sweep: Sweep) -> str:
    """Say all of a cell in a line."""
    facts = [cell.words(sweep.varied), numbers.percent(cell.mean.value if cell.mean else None)]
    facts += [f"95 % interval {numbers.percent_range(cell.mean)}"] if spread(cell) else []
    facts += [f"gain {numbers.points(cell.gain.value)} points"] if cell.gain else []
    facts += [state(cell, sweep)] if state(cell, sweep) else []
    return "; ".join(facts)


def _shade(cell: SweepCell, span: tuple[float, float]) -> int:
    if cell.mean is None:
        return 0
    low, high = span
    return 1 + round((SHADES - 1) * (cell.mean.value - low) / (high - low)) if high > low else 1


def _describe(grid: Grid, sweep: Sweep) -> str:
    title = f" ({grid.title})" if grid.title else ""
    return f"Validation accuracy by alpha and temperature{title}: " + ". ".join(
        told(cell, sweep) for cell in grid.cells.values()
    )


def _table(sweep: Sweep) -> Html:
    heads = [HEADS[name] for name in sweep.varied] + ["Validation", "95 % interval", "Against alone", "NLL", ""]
    head = tag("tr", None, *(tag("th", {"scope": "col"}, text) for text in heads))
    rows = [_row(cell, sweep) for cell in ranked(sweep)]
    table = tag("table", {"class": "plain"}, tag("thead", None, head), tag("tbody", None, *rows))
    return scrolling(table, "All cells of the sweep")


def _row(cell: SweepCell, sweep: Sweep) -> Html:
    first, *others = [*settings(cell, sweep), *_figures(cell), state(cell, sweep)]
    cells = [tag("th", {"scope": "row"}, first), *(tag("td", None, other) for other in others)]
    return tag("tr", {"class": "chosen" if cell.key == sweep.chosen else None}, *cells)


def settings(cell: SweepCell, sweep: Sweep) -> list[str]:
    """Write the settings that vary, in the order of `HEADS`; a dash for what means nothing to a student alone."""
    taught = bool(cell.kd_weight)
    texts = {
        "alpha": f"{cell.kd_weight:g}" if taught else "alone",
        "temperature": f"{cell.temperature:g}" if taught else numbers.MISSING,
        "method": cell.method if taught else numbers.MISSING,
        "lr": f"{cell.lr:g}",
        "student": cell.student,
    }
    return [texts[name] for name in sweep.varied]


def _figures(cell: SweepCell) -> list[str]:
    nll = sum(cell.nll.values()) / len(cell.nll) if cell.nll else None
    gain = f"{numbers.points(cell.gain.value)} ({numbers.points_range(cell.gain)})" if cell.gain else numbers.MISSING
    interval = numbers.percent_range(cell.mean) if len(cell.accuracy) > 1 else numbers.MISSING
    return [numbers.percent(cell.mean.value if cell.mean else None), interval, gain, numbers.decimal(nll)]
