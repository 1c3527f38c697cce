"""Values that change while training goes on: a weight that rises, a temperature that falls. Pure Python.

Imported by the table of methods, and by whoever writes a loop of his own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["constant", "linear", "cosine", "warmup", "step"]


@dataclass(frozen=True)
class Schedule:
    """A value as a function of p, the share of training that is done.

    With q = min(p / until, 1), the share of the changing part that is done:

    - constant: v(p) = start, and end is the same.
    - linear: v(p) = start + (end - start) q.
    - cosine: v(p) = end + (start - end) (1 + cos(pi q)) / 2; flat at both ends of the changing part.
    - warmup: v(p) = end q; the rise from 0 that a strong term needs, so start is 0.
    - step: v(p) = start where p < until, else end.

        >>> Schedule("warmup", start=0.0, end=8.0, until=0.25).value(0.125)
        4.0

    Raises:
        ValueError: an unknown shape, a value that is not finite, or an end of the change outside of training.
    """

    shape: Shape
    start: float
    end: float
    until: float = 1.0
    """Share of training after which the value stays, in (0, 1]; below 1 for a step."""

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape is one of {', '.join(get_args(Shape))}, not {self.shape!r}")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"start and end must be finite, not {self.start} and {self.end}")
        if not 0 < self.until <= 1:
            raise ValueError(f"until is a share of training, above 0 and at most 1, not {self.until}")
        self._check_shape()

    def value(self, progress: float) -> float:
        """Return the value after a share of training in [0, 1].

        Raises:
            ValueError: progress is outside.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress is the share of training that is done, from 0 to 1, not {progress}")
        done = min(progress / self.until, 1.0)
        if self.shape == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2
        if self.shape == "step":
            return self.start if progress < self.until else self.end
        # a constant has no way to go, and a warm-up starts at 0. Both ends are met exactly
        return self.start * (1 - done) + self.end * done

    def _check_shape(self) -> None:
        if self.shape == "constant" and self.start != self.end:
            raise ValueError(f"a constant has the same start and end, not {self.start} and {self.end}")
        if self.shape == "warmup" and self.start != 0:
            raise ValueError(f"a warmup starts at 0, not {self.start}; say linear")
        if self.shape == "step" and self.until == 1:
            raise ValueError("a step has until below 1: at the end of training there is nothing left to change")
