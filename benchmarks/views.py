"""How many distinct views does a student need? Validation accuracy of students taught on 1, 4, 16 or ever fresh views.

MNIST (6,000 images to learn from) and the chest X-rays, three seeds each, the same teacher, budget and initial weights.
The test images are never read. Each count of views is a run of the product in a folder of its own, so a second call
goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image

import _common as common
from understudy import config as configuration
from understudy.pipeline import Run, trainings
from understudy.pipeline.materials import gather

COUNTS: dict[str, int | str] = {"1": 1, "4": 4, "16": 16, "all": "online"}
SEEDS = 3
T95 = 4.303  # Student's t for 2 degrees of freedom


def mnist_folder(place: Path, train: int = 6000, val: int = 4000) -> Path:
    """Write some of MNIST's training images as a folder of PNG files with train and val splits."""
    if (place / "done").exists():
        return place
    images = common.mnist()
    for number in range(train + val):
        folder = place / ("train" if number < train else "val") / str(int(images.labels[number]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.frames[number, 0].numpy()).save(folder / f"{number:05d}.png")
    (place / "done").touch()
    return place


def tasks(work: Path) -> dict[str, dict[str, Any]]:
    shared = Path(os.environ.get("UNDERSTUDY_TEST_DATA") or common.ROOT.parent / "shared" / "data")
    return {
        "MNIST, 6,000 images, 48 epochs": {
            "data": {"source": str(mnist_folder(work / "mnist"))},
            "teacher": {"model": "mnist_large", "epochs": 8},
            "student": {"model": "mnist_small"},
            "train": {"epochs": 48, "lr": 3e-3, "augment": "light"},
        },
        "chest X-rays, 32 px, 24 epochs": {
            "data": {"source": str(shared / "chest_xray"), "image_size": 32},
            "teacher": {"model": "resnet18", "epochs": 12},
            "student": {"model": "cnn3"},
            "train": {"epochs": 24, "augment": "light"},
        },
    }


def measure(work: Path, name: str, settings: dict[str, Any], threads: int, alone: bool) -> list[dict[str, Any]]:
    """Train one teacher, then the students of each count of views from it; return one row each."""
    short = name.split(",")[0].replace(" ", "-")
    common_settings = {**settings, "seeds": SEEDS, "threads": threads, "precision": "fp32", "device": "cpu"}
    teacher = work / f"{short}-teacher"
    with Run.opened(teacher, configuration.validate(common_settings), kind="train") as run:
        trainings.teacher(run, gather(run))
    rows = []
    for label, views in COUNTS.items():
        own = {**common_settings, "teacher": {"model": str(teacher)}, "train": {**settings["train"], "views": views}}
        if label == "all":  # as many views as epochs are never seen twice, and are kept
            own["train"]["views"] = settings["train"]["epochs"]
        with Run.opened(work / f"{short}-{label}", configuration.validate(own)) as run:
            materials = gather(run)
            trainings.teacher(run, materials)
            for seed in run.config.seeds:
                if alone:
                    trainings.baseline(run, materials, seed)
                trainings.student(run, materials, seed)
            for role in ("baseline", "student") if alone else ("student",):
                rows.append(row(name, label, role, run))
                print(rows[-1], flush=True)
    return rows


def row(name: str, label: str, role: str, run: Run) -> dict[str, Any]:
    fits = [model.epochs[(model.best_epoch or 1) - 1] for model in run.record.models.values() if model.role == role]
    return {
        "data": name,
        "views": label,
        "role": role,
        "val_accuracy": [round(fit.val_accuracy, 5) for fit in fits],
        "val_nll": [round(fit.val_nll, 5) for fit in fits],
        "teacher_seconds": round(run.record.outputs.seconds, 1) if run.record.outputs and role == "student" else None,
    }


def table(rows: list[dict[str, Any]]) -> str:
    def told(values: list[float], scale: float, digits: int) -> str:
        half = T95 * stdev(values) / math.sqrt(len(values))
        return f"{scale * mean(values):.{digits}f} ± {scale * half:.{digits}f}"

    head = ["data", "student", "views", "validation accuracy, %", "validation NLL"]
    body = [
        [
            one["data"],
            {"baseline": "alone", "student": "distilled"}[one["role"]],
            one["views"],
            told(one["val_accuracy"], 100, 2),
            told(one["val_nll"], 1, 4),
        ]
        for one in rows
    ]
    return common.rows(head, body) + "\n\nMean of three seeds ± half of the 95 % interval (Student's t)."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs" / "views", help="folder [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="of torch [%(default)s]")
    parser.add_argument("--only", default="", help="part of a task's name")
    words = parser.parse_args()
    common.pin(words.threads)
    found = {name: settings for name, settings in tasks(words.work).items() if words.only in name}
    rows = [
        row
        for name, settings in found.items()
        for row in measure(words.work, name, settings, words.threads, alone=name.startswith("MNIST"))
    ]
    if not words.only:
        told = {name: {**one, "data": {**one["data"], "source": name.split(",")[0]}} for name, one in found.items()}
        common.write("views", {"tasks": told, "seeds": SEEDS, "threads": words.threads}, rows, table(rows))


if __name__ == "__main__":
    main()
