"""The command line: run folders, faults of ours, and whole commands; a mistake costs nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import small_runs
from cli_calls import SMALL, Call, _in_a_folder_of_its_own, asked, call, folders, spoilt
from imagefiles import ordinary_user
from small_runs import STAGES, photos, snapshot, weights, words, work_done
from understudy import api, config, options, storage
from understudy import record as records
from understudy.config import RunConfig

__all__ = ["_in_a_folder_of_its_own", "asked", "call", "photos"]  # fixtures


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Tests only look at it."""
    return small_runs.distilled(photos, tmp_path_factory.mktemp("finished") / "run").folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    small_runs.without_export(monkeypatch)


# --- run folders ---


@pytest.mark.usefixtures("no_export")
def test_a_corrected_command_may_use_the_same_folder(photos: Path, call: Call, tmp_path: Path) -> None:
    """Nothing was done under the mistaken one, so nothing is in the way."""
    spoilt(photos, tmp_path / "photos", 10)
    call("distill", *words("elsewhere"), "--out", "run").sentence()
    call("distill", *words("photos", student={"model": "cnn3"}), "--out", "run").sentence()
    call("distill", *words("photos"), "--out", "run").sentence()
    ended = call("distill", *words("photos"), "--max-bad-share", "0.1", "--out", "run")
    assert ended.code == 0, ended.err
    assert list(records.load(Path("run")).stages) == STAGES
    assert records.load(Path("run")).failure is None


def test_another_run_is_not_overwritten(photos: Path, copied: Path, call: Call) -> None:
    before = snapshot(copied)
    said = call("distill", *words(photos, distill={"temperature": 5}), "--out", copied).sentence()
    assert "already holds another run" in said
    assert f"understudy resume {copied}" in said
    assert "already holds another run" in call("train", *words(photos), "--out", copied).sentence()
    assert snapshot(copied) == before


def test_the_same_command_goes_on(photos: Path, copied: Path, call: Call) -> None:
    (copied / "student-1/model.safetensors").unlink()
    before = work_done(records.load(copied))
    ended = call("distill", *words(photos), "--out", copied)
    assert ended.code == 0, ended.err
    after = work_done(records.load(copied))
    assert {name for name in after if after[name] != before[name]} == {"student-1"}
    assert "Distilled" in ended.out


def test_other_files_are_left_alone(photos: Path, call: Call, tmp_path: Path) -> None:
    (folders(tmp_path, "thesis") / "thesis/chapter.tex").write_text("All my work.")
    before = snapshot(tmp_path)
    said = call("distill", *words(photos), "--out", "thesis").sentence()
    assert "chapter.tex" in said
    assert snapshot(tmp_path) == before


def test_a_file_in_the_place_of_the_folder(photos: Path, call: Call, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    assert "run is a file" in call("distill", *words(photos), "--out", "run").sentence()
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("command", ["resume", "report"])
def test_a_run_that_is_not_there(command: str, call: Call) -> None:
    assert "is not a run folder" in call(command, "runs/none").sentence()
    assert os.listdir() == []


def test_a_folder_that_is_no_run(photos: Path, call: Call) -> None:
    before = snapshot(photos)
    said = call("resume", photos).sentence()
    assert "no record.json" in said or "no run" in said
    assert "--out" not in said  # resume has no such option
    assert snapshot(photos) == before


@pytest.mark.parametrize("command", ["resume", "report", "distill"])
@pytest.mark.parametrize("damage", ["cut short", "of another kind"])
def test_a_damaged_record(command: str, damage: str, photos: Path, copied: Path, call: Call) -> None:
    path = copied / "record.json"
    text = path.read_text()
    path.write_text(
        text[:3000] if damage == "cut short" else text.replace("understudy-record/1", "understudy-record/9")
    )
    before = snapshot(copied)
    arguments = ["distill", *words(photos), "--out", copied] if command == "distill" else [command, copied]
    assert "record.json is damaged or of another version" in call(*arguments).sentence()
    assert snapshot(copied) == before


@pytest.mark.usefixtures("no_export")
def test_a_full_disk_loses_nothing(
    photos: Path, finished: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fills up when the first student is done; after that, not even the record can be written."""
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if (tmp_path / "run/baseline-0/model.safetensors").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        said = call("distill", *words(photos), "--out", "run").sentence()
    assert "The disk is full" in said
    assert not [name for name in snapshot(tmp_path / "run") if name.endswith(".tmp")]
    before = work_done(records.load(Path("run")))
    assert list(before) == ["teacher", "gate"]
    assert call("resume", "run").code == 0
    assert weights(Path("run")) == weights(finished)
    assert {name: work_done(records.load(Path("run")))[name] for name in before} == before


def test_a_folder_that_cannot_be_written(call: Call) -> None:
    with ordinary_user() as folder:
        (folder / "locked").mkdir(mode=0o500)
        said = call("distill", "digits", *SMALL, "--out", folder / "locked/run").sentence()
    assert "cannot be written" in said
    assert "--out" in said


# --- what needs a finished run ---


def test_the_configuration_that_a_run_kept_can_be_changed_by_options(
    finished: Path, call: Call, asked: list[RunConfig]
) -> None:
    call("distill", "--config", finished / "config.yaml", "--alpha", 0.75)
    (given,) = asked
    assert (given.distill.ce_weight, given.distill.kd_weight) == (0.25, 0.75)


def test_an_unknown_data_set_names_the_nearest(finished: Path, call: Call) -> None:
    assert "Did you mean 'digits'" in call("evaluate", finished, "digts").sentence()
    assert "Did you mean 'digits'" in call("distill", "digts", *SMALL).sentence()


@pytest.mark.usefixtures("no_export")
def test_a_pickle_needs_a_flag(photos: Path, finished: Path, call: Call) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(finished / "teacher/model.safetensors"), "teacher.pt")
    with_weights = [*words(photos), "--teacher-weights", "teacher.pt"]
    assert "--unsafe-pickle" in call("distill", *with_weights, "--out", "one").sentence()
    assert weights(Path("one")) == {}
    assert "--unsafe-pickle" in call("distill", *words(photos, teacher={"model": "./teacher.pt"})).sentence()
    ended = call("distill", *with_weights, "--unsafe-pickle", "--out", "two")
    assert ended.code == 0, ended.err
    initial = records.load(Path("two")).models["teacher"].initial
    assert initial != records.load(finished).models["teacher"].initial


# --- faults of ours ---


def test_a_fault_of_ours_is_a_sentence_and_a_file(photos: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*given: object, **options: object) -> None:
        raise ValueError("no such thing\nsecond line")

    monkeypatch.setattr(api, "run", run)
    path = storage.cache_dir() / "fault.txt"
    path.unlink(missing_ok=True)
    said = call("distill", photos).sentence(code=70)
    assert "a fault in understudy (ValueError: no such thing)" in said
    assert str(path) in said
    told = path.read_text()
    assert "Traceback" in told
    assert "second line" in told
    assert f"understudy distill {photos}" in told


@pytest.mark.usefixtures("no_export")
def test_a_fault_while_training_is_noted_in_the_record(
    photos: Path, finished: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        small_runs.teach_by(patch, lambda *logits, temperature: 1 / 0)
        said = call("distill", *words(photos), "--out", "run").sentence(code=70)
    assert "ZeroDivisionError" in said
    assert records.load(Path("run")).status == "failed"
    assert call("resume", "run").code == 0
    assert weights(Path("run")) == weights(finished)


def test_a_report_that_cannot_be_made_does_not_hide_why_the_run_ended(
    photos: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*given: object) -> None:
        raise KeyError("figure")

    monkeypatch.setattr("understudy.report.write", write)
    said = call("distill", *words(photos, train={"lr": 1e25}), "--out", "run").sentence()
    assert "lower learning rate" in said


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_no_fault(
    error: Exception, photos: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*given: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(api, "run", run)
    ended = call("distill", photos)
    assert ended.code != 0
    assert "The memory is full" in ended.err
    assert "--batch-size" in ended.err
    assert "fault" not in ended.err


def test_interrupting_twice_stops_at_once(photos: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*given: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(api, "run", run)
    ended = call("distill", photos)
    assert ended.code == 130
    assert "Ctrl-C again" in ended.err
    assert "Traceback" not in ended.err


# --- the commands, whole ---


def test_distill_prints_plan_table_and_verdict(photos: Path, call: Call) -> None:
    ended = call("distill", *words(photos), "--out", "run")
    assert (ended.code, ended.err) == (0, "")
    record = records.load(Path("run"))
    assert "Plan" in ended.out
    assert all(
        f"  {stage:<9} " in ended.out for stage in ("data", "teacher", "baseline", "student", "evaluate", "export")
    )
    assert record.verdict is not None
    assert record.verdict.outcome in ended.out
    assert "run/report.html" in ended.out
    assert "export/student.onnx" in ended.out
    table = ended.out[ended.out.index("On the test images") :]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 80


def test_train_prints_the_teacher(photos: Path, call: Call) -> None:
    ended = call("train", *words(photos), "--out", "run")
    assert (ended.code, ended.err) == (0, "")
    assert records.load(Path("run")).kind == "train"
    assert "Teacher" in ended.out
    assert "Distilled" not in ended.out


def test_open_opens_the_report(copied: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert call("resume", copied, "--open").code == 0
    assert call("report", copied, "--open").code == 0
    assert opened == [(copied / "report.html").as_uri()] * 2


def test_the_demo_is_a_valid_run_of_the_digits() -> None:
    given = config.validate(options.DEMO)
    assert given.data.source == "digits"
    assert len(given.seeds) >= 3
    assert {given.teacher.model, given.student.model} == {"mnist_large", "mnist_small"}
    assert given.model_dump(include={"device", "precision", "threads", "download"}) == {
        "device": "auto",
        "precision": "fp32",
        "threads": 1,
    }


def _started(code: str, *arguments: object, **surroundings: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a fresh Python, and then `code`."""
    driver = (
        "import json, sys\n"
        f"sys.argv = {['understudy', *map(str, arguments)]!r}\n"
        "from understudy.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    ended = end.code\n" + code
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", driver],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=600,
        env={**os.environ, **surroundings},
    )


MODULES = "sys.stderr.write(json.dumps([ended, [name for name in sys.modules if '.' not in name]]))"


def test_a_report_is_made_anew_without_torch(copied: Path) -> None:
    page = (copied / "report.html").read_bytes()
    (copied / "report.html").unlink()
    done = _started(MODULES, "report", copied)
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stderr)
    assert code == 0
    assert not {"torch", "torchvision", "timm", "onnx", "onnxruntime", "sklearn", "accelerate"} & set(modules)
    assert (copied / "report.html").read_bytes() == page
    assert "Distilled" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
def test_a_terminal_that_knows_few_characters(encoding: str, finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "record.json", tmp_path)
    done = _started("sys.exit(ended)", "report", tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "Distilled" in done.stdout


def test_a_reader_that_has_seen_enough(copied: Path) -> None:
    command = [sys.executable, "-m", "understudy.cli", "report", str(copied)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.slow
def test_the_demo_runs_to_its_end_without_torchvision_and_timm(tmp_path: Path) -> None:
    done = _started(MODULES, "demo", "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stderr)
    assert code == 0
    assert not {"torchvision", "timm"} & set(modules)
    record = records.load(tmp_path / "demo")
    assert (record.status, record.name) == ("done", "demo")
    assert record.verdict is not None
    assert record.verdict.outcome in done.stdout
    assert record.summary["teacher"].accuracy.value > 0.95
    assert record.exports[0].on_frames.agreement == 1
    assert (tmp_path / "demo/report.html").is_file()
    assert yaml.safe_load((tmp_path / "demo/config.yaml").read_text())["data"]["source"] == "digits"
