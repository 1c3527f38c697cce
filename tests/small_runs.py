"""Runs that take a second: 170 striped images, tiny networks. For tests of whole runs and of the command line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from understudy import api, config
from understudy.config import RunConfig
from understudy.distillation.methods import METHODS, Part
from understudy.pipeline import Run, exporting
from understudy.record import Record

COUNTS = {"train": 40, "val": 25, "test": 20}
"""Images of each class: enough validation images to choose by, or the split would be dissolved."""
SEEDS = (0, 1)
STAGES = ["teacher", "gate", "baseline-0", "student-0", "baseline-1", "student-1", "evaluate", "export"]
OBJECTIVE = {"temperature": 3.0, "alpha": 0.25}


def stripes(root: Path, *, classes: Sequence[str] = ("cat", "dog"), side: int = 10, seed: int = 0) -> Path:
    """Fill train, val and test folders with noisy grey stripes, whose direction tells the class."""
    rng = np.random.default_rng(seed)
    for split, count in COUNTS.items():
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for image in range(count):
                Image.fromarray(_stripes(rng, np.pi * number / len(classes), side)).save(folder / f"{image:03d}.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stripes(tmp_path_factory.mktemp("data") / "photos")


def _stripes(rng: np.random.Generator, angle: float, side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side] * (10 / side)
    wave = 120 + 50 * np.sin(1.5 * (x * np.cos(angle) + y * np.sin(angle)))
    return (wave + rng.normal(0, 60, (side, side))).clip(0, 255).astype(np.uint8)


def values(source: Path | str, **over: Any) -> dict[str, Any]:
    """Return the settings of a tiny run; sections in `over` go over them."""
    base: dict[str, Any] = {
        "data": {"source": str(source)},
        "teacher": {"model": "mnist_small", "epochs": 3, "seed": 5},
        "student": {"model": "mnist_small"},
        "train": {"epochs": 2, "batch_size": 16, "lr": 1e-2, "augment": "none"},
        "distill": OBJECTIVE,
        "seeds": list(SEEDS),
        "device": "cpu",
        "precision": "fp32",
        "threads": 1,
    }
    config.merge(base, over)
    return base


def stop_in(name: str) -> tuple[Callable[..., None], Callable[[], bool]]:
    """Return a progress and a stop: training `name` is stopped at the first step after it has told of one."""
    seen: list[str] = []

    def progress(task: str, /, *, done: int, total: int, note: str = "") -> None:
        seen.append(task)

    return progress, lambda: seen[-1:] == [name]


def tiny(source: Path | str, **over: Any) -> RunConfig:
    return config.validate(values(source, **over))


def words(source: Path | str, **over: Any) -> list[str]:
    """Return the same settings as words of a command line."""
    return [str(source), *(word for pair in _flat(values(source, **over)) for word in ("--set", pair))]


def _flat(section: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in section.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        elif prefix + key != "data.source":
            found.append(f"{prefix}{key}={value}")
    return found


def distilled(source: Path, folder: Path, **over: Any) -> api.DistillResult:
    return api.run(tiny(source, **over), folder)


def without_export(patch: pytest.MonkeyPatch) -> None:
    """Leave the export out, which takes longer than all else in a tiny run."""

    def export(run: Run, *rest: object) -> None:
        (run.folder / "export").mkdir(exist_ok=True)
        (run.folder / exporting.FILE).write_text("left out")

    patch.setattr(exporting, "_export", export)


def weights(folder: Path) -> dict[str, str]:
    """Return the hash of every weights file of a run, by model; computed here, not by the package."""
    return {path.parent.name: digest(path) for path in sorted(folder.glob("*/model.safetensors"))}


def lines(path: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`, without the times."""
    read = [json.loads(text) for text in path.read_text().splitlines()]
    return read if timed else [{key: value for key, value in line.items() if key != "seconds"} for line in read]


def digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def work_done(record: Record) -> dict[str, tuple[str, float, str]]:
    """Return what changes when a stage is done again: its seconds are measured to the nanosecond."""
    return {name: (stage.inputs, stage.seconds, stage.finished) for name, stage in record.stages.items()}


def snapshot(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Return inode, time of change and content of every file below a folder."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            status = path.stat()
            found[str(path.relative_to(folder))] = (status.st_ino, status.st_mtime_ns, digest(path))
    return found


def teach_by(patch: pytest.MonkeyPatch, loss: Callable[..., Any]) -> None:
    """Let the method kd use another loss."""
    patch.setitem(METHODS, "kd", replace(METHODS["kd"], parts=(Part(loss),)))
