"""Students to train together, and the same ones trained one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from understudy.config import TrainConfig
from understudy.data.batches import Epochs, Split
from understudy.data.outputs import Answers
from understudy.data.views import POLICIES
from understudy.distillation import Distiller, Term, methods
from understudy.engine import Engine
from understudy.errors import TrainingError
from understudy.record import Epoch
from understudy.stacked import StackedTraining, Student
from understudy.train import Fit, Training

CONFIG = TrainConfig(epochs=3, batch_size=16, lr=0.01, warmup=0.2)
STEPS = 3 * 6
OBJECTIVES: tuple[tuple[float, float, float], ...] = ((1.0, 0.0, 1.0), (0.5, 0.5, 4.0), (0.0, 1.0, 2.0))
"""ce_weight, kd_weight, temperature."""


def net(seed: int, kind: str = "batch norm") -> nn.Sequential:
    torch.manual_seed(seed)
    statistics = kind != "batch statistics only"
    norm = [] if kind == "plain" else [nn.BatchNorm2d(4, track_running_stats=statistics)]
    drop = [nn.Dropout(0.2)] if kind == "dropout" else []
    # a bias before batch normalisation has no gradient but rounding, which AdamW would make as large as any
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=not norm), *norm, nn.ReLU(inplace=True), nn.Flatten(), *drop, nn.Linear(36 * 4, 3)
    )


def split(count: int = 90, *, seed: int = 0) -> Split:
    """Three classes that differ in where the bright half is, with noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    frames = rng.integers(0, 130, (count, 1, 8, 8))
    for frame, label in zip(frames, labels, strict=True):
        frame[0, :, 2 * label : 2 * label + 4] += 60
    ids = rng.integers(0, 2**63, count).astype(np.uint64)
    rows = np.arange(count)
    device = torch.device("cpu")
    return Split(torch.from_numpy(frames.astype(np.uint8)), labels.astype(np.int64), ids, rows, size=8, device=device)


class Kept:
    """A table of teacher outputs: the same for every view."""

    def __init__(self, images: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.logits = torch.randn(images, 3, generator=generator) + 2 * torch.eye(3)[torch.arange(images) % 3]

    def __call__(self, view: int) -> Any:
        return self

    def rows(self, positions: torch.Tensor) -> Answers:
        return Answers(self.logits[positions])


def epochs(config: TrainConfig = CONFIG) -> Epochs:
    data = split()
    return Epochs(data, policy=POLICIES["light"], view_seed=0, batch_size=config.batch_size, outputs=Kept(len(data)))


def terms(ce: float, kd: float, temperature: float) -> tuple[Term, ...]:
    return methods.terms("kd", temperature=temperature, ce_weight=ce, kd_weight=kd)


def students(
    kind: str = "batch norm", config: TrainConfig = CONFIG, *, seeds: Sequence[int] = (1, 1, 1)
) -> list[Student]:
    """Three that differ in objective, learning rate and weight decay."""
    rates, decays = (1.0, 0.5, 2.0), (0.01, 0.1, 0.0)
    return [
        Student(
            f"cell-{number}",
            net(seeds[number], kind),
            terms(*objective),
            config.model_copy(update={"lr": config.lr * rates[number], "weight_decay": decays[number]}),
        )
        for number, objective in enumerate(OBJECTIVES)
    ]


def stack(
    own: Sequence[Student], *, path: Path | None = None, stop_at: int | None = None, **more: Any
) -> StackedTraining:
    asked = iter(range(1, 10**9))
    return StackedTraining(
        own,
        epochs(own[0].config),
        split(100, seed=1),
        seed=4,
        engine=Engine(threads=1),
        path=path,
        stop=lambda: next(asked) == stop_at,
        **{"every": 1e9, **more},
    )


def alone(student: Student, **more: Any) -> Fit:
    """Train one student by `Training` on the same batches."""
    data, val = epochs(student.config), split(100, seed=1)
    objective = Distiller(None, student.network, terms=student.terms)
    training = Training(objective, data, val, student.config, seed=4, engine=Engine(threads=1), **more)
    return training.run()


def same(found: Sequence[Epoch], expected: Sequence[Epoch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.parts == pytest.approx(other.parts, abs=1e-4)
        assert one.weights == other.weights
        left_out = {"seconds", "parts", "weights"}
        assert one.model_dump(exclude=left_out) == pytest.approx(other.model_dump(exclude=left_out), abs=1e-4)


def state(student: Student) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.network.state_dict().items()}


def fitted(result: Fit | TrainingError) -> Fit:
    assert isinstance(result, Fit)
    return result
