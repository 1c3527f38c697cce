"""Progress on a screen, or as lines in a log: what the command line gives to long work."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_SECONDS = 15.0


class Screen(Console):
    """A console that falls silent when whoever read the output has gone: the work behind it goes on."""

    def on_broken_pipe(self) -> None:
        """Write nowhere from now on; the default ends the program."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """A `progress.Progress` with a bar and the time left for every task.

    Where the output is no terminal, a line is printed when a task ends, and every 15 seconds before.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("[bold]{task.description:<13}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            TextColumn("after"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),  # names of files are no markup
            console=console,
            transient=False,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._spoken: dict[str, float] = {}
        self._live = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pause()

    def pause(self) -> None:
        """Leave the bars as they are, so that something else can be printed."""
        if self._live:
            self._bars.stop()
            self._live = False
            for bar in self._tasks.values():  # what is drawn stays; it must not be drawn again
                self._bars.remove_task(bar)
            self._tasks.clear()

    def __call__(self, task: str, /, *, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` units of `task` are done."""
        if self._console.is_terminal:
            self._draw(task, done, total, note)
        else:
            self._speak(task, done, total, note)

    def _draw(self, task: str, done: int, total: int, note: str) -> None:
        if not self._live:
            self._bars.start()
            self._live = True
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total, completed=done, note=note)
        self._bars.update(self._tasks[task], completed=done, total=total, note=note)

    def _speak(self, task: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        begun, first = self._begun.setdefault(task, (now, done))  # a resumed task does not begin at 0
        if done < total and now - self._spoken.setdefault(task, now) < _LINE_SECONDS:
            return
        self._spoken[task] = now
        spent = now - begun
        left = "" if done >= total or done <= first else f", {spent / (done - first) * (total - done):.0f} s left"
        share = 100 * done / max(total, 1)
        line = f"{task}: {share:.0f} % after {spent:.1f} s{left}  {note}".rstrip()
        self._console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
