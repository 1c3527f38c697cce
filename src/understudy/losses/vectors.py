"""Directions and distances whose gradients stay finite where a vector is zero. Used inside `losses` only."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-24
"""A vector whose square of the length is not above this counts as zero."""


def unit(vectors: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the vectors along `dim`, scaled to length 1; a zero vector stays zero, with a gradient of zero.

    Args:
        vectors: float32 or float64.
        dim: the axis, or axes, that a vector lies along.
    """
    square = vectors.square().sum(dim, keepdim=True)
    # 1/sqrt(infinity) is 0 and so is its gradient: a small epsilon would make the gradient at zero huge instead
    return vectors * torch.where(square > TINY, square, torch.inf).rsqrt()


def cosines(embeddings: Tensor) -> Tensor:
    """Return the cosine of every two rows of [batch, features], [batch, batch]; 0 where one of them is zero."""
    directions = unit(embeddings, 1)
    return directions @ directions.T


def distances(embeddings: Tensor) -> Tensor:
    """Return the Euclidean distance of every two rows of [batch, features], [batch, batch].

    The gradient is zero where two rows coincide.
    """
    # differences first: expanding the square would lose short distances to rounding
    return torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
