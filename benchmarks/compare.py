"""Which methods help? `understudy compare` on 1 %, 10 % and all of MNIST, on chest X-rays, and on some of CIFAR-10.

The comparisons are runs of the product in folders of their own, so a second call goes on where the first one stopped.
Budgets are small, for a machine with two cores: what helps here need not be what helps after long training. The folders
of images are made from the data sets as they lie in `$UNDERSTUDY_TEST_DATA` or `../shared/data`; validation and test
images are the same for every share of MNIST, whose other images are left out altogether. Methods are chosen on
validation; of each comparison only the chosen one is seen by the test images.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import _common as common
from understudy import record as records

DATA = Path(os.environ.get("UNDERSTUDY_TEST_DATA") or common.ROOT.parent / "shared" / "data")
LOGITS = ("kd", "logit_mse", "reverse_kl", "jsd", "lskd", "dkd", "nkd", "dist", "mlkd", "wsld", "teacher_free")
KEPT = (*LOGITS, "pkt", "cc", "rkd_distance", "crd")
"""Methods whose teacher is paid for once."""
EACH_FAMILY = (*LOGITS, "attention", "sp", "rkd_distance", "pkt", "crd")
"""Logits, features, relations and contrast, where the teacher's embedding (25,088 numbers) makes all methods slow."""
FEWER = ("kd", "nkd", "dkd", "dist", "attention", "crd")
"""One or more of each kind, where all would take hours."""
COMMAND = (sys.executable, "-m", "understudy.cli")


@dataclass(frozen=True)
class Task:
    """One comparison."""

    folder: Callable[[Path], Path]
    """Makes the images, below a folder; returns where they lie."""
    words: str
    """Of the command line."""
    methods: tuple[str, ...] = (*KEPT, "sp", "attention")

    @property
    def options(self) -> list[str]:
        """Of the command line, those that all tasks share among them."""
        return [*self.words.split(), "--threads", "1", "--precision", "fp32"]


# --- images ----------------------------------------------------------------------------------------------------------


def mnist(share: float, work: Path) -> Path:
    """Write MNIST with a share of its first 50,000 training images; 1,000 others choose, 4,000 test images judge."""
    place = work / f"mnist-{100 * share:g}"
    if (place / "done").exists():
        return place
    raw = DATA / "mnist" / "MNIST" / "raw"
    frames, labels = _idx(raw / "train-images-idx3-ubyte.gz", 16), _idx(raw / "train-labels-idx1-ubyte.gz", 8)
    tests, answers = _idx(raw / "t10k-images-idx3-ubyte.gz", 16), _idx(raw / "t10k-labels-idx1-ubyte.gz", 8)
    frames, tests = frames.reshape(-1, 28, 28), tests.reshape(-1, 28, 28)
    write(place / "train", frames[:50_000], labels[:50_000], few(labels[:50_000], share))
    write(place / "val", frames[-1_000:], labels[-1_000:])
    write(place / "test", tests[:4_000], answers[:4_000])
    (place / "done").touch()
    return place


def cifar10(images: int, work: Path) -> Path:
    """Write a subset of CIFAR-10: `images` of the first four batches to learn from, 2,000 of the fifth to choose by."""
    place = work / f"cifar10-{images}"
    if (place / "done").exists():
        return place
    packed = work / "cifar10-packed"
    if not (packed / "cifar-10-batches-py").exists():
        subprocess.run([sys.executable, str(DATA / "cifar10" / "unpack_cifar10.py"), str(packed)], check=True)
    batches = packed / "cifar-10-batches-py"
    parts = [_batch(batches / f"data_batch_{number}") for number in range(1, 5)]
    frames, labels = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    write(place / "train", frames, labels, few(labels, images / len(labels)))
    write(place / "val", *(part[:2_000] for part in _batch(batches / "data_batch_5")))
    write(place / "test", *(part[:5_000] for part in _batch(batches / "test_batch")))
    (place / "done").touch()
    return place


def xray(work: Path) -> Path:
    """Return the chest X-rays as they are."""
    return DATA / "chest_xray"


def few(labels: NDArray[np.uint8], share: float) -> NDArray[np.intp]:
    """Return the places of the first images of each class, the same share of every class."""
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.sort(np.concatenate([places[: max(1, round(share * len(places)))] for places in rows]))


def write(
    place: Path, frames: NDArray[np.uint8], labels: NDArray[np.uint8], rows: NDArray[np.intp] | None = None
) -> None:
    """Write images as PNG files, a folder for each class."""
    for row in range(len(labels)) if rows is None else rows:
        folder = place / str(int(labels[row]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frames[row]).save(folder / f"{row:05d}.png")


def _idx(file: Path, header: int) -> NDArray[np.uint8]:
    with gzip.open(file) as stream:
        return np.frombuffer(stream.read(), np.uint8, offset=header)


def _batch(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    import pickle

    values = pickle.loads(file.read_bytes(), encoding="bytes")  # of a data set that this project packed itself
    frames = np.asarray(values[b"data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(frames), np.asarray(values[b"labels"], np.uint8)


# --- comparisons -----------------------------------------------------------------------------------------------------


_MNIST = "--teacher mnist_large --student mnist_small --lr 3e-3 --augment light"
TASKS: dict[str, Task] = {
    "mnist-1": Task(partial(mnist, 0.01), f"{_MNIST} --epochs 16 --teacher-epochs 10 --views 8", EACH_FAMILY),
    "mnist-10": Task(partial(mnist, 0.1), f"{_MNIST} --epochs 8 --teacher-epochs 4 --views 4", (*FEWER, "pkt")),
    "mnist-100": Task(partial(mnist, 1.0), f"{_MNIST} --epochs 2 --teacher-epochs 1 --views 2", FEWER),
    "chest_xray": Task(
        xray, "--teacher resnet18 --student cnn3 --image-size 32 --epochs 8 --teacher-epochs 6 --augment light"
    ),
    "cifar10": Task(
        partial(cifar10, 4_000), "--teacher resnet18 --student cnn3 --epochs 6 --teacher-epochs 8 --augment standard"
    ),
}


def estimate(name: str, place: Path, seeds: int) -> str:
    """Say what a comparison would take, from the forecast for one method and one seed."""
    task = TASKS[name]
    words = [*COMMAND, "distill", str(place), *task.options, "--seeds", "1", "--dry-run", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    seconds = {stage["stage"]: stage["seconds"] for stage in json.loads(done.stdout)["stages"]}
    trainings = seeds * (seconds.pop("baseline") + len(task.methods) * seconds.pop("student"))
    return (
        f"{name}: teacher and all that is done once {sum(seconds.values()) / 60:.1f} min, {seeds} x "
        f"{len(task.methods) + 1} trainings {trainings / 60:.1f} min one at a time, if all methods took as long as kd"
    )


def compare(name: str, place: Path, work: Path, *, seeds: int, workers: int | None, note: str) -> None:
    """Run or resume a comparison, and write its table to `results/compare_<name>`."""
    task, run = TASKS[name], work / "runs" / name
    shown = ["--methods", *task.methods, *task.options, "--seeds", str(seeds)]
    files = ["--markdown", str(work / f"{name}.md"), "--json", str(work / f"{name}.json"), "--out", str(run)]
    at_a_time = ["--workers", str(workers)] if workers else []
    subprocess.run([*COMMAND, "compare", str(place), *shown, *files, *at_a_time], check=True)
    table = (work / f"{name}.md").read_text(encoding="utf-8").rstrip()
    results = json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
    settings = {"task": name, "words": shown, "note": note, "seconds": round(records.load(run).seconds)}
    told = [f"`understudy compare {name} {' '.join(shown)}`", note, table]
    common.write(f"compare_{name}", settings, results, "\n\n".join(filter(None, told)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=[], metavar="TASK", help=f"of {', '.join(TASKS)} [all]")
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs" / "compare", help="folder [%(default)s]")
    parser.add_argument("--seeds", type=int, default=5, help="students by each method [%(default)s]")
    parser.add_argument("--workers", type=int, help="trainings at a time [one for each core, where it pays]")
    parser.add_argument("--dry-run", action="store_true", help="only say what each comparison would take")
    parser.add_argument("--note", default="", help="on the circumstances, for the table")
    words = parser.parse_args()
    unknown = [name for name in words.tasks if name not in TASKS]
    if unknown:
        parser.error(f"no such task: {', '.join(unknown)}")
    common.pin(1)
    work = words.work.resolve()
    for name in words.tasks or TASKS:
        place = TASKS[name].folder(work)
        if words.dry_run:
            print(estimate(name, place, words.seeds), flush=True)
        else:
            compare(name, place, work, seeds=words.seeds, workers=words.workers, note=words.note)


if __name__ == "__main__":
    main()
