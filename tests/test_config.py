"""What a user may write: files, options and words in their order, sugar, and what comes out."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from config_written import DATA, _refused, write
from understudy.config import DistillConfig, RunConfig, TrainConfig, load, merge, validate

__all__ = ["write"]  # a fixture


def _with(**values: Any) -> RunConfig:
    return validate({**DATA, **values})


# --- alpha, and the weights that it stands for -----------------------------------------------------------------------


def test_alpha_stands_for_two_weights() -> None:
    config = _with(distill={"alpha": 0.9, "temperature": 3}).distill
    assert [config.ce_weight, config.kd_weight, config.temperature] == pytest.approx([0.1, 0.9, 3])


@given(st.floats(0, 1))
def test_the_two_weights_of_any_alpha_add_up_to_one(alpha: float) -> None:
    config = DistillConfig.model_validate({"alpha": alpha})
    assert config.kd_weight == alpha
    assert config.ce_weight + config.kd_weight == pytest.approx(1)


def test_one_weight_leaves_the_other_at_its_default() -> None:
    config = _with(distill={"kd_weight": 2}).distill
    assert (config.ce_weight, config.kd_weight) == (0.5, 2)


@pytest.mark.parametrize("weight", ["ce_weight", "kd_weight"])
def test_alpha_and_a_weight_at_the_same_place_are_at_odds(weight: str) -> None:
    text = _refused(lambda: _with(distill={"alpha": 0.5, weight: 0.5}))
    assert text == "Setting 'distill': say either alpha or ce_weight and kd_weight, not both."


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf, "much", [0.5]])
def test_alpha_is_a_share(alpha: object) -> None:
    assert "alpha is the share of the distillation term, between 0 and 1" in _refused(
        lambda: _with(distill={"alpha": alpha})
    )


def test_two_zero_weights_leave_nothing_to_learn() -> None:
    assert "nothing to learn from" in _refused(lambda: _with(distill={"ce_weight": 0, "kd_weight": 0}))


def test_a_later_alpha_replaces_the_weights_of_a_file(write: Callable[[str], Path]) -> None:
    # such as the config.yaml of an earlier run, which spells the weights out
    file = write("data: {source: digits}\ndistill: {ce_weight: 0.2, kd_weight: 0.7, temperature: 8}\n")
    unsaid = {"distill": {"ce_weight": None, "kd_weight": None, "alpha": 0.75}}
    for config in (load(file, unsaid), load(file, None, ["distill.alpha=0.75"])):
        assert (config.distill.ce_weight, config.distill.kd_weight) == (0.25, 0.75)
        assert config.distill.temperature == 8


def test_a_later_weight_replaces_its_half_of_an_alpha(write: Callable[[str], Path]) -> None:
    file = write("data: {source: digits}\ndistill: {alpha: 0.75}\n")
    config = load(file, None, ["distill.ce_weight=1"]).distill
    assert (config.ce_weight, config.kd_weight) == (1, 0.75)


# --- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "seeds"), [(1, (0,)), (3, (0, 1, 2)), ([7], (7,)), ([5, 0, 3], (5, 0, 3)), ((4, 2), (4, 2))]
)
def test_seeds_are_a_number_or_a_list(given: object, seeds: tuple[int, ...]) -> None:
    assert _with(seeds=given).seeds == seeds


@pytest.mark.parametrize("given", [0, -1, 1001, True, [], [1, 1], [-1], [2**64], ["x"], [0.5], "three", {"a": 1}])
def test_seeds_that_make_no_sense(given: object) -> None:
    assert "seed" in _refused(lambda: _with(seeds=given))


# --- files, options, words -------------------------------------------------------------------------------------------


def test_words_go_over_options_and_options_over_the_file(write: Callable[[str], Path]) -> None:
    file = write("data: {source: digits, image_size: 16}\ntrain: {epochs: 1, lr: 0.1, batch_size: 8}\nseeds: [4]\n")
    given = {"train": {"epochs": 2, "lr": 0.2, "batch_size": None}, "seeds": None, "student": {"model": "mnist_small"}}
    config = load(file, given, ["train.epochs=3", "data.image_size=32"])
    assert config.train == TrainConfig(epochs=3, lr=0.2, batch_size=8)
    assert config.data.image_size == 32
    assert config.data.source == "digits"
    assert config.student.model == "mnist_small"
    assert config.seeds == (4,)


def test_nothing_given_is_all_defaults() -> None:
    assert load(None, DATA) == RunConfig.model_validate(DATA)


def test_what_was_given_is_not_changed() -> None:
    given = {**DATA, "distill": {"alpha": 0.5}, "train": {"lr": 0.1}}
    load(None, given, ["train.lr=1", "distill.alpha=0.2"])
    assert given == {**DATA, "distill": {"alpha": 0.5}, "train": {"lr": 0.1}}


@pytest.mark.parametrize(
    ("word", "path", "value"),
    [
        ("train.lr=1e-3", "train.lr", 0.001),  # a string to YAML 1.1
        ("train.lr=3", "train.lr", 3.0),
        ("teacher.pretrained=yes", "teacher.pretrained", True),
        ("seeds=[4, 5]", "seeds", (4, 5)),
        ("seeds=2", "seeds", (0, 1)),
        ("name=a=b", None, "Setting 'name'"),
        ("data.source=a=b", "data.source", "a=b"),
        ("name=2024-13-45", "name", "2024-13-45"),  # a date to YAML, and no day
        ("data={source: folder}", "data.source", "folder"),
    ],
)
def test_words(word: str, path: str | None, value: object) -> None:
    if path is None:
        assert str(value) in _refused(lambda: load(None, DATA, [word]))
        return
    found: Any = load(None, DATA, [word])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_a_null_word_brings_the_default_back(write: Callable[[str], Path]) -> None:
    file = write("data: {source: digits}\ntrain: {clip_norm: 1.0, epochs: 2}\nteacher: {model: resnet50}\n")
    config = load(file, None, ["train.clip_norm=null", "train.epochs=", "teacher=null"])
    assert config == validate({**DATA, "train": {}})


@pytest.mark.parametrize("word", ["train.lr", "", "=5"])
def test_a_word_that_is_none(word: str) -> None:
    assert _refused(lambda: load(None, DATA, [word])) == (
        f"--set takes section.key=value, such as distill.temperature=4, not '{word}'."
    )


def test_an_empty_section_means_its_defaults(write: Callable[[str], Path]) -> None:
    file = write("data: {source: digits}\ntrain:\n  # lr: 3\nseeds:\n")
    assert load(file) == validate(DATA)


def test_a_byte_order_mark_does_no_harm(write: Callable[[bytes], Path]) -> None:
    assert load(write(b"\xef\xbb\xbfdata: {source: digits}\n")) == validate(DATA)


def test_merge_keeps_what_is_not_named() -> None:
    values: dict[str, Any] = {"a": {"b": 1, "c": 2}, "d": 3}
    merge(values, {"a": {"b": None, "c": 5, "e": {"f": 6}}, "g": 7})
    assert values == {"a": {"b": 1, "c": 5, "e": {"f": 6}}, "d": 3, "g": 7}


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_teacher_has_the_run_s_budget_where_it_names_none() -> None:
    train = {"epochs": 7, "lr": 0.5, "batch_size": 16, "weight_decay": 0.3, "augment": "none"}
    assert _with(train=train).teacher_train == TrainConfig.model_validate({**train, "views": "online"})
    own = _with(train=train, teacher={"epochs": 3, "lr": 0.1}).teacher_train
    assert own == TrainConfig.model_validate({**train, "views": "online", "epochs": 3, "lr": 0.1})
    assert _with(train=train, teacher={"batch_size": 4}).teacher_train.batch_size == 4


def test_the_teacher_sees_fresh_views_that_are_not_mixed() -> None:
    both = _with(train={"views": 4, "mix": "cutmix"})
    assert (both.train.views, both.train.mix) == (4, "cutmix")
    assert (both.teacher_train.views, both.teacher_train.mix) == ("online", "none")


@pytest.mark.parametrize("views", ["0", "-1", "often", "1.5"])
def test_views_are_a_number_or_online(views: str) -> None:
    text = _refused(lambda: load(None, DATA, [f"train.views={views}"]))
    assert text.startswith("Setting 'train.views': a number of views of at least 1, or 'online' (given: ")


def test_views_may_come_as_a_word() -> None:
    assert _with(train={"views": "4"}).train.views == 4
    assert _with(train={"views": "online"}).train.views == "online"


def test_a_configuration_never_changes() -> None:
    config = _with()
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 1.0  # type: ignore[misc]


_SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text("aÄß_-9", min_size=1),
        "teacher": st.fixed_dictionaries(
            {}, optional={"model": st.text(max_size=20), "weights": st.just("a/b.pt"), "epochs": st.integers(1, 99)}
        ),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "lr": st.floats(0, 10, exclude_min=True),
                "clip_norm": st.none() | st.floats(0, 1e30, exclude_min=True),
                "augment": st.sampled_from(["auto", "none", "light", "standard"]),
            },
        ),
        "distill": st.fixed_dictionaries(
            {}, optional={"alpha": st.floats(0, 1), "temperature": st.floats(1e-300, 1e300)}
        ),
        "seeds": st.integers(1, 9) | st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4, unique=True),
        "checkpoint_seconds": st.floats(0, 1e6),
    },
)


@given(st.text(min_size=1), _SECTIONS)
def test_a_configuration_survives_config_yaml(source: str, values: dict[str, Any]) -> None:
    config = validate({"data": {"source": source}, **values})
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    assert validate(yaml.safe_load(text)) == config


def test_a_saved_configuration_can_be_given_again(tmp_path: Path) -> None:
    config = _with(distill={"alpha": 0.3}, seeds=[3, 1], train={"clip_norm": None, "lr": 1e-5})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert load(file) == config
    assert load(file, None, ["seeds=1"]).seeds == (0,)


def test_reading_a_configuration_needs_no_torch() -> None:
    code = "import sys, understudy.config, understudy.record, understudy.storage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
