"""Precision and memory layout, chosen by measuring a few training steps. Imported by `train.py` and the pipeline.

The choice is kept per machine, so that the same run on the same machine makes the same choice and so the same weights.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from understudy import storage
from understudy.errors import UnderstudyError

_WORTH = 1.15  # a switch must be this much faster, or the noise of the machine would decide
_WARMUP, _STEPS = 2, 4
_WORTH_A_TRIAL = 300.0  # seconds of training: compiling takes 10 to 40 of them
_NEVER = 1e9  # seconds a step


@dataclass(frozen=True)
class Numerics:
    """How a network is run in training."""

    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compiled: bool = False
    """Training steps run through `torch.compile`."""

    def __str__(self) -> str:
        words = [self.precision, "channels-last" if self.channels_last else "", "compiled" if self.compiled else ""]
        return " ".join(word for word in words if word)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Return the context in which forward passes run."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def layout(self, images: Tensor) -> Tensor:
        """Return images in the memory layout of the network."""
        return images.to(memory_format=torch.channels_last) if self.channels_last else images

    def prepare(self, network: nn.Module) -> nn.Module:
        """Put a network into its memory layout, in place."""
        return network.to(memory_format=torch.channels_last) if self.channels_last else network


class Running(nn.Module):
    """A network that runs in its own numerics, whatever the context around it says.

    Takes float32 images, returns float32 logits. For a teacher, whose best numerics need not be its student's.
    """

    def __init__(self, network: nn.Module, numerics: Numerics) -> None:
        super().__init__()
        self.network = numerics.prepare(network)
        self.numerics = numerics

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's answers."""
        half = self.numerics.precision == "bf16"
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
            answers: Tensor = self.network(self.numerics.layout(images))
        return answers.float()


def for_answers(numerics: Numerics) -> Numerics:
    """Return how a network that trains with `numerics` answers fastest: layout matters more than in training.

    Measured on a CPU: ResNet-18 at 64 px answers 1.1 to 1.2 times as many images a second with channels last, a
    network of two wide convolutions 1.2 to 1.8 times.
    """
    return replace(numerics, channels_last=True, compiled=False)


FIXED: dict[str, Numerics] = {"fp32": Numerics("fp32"), "bf16": Numerics("bf16", channels_last=True)}
CANDIDATES = (Numerics(), Numerics(channels_last=True), Numerics("bf16", channels_last=True))


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what a training step takes with it."""

    numerics: Numerics
    step_seconds: float


def parse(text: str) -> Numerics:
    """Return the numerics that `str` wrote."""
    precision, *words = text.split()
    return Numerics("bf16" if precision == "bf16" else "fp32", "channels-last" in words, "compiled" in words)


def choose(
    network: nn.Module, images: Tensor, *, classes: int, requested: str, key: dict[str, object], steps: int = 0
) -> Choice:
    """Measure a training step of `network` and choose the fastest numerics.

    Compiling is tried only where the steps to come take so long that it could pay for itself, and taken where it does.

    Args:
        network: from images to logits; it is not changed.
        images: float32 [batch, channels, size, size] on the device.
        classes: how many logits it returns.
        requested: "auto" measures all candidates; "fp32" or "bf16" is obeyed, and only timed.
        key: what names network and batch; with the machine, it names the kept choice.
        steps: of all trainings to come; 0 where nobody knows.
    """
    eager = _choose_eager(network, images, classes, requested, key | _machine(images) | {"asked": requested})
    if steps * eager.step_seconds < _WORTH_A_TRIAL:
        return eager
    trial = _compiled(network, images, classes, eager, key | _machine(images))
    saved = steps * (eager.step_seconds - trial.choice.step_seconds)
    return trial.choice if saved > 2 * trial.compile_seconds else eager


def _choose_eager(network: nn.Module, images: Tensor, classes: int, requested: str, key: dict[str, object]) -> Choice:
    place = storage.cache_dir() / "numerics" / f"{storage.fingerprint(key)}.json"
    kept = _read(place)
    if kept is not None:
        return kept
    candidates = CANDIDATES if requested == "auto" else (FIXED[requested],)
    seconds = {candidate: _step_seconds(network, images, classes, candidate) for candidate in candidates}
    best = min(seconds, key=lambda candidate: seconds[candidate])
    if seconds[best] * _WORTH > seconds[candidates[0]]:
        best = candidates[0]
    choice = Choice(best, seconds[best])
    _write(place, choice)
    return choice


class _Trial(NamedTuple):
    """What compiling brought."""

    choice: Choice
    compile_seconds: float


def _compiled(network: nn.Module, images: Tensor, classes: int, eager: Choice, key: dict[str, object]) -> _Trial:
    """Measure the compiled step; where compiling fails, it counts as infinitely slow."""
    numerics = replace(eager.numerics, compiled=True)
    place = storage.cache_dir() / "numerics" / f"{storage.fingerprint(key | {'asked': str(numerics)})}.json"
    kept, seconds = _read(place), _read_number(place, "compile_seconds")
    if kept is not None and seconds is not None:
        return _Trial(kept, seconds)
    start = time.perf_counter()
    try:
        step = _step_seconds(network, images, classes, numerics)
    except Exception:  # no compiler on this machine, or a network that it cannot take
        step = _NEVER
    trial = _Trial(Choice(numerics, step), time.perf_counter() - start)
    _write(place, trial.choice, compile_seconds=trial.compile_seconds)
    return trial


def _write(place: Path, choice: Choice, **more: float) -> None:
    with contextlib.suppress(OSError, UnderstudyError):  # no cache only means to measure again next time
        storage.write_json(place, {**asdict(choice.numerics), "step_seconds": choice.step_seconds, **more})


def _machine(images: Tensor) -> dict[str, object]:
    return {
        "shape": list(images.shape),
        "device": str(images.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "machine": platform.machine() + platform.processor(),
    }


def _read(place: Path) -> Choice | None:
    try:
        with open(place, encoding="utf-8") as file:
            values = json.load(file)
        numerics = Numerics(values["precision"], values["channels_last"], values.get("compiled", False))
        choice = Choice(numerics, float(values["step_seconds"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    sound = replace(numerics, compiled=False) in CANDIDATES and 0 < choice.step_seconds < math.inf
    return choice if sound else None


def _read_number(place: Path, name: str) -> float | None:
    try:
        return float(storage.read_json(place)[name])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _step_seconds(network: nn.Module, images: Tensor, classes: int, numerics: Numerics) -> float:
    """Return the shortest of a few steps: the machine may be shared, and the shortest is the least disturbed."""
    trial = numerics.prepare(copy.deepcopy(network)).train()
    forward = torch.compile(trial, dynamic=False) if numerics.compiled else trial
    labels = torch.arange(len(images), device=images.device) % classes
    times = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(_WARMUP + _STEPS):
            start = time.perf_counter()
            with numerics.autocast(images.device):
                logits = forward(numerics.layout(images))
            F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
            trial.zero_grad(set_to_none=True)
            if images.device.type == "cuda":
                torch.cuda.synchronize(images.device)
            times.append(time.perf_counter() - start)
    return min(times[_WARMUP:])
