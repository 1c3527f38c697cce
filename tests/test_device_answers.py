"""`conformance.py` where all is installed: which answers are the same, damaged ones, options, files of every format."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_folder import (
    CLASSES,
    FILE,
    SPEC,
    change,
    check,
    device,
    expected,
    exported,
    images_and_answers,
    network,
    report_of,
    write_golden,
)
from understudy.export.device import conformance as script
from understudy.export.formats import FORMATS
from understudy.export.graph import Exportable

__all__ = ["device", "exported"]  # fixtures


def here(folder: Path, *words: str) -> int:
    """Run the script in this process, which is faster where it does not matter what is installed."""
    places = ["--golden", str(folder / "golden"), "--out", str(folder)]
    return script.main([str(folder / FILE), *places, "--runs", "5", "--here", *words])


# What fails


@pytest.mark.parametrize(("kind", "code"), [("float", 1), ("int8", 0)])
def test_a_probability_that_differs_fails_a_float_file_only(device: Path, kind: str, code: int) -> None:
    def move(found: dict[str, Any]) -> None:
        found["files"][FILE]["kind"] = kind
        rows = expected(found, 0)
        rows[int(np.argmax(rows))] += 3e-4

    change(device, move)
    assert here(device) == code
    report = report_of(device)
    assert (report.passed, report.same) == (code == 0, 5)
    assert report.max_difference == pytest.approx(3e-4, rel=0.02)


@pytest.mark.parametrize(("lead", "same"), [(0.09, 5), (0.11, 4)])
def test_an_8_bit_answer_within_twice_the_tolerance_is_a_tie(device: Path, lead: float, same: int) -> None:
    def turn(found: dict[str, Any]) -> None:
        found["files"][FILE].update(kind="int8", tolerance=0.05)
        rows = expected(found, 2)
        best = int(np.argmax(rows))
        rows[best], rows[best - 1], rows[best - 2] = 0.4, 0.4 + lead, 0.2 - lead

    change(device, turn)
    assert here(device) == int(same < 5)
    assert report_of(device).same == same


# What cannot be checked: one sentence each


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b"\xff{}",
        lambda found: found.update(format="understudy-golden/2"),
        lambda found: found.pop("images"),
        lambda found: found.pop("files"),
        lambda found: found.pop("pixels"),
        lambda found: found["images"].pop(),
        lambda found: found["classes"].pop(),
        lambda found: found["files"][FILE].update(tolerance="none"),
        lambda found: expected(found, 0).append(0.0),
        lambda found: found.update(files=[FILE]),
    ],
)
def test_damaged_answers(
    capsys: pytest.CaptureFixture[str], device: Path, damage: bytes | Callable[[dict[str, Any]], None]
) -> None:
    if isinstance(damage, bytes):
        (device / "golden" / "golden.json").write_bytes(damage)
    else:
        change(device, damage)
    assert here(device) == 1
    shown = capsys.readouterr()
    assert (shown.out, len(shown.err.splitlines())) == ("", 1)
    assert shown.err.startswith(f"Error: {FILE}: ")
    assert "golden.json is damaged or of another version. Copy the export folder again." in shown.err
    assert not list(device.rglob("*.device.json"))


@pytest.mark.parametrize("words", [["--runs", "0"], ["--threads", "many"], ["--absent"]])
def test_wrong_options(capsys: pytest.CaptureFixture[str], device: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        here(device, *words)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


# Other runtimes


def test_the_script_says_which_runtimes_it_knows() -> None:
    assert list(script.RUNTIMES) == [".onnx", ".pte", ".tflite", ".pt2", ".torchscript"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needs"),
    [("torch", "torch"), ("torchscript", "torch"), ("executorch", "executorch"), ("litert", "litert_torch")],
)
def test_files_of_every_format_pass_on_their_runtimes(tmp_path: Path, name: str, needs: str) -> None:
    if not find_spec(needs):
        pytest.skip(f"{needs} is not installed")
    net, kind = network(), FORMATS[name]
    file = f"student{kind.suffix}"
    model = Exportable(net=net, spec=SPEC, network_channels=3, classes=CLASSES, provenance={})
    kind.write(model, tmp_path / file)
    images, answers = images_and_answers(net)
    write_golden(tmp_path, file, images, answers)
    done = check(Path(sys.executable), tmp_path, "--threads", "2")
    assert (done.returncode, done.stderr) == (0, "")
    report = report_of(tmp_path, file)
    assert (report.passed, report.same, report.latency.threads) == (True, len(images), 2)
