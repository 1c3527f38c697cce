"""Whole runs in two processes on this machine: the same student as one process, one voice, no process left behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import small_runs
from small_runs import STAGES, stripes, words
from understudy import api, cli, engine
from understudy import record as records
from understudy.errors import ConfigError
from understudy.models.norms import SharedBatchNorm, keeps_statistics_apart, share_statistics

WORLD = 2
SECONDS = 240
LONG = {"teacher": {"epochs": 30}, "checkpoint_seconds": 1e9}
# the command line, but for the export, which takes longer than all else and is the main process's alone
COMMAND = """
import sys, pytest
sys.path.insert(0, {tests!r})
import small_runs
from understudy import cli
small_runs.without_export(pytest.MonkeyPatch())
cli.main()
"""


class Together:
    """The processes that a launcher would start, and what they print."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self.processes = processes

    def end(self) -> tuple[list[int], list[str], list[str]]:
        """Wait for all; return their exit codes, what the main one said, and what the others said."""
        said = [process.communicate(timeout=SECONDS) for process in self.processes]
        main, *others = [[*out.splitlines(), *errors.splitlines()] for out, errors in said]
        return [process.returncode for process in self.processes], main, [line for lines in others for line in lines]

    def send(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)


Begin = Callable[..., Together]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Return a function that starts a command line in two processes, as torchrun does; none outlives the test."""
    begun: list[subprocess.Popen[str]] = []

    def start(*arguments: object, program: str = COMMAND) -> Together:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-c", program.format(tests=str(Path(__file__).parent)), *map(str, arguments)]
        shared = {"WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started = []
        for rank in range(WORLD):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank, "GLOO_SOCKET_IFNAME": "lo"}
            surroundings = {**os.environ, **{key: str(value) for key, value in own.items()}}
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, encoding="utf-8", env=surroundings))
        begun.extend(started)
        return Together(started)

    yield start
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stripes(tmp_path_factory.mktemp("data") / "photos", side=16)


def same_weights(one: Path, two: Path, *, atol: float = 1e-4) -> None:
    """Compare two files of weights, running statistics included."""
    expected, found = load_file(one), load_file(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=atol, msg=lambda text: f"{name}: {text}")  # noqa: B023


def has_logged(run: Path, text: str) -> bool:
    return (run / "log.txt").exists() and text in (run / "log.txt").read_text()


@pytest.mark.slow
def test_two_processes_distill_what_one_does(photos: Path, begin: Begin, tmp_path: Path) -> None:
    run = tmp_path / "two"
    codes, said, others = begin("distill", *words(photos), "--out", run).end()
    assert (codes, others) == ([0, 0], []), said
    computed = records.load(run).outputs
    shutil.rmtree(os.environ["UNDERSTUDY_CACHE"] + "/outputs")
    with pytest.MonkeyPatch.context() as patch:
        small_runs.without_export(patch)
        one = small_runs.distilled(photos, tmp_path / "one")
    two = records.load(run)
    assert (two.status, list(two.stages)) == ("done", STAGES)
    assert two.model_dump().keys() == one.record.model_dump().keys()
    assert list(two.models) == list(one.record.models)
    for name, model in one.record.models.items():
        same_weights(one.folder / model.weights, run / two.models[name].weights)
        assert two.models[name].initial == model.initial
        assert two.models[name].best_epoch == model.best_epoch
        for here, there in zip(two.models[name].epochs, model.epochs, strict=True):
            assert here.train_loss == pytest.approx(there.train_loss, abs=1e-4)
            assert here.train_accuracy == pytest.approx(there.train_accuracy, abs=0.02)
    assert two.verdict is not None
    assert two.verdict.outcome == one.verdict.outcome
    assert [file.name for file in run.glob("*.html")] == ["report.html"]
    assert computed is not None
    assert one.record.outputs is not None
    # all answers, though each process computed its share
    assert computed.computed == one.record.outputs.computed == computed.images * computed.views


@pytest.mark.slow
def test_two_processes_train_a_teacher_with_batch_normalisation(photos: Path, begin: Begin, tmp_path: Path) -> None:
    """Its statistics are those of the whole batch, as in one process."""
    over = {"teacher": {"model": "cnn3", "epochs": 2}, "train": {"lr": 1e-3}}
    run = tmp_path / "two"
    codes, said, others = begin("train", *words(photos, **over), "--out", run).end()
    assert (codes, others) == ([0, 0], []), said
    one = api.run(small_runs.tiny(photos, **over), tmp_path / "one", kind="train")
    two = records.load(run)
    assert (two.kind, two.status, list(two.stages)) == ("train", "done", list(one.record.stages))
    same_weights(tmp_path / "one/teacher/model.safetensors", run / "teacher/model.safetensors", atol=1e-3)
    assert not has_logged(run, "normalises in a way of its own")
    assert not list(run.rglob("checkpoint-*"))


@pytest.mark.slow
def test_stopped_in_all_processes_and_resumed_by_two_or_one(photos: Path, begin: Begin, tmp_path: Path) -> None:
    run = tmp_path / "two"
    started = begin("train", *words(photos, **LONG), "--out", run)
    end = time.monotonic() + SECONDS
    while not has_logged(run, "teacher: started"):
        assert time.monotonic() < end
        assert started.processes[0].poll() is None, started.end()
        time.sleep(0.01)
    started.send(signal.SIGTERM)
    codes, said, others = started.end()
    assert (codes, others) == ([130, 130], [])
    assert said[-2:] == [
        "Stopping soon.",
        f"Stopped; all that was done is kept. Go on with: understudy resume {run}",
    ]
    assert records.load(run).stages == {}
    assert len(list(run.glob("teacher/checkpoint-*.safetensors"))) == 1
    copy = shutil.copytree(run, tmp_path / "one")
    codes, said, others = begin("resume", run).end()
    assert (codes, others) == ([0, 0], []), said
    api.resume(copy)
    assert [records.load(folder).status for folder in (run, copy)] == ["done", "done"]
    # both go on from one checkpoint; rounding has many epochs to grow, so answers are compared, not weights
    here, there = (records.load(folder).models["teacher"] for folder in (run, copy))
    assert here.initial == there.initial
    assert len(here.epochs) == len(there.epochs) == 30
    assert here.epochs[0].train_loss == pytest.approx(there.epochs[0].train_loss, abs=1e-3)
    assert here.val is not None
    assert there.val is not None
    assert here.val.accuracy == pytest.approx(there.val.accuracy, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({"data": {"source": "nowhere"}}, "nowhere"),
        ({"train": {"lr": 1e30}}, "is not a number"),
    ],
    ids=["before", "in the middle"],
)
def test_an_error_is_told_once_and_ends_all(
    over: dict[str, dict[str, object]], sentence: str, photos: Path, begin: Begin, tmp_path: Path
) -> None:
    source = over.get("data", {}).get("source", photos)
    rest = {key: value for key, value in over.items() if key != "data"}
    codes, said, others = begin("train", *words(str(source), **rest), "--out", tmp_path / "run").end()
    assert (codes, others) == ([1, 1], [])
    errors = [line for line in said if line.startswith("Error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert said[-1] == errors[0]


def test_other_ways_to_spread_a_training_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"DeepSpeed is not offered\. Start with accelerate launch --multi_gpu"):
        engine.join()


def test_one_process_agrees_with_itself() -> None:
    alone = engine.Engine(threads=1)
    assert (alone.shard, alone.is_alone, alone.is_main) == ((0, 1), True, True)
    values = torch.tensor([1.0, 2.0])
    assert alone.total(values) is values
    assert [alone.any(flag) for flag in (True, False)] == [True, False]
    assert alone.from_main("what it says") == "what it says"
    network = nn.Sequential(nn.BatchNorm2d(3))
    assert alone.wrap(network) is network
    alone.share_statistics(network)
    assert type(network[0]) is nn.BatchNorm2d


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (6, 4)), (nn.BatchNorm2d, (6, 4, 3, 2))])
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}])
def test_shared_statistics_of_one_process_are_torchs(
    kind: type[nn.BatchNorm1d],
    shape: tuple[int, ...],
    settings: dict[str, bool | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)  # of one process: the sum is its own
    torch.manual_seed(0)
    plain = nn.Sequential(kind(4, **settings))
    shared = nn.Sequential(kind(4, **settings))
    shared.load_state_dict(plain.state_dict())
    share_statistics(shared, torch.device("cpu"))
    assert isinstance(shared[0], SharedBatchNorm)
    for mode in (True, True, False):
        images = 3 * torch.randn(shape) + 5
        here, there = images.clone().requires_grad_(), images.clone().requires_grad_()
        answers, expected = shared.train(mode)(here), plain.train(mode)(there)
        torch.testing.assert_close(answers, expected)
        (answers**3).sum().backward()
        (expected**3).sum().backward()
        torch.testing.assert_close(here.grad, there.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shared.state_dict(), plain.state_dict())


def test_batch_normalisation_of_others_is_left_alone() -> None:
    class Own(nn.BatchNorm2d):
        """May do more than torch's."""

    network = nn.Sequential(nn.BatchNorm2d(3), Own(3))
    weight = network[0].weight
    share_statistics(network, torch.device("cpu"))
    assert network[0].weight is weight
    assert type(network[1]) is Own
    assert keeps_statistics_apart(network)
    assert not keeps_statistics_apart(network[:1])


def test_only_the_main_process_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["understudy", "distill", "--set", "nonsense=1"])
    for rank, lines in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        assert len(capsys.readouterr().err.splitlines()) == lines
