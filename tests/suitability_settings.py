"""What tests ask the examination of methods: a usual setting, methods by name, and two small networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from understudy.distillation import METHODS, methods
from understudy.evaluate.suitability import Chosen, Pair, Setting, examine_methods
from understudy.record import Finding

SETTING = Setting(classes=10, images=60_000, batch_size=64)


def setting(**changes: object) -> Setting:
    return Setting(**{**vars(SETTING), **changes})  # type: ignore[arg-type]


def chosen(names: str, **options: object) -> list[Chosen]:
    """Return methods joined by "+", with their usual terms."""
    return [
        Chosen(method, method.terms(**options), standardize=bool(options.get("standardize")))  # type: ignore[arg-type]
        for method in methods.split(names)
    ]


def examine(names: str, **changes: object) -> dict[str, Finding]:
    """Return what speaks against methods, by check."""
    found = examine_methods(chosen(names), setting(**changes))
    return {finding.check: finding for finding in found if not finding.ok}


every_method = pytest.mark.parametrize("method", METHODS)


def network(width: int = 6, *, classes: int = 3, stages: int = 2) -> nn.Sequential:
    """Return a network of some stages, of which each halves the resolution and doubles the channels."""
    blocks: list[nn.Module] = []
    channels = 3
    for stage in range(stages):
        made = width * 2**stage
        blocks += [nn.Sequential(nn.Conv2d(channels, made, 3, stride=2, padding=1), nn.BatchNorm2d(made), nn.ReLU())]
        channels = made
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def pair(student: nn.Module, teacher: nn.Module) -> Pair:
    return Pair(student, teacher, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
