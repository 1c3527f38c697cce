"""Several teachers that answer with one voice: the weighted mean of their probabilities.

The pipeline makes the ensemble of a run's teachers; you may give one to `Distiller` as any other teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from understudy.errors import ConfigError


class Ensemble(nn.Module):
    """Trained networks whose probabilities are averaged.

        teacher = Ensemble([resnet, vgg], weights=[2, 1])
        distiller = Distiller(teacher, student, temperature=4)

    Its logits are the logarithm of the mean probabilities, so that their softmax is that mean. A temperature softens
    the mean, not each teacher by itself.

    Args:
        networks: each from images to logits [batch, classes], the same classes in the same order.
        weights: one for each network, above 0, of any sum; equal ones by default.

    Raises:
        ConfigError: no network, another number of weights, or a weight that is not above 0.
    """

    def __init__(self, networks: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.shares = shares(weights or [1.0] * len(networks))
        if len(self.shares) != len(networks):
            raise ConfigError(f"{len(networks)} teachers have {len(self.shares)} weights; each needs one.")

    def forward(self, images: Tensor) -> Tensor:
        """Return log probabilities, float32 [batch, classes], for images [batch, channels, height, width]."""
        return mean_probabilities([network(images) for network in self.networks], self.shares)


def shares(weights: Sequence[float]) -> tuple[float, ...]:
    """Return weights divided by their sum.

    Raises:
        ConfigError: there are none, or one is not a number above 0.
    """
    if not weights:
        raise ConfigError("An ensemble needs at least one teacher.")
    for weight in weights:
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"The weight of a teacher is a number above 0, not {weight:g}.")
    return tuple(weight / sum(weights) for weight in weights)


def mean_probabilities(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the logarithm of the weighted mean of softmax probabilities.

        log p_c = log sum_m w_m softmax(z_m)_c, the w_m adding up to 1

    It is computed in log space, in float32: a probability too small for a number does not become -inf.

    Args:
        logits: of each teacher, [batch, classes].
        weights: w of each teacher.

    Returns:
        Float32 [batch, classes]; each row's exponentials add up to 1.
    """
    parts = [F.log_softmax(one.float(), dim=1) + math.log(weight) for one, weight in zip(logits, weights, strict=True)]
    return torch.logsumexp(torch.stack(parts), dim=0)
