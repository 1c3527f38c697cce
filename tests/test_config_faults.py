"""Configurations that are refused in one sentence: unknown names, files that are none, values that make no sense."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config_written import DATA, _refused, write
from understudy import errors
from understudy.config import load, validate

__all__ = ["write"]  # a fixture


# --- unknown names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trian.lr=1", "Unknown setting 'trian'. Did you mean 'train' or 'track'?"),
        ("seed=1", "Unknown setting 'seed'. Did you mean 'seeds' or 'sweep'?"),
        ("data.sorce=x", "Unknown setting 'data.sorce'. Did you mean 'source'?"),
        ("teacher.pretrian=true", "Unknown setting 'teacher.pretrian'. Did you mean 'pretrained'?"),
        ("student.modle=x", "Unknown setting 'student.modle'. Did you mean 'model'?"),
        ("train.epoch=3", "Unknown setting 'train.epoch'. Did you mean 'epochs'?"),
        ("train.LR=3", "Unknown setting 'train.LR'. Did you mean 'lr'?"),
        ("distill.temprature=3", "Unknown setting 'distill.temprature'. Did you mean 'temperature'?"),
        ("distill.alhpa=1", "Unknown setting 'distill.alhpa'. Did you mean 'alpha'?"),
        ("student.zzz=1", "Unknown setting 'student.zzz'. Known here: model."),
    ],
)
def test_an_unknown_key_names_the_near_one(word: str, expected: str) -> None:
    assert _refused(lambda: load(None, DATA, [word])) == expected


def test_an_unknown_key_at_the_top_lists_all_where_none_is_near() -> None:
    text = _refused(lambda: load(None, DATA, ["zzz=1"]))
    assert text.startswith(
        "Unknown setting 'zzz'. Known here: name, data, teacher, student, train, distill, sweep, seeds"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet81", "Unknown model 'resnet81'. Did you mean 'ResNet18'?"),
        ("RESNET18", "Unknown model 'RESNET18'. Did you mean 'ResNet18'?"),
        ("vgg", "Unknown model 'vgg'. Known: ResNet18, cnn3."),
    ],
)
def test_unknown_names_of_any_kind(name: str, expected: str) -> None:
    assert errors.unknown("model", name, ["cnn3", "ResNet18"]) == expected


def test_a_long_list_of_names_is_not_recited() -> None:
    assert errors.unknown("model", "qqq", [f"net{number}" for number in range(21)]) == "Unknown model 'qqq'."


# --- faults of files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no settings; it should start like 'data:'"),
        ("# nothing yet\n", "holds no settings"),
        ("- data\n- train\n", "holds no settings"),
        ("images", "holds no settings"),
        (bytes(range(256)), "is not valid YAML: 'utf-8' codec can't decode"),
        ("data: {source: x}".encode("utf-16"), "is not valid YAML: 'utf-8' codec can't decode"),
        (b"data\0: x", "is not valid YAML: unacceptable character"),
        (
            "data:\n\tsource: x\n",
            "is not valid YAML: found character '\\t' that cannot start any token (line 2, column 1)",
        ),
        ("data: {source: x\n", "is not valid YAML: expected ',' or '}', but got '<stream end>' (line 2, column 1)"),
        ("data: *nowhere\n", "is not valid YAML: found undefined alias"),
        ("name: 2024-13-45\ndata: {source: x}\n", "is not valid YAML: month must be in 1..12"),
        ("data: &a {source: x, more: *a}\n", "is not valid YAML: maximum recursion"),
        ("[" * 20_000, "is not valid YAML: maximum recursion"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML: could not determine a constructor"),
    ],
)
def test_files_that_are_no_configuration(
    content: str | bytes, expected: str, write: Callable[[str | bytes], Path]
) -> None:
    file = write(content)
    text = _refused(lambda: load(file))
    assert text.startswith(f"The configuration {file} ")
    assert expected in text


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    none = tmp_path / "none.yaml"
    assert _refused(lambda: load(none)) == f"The configuration {none} cannot be read: No such file or directory."
    assert _refused(lambda: load(tmp_path)) == f"The configuration {tmp_path} cannot be read: Is a directory."


@pytest.mark.parametrize("values", [{}, {"data": None}, {"data": {}}, {"data": {"source": ""}}])
def test_no_data(values: dict[str, Any]) -> None:
    assert _refused(lambda: validate(values)).startswith("No data given. Name a folder of images, or one of digits")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"data": "./images"}, "Setting 'data' is a section of settings (source, "),
        ({"data": ["images"]}, "Setting 'data' is a section of settings (source, "),
        ({**DATA, "distill": "kd"}, "Setting 'distill' is a section of settings (method, "),
        ({**DATA, "distill": 0}, "Setting 'distill' is a section of settings (method, "),
        ({**DATA, "train": 20}, "Setting 'train' is a section of settings (epochs, "),
        ({**DATA, "train": {"epochs": {"a": 1}}}, "Setting 'train.epochs': "),
        ({**DATA, "train": {5: 1}}, "Setting 'train.5': keys should be strings"),
    ],
)
def test_a_value_of_the_wrong_kind(values: dict[str, Any], expected: str) -> None:
    assert _refused(lambda: validate(values)).startswith(expected)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "epochs", 0),
        ("train", "epochs", 1.5),
        ("train", "batch_size", -1),
        ("train", "lr", 0),
        ("train", "lr", math.inf),
        ("train", "lr", math.nan),
        ("train", "lr", "fast"),
        ("train", "weight_decay", -0.1),
        ("train", "warmup", 1),
        ("train", "label_smoothing", 1),
        ("train", "clip_norm", 0),
        ("train", "augment", "stronger"),
        ("distill", "temperature", 0),
        ("distill", "temperature", math.inf),
        ("distill", "kd_weight", -1),
        ("data", "image_size", 0),
        ("data", "channels", "rgb"),
        ("data", "fit", "stretch"),
        ("data", "val_fraction", 0.5),
        ("data", "test_fraction", 0),
        ("data", "max_bad_share", 1.1),
        ("data", "split_seed", -1),
        ("teacher", "seed", 2**63),
        ("teacher", "epochs", 0),
        (None, "min_gain", 1),
        (None, "min_gain", math.nan),
        (None, "precision", "fp16"),
        (None, "threads", 0),
        (None, "checkpoint_seconds", -1),
        (None, "checkpoint_seconds", math.inf),
        (None, "name", "a/b"),
        (None, "name", ".."),
        (None, "name", "a\n"),
    ],
)
def test_a_value_out_of_range_is_named_and_quoted(section: str | None, key: str, value: object) -> None:
    values = {section: {**DATA.get(section, {}), key: value}} if section else {key: value}
    text = _refused(lambda: validate({**DATA, **values}))
    assert text.startswith(f"Setting '{f'{section}.' if section else ''}{key}': ")
    assert text.endswith(f"(given: {value!r}).")
