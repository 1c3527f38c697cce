"""`understudy export` with real runtimes and all that it measures: every format, compressed stages, the web page."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import small_runs
from export_runs import compressed, export, finished, photos, run
from understudy import answer, api
from understudy import record as records
from understudy.export import onnx, runtimes
from understudy.export.formats import FORMATS
from understudy.pipeline import exportable, exporting

__all__ = ["finished", "photos", "run"]  # fixtures

pytestmark = pytest.mark.slow


def test_a_new_student_is_exported_anew(run: Path) -> None:
    export(run, "--to", "torchscript")
    (run / exporting.FILE).unlink()
    api.resume(run)
    assert [one.path for one in records.load(run).exports] == [exporting.FILE]
    export(run, "--to", "torchscript")
    assert [one.path for one in records.load(run).exports] == [exporting.FILE, "export/student.torchscript"]


def test_compressed_stages_are_exported_beside_the_student(run: Path) -> None:
    compressed(run, "pruned", before="student-0")
    compressed(run, "int8-ptq", before="pruned", quantized=True)
    export(run, "--to", "onnx", "torchscript", "--stage", "student", "pruned")
    export(run, "--all", "--to", "onnx")
    record = records.load(run)
    assert [(one.stage, one.format) for one in record.exports] == [
        ("student", "ONNX"),
        ("student", "TorchScript"),
        ("pruned", "ONNX"),
        ("pruned", "TorchScript"),
        ("int8-ptq", "ONNX"),
    ]
    assert small_runs.digest(run / "export/pruned.onnx") == small_runs.digest(run / "compressed/pruned/model.onnx")
    told = json.loads((run / "export/golden/golden.json").read_text())["files"]
    assert {name for name in told if told[name]["kind"] == "int8"} == {"int8-ptq.onnx"}
    assert "8 bits" in record.exports[-1].note


# Real runtimes


def test_every_format_that_is_installed(run: Path, photos: Path) -> None:
    needs: dict[str, Any] = {"executorch": "executorch", "litert": "litert_torch"}
    there = [name for name in FORMATS if name not in needs or importlib.util.find_spec(needs[name])]
    export(run, "--to", *there)
    record = records.load(run)
    assert [one.format for one in record.exports] == [FORMATS[name].title for name in there]
    wanted = list(answer.predict(run, [photos / "test"]))
    for one in record.exports:
        assert one.on_frames.agreement == 1
        assert one.on_frames.max_difference < 1e-5
        assert one.load_ms is not None
        assert one.memory_bytes is not None
        assert one.memory_bytes > 10**7
        found = list(answer.predict(run / one.path, [photos / "test"], trusted=True))
        for ours, other in zip(found, wanted, strict=True):
            assert ours.probabilities == pytest.approx(other.probabilities, abs=1e-3)


def test_other_threads_leave_an_open_file_of_executorch_alone(run: Path) -> None:
    pytest.importorskip("executorch", reason="ExecuTorch is not installed")
    export(run, "--to", "executorch")
    path = run / "export/student.pte"
    images = np.load(run / "export/golden/golden.npy")
    two = runtimes.open_file(path, threads=2)
    wanted = two(images)
    for threads in (1, 3):
        np.testing.assert_array_equal(runtimes.open_file(path, threads=threads)(images), wanted)
        np.testing.assert_array_equal(two(images), wanted)  # its pool of threads is gone: it would hang


def test_a_page_is_written(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from understudy.export import web

    monkeypatch.setattr(web, "_check_engine", lambda folder: None)
    for name in web.ENGINE:
        (tmp_path / name).write_bytes(b"an engine")
    export(run, "--to", "web", "--engine", tmp_path)
    assert (run / "export/web/index.html").is_file()
    assert (run / "export/web/golden").is_dir()
    assert onnx.labels(run / "export/web/model.onnx") == ["cat", "dog"]
    assert exportable.STUDENT == "student"
