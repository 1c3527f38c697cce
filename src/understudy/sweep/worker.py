"""A process that carries out trials: descriptions come in by its standard input, a line each; replies go out likewise.

`executors.py` starts it as `python -m understudy.sweep.worker`. When the input ends, because the parent says so or
because the parent has died, it stops at the next step with a checkpoint, and ends.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from typing import TextIO

from understudy.sweep.trials import Reply, Trial, reply_to

_TELL_SECONDS = 0.5


class _Line:
    """The progress of one trial, as lines for the parent: some a second at most."""

    def __init__(self, task: str, out: TextIO) -> None:
        self._task, self._out, self._told = task, out, 0.0

    def __call__(self, task: str, /, *, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if task == self._task and now - self._told >= _TELL_SECONDS:
            self._told = now
            say(Reply(share=done / max(total, 1)), self._out)


def say(reply: Reply, out: TextIO) -> None:
    """Write a reply as one line."""
    print(reply.model_dump_json(), file=out, flush=True)


def main() -> None:
    """Carry out trials until the input ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a user's model prints is no reply
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    ended = threading.Event()
    threading.Thread(target=_listen, args=(orders, ended), daemon=True).start()
    while order := orders.get():
        trial = Trial.model_validate_json(order)
        say(reply_to(trial, ended.is_set, _Line(trial.name, out)), out)


def _listen(orders: queue.SimpleQueue[str], ended: threading.Event) -> None:
    for line in sys.stdin:
        orders.put(line)
    ended.set()
    orders.put("")


if __name__ == "__main__":
    main()
