"""`understudy profile`: which files it measures, how it tells what it found, and what it says where it cannot."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from compressed_record import compressed_record
from profiled_files import Spies, command, export, files_named, onnx_file, run_folder, spies, weights_file
from sample_record import sample_record, train_record
from understudy import profilecommands
from understudy.errors import ConfigError, ModelError, RunError, UnderstudyError
from understudy.profiling import measure, targets
from understudy.profiling.measure import Measured, Profiled, Setting
from understudy.record import Interval, Latency

__all__ = ["spies"]  # a fixture


def mistake(*words: object) -> str:
    """Return the one sentence, or two, that a command ends with."""
    ended = command(*words).exception
    assert isinstance(ended, UnderstudyError)
    assert "\n" not in str(ended)
    return str(ended)


# --- what is measured ---


def test_a_compressed_run_is_measured_in_its_own_files(tmp_path: Path) -> None:
    record = compressed_record()
    record.exports += [export("student", "export/student.pte"), export("int8-qat", "export/int8-qat.tflite")]
    folder = run_folder(tmp_path / "run", record)
    found = targets.find([folder], None)
    forms = [row.name for row in record.compressed]
    assert [one.name for one in found] == [*forms, "student.pte", "int8-qat.tflite"]
    assert [one.path.name for one in found] == ["model.onnx"] * 6 + ["student.pte", "int8-qat.tflite"]
    assert [one.style for one in found] == ["teacher", "baseline", "student", *["stage"] * 3, "student", "stage"]
    assert [one.may_fail for one in found] == [False] * 6 + [True] * 2
    assert [one.accuracy for one in found[:6]] == [row.accuracy for row in record.compressed]
    assert found[6].accuracy == record.compressed[2].accuracy
    assert found[7].accuracy == record.compressed[5].accuracy
    assert {one.macs for one in found} == {6_100_000}


def test_of_a_run_only_the_files_of_the_runtime_that_was_named(tmp_path: Path) -> None:
    record = compressed_record()
    record.exports += [export("student", "export/student.pte"), export("student", "export/student.torchscript")]
    folder = run_folder(tmp_path / "run", record)
    (folder / "compressed/pruned/model.safetensors").touch()
    assert [one.path.name for one in targets.find([folder], "onnx")] == ["model.onnx"] * 6
    assert [one.path.name for one in targets.find([folder], "executorch")] == ["student.pte"]
    torch = {one.name: str(one.path.relative_to(folder)) for one in targets.find([folder], "torch")}
    assert torch == {
        "teacher": "teacher-0/model.safetensors",
        "baseline-2": "baseline-2/model.safetensors",
        "student-2": "student-2/model.safetensors",
        "pruned": "compressed/pruned/model.safetensors",
        "student.torchscript": "export/student.torchscript",
    }


def test_a_run_that_was_not_compressed(tmp_path: Path) -> None:
    record = sample_record()
    found = targets.find([run_folder(tmp_path / "run", record)], None)
    assert [one.name for one in found] == ["teacher", "baseline-2", "student-2"]
    assert [one.path.name for one in found] == ["model.safetensors", "model.safetensors", "student.onnx"]
    assert [one.accuracy for one in found] == [one.accuracy for one in record.summary.values()]
    without = targets.find([run_folder(tmp_path / "other", record, "export/student.onnx")], None)
    assert [one.path.name for one in without] == ["model.safetensors"] * 3
    assert len(targets.find([run_folder(tmp_path / "train", train_record())], None)) == 1


def test_an_ensemble_is_no_file_and_a_missing_one_is_left_out(tmp_path: Path) -> None:
    record = sample_record()
    record.models["teacher"].shares = {"teacher-1": 0.5, "teacher-2": 0.5}
    absent = record.models["baseline-2"].weights
    assert [one.name for one in targets.find([run_folder(tmp_path / "run", record, absent)], None)] == ["student-2"]


def test_models_of_one_name_are_named_by_their_paths(tmp_path: Path) -> None:
    record = sample_record()
    both = [run_folder(tmp_path / name, record) for name in ("one", "two")]
    names = [one.name for one in targets.find(both, None)]
    assert len(set(names)) == 6
    assert str(tmp_path / "one/teacher-0/model.safetensors") in names


def test_what_cannot_be_measured_is_said_in_a_sentence(tmp_path: Path) -> None:
    weights, file = weights_file(tmp_path / "model.safetensors"), onnx_file(tmp_path / "model.onnx")
    folder = run_folder(tmp_path / "run", sample_record())
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.pt2").touch()
    with pytest.raises(ModelError, match=r"model\.json is no model that can be profiled: name a run folder, or a file"):
        targets.find([tmp_path / "model.json"], None)
    with pytest.raises(ModelError, match=r"There is no file .*absent\.onnx"):
        targets.find([tmp_path / "absent.onnx"], None)
    with pytest.raises(ConfigError, match=r"export the run first \(understudy export RUN --to executorch\)"):
        targets.find([weights], "executorch")
    with pytest.raises(ConfigError, match="runs on onnx, not on litert"):
        targets.find([file], "litert")
    with pytest.raises(ModelError, match="holds no model that can be profiled for litert"):
        targets.find([folder], "litert")
    with pytest.raises(RunError, match="is not a run folder"):
        targets.find([tmp_path / "empty"], None)
    assert "Unknown runtime 'onx'. Did you mean 'onnx'?" in mistake(file, "--runtime", "onx")
    assert "--svg needs the accuracies of at least two models" in mistake(file, "--svg", tmp_path / "a.svg")
    assert "name a file that ends in .svg" in mistake(file, "--svg", tmp_path / "a.png")
    assert "is a program: opening it can run any code" in mistake(tmp_path / "model.pt2")
    file.write_bytes(b"no graph")
    assert "is damaged or not an ONNX file" in mistake(file)


# --- what is told ---


def test_the_whole_command(tmp_path: Path) -> None:
    """Everything real: ONNX Runtime, timing, a child process."""
    file = onnx_file(tmp_path / "[bold]name.onnx")
    result = command(file, "--json", "--runs", 7, "--batch", 2)
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    (one,) = told["models"]
    assert (one["name"], one["bytes"], told["batch"]) == (file.name, file.stat().st_size, 2)
    assert (one["latency"]["runs"], one["latency"]["p99"], one["macs"]) == (7, None, None)
    assert 0 < one["latency"]["p50"] <= one["latency"]["p95"]
    assert one["runtime"].startswith("ONNX Runtime ")
    if sys.platform != "win32":
        assert one["runtime_memory_bytes"] <= one["memory_bytes"]


def profiled(**changed: Any) -> Profiled:
    latency = Latency(runtime="ONNX Runtime 1.31.1", threads=1, runs=200, p50=13.8, p95=14.25, p99=None)
    one = Measured(
        name="[red]x\x1b[2J",
        file="x",
        style="teacher",
        runtime="ONNX Runtime 1.31.1",
        accuracy=Interval(value=0.814, low=0.8, high=0.83),
        bytes=44_700_000,
        macs=148_000_000,
        latency=latency,
        images_per_second=72.4,
        memory_bytes=219_000_000,
        runtime_memory_bytes=54_200_000,
    )
    return Profiled(threads=1, batch=1, models=[one.model_copy(update=changed)], notes=["A note."])


def on_screen(done: Profiled) -> str:
    screen = Console(file=io.StringIO(), width=80, _environ={})
    screen.print(profilecommands._table(done))
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue().replace("\u00a0", " ")


def test_the_table_shows_names_as_they_are_and_a_dash_for_what_is_not_known() -> None:
    text = on_screen(profiled())
    assert "[red]x�[2J" in text
    assert "\x1b" not in text
    shown = ("13.8 ms", "14.2 ms", "219 MB", "54.2 MB", "44.7 MB", "148 M", "72", "81.4 % right", "ONNX Runtime 1.31.1")
    assert [cell for cell in shown if cell not in text] == []
    assert text.count("—") == 3  # P99, load time, parameters
    assert "mJ per" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_energy_has_a_column_where_it_was_measured() -> None:
    text = on_screen(profiled(joules_per_image=0.0123))
    assert "mJ per" in text
    assert "12.30" in text


def test_the_sentence_below_the_table() -> None:
    def how(done: Profiled) -> str:
        return profilecommands._how(done).replace("\u00a0", " ")

    done = profiled()
    assert "one image at a time, 1 thread, 200 runs each" in how(done)
    other = done.models[0].model_copy(deep=True)
    other.latency.runs = 1040
    several = done.model_copy(update={"models": [*done.models, other], "batch": 4})
    assert "4 images at a time, 1 thread, 200 to 1,040 runs each" in how(several)


def test_the_picture_of_a_run(tmp_path: Path, spies: Spies) -> None:
    folder = run_folder(tmp_path / "run", compressed_record())
    result = command(folder, "--svg", tmp_path / "p.svg", "--runs", 5)
    assert result.exit_code == 0, result.output
    assert f"The picture is in {tmp_path / 'p.svg'}." in result.stdout.replace("\n", "")
    root = ElementTree.parse(tmp_path / "p.svg").getroot()
    names = [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert names.count("int8-qat") == 1  # the files are empty, so there is no picture of their sizes
    assert "ms, one image, Runtime 1, 1\u00a0thread" in names


def test_progress_is_told_to_the_end(tmp_path: Path, spies: Spies) -> None:
    told: list[tuple[int, int]] = []

    def progress(task: str, /, *, done: int, total: int, note: str = "") -> None:
        told.append((done, total))

    measure.measure(targets.find(files_named(tmp_path, "a.onnx", "b.onnx"), None), Setting(runs=5), progress=progress)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (4, 4)
