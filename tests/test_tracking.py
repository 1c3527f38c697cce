"""Epochs of a training told as JSON lines and to trackers: what they say, after kills, and that nothing is changed."""

from __future__ import annotations

import json
import os
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

import test_train
from small_runs import lines
from understudy import checkpoint
from understudy.distillation import Schedule
from understudy.errors import Interrupted
from understudy.tracking import Journal, Place, Trackers, others, places
from understudy.tracking.weights import BINS, look
from understudy.train import Training


def _training(path: Path, journal: Journal, **over: Any) -> Training:
    training = test_train._training(path=path / "checkpoint.safetensors", **over)
    training.journal = journal
    return training


# what a run writes


def test_a_weight_with_a_schedule_is_told_as_it_was_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    training = _training(tmp_path, Journal(tmp_path / "m.jsonl"))
    ce, kd = training.objective.terms
    training.objective.terms = (ce, replace(kd, weight=Schedule("linear", start=0.0, end=1.0)))
    training.objective._is_steady = False
    training.run()
    told = [line["weights"]["kd"] for line in lines(tmp_path / "m.jsonl")]
    steps = training.total_steps
    assert told == pytest.approx([(steps * epoch / 3 - 1) / steps for epoch in (1, 2, 3)])


# after kills


@pytest.mark.parametrize("stop_at", [1, 5, 6, 7, 12, 17, 18])
@pytest.mark.parametrize("looks", [False, True])
def test_wherever_a_training_stops_its_lines_are_those_of_one_left_alone(
    tmp_path: Path, stop_at: int, looks: bool
) -> None:
    _training(tmp_path / "whole", Journal(tmp_path / "whole.jsonl", looks=looks)).run()
    file = tmp_path / "stopped.jsonl"
    with pytest.raises(Interrupted):
        _training(tmp_path, Journal(file, looks=looks), stop_at=stop_at).run()
    _training(tmp_path, Journal(file, looks=looks)).run()
    assert lines(file) == lines(tmp_path / "whole.jsonl")


@pytest.mark.parametrize("harm", ["nothing", "ahead", "torn", "gone", "other"])
def test_the_checkpoint_decides_what_the_file_says(tmp_path: Path, harm: str) -> None:
    """The file may be ahead of the checkpoint, end in half a line, be gone, or be of other images."""
    _training(tmp_path / "whole", Journal(tmp_path / "whole.jsonl")).run()
    file = tmp_path / "killed.jsonl"
    with pytest.raises(Interrupted):
        _training(tmp_path, Journal(file), stop_at=13).run()
    text = file.read_text()
    assert text.count("\n") == 2
    row = json.loads(text.splitlines()[1])
    file.write_text(
        {
            "nothing": text,
            "ahead": text + json.dumps({**row, "epoch": 3}) + "\n",
            "torn": text + json.dumps({**row, "epoch": 3})[:30],
            "gone": "",
            "other": "".join(json.dumps({**row, "val_nll": 9.0, "epoch": epoch}) + "\n" for epoch in (1, 2)),
        }[harm]
    )
    _training(tmp_path, Journal(file)).run()
    assert lines(file) == lines(tmp_path / "whole.jsonl")


def test_a_training_that_begins_anew_leaves_no_line_of_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    test_train_config = test_train.CONFIG.model_copy(update={"epochs": 5})
    _training(tmp_path / "one", Journal(file), config=test_train_config).run()
    _training(tmp_path / "two", Journal(file)).run()
    assert [line["epoch"] for line in lines(file)] == [1, 2, 3]


# parameters and gradients


def test_looking_at_weights_changes_none(tmp_path: Path) -> None:
    plain, seen = (_training(tmp_path / str(looks), Journal(looks=looks)) for looks in (False, True))
    fits = [training.run() for training in (plain, seen)]
    assert test_train._weights(plain) == test_train._weights(seen)
    assert [row.model_dump(exclude={"seconds"}) for row in fits[0].epochs] == [
        row.model_dump(exclude={"seconds"}) for row in fits[1].epochs
    ]


def test_nobody_looks_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Journal, "look", lambda self, network: seen.append(network) or {})
    _training(tmp_path / "a", Journal(tmp_path / "m.jsonl")).run()
    assert not seen
    _training(tmp_path / "b", Journal(tmp_path / "m.jsonl", looks=True)).run()
    assert len(seen) == 3  # once in each epoch


def test_the_norms_are_those_of_the_last_step_of_each_epoch(tmp_path: Path) -> None:
    training = _training(tmp_path, Journal(tmp_path / "m.jsonl", looks=True))
    steps: list[dict[str, dict[str, float]]] = []
    original = training.optimizer.step

    def step() -> None:
        named = training.student.named_parameters()
        steps.append(
            {
                f"student.{name}": {
                    "parameter": float((parameter.detach().double() ** 2).sum().sqrt()),
                    "gradient": float((parameter.grad.double() ** 2).sum().sqrt()),
                }
                for name, parameter in named
                if parameter.grad is not None
            }
        )
        original()

    training.optimizer.step = step  # type: ignore[method-assign, assignment]
    training.run()
    told = [line["parameters"] for line in lines(tmp_path / "m.jsonl")]
    expected = [steps[5], steps[11], steps[17]]
    assert [list(one) for one in told] == [list(one) for one in expected]
    for one, other in zip(told, expected, strict=True):
        for name in other:
            assert one[name] == pytest.approx(other[name], rel=1e-12)


def test_a_look_counts_values_and_survives_those_that_are_no_numbers() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[0.0, 1.0], [1.0, 64.0]])
    layer.weight.grad = torch.tensor([[1.0, torch.inf], [torch.nan, 3.0]])
    found = look(layer)
    assert "gradient" not in found["bias"]
    weight = found["weight"]["parameter"]
    assert (weight["low"], weight["high"], weight["norm"]) == (0.0, 64.0, pytest.approx(64.0156, abs=1e-4))
    assert weight["counts"] == [1, 2, *[0] * (BINS - 3), 1]
    gradient = found["weight"]["gradient"]
    assert gradient["norm"] is None
    assert (gradient["low"], gradient["high"], sum(gradient["counts"])) == (1.0, 3.0, 2)
    json.dumps(found, allow_nan=False)


def test_the_checkpoint_holds_no_look_once_the_epoch_is_told(tmp_path: Path) -> None:
    _training(tmp_path, Journal(tmp_path / "m.jsonl", looks=True)).run()
    found = checkpoint.load(tmp_path / "checkpoint.safetensors")
    assert found is not None
    assert found[1]["look"] == {}


# trackers in general, with one that remembers


class Memory(GeneralTracker):
    """Remembers what it was told; breaks where it is asked to."""

    name = "mlflow"
    requires_logging_directory = False
    tracker = types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-1"))
    told: list[tuple[int | None, dict[str, Any]]] = []  # noqa: RUF012 - shared on purpose
    started: list[dict[str, Any]] = []  # noqa: RUF012
    breaks = ""

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.options = {"project": project, **options, "uri": os.environ.get("MLFLOW_TRACKING_URI")}

    def _perhaps(self, what: str) -> None:
        if self.breaks == what:
            raise OSError(f"no {what} today\nnor tomorrow")

    def start(self) -> None:
        self._perhaps("start")
        self.started.append(self.options)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append((None, values))

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self._perhaps("log")
        self.told.append((step, values))

    def finish(self) -> None:
        self._perhaps("finish")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mlflow", Memory)
    monkeypatch.setattr(others, "_said", set())
    for name, value in (("told", []), ("started", []), ("breaks", "")):
        monkeypatch.setattr(Memory, name, value)
    return Memory


def _journal(run: Path, said: list[str], *, key: str = "a", name: str = "student-0") -> Journal:
    place = Place(run, name)
    trackers = Trackers(["mlflow"], place, key=key, settings={"train.lr": 0.1}, warn=said.append)
    return Journal(run / name / "metrics.jsonl", task=name, trackers=trackers)


def test_a_tracker_is_told_of_settings_and_of_every_epoch(tmp_path: Path, memory: type[Memory]) -> None:
    _training(tmp_path, _journal(tmp_path, [])).run()
    (_, settings), *told = memory.told
    assert settings == {"train.lr": 0.1}
    assert [step for step, _ in told] == [1, 2, 3]
    for (_, values), line in zip(told, lines(tmp_path / "student-0/metrics.jsonl", timed=True), strict=True):
        assert values == {
            **{key: line[key] for key in ("lr", "train_loss", "train_accuracy", "val_accuracy", "val_nll", "seconds")},
            **{f"loss/{name}": value for name, value in line["parts"].items()},
            **{f"weight/{name}": value for name, value in line["weights"].items()},
        }
    assert memory.started[0]["uri"] == f"sqlite:///{tmp_path}/tracking/mlflow.db"
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_a_server_that_the_user_names_is_used(
    tmp_path: Path, memory: type[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    _training(tmp_path, _journal(tmp_path, [])).run()
    assert memory.started[0]["uri"] == "http://localhost:1"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://localhost:1"


@pytest.mark.parametrize("stop_at", [4, 7, 18])
def test_a_resumed_training_tells_no_epoch_twice(tmp_path: Path, memory: type[Memory], stop_at: int) -> None:
    with pytest.raises(Interrupted):
        _training(tmp_path, _journal(tmp_path, []), stop_at=stop_at).run()
    _training(tmp_path, _journal(tmp_path, [])).run()
    assert [step for step, _ in memory.told] == [None, 1, 2, 3]
    assert [one["run_id"] for one in memory.started] == [None, "run-1"]


def test_epochs_that_were_told_before_the_kill_are_not_told_again(tmp_path: Path, memory: type[Memory]) -> None:
    """The checkpoint is older than what was told: those epochs are trained again, and come out the same."""
    with pytest.raises(Interrupted):
        _training(tmp_path, _journal(tmp_path, []), stop_at=13).run()
    (tmp_path / "checkpoint.safetensors").unlink()
    _training(tmp_path, _journal(tmp_path, [])).run()
    assert [step for step, _ in memory.told] == [None, 1, 2, 3]


def test_a_training_of_other_inputs_is_another_run(tmp_path: Path, memory: type[Memory]) -> None:
    _training(tmp_path / "one", _journal(tmp_path, [], key="a")).run()
    _training(tmp_path / "two", _journal(tmp_path, [], key="b")).run()
    assert [step for step, _ in memory.told] == [None, 1, 2, 3] * 2
    assert [one["run_id"] for one in memory.started] == [None, None]


def test_a_tracker_that_comes_later_is_told_of_what_was(tmp_path: Path, memory: type[Memory]) -> None:
    with pytest.raises(Interrupted):
        _training(tmp_path, Journal(tmp_path / "student-0/metrics.jsonl", task="student-0"), stop_at=13).run()
    _training(tmp_path, _journal(tmp_path, [])).run()
    assert [step for step, _ in memory.told] == [None, 1, 2, 3]


@pytest.mark.parametrize("what", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_harms_nothing(
    tmp_path: Path, memory: type[Memory], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(memory, "breaks", what)
    said: list[str] = []
    trainings = [_training(tmp_path / name, _journal(tmp_path, said, name=name)) for name in ("one", "two")]
    for training in trainings:
        training.run()
    assert said == [f"Tracking with mlflow failed (OSError: no {what} today); training goes on without."]
    plain = test_train._training()
    plain.run()
    assert test_train._weights(trainings[1]) == test_train._weights(plain)
    assert len(lines(tmp_path / "two/metrics.jsonl")) == 3
    assert json.loads((tmp_path / "two/tracked.json").read_text())["failures"] == {"mlflow": said[0]}


@pytest.mark.parametrize(
    ("name", "variable", "given"),
    [("comet_ml", "COMET_START_ONLINE", {"online": False}), ("swanlab", "SWANLAB_MODE", {"mode": "offline"})],
)
def test_trackers_of_services_stay_offline_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, variable: str, given: dict[str, Any]
) -> None:
    monkeypatch.delenv(variable, raising=False)
    asked = places.WAYS[name].options(Place(tmp_path, "student-0"), "")
    assert given.items() <= asked.items()
    monkeypatch.setenv(variable, "online")
    asked = places.WAYS[name].options(Place(tmp_path, "student-0"), "")
    assert not given.items() <= asked.items()
