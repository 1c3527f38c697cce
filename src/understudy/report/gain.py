"""The picture of the verdict: the gain with its interval on an axis, zero and the smallest useful gain marked.

Only the report imports it.
"""

from __future__ import annotations

from collections.abc import Callable

from understudy.record import Verdict
from understudy.report import numbers, svg
from understudy.report.markup import Html, join
from understudy.report.svg import Scale

WIDTH, LEFT, RIGHT = 330.0, 48.0, 288.0
TOP, BAND, STEP = 30.0, 44.0, 17.0
MOST_SEEDS = 10


def gain_figure(verdict: Verdict) -> Html:
    """Draw the gain in accuracy: a bar for the 95 % interval, a diamond for the mean, a dot per seed."""
    seeds = [(name, value) for name, value in verdict.per_seed.items() if numbers.known(value)]
    rows = len(seeds) if len(seeds) <= MOST_SEEDS else 1
    bottom = TOP + BAND + rows * STEP + 6
    scale = _scale(verdict, [value for _, value in seeds])
    values = svg.ticks(scale.low, scale.high)
    axis = svg.x_axis(scale, bottom, values, _tick(values), "gain in test accuracy, points")
    marks = (_borders(verdict, scale, bottom), axis, _interval(verdict, scale), _dots(seeds, scale))
    return svg.drawing(_describe(verdict, seeds), WIDTH, bottom + 42, *marks)


def _scale(verdict: Verdict, seeds: list[float]) -> Scale:
    gain = verdict.gain
    values = [0.0, verdict.min_gain, gain.value, gain.low, gain.high, *seeds]
    finite = [value for value in values if numbers.known(value)]
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low) or 0.01
    low, high = low - margin, high + margin
    # Room to the left of zero and to the right of the smallest useful gain, for their labels.
    low = min(low, -0.25 * high)
    high = max(high, (verdict.min_gain - 0.3 * low) / 0.7)
    return Scale(low, high, LEFT, RIGHT)


def _tick(values: list[float]) -> Callable[[float], str]:
    fine = any(abs(1000 * value - round(1000 * value)) > 1e-6 for value in values)
    return lambda value: (f"{100 * value:+.2f}" if fine else numbers.points(value)).replace("-", "−")


def _borders(verdict: Verdict, scale: Scale, bottom: float) -> Html:
    zero, useful = scale(0), scale(verdict.min_gain)
    parts = [
        svg.box((useful, TOP - 8), RIGHT - useful, bottom - TOP + 8, "useful"),
        svg.line((zero, TOP - 8), (zero, bottom), "zero"),
        svg.label((zero - 4, 14), "no difference", "tick", "end"),
    ]
    if verdict.min_gain > 0:
        parts.append(svg.line((useful, TOP - 8), (useful, bottom), "least"))
    worth = f"worth having: {numbers.points(verdict.min_gain)}" if verdict.min_gain else "a gain"
    return join([*parts, svg.label((useful + 4, 14), worth, "tick")])


def _interval(verdict: Verdict, scale: Scale) -> Html:
    gain, y = verdict.gain, TOP + 26
    text = f"{numbers.points(gain.value)}  ({numbers.points_range(gain)})"
    low, high, middle = scale(gain.low), scale(gain.high), scale(gain.value)
    parts = [
        svg.label((LEFT - 6, y + 4), "all", "strong", "end"),
        svg.box((low, y - 4), max(high - low, 1.0), 8, "interval"),
        svg.line((low, y - 7), (low, y + 7), "cap"),
        svg.line((high, y - 7), (high, y + 7), "cap"),
        svg.polygon([(middle - 7, y), (middle, y - 7), (middle + 7, y), (middle, y + 7)], "diamond"),
        svg.label((min(max((low + high) / 2, 110), 226), y - 13), text, "strong", "middle"),
    ]
    return join(parts)


def _dots(seeds: list[tuple[str, float]], scale: Scale) -> Html:
    first = TOP + BAND + 8
    parts: list[Html] = []
    for index, (name, value) in enumerate(seeds):
        y = first + (index * STEP if len(seeds) <= MOST_SEEDS else 0)
        parts.append(svg.dot((scale(value), y), 4, "seed", f"seed {name}: {numbers.points(value)} points"))
        if len(seeds) <= MOST_SEEDS:
            parts.append(svg.label((LEFT - 6, y + 4), f"seed {name}", "tick", "end"))
            parts.append(svg.label((WIDTH - 2, y + 4), numbers.points(value), "tick", "end"))
    if len(seeds) > MOST_SEEDS:
        parts.append(svg.label((LEFT - 6, first + 4), f"{len(seeds)} seeds", "tick", "end"))
    return join(parts)


def _describe(verdict: Verdict, seeds: list[tuple[str, float]]) -> str:
    each = ", ".join(f"seed {name} {numbers.points(value)}" for name, value in seeds)
    return (
        f"Gain in test accuracy: {numbers.points(verdict.gain.value)} percentage points, 95 % interval "
        f"{numbers.points_range(verdict.gain)}; smallest gain worth having {numbers.points(verdict.min_gain)}; {each}."
    )
