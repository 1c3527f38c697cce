"""Rows of the table of losses: contrastive and variational."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from loss_cases import BATCH, Case, Inputs
from understudy.losses import contrastive

NEGATIVES, SAMPLES = 4, 9
CHANNELS, HEIGHT, WIDTH = 3, 2, 5
SCALE = torch.tensor([-1.0, 0.5, 4.0], dtype=torch.float64)


def _scores(generator: torch.Generator) -> Inputs:
    """Draw positive scores of both directions around the noise's probability."""
    student, teacher = torch.randn(2, BATCH, 1 + NEGATIVES, generator=generator, dtype=torch.float64).exp() / SAMPLES
    return student, teacher


def _maps(generator: torch.Generator) -> Inputs:
    student, teacher = torch.randn(2, BATCH, CHANNELS, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    return student, teacher


def _scaled_embeddings(generator: torch.Generator) -> Inputs:
    student, teacher = torch.randn(2, BATCH, CHANNELS, generator=generator, dtype=torch.float64)
    return student, torch.randn(CHANNELS, generator=generator, dtype=torch.float64), teacher


def _slow_crd(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum the binary cross-entropy of the critic's h over pairs, one by one."""
    values = []
    for rows in zip(student.tolist(), teacher.tolist(), strict=True):
        value = 0.0
        for row in rows:
            for column, score in enumerate(row):
                h = score / (score + NEGATIVES / SAMPLES)
                value -= math.log(h) if column == 0 else math.log(1 - h)
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


def _slow_vid(mean: Tensor, scale: Tensor, teacher: Tensor) -> Tensor:
    """Take the Gaussian's log-density at every value, by deviation instead of variance, and its constant away."""
    values = []
    for mu, t in zip(mean, teacher, strict=True):
        terms = []
        for channel, a in enumerate(scale.tolist()):
            sigma = math.sqrt(math.log(1 + math.exp(a)) + 1e-5)
            for m, x in zip(mu[channel].flatten().tolist(), t[channel].flatten().tolist(), strict=True):
                density = math.exp(-(((x - m) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
                terms.append(-math.log(density) - math.log(2 * math.pi) / 2)
        values.append(sum(terms) / len(terms))
    return torch.tensor(values, dtype=torch.float64)


def _vid_of_fixed_scale(mean: Tensor, teacher: Tensor) -> Tensor:
    return contrastive.vid(mean, SCALE.to(mean), teacher)


CASES: list[Case] = [
    Case(
        "crd",
        partial(contrastive.crd, samples=SAMPLES),
        _scores,
        _slow_crd,
        students=2,  # the teacher's embedding is learned: its scores have a gradient
        teachers=0,
        zero_at_equality=False,
    ),
    Case(
        "vid maps",
        _vid_of_fixed_scale,
        _maps,
        lambda mean, teacher: _slow_vid(mean, SCALE, teacher),
        zero_at_equality=False,
    ),
    Case(
        "vid embeddings and scale",
        contrastive.vid,
        _scaled_embeddings,
        _slow_vid,
        students=2,
        zero_at_equality=False,
        ignores_order=False,  # the scale has no batch to permute; the row above has the order's test
    ),
]
