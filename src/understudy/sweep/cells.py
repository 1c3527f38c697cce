"""The cells of a sweep: which combinations of settings there are, and which of them are one and the same training.

Imported by the other files of this folder.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from understudy.config import DistillConfig, RunConfig, SweepConfig, TrainConfig
from understudy.distillation import methods
from understudy.errors import ConfigError
from understudy.record import Role
from understudy.storage import fingerprint

ALONE = DistillConfig(ce_weight=1.0, kd_weight=0.0)


@dataclass(frozen=True)
class Cell:
    """One combination of settings: what a student learns from, how fast, and which student."""

    distill: DistillConfig
    lr: float
    student: str

    @property
    def role(self) -> Role:
        """What its students are: without the teacher's term, the student alone, whatever method and temperature."""
        return "student" if self.distill.kd_weight else "baseline"

    @property
    def alone(self) -> Cell:
        """The same student at the same learning rate, trained alone."""
        return Cell(ALONE, self.lr, self.student)

    @property
    def key(self) -> str:
        """Name of what is trained, fit for a folder; the same for cells whose students are the same."""
        cell = self if self.role == "student" else self.alone
        values = [cell.student, cell.lr, cell.distill.model_dump(mode="json")]
        readable = "alone"
        if cell.role == "student":
            readable = f"{cell.distill.method}-{cell.distill.kd_weight:g}-t{cell.distill.temperature:g}"
        return f"{re.sub(r'[^a-z0-9.-]', '_', readable)}-{fingerprint(values)[:8]}"

    def configure(self, config: RunConfig) -> RunConfig:
        """Return the configuration of a run with the settings of this cell."""
        train: TrainConfig = config.train.model_copy(update={"lr": self.lr})
        student = config.student.model_copy(update={"model": self.student})
        return config.model_copy(update={"train": train, "student": student, "distill": self.distill})


@dataclass(frozen=True)
class Space:
    """The values that each setting may take; a setting that is not varied has one."""

    weights: tuple[tuple[float, float], ...]
    """(ce_weight, kd_weight)."""
    temperatures: tuple[float, ...]
    methods: tuple[str, ...]
    lrs: tuple[float, ...]
    students: tuple[str, ...]

    def cell(self, weights: tuple[float, float], temperature: float, method: str, lr: float, student: str) -> Cell:
        """Return the cell of some values, of this space or between them."""
        distill = DistillConfig(method=method, temperature=temperature, ce_weight=weights[0], kd_weight=weights[1])
        return Cell(distill, lr, student)

    def grid(self) -> list[Cell]:
        """Return all combinations, each once."""
        values = itertools.product(self.students, self.lrs, self.methods, self.weights, self.temperatures)
        cells = (self.cell(weights, heat, method, lr, student) for student, lr, method, weights, heat in values)
        return list(dict.fromkeys(cells))

    def alone(self) -> list[Cell]:
        """Return every student alone, at every learning rate."""
        return [Cell(ALONE, lr, student) for student in self.students for lr in self.lrs]


def space(config: RunConfig, asked: SweepConfig) -> Space:
    """Return what a configuration varies.

    Raises:
        ConfigError: an unknown method, or no cell that would learn from the teacher.
    """
    base = config.distill
    found = Space(
        weights=tuple((1 - alpha, alpha) for alpha in asked.alpha) or ((base.ce_weight, base.kd_weight),),
        temperatures=asked.temperature or (base.temperature,),
        methods=asked.method or (base.method,),
        lrs=asked.lr or (config.train.lr,),
        students=asked.student or (config.student.model,),
    )
    for method in found.methods:
        methods.find(method)
    if not any(kd_weight for _, kd_weight in found.weights):
        raise ConfigError("No cell of this sweep would learn from the teacher; give an alpha above 0.")
    return found
