"""Peak memory as a function of the number of images: decoding a folder, then training.

Two sizes of work: small digits with the demo's student, and 96-pixel grey pictures (such as X-rays) with `cnn3`. Each
row runs in a process of its own and takes the same number of steps, since the heap takes some hundred of them to reach
its size. What is private to the process should not grow with the number of images; what is resident does, since decoded
images are mapped from a file, but these pages can be taken back at any time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import _common as common
from understudy.config import DataConfig, TrainConfig
from understudy.data.batches import Epochs, Split
from understudy.data.store import Store, open_store
from understudy.data.views import POLICIES
from understudy.distillation import Distiller
from understudy.engine import Engine
from understudy.models.build import build
from understudy.record import InputSpec
from understudy.train import Training

THREADS = 2
COUNTS = (2000, 4000, 16000)  # a full batch of validation images, and more


class Work(NamedTuple):
    side: int
    student: str


WORKS = {"digits": Work(8, "mnist_small"), "pictures": Work(96, "cnn3")}


def fill(folder: Path, count: int, side: int) -> None:
    """Write grey JPEGs of two classes, smooth as pictures are and all different."""
    generator = np.random.default_rng(0)
    for number in range(count):
        place = folder / ("bright" if number % 2 else "dark") / f"{number:06d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 128, (6, 6), np.uint8) + np.uint8(127 * (number % 2))
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(place)


def decode_and_train(folder: Path, cache: Path, student: str, epochs: int) -> dict[str, Any]:
    """Return the peaks after the imports, after decoding, and after training."""
    watch = common.Watch()
    peaks: dict[str, Any] = {"started": watch.peak()._asdict()}
    store = open_store(DataConfig(source=str(folder)), cache=cache)
    peaks |= {"frames_mib": round(store.frames.nbytes / 2**20, 1), "decoded": watch.peak()._asdict()}
    train(store, student, epochs, cache / "checkpoint.safetensors")
    peaks["trained"] = watch.peak()._asdict()
    return peaks


def train(store: Store, student: str, epochs: int, path: Path) -> None:
    parts = {
        name: Split(store.frames, store.labels, store.ids, rows, size=store.image_size, device=torch.device("cpu"))
        for name, rows in store.splits.items()
    }
    spec = InputSpec(channels=store.channels, sizes=(store.frame, store.image_size), mean=(0.5,), std=(0.25,))
    training = Training(
        Distiller(None, build(student, classes=store.classes, spec=spec, seed=0)),
        Epochs(parts["train"], policy=POLICIES["light"], view_seed=0, batch_size=64),
        parts["val"],
        TrainConfig(epochs=epochs),
        seed=0,
        engine=Engine(device="cpu", threads=torch.get_num_threads()),
        path=path,
    )
    training.run()


def measure(name: str, count: int, epochs: int) -> dict[str, Any]:
    work = WORKS[name]
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder) / "images", count, work.side)
        peaks = common.in_a_process(__file__, "--child", folder, work.student, str(epochs))
    return {"work": name, "side": work.side, "student": work.student, "images": count, "epochs": epochs, **peaks}


def table(results: list[dict[str, Any]]) -> str:
    head = [
        "work",
        "images",
        "epochs",
        "decoded MiB",
        "private: started",
        "decoded",
        "trained",
        "resident: decoded",
        "trained",
    ]
    body = [
        [
            f"{row['work']}, {row['side']} px, {row['student']}",
            f"{row['images']:,}",
            str(row["epochs"]),
            f"{row['frames_mib']:.0f}",
            *(f"{row[stage]['private']:.0f}" for stage in ("started", "decoded", "trained")),
            *(f"{row[stage]['resident']:.0f}" for stage in ("decoded", "trained")),
        ]
        for row in results
    ]
    return common.rows(head, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of images [%(default)s]")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    words = parser.parse_args()
    common.pin(THREADS)
    if words.child:
        root = Path(words.child[0])
        print(json.dumps(decode_and_train(root / "images", root / "cache", words.child[1], int(words.child[2]))))
        return
    most = max(words.counts)
    results = [measure(name, count, -(-most // count)) for name in WORKS for count in words.counts]
    settings = {"batch": 64, "augment": "light", "unit": "MiB"}
    common.write("memory", settings, results, table(results))


if __name__ == "__main__":
    main()
