"""What a report is made of: numbers as text, markup and its escaping, drawings to scale, and colours."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from report_page import NAN, Page, ten
from sample_record import sample_record
from understudy import record as records
from understudy import report
from understudy.record import Bin, Record
from understudy.report import examples, figures, gain, markup, numbers, perclass, roles, svg
from understudy.report.notes import notes

__all__ = ["ten"]  # a fixture

# Numbers


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (numbers.percent(0.91249), "91.2 %"),
        (numbers.percent(None), "—"),
        (numbers.percent(NAN), "—"),
        (numbers.points(0.018), "+1.8"),
        (numbers.points(-0.018), "−1.8"),
        (numbers.points(-0.0004), "0.0"),
        (numbers.points(math.inf), "—"),
        (numbers.amount(999), "999"),
        (numbers.amount(277_034), "277 k"),
        (numbers.amount(11_181_642), "11.2 M"),
        (numbers.amount(999_600), "1.00 M"),
        (numbers.size(0), "0 B"),
        (numbers.size(1_112_904), "1.11 MB"),
        (numbers.milliseconds(0.0042), "0.0042 ms"),
        (numbers.milliseconds(0.2881), "0.288 ms"),
        (numbers.milliseconds(129.4), "129 ms"),
        (numbers.milliseconds(0), "0 ms"),
        (numbers.duration(3.21), "3.2 s"),
        (numbers.duration(312), "5 min 12 s"),
        (numbers.duration(3900), "1 h 05 min"),
        (numbers.times(41.2, "smaller", "larger"), "×41 smaller"),
        (numbers.times(0.5, "smaller", "larger"), "×2.0 larger"),
        (numbers.times(1.01, "smaller", "larger"), "same"),
        (numbers.times(None, "smaller", "larger"), ""),
        (numbers.count(1, "image"), "1 image"),
        (numbers.count(1204, "image"), "1,204 images"),
    ],
)
def test_numbers_as_text(written: str, expected: str) -> None:
    assert written.replace("\u00a0", " ") == expected


# Markup


def test_text_is_escaped_and_markup_is_not() -> None:
    inner = markup.tag("b", None, "x<y")
    built = markup.tag("p", {"title": '"><script>', "hidden": True, "id": None, "width": 1.25}, "a & b ", inner)
    assert built == '<p title="&quot;&gt;&lt;script&gt;" hidden width="1.25">a &amp; b <b>x&lt;y</b></p>'


@given(st.text())
def test_escaping_keeps_the_text_and_lets_no_markup_through(text: str) -> None:
    inside: list[str] = []
    parser = HTMLParser()
    parser.handle_data = inside.append  # type: ignore[method-assign]
    parser.feed(markup.escape(text))
    parser.close()
    assert not set("<>\"'") & set(markup.escape(text))
    assert "".join(inside) == text


def test_a_name_that_utf8_cannot_hold_does_not_break_the_page() -> None:
    assert markup.escape("caf\udce9").encode() == b"caf?"


@given(st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_embedded_json_means_the_same_and_cannot_end_its_element(value: object) -> None:
    block = markup.data_block("x", value)
    inner = block.removeprefix('<script type="application/json" id="x">').removesuffix("</script>")
    assert not set("<>&\u2028\u2029") & set(inner)
    assert json.loads(inner) == value


# What is drawn


def numbers_of(markup_text: str, element: str, style: str, *names: str) -> list[tuple[float, ...]]:
    """Return attributes of the elements of one class, as numbers."""
    found = [one for one in Page(f"<i>{markup_text}</i>").all(element) if one.get("class") == style]
    return [tuple(float(one[name] or "nan") for name in names) for one in found]


@pytest.mark.parametrize("values", [(0.018, 0.009, 0.027), (-0.02, -0.05, 0.01), (0.0, 0.0, 0.0), (0.4, 0.1, 0.7)])
def test_the_verdict_is_drawn_to_scale(ten: Record, values: tuple[float, float, float]) -> None:
    assert ten.verdict is not None
    value, low, high = values
    interval = records.Interval(value=value, low=low, high=high)
    seeds = {"0": low, "1": value, "2": high}
    drawn = gain.gain_figure(ten.verdict.model_copy(update={"gain": interval, "per_seed": seeds, "min_gain": 0.005}))
    [(zero,)] = numbers_of(drawn, "line", "zero", "x1")
    [(least,)] = numbers_of(drawn, "line", "least", "x1")
    caps = [x for (x,) in numbers_of(drawn, "line", "cap", "x1")]
    dots = [x for (x,) in numbers_of(drawn, "circle", "seed", "cx")]
    per_point = (least - zero) / 0.005
    rounding = 0.05 + 0.02 / 0.005 * max(map(abs, values))
    assert zero < least
    assert caps == pytest.approx([zero + per_point * low, zero + per_point * high], abs=rounding)
    assert dots == pytest.approx([caps[0], zero + per_point * value, caps[1]], abs=rounding)
    assert all(0 <= x <= gain.WIDTH for x in (zero, least, *caps, *dots))
    labels = re.findall(r'<text x="([\d.]+)" y="[\d.]+" class="tick" text-anchor="middle">([^<]*)<', drawn)
    written = {float(text.replace("−", "-")) / 100: float(x) for x, text in labels}
    assert len(written) >= 3
    assert list(written.values()) == pytest.approx([zero + per_point * one for one in written], abs=rounding)


def test_many_seeds_share_a_line(ten: Record) -> None:
    assert ten.verdict is not None
    seeds = {str(seed): 0.001 * seed for seed in range(30)}
    drawn = gain.gain_figure(ten.verdict.model_copy(update={"per_seed": seeds}))
    assert len(numbers_of(drawn, "circle", "seed", "cx")) == 30
    assert len(set(numbers_of(drawn, "circle", "seed", "cy"))) == 1
    assert "30 seeds" in drawn


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_few(low: float, span: float) -> None:
    values = svg.ticks(low, low + span)
    assert len(values) <= 12
    slack = 1e-6 * (1 + abs(low) + span)
    assert all(low - slack <= value <= low + span + slack for value in values)
    assert values == sorted(set(values)) or span < 1e-5


def test_mean_curve_is_the_mean_where_all_seeds_are() -> None:
    curves = [[(1.0, 0.2), (2.0, 0.4), (3.0, 0.9)], [(1.0, 0.4), (2.0, 0.8)]]
    assert figures.mean_curve(curves) == [(1.0, pytest.approx(0.3)), (2.0, pytest.approx(0.6))]
    assert figures.mean_curve([]) == []


def test_curves_draw_every_seed_and_their_mean(ten: Record) -> None:
    first, *_ = figures.curve_panels(ten)
    assert first.count("curve thin student") == 3
    assert first.count('class="curve student"') == 1
    assert first.count('class="curve teacher"') == 1


def test_reliability_pools_images_not_bins(ten: Record) -> None:
    pooled = roles.reliability(ten, "student")
    for index, one in enumerate(pooled):
        parts = [test.reliability[index] for test in roles.measured(ten, "student")]
        images = [(part.confidence, part.accuracy) for part in parts for _ in range(part.count)]
        assert one.count == len(images)
        if images:
            assert one.confidence == pytest.approx(sum(pair[0] or 0 for pair in images) / len(images))
            assert one.accuracy == pytest.approx(sum(pair[1] or 0 for pair in images) / len(images))
    assert sum(one.count for one in pooled) == 3 * 600


def test_an_empty_bin_is_counted_and_not_drawn(ten: Record) -> None:
    assert roles.reliability(ten, "teacher")[0] == Bin(low=0, high=1 / 15, count=0, confidence=None, accuracy=None)
    teacher = figures.reliability_panels(ten)[0]
    assert teacher.count("<circle") == sum(one.count > 0 for one in roles.reliability(ten, "teacher"))
    assert teacher.count('class="bar teacher"') == 15


def test_confusion_adds_seeds_up(ten: Record) -> None:
    together = roles.confusion(ten, "baseline")
    parts = [model.test.confusion for model in ten.models.values() if model.role == "baseline" and model.test]
    assert together[2][5] == sum(part[2][5] for part in parts)
    assert sum(map(sum, together)) == 3 * 600
    assert f">{together[2][2]:,}</td>" in perclass.confusion_tables(ten)[1]


def test_the_most_confused_classes_are_those_with_most_mistakes() -> None:
    names = [f"c{number}" for number in range(30)]
    record = sample_record(classes=names, images=120, epochs=2, seeds=(0,))
    mistakes = [
        sum(
            matrix[one][other] + matrix[other][one]
            for role in records.ROLES
            for matrix in [roles.confusion(record, role)]
            for other in range(30)
            if other != one
        )
        for one in range(30)
    ]
    shown_classes = perclass.most_confused(record)
    hidden = set(range(30)) - set(shown_classes)
    assert len(shown_classes) == perclass.MOST
    assert shown_classes == sorted(shown_classes)
    assert min(mistakes[one] for one in shown_classes) >= max(mistakes[one] for one in hidden)


@given(st.lists(st.floats(-500, 500), min_size=2, max_size=8), st.floats(1, 20))
def test_softened_probabilities(logits: list[float], temperature: float) -> None:
    shares = examples.softened(logits, temperature)
    assert sum(shares) == pytest.approx(1)
    for one, other in zip(range(len(logits) - 1), range(1, len(logits)), strict=True):
        if min(shares[one], shares[other]) > 1e-300:
            expected = (logits[one] - logits[other]) / temperature
            assert math.log(shares[one] / shares[other]) == pytest.approx(expected, abs=1e-6)


def test_notes_put_the_heaviest_first(ten: Record) -> None:
    refusal = records.Finding(check="chance", ok=False, severity="refuse", text="No better than chance.")
    found = notes(ten.model_copy(update={"gate": [*ten.gate, refusal]}))
    assert [note.level for note in found] == ["stop", "warn", "warn", "warn", "info"]
    assert found[0].text == "No better than chance."


# Colours


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_enough_contrast_in_light_and_dark() -> None:
    css = (Path(report.__file__).parent / "report.css").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    )
    for theme in (light, dark):
        for ground in (theme["page"], theme["panel"]):
            for name in ("ink", "soft", "teacher", "baseline", "student", "good", "bad", "open"):
                high, low = sorted((_luminance(theme[name]), _luminance(ground)), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, f"{name} on {ground}"
