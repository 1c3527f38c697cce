"""Chains and ensembles of other shapes: what they train, what is refused, the forecast, the command line, processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import small_runs
from chain_runs import ASSISTANT, TOGETHER, TWO, _quick, distilled, taught_by
from small_runs import photos, stripes, tiny, weights
from test_processes import Begin, begin, same_weights
from understudy import api, cli
from understudy import record as records
from understudy.config import RunConfig
from understudy.errors import ConfigError, ModelError
from understudy.pipeline import chain

__all__ = ["_quick", "begin", "photos"]  # fixtures


# --- assistants and generations ---


@pytest.mark.slow
def test_an_assistant_of_another_architecture(photos: Path, tmp_path: Path) -> None:
    result = distilled(photos, tmp_path / "run", distill={"assistants": ["mnist_large"]})
    alone = distilled(photos, tmp_path / "alone", student={"model": "mnist_large"})
    found = weights(result.folder)
    assert result.record.models["assistant-1"].architecture == "mnist_large"
    assert found["assistant-1"] == weights(alone.folder)["student-0"]
    assert found["student-0"] == taught_by(photos, tmp_path / "one", result.folder / "assistant-1/model.safetensors")


@pytest.mark.slow
def test_two_assistants_in_a_row(photos: Path, tmp_path: Path) -> None:
    result = distilled(photos, tmp_path / "run", distill={"assistants": ["mnist_large", "mnist_small"]})
    models = result.record.models
    assert [models[name].taught_by for name in ("assistant-1", "assistant-2", "student-0")] == [
        "teacher",
        "assistant-1",
        "assistant-2",
    ]
    second = weights(result.folder)["assistant-2"]
    assert second == taught_by(photos, tmp_path / "one", result.folder / "assistant-1/model.safetensors")


def test_the_links_of_a_long_chain(photos: Path) -> None:
    config = tiny(photos, seeds=[4, 7], distill={"assistants": ["resnet18", "cnn3"], "generations": 3})
    assert [(link.name, link.teacher, link.model, link.seed) for link in chain.links(config)] == [
        ("assistant-1", "teacher", "resnet18", 0),
        ("assistant-2", "assistant-1", "cnn3", 0),
        ("baseline-4", "", "mnist_small", 4),
        ("generation-1-4", "assistant-2", "mnist_small", 4),
        ("generation-2-4", "generation-1-4", "mnist_small", 4),
        ("student-4", "generation-2-4", "mnist_small", 4),
        ("baseline-7", "", "mnist_small", 7),
        ("generation-1-7", "assistant-2", "mnist_small", 7),
        ("generation-2-7", "generation-1-7", "mnist_small", 7),
        ("student-7", "generation-2-7", "mnist_small", 7),
    ]
    assert chain.taught_by_teacher(config) == ["assistant-1"]


# --- several teachers ---


@pytest.mark.slow
def test_an_ensemble_may_run_along(photos: Path, tmp_path: Path) -> None:
    """Where views are ever new, both teachers answer in every step; with one view for each epoch, that is the same."""
    over: dict[str, Any] = {"teacher": TWO, "seeds": [0]}
    along = small_runs.distilled(photos, tmp_path / "along", **over, train={"views": "online"})
    kept = small_runs.distilled(photos, tmp_path / "kept", **over, train={"views": 2})
    assert along.record.outputs is None
    same_weights(along.folder / "student-0/model.safetensors", kept.folder / "student-0/model.safetensors", atol=1e-2)


@pytest.mark.slow
def test_a_chain_below_an_ensemble(photos: Path, tmp_path: Path) -> None:
    distill = {"assistants": ["mnist_large"], "generations": 2}
    record = distilled(photos, tmp_path / "run", teacher={"also": ["mnist_small"]}, distill=distill).record
    assert record.status == "done"
    assert {name: model.taught_by for name, model in record.models.items() if model.taught_by} == {
        "assistant-1": "teacher",
        "generation-1-0": "assistant-1",
        "student-0": "generation-1-0",
    }


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's, in the current folder."""
    (tmp_path / "untrained_teachers.py").write_text(
        "from torch import nn\n"
        "def fresh(num_classes, channels, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size ** 2, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "untrained_teachers"
    sys.modules.pop("untrained_teachers", None)


@pytest.mark.slow
def test_one_bad_teacher_among_good_ones_is_named_and_refused(photos: Path, module: str, tmp_path: Path) -> None:
    also = [{"model": f"{module}:fresh", "ready": True}]
    with pytest.raises(ModelError, match=r"teacher-2: .* --force"):
        distilled(photos, tmp_path / "run", teacher={"also": also})
    record = records.load(tmp_path / "run")
    assert list(record.stages) == TOGETHER[:4]
    record = distilled(photos, tmp_path / "run", teacher={"also": also}, force=True).record
    assert (record.status, list(record.stages)) == ("done", TOGETHER)


# --- what does not fit together ---


@pytest.mark.parametrize(
    ("over", "kind", "words"),
    [
        ({"sweep": {"alpha": [0.5]}, "distill": {"assistants": ["cnn3"]}}, "distill", "sweep"),
        ({"sweep": {"alpha": [0.5]}, "distill": {"generations": 2}}, "distill", "sweep"),
        ({"sweep": {"alpha": [0.5]}, "teacher": TWO}, "distill", "sweep"),
        ({"teacher": TWO, "distill": {"method": "kd+attention"}}, "distill", r"kd\+attention compares features"),
        ({"teacher": TWO}, "train", "alone"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    over: dict[str, Any], kind: Any, words: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        api.run(tiny(photos, **over), tmp_path / "run", kind=kind)
    assert weights(tmp_path / "run") == {}


@pytest.mark.slow
def test_an_unknown_assistant_is_refused_before_anything_is_trained(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="mnist_smal"):
        distilled(photos, tmp_path / "run", distill={"assistants": ["mnist_smal"]})
    assert weights(tmp_path / "run") == {}


@pytest.mark.slow
def test_features_may_be_compared_along_a_chain(photos: Path, tmp_path: Path) -> None:
    """Each link compares the student's maps with those of its own teacher."""
    distill = {**ASSISTANT, "method": "kd+attention"}
    record = distilled(photos, tmp_path / "run", distill=distill).record
    assert record.status == "done"
    for name in ("assistant-1", "student-0"):
        assert set(record.models[name].epochs[0].parts) == {"ce", "kd", "attention"}


# --- the plan, the command line ---


@pytest.mark.parametrize(
    ("over", "stages"),
    [
        ({"distill": ASSISTANT}, ["teacher", "outputs", "assistant-1", "baseline", "student"]),
        (
            {"distill": {"generations": 3}},
            ["teacher", "outputs", "baseline", "generation-1", "generation-2", "student"],
        ),
        ({"teacher": TWO}, ["teacher-1", "teacher-2", "outputs", "baseline", "student"]),
    ],
)
def test_the_forecast_counts_every_link(over: dict[str, Any], stages: list[str], photos: Path, tmp_path: Path) -> None:
    found = api.dry_run(tiny(photos, seeds=[0], **over), tmp_path / "run")
    assert [step.stage for step in found.plan.steps] == ["data", *stages, "evaluate", "export"]
    for step in found.plan.steps:
        if step.stage not in ("data", "outputs", "evaluate", "export"):
            assert step.seconds > 0
            assert step.memory_bytes > 0
    head, *rows = found.text().split("Dry run\n")[1].splitlines()[:-1]
    figures = head.index("time") + len("time")
    assert {row[figures - 1] for row in rows} == {"s"}  # the columns stand below their heads


def test_words_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[RunConfig] = []
    monkeypatch.setattr(cli, "_run", lambda config, *rest: given.append(config))
    words = (
        "distill digits --teacher cnn3 --teacher mnist_large --assistant cnn3 --assistant mnist_small --generations 3"
    )
    monkeypatch.setattr(sys, "argv", ["understudy", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    (config,) = given
    assert [one.model for one in config.teacher.members] == ["cnn3", "mnist_large"]
    assert (config.distill.assistants, config.distill.generations) == (("cnn3", "mnist_small"), 3)


# --- several processes ---


@pytest.mark.slow
def test_two_processes_train_the_chain_that_one_does(begin: Begin, tmp_path: Path) -> None:
    photos = stripes(tmp_path / "photos", side=16)
    over = {
        "seeds": [0],
        "teacher": {"also": ["mnist_small"]},
        "distill": {"assistants": ["mnist_large"], "generations": 2},
    }
    codes, told, others = begin("distill", *small_runs.words(photos, **over), "--out", tmp_path / "two").end()
    assert (codes, others) == ([0, 0], []), told
    one = small_runs.distilled(photos, tmp_path / "one", **over)
    two = records.load(tmp_path / "two")
    assert list(two.stages) == list(one.record.stages)
    for name in weights(one.folder):
        same_weights(one.folder / name / "model.safetensors", tmp_path / "two" / name / "model.safetensors")
