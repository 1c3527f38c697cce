"""The cells of a sweep: which combinations of settings there are, and which of them are one and the same training.

Imported by the other files of this folder.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from understudy.config import DistillConfig, RunConfig, SweepConfig, Temperature, TrainConfig, Weight
from understudy.distillation import methods
from understudy.errors import ConfigError
from understudy.pipeline import objective
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
        return "student" if objective.strength(self.distill.kd_weight) else "baseline"

    @property
    def alone(self) -> Cell:
        """The same student at the same learning rate, trained alone."""
        return Cell(ALONE, self.lr, self.student)

    @property
    def key(self) -> str:
        """Name of what is trained, fit for a folder; the same for cells whose students are the same."""
        cell = self if self.role == "student" else self.alone
        told = cell.distill.model_dump(mode="json", exclude={"assistants", "generations"})  # a sweep has none
        values = [cell.student, cell.lr, told]
        readable = "alone"
        if cell.role == "student":
            weight, heat = objective.strength(cell.distill.kd_weight), objective.temperature(cell.distill)
            readable = f"{cell.distill.method}-{weight:g}-t{heat:g}"
        return f"{re.sub(r'[^a-z0-9.-]', '_', readable)}-{fingerprint(values)[:8]}"

    def configure(self, config: RunConfig) -> RunConfig:
        """Return the configuration of a run with the settings of this cell."""
        train: TrainConfig = config.train.model_copy(update={"lr": self.lr})
        student = config.student.model_copy(update={"model": self.student})
        return config.model_copy(update={"train": train, "student": student, "distill": self.distill})


@dataclass(frozen=True)
class Space:
    """The values that each setting may take; a setting that is not varied has one."""

    base: DistillConfig
    weights: tuple[tuple[Weight, Weight], ...]
    """(ce_weight, kd_weight)."""
    temperatures: tuple[Temperature | None, ...]
    methods: tuple[str, ...]
    lrs: tuple[float, ...]
    students: tuple[str, ...]

    def cell(
        self, weights: tuple[Weight, Weight], temperature: Temperature | None, method: str, lr: float, student: str
    ) -> Cell:
        """Return the cell of some values, of this space or between them."""
        values = {"method": method, "temperature": temperature, "ce_weight": weights[0], "kd_weight": weights[1]}
        terms = self.base.terms if method == self.base.method else ()
        return Cell(self.base.model_copy(update={**values, "terms": terms}), lr, student)

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
        base=base,
        weights=tuple((1 - alpha, alpha) for alpha in asked.alpha) or ((base.ce_weight, base.kd_weight),),
        temperatures=asked.temperature or (base.temperature,),
        methods=asked.method or (base.method,),
        lrs=asked.lr or (config.train.lr,),
        students=asked.student or (config.student.model,),
    )
    for method in found.methods:
        methods.split(method)
    if not any(objective.strength(kd_weight) for _, kd_weight in found.weights):
        raise ConfigError("No cell of this sweep would learn from the teacher; give an alpha above 0.")
    return found
