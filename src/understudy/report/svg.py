"""A few functions for drawings: scales, axes, marks; accessible SVG that takes its colours from the page's style.

Only the report imports it. Coordinates are in the drawing's own units, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from understudy.report.markup import Attributes, Child, Html, tag

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """A linear map from values `low..high` to places `start..end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the place of `value`, kept within the drawing."""
        span = self.high - self.low or 1.0
        share = min(1.0, max(0.0, (value - self.low) / span))
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round values from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def drawing(label: str, width: float, height: float, *marks: Child) -> Html:
    """Put marks into an image that has a name for those who cannot see it."""
    box = {"role": "img", "aria-label": label, "viewBox": f"0 0 {width:g} {height:g}", "class": "drawing"}
    return tag("svg", box, tag("title", None, label), *marks)


def line(start: Point, end: Point, style: str) -> Html:
    """Draw a straight line."""
    return tag("line", {"x1": start[0], "y1": start[1], "x2": end[0], "y2": end[1], "class": style})


def box(corner: Point, width: float, height: float, style: str, title: str | None = None) -> Html:
    """Draw a rectangle; `corner` is its upper left one."""
    place: Attributes = {"x": corner[0], "y": corner[1], "width": width, "height": height, "class": style}
    return tag("rect", place, tag("title", None, title) if title else None)


def dot(centre: Point, radius: float, style: str, title: str | None = None) -> Html:
    """Draw a disc; `title` shows while the pointer rests on it."""
    place: Attributes = {"cx": centre[0], "cy": centre[1], "r": radius, "class": style}
    return tag("circle", place, tag("title", None, title) if title else None)


def polyline(points: Iterable[Point], style: str) -> Html:
    """Draw a line through points."""
    return tag("polyline", {"points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points), "class": style})


def polygon(points: Iterable[Point], style: str) -> Html:
    """Draw a filled shape."""
    return tag("polygon", {"points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points), "class": style})


def label(place: Point, text: str, style: str = "", anchor: str = "start") -> Html:
    """Write text; `anchor` is start, middle or end."""
    return tag("text", {"x": place[0], "y": place[1], "class": style or None, "text-anchor": anchor}, text)


def x_axis(scale: Scale, y: float, values: Sequence[float], write: Callable[[float], str], name: str) -> Html:
    """Draw a horizontal axis at height `y`: ticks, their values and the axis' name."""
    marks = [line((scale(value), y), (scale(value), y + 4), "axis") for value in values]
    texts = [label((scale(value), y + 17), write(value), "tick", "middle") for value in values]
    middle = (scale.start + scale.end) / 2
    named = label((middle, y + 34), name, "name", "middle")
    return Html("".join((line((scale.start, y), (scale.end, y), "axis"), *marks, *texts, named)))


def y_axis(scale: Scale, x: float, width: float, values: Sequence[float], write: Callable[[float], str]) -> Html:
    """Draw grid lines from `x` over `width`, with their values to the left."""
    grid = [line((x, scale(value)), (x + width, scale(value)), "grid") for value in values]
    texts = [label((x - 6, scale(value) + 4), write(value), "tick", "end") for value in values]
    return Html("".join((*grid, *texts)))
