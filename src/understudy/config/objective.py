"""What the student learns from: methods, terms, weights that may change. Used inside `config` only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from understudy.config.sections import Section


class ScheduleConfig(Section):
    """A number that changes while training goes on; see `understudy.distillation.schedules`."""

    shape: Literal["linear", "cosine", "warmup", "step"]
    start: float = Field(0.0, ge=0)
    end: float = Field(ge=0)
    until: float = Field(1.0, gt=0, le=1)
    """Share of training after which it stays; below 1 for a step."""

    @model_validator(mode="after")
    def _fits_its_shape(self) -> ScheduleConfig:
        if self.shape == "warmup" and self.start:
            raise ValueError("a warmup starts at 0; for another start say linear")
        if self.shape == "step" and self.until == 1:
            raise ValueError("a step needs 'until', the share of training at which it comes, below 1")
        return self


def _kind_of_number(value: Any) -> str:
    return "schedule" if isinstance(value, Mapping | ScheduleConfig) else "number"


def _number(number: Any) -> Any:
    """Return the type of a setting that is a number or a schedule."""
    tagged = Annotated[number, Tag("number")] | Annotated[ScheduleConfig, Tag("schedule")]
    return Annotated[tagged, Discriminator(_kind_of_number)]


if TYPE_CHECKING:
    Weight = float | ScheduleConfig
    Temperature = float | ScheduleConfig
else:
    Weight = _number(Annotated[float, Field(ge=0)])
    Temperature = _number(PositiveFloat)

Options = Annotated[
    tuple[tuple[str, float], ...],
    BeforeValidator(lambda given: tuple(given.items()) if isinstance(given, Mapping) else given),
    PlainSerializer(dict),
]


class TermConfig(Section):
    """One summand of the objective, beside the cross-entropy with the labels."""

    method: str
    weight: Weight = 1.0
    """Times the method's own weight, and times `kd_weight`."""
    temperature: Temperature | None = None
    """The method's own by default."""
    layers: tuple[tuple[str, str], ...] = ()
    """Pairs of layers, the student's first; found by stage and resolution by default."""
    options: Options = ()
    """Of the loss, such as `beta: 2`."""
    standardize: bool = False
    """Standardise the logits of both networks first."""
    name: str = Field("", pattern=r"^[\w-]*$")
    """Tells terms of one method apart."""


class DistillConfig(Section):
    """The distillation objective: `ce_weight` x cross-entropy + `kd_weight` x the terms of a method, or of several."""

    method: str = "kd"
    """A method of `understudy methods`, or several joined by "+"; where there are `terms`, it names theirs."""
    temperature: Temperature | None = None
    """Of all terms that take one; each method's own by default, 4 for kd."""
    ce_weight: Weight = 0.5
    kd_weight: Weight = 0.5
    terms: tuple[TermConfig, ...] = ()
    """Terms with settings of their own, instead of a method."""
    pseudo_labels: float | None = Field(None, gt=0, le=1)
    """Images without a label of whose class the teacher is at least this sure, by its probabilities at T = 1, take its
    answer as their label in the cross-entropy; by default none does."""
    assistants: tuple[str, ...] = ()
    """Networks between teacher and student, the largest first: each is taught by the one before it, the first by the
    teacher, the student by the last."""
    generations: PositiveInt = 1
    """How many students in a row, each taught by the one before it; the last is the one that is judged."""

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_terms(cls, values: Any) -> Any:
        """Let the terms say what the method is."""
        terms = values.get("terms") if isinstance(values, Mapping) else None
        if not isinstance(terms, list | tuple) or not terms:
            return values
        names = [term.get("method") if isinstance(term, Mapping) else getattr(term, "method", None) for term in terms]
        joined = "+".join(dict.fromkeys(map(str, names)))
        if values.get("method") not in (None, joined):
            raise ValueError("say either method or terms, not both")
        return {**values, "method": joined}

    @model_validator(mode="before")
    @classmethod
    def _alpha_is_sugar(cls, values: Any) -> Any:
        """Accept `alpha=a` for `ce_weight=1-a, kd_weight=a`."""
        if not isinstance(values, Mapping):
            return values
        rest = {key: value for key, value in values.items() if key != "alpha"}
        alpha = values.get("alpha")
        if alpha is None:
            return rest
        if rest.keys() & {"ce_weight", "kd_weight"}:
            raise ValueError("say either alpha or ce_weight and kd_weight, not both")
        return {**rest, **weights_of(alpha)}

    @model_validator(mode="after")
    def _something_to_learn(self) -> DistillConfig:
        if self.ce_weight == 0 and self.kd_weight == 0:
            raise ValueError("ce_weight and kd_weight are both 0, so there is nothing to learn from")
        return self


def weights_of(alpha: Any) -> dict[str, float]:
    """Return the weights that alpha stands for.

    Raises:
        ValueError: it is not a share.
    """
    try:
        share = float(alpha)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"alpha is the share of the distillation term, between 0 and 1, not {alpha!r}")
    return {"ce_weight": 1 - share, "kd_weight": share}
