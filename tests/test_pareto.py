"""The picture of accuracy against cost: the front, what may be compared, names that can be read, a file that is XML."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from browser import Browser, find
from compressed_record import RUNTIME, compressed_record, form
from report_page import HOSTILE, Page
from sample_record import sample_record, train_record
from understudy.record import Interval, Latency
from understudy.report import labels, pareto
from understudy.report.labels import Spot
from understudy.report.pareto import Point

SVG = "{http://www.w3.org/2000/svg}"
few = st.integers(0, 6)  # so few values that ties are common


def slow_front(pairs: list[tuple[float, float]]) -> set[int]:
    """Compare every pair with every other one."""

    def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] >= other[0] and one[1] <= other[1] and one != other

    return {place for place, pair in enumerate(pairs) if not any(dominates(other, pair) for other in pairs)}


def point(name: str, accuracy: float, size: int, *latencies: Latency, style: str = "stage") -> Point:
    exact = Interval(value=accuracy, low=accuracy, high=accuracy)
    return Point(name=name, style=style, accuracy=exact, bytes=size, latencies=latencies)


def timed(runtime: str, milliseconds: float, threads: int = 1, batch: int = 1) -> Latency:
    return Latency(runtime=runtime, threads=threads, runs=9, p50=milliseconds, p95=2 * milliseconds, batch=batch)


@given(st.lists(st.tuples(few.map(float), few.map(float)), max_size=12))
def test_the_front_is_what_nothing_dominates(pairs: list[tuple[float, float]]) -> None:
    kept = pareto.front(pairs)
    assert set(kept) == slow_front(pairs)
    assert len(kept) == len(set(kept))
    assert [pairs[place][1] for place in kept] == sorted(pairs[place][1] for place in kept)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1e-3, 1e9)), max_size=12))
def test_the_front_of_any_numbers(pairs: list[tuple[float, float]]) -> None:
    assert set(pareto.front(pairs)) == slow_front(pairs)


def test_points_of_a_compressed_run() -> None:
    record = compressed_record()
    shown = {one.name: one for one in pareto.points(record)}
    assert list(shown) == ["teacher", "alone", "distilled", "pruned", "int8-ptq (refused)", "int8-qat"]
    assert [one.style for one in shown.values()] == ["teacher", "baseline", "student", "stage", "stage", "stage"]
    for one, row in zip(shown.values(), record.compressed, strict=True):
        assert (one.accuracy, one.bytes, one.latencies) == (row.accuracy, row.bytes, (row.latency,))


def test_points_of_a_run_that_was_not_compressed() -> None:
    record = sample_record()
    shown = pareto.points(record)
    assert [one.name for one in shown] == ["teacher", "alone", "distilled"]
    assert [one.accuracy for one in shown] == [record.summary[role].accuracy for role in record.summary]
    assert len(pareto.points(train_record())) == 1
    assert pareto.panels(pareto.points(train_record())) == []
    assert pareto.picture([], "nothing") == ""


def test_a_form_without_accuracy_is_no_point_and_one_without_latency_is_not_in_that_panel() -> None:
    record = compressed_record()
    waiting = form("waiting", "pruned", None, size=5, milliseconds=0.1)
    untimed = waiting.model_copy(update={"name": "untimed", "latency": timed("not measured yet", 0.0)})
    untimed.latency.runs = 0
    record.compressed += [waiting.model_copy(update={"accuracy": None}), untimed]
    shown = pareto.points(record)
    assert "waiting" not in [one.name for one in shown]
    assert shown[-1].latencies == ()
    assert "untimed" in pareto.aside(shown)


def test_latencies_of_different_runtimes_do_not_meet() -> None:
    shown = [
        point("teacher", 0.9, 900, timed("PyTorch eager", 9.0), style="teacher"),
        point("alone", 0.7, 300, timed("PyTorch eager", 3.0), style="baseline"),
        point("distilled", 0.8, 300, timed("PyTorch eager", 3.0), timed(RUNTIME, 0.3), style="student"),
        point("pruned", 0.75, 100, timed(RUNTIME, 0.1)),
        point("two threads", 0.75, 100, timed(RUNTIME, 0.05, threads=2)),
        point("a batch", 0.75, 100, timed(RUNTIME, 0.9, batch=8)),
        point("elsewhere", 0.75, 100, timed("LiteRT 2", 0.2)),
    ]
    latency, size = pareto.panels(shown)
    assert RUNTIME in latency
    assert "eager" not in latency
    assert [name for name in ("distilled: ", "pruned: ") if name not in latency] == []
    for other in ("teacher", "alone", "two threads", "a batch", "elsewhere"):
        assert f"{other}: " not in latency
        assert f"{other}: " in size
    assert pareto.aside(shown).endswith("teacher, alone, two threads, a batch, elsewhere.")
    assert pareto.aside(shown).startswith(f"Not timed on {RUNTIME}")


def test_without_forms_the_runtime_of_most_models_is_shown() -> None:
    latency, _ = pareto.panels(pareto.points(sample_record()))
    assert "one image, PyTorch eager, 1" in latency
    assert pareto.aside(pareto.points(sample_record())) == ""


def test_the_front_is_marked_and_told() -> None:
    shown = [point("cheap", 0.7, 10), point("worse", 0.6, 20), point("good", 0.9, 30)]
    (panel,) = pareto.panels(shown)
    page = Page(panel)
    styles = [attributes["class"] for attributes in page.all("circle")]
    assert styles[:3] == ["point stage best", "point stage", "point stage best"]
    assert "On the Pareto front, the cheapest first: cheap, good." in panel
    corners = next(one["points"] for one in page.all("polyline") if one["class"] == "front")
    assert corners is not None
    (_, low), (middle, kept), (right, high) = (tuple(map(float, pair.split(","))) for pair in corners.split())
    assert (kept, middle) == (low, right)  # a step: nothing was measured between two models
    assert high < low


def test_the_picture_is_xml_with_names_for_those_who_cannot_see_it() -> None:
    shown = [point(HOSTILE, 0.9, 900), point("</svg><script>x</script>", 0.8, 300)]
    root = ElementTree.fromstring(pareto.picture(shown, HOSTILE))
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    title, desc = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None
    assert desc is not None
    assert title.text == HOSTILE
    assert HOSTILE in (desc.text or "")
    assert not [one for one in root.iter() if one.tag == f"{SVG}script"]


def test_both_panels_fit_side_by_side() -> None:
    root = ElementTree.fromstring(pareto.picture(pareto.points(compressed_record()), "both"))
    assert root.get("viewBox") == f"0 0 {2 * pareto.WIDTH:g} {pareto.HEIGHT + 46:g}"
    assert [one.get("transform") for one in root.iter(f"{SVG}g")] == ["translate(0 46)", "translate(430 46)"]


@given(st.lists(st.floats(1e-4, 1e10), min_size=2, max_size=6))
def test_every_cost_lies_between_the_ends_of_the_axis_and_has_ticks(costs: list[float]) -> None:
    scale = pareto._cost_scale(costs)
    assert scale.low < math.log10(min(costs))
    assert math.log10(max(costs)) < scale.high
    ticks = pareto.log_ticks(scale.low, scale.high)
    assert 1 <= len(ticks) <= 7
    assert all(scale.low <= tick <= scale.high for tick in ticks)


def test_ticks_are_round() -> None:
    assert [round(10**tick, 6) for tick in pareto.log_ticks(-1.05, 0.75)] == [0.1, 0.2, 0.5, 1, 2, 5]
    assert [round(10**tick, 6) for tick in pareto.log_ticks(-2.05, 0.55)] == [0.01, 0.03, 0.1, 0.3, 1, 3]
    assert [pareto.round_size(value).replace("\u00a0", " ") for value in (1e6, 3e5, 10.0)] == ["1 MB", "300 kB", "10 B"]


def test_names_keep_clear_of_one_another_and_of_the_points() -> None:
    places = [(110.0, 217.0), (140.0, 215.0), (111.0, 245.0), (182.0, 206.0), (182.0, 263.0), (388.0, 90.0)]
    names = ["int8-qat", "pruned", "int8-ptq (refused)", "distilled", "alone", "teacher"]
    spots = [Spot(place, name, (place[1], place[1])) for place, name in zip(places, names, strict=True)]
    frame = (40.0, 2.0, 428.0, 290.0)
    written = labels.place(spots, frame)
    assert [one.text for one in written] == names
    boxes = [one.box for one in written]
    for number, box in enumerate(boxes):
        assert all(labels.overlap(box, other) == 0 for other in boxes[:number])
        assert all(labels.overlap(box, labels._around(place)) == 0 for place in places)
        assert labels.overlap(box, frame) == pytest.approx(labels.overlap(box, box))
        gaps = [labels._distance(box, place) for place in places]
        assert gaps.index(min(gaps)) == number  # no name is nearer to another point


def test_two_models_in_one_place_and_a_name_without_end() -> None:
    written = labels.place([Spot((200, 100), "a", (90, 110)), Spot((200, 100), "b" * 200, (90, 110))], (0, 0, 430, 290))
    assert labels.overlap(written[0].box, written[1].box) == 0
    assert len(written[1].text) == labels.LONGEST
    assert written[1].text.endswith("…")


@pytest.mark.skipif(find() is None, reason="no Chromium on this machine")
@pytest.mark.slow
def test_a_browser_shows_the_picture_as_it_is_laid_out(tmp_path: Path) -> None:
    path = tmp_path / "pareto.svg"
    path.write_text(pareto.picture(pareto.points(compressed_record()), "both"), encoding="utf-8")
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(path, width=900, height=420)
        outside = browser.evaluate(
            "[...document.querySelectorAll('text')].filter(one => { const box = one.getBoundingClientRect(); "
            "const all = document.documentElement.getBoundingClientRect(); "
            "return box.right > all.right + 1 || box.left < all.left - 1 || box.bottom > all.bottom + 1 })"
            ".map(one => one.textContent)"
        )
        assert outside == []
        covering = browser.evaluate(
            "(() => { const boxes = [...document.querySelectorAll('text.direct')]"
            ".map(one => one.getBoundingClientRect()); "
            "return boxes.filter((a, i) => boxes.some((b, j) => i < j && a.left < b.right && b.left < a.right && "
            "a.top + 3 < b.bottom && b.top + 3 < a.bottom)).length })()"
        )
        assert covering == 0
        colours = "[...document.querySelectorAll('.point.student')].map(one => getComputedStyle(one).stroke)"
        light = browser.evaluate(colours)
        browser.open(path, width=900, height=420, dark=True)
        dark = browser.evaluate(colours)
        assert len(light) == 2
        assert light != dark
    finally:
        browser.close()
