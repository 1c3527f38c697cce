"""`conformance.py` as a device runs it: in an environment that has NumPy and the runtime of the file, and nothing else.

Such environments are made here without a network, of links to what is installed; what they lack is asserted first.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_folder import CLASSES, FILE, change, check, device, environment, expected, exported, modules, report_of, run
from small_runs import distilled, stripes
from understudy import record as records
from understudy import storage
from understudy.export import golden

__all__ = ["device", "exported"]  # fixtures

FAKE_INTERPRETER = """
import os

import numpy as np


class Interpreter:
    def __init__(self, model_path, num_threads):
        assert num_threads == 2 and os.path.isfile(model_path)
        self.tensors = {7: None, 9: np.zeros((1, 3), np.float32)}

    def allocate_tensors(self):
        self.ready = True

    def get_input_details(self):
        return [{"index": 7}]

    def get_output_details(self):
        return [{"index": 9}]

    def set_tensor(self, index, image):
        assert self.ready and image.shape == (1, 16, 16, 3) and image.dtype == np.uint8
        self.tensors[index] = image

    def invoke(self):
        # the same memory for every answer, as real runtimes have it
        self.tensors[9][:] = 0.1
        self.tensors[9][0, int(self.tensors[7].astype(int).sum()) % 3] = 0.8

    def get_tensor(self, index):
        return self.tensors[index]
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with NumPy and ONNX Runtime."""
    python = environment(tmp_path_factory.mktemp("bare") / "venv", "numpy", "onnxruntime")
    looked_for = (
        "numpy",
        "onnxruntime",
        "understudy",
        "torch",
        "onnx",
        "PIL",
        "pydantic",
        "ai_edge_litert",
        "executorch",
    )
    assert modules(python, *looked_for) == {"numpy", "onnxruntime"}
    return python


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with nothing at all."""
    python = environment(tmp_path_factory.mktemp("nothing") / "venv")
    assert modules(python, "numpy", "onnxruntime", "pip") == set()
    return python


def refused(python: Path, folder: Path, *words: str | Path) -> str:
    """Return the one sentence with which the script refuses."""
    done = check(python, folder, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert not list(folder.rglob("*.device.json"))
    [line] = done.stderr.splitlines()
    return line


# What passes


def test_an_exported_file_passes_where_only_its_runtime_is_installed(bare: Path, device: Path) -> None:
    done = check(bare, device, "--threads", "2")
    assert (done.returncode, done.stderr) == (0, "")
    report = report_of(device)
    assert (report.file, report.passed, report.images, report.same) == (FILE, True, 5, 5)
    assert report.hash == storage.hash_file(device / FILE)
    assert 0 <= report.max_difference <= report.tolerance == golden.FLOAT_TOLERANCE
    assert report.runtime == f"ONNX Runtime {metadata.version('onnxruntime')}"
    latency = report.latency
    assert (latency.runtime, latency.threads, latency.runs, latency.batch) == (report.runtime, 2, 5, 1)
    assert 0 < latency.p50 <= latency.p95
    assert latency.p99 is None
    assert report.load_ms > 0
    assert report.peak_memory_bytes is None or report.peak_memory_bytes > 1e6
    assert report.device.endswith(f"{os.uname().sysname} {os.uname().machine}")
    shown = " ".join(done.stdout.split())
    for part in (f"{FILE} on {report.runtime}", "answers 5 of 5 as expected", "(5 runs, threads: 2)", "PASSED"):
        assert part in shown


@pytest.mark.slow
def test_a_hundred_runs_have_a_99th_percentile(bare: Path, device: Path) -> None:
    assert check(bare, device, "--runs", "100").returncode == 0
    latency = report_of(device).latency
    assert latency.p99 is not None
    assert latency.p95 <= latency.p99


@pytest.mark.slow
def test_files_and_folders_can_be_named(bare: Path, device: Path, tmp_path: Path) -> None:
    shutil.move(device / "golden", tmp_path / "known")
    shutil.move(device / FILE, tmp_path / FILE)
    done = check(bare, device, FILE, "--golden", "known", "--out", "found/here")
    assert (done.returncode, done.stderr) == (0, "")
    assert report_of(tmp_path / "found" / "here").passed


# What fails


def test_a_wrong_answer_fails_and_is_named(bare: Path, device: Path) -> None:
    def turn(found: dict[str, Any]) -> None:
        rows = expected(found, 1)
        rows[:] = [0.1, 0.1, 0.1]
        rows[2] = 0.8

    answer = json.loads((device / "golden" / "golden.json").read_text())["images"][1]["expected"][FILE]["class"]
    assert answer != CLASSES[2]
    change(device, turn)
    done = check(bare, device)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"golden-01.png: '{answer}' instead of '\\x1b[31mfox\\n'" in done.stdout
    assert "FAILED" in done.stdout
    report = report_of(device)
    assert (report.passed, report.same, report.images) == (False, 4, 5)
    assert report.max_difference > 0.1


@pytest.mark.slow
def test_every_file_is_told_and_one_that_fails_is_enough(bare: Path, device: Path) -> None:
    shutil.copy(device / FILE, device / "pruned.onnx")

    def add(found: dict[str, Any]) -> None:
        found["files"]["pruned.onnx"] = found["files"][FILE]
        for number, image in enumerate(found["images"]):
            image["expected"]["pruned.onnx"] = found["images"][number - 1]["expected"][FILE]

    change(device, add)
    assert check(bare, device).returncode == 1
    assert (report_of(device).passed, report_of(device, "pruned.onnx").passed) == (True, False)


# What cannot be checked: one sentence each


@pytest.mark.parametrize("name", [FILE, "golden/golden.npy"])
def test_a_file_that_has_changed_is_not_run(bare: Path, device: Path, name: str) -> None:
    data = bytearray((device / name).read_bytes())
    data[-1] ^= 1
    (device / name).write_bytes(data)
    said = refused(bare, device)
    assert f"{Path(name).name} is not the file that was exported: its bytes have changed" in said


@pytest.mark.slow
def test_answers_that_are_missing_or_know_no_such_file(bare: Path, device: Path) -> None:
    shutil.copy(device / FILE, device / "other.onnx")
    assert "golden.json does not know other.onnx, only student.onnx." in refused(bare, device, device / "other.onnx")
    assert "absent.onnx does not exist or has none of the endings" in refused(bare, device, "absent.onnx")
    (device / FILE).unlink()
    assert "None of the files that " in refused(bare, device)
    shutil.rmtree(device / "golden")
    assert "golden.json is not in " in refused(bare, device)


def rename(folder: Path, suffix: str) -> str:
    """Let the exported file have another ending; return its new name."""
    name = Path(FILE).with_suffix(suffix).name
    (folder / FILE).rename(folder / name)

    def tell(found: dict[str, Any]) -> None:
        found["files"][name] = found["files"].pop(FILE)
        for image in found["images"]:
            image["expected"][name] = image["expected"].pop(FILE)

    change(folder, tell)
    return name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "package"),
    [(".pte", "torch"), (".tflite", "ai-edge-litert"), (".pt2", "torch"), (".torchscript", "torch")],
)
def test_a_runtime_that_is_not_installed(bare: Path, device: Path, suffix: str, package: str) -> None:
    name = rename(device, suffix)
    assert refused(bare, device) == f"Error: {name}: {package} is not installed here: python -m pip install {package}"


def test_numpy_or_the_runtime_is_not_installed(nothing: Path, device: Path) -> None:
    said = refused(nothing, device)
    assert said == "Error: student.onnx: numpy is not installed here: python -m pip install numpy"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "its runtime ended the process (-4); it may not"),
        ("import absent", "onnxruntime is installed, but cannot be loaded (No module named 'absent')"),
        ("raise OSError('libgomp.so.1: cannot open\\nmore')", "cannot be loaded (libgomp.so.1: cannot open)"),
        (
            "import sys; print('GPU?', file=sys.stderr); __version__ = '1'",
            "student.onnx cannot be checked here (module 'onnxruntime' has no attribute",
        ),
    ],
)
def test_a_runtime_that_does_not_work(bare: Path, device: Path, code: str, said: str) -> None:
    (device / "onnxruntime.py").write_text(code)
    assert said in refused(bare, device)


@pytest.mark.slow
def test_a_file_that_its_runtime_cannot_read(bare: Path, device: Path) -> None:
    (device / FILE).write_bytes(b"no model")
    change(device, lambda found: found["files"][FILE].update(hash=storage.hash_file(device / FILE)))
    assert f"{FILE} cannot be checked here (" in refused(bare, device)


@pytest.mark.slow
def test_a_report_that_cannot_be_written(bare: Path, device: Path) -> None:
    said = refused(bare, device, "--out", device / FILE)
    assert "cannot be written (" in said
    assert "Choose another folder by --out." in said


# Other runtimes


@pytest.mark.slow
def test_litert_is_spoken_to_as_its_interface_wants(bare: Path, device: Path) -> None:
    """By a stand-in for the package, which few machines have."""
    name = rename(device, ".tflite")
    (device / "ai_edge_litert").mkdir()
    (device / "ai_edge_litert" / "interpreter.py").write_text(FAKE_INTERPRETER)
    (device / "ai_edge_litert-9.8.dist-info").mkdir()
    (device / "ai_edge_litert-9.8.dist-info" / "METADATA").write_text("Name: ai-edge-litert\nVersion: 9.8\n")
    images = np.load(device / "golden" / "golden.npy")

    def tell(found: dict[str, Any]) -> None:
        for number, image in enumerate(images):
            rows = expected(found, number, name)
            rows[:] = [0.1, 0.1, 0.1]
            rows[int(image.astype(int).sum()) % 3] = 0.8

    change(device, tell)
    done = check(bare, device, "--threads", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert report_of(device, name).runtime == "LiteRT (ai-edge-litert 9.8)"


@pytest.mark.slow
def test_from_a_run_to_the_device_and_back_into_its_report(bare: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    distilled(stripes(tmp_path / "images"), run_folder)
    ours = Path(sys.executable), "-m", "understudy.cli"
    done = run(*ours, "export", run_folder, "--to", "onnx")
    assert done.returncode == 0, done.stderr
    device = shutil.copytree(run_folder / "export", tmp_path / "device")
    assert check(bare, device).returncode == 0
    found = report_of(device)
    assert (found.same, found.images) == (golden.MOST, golden.MOST)
    assert "On the device" not in (run_folder / "report.html").read_text()
    done = run(*ours, "report", run_folder, "--merge", device / f"{FILE}.device.json")
    assert done.returncode == 0, done.stderr
    assert f"Device {FILE}, " in " ".join(done.stdout.split())
    assert "On the device" in (run_folder / "report.html").read_text()
    assert records.load(run_folder).devices == [found]
