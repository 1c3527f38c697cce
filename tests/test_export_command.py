"""`understudy export`: every file proven before it gets its name, done work skipped, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import small_runs
from export_runs import compressed, export, files, finished, photos, run
from understudy import answer, api, exportcommands
from understudy import record as records
from understudy.errors import ConfigError, ModelError, RunError
from understudy.export import conformance, golden, runtimes
from understudy.export.formats import FORMATS
from understudy.export.graph import Exportable, read_card
from understudy.pipeline import exporting, forms
from understudy.profiling import resident
from understudy.record import Latency, Quantized

__all__ = ["finished", "photos", "run"]  # fixtures


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leave the process out that measures memory, which takes longer than all else."""
    names: list[str] = []

    def ask(asked: resident.Request) -> resident.Resident:
        names.append(Path(asked.path).name)
        return resident.Resident(peak=10**7, before=1, load_ms=1.5)

    monkeypatch.setattr(resident, "ask", ask)
    return names


# What comes of it


def test_files_are_proven_and_listed(run: Path, asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    export(run, "--to", "onnx", "torchscript")
    assert files(run) == {"student.onnx", "student.torchscript", "student.torchscript.json", "golden", "conformance.py"}
    record = records.load(run)
    assert record.status == "done"
    assert [one.path for one in record.exports] == ["export/student.onnx", "export/student.torchscript"]
    val = record.models["student-0"].val
    assert val is not None
    for one in record.exports:
        assert (one.on_frames.images, one.on_frames.agreement) == (50, 1.0)
        assert one.on_frames.max_difference < 1e-5
        assert one.on_frames.accuracy == pytest.approx(val.accuracy)
        assert one.hash == small_runs.digest(run / one.path)
        assert (one.stage, one.golden, one.load_ms, one.memory_bytes) == ("student", "export/golden", 1.5, 10**7)
        assert one.bytes == (run / one.path).stat().st_size
    assert asked == ["student.onnx", "student.torchscript"]
    card = read_card(run / "export/student.torchscript")
    assert card["labels"] == ["cat", "dog"]
    assert card["provenance"]["weights"] == record.models["student-0"].weights_hash
    said = capsys.readouterr().out
    for name in ("student.onnx", "student.torchscript"):
        assert f"{name} " in said
    assert "student.torchscript: TorchScript" in said
    assert (run / "report.html").stat().st_mtime_ns >= (run / "export/student.torchscript").stat().st_mtime_ns


def test_what_was_done_is_not_done_again(run: Path, asked: list[str]) -> None:
    export(run, "--to", "torchscript")
    first = records.load(run)
    before = small_runs.snapshot(run / "export")
    asked.clear()
    export(run, "--to", "torchscript", "onnx")
    second = records.load(run)
    assert small_runs.work_done(first).items() <= small_runs.work_done(second).items()
    assert small_runs.snapshot(run / "export").items() == before.items()
    assert asked == ["student.onnx"]
    api.resume(run)
    assert small_runs.work_done(records.load(run)) == small_runs.work_done(second)
    assert len(records.load(run).exports) == 2


def test_golden_images_hold_the_answers_of_every_file(run: Path) -> None:
    export(run, "--to", "torchscript")
    told = json.loads((run / "export/golden/golden.json").read_text())
    assert set(told["files"]) == {"student.onnx", "student.torchscript"}
    images = np.load(run / "export/golden/golden.npy")
    assert images.shape == (golden.MOST, 18, 18, 1)
    for name in told["files"]:
        assert told["files"][name] == {
            "hash": small_runs.digest(run / "export" / name),
            "tolerance": golden.FLOAT_TOLERANCE,
            "kind": "float",
        }
        expected = np.array([image["expected"][name]["probabilities"] for image in told["images"]])
        found = runtimes.open_file(run / "export" / name, trusted=True)(images)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_other_threads_are_timed_anew(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def latency(session: runtimes.Session, image: np.ndarray) -> Latency:
        timed.append(session.threads)
        assert image.shape == (18, 18, 1)
        return Latency(runtime=session.runtime, threads=session.threads, runs=1, p50=1, p95=1)

    monkeypatch.setattr(conformance, "latency", latency)
    export(run, "--to", "onnx", "--threads", "2")
    assert timed == [2]
    assert [one.latency.threads for one in records.load(run).exports] == [2]


def test_the_files_are_copied_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(run, "--out", tmp_path / "device")
    there, here = small_runs.snapshot(tmp_path / "device"), small_runs.snapshot(run / "export")
    assert {name: content[2] for name, content in there.items()} == {name: content[2] for name, content in here.items()}
    assert str(tmp_path / "device") in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(ConfigError, match="Choose another folder with --out"):
        export(run, "--out", run / "export/inside")


def test_predict_takes_every_format(run: Path, photos: Path) -> None:
    export(run, "--to", "torchscript")
    images = [photos / "test"]
    wanted = list(answer.predict(run, images))
    found = list(answer.predict(run / "export/student.torchscript", images, trusted=True))
    assert [one.label for one in found] == [one.label for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-3)
    with pytest.raises(ModelError, match="is a program"):
        list(answer.predict(run / "export/student.torchscript", images))


# What goes wrong


def with_writer(monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[[Exportable, Path], None]) -> None:
    monkeypatch.setitem(FORMATS, name, replace(FORMATS[name], write=write))


@pytest.mark.parametrize("share", [0.01, 3.0])
def test_a_file_that_answers_otherwise_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    write = FORMATS["torchscript"].write

    def wrong(model: Exportable, path: Path) -> None:
        with torch.no_grad():
            for weight in model.net.parameters():
                weight.add_(share * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        write(model, path)

    with_writer(monkeypatch, "torchscript", wrong)
    kept = small_runs.digest(run / exporting.FILE)
    with pytest.raises(ModelError, match="does not give PyTorch's answers"):
        export(run, "--to", "torchscript")
    assert files(run) == {"student.onnx"}
    assert small_runs.digest(run / exporting.FILE) == kept
    record = records.load(run)
    assert (record.status, [one.path for one in record.exports]) == ("failed", [exporting.FILE])
    monkeypatch.undo()
    api.resume(run)
    assert records.load(run).status == "done"


class KilledError(BaseException):
    """Ends a command as a signal does: nothing that expects errors catches it."""


def test_a_killed_export_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(model: Exportable, path: Path) -> None:
        path.write_bytes(b"a part of it")
        raise KilledError

    with_writer(monkeypatch, "torch", killed)
    with pytest.raises(KilledError):
        export(run, "--to", "torchscript", "torch")
    first = records.load(run).stages["export-student-torchscript"]
    assert files(run) == {"student.onnx", "student.torchscript", "student.torchscript.json"}
    drafts = run / "export/.making"
    drafts.mkdir()  # as a process leaves it that was killed outright
    (drafts / "student.pt2").write_bytes(b"a part of it")
    with_writer(monkeypatch, "torch", lambda model, path: FORMATS["torchscript"].write(model, path))
    monkeypatch.setitem(runtimes._OPENERS, ".pt2", runtimes._open_torchscript)  # quick to write
    export(run, "--to", "torchscript", "torch")
    record = records.load(run)
    assert record.stages["export-student-torchscript"] == first
    assert {"student.pt2", "student.pt2.json"} < files(run)
    assert not drafts.exists()
    assert record.status == "done"


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--to", "onx"], ConfigError, "Unknown format 'onx'. Did you mean 'onnx'"),
        (["--stage", "prned"], ConfigError, "Unknown stage 'prned'. Did you mean 'pruned'"),
        (["--stage", "student-0"], ConfigError, "Unknown stage 'student-0'"),
        (["--to", "torch", "--stage", "int8-ptq"], ConfigError, "to onnx, executorch and web only. Leave out torch"),
        (["--to", "executorch", "--stage", "int8-qat"], RunError, "an older version did not keep .* --to onnx"),
        (["--to", "web"], ConfigError, "ONNX Runtime Web"),
    ],
)
def test_what_cannot_be_had_is_said_first(
    run: Path, words: list[str], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressed(run, "pruned", before="student-0")
    compressed(run, "int8-ptq", before="pruned", quantized=True)
    record = compressed(run, "int8-qat", before="pruned", quantized=True)
    record.compressed[-1].quantized = Quantized(way="quantization-aware", images=1)
    records.save(record, run)
    monkeypatch.setattr(exporting, "_export_form", lambda *given: pytest.fail("work was begun"))
    with pytest.raises(error, match=message):
        export(run, *words)


def test_a_run_without_a_student(run: Path, tmp_path: Path) -> None:
    record = records.load(run)
    record.chosen = None
    records.save(record, run)
    with pytest.raises(RunError, match="holds no student that was judged"):
        export(run)
    with pytest.raises(RunError, match="is not a run folder"):
        export(tmp_path / "nowhere")


# Compressed stages


def test_what_a_later_compress_left_out_is_no_hindrance(run: Path) -> None:
    compressed(run, "pruned", before="student-0")
    export(run, "--stage", "pruned")
    record = records.load(run)
    record.compressed = []
    records.save(record, run)
    export(run, "--to", "torchscript")
    told = json.loads((run / "export/golden/golden.json").read_text())["files"]
    assert set(told) == {"student.onnx", "student.torchscript"}


def test_a_stage_that_lost_too_much_is_not_among_all(run: Path) -> None:
    compressed(run, "int8-ptq", before="student-0", quantized=True)
    record = records.load(run)
    record.compressed[0].accepted = False
    records.save(record, run)
    export(run, "--all")
    assert [one.stage for one in records.load(run).exports] == ["student"]


def test_8_bits_that_answer_otherwise_are_refused(run: Path) -> None:
    compressed(run, "student-0", before="")
    compressed(run, "int8-ptq", before="student-0", quantized=True)
    with np.load(run / "compressed/student-0/answers.npz") as known:
        turned = {split: -known[split] for split in known.files}
    np.savez(run / "compressed/student-0/answers.npz", **turned)
    with pytest.raises(ModelError, match=r"The 8-bit file answers .* of 50 images otherwise"):
        export(run, "--stage", "int8-ptq")
    assert "int8-ptq.onnx" not in files(run)


def test_a_calibrated_form_keeps_its_temperature(run: Path) -> None:
    record = compressed(run, "student-0", before="")
    folder = run / forms.FOLDER / "calibrated"
    shutil.copytree(run / forms.FOLDER / "student-0", folder)
    for weights in folder.glob("model.*"):
        if weights.suffix != ".onnx":
            weights.unlink()
    with np.load(folder / forms.ANSWERS) as known:
        softer = {split: known[split] / 2 for split in known.files}
    np.savez(folder / forms.ANSWERS, **softer)
    row = record.compressed[0].model_copy(update={"name": "calibrated", "before": "student-0", "temperature": 2.0})
    record.compressed.append(row)
    records.save(record, run)
    export(run, "--stage", "calibrated", "--to", "torchscript")
    (one,) = (one for one in records.load(run).exports if one.stage == "calibrated")
    assert one.on_frames.max_difference < 1e-5
    assert read_card(run / one.path)["temperature"] == 2.0


# Words


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("export RUN --to onnx litert --out X", "export RUN --to onnx --to litert --out X"),
        ("export --stage student pruned --to web RUN", "export --stage student --stage pruned --to web --to RUN"),
        ("export --to onnx . --threads 2", "export --to onnx . --threads 2"),
        ("export RUN --to", "export RUN --to"),
        ("export RUN --to --threads 2", "export RUN --to --threads 2"),
        ("sweep --to a b", "sweep --to a b"),
        ("", ""),
    ],
)
def test_several_words_may_follow_an_option(words: str, wanted: str) -> None:
    assert exportcommands.spread(words.split()) == wanted.split()


def test_values_may_stand_with_commas(run: Path) -> None:
    export(run, "--to", "onnx,torchscript")
    assert len(records.load(run).exports) == 2
