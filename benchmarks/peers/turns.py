"""A turn: some steps of a loop that waits, in a process of its own, until it is called upon again.

The loop calls `Turns` after each step. Between turns that call does not return, so the training stands still and takes
no time from the others; imports and set-up are paid once and never measured.
"""

from __future__ import annotations

import json
import time
from typing import IO, Any

from _common import Quiet

SETTLE = 3  # steps at the start of each turn that are not counted: others have emptied the caches since


class Finished(Exception):  # noqa: N818
    """Nobody asks for another turn."""


class Turns:
    """Counts steps, reports turns and waits for the next; pass it as `tick`.

    Args:
        orders: one line of JSON per turn, `{"seconds": ..., "steps": ...}`: it ends when both are over.
        reports: gets one line of JSON per turn; the first, without an order, says that the loop has settled.
    """

    def __init__(self, orders: IO[str], reports: IO[str]) -> None:
        self._orders, self._reports = orders, reports
        self._seconds, self._least = 0.0, 1
        self._done = 0
        self._start = 0.0
        self._quiet = Quiet()
        self.notes: dict[str, float] = {}

    def __call__(self) -> bool:
        """Note a step; at the end of a turn, report and wait.

        Raises:
            Finished: there is no further order.
        """
        self._done += 1
        now = time.perf_counter()
        if self._done == SETTLE:
            self._start, self._quiet = now, Quiet()
        counted, seconds = self._done - SETTLE, now - self._start
        if counted >= self._least and seconds >= self._seconds:
            self.say({"step_ms": 1e3 * seconds / counted, "steps": counted, "quiet": self._quiet()})
            self._wait()
        return False

    def note(self, name: str, value: float) -> None:
        """Keep a figure of the loop's own for the last report."""
        self.notes[name] = value

    def say(self, report: dict[str, Any]) -> None:
        """Send one line."""
        self._reports.write(json.dumps(report) + "\n")
        self._reports.flush()

    def _wait(self) -> None:
        line = self._orders.readline()
        if not line.strip():
            raise Finished("no further order")  # fastai reads the first argument of what it passes on
        order = json.loads(line)
        self._seconds, self._least, self._done = order["seconds"], order["steps"], 0
