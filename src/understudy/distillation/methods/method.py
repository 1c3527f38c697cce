"""What a row of the table of methods is, and how it becomes terms. The rows stand in the files beside.

Imported by the rows and by the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from understudy import losses
from understudy.distillation.projectors import Shapes
from understudy.distillation.schedules import Schedule
from understudy.distillation.terms import LOGITS, Depth, Input, Number, Term
from understudy.errors import ConfigError, unknown


@dataclass(frozen=True)
class Part:
    """One loss of a method; most methods have one."""

    loss: Callable[..., Tensor]
    takes: tuple[Input, ...] = LOGITS
    weight: Number = 1.0
    """Beside a cross-entropy of weight 1, as the paper has it."""
    projector: Callable[[Shapes], nn.Module] | None = None
    depth: Depth = "all"
    fade: float = 1.0
    before_activation: bool = False
    suffix: str = ""
    """Tells the terms of a method apart that has several."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    summary: str
    equation: str
    """L, which stands beside the cross-entropy with the labels."""
    citation: str
    helps: str
    """When it helps, and when it does not; one or two sentences."""
    parts: tuple[Part, ...]
    temperature: float | None = None
    """The paper's; None where the loss takes none."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Keywords of the loss with the paper's values."""
    fewest_classes: int = 2
    """With fewer the loss says nothing."""
    squares_temperature: bool = True
    """Whether a loss that takes a temperature holds the factor T^2."""
    mean_over_classes: bool = False
    """Whether the loss is a divergence divided by the number of classes."""
    one_class: bool = False
    """Its loss is defined for one class of each image, so not for mixed images."""
    fewest_images: int = 1
    """With fewer in a batch the loss says nothing."""

    @property
    def takes(self) -> frozenset[Input]:
        """All that its losses are given."""
        return frozenset(name for part in self.parts for name in part.takes)

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss is given something of a teacher's."""
        return any(name.startswith("teacher") for name in self.takes)

    @property
    def needs(self) -> list[str]:
        """What it needs, in words."""
        takes = self.takes
        told = {
            "one class for each image": self.one_class,
            "the teacher running along": any(name.startswith("teacher_map") for name in takes),
            "a final linear layer": any("embedding" in name for name in takes),
            f"{self.fewest_classes} classes or more": self.fewest_classes > 2,
            f"{self.fewest_images} images or more in a batch": self.fewest_images > 1,
        }
        return [text for text, holds in told.items() if holds]

    def terms(
        self,
        *,
        weight: Number = 1.0,
        temperature: Number | None = None,
        layers: tuple[tuple[str, str], ...] = (),
        options: Mapping[str, float] | None = None,
        standardize: bool = False,
        name: str = "",
    ) -> tuple[Term, ...]:
        """Return the method's terms.

        Args:
            weight: times the paper's weight of each part.
            temperature: the paper's by default; passed over where the loss takes none.
            layers: pairs of layers, student's first; found by stage and resolution by default.
            options: keywords of the loss that replace the paper's values.
            standardize: standardise the logits of both networks first.
            name: of the terms; the method's by default.

        Raises:
            ConfigError: an unknown option, a temperature not above 0, or something that this method has no use for.
        """
        check_temperature(temperature)
        given = dict(options or {})
        for option in given:
            if option not in self.options:
                raise ConfigError(unknown(f"option of {self.name}", option, self.options))
        if layers and not any("map" in one for one in self.takes):
            raise ConfigError(f"The method '{self.name}' compares no feature maps, so it takes no layers.")
        if standardize and "student_logits" not in self.takes:
            raise ConfigError(f"The method '{self.name}' compares no logits that could be standardised.")
        return tuple(
            Term(
                name=(name or self.name) + part.suffix,
                loss=_with_options(part.loss, {**self.options, **given}, standardize=standardize),
                takes=part.takes,
                weight=times(part.weight, weight),
                temperature=self._temperature(temperature),
                projector=part.projector,
                layers=layers,
                depth=part.depth,
                fade=part.fade,
                before_activation=part.before_activation,
                squares_temperature=self.squares_temperature,
                mean_over_classes=self.mean_over_classes,
                standardized=standardize,
                method=self.name,
            )
            for part in self.parts
        )

    def _temperature(self, given: Number | None) -> Number | None:
        return self.temperature if self.temperature is None or given is None else given


def check_temperature(temperature: Number | None) -> None:
    """Refuse a temperature that softens nothing, also as one end of a schedule; None is the method's own.

    Raises:
        ConfigError: it is not a number above 0.
    """
    ends = (temperature.start, temperature.end) if isinstance(temperature, Schedule) else (temperature,)
    for value in ends:
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"A temperature is a number above 0, not {value:g}.")


def check_smoothing(label_smoothing: float) -> None:
    """Refuse a share of the uniform distribution that is none, or all.

    Raises:
        ConfigError: it is not within [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing is a number from 0 to below 1, not {label_smoothing:g}.")


def refuse_beside_terms(method: str | None, settings: dict[str, float | None]) -> None:
    """Refuse what would say once more what one's own terms say.

    Raises:
        ConfigError: something is given.
    """
    given = [name for name, value in settings.items() if value is not None]
    if method not in (None, "kd"):  # the integrations pass their default on
        given.insert(0, "method")
    if given:
        raise ConfigError(f"`terms` take the place of `{given[0]}`: say it in the terms, or leave them out.")


def shares(alpha: float | None, ce_weight: float | None, kd_weight: float | None) -> tuple[float, float]:
    """Return the weights of the cross-entropy and of the rest, 0.5 each by default.

    Raises:
        ConfigError: alpha beside them, or numbers that do not make sense.
    """
    if alpha is not None:
        if ce_weight is not None or kd_weight is not None:
            raise ConfigError("Say either alpha or ce_weight and kd_weight, not both.")
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha is the share of the distillation term, between 0 and 1, not {alpha:g}.")
        return 1 - alpha, alpha
    weights = 0.5 if ce_weight is None else ce_weight, 0.5 if kd_weight is None else kd_weight
    if not all(math.isfinite(weight) for weight in weights):
        told = "ce_weight {:g}, kd_weight {:g}".format(*weights)
        raise ConfigError(f"Weights must be finite numbers of 0 or more: {told}.")
    return weights


def over_labelled(term: Term) -> Term:
    """Return the cross-entropy with the labels as a term whose mean is over the images that have one, or is 0."""
    return replace(term, loss=partial(_scaled_to_labelled, term.loss))


def _scaled_to_labelled(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    """Return a loss whose mean over all images is that over those with a label; where all have one, it is the same."""
    values = loss(logits, labels)
    if labels.is_floating_point():
        return values
    # times exactly 1 where all have one. No branch on it: that would make a device wait, and not compile
    return values * (len(labels) / (labels >= 0).sum().clamp(min=1))


def times(one: Number, other: Number) -> Number:
    """Return the product of two numbers, of which one at most changes while training goes on.

    Raises:
        ConfigError: both do.
    """
    if isinstance(one, Schedule) and isinstance(other, Schedule):
        raise ConfigError("This weight has a schedule of its own; give it a number as a factor, not another schedule.")
    if isinstance(one, Schedule):
        return replace(one, start=one.start * _number(other), end=one.end * _number(other))
    return times(other, one) if isinstance(other, Schedule) else one * other


def _number(value: Number) -> float:
    assert not isinstance(value, Schedule)
    return value


def standardized(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a loss on logits that standardises them first, as a transform that any such loss can take."""
    return partial(_on_standardized, loss)


def _on_standardized(
    loss: Callable[..., Tensor], student_logits: Tensor, teacher_logits: Tensor, *rest: Tensor, **options: float
) -> Tensor:
    return loss(losses.standardize(student_logits), losses.standardize(teacher_logits), *rest, **options)


def _with_options(
    loss: Callable[..., Tensor], options: Mapping[str, float], *, standardize: bool
) -> Callable[..., Tensor]:
    chosen = standardized(loss) if standardize else loss
    return partial(chosen, **options) if options else chosen
