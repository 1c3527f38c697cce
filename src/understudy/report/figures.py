"""Training curves and reliability diagrams, drawn from a record.

Only the report imports it. Lines differ by dashes as well as by colour: teacher dotted, baseline dashed, student solid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from understudy.record import Bin, Epoch, Record, Role, Trained
from understudy.report import numbers, roles, svg
from understudy.report.markup import Html, join, tag
from understudy.report.svg import Point, Scale

SHORT: dict[Role, str] = {"teacher": "teacher", "baseline": "alone", "student": "distilled"}
Curve = list[Point]
"""(epoch, value) pairs."""


@dataclass(frozen=True)
class Panel:
    """One diagram: curves of some roles over epochs."""

    title: str
    curves: dict[Role, list[Curve]]
    write: Callable[[float], str]
    levels: dict[Role, float]
    """Roles shown as a horizontal line, such as the teacher's best accuracy beside the students' curves."""


def curve_panels(record: Record) -> list[Html]:
    """Draw validation accuracy and training loss per epoch: the students together, the teacher apart."""
    pair: tuple[Role, ...] = ("baseline", "student")
    best = best_validation(record, "teacher")
    panels = [
        Panel("Validation accuracy, %", _curves(record, pair, _accuracy), _percent, {"teacher": best} if best else {}),
        Panel("Training loss", _curves(record, pair, _loss), _plain, {}),
        Panel("Teacher: validation accuracy, %", _curves(record, ("teacher",), _accuracy), _percent, {}),
        Panel("Teacher: training loss", _curves(record, ("teacher",), _loss), _plain, {}),
    ]
    return [_draw_panel(panel) for panel in panels if any(panel.curves.values())]


def best_validation(record: Record, role: Role) -> float | None:
    """Return the validation accuracy of a role, mean over seeds, or None where not known."""
    return roles.mean([_validation(model) for model in roles.models(record, role)])


def _validation(model: Trained) -> float | None:
    if model.val is not None:
        return model.val.accuracy
    return max((row.val_accuracy for row in model.epochs if numbers.known(row.val_accuracy)), default=None)


def _accuracy(row: Epoch) -> float:
    return row.val_accuracy


def _loss(row: Epoch) -> float:
    return row.train_loss


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _plain(value: float) -> str:
    return f"{value:g}"


def _curves(record: Record, which: Sequence[Role], read: Callable[[Epoch], float]) -> dict[Role, list[Curve]]:
    found: dict[Role, list[Curve]] = {}
    for role in which:
        curves = [_curve(model.epochs, read) for model in roles.models(record, role)]
        found[role] = [curve for curve in curves if curve]
    return found


def _curve(epochs: list[Epoch], read: Callable[[Epoch], float]) -> Curve:
    return [(row.epoch, read(row)) for row in epochs if numbers.known(read(row))]


def mean_curve(curves: list[Curve]) -> Curve:
    """Return the mean at the epochs that every curve has."""
    tables = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return [(epoch, sum(table[epoch] for table in tables) / len(tables)) for epoch in shared]


def _draw_panel(panel: Panel) -> Html:
    everything = [point for curves in panel.curves.values() for curve in curves for point in curve]
    x = Scale(1, max(max(epoch for epoch, _ in everything), 2), 34, 284)
    y = _y_scale([value for _, value in everything] + list(panel.levels.values()))
    steps = [tick for tick in svg.ticks(1, x.high) if tick == int(tick)]
    first = [] if 1 in steps or (steps and steps[0] < 0.12 * x.high) else [1.0]
    marks = [
        svg.y_axis(y, x.start, x.end - x.start, svg.ticks(y.low, y.high), panel.write),
        svg.x_axis(x, y.start, first + steps, _plain, "epoch"),
        *(svg.line((x.start, y(value)), (x.end, y(value)), f"curve {role}") for role, value in panel.levels.items()),
        *(_draw_curves(role, curves, x, y) for role, curves in panel.curves.items()),
        _end_labels(panel, x, y),
    ]
    picture = svg.drawing(_describe(panel), 356, 256, *marks)
    return tag("figure", None, tag("figcaption", None, panel.title), picture)


def _y_scale(values: Sequence[float]) -> Scale:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return Scale(max(low - margin, 0) if low >= 0 else low - margin, high + margin, 214, 10)


def _draw_curves(role: Role, curves: list[Curve], x: Scale, y: Scale) -> Html:
    thin = [_draw_curve(curve, x, y, f"curve thin {role}") for curve in curves] if len(curves) > 1 else []
    return join([*thin, _draw_curve(mean_curve(curves), x, y, f"curve {role}")])


def _draw_curve(curve: Curve, x: Scale, y: Scale, style: str) -> Html:
    places = [(x(epoch), y(value)) for epoch, value in curve]
    return svg.polyline(places, style) if len(places) > 1 else join(svg.dot(place, 3, style) for place in places)


def _end_labels(panel: Panel, x: Scale, y: Scale) -> Html:
    ends = {role: mean_curve(curves)[-1][1] for role, curves in panel.curves.items() if mean_curve(curves)}
    wanted = sorted((y(value), role) for role, value in {**panel.levels, **ends}.items())
    parts: list[Html] = []
    free = 12.0
    for place, role in wanted:
        at = max(free, place + 4)
        parts.append(svg.label((x.end + 6, at), SHORT[role], f"direct {role}"))
        free = at + 14
    return join(parts)


def _describe(panel: Panel) -> str:
    curves = [(role, mean_curve(curves)) for role, curves in panel.curves.items()]
    said = [f"{SHORT[role]} from {curve[0][1]:.3f} to {curve[-1][1]:.3f}" for role, curve in curves if curve]
    levels = [f"{SHORT[role]} {value:.3f}" for role, value in panel.levels.items()]
    return f"{panel.title} per epoch: {'; '.join(said + levels)}."


def reliability_panels(record: Record) -> list[Html]:
    """Draw accuracy against confidence per role, all seeds together, with the number of images in each bin."""
    shown = [(role, roles.reliability(record, role)) for role in roles.roles(record)]
    return [_draw_reliability(record, role, bins) for role, bins in shown if any(one.count for one in bins)]


def _draw_reliability(record: Record, role: Role, bins: list[Bin]) -> Html:
    x, y = Scale(0, 1, 38, 298), Scale(0, 1, 210, 10)
    error = roles.mean_of(record, role, lambda metrics: metrics.ece)
    title, note = roles.TITLES[role], f"calibration error {numbers.decimal(error)}"
    marks = [
        svg.y_axis(y, x.start, x.end - x.start, [0, 0.25, 0.5, 0.75, 1], _percent),
        svg.line((x(0), y(0)), (x(1), y(1)), "ideal"),
        *(_draw_bin(role, one, max(each.count for each in bins), x, y) for one in bins if one.count),
        _draw_counts(role, bins, x),
        svg.x_axis(x, 262, [0, 0.25, 0.5, 0.75, 1], _percent, "confidence, %"),
    ]
    picture = svg.drawing(f"Reliability diagram. {title}: {note}.", 310, 302, *marks)
    return tag("figure", None, tag("figcaption", None, title, tag("small", None, note)), picture)


def _draw_bin(role: Role, one: Bin, most: int, x: Scale, y: Scale) -> Html:
    ideal = (x(one.confidence or 0), y(one.confidence or 0))
    place = (x(one.confidence or 0), y(one.accuracy or 0))
    radius = 2.5 + 4.5 * (one.count / most) ** 0.5
    return join([svg.line(place, ideal, "gap"), svg.dot(place, radius, f"mark {role}", _bin_text(one))])


def _draw_counts(role: Role, bins: list[Bin], x: Scale) -> Html:
    most = max(one.count for one in bins)
    height = Scale(0, most, 0, 36)
    bars = [
        svg.box(
            (x(one.low) + 0.5, 262 - height(one.count)),
            x(one.high) - x(one.low) - 1,
            height(one.count),
            f"bar {role}",
            _bin_text(one),
        )
        for one in bins
    ]
    return join([*bars, svg.label((x.start - 4, 234), f"{most:,}", "tick", "end")])


def _bin_text(one: Bin) -> str:
    return (
        f"confidence {numbers.percent(one.low)} to {numbers.percent(one.high)}: {numbers.count(one.count, 'image')}, "
        f"{numbers.percent(one.accuracy)} right"
    )
