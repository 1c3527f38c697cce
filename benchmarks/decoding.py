"""Images per second: decoded once and stored, read from the store, and decoded in every epoch where nothing is stored.

Real X-rays of 96 px where they are at hand, and generated photographs, JPEG of 500 x 400 px; frames for a student of
64 px. Each turn begins with an empty cache: the folder is listed and examined, read in random order as it is
streamed, then stored and read again. The draft mode of JPEG decodes a picture much larger than a frame at a half, a
quarter or an eighth of its size; X-rays of 96 px are too small for it. Files come from the system's cache, not from a
disk.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import numpy as np
from PIL import Image, JpegImagePlugin

import _common as common
from understudy.config import DataConfig
from understudy.data.frames import Frames
from understudy.data.store import Store, open_store

T = TypeVar("T")

SIZE, BATCH = 64, 64
GENERATED = 400
MOST_READ = 2000  # images an epoch
STORED_EPOCHS = 25  # one takes a few milliseconds
FIGURES = ("listed and examined", "epoch, streamed", "decoded and stored", "epoch, stored")


class Way(NamedTuple):
    """How images are decoded."""

    images: str
    workers: int
    draft: bool


# --- data ------------------------------------------------------------------------------------------------------------


def folders(place: Path) -> dict[str, Path]:
    """Return folders of images by what is in them."""
    data = Path(os.environ.get("UNDERSTUDY_TEST_DATA") or common.ROOT.parent / "shared" / "data")
    photographs = place / "photographs"
    fill(photographs, GENERATED)
    xrays = {"X-rays, 96 px": data / "chest_xray"} if (data / "chest_xray").is_dir() else {}
    return {**xrays, "photographs, 500 x 400": photographs}


def fill(folder: Path, count: int) -> None:
    """Write colour JPEGs of two classes: large shapes, and noise that makes the files as large as a camera's."""
    generator = np.random.default_rng(0)
    for number in range(count):
        file = folder / ("a" if number % 2 else "b") / f"{number:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (8, 10, 3), np.uint8))
        shapes = np.asarray(coarse.resize((500, 400), Image.Resampling.BICUBIC))
        noisy = shapes + generator.normal(0, 8, shapes.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=90)


# --- measuring -------------------------------------------------------------------------------------------------------


@contextmanager
def decoding(draft: bool) -> Iterator[None]:
    """Let JPEG files be decoded with or without the draft mode."""
    if draft:
        yield
        return
    with patch.object(JpegImagePlugin.JpegImageFile, "draft", lambda *_: None):
        yield


def turn(way: Way, folder: Path) -> dict[str, float]:
    """Return images per second for each of `FIGURES`."""
    with tempfile.TemporaryDirectory() as cache, decoding(way.draft):

        def opened(budget: float | None) -> Store:
            config = DataConfig(source=str(folder), image_size=SIZE, store_budget=budget)
            return open_store(config, cache=Path(cache), workers=way.workers)

        examined, streamed = timed(lambda: opened(1e-9))
        streaming, count = timed(lambda: epoch(streamed.frames))
        decoded, stored = timed(lambda: opened(None))
        reading, _ = timed(lambda: [epoch(stored.frames) for _ in range(STORED_EPOCHS)])
        images = len(stored.frames)
    rates = (images / examined, count / streaming, images / decoded, STORED_EPOCHS * count / reading)
    return dict(zip(FIGURES, map(round, rates), strict=True))


def timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def epoch(frames: Frames) -> int:
    """Read batches in random order, as a training does; return the number of images."""
    order = np.random.default_rng(0).permutation(len(frames))[:MOST_READ]
    return sum(len(batch) for batch in frames.ahead(np.split(order, range(BATCH, len(order), BATCH))))


def measure(ways: dict[Way, Path], rounds: int, patience: float) -> list[dict[str, Any]]:
    """Measure every way `rounds` times; each figure's best counts: whatever else runs can only slow it down."""
    turns: dict[Way, list[dict[str, Any]]] = {way: [] for way in ways}
    end = time.monotonic() + patience
    for _ in range(rounds):
        for way, folder in ways.items():
            common.wait_for_quiet(end)
            watch = common.Quiet()
            turns[way].append({**turn(way, folder), "quiet": watch()})
    return [
        {**way._asdict(), **{name: max(one[name] for one in turns[way]) for name in FIGURES}, "turns": turns[way]}
        for way in ways
    ]


# --- results ---------------------------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]]) -> str:
    body = [
        [
            row["images"],
            str(row["workers"]),
            "yes" if row["draft"] else "no",
            *(f"{row[name]:,}" for name in FIGURES),
            str(sum(one["quiet"] for one in row["turns"])),
        ]
        for row in results
    ]
    return f"Images per second.\n\n{common.rows(['images', 'threads', 'draft', *FIGURES, 'quiet turns'], body)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way [%(default)s]")
    parser.add_argument("--patience", type=float, default=30, help="seconds to wait for quiet in all [%(default)s]")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        ways = {
            Way(images, workers, draft): folder
            for images, folder in folders(Path(place)).items()
            for workers in (1, 2)
            for draft in ((True, False) if images.startswith("photographs") else (True,))
        }
        results = measure(ways, words.rounds, words.patience)
    settings = {"image_size": SIZE, "batch": BATCH, "images_an_epoch": MOST_READ, "photographs": GENERATED}
    common.write("decoding", settings, results, table(results))


if __name__ == "__main__":
    main()
