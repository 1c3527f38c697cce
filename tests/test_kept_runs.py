"""Whole runs on kept outputs: the same students as with the teacher running along, whatever becomes of the cache."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import small_runs
from small_runs import COUNTS, stripes, tiny, weights
from understudy import api
from understudy import record as records
from understudy.data import outputs
from understudy.data.rowfile import RowFile
from understudy.models import files
from understudy.pipeline import teaching, trainings
from understudy.pipeline.chain import Link
from understudy.record import Record

pytestmark = pytest.mark.slow

TRAIN = 2 * COUNTS["train"]
EPOCHS = 4
SECONDS = 300


@pytest.fixture(autouse=True)
def _no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    small_runs.without_export(monkeypatch)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stripes(tmp_path_factory.mktemp("data") / "photos")


def trained(photos: Path, place: Path, seed: int) -> Path:
    """Train a teacher alone; return its weights file."""
    given = tiny(photos, teacher={"seed": seed}, train={"augment": "light"})
    api.run(given, place / "run", kind="train")
    return place / "run" / "teacher" / "model.safetensors"


@pytest.fixture(scope="module")
def teachers(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [trained(photos, tmp_path_factory.mktemp("teacher"), seed) for seed in (5, 6)]


@pytest.fixture
def teacher(teachers: list[Path]) -> Path:
    return teachers[0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settings(teacher: Path, **over: Any) -> dict[str, Any]:
    """Return what every run here has in common: a teacher that is ready, one seed, fresh views in every epoch."""
    train = {"epochs": EPOCHS, "views": EPOCHS, "augment": "light", **over.pop("train", {})}
    return {"teacher": {"model": str(teacher)}, "train": train, "seeds": [0], **over}


def run(photos: Path, folder: Path, teacher: Path, **over: Any) -> Record:
    return small_runs.distilled(photos, folder, **settings(teacher, **over)).record


def computed(record: Record) -> int:
    assert record.outputs is not None
    return record.outputs.computed


def elsewhere(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """From now on, use another cache: nothing is known there."""
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(place))


def student_logits(folder: Path, name: str = "student-0") -> torch.Tensor:
    network, _ = files.load(folder / name / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        found: torch.Tensor = network(torch.rand(64, 1, 10, 10, generator=generator))
    return found


# --- the same students ---


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
def test_kept_and_running_teachers_make_the_same_student(
    mix: str, photos: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    """Both see view number `epoch` in every epoch; they differ by what half precision rounds away."""
    along = {"mix": mix, "views": "online"}
    kept = run(photos, tmp_path / "kept", teacher, train={"mix": mix})
    online = run(photos, tmp_path / "online", teacher, train=along)
    other = run(photos, tmp_path / "other", teacher, train=along, distill={"temperature": 3.1})  # 3 before
    assert (computed(kept), online.outputs) == (EPOCHS * TRAIN, None)
    assert kept.models["baseline-0"].weights_hash == online.models["baseline-0"].weights_hash
    losses = [[epoch.train_loss for epoch in one.models["student-0"].epochs] for one in (kept, online, other)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)
    logits = [student_logits(tmp_path / name) for name in ("kept", "online", "other")]
    scale = float(logits[1].abs().max())
    near, far = (float((logits[0] - one).abs().max()) / scale for one in logits[1:])
    assert near < 2.0**-11, (near, far)
    assert far > 10 * near, (near, far)


def test_other_objectives_and_seeds_need_no_teacher(
    photos: Path, teacher: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(photos, tmp_path / "first", teacher)
    assert first.outputs is not None
    assert (first.outputs.computed, first.outputs.views, first.outputs.images) == (EPOCHS * TRAIN, EPOCHS, TRAIN)

    def load(*rest: object, embedding: bool) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(teaching, "_load", load)
    objective = {"temperature": 9.0}
    second = run(photos, tmp_path / "second", teacher, distill=objective, seeds=[3, 4], train={"lr": 5e-3})
    assert second.outputs is not None
    assert (second.outputs.computed, second.outputs.seconds) == (0, 0)
    assert second.status == "done"


def test_a_run_with_more_views_adds_to_those_that_are_there(
    photos: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    assert computed(run(photos, tmp_path / "two", teacher, train={"views": 2})) == 2 * TRAIN
    assert computed(run(photos, tmp_path / "four", teacher, train={"views": 4})) == 2 * TRAIN
    assert computed(run(photos, tmp_path / "three", teacher, train={"views": 3})) == 0


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_views_are_kept_as_well(mix: str, photos: Path, teacher: Path, cache: Path, tmp_path: Path) -> None:
    over = {"train": {"mix": mix, "views": 2}}
    first, again = (run(photos, tmp_path / name, teacher, **over) for name in ("first", "again"))
    plain = run(photos, tmp_path / "plain", teacher, train={"views": 2})
    assert [computed(one) for one in (first, again, plain)] == [2 * TRAIN, 0, 2 * TRAIN]
    assert weights(tmp_path / "first") == weights(tmp_path / "again")
    assert weights(tmp_path / "first")["student-0"] != weights(tmp_path / "plain")["student-0"]
    assert len(list((cache / "outputs").iterdir())) == 2


# --- never stale ---


def test_a_teacher_replaced_under_the_same_name(
    photos: Path, teachers: list[Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "teacher.safetensors"

    def put(source: Path) -> None:
        shutil.copy(source, place)
        shutil.copy(source.with_suffix(".json"), place.with_suffix(".json"))

    put(teachers[0])
    run(photos, tmp_path / "before", place)
    put(teachers[1])
    assert computed(run(photos, tmp_path / "after", place)) == EPOCHS * TRAIN
    elsewhere(monkeypatch, tmp_path / "fresh")
    run(photos, tmp_path / "expected", place)
    assert weights(tmp_path / "after") == weights(tmp_path / "expected")
    assert weights(tmp_path / "after")["student-0"] != weights(tmp_path / "before")["student-0"]


@pytest.mark.parametrize("change", ["an image", "a sample more", "a sample less"])
def test_other_images_are_asked_for_anew(
    change: str, teacher: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = stripes(tmp_path / "photos")
    run(photos, tmp_path / "before", teacher)
    image = photos / "train" / "cat" / "007.png"
    pixels = np.asarray(Image.open(image))
    if change == "an image":
        Image.fromarray(255 - pixels).save(image)
    elif change == "a sample more":
        Image.fromarray(255 - pixels).save(image.with_name("more.png"))
    else:
        image.unlink()
    count = TRAIN + {"an image": 0, "a sample more": 1, "a sample less": -1}[change]
    assert computed(run(photos, tmp_path / "after", teacher)) == EPOCHS * count
    elsewhere(monkeypatch, tmp_path / "fresh")
    run(photos, tmp_path / "expected", teacher)
    assert weights(tmp_path / "after") == weights(tmp_path / "expected")


# --- bad conditions ---


@pytest.fixture
def expected(photos: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The weights of a run whose cache nobody touched."""
    with monkeypatch.context() as patch:
        elsewhere(patch, tmp_path / "untouched")
        run(photos, tmp_path / "expected", teacher, seeds=[0, 1])
    return weights(tmp_path / "expected")


def test_a_full_disk_costs_time_and_nothing_else(
    photos: Path,
    teacher: Path,
    cache: Path,
    tmp_path: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(self: RowFile, block: int, rows: np.ndarray) -> None:
        if cache in self.path.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, block, rows)  # of the forecast, which measures how long it takes

    original = RowFile.write
    monkeypatch.setattr(RowFile, "write", write)
    record = run(photos, tmp_path / "run", teacher, seeds=[0, 1])
    assert record.status == "done"
    assert weights(tmp_path / "run") == expected
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "The teacher's outputs cannot be kept in" in said
    assert "No space left on device" in said


def test_the_cache_is_deleted_between_stages(
    photos: Path,
    teacher: Path,
    cache: Path,
    tmp_path: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = trainings.train

    def train(run: Any, materials: Any, link: Link) -> None:
        original(run, materials, link)
        if link.role == "baseline":
            shutil.rmtree(cache)

    monkeypatch.setattr(trainings, "train", train)
    record = run(photos, tmp_path / "run", teacher, seeds=[0, 1])
    assert weights(tmp_path / "run") == expected
    assert computed(record) == 2 * EPOCHS * TRAIN


def test_outputs_are_deleted_and_cut_short_while_a_student_learns(
    photos: Path,
    teacher: Path,
    cache: Path,
    tmp_path: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every epoch finds another damage: nothing at all, a torn file, an empty one, one of zeros."""
    original, turn = outputs.Outputs.view, iter(range(10**6))

    def view(self: outputs.Outputs, number: int) -> outputs.Table:
        harm = next(turn)
        for path in cache.glob("outputs/*/view-*.rows"):
            if harm % 4 == 0:
                shutil.rmtree(path.parent, ignore_errors=True)
            else:
                path.write_bytes((path.read_bytes()[:-3], b"", bytes(path.stat().st_size))[harm % 4 - 1])
        return original(self, number)

    monkeypatch.setattr(outputs.Outputs, "view", view)
    run(photos, tmp_path / "run", teacher, seeds=[0, 1])
    assert weights(tmp_path / "run") == expected


SLOWLY = """
import sys, time
from understudy.data import outputs
outputs._LARGEST_BLOCK = 8
ask = outputs._ask
def slowly(*given):
    time.sleep({pause})
    return ask(*given)
outputs._ask = slowly
import pytest, small_runs
small_runs.without_export(pytest.MonkeyPatch())
from understudy import cli
sys.argv[0] = "understudy"
cli.main()
"""


@pytest.fixture
def begin() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts a run whose teacher answers slowly, 8 images at a time; none outlives the test."""
    begun: list[subprocess.Popen[str]] = []

    def start(photos: Path, folder: Path, given: dict[str, Any], pause: float) -> subprocess.Popen[str]:
        words = ["distill", *small_runs.words(photos, **given), "--out", str(folder)]
        command = [sys.executable, "-c", SLOWLY.format(pause=pause), *words]
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        around = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        pipe = subprocess.PIPE
        begun.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=pipe, encoding="utf-8", env=around))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


Begin = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_LARGEST_BLOCK", 8)


@pytest.mark.usefixtures("small_blocks")
def test_killed_while_outputs_are_filled(
    photos: Path, teacher: Path, cache: Path, tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = begin(photos, tmp_path / "run", settings(teacher), 0.1)
    end = time.monotonic() + SECONDS
    while not list(cache.glob("outputs/*/view-00001.rows")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert records.load(tmp_path / "run").outputs is None
    there = sum(RowsOf(cache).written())
    assert TRAIN <= there < EPOCHS * TRAIN
    resumed = api.resume(tmp_path / "run").record
    assert computed(resumed) == EPOCHS * TRAIN - there
    elsewhere(monkeypatch, tmp_path / "fresh")
    run(photos, tmp_path / "expected", teacher)
    assert weights(tmp_path / "run") == weights(tmp_path / "expected")


class RowsOf:
    """The outputs in a cache that holds those of one teacher."""

    def __init__(self, cache: Path) -> None:
        from understudy.data import kept

        (folder,) = (cache / "outputs").iterdir()
        found = kept.read(folder)
        assert found is not None
        self.folder = found

    def written(self) -> list[int]:
        """Return how many rows of each view are sound."""
        counts = []
        for number in self.folder.views():
            file = self.folder.view(number)
            spans = [file.span(block) for block in file.missing()]
            counts.append(self.folder.rows - sum(span.stop - span.start for span in spans))
        return counts


@pytest.mark.usefixtures("small_blocks")
def test_two_runs_fill_the_same_outputs_at_once(
    photos: Path, teacher: Path, cache: Path, tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [settings(teacher), settings(teacher, distill={"temperature": 2.0})]
    both = [begin(photos, tmp_path / f"run-{number}", one, 0.05) for number, one in enumerate(given)]
    for process in both:
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, said
    work = [computed(records.load(tmp_path / f"run-{number}")) for number in range(2)]
    assert sum(work) >= EPOCHS * TRAIN
    assert RowsOf(cache).written() == [TRAIN] * EPOCHS
    elsewhere(monkeypatch, tmp_path / "fresh")
    for number, one in enumerate(given):
        small_runs.distilled(photos, tmp_path / f"alone-{number}", **one)
        assert weights(tmp_path / f"run-{number}") == weights(tmp_path / f"alone-{number}")
