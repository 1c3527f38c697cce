"""How long work says where it is; every part of the package may import this file.

Long-running functions take a `Progress` and call it with what is done so far. Who displays it (`cli.py`) works out
the speed and the time left; the functions know nothing of screens.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as `progress("decode", done=120, total=5856, note="3 skipped")`, as often as convenient."""

    def __call__(self, task: str, /, *, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` units of `task` are done; `done == total` ends the task."""


def silent(task: str, /, *, done: int, total: int, note: str = "") -> None:
    """Display nothing: the default for library users."""
