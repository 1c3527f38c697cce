"""What the teacher knows beyond its answers: its probabilities for some test images, with a temperature to turn.

Only the report imports it. The bars are drawn here at the run's temperature; `report.js` redraws them from the logits
when the slider moves, so the page says something without its script, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from understudy.record import Example, Record
from understudy.report import numbers, roles
from understudy.report.markup import Html, data_block, escape, join, tag

COOLEST, HOTTEST, STEP = 1.0, 20.0, 0.5
MOST_BARS = 6
DIGITS = 5
BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def softened(logits: Sequence[float], temperature: float) -> list[float]:
    """Return softmax(logits / temperature), stable for logits of any size."""
    top = max(logits)
    weights = [math.exp((logit - top) / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def examples_view(record: Record) -> Html:
    """Build the cards of all examples, the slider, the choice of a model beside the teacher, and their data."""
    names = roles.classes(record)
    usable = [one for one in record.examples if _usable(one.teacher_logits, len(names))]
    start = _start(record)
    cards = [_card(number, one, names, start) for number, one in enumerate(usable)]
    data = [{"teacher": one.teacher_logits, **_others(one, len(names))} for one in usable]
    data = [{role: [round(z, DIGITS) for z in logits] for role, logits in one.items()} for one in data]
    return join([_controls(start), tag("div", {"class": "examples"}, *cards), data_block("examples-data", data)])


def usable_examples(record: Record) -> bool:
    """Return whether there is anything to show."""
    return any(_usable(one.teacher_logits, len(roles.classes(record))) for one in record.examples)


def bars_of(logits: Sequence[float]) -> list[int]:
    """Return the classes that get a bar: the likeliest ones, likeliest first."""
    return sorted(range(len(logits)), key=lambda one: -logits[one])[:MOST_BARS]


def _usable(logits: Sequence[float], classes: int) -> bool:
    return len(logits) == classes > 0 and all(math.isfinite(logit) for logit in logits)


def _others(example: Example, classes: int) -> dict[str, list[float]]:
    both = {"student": example.student_logits, "baseline": example.baseline_logits}
    return {role: logits for role, logits in both.items() if _usable(logits, classes)}


def _start(record: Record) -> float:
    wanted = record.objective.temperature if record.objective else 4.0
    wanted = wanted if math.isfinite(wanted) else 4.0
    return min(HOTTEST, max(COOLEST, round(wanted / STEP) * STEP))


def _controls(start: float) -> Html:
    limits = {"min": f"{COOLEST:g}", "max": f"{HOTTEST:g}", "step": f"{STEP:g}", "value": f"{start:g}"}
    slider = tag("input", {"type": "range", "id": "temperature", **limits, "aria-describedby": "dark-help"})
    shown = tag("output", {"id": "temperature-shown", "for": "temperature"}, f"{start:.1f}")
    caption = tag("label", {"for": "temperature"}, "Temperature T = ", shown)
    choices = [_choice("student", "distilled student", True), _choice("baseline", "student alone", False)]
    beside = tag(
        "fieldset", None, tag("legend", None, tag("span", {"class": "key teacher"}), " teacher, and below it"), *choices
    )
    return tag(
        "div", {"class": "controls", "id": "controls", "hidden": True}, tag("div", None, caption, slider), beside
    )


def _choice(value: str, text: str, checked: bool) -> Html:
    button = tag("input", {"type": "radio", "name": "beside", "value": value, "checked": checked})
    return tag("label", {"class": value}, button, f" {text}")


def _card(number: int, example: Example, names: list[str], temperature: float) -> Html:
    known = example.label is not None and 0 <= example.label < len(names)
    truth = names[example.label] if known and example.label is not None else "unknown"
    caption = tag("p", {"class": "truth"}, "True label: ", tag("strong", None, truth))
    name = tag("p", {"class": "file", "title": example.name}, example.name)
    bars = _bars(number, example, names, temperature)
    return tag("article", {"class": "card"}, _image(example, truth), tag("div", None, caption, name), bars)


def _image(example: Example, truth: str) -> Html | None:
    if not BASE64.fullmatch(example.png):
        return None
    return tag("img", {"src": f"data:image/png;base64,{example.png}", "alt": f"Test image, {truth}"})


def _bars(number: int, example: Example, names: list[str], temperature: float) -> Html:
    teacher = softened(example.teacher_logits, temperature)
    other = _others(example, len(names)).get("student")
    beside = softened(other, temperature) if other else None
    shown = bars_of(example.teacher_logits)
    rows = [
        _bar_row(one, names[one], teacher[one], beside[one] if beside else None, one == example.label) for one in shown
    ]
    left = len(names) - len(shown)
    if left:
        rest = 1 - sum(teacher[one] for one in shown), 1 - sum(beside[one] for one in shown) if beside else None
        rows.append(_bar_row(-1, f"{left:,} other{'s' if left > 1 else ''}", rest[0], rest[1], False))
    return tag("div", {"class": "bars", "data-example": str(number)}, *rows)


def _bar_row(index: int, name: str, teacher: float, beside: float | None, true: bool) -> Html:
    bars = tag(
        "svg",
        {"class": "pair", "aria-hidden": "true"},
        _bar("teacher", teacher, 1, 7),
        _bar("beside student", beside or 0, 10, 5),
    )
    said = [
        tag("span", {"class": "value teacher"}, numbers.percent(teacher)),
        tag("span", {"class": "value beside"}, numbers.percent(beside)),
    ]
    label = tag("span", {"class": "class true" if true else "class", "title": name}, name)
    return Html(f'<div class="row" data-class="{index}">{label}{bars}<span class="values">{join(said)}</span></div>')


def _bar(style: str, share: float, y: int, height: int) -> Html:
    width = f"{100 * max(0.0, share):.3f}%"
    return Html(f'<rect class="{escape(style)}" x="0" y="{y}" width="{width}" height="{height}" rx="1"></rect>')
