"""A linear teacher that counts what it is asked, and how tests keep its outputs: in small blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from understudy.data import outputs
from understudy.data.batches import Split
from understudy.data.outputs import Answers, Outputs, Source, Viewed, open_outputs
from understudy.data.views import POLICIES

SIDE, COUNT, BLOCK = 8, 40, 16  # three blocks, the last one short
ALL = torch.arange(COUNT)
LIGHT = POLICIES["light"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_LARGEST_BLOCK", BLOCK)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def split(count: int = COUNT, *, seed: int = 0, changed: int | None = None) -> Split:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (count, 1, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    ids = np.arange(10, 10 + count, dtype=np.uint64) * np.uint64(2**40 + 7)
    if changed is not None:
        frames[changed] = 255 - frames[changed]
        ids[changed] += 1
    labels = np.arange(count) % 3
    return Split(frames, labels, ids, np.arange(count), size=SIDE, device=torch.device("cpu"), classes=3)


class Teacher:
    """A linear teacher that counts what it is asked."""

    def __init__(self, classes: int = 3, *, seed: int = 0, gain: float = 1.0, embedding: bool = False) -> None:
        generator = torch.Generator().manual_seed(100 + seed)
        self.weight = gain * torch.randn(SIDE * SIDE, classes, generator=generator)
        self.embedding = embedding
        self.loaded = 0
        self.asked: list[int] = []

    def load(self) -> Callable[[torch.Tensor], Answers]:
        self.loaded += 1
        return self.answer

    def answer(self, images: torch.Tensor) -> Answers:
        self.asked.append(len(images))
        logits = images.flatten(1) @ self.weight
        return Answers(logits, images.mean((1, 3)) if self.embedding else None)

    def source(self, **over: Any) -> Source:
        identity = over.pop("identity", {"weights": "a"})
        return Source(identity, {"teacher": "linear"}, self.load, embedding=self.embedding, **over)

    def directly(self, viewed: Viewed, view: int) -> torch.Tensor:
        """Return the logits of a view without anything being kept."""
        drawn, pairs = viewed.split.draw(viewed.policy, seed=viewed.seed, view=view, mix=viewed.mix)
        return viewed.split.batch(torch.arange(len(viewed.split)), drawn, pairs).images.flatten(1) @ self.weight


def never() -> Callable[[torch.Tensor], Answers]:
    raise AssertionError("the teacher was loaded")


def opened(teacher: Teacher, cache: Path, viewed: Viewed | None = None, **over: Any) -> Outputs:
    return open_outputs(viewed or Viewed(split(), LIGHT, 0), teacher.source(**over), cache)


def reader(cache: Path, viewed: Viewed | None = None, **over: Any) -> Outputs:
    """Open the same outputs as another process would: the teacher must not be needed."""
    teacher = Source(over.pop("identity", {"weights": "a"}), {}, never, **over)
    return open_outputs(viewed or Viewed(split(), LIGHT, 0), teacher, cache)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2**-11, atol=1e-4)


def shuffled() -> torch.Tensor:
    return torch.randperm(COUNT, generator=torch.Generator().manual_seed(5))
