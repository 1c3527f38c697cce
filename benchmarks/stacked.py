"""When are students faster together than one by one? A step of K of them, against K steps of one, in turns.

The students of the MNIST pair, and of the X-ray pair with `--pairs xray`: kept teacher outputs, float32, each student
with an objective and a learning rate of its own. Only ratios are told: they hold on a busy machine, too, though less
well. What a sweep does on a device follows from the same measurement, made there.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch

import _common as common
from peers.pairs import BATCH, PAIRS, RATE, Pair, classifiers, data
from understudy.config import TrainConfig
from understudy.data.batches import Batch
from understudy.distillation import methods
from understudy.numerics import Numerics
from understudy.stacked import Student, choice

STUDENTS = (2, 4, 8)
TEMPERATURES, ALPHAS = (1.0, 2.0, 4.0, 8.0, 16.0), (0.25, 0.5, 0.75, 1.0)


def students(pair: Pair, count: int) -> list[Student]:
    """Return `count` cells of a sweep: every temperature with the first share, then with the second, ..."""
    _, network = classifiers(pair, data(pair, 2))
    return [
        Student(f"cell {number}", network, _terms(number), TrainConfig(batch_size=BATCH, lr=RATE * (1 + number)))
        for number in range(count)
    ]


def _terms(number: int) -> tuple[Any, ...]:
    heat, alpha = TEMPERATURES[number % len(TEMPERATURES)], ALPHAS[number // len(TEMPERATURES) % len(ALPHAS)]
    return methods.terms("kd", temperature=heat, ce_weight=1 - alpha, kd_weight=alpha)


def batch(pair: Pair, device: torch.device) -> Batch:
    own = data(pair, BATCH)
    teacher = torch.randn(BATCH, pair.classes, generator=torch.Generator().manual_seed(0))
    images = own.frames.float().div_(255)
    return Batch(images.to(device), own.labels.to(device), torch.arange(BATCH), teacher.to(device))


def measure(name: str, count: int, device: torch.device, rounds: int, steps: int) -> dict[str, Any]:
    """Return how many times as fast `count` students are together, in each round and in the middle one."""
    own, given = students(PAIRS[name], count), batch(PAIRS[name], device)
    found = [choice.measure(own, given, numerics=Numerics(), steps=steps) for _ in range(rounds)]
    ratios = sorted(one.ratio for one in found)
    fitting = min(one.students for one in found)
    return {
        "student": PAIRS[name].student,
        "students": count,
        "fitting": fitting,
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
        "stacked": fitting == count and all(one.pays for one in found),
    }


def line(row: dict[str, Any]) -> list[str]:
    ratios = row["ratios"]
    told = "yes" if row["stacked"] else "no"
    return [row["student"], str(row["students"]), f"{row['ratio']:.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}", told]


def table(rows: Sequence[dict[str, Any]], device: torch.device, note: str) -> str:
    head = ("student", "students", "times as fast together", "over the rounds", "worth it")
    told = f"On the {'CPU' if device.type == 'cpu' else torch.cuda.get_device_name(device)}, batches of {BATCH}."
    return "\n\n".join(filter(None, [told, note, common.rows(head, [line(row) for row in rows])]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", type=int, nargs="+", default=STUDENTS, help="how many at once [%(default)s]")
    parser.add_argument("--pairs", nargs="+", choices=("mnist", "xray"), default=["mnist"], help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each [%(default)s]")
    parser.add_argument("--steps", type=int, default=20, help="steps in a measurement [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="of torch [%(default)s]")
    parser.add_argument("--note", default="", help="on the circumstances, for the table")
    words = parser.parse_args()
    common.pin(words.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [measure(name, count, device, words.rounds, words.steps) for name in words.pairs for count in words.students]
    settings = {
        "batch": BATCH,
        "precision": "fp32",
        "device": device.type,
        "rounds": words.rounds,
        "steps": words.steps,
        "note": words.note,
    }
    common.write("stacked", settings, rows, table(rows, device, words.note))


if __name__ == "__main__":
    main()
