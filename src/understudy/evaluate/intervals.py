"""Intervals of a mean over two crossed random factors, seeds and images. Numpy and scipy only.

`verdict.py` and the sweep's table read it; `docs/verdict.md` explains the formulas with an example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from understudy.record import Interval

_LEVEL = 0.975


@dataclass(frozen=True)
class MeanSquares:
    """Two-way ANOVA without replication of values [seeds, images]."""

    seeds: int
    images: int
    mean: float
    ms_seeds: float
    """images / (seeds - 1) x sum of squared deviations of the seeds' means; 0 for one seed."""
    ms_images: float
    """seeds / (images - 1) x sum of squared deviations of the images' means."""
    ms_rest: float
    """Sum of squared residuals of the additive model / ((seeds - 1)(images - 1)); 0 for one seed."""

    @property
    def images_part(self) -> float:
        """What the choice of images adds to the variance, as a mean square; never negative."""
        return max(self.ms_images - self.ms_rest, 0.0)

    @property
    def variance(self) -> float:
        """Variance of the mean over seeds and images: (MS_S + max(MS_I - MS_R, 0)) / (S N)."""
        return (self.ms_seeds + self.images_part) / (self.seeds * self.images)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of `variance`: (MS_S + max(MS_I - MS_R, 0))^2 / (MS_S^2 / (S - 1)).

        Infinite where the seeds do not differ. Source: Hillis 2007, Stat. Med. 26:596-619, by Satterthwaite.
        """
        if self.ms_seeds == 0:
            return math.inf
        # A ratio first: the square of a tiny mean square would underflow.
        ratio = 1 + self.images_part / self.ms_seeds
        return (self.seeds - 1) * ratio * ratio

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean.

        t x sqrt(variance), t with `freedom`. With two seeds Satterthwaite's approximation is too optimistic, and each
        part gets its own quantile instead: sqrt((t_1^2 MS_S + z^2 max(MS_I - MS_R, 0)) / (S N)), which covers at least
        95 % (Banerjee 1960, Sankhya 22:357-358).
        """
        if self.seeds != 2:
            return quantile(self.freedom) * math.sqrt(self.variance)
        parts = quantile(1) ** 2 * self.ms_seeds + quantile(math.inf) ** 2 * self.images_part
        return math.sqrt(parts / (self.seeds * self.images))

    def at(self, seeds: int, images: int) -> MeanSquares:
        """Return the mean squares to expect of another number of seeds (>= 2) and images."""
        per_seed = max(self.ms_seeds - self.ms_rest, 0.0) / self.images
        per_image = self.images_part / self.seeds
        return MeanSquares(
            seeds,
            images,
            self.mean,
            ms_seeds=images * per_seed + self.ms_rest,
            ms_images=seeds * per_image + self.ms_rest,
            ms_rest=self.ms_rest,
        )


def mean_squares(values: NDArray[Any]) -> MeanSquares:
    """Return the ANOVA of values [seeds, images], at least two images."""
    table = values.astype(np.float64)
    seeds, images = table.shape
    mean = float(table.mean())
    by_seed = table.mean(axis=1) - mean
    by_image = table.mean(axis=0) - mean
    rest = table - mean - by_seed[:, None] - by_image[None, :]
    several = seeds > 1
    return MeanSquares(
        seeds,
        images,
        mean,
        ms_seeds=images * float((by_seed**2).sum()) / (seeds - 1) if several else 0.0,
        ms_images=seeds * float((by_image**2).sum()) / (images - 1),
        ms_rest=float((rest**2).sum()) / ((seeds - 1) * (images - 1)) if several else 0.0,
    )


def quantile(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t; of the normal distribution where `freedom` is infinite."""
    from scipy import special

    return float(special.ndtri(_LEVEL) if math.isinf(freedom) else special.stdtrit(freedom, _LEVEL))


def wilson(right: int, images: int) -> Interval:
    """Return the share right / images with its 95 % score interval (Wilson 1927, JASA 22:209-212)."""
    z2 = quantile(math.inf) ** 2
    share = right / images
    centre = (right + z2 / 2) / (images + z2)
    half = math.sqrt(z2 * (images * share * (1 - share) + z2 / 4)) / (images + z2)
    return Interval(value=share, low=min(max(centre - half, 0.0), share), high=max(min(centre + half, 1.0), share))
