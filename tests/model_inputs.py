"""The classes and the images that tests of models build networks for."""

from __future__ import annotations

from understudy.record import InputSpec

TEN = [f"c{number}" for number in range(10)]
TWO = ["cat", "dog"]


def spec(size: int = 32, channels: int = 3) -> InputSpec:
    return InputSpec(channels=channels, sizes=(size,), mean=(0.5,), std=(0.25,))
