"""The table of methods: which losses each one sums, the paper's defaults, where it comes from, when it helps.

Rows stand in the file of their family. Imported by the distiller, the pipeline and whoever lists methods.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain

from torch import Tensor

from understudy import losses
from understudy.distillation.methods import contrastive, features, logits, peers, relations
from understudy.distillation.methods.method import Method, Part, times
from understudy.distillation.terms import Number, Term
from understudy.errors import ConfigError, near, unknown

__all__ = ["METHODS", "Method", "Part", "combined", "find", "label_term", "split", "terms", "times"]

FAMILIES: dict[str, tuple[Method, ...]] = {
    "logits": logits.ROWS,
    "features": features.ROWS,
    "relations": relations.ROWS,
    "contrastive and variational": contrastive.ROWS,
    "without a teacher": peers.ROWS,
}
METHODS: dict[str, Method] = {method.name: method for method in chain.from_iterable(FAMILIES.values())}


def label_term(*, weight: Number = 1.0, label_smoothing: float = 0.0) -> Term:
    """Return the cross-entropy with the labels; alone, it is plain supervised training."""
    loss: Callable[..., Tensor] = partial(losses.cross_entropy, label_smoothing=label_smoothing)
    return Term("ce", loss, ("student_logits", "labels"), weight)


def find(name: str) -> Method:
    """Return the row of a method.

    Raises:
        ConfigError: no such method; the nearest name is given.
    """
    if name not in METHODS:
        hint = "" if near(name, METHODS) else " `understudy methods` lists them."
        raise ConfigError(unknown("method", name, METHODS) + hint)
    return METHODS[name]


def split(name: str) -> list[Method]:
    """Return the rows of methods that are joined by "+", such as "kd+attention".

    Raises:
        ConfigError: no such method, or one that stands twice.
    """
    names = [part.strip() for part in name.split("+")]
    if len(set(names)) < len(names):
        raise ConfigError(f"A method stands twice in '{name}'.")
    return [find(part) for part in names]


def terms(
    name: str,
    *,
    temperature: Number | None = None,
    ce_weight: Number,
    kd_weight: Number,
    label_smoothing: float = 0.0,
) -> tuple[Term, ...]:
    """Return the terms of one or several methods, those of weight 0 left out.

    Args:
        name: a method, or several joined by "+".
        temperature: each method's own where None.
        ce_weight: weight of the cross-entropy with the labels.
        kd_weight: times the weight of every other term.
        label_smoothing: of the cross-entropy.

    Raises:
        ConfigError: no such method, a negative weight, or nothing to learn from.
    """
    taught = [term for method in split(name) for term in method.terms(weight=kd_weight, temperature=temperature)]
    return combined(taught, ce_weight=ce_weight, label_smoothing=label_smoothing)


def combined(taught: list[Term], *, ce_weight: Number, label_smoothing: float = 0.0) -> tuple[Term, ...]:
    """Return the cross-entropy with the labels and the given terms, those of weight 0 left out.

    Raises:
        ConfigError: a negative weight, or nothing to learn from.
    """
    every = (label_term(weight=ce_weight, label_smoothing=label_smoothing), *taught)
    if any(isinstance(term.weight, float | int) and term.weight < 0 for term in every):
        told = ", ".join(f"{term.name} {term.weight}" for term in every)
        raise ConfigError(f"Weights must be 0 or more and not all 0: {told}.")
    chosen = tuple(term for term in every if term.weight != 0)
    if not chosen:
        raise ConfigError("All weights are 0, so there is nothing to learn from.")
    return chosen
