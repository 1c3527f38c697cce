"""The table of methods: which terms each one sums, its defaults, where it comes from. Data, not classes.

Imported by the distiller and by whoever lists methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from understudy import losses
from understudy.errors import ConfigError, unknown

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """One summand of the objective: `weight` times the mean over the batch of `loss(student logits, target)`."""

    name: str
    loss: Loss
    """Takes the student's logits and the target; returns one value per example."""
    target: Literal["labels", "teacher"]
    """What the student is compared with: the labels, or the teacher's logits."""
    weight: float


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    summary: str
    equation: str
    citation: str
    distillation_term: Callable[[float], Loss]
    """From the temperature to the loss against the teacher's logits."""
    effective_weight: Callable[[float, float], float]
    """From weight and temperature to the weight on the bare divergence, so that systems can be compared."""


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="kd",
            summary="Match the teacher's softened probabilities.",
            equation="ce_weight CE(y, z) + kd_weight T^2 KL(softmax(t/T) || softmax(z/T))",
            citation="Hinton, Vinyals, Dean, 2015, arXiv:1503.02531",
            distillation_term=lambda temperature: partial(losses.kd, temperature=temperature),
            effective_weight=lambda weight, temperature: weight * temperature**2,
        ),
    )
}


def label_term(*, weight: float = 1.0, label_smoothing: float = 0.0) -> Term:
    """Return the cross-entropy with the labels; alone, it is plain supervised training."""
    return Term("ce", partial(losses.cross_entropy, label_smoothing=label_smoothing), "labels", weight)


def find(name: str) -> Method:
    """Return the row of a method.

    Raises:
        ConfigError: no such method; the nearest name is given.
    """
    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    return METHODS[name]


def terms(
    name: str, *, temperature: float, ce_weight: float, kd_weight: float, label_smoothing: float = 0.0
) -> tuple[Term, ...]:
    """Return the terms of a method, those of weight 0 left out.

    Raises:
        ConfigError: no such method, a negative weight, or nothing to learn from.
    """
    method = find(name)
    if ce_weight < 0 or kd_weight < 0 or ce_weight + kd_weight == 0:
        raise ConfigError(f"Weights must be 0 or more and not both 0: ce_weight={ce_weight}, kd_weight={kd_weight}.")
    both = (
        label_term(weight=ce_weight, label_smoothing=label_smoothing),
        Term(name, method.distillation_term(temperature), "teacher", kd_weight),
    )
    return tuple(term for term in both if term.weight > 0)
