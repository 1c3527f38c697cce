"""A tiny run to export, and the command that exports it; for the tests of `understudy export`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import typer

import small_runs
from small_runs import stripes
from understudy import exportcommands
from understudy import record as records
from understudy.pipeline import exporting, forms
from understudy.record import Compressed, Latency, Quantized, Record


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 20 px: frames of 18, views of 16."""
    return stripes(tmp_path_factory.mktemp("data") / "photos", side=20)


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return small_runs.distilled(photos, folder, data={"image_size": 16}, seeds=[0]).folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


def export(*words: object) -> None:
    """Give the command; what it says of mistakes comes as an exception."""
    app = typer.Typer()
    app.callback()(lambda: None)  # so that the command keeps its name
    exportcommands.add(app)
    given = exportcommands.spread(["export", *map(str, words)])
    typer.main.get_command(app).main(given, prog_name="understudy", standalone_mode=False)


def compressed(run: Path, name: str, *, before: str, quantized: bool = False) -> Record:
    """Note a stage of compression that is the student as it was; a float one has weights of its own."""
    record = records.load(run)
    folder = run / forms.FOLDER / name
    folder.mkdir(parents=True)
    shutil.copyfile(run / exporting.FILE, folder / forms.FILE)
    if not quantized:
        for file in (run / "student-0").glob("model.*"):
            shutil.copyfile(file, folder / file.name)
    with np.load(run / "predictions.npz") as known:
        np.savez(folder / forms.ANSWERS, **{split: known[f"{split}/student-0"] for split in ("val", "test")})
    record.compressed.append(
        Compressed(
            name=name,
            before=before,
            path=f"{forms.FOLDER}/{name}/{forms.FILE}",
            parameters=1,
            macs=1,
            bytes=1,
            latency=Latency(runtime="", threads=1, runs=1, p50=1, p95=1),
            quantized=Quantized(way="post-training", images=1) if quantized else None,
        )
    )
    records.save(record, run)
    return record


def files(run: Path) -> set[str]:
    return {path.name for path in (run / exporting.FOLDER).iterdir()}
