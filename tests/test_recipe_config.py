"""Recipes as they are written: mistakes told first, settings merged, what `--smoke` and `--only` leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import small_runs
from recipe_made import DEVICE, PARTS, raw, written
from understudy import recipes
from understudy.config.recipe import Recipe, compression_of, load_recipe, settings_of
from understudy.errors import ConfigError, ModelError
from understudy.recipes import Order


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"titel": "x"}, "Unknown setting 'titel'. Did you mean 'title'?"),
        ({"reference": {"teacher": 97.6}}, "Setting 'reference.teacher'"),
        ({"reference": {"teachers": 0.9}}, "Did you mean 'teacher'?"),
        ({"parts": [{"name": "a", "taught": "b"}]}, "Unknown setting 'parts.0.taught'. Did you mean 'taught_by'?"),
        ({"parts": [{"name": "A part"}]}, "Setting 'parts.0.name'"),
        ({"parts": [PARTS[0], PARTS[0]]}, "Two parts are called 'teacher'."),
        ({"parts": [PARTS[0], {"name": "a", "taught_by": "techer"}]}, "Did you mean 'teacher'?"),
        ({"parts": PARTS[1:2] + PARTS[:1]}, "which does not come before it"),
        ({"parts": [{"name": "a", "taught_by": "a"}]}, "which does not come before it"),
        ({"parts": [{"name": "a"}, {"name": "b", "taught_by": "a"}]}, "no part of kind train"),
        ({"parts": [PARTS[0], {**DEVICE, "of": "teacher"}]}, "trains no student"),
        ({"parts": [{"name": "a"}, {"name": "b", "of": "a"}]}, "add compress or export"),
        ({"parts": [{"name": "a"}, {**DEVICE, "of": "a", "settings": {"seeds": 1}}]}, "are that part's"),
        ({"parts": [{"name": "a"}, {**DEVICE, "of": "a", "compress": {"prun": 0.5}}]}, "Did you mean 'prune'"),
        ({"parts": [{"name": "a", "kind": "train", "role": "ours"}]}, "belong to a distill part"),
        ({"parts": [{"name": "a", "role": "ours"}, {"name": "b", "role": "ours"}]}, "only one part can be 'ours'"),
    ],
)
def test_a_bad_recipe_is_one_sentence(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        load_recipe(written(tmp_path, **change))
    assert said.lower() in str(told.value).lower()
    assert str(told.value).startswith("stripes.yaml: ")
    assert "\n" not in str(told.value)


def with_part(name: str, settings: dict[str, Any], **more: Any) -> Recipe:
    return Recipe.model_validate(raw(parts=[*PARTS, {"name": name, "settings": settings, **more}]))


@pytest.mark.parametrize(
    ("settings", "more", "error", "said"),
    [
        ({"train": {"epoch": 3}}, {}, ConfigError, "Did you mean 'epochs'?"),
        ({"distill": {"method": "kdd"}}, {}, ConfigError, "Did you mean"),
        ({"sweep": {"method": ["kd", "dkdd"]}}, {}, ConfigError, "Unknown method 'dkdd'"),
        ({"student": {"model": "nowhere/cnn.safetensors"}}, {}, ModelError, "nowhere/cnn.safetensors does not exist"),
        pytest.param(
            {"teacher": {"model": "mnist_larg"}}, {}, ModelError, "Did you mean 'mnist_large'", marks=pytest.mark.slow
        ),  # looks through all libraries of networks
        ({}, {"export": ["onx"]}, ConfigError, "Did you mean 'onnx'?"),
    ],
)
def test_every_part_is_checked_before_the_first_training(
    settings: dict[str, Any], more: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    order = Order(with_part("last", settings, **more), tmp_path / "out")
    with pytest.raises(error) as told:
        recipes.run(order)
    assert said in str(told.value)
    assert str(told.value).startswith("Part 'last': ")
    assert not (tmp_path / "out").exists()


def test_what_is_said_later_goes_over_what_was_said_before(tmp_path: Path) -> None:
    part = {"name": "one", "settings": {"train": {"epochs": 5, "lr": None}, "distill": {"alpha": 0.9}}}
    recipe = Recipe.model_validate(raw(parts=[{**part, "smoke": {"train": {"epochs": 2}}}], smoke={"seeds": 1}))
    plain = settings_of(recipe, recipe.parts[0], tmp_path)
    assert (plain.train.epochs, plain.train.batch_size, plain.train.lr) == (5, 16, 1e-3)  # a null: the default again
    assert (plain.distill.ce_weight, plain.distill.kd_weight) == (pytest.approx(0.1), 0.9)  # over the recipe's alpha
    assert plain.seeds == small_runs.SEEDS
    cut = settings_of(recipe, recipe.parts[0], tmp_path, smoke=True)
    assert (cut.train.epochs, cut.seeds) == (2, (0,))
    given = {"data": {"source": "mnist", "data_dir": None}}
    said = settings_of(recipe, recipe.parts[0], tmp_path, smoke=True, given=given, words=["train.epochs=7", "seeds=4"])
    assert (said.train.epochs, said.seeds, said.data.source) == (7, (0, 1, 2, 3), "mnist")


def test_the_teacher_of_an_earlier_part_takes_the_place_of_the_section(tmp_path: Path) -> None:
    parts = [PARTS[0], {"name": "other", "kind": "train"}, {"name": "both", "taught_by": ["teacher", "other"]}]
    recipe = Recipe.model_validate(raw(parts=parts))
    config = settings_of(recipe, recipe.parts[2], tmp_path, words=["teacher.epochs=9", "train.epochs=2"])
    assert [one.model for one in config.teacher.members] == [str(tmp_path / "teacher"), str(tmp_path / "other")]
    assert (config.teacher.epochs, config.train.epochs) == (None, 2)
    alone = settings_of(recipe, recipe.parts[0], tmp_path, words=["teacher.epochs=9", "sweep.alpha=0.5"])
    assert (alone.teacher.epochs, alone.sweep) == (9, None)


@pytest.mark.parametrize(
    ("smoke", "alphas", "temperatures"),
    [({}, (0.25, 0.75), (2.0, 4.0)), ({"sweep": {"alpha": [0.5]}}, (0.5,), (2.0, 4.0)), ({"sweep": None}, None, None)],
)
def test_smoke_cuts_searches(smoke: dict[str, Any], alphas: object, temperatures: object, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(raw(parts=[PARTS[0], {**PARTS[2], "smoke": smoke}]))
    sweep = settings_of(recipe, recipe.parts[1], tmp_path, smoke=True).sweep
    assert (sweep and sweep.alpha, sweep and sweep.temperature) == (alphas, temperatures)


def test_smoke_cuts_compression() -> None:
    asked = {"prune": 0.5, "int8": "qat", "epochs": 20, "qat_epochs": 9}
    part = Recipe.model_validate(raw(parts=[*PARTS, {**DEVICE, "compress": asked}])).part("device")
    cut, whole = compression_of(part, smoke=True), compression_of(part)
    assert cut is not None
    assert whole is not None
    assert (cut.prune, cut.int8, cut.epochs, cut.qat_epochs, cut.calibration_images) == (0.5, "qat", None, 1, 32)
    assert (whole.epochs, whole.qat_epochs) == (20, 9)


def test_only_takes_along_what_a_part_stands_on() -> None:
    recipe = Recipe.model_validate(raw(parts=[*PARTS, DEVICE]))
    assert [part.name for part in recipe.needed(["device"])] == ["teacher", "ours", "device"]
    assert [part.name for part in recipe.needed([])] == ["teacher", "published", "ours", "device"]
    with pytest.raises(ConfigError, match="Did you mean 'published'"):
        recipe.needed(["publishd"])
