"""AdamW over the rows of a matrix, each with its own learning rate and weight decay. Imported by `stepper.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BETAS = (0.9, 0.999)
_EPS = 1e-8
_SMALL = 1e-6  # as `clip_grad_norm_` has it


class RowAdamW:
    """One AdamW for many students: torch's own takes one learning rate for a whole tensor.

    theta <- theta - rate (decay theta + m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)), row by row.

    Args:
        weights: float32 [students, weights], trained in place.
        rates: peak learning rates, [students].
        decays: weight decays, [students].
        decayed: which columns decay, bool [weights].
        clip_norm: largest norm of the gradient of a row; None for none.

    Source:
        Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2, with torch's defaults.
    """

    def __init__(
        self, weights: Tensor, *, rates: Tensor, decays: Tensor, decayed: Tensor, clip_norm: float | None = None
    ) -> None:
        self._weights, self._clip_norm = weights, clip_norm
        self._rates = rates.to(weights)[:, None]
        self._decays = decays.to(weights)[:, None]
        self._decayed = decayed.to(weights)
        self.first = torch.zeros_like(weights, requires_grad=False)
        self.second = torch.zeros_like(weights, requires_grad=False)
        self.steps = 0

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Take a step along the gradient of the weights at `factor` times the peak rates, and drop the gradient."""
        gradient, weights = self._weights.grad, self._weights
        assert gradient is not None
        if self._clip_norm is not None:
            norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient *= (self._clip_norm / (norms + _SMALL)).clamp(max=1.0)
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in _BETAS)
        self.first.lerp_(gradient, 1 - _BETAS[0])
        self.second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        rates = self._rates * factor
        weights.addcmul_(weights * self._decayed, -rates * self._decays)
        deviation = self.second.sqrt().div_(math.sqrt(second)).add_(_EPS)
        weights.sub_((self.first / deviation).mul_(rates / first))
        weights.grad = None
