"""The command line: its help, its settings, and that data and models that cannot be used are one sentence each."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_calls import SMALL, Call, _in_a_folder_of_its_own, asked, call, folders, spoilt
from small_runs import photos, weights, words
from understudy import api, config
from understudy.config import RunConfig
from understudy.errors import UnderstudyError

__all__ = ["_in_a_folder_of_its_own", "asked", "call", "photos"]  # fixtures

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
        "track": "tensorboard",
    }
    flags = ["teacher-ready", "pretrained", "download", "no-unlabelled", "force", "unsafe-pickle", "log-weights"]
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
        "track": ["tensorboard"],
        "log_weights": True,
    }
    assert given == told


def test_every_option_of_train_reaches_its_setting(call: Call, asked: list[RunConfig]) -> None:
    options = ["--model", "mnist_large", "--epochs", 3, "--seed", 8, "--weights", "w.safetensors", "--pretrained"]
    call("train", "photos", *options)
    (given,) = asked
    teacher = given.teacher
    assert (teacher.model, given.teacher_train.epochs, teacher.seed) == ("mnist_large", 3, 8)
    assert (teacher.weights, teacher.pretrained) == (Path("w.safetensors"), True)


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


def test_an_empty_folder(call: Call, tmp_path: Path) -> None:
    folders(tmp_path, "photos")
    assert "holds no images" in call("distill", "photos", *SMALL).sentence()


def test_one_class_only(photos: Path, call: Call, tmp_path: Path) -> None:
    shutil.copytree(photos / "train/cat", tmp_path / "photos/cat")
    assert "one class only" in call("distill", "photos", *SMALL).sentence()


def test_no_such_folder(call: Call) -> None:
    assert "photos/mine" in call("distill", "photos/mine", *SMALL).sentence()


def test_a_file_for_a_folder(photos: Path, call: Call) -> None:
    assert "is a file" in call("distill", photos / "train/cat/000.png", *SMALL).sentence()


def test_a_data_set_that_is_not_there(call: Call, tmp_path: Path) -> None:
    assert "--download" in call("distill", "mnist", "--data-dir", tmp_path / "none", *SMALL).sentence()


def test_more_unreadable_files_than_allowed(photos: Path, call: Call, tmp_path: Path) -> None:
    spoilt(photos, tmp_path / "photos", 10)
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


def test_a_device_that_this_machine_lacks(photos: Path, call: Call) -> None:
    device = "mps" if not torch.backends.mps.is_available() else "cuda"
    assert "--device" in call("distill", photos, *SMALL, "--device", device).sentence()


def test_a_rate_that_is_too_high(photos: Path, call: Call) -> None:
    said = call("distill", *words(photos, train={"lr": 1e25}), "--out", "run").sentence()
    assert "lower learning rate" in said
    assert "--lr 1e+24" in said
