"""A step of several students at once, without any data or loop. Imported by `training.py` and `choice.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from understudy.config import TrainConfig
from understudy.data.batches import Batch
from understudy.distillation import Term
from understudy.errors import ConfigError
from understudy.numerics import Numerics
from understudy.stacked.networks import Networks
from understudy.stacked.objectives import Objectives, Parts, stackable
from understudy.stacked.optimizer import RowAdamW


@dataclass(frozen=True, eq=False)
class Student:
    """One student of a stack."""

    name: str
    """What messages call it."""
    network: nn.Module
    """With its initial weights; in the end it holds those of its best epoch."""
    terms: tuple[Term, ...]
    """What it minimises; `stackable`."""
    config: TrainConfig
    """All students have the same but for learning rate and weight decay."""


class Stepper:
    """What takes the steps of a stack: networks, objectives and optimizer, without any data.

    Args:
        students: at least one.
        device: where they run.
        numerics: its precision; layout and compiling are a single network's.

    Raises:
        ConfigError: the students cannot be trained together.
        ModelError: likewise.
    """

    def __init__(self, students: Sequence[Student], device: torch.device, numerics: Numerics) -> None:
        _refuse_different(students)
        self._device, self._numerics = device, numerics
        configs = [student.config for student in students]
        self.networks = Networks([student.network for student in students], device)
        self.objectives = Objectives([student.terms for student in students], device)
        self.optimizer = RowAdamW(
            self.networks.weights,
            rates=torch.tensor([config.lr for config in configs]),
            decays=torch.tensor([config.weight_decay for config in configs]),
            decayed=self.networks.are_matrices,
            clip_norm=configs[0].clip_norm,
        )

    def step(self, batch: Batch, factor: float) -> tuple[Parts, Tensor]:
        """Train on a batch at `factor` times the peak learning rates; return losses and logits, detached."""
        with self._numerics.autocast(self._device):
            logits = self.networks(batch.images)
            losses = self.objectives(logits, batch.labels, batch.teacher_logits)
        losses.total.sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(factor)
        return losses._replace(total=losses.total.detach()), logits.detach()


def _refuse_different(students: Sequence[Student]) -> None:
    alike = [student.config.model_copy(update={"lr": 1.0, "weight_decay": 0.0}) for student in students]
    if any(config != alike[0] for config in alike):
        raise ConfigError("Students that are trained together may differ in learning rate and weight decay only.")
    if not all(stackable(student.terms) for student in students):
        raise ConfigError(
            "Students that are trained together learn from labels and logits only, with weights that stay the same."
        )
