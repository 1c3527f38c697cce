"""How the cost of an epoch grows: with images, classes, the teacher's size, and the cells of a sweep.

The shape of the MNIST pair, batches of 64, float32, our loop, with the teacher running along and with its answers read.
What is measured are steps, for as long as a turn lasts; an epoch is as many as it has. The answers that are read come
from a smaller network, which makes no difference to reading them; the teacher's own pass is measured apart. A sweep is
measured whole, every cell of it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import _common as common
from peers import ours
from peers.pairs import ALPHA, BATCH, PAIRS, RATE, TEMPERATURE, Data, Nets, Tick, data
from understudy.config import TrainConfig
from understudy.distillation import Distiller, methods
from understudy.engine import Engine
from understudy.errors import Interrupted
from understudy.train import Training

SETTLE = 3  # steps that set things up
PASS_IMAGES = 768  # of which the teacher's pass is measured
SWEEP_IMAGES = 1_024
TEMPERATURES, ALPHAS = (1.0, 2.0, 4.0, 8.0, 16.0), (0.1, 0.3, 0.5, 0.7, 0.9)
PAIR = 16.0  # the teacher of the MNIST pair is so many times as wide as its student

SAMPLES = (1_000, 4_000, 16_000, 60_000)
CLASSES = (2, 10, 100, 1_000)
WIDTHS = (1.0, 2.0, 3.2, 5.5, 10.0)
"""Of the teacher, as multiples of the student's: 1 to about 100 times its operations."""
CELLS = (1, 5, 25)


class Case(NamedTuple):
    """One point of a curve."""

    axis: str
    images: int = 4_000
    classes: int = 10
    width: float = PAIR

    def nets(self) -> Nets:
        torch.manual_seed(0)
        return Nets(network(self.width, self.classes).eval(), network(1, self.classes))

    def data(self, images: Data) -> Data:
        labels = torch.arange(len(images.labels)) % self.classes
        return images._replace(frames=images.frames[: self.images], labels=labels[: self.images])


def network(width: float, classes: int) -> nn.Module:
    """Return a network of the MNIST pair's shape for images of 28 x 28, `width` times as wide as the student."""
    first, second = round(16 * width), round(32 * width)
    return nn.Sequential(
        nn.Conv2d(1, first, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.MaxPool2d(2, stride=1, padding=1),
        nn.Conv2d(first, second, 3, stride=2, padding=0),
        nn.Flatten(),
        nn.Linear(second * 49, classes),
    )


def operations(width: float, classes: int) -> int:
    """Return the multiply-accumulates of a network for one image."""
    first, second = round(16 * width), round(32 * width)
    return 9 * first * 14**2 + 9 * first * second * 7**2 + second * 49 * classes


# --- steps -----------------------------------------------------------------------------------------------------------


Way = Callable[[Tick], None]
"""A way to train."""


def step_ms(way: Way, seconds: float) -> float:
    """Return the mean time of a step in a turn of at least so many seconds and 4 steps."""
    moments: list[float] = []

    def tick() -> bool:
        moments.append(time.perf_counter())
        counted = len(moments) - 1 - SETTLE
        return counted >= 4 and moments[-1] - moments[SETTLE] >= seconds

    try:
        way(tick)
    except Interrupted:
        return 1e3 * (moments[-1] - moments[SETTLE]) / (len(moments) - 1 - SETTLE)
    raise AssertionError("it ended by itself")


def measure(case: Case, images: Data, rounds: int, seconds: float) -> dict[str, Any]:
    """Return one point: the fastest of some turns of each way to train."""
    own, nets = case.data(images), case.nets()
    split = ours.split(own)
    terms = methods.terms("kd", temperature=TEMPERATURE, ce_weight=1 - ALPHA, kd_weight=ALPHA)
    small = Nets(network(1, case.classes).eval(), nets.student)
    with tempfile.TemporaryDirectory() as cache:
        outputs = ours.teach(small, split, Path(cache))
        ways: dict[str, Way] = {
            "alone": partial(ours.train, Distiller(None, nets.student), ours.epochs(split), own),
            "online": partial(ours.train, Distiller(*nets, terms=terms), ours.epochs(split), own),
            "cached": partial(ours.train, Distiller(None, nets.student, terms=terms), ours.epochs(split, outputs), own),
        }
        turns = [{name: step_ms(way, seconds) for name, way in ways.items()} for _ in range(rounds)]
    step = {name: min(turn[name] for turn in turns) for name in ways}
    return report(case, step, pass_seconds(nets, own), outputs.nbytes)


def pass_seconds(nets: Nets, own: Data) -> float:
    """Return how long the teacher takes for all images, once, writing included."""
    few = ours.split(own, min(PASS_IMAGES, len(own.labels)))
    with tempfile.TemporaryDirectory() as cache:
        work = ours.teach(nets, few, Path(cache)).work
    return len(own.labels) * work.seconds / work.images


def report(case: Case, step: dict[str, float], pass_s: float, kept: int) -> dict[str, Any]:
    epoch = {name: one * case.images / (1e3 * BATCH) for name, one in step.items()}
    ratio = operations(case.width, case.classes) / operations(1, case.classes)
    return {
        **case._asdict(),
        "operations_ratio": round(ratio, 1),
        "step_ms": {name: round(one, 3) for name, one in step.items()},
        "epoch_seconds": {name: round(one, 3) for name, one in epoch.items()},
        "teacher_pass_seconds": round(pass_s, 3),
        "kept_mib": round(kept / 2**20, 2),
    }


# --- sweeps ----------------------------------------------------------------------------------------------------------


def sweep(cells: int, images: Data, *, keep: bool) -> float:
    """Return the seconds that all cells take, one epoch each, with one pass of the teacher or with one per cell."""
    case = Case("cells", images=SWEEP_IMAGES)
    own, nets = case.data(images), case.nets()
    split = ours.split(own)
    grid = list(product(TEMPERATURES, ALPHAS))[:cells]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        outputs = ours.teach(nets, split, Path(cache)) if keep else None
        for temperature, alpha in grid:
            terms = methods.terms("kd", temperature=temperature, ce_weight=1 - alpha, kd_weight=alpha)
            distiller = Distiller(None if keep else nets.teacher, case.nets().student, terms=terms)
            Training(
                distiller,
                ours.epochs(split, outputs),
                ours.split(own, BATCH),
                TrainConfig(epochs=1, batch_size=BATCH, lr=RATE),
                seed=0,
                engine=Engine(device="cpu", threads=torch.get_num_threads()),
            ).run()
    return time.perf_counter() - start


def sweeps(images: Data) -> list[dict[str, Any]]:
    sweep(1, images, keep=True)  # sets things up
    return [
        {
            "axis": "cells",
            "cells": cells,
            "images": SWEEP_IMAGES,
            "seconds": {
                "cached": round(sweep(cells, images, keep=True), 3),
                "online": round(sweep(cells, images, keep=False), 3),
            },
        }
        for cells in CELLS
    ]


# --- reporting -------------------------------------------------------------------------------------------------------


AXES = {"images": "images", "classes": "classes", "width": "teacher's operations / student's"}
HEAD = ("alone", "cached", "online", "cached / alone", "online / cached", "teacher's pass, once", "kept, MiB")


def table(points: Sequence[dict[str, Any]], cells: Sequence[dict[str, Any]]) -> str:
    curves = [
        common.rows([name, *HEAD], [line(axis, point) for point in points if point["axis"] == axis])
        for axis, name in AXES.items()
    ]
    sweeping = common.rows(["cells", "cached", "online", "online / cached"], [sweep_line(row) for row in cells])
    caption = f"Seconds of a sweep of {SWEEP_IMAGES:,} images for one epoch, the teacher's pass included:"
    return "\n\n".join(["Seconds an epoch:", *curves, caption, sweeping])


def sweep_line(row: dict[str, Any]) -> list[str]:
    cached, online = row["seconds"]["cached"], row["seconds"]["online"]
    return [str(row["cells"]), f"{cached:.2f}", f"{online:.2f}", f"{online / cached:.1f}"]


def line(axis: str, point: dict[str, Any]) -> list[str]:
    epoch = point["epoch_seconds"]
    label = f"{point['operations_ratio']:.0f}" if axis == "width" else f"{point[axis]:,}"
    return [
        label,
        *(f"{epoch[name]:.2f}" for name in ("alone", "cached", "online")),
        f"{epoch['cached'] / epoch['alone']:.2f}",
        f"{epoch['online'] / epoch['cached']:.1f}",
        f"{point['teacher_pass_seconds']:.2f}",
        f"{point['kept_mib']:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each way to train [%(default)s]")
    parser.add_argument("--seconds", type=float, default=0.8, help="of a turn, at least [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="of torch [%(default)s]")
    words = parser.parse_args()
    common.pin(words.threads)
    images = data(PAIRS["mnist"], max(SAMPLES))
    cases = [Case("images", images=count) for count in SAMPLES]
    cases += [Case("classes", classes=count) for count in CLASSES]
    cases += [Case("width", width=width) for width in (*WIDTHS, PAIR)]
    points = [measure(case, images, words.rounds, words.seconds) for case in cases]
    cells = sweeps(images)
    settings = {
        "batch": BATCH,
        "precision": "fp32",
        "rounds": words.rounds,
        "turn_seconds": words.seconds,
        "sweep": {"temperatures": TEMPERATURES, "alphas": ALPHAS},
    }
    common.write("growth", settings, [*points, *cells], table(points, cells))


if __name__ == "__main__":
    main()
