"""The command line: what it says, how it exits, and that a mistake costs nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import small_runs
from imagefiles import ordinary_user
from small_runs import STAGES, snapshot, stripes, weights, words, work_done
from understudy import api, cli, config, options, storage
from understudy import record as records
from understudy.config import RunConfig
from understudy.errors import UnderstudyError

COMMANDS = [
    "demo",
    "distill",
    "train",
    "resume",
    "report",
    "evaluate",
    "predict",
    "sweep",
    "cache",
    "methods",
    "compare",
]
COMMANDS += ["layers"]
SMALL = ["--teacher", "mnist_small", "--student", "mnist_small", "--precision", "fp32", "--threads", "1"]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def sentence(self, code: int = 1) -> str:
        """Return the one line on the error stream of a command that a user's mistake ended."""
        assert self.code == code, self.err
        assert "Traceback" not in self.out + self.err
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("Error: ")
        assert lines[0].endswith((".", ")", "?"))
        return lines[0]


Call = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep default run folders out of the repository, and give the signals back that a run takes."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Return a function that runs a command line in this process."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["understudy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Ended(ended.value.code if isinstance(ended.value.code, int) else -1, said.out, said.err)

    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stripes(tmp_path_factory.mktemp("data") / "photos")


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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Runs are not carried out; what was asked for comes here."""
    found: list[RunConfig] = []

    def run(given: RunConfig, *rest: object, **options: object) -> None:
        found.append(given)
        raise UnderstudyError("Enough.")

    monkeypatch.setattr(api, "run", run)
    return found


# --- what it says of itself ---


def test_help_names_every_command(call: Call) -> None:
    ended = call("--help")
    assert (ended.code, ended.err) == (0, "")
    assert all(f"  {command} " in ended.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, call: Call) -> None:
    ended = call(command, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"Usage: understudy {command}" in ended.out


def test_no_command_shows_the_help(call: Call) -> None:
    ended = call()
    assert ended.code in (0, 2)
    assert "Usage: understudy" in ended.out + ended.err
    assert "fault" not in ended.err


def test_version(call: Call) -> None:
    ended = call("--version")
    assert (ended.code, ended.out, ended.err) == (0, "understudy 0.1.0\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["distill", "photos", "--frobnicate"], "No such option"),
        (["distill", "photos", "--epochs", "many"], "'--epochs'"),
        (["distill", "photos", "--lr", "fast"], "'--lr'"),
        (["distill", "photos", "--temperature", "hot"], "'--temperature'"),
        (["distill", "photos", "--epochs"], "requires an argument"),
        (["train", "photos", "--seed", "x"], "'--seed'"),
        (["report"], "RUN"),
        (["evaluate", "model.safetensors"], "DATA"),
        (["predict", "model.safetensors"], "IMAGES"),
        (["resume", "one", "two"], "two"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], words: str, call: Call) -> None:
    ended = call(*arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert "fault" not in ended.err
    assert words in ended.err
    assert not list(Path().iterdir())


# --- settings ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--alpha", "2"], "between 0 and 1"),
        (["--epochs", "0"], "'train.epochs'"),
        (["--seeds", "0"], "'seeds'"),
        (["--temperature", "0"], "'distill.temperature'"),
        (["--temperature", "inf"], "'distill.temperature'"),
        (["--lr", "nan"], "'train.lr'"),
        (["--lr", "inf"], "'train.lr'"),
        (["--batch-size", "-1"], "'train.batch_size'"),
        (["--precision", "fp8"], "'precision'"),
        (["--augment", "wild"], "'train.augment'"),
        (["--val-fraction", "0.9"], "'data.val_fraction'"),
        (["--max-bad-share", "7"], "'data.max_bad_share'"),
        (["--min-gain", "1"], "'min_gain'"),
        (["--threads", "0"], "'threads'"),
        (["--name", "a/b"], "'name'"),
        (["--ce-weight", "0", "--kd-weight", "0"], "nothing to learn"),
        (["--alpha", "0.5", "--kd-weight", "1"], "not both"),
        (["--set", "train.lr"], "section.key=value"),
        (["--set", "train.epoch=3"], "'epochs'"),
        (["--set", "distil.temperature=3"], "'distill'"),
        (["--set", "train=3"], "'train'"),
        (["--set", "distill=3"], "'distill'"),
        (["--set", "data=photos"], "'data'"),
        (["--set", "distill.alpha=[1]"], "alpha"),
        (["--set", "seeds=[1,1]"], "twice"),
        (["--method", "kdd"], "'kd'"),
    ],
)
def test_a_bad_setting_is_one_sentence(options: list[str], words: str, photos: Path, call: Call) -> None:
    said = call("distill", photos, *SMALL, *options).sentence()
    assert words in said
    assert "runs" not in os.listdir() or not weights(next(Path("runs").iterdir()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {source: here}\ntemperatur: 3\n", "temperatur"),
        ("data: {source: here}\ndistill: {temperatur: 3}\n", "'temperature'"),
        ("data: {sources: here}\n", "data"),
        ("data: photos\n", "data"),
        ("- data\n", "no settings"),
        ("data: [\n", "not valid YAML"),
        ("", "no settings"),
        ("distill: {alpha: half}\ndata: {source: here}\n", "half"),
    ],
)
def test_a_bad_configuration_file_is_one_sentence(text: str, words: str, call: Call) -> None:
    Path("run.yaml").write_text(text)
    assert words in call("distill", "--config", "run.yaml").sentence()
    assert os.listdir() == ["run.yaml"]


def test_a_configuration_file_that_is_not_there(call: Call) -> None:
    assert "run.yaml" in call("distill", "--config", "run.yaml").sentence()


def test_options_go_over_the_file_and_words_over_options(call: Call, asked: list[RunConfig]) -> None:
    Path("run.yaml").write_text(
        "name: mine\ndata: {source: photos, image_size: 32}\n"
        "train: {epochs: 7, lr: 0.1}\ndistill: {temperature: 2, alpha: 0.9}\nseeds: 5\n"
    )
    options = ["--config", "run.yaml", "--epochs", "9", "--temperature", "3", "--set", "distill.temperature=4"]
    call("distill", *options, "--set", "seeds=[4, 6]")
    (given,) = asked
    assert (given.train.epochs, given.train.lr, given.distill.temperature) == (9, 0.1, 4.0)
    assert (given.distill.ce_weight, given.distill.kd_weight) == (pytest.approx(0.1), 0.9)
    assert (given.seeds, given.name, given.data.source, given.data.image_size) == ((4, 6), "mine", "photos", 32)


def test_every_option_of_distill_reaches_its_setting(call: Call, asked: list[RunConfig]) -> None:
    options: dict[str, Any] = {
        "teacher": "mnist_large",
        "student": "mnist_small",
        "image-size": 48,
        "epochs": 3,
        "teacher-epochs": 4,
        "seeds": 2,
        "method": "kd",
        "temperature": 5,
        "ce-weight": 0.25,
        "kd-weight": 2,
        "batch-size": 8,
        "lr": 0.5,
        "weight-decay": 0.125,
        "clip-norm": 1.5,
        "augment": "light",
        "teacher-weights": "w.safetensors",
        "name": "n",
        "data-dir": "sets",
        "max-bad-share": 0.5,
        "val-fraction": 0.25,
        "label-share": 0.5,
        "min-gain": 0.0625,
        "device": "cpu",
        "precision": "bf16",
        "threads": 3,
    }
    flags = ["teacher-ready", "pretrained", "download", "no-unlabelled", "force", "unsafe-pickle"]
    given_words = [word for key, value in options.items() for word in (f"--{key}", value)]
    call("distill", "photos", *given_words, *(f"--{flag}" for flag in flags))
    given = asked[0].model_dump(mode="json")
    default = config.validate({"data": {"source": "photos"}}).model_dump(mode="json")
    told = {
        "name": "n",
        "data": default["data"]
        | {"data_dir": "sets", "download": True, "image_size": 48, "val_fraction": 0.25, "max_bad_share": 0.5}
        | {"label_share": 0.5, "drop_unlabelled": True},
        "teacher": default["teacher"]
        | {"model": "mnist_large", "ready": True, "pretrained": True, "weights": "w.safetensors", "epochs": 4},
        "student": {"model": "mnist_small"},
        "train": default["train"]
        | {"epochs": 3, "batch_size": 8, "lr": 0.5, "weight_decay": 0.125, "clip_norm": 1.5, "augment": "light"},
        "distill": default["distill"] | {"method": "kd", "temperature": 5.0, "ce_weight": 0.25, "kd_weight": 2.0},
        "sweep": None,
        "seeds": [0, 1],
        "min_gain": 0.0625,
        "device": "cpu",
        "precision": "bf16",
        "threads": 3,
        "checkpoint_seconds": default["checkpoint_seconds"],
        "force": True,
        "unsafe_pickle": True,
    }
    assert given == told


def test_every_option_of_train_reaches_its_setting(call: Call, asked: list[RunConfig]) -> None:
    options = ["--model", "mnist_large", "--epochs", 3, "--seed", 8, "--weights", "w.safetensors", "--pretrained"]
    call("train", "photos", *options)
    (given,) = asked
    teacher = given.teacher
    assert (teacher.model, given.teacher_train.epochs, teacher.seed) == ("mnist_large", 3, 8)
    assert (teacher.weights, teacher.pretrained) == (Path("w.safetensors"), True)


def test_the_configuration_that_a_run_kept_can_be_changed_by_options(
    finished: Path, call: Call, asked: list[RunConfig]
) -> None:
    call("distill", "--config", finished / "config.yaml", "--alpha", 0.75)
    (given,) = asked
    assert (given.distill.ce_weight, given.distill.kd_weight) == (0.25, 0.75)


def test_the_default_folder_is_named_after_data_and_models(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(given: RunConfig, folder: Path, **options: object) -> None:
        seen.append(str(folder))
        raise UnderstudyError("Enough.")

    monkeypatch.setattr(api, "run", run)
    call("distill", "some/photos/", "--teacher", "nets/large.safetensors", "--student", "mine:net")
    call("train", "some/photos", "--model", "mnist_large")
    call("distill", "some/photos", "--name", "first")
    call("distill", "some/photos", "--name", "first", "--out", "there")
    assert seen == ["runs/photos-large-mine-net", "runs/photos-mnist_large", "runs/first", "there"]


# --- data and models that cannot be used ---


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
    return root


def test_an_empty_folder(call: Call, tmp_path: Path) -> None:
    _folder(tmp_path, "photos")
    assert "holds no images" in call("distill", "photos", *SMALL).sentence()


def test_one_class_only(photos: Path, call: Call, tmp_path: Path) -> None:
    shutil.copytree(photos / "train/cat", tmp_path / "photos/cat")
    assert "one class only" in call("distill", "photos", *SMALL).sentence()


def test_no_such_folder(call: Call) -> None:
    assert "photos/mine" in call("distill", "photos/mine", *SMALL).sentence()


def test_an_unknown_data_set_names_the_nearest(finished: Path, call: Call) -> None:
    assert "Did you mean 'digits'" in call("evaluate", finished, "digts").sentence()
    assert "Did you mean 'digits'" in call("distill", "digts", *SMALL).sentence()


def test_a_file_for_a_folder(photos: Path, call: Call) -> None:
    assert "is a file" in call("distill", photos / "train/cat/000.png", *SMALL).sentence()


def test_a_data_set_that_is_not_there(call: Call, tmp_path: Path) -> None:
    assert "--download" in call("distill", "mnist", "--data-dir", tmp_path / "none", *SMALL).sentence()


def _spoilt(photos: Path, place: Path, count: int) -> Path:
    shutil.copytree(photos, place)
    for number in range(count):
        (place / f"train/cat/{number:03d}.png").write_bytes(b"not an image")
    return place


def test_more_unreadable_files_than_allowed(photos: Path, call: Call, tmp_path: Path) -> None:
    _spoilt(photos, tmp_path / "photos", 10)
    said = call("distill", *words("photos"), "--out", "run").sentence()
    assert "10 of 170 images cannot be used" in said
    assert "--max-bad-share" in said


def test_a_student_that_cannot_take_the_images(photos: Path, call: Call) -> None:
    said = call("distill", photos, *SMALL, "--student", "cnn3").sentence()
    assert "'cnn3' needs images of at least 16 x 16 pixels" in said
    assert "--image-size" in said


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--student", "--teacher"])
def test_an_unknown_model_names_the_nearest(option: str, photos: Path, call: Call) -> None:
    said = call("distill", photos, *SMALL, option, "resnet81").sentence()
    assert "Unknown network 'resnet81'" in said
    assert "'resnet18'" in said


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nets/none.safetensors", "does not exist"),
        ("./", "without a record.json"),
        ("no_such_module:net", "no module 'no_such_module'"),
        ("json:loads", "'json:loads'"),
    ],
)
def test_a_teacher_that_is_none(model: str, words: str, photos: Path, call: Call) -> None:
    assert words in call("distill", photos, *SMALL, "--teacher", model).sentence()


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


def test_a_device_that_this_machine_lacks(photos: Path, call: Call) -> None:
    device = "mps" if not torch.backends.mps.is_available() else "cuda"
    assert "--device" in call("distill", photos, *SMALL, "--device", device).sentence()


def test_a_rate_that_is_too_high(photos: Path, call: Call) -> None:
    said = call("distill", *words(photos, train={"lr": 1e25}), "--out", "run").sentence()
    assert "lower learning rate" in said
    assert "--lr 1e+24" in said


# --- run folders ---


@pytest.mark.usefixtures("no_export")
def test_a_corrected_command_may_use_the_same_folder(photos: Path, call: Call, tmp_path: Path) -> None:
    """Nothing was done under the mistaken one, so nothing is in the way."""
    _spoilt(photos, tmp_path / "photos", 10)
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
    (_folder(tmp_path, "thesis") / "thesis/chapter.tex").write_text("All my work.")
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


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
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
