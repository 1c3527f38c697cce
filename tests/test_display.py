"""What is shown of long work: lines in a log, bars on a terminal, and names of files as they are."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from understudy import display
from understudy.display import Display
from understudy.progress import Progress, silent


class _Clock:
    """A time that passes when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    own = _Clock()
    monkeypatch.setattr(display, "time", own)
    return own


class _Log:
    """A display whose output is no terminal."""

    def __init__(self, width: int = 80) -> None:
        self.file = io.StringIO()
        self.show = Display(Console(file=self.file, width=width, force_terminal=False, _environ={}))

    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


def _screen(file: io.StringIO) -> Display:
    environment = {"TERM": "xterm"}
    return Display(Console(file=file, width=120, force_terminal=True, legacy_windows=False, _environ=environment))


def _plain(text: str) -> str:
    """Remove colours and movements of the cursor; every drawing begins a line."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r", "\n"))


NAMES = ["a[b].png", "[red]x[/red].png", "[/].png", r"C:\[x].png", r"\[red]x.png", ":heart:.png", "100 %", "{task}"]


# --- a log -----------------------------------------------------------------------------------------------------------


def test_a_line_when_a_task_ends(clock: _Clock) -> None:
    log = _Log()
    log.show("decode", done=1, total=50)
    clock.now += 2.25
    log.show("decode", done=50, total=50, note="3 skipped")
    log.show("train", done=9, total=9)
    assert log.lines() == ["decode: 100 % after 2.2 s  3 skipped", "train: 100 % after 0.0 s"]


def test_a_line_every_15_seconds_with_the_time_left(clock: _Clock) -> None:
    log = _Log()
    for second in range(41):
        log.show("train", done=second * 10, total=1000, note=f"epoch {second // 10}")
        clock.now += 1
    assert log.lines() == [
        "train: 15 % after 15.0 s, 85 s left  epoch 1",
        "train: 30 % after 30.0 s, 70 s left  epoch 3",
    ]


def test_the_time_left_of_a_resumed_task_counts_what_was_done_now(clock: _Clock) -> None:
    log = _Log()
    log.show("train", done=900, total=1000)
    clock.now += 20
    log.show("train", done=910, total=1000)
    assert log.lines() == ["train: 91 % after 20.0 s, 180 s left"]


def test_no_time_left_where_nothing_is_done_yet(clock: _Clock) -> None:
    log = _Log()
    log.show("decode", done=0, total=10, note="another process is at it")
    clock.now += 20
    log.show("decode", done=0, total=10, note="another process is at it")
    assert log.lines() == ["decode: 0 % after 20.0 s  another process is at it"]


def test_tasks_are_timed_apart(clock: _Clock) -> None:
    log = _Log()
    log.show("one", done=1, total=10)
    clock.now += 10
    log.show("two", done=1, total=10)
    clock.now += 10
    log.show("one", done=6, total=10)
    log.show("two", done=6, total=10)
    assert log.lines() == ["one: 60 % after 20.0 s, 16 s left"]


@pytest.mark.parametrize("name", NAMES)
def test_names_stand_in_a_log_as_they_are(name: str) -> None:
    log = _Log()
    log.show("decode", done=2, total=2, note=name)
    assert log.lines() == [f"decode: 100 % after 0.0 s  {name}"]


def test_a_long_line_stays_one_line() -> None:
    log = _Log(width=40)
    note = "word " * 30 + "end"
    log.show("decode", done=2, total=2, note=note)
    assert log.lines() == [f"decode: 100 % after 0.0 s  {note}"]


def test_a_log_holds_no_codes_for_terminals() -> None:
    log = _Log()
    with log.show as show:
        show("train", done=1, total=2)
        show("train", done=2, total=2, note="val 91.5%")
    assert "\x1b" not in log.file.getvalue()


# --- a terminal ------------------------------------------------------------------------------------------------------


def test_a_terminal_gets_a_bar(clock: _Clock) -> None:
    file = io.StringIO()
    with _screen(file) as show:
        show("decode", done=1, total=4, note="1 skipped")
    text = _plain(file.getvalue())
    assert re.search(r"decode .* 25 % left .* after 0:00:00 +1 skipped", text)
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1  # the cursor comes back


def test_the_last_drawing_shows_the_end() -> None:
    file = io.StringIO()
    with _screen(file) as show:
        for done in range(1, 11):
            show("train", done=done, total=10, note=f"epoch {done}")
    last = _plain(file.getvalue()).strip().splitlines()[-1]
    assert re.search(r"train .* 100 % left .*epoch 10", last)


@pytest.mark.parametrize("name", NAMES)
def test_names_stand_on_a_terminal_as_they_are(name: str) -> None:
    file = io.StringIO()
    with _screen(file) as show:
        show("decode", done=1, total=2, note=name)
    last = _plain(file.getvalue()).strip().splitlines()[-1]
    assert last.endswith(f"after 0:00:00 {name}")


def test_what_was_drawn_before_a_pause_is_not_drawn_again() -> None:
    file = io.StringIO()
    with _screen(file) as show:
        show("decode", done=2, total=2)
        show.pause()
        file.write("the plan")
        show.pause()  # once more does no harm
        show("train", done=1, total=2)
    before, after = _plain(file.getvalue()).split("the plan")
    assert "decode" in before
    assert "train" in after
    assert "decode" not in after


def test_a_pause_before_anything_is_shown() -> None:
    file = io.StringIO()
    with _screen(file) as show:
        show.pause()
    assert file.getvalue() == ""


def test_the_bars_are_left_in_order_when_work_fails() -> None:
    file = io.StringIO()

    def work() -> None:
        with _screen(file) as show:
            show("train", done=1, total=2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert file.getvalue().count("\x1b[?25h") == 1


def test_both_ways_to_tell_of_progress_are_progress(capsys: pytest.CaptureFixture[str]) -> None:
    ways: list[Progress] = [silent, _Log().show]
    for way in ways:
        way("decode", done=1, total=1)
    assert capsys.readouterr() == ("", "")
