"""What a sweep varies, and how it is carried out. Used inside `config` only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from understudy.config.sections import Section, Seed

Share = Annotated[float, Field(ge=0, le=1)]


class SweepConfig(Section):
    """Many cells instead of one objective: what to vary, and how to spread the trials.

    A setting that is not varied keeps the value that the rest of the configuration gives it. Where nothing is named,
    alpha and temperature are varied.
    """

    alpha: tuple[Share, ...] = ()
    """Shares of the distillation term; 0 is the student trained alone."""
    temperature: tuple[PositiveFloat, ...] = ()
    method: tuple[str, ...] = ()
    lr: tuple[PositiveFloat, ...] = ()
    student: tuple[str, ...] = ()
    trials: PositiveInt | None = None
    """Search this many cells between the smallest and the largest values with Optuna, instead of all combinations."""
    search_seed: Seed = 0
    workers: PositiveInt | None = None
    """Trials at a time on this machine; one for each core by default, one on a GPU."""
    ray: str | None = None
    """Address of a Ray cluster that carries out the trials; "local" starts one on this machine."""
    stacked: Literal["auto", "never", "always"] = "auto"
    """Train the cells of one student and seed together, as one larger step. `auto`: on a GPU, where a measurement says
    that it is faster; `always`: on any device, in one process, wherever the objective allows it."""

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        """Accept a single value for a list of one; vary alpha and temperature where nothing is named."""
        if not isinstance(values, Mapping):
            return values
        given = {
            key: (value,) if key in VARIED and isinstance(value, str | int | float) else value
            for key, value in values.items()
        }
        return given if any(given.get(key) for key in VARIED) else {**given, **_SWEPT}

    @model_validator(mode="after")
    def _stacked_in_one_process(self) -> SweepConfig:
        if self.stacked == "always" and (self.ray is not None or (self.workers or 1) > 1):
            raise ValueError("students are stacked in one process: leave workers and ray out, or stacked: always")
        return self


VARIED = ("alpha", "temperature", "method", "lr", "student")
_SWEPT = {"alpha": (0.0, 0.25, 0.5, 0.75, 1.0), "temperature": (1.0, 2.0, 4.0, 8.0, 16.0)}
