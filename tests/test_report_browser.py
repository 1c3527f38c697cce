"""The report in a real browser: the slider, hostile names, no network, narrow windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, find
from report_page import HOSTILE, hostile_record
from sample_record import TWO, interrupted_record, sample_record, train_record
from understudy import report
from understudy.record import Record

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium on this machine")

ROWS = """[...document.querySelectorAll('.bars')].map(bars => [...bars.querySelectorAll('.row')].map(row => [
    Number(row.dataset.class),
    ...['rect.teacher', 'rect.beside'].map(one => parseFloat(row.querySelector(one).getAttribute('width'))),
    ...['.value.teacher', '.value.beside'].map(one => parseFloat(row.querySelector(one).textContent))]))"""
WIDTHS = "[document.documentElement.scrollWidth, document.body.scrollWidth]"
UNFOLD = "document.querySelectorAll('details').forEach(one => { one.open = true })"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def ten() -> Record:
    return sample_record()


def page(record: Record, folder: Path) -> Path:
    report.write(record, folder / "report.html")
    return folder / "report.html"


def complaints(browser: Browser) -> list[object]:
    """Return what the browser logged, and every address it asked for beyond the page itself and data: images."""
    browser.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
    logged = browser.named("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    dialogs = browser.named("Page.javascriptDialogOpening")
    asked = [event["request"]["url"] for event in browser.named("Network.requestWillBeSent")]
    assert asked[0].startswith("file:")
    return [*logged, *dialogs, *(url for url in asked[1:] if not url.startswith("data:image/png"))]


def softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(logit / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def check_bars(browser: Browser, record: Record, temperature: float, beside: str) -> None:
    for rows, example in zip(browser.evaluate(ROWS), record.examples, strict=True):
        both = [
            softmax(logits, temperature) for logits in (example.teacher_logits, getattr(example, f"{beside}_logits"))
        ]
        named = [int(row[0]) for row in rows if row[0] >= 0]
        likeliest = sorted(range(len(both[0])), key=lambda one: -both[0][one])
        assert named == likeliest[: len(named)]
        for index, *bars_and_texts in rows:
            chosen = [int(index)] if index >= 0 else [one for one in range(len(both[0])) if one not in named]
            expected = [100 * sum(shares[one] for one in chosen) for shares in both]
            assert bars_and_texts[:2] == pytest.approx(expected, abs=0.002)
            assert bars_and_texts[2:] == pytest.approx(expected, abs=0.0501)


def test_slider_moves_by_keyboard_and_bars_follow(browser: Browser, ten: Record, tmp_path: Path) -> None:
    browser.open(page(ten, tmp_path))
    check_bars(browser, ten, 4, "student")
    assert browser.evaluate("document.querySelector('label[for=temperature]').textContent") == "Temperature T = 4.0"
    browser.evaluate("document.getElementById('temperature').focus()")
    for key, code, temperature in (
        ("ArrowRight", 39, 4.5),
        ("Home", 36, 1.0),
        ("ArrowRight", 39, 1.5),
        ("End", 35, 20.0),
    ):
        browser.press(key, code)
        assert browser.evaluate("document.getElementById('temperature-shown').textContent") == f"{temperature:.1f}"
        check_bars(browser, ten, temperature, "student")
    assert complaints(browser) == []


def test_the_other_model_can_be_put_beside_the_teacher(browser: Browser, ten: Record, tmp_path: Path) -> None:
    browser.open(page(ten, tmp_path))
    browser.evaluate("document.querySelector('input[value=student]').focus()")
    browser.press("ArrowRight", 39)
    check_bars(browser, ten, 4, "baseline")
    assert browser.evaluate("document.querySelectorAll('rect.beside.baseline').length") == 7 * len(ten.examples)


def test_bars_drawn_without_the_script_are_the_same(browser: Browser, ten: Record, tmp_path: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page(ten, tmp_path))
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.evaluate("document.getElementById('controls').hidden") is True
    check_bars(browser, ten, 4, "student")


def test_hostile_texts_run_nothing(browser: Browser, tmp_path: Path) -> None:
    browser.open(page(hostile_record(), tmp_path))
    assert complaints(browser) == []
    assert browser.evaluate("document.querySelectorAll('img:not([src^=\"data:image/png;base64,\"])').length") == 0
    assert browser.evaluate("document.querySelector('.confusion tbody th').textContent") == HOSTILE
    assert browser.evaluate("document.title") == f"{HOSTILE} · understudy"


def test_policy_stops_what_escaping_might_miss(browser: Browser, ten: Record, tmp_path: Path) -> None:
    path = page(ten, tmp_path)
    evil = "<script>window.run = 1</script><p onclick='window.run = 2' id='evil'><img src='http://127.0.0.1:9/x'>"
    path.write_text(path.read_text(encoding="utf-8").replace("<main>", f"<main>{evil}"), encoding="utf-8")
    browser.open(path)
    browser.evaluate("document.getElementById('evil').click()")
    assert browser.evaluate("window.run") is None
    assert len([one for one in complaints(browser) if "Content Security Policy" in str(one)]) >= 3


@pytest.mark.parametrize("kind", ["ten", "two", "train", "interrupted", "hostile", "many"])
def test_no_page_is_wider_than_a_phone(browser: Browser, ten: Record, kind: str, tmp_path: Path) -> None:
    made = {
        "ten": lambda: ten,
        "two": lambda: sample_record(classes=TWO, images=90, epochs=3),
        "train": train_record,
        "interrupted": interrupted_record,
        "hostile": hostile_record,
        "many": lambda: sample_record(
            classes=[f"class number {one}" for one in range(50)], images=100, epochs=2, seeds=(0,)
        ),
    }
    browser.open(page(made[kind](), tmp_path), width=360, height=740)
    assert browser.evaluate(WIDTHS) == [360, 360]
    browser.evaluate(UNFOLD)
    assert browser.evaluate(WIDTHS) == [360, 360]
    assert complaints(browser) == []


def test_light_and_dark_differ(browser: Browser, ten: Record, tmp_path: Path) -> None:
    path = page(ten, tmp_path)
    grounds = []
    for dark in (False, True):
        browser.open(path, dark=dark)
        grounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(252, 252, 250)", "rgb(22, 24, 26)"]
