"""Each term's share of the gradient that reaches the student, measured in the first steps and leaving no trace.

Weights of terms cannot be compared with one another: losses differ by orders of magnitude. Their gradients can. Whoever
trains may import this file; `evaluate.suitability` turns the shares into warnings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from understudy.distillation.distiller import Distiller
from understudy.distillation.projectors import Projector
from understudy.distillation.schedules import Schedule
from understudy.distillation.terms import Input, Term, at
from understudy.errors import ConfigError

STEPS = 4
"""Batches that are looked at by default."""

Step = tuple[Tensor, Mapping[Input, Tensor | None]]
"""Images [batch, channels, height, width], and by name what else a step brings along: labels, teacher's answers."""


@dataclass(frozen=True)
class Share:
    """What one term does in the first steps; means over the batches."""

    name: str
    value: float
    """Of its loss, unweighted."""
    weight: float
    """With which it was looked at: the one at the start of training, or the largest where that is 0."""
    gradient_norm: float
    """Euclidean length of the gradient of weight x loss with respect to all of the student's parameters."""
    share: float
    """Of the sum of all terms' gradient norms, in [0, 1]; 0 where no term has a gradient."""
    from_zero: bool = False
    """The weight is 0 at the start of training, so that this is what comes of it later."""


def shares(distiller: Distiller, batches: Iterable[Step], *, steps: int = STEPS) -> list[Share]:
    """Measure the gradient of every term by itself, in training mode, before training.

        shares(distiller, [(images, {"labels": labels})])

    Student, projectors, their buffers and modes, gradients and random numbers are as before afterwards, bit for bit.
    For mixed precision call this inside of autocast, and leave that before training.

    Args:
        distiller: on the device of the batches; neither compiled nor spread over processes.
        batches: as training will meet them.
        steps: how many of them are looked at, at most.

    Returns:
        One row for each term, in the distiller's order.

    Raises:
        ConfigError: there is no batch, or a term lacks something that it takes.
    """
    terms = tuple(_awake(term) for term in distiller.terms)
    with _leaving_no_trace(distiller), torch.enable_grad():
        distiller.terms = terms
        distiller.train()
        seen = [_look(distiller, images, ready) for images, ready in islice(batches, steps)]
    if not seen:
        raise ConfigError("The shares of the gradient need one batch at least; none given.")
    means = torch.tensor(seen, dtype=torch.float64).mean(0).tolist()  # [terms, (value, norm)]
    total = sum(norm for _, norm in means)
    return [
        Share(
            name=term.name,
            value=value / at(term.weight, 0.0),
            weight=at(term.weight, 0.0),
            gradient_norm=norm,
            share=norm / total if total else 0.0,
            from_zero=at(own.weight, 0.0) == 0,
        )
        for term, own, (value, norm) in zip(terms, distiller.terms, means, strict=True)
    ]


def _awake(term: Term) -> Term:
    """Return a term with its weight at the start of training; with its largest one where that is 0."""
    if not isinstance(term.weight, Schedule):
        return term
    # a schedule rises or falls all the way, so that one of its ends is the largest
    weight = term.weight.value(0.0) or term.weight.value(1.0)
    return replace(term, weight=weight or 1.0)


def _look(distiller: Distiller, images: Tensor, ready: Mapping[Input, Tensor | None]) -> list[tuple[float, float]]:
    """Return weighted value and gradient norm of every term on one batch."""
    parameters = [parameter for parameter in distiller.student.parameters() if parameter.requires_grad]
    weighted = distiller.weighted(images, dict(ready))
    return [(float(value.detach()), _gradient_norm(value, parameters)) for value in weighted.values()]


def _gradient_norm(value: Tensor, parameters: Sequence[Tensor]) -> float:
    if not value.requires_grad:
        return 0.0
    # the graph is kept to the last, since casts that autocast remembers hang on it beyond this batch
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(one.float()) for one in gradients if one is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


@contextmanager
def _leaving_no_trace(distiller: Distiller) -> Iterator[None]:
    terms = distiller.terms
    modes = [(module, module.training) for module in distiller.modules()]
    buffers = [(module, name, one, one.clone()) for module, name, one in _buffers(distiller)]
    own_losses = [(module, module.own_loss) for module in distiller.modules() if isinstance(module, Projector)]
    devices = {one.device for one in distiller.parameters() if one.device.type == "cuda"}
    with torch.random.fork_rng([device.index for device in devices]):
        try:
            yield
        finally:
            distiller.terms = terms
            for module, mode in modes:
                module.training = mode
            for projector, own_loss in own_losses:
                projector.own_loss = own_loss
            with torch.no_grad():
                for module, name, one, before in buffers:
                    setattr(module, name, one.copy_(before))  # the module may have put another in its place


def _buffers(distiller: Distiller) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in distiller.modules():
        for name, one in module.named_buffers(recurse=False):
            yield module, name, one
