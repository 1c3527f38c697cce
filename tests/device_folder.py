"""An export folder as it lies on a device, environments of a device, and how tests run `conformance.py` in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

from understudy import storage
from understudy.export import golden
from understudy.export.onnx import export_onnx
from understudy.record import DeviceReport, InputSpec

CLASSES = ["cat", "dog", "\x1b[31mfox\n"]
FILE = "student.onnx"
SPEC = InputSpec(channels=3, sizes=(16,), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def network() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, len(CLASSES))
    return nn.Sequential(*layers).eval()


def images_and_answers(net: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Return images and what PyTorch answers to each of them."""
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (SPEC.mean, SPEC.std))
    with torch.no_grad():
        return images, net((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std).softmax(1).numpy()


def write_golden(folder: Path, file: str, images: np.ndarray, answers: np.ndarray) -> None:
    golden.write(
        folder / "golden",
        images,
        {file: answers},
        classes=CLASSES,
        tolerance={file: golden.FLOAT_TOLERANCE},
        hashes={file: storage.hash_file(folder / file)},
    )
    golden.copy_script(folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export folder: the file of a network, golden images with PyTorch's answers, the script."""
    folder, net = tmp_path_factory.mktemp("run") / "export", network()
    export_onnx(net, SPEC, network_channels=3, classes=CLASSES, path=folder / FILE, provenance={})
    write_golden(folder, FILE, *images_and_answers(net))
    return folder


@pytest.fixture
def device(exported: Path, tmp_path: Path) -> Path:
    """The export folder, copied to a device."""
    return shutil.copytree(exported, tmp_path / "device")


def environment(folder: Path, *distributions: str) -> Path:
    """Make a virtual environment with these distributions and what they require, all linked; return its Python."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    [site] = folder.glob("lib/python*/site-packages")
    pending, seen = list(distributions), set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        found = metadata.distribution(name)
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(str(found.locate_file(top)))
        needs = [Requirement(text) for text in found.requires or []]
        pending += [one.name for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
    return folder / "bin" / "python"


def run(python: Path, *words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [python, *words], capture_output=True, text=True, check=False, cwd=cwd, env=surroundings, timeout=120
    )


def modules(python: Path, *names: str) -> set[str]:
    """Return which of these modules a Python can find."""
    code = f"import importlib.util as u; print(*[name for name in {names} if u.find_spec(name)])"
    return set(run(python, "-I", "-c", code).stdout.split())


def check(python: Path, folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    done = run(python, folder / "conformance.py", "--runs", "5", *words, cwd=folder.parent)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def report_of(folder: Path, name: str = FILE) -> DeviceReport:
    return DeviceReport.model_validate_json((folder / f"{name}.device.json").read_bytes())


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit golden.json."""
    path = folder / "golden" / "golden.json"
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))


def expected(found: dict[str, Any], image: int, name: str = FILE) -> list[float]:
    rows: list[float] = found["images"][image]["expected"][name]["probabilities"]
    return rows
