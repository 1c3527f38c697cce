"""Training steps per second: our loop, a loop as tutorials write it, and a bare loop that does nothing but train.

The MNIST pair, batches of 64, float32, AdamW: the student alone, with the teacher running along, and with the teacher's
outputs kept. The variants take turns, a second each. Turns in which other processes wanted the same cores are measured
again, as long as patience lasts.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import _common as common
from understudy.config import TrainConfig
from understudy.data.batches import Epochs, Split
from understudy.data.outputs import Answers, Table
from understudy.data.views import POLICIES
from understudy.distillation import Distiller, methods
from understudy.engine import Engine
from understudy.errors import Interrupted
from understudy.models.build import build
from understudy.models.classifier import Classifier
from understudy.numerics import Numerics, Running, for_answers
from understudy.record import InputSpec
from understudy.train import Training

BATCH, TEMPERATURE, ALPHA, RATE = 64, 4.0, 0.5, 1e-3
MEAN, STD = 0.1307, 0.3081
WARMUP = 5
LOOK_EVERY = {"alone": 30, "online": 3, "cached": 30}  # steps between looks at the rest of the machine
THREADS = 2
CPU = torch.device("cpu")

Tick = Callable[[], bool]
"""Called after each step; tells whether to stop."""
Loop = Callable[["Pair", common.Images, Tick], None]


@dataclass(frozen=True)
class Pair:
    """Fresh networks, the same ones for every variant."""

    student: Classifier
    teacher: Classifier | None
    kept: Tensor | None
    """The teacher's logits, float16 [images, classes]; noise, since speed is all that counts."""


def pair(kind: str, images: int) -> Pair:
    spec = InputSpec(channels=1, sizes=(28,), mean=(MEAN,), std=(STD,))
    classes = [str(digit) for digit in range(10)]
    student = build("mnist_small", classes=classes, spec=spec, seed=1)
    teacher = build("mnist_large", classes=classes, spec=spec, seed=0) if kind == "online" else None
    kept = torch.randn(images, 10, generator=torch.Generator().manual_seed(0)).half() if kind == "cached" else None
    return Pair(student, teacher, kept)


class Kept(Table):
    """Outputs that are in memory already."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits.float()

    def rows(self, positions: Tensor) -> Answers:
        return Answers(self._logits.index_select(0, positions))


# --- the loops -------------------------------------------------------------------------------------------------------


def ours(
    nets: Pair, images: common.Images, tick: Tick, *, augment: str = "none", numerics: Numerics | None = None
) -> None:
    labels, ids = images.labels.numpy(), np.arange(len(images.labels), dtype=np.uint64)
    split, val = (
        Split(images.frames, labels, ids, rows, size=28, device=CPU)
        for rows in (np.arange(len(labels)), np.arange(BATCH))
    )
    teacher = Running(nets.teacher, for_answers(Numerics())) if nets.teacher else None
    table = Kept(nets.kept) if nets.kept is not None else None
    both = methods.terms("kd", temperature=TEMPERATURE, ce_weight=1 - ALPHA, kd_weight=ALPHA)
    training = Training(
        Distiller(teacher, nets.student, terms=both if teacher or table else None),
        Epochs(
            split,
            policy=POLICIES[augment],
            view_seed=0,
            batch_size=BATCH,
            outputs=(lambda view: table) if table else None,
        ),
        val,
        TrainConfig(epochs=1, batch_size=BATCH, lr=RATE),
        seed=0,
        engine=Engine(device="cpu", threads=torch.get_num_threads()),
        numerics=numerics,
        stop=tick,
    )
    try:
        training.run()
    except Interrupted:
        return


def ours_light(nets: Pair, images: common.Images, tick: Tick) -> None:
    ours(nets, images, tick, augment="light")


def ours_compiled(nets: Pair, images: common.Images, tick: Tick) -> None:
    """Train as a run does that is long enough for compiling to pay for itself."""
    ours(nets, images, tick, numerics=Numerics(compiled=True))


def tutorial(nets: Pair, images: common.Images, tick: Tick) -> None:
    kept = () if nets.kept is None else (nets.kept.float(),)
    data = TensorDataset((images.frames.float() / 255 - MEAN) / STD, images.labels, *kept)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    student, teacher = nets.student.net, nets.teacher.net.eval() if nets.teacher else None
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    student.train()
    running_loss, correct = 0.0, 0
    for inputs, labels, *answers in loader:
        optimizer.zero_grad()
        logits = student(inputs)
        loss = objective(logits, labels, answers[0] if answers else ask(teacher, inputs))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        running_loss += loss.item()
        correct += (logits.argmax(1) == labels).sum().item()
        if tick():
            return


def bare(nets: Pair, images: common.Images, tick: Tick) -> None:
    student, teacher = nets.student.train(), nets.teacher.eval() if nets.teacher else None
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, fused=True)
    for rows in torch.randperm(len(images.labels)).split(BATCH):  # type: ignore[no-untyped-call]
        inputs = images.frames[rows].float().div_(255)
        answers = ask(teacher, inputs) if nets.kept is None else nets.kept[rows].float()
        objective(student(inputs), images.labels[rows], answers).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if tick():
            return


def ask(teacher: nn.Module | None, inputs: Tensor) -> Tensor | None:
    with torch.no_grad():
        return None if teacher is None else teacher(inputs)


def objective(logits: Tensor, labels: Tensor, answers: Tensor | None) -> Tensor:
    """Return the loss as one writes it by hand."""
    hard = F.cross_entropy(logits, labels)
    if answers is None:
        return hard
    targets = F.log_softmax(answers / TEMPERATURE, dim=1)
    soft = F.kl_div(F.log_softmax(logits / TEMPERATURE, dim=1), targets, reduction="batchmean", log_target=True)
    return (1 - ALPHA) * hard + ALPHA * TEMPERATURE**2 * soft


LOOPS: dict[str, Loop] = {
    "bare": bare,
    "ours": ours,
    "ours, light views": ours_light,
    "ours, compiled": ours_compiled,
    "tutorial": tutorial,
}
KINDS = ("alone", "online", "cached")


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Turns:
    """What was measured of a variant, in milliseconds a step."""

    quiet: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)

    @property
    def fastest(self) -> float:
        """The least disturbed turn: whatever else runs can only slow a turn down."""
        return min(self.quiet or self.disturbed)


Name = tuple[str, str]
"""Loop, and kind of training."""


def turn(loop: Loop, nets: Pair, images: common.Images, steps: int) -> tuple[float, bool]:
    """Return the mean time of a step in milliseconds, and whether the machine was quiet; if not, the turn is cut short.

    The first steps set things up and are left out.
    """
    moments: list[float] = []
    quiet = [common.Quiet()]
    look = LOOK_EVERY["online" if nets.teacher else "alone"]

    def tick() -> bool:
        moments.append(time.perf_counter())
        done = len(moments) - WARMUP
        if done == 0:
            quiet[0] = common.Quiet()
        return done == steps or (done > 0 and done % look == 0 and not quiet[0]())

    gc.collect()
    loop(nets, images, tick)
    return 1e3 * (moments[-1] - moments[WARMUP - 1]) / (len(moments) - WARMUP), quiet[0]()


def measure(rounds: int, steps: dict[str, int], patience: float, images: common.Images) -> dict[Name, Turns]:
    """Measure every variant `rounds` times in quiet, or until `patience` seconds are over."""
    turns = {(loop, kind): Turns() for kind in KINDS for loop in LOOPS}
    end = time.monotonic() + patience
    while lacking := [name for name, one in turns.items() if len(one.quiet) < rounds]:
        if time.monotonic() > end and all(one.quiet or one.disturbed for one in turns.values()):
            break
        for loop, kind in sorted(lacking, key=lambda name: len(turns[name].quiet)):
            nets = pair(kind, len(images.labels))
            common.wait_for_quiet(end)
            milliseconds, quiet = turn(LOOPS[loop], nets, images, steps[kind])
            (turns[loop, kind].quiet if quiet else turns[loop, kind].disturbed).append(milliseconds)
    return turns


def memory(loop: str, kind: str, steps: int) -> None:
    """Print the peak memory of this process after some steps, as JSON."""
    watch = common.Watch()
    images = common.mnist()
    if loop in LOOPS:
        turn(LOOPS[loop], pair(kind, len(images.labels)), images, steps)
    print(json.dumps(watch.peak()._asdict()))


def report(turns: dict[Name, Turns], peaks: dict[Name, Any]) -> list[dict[str, Any]]:
    return [
        {
            "loop": loop,
            "student": kind,
            "step_ms": round(one.fastest, 3),
            "images_per_second": round(1e3 * BATCH / one.fastest),
            "times_bare": round(one.fastest / turns["bare", kind].fastest, 3),
            "times_alone": round(one.fastest / turns[loop, "alone"].fastest, 3),
            "median_ms": round(median(one.quiet or one.disturbed), 3),
            "peak_mib": peaks[loop, kind],
            "quiet_turns_ms": [round(value, 3) for value in one.quiet],
            "disturbed_turns": len(one.disturbed),
        }
        for (loop, kind), one in turns.items()
    ]


def table(results: list[dict[str, Any]]) -> str:
    head = [
        "loop",
        "student",
        "ms a step",
        "images/s",
        "times bare",
        "times alone",
        "median ms",
        "quiet turns",
        "peak MiB (private)",
    ]
    body = [
        [
            row["loop"],
            row["student"],
            f"{row['step_ms']:.2f}",
            f"{row['images_per_second']:,}",
            f"{row['times_bare']:.2f}",
            f"{row['times_alone']:.2f}",
            f"{row['median_ms']:.2f}",
            str(len(row["quiet_turns_ms"])),
            f"{row['peak_mib']['resident']:.0f} ({row['peak_mib']['private']:.0f})",
        ]
        for row in results
    ]
    return common.rows(head, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each variant [%(default)s]")
    parser.add_argument("--threads", type=int, default=THREADS, help="of torch [%(default)s]")
    parser.add_argument("--patience", type=float, default=300, help="seconds to look for quiet turns [%(default)s]")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    words = parser.parse_args()
    common.pin(words.threads)
    if words.memory:
        memory(words.memory[0], words.memory[1], steps=10)
        return
    steps = {"alone": 90, "online": 9, "cached": 90}
    images = common.mnist()
    turns = measure(words.rounds, steps, words.patience, images)

    def peak(*name: str) -> Any:
        return common.in_a_process(__file__, "--threads", str(words.threads), "--memory", *name)

    settings = {
        "images": images.origin,
        "pair": ["mnist_large", "mnist_small"],
        "batch": BATCH,
        "precision": "fp32",
        "steps_per_turn": steps,
        "peak_mib_without_training": peak("none", "none"),
    }
    results = report(turns, {name: peak(*name) for name in turns})
    common.write("steps", settings, results, table(results))


if __name__ == "__main__":
    main()
