"""A run that is killed at any moment ends, once resumed, with the weights of a run that was left alone."""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import small_runs
from small_runs import STAGES, stripes, tiny, weights, words, work_done
from understudy import api, checkpoint, cli
from understudy import record as records
from understudy.errors import RunError

# Long enough to be caught in the middle; a checkpoint after every step.
LONG = {"teacher": {"epochs": 12}, "train": {"epochs": 12}, "checkpoint_seconds": 0}
SECONDS = 120


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stripes(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of a run that was left alone and wrote no checkpoint before the end of a training."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return weights(small_runs.distilled(photos, folder, **{**LONG, "checkpoint_seconds": 1e9}).folder)


@pytest.fixture
def begin() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts a command line in another process; none outlives the test."""
    begun: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "understudy.cli", *map(str, arguments)]
        pipe = subprocess.PIPE
        begun.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=pipe, encoding="utf-8"))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


Begin = Callable[..., "subprocess.Popen[str]"]


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Wait until a process has come to some point."""
    end = time.monotonic() + SECONDS
    while not reached():
        if process.poll() is not None:
            pytest.fail(f"ended before it could be caught: {process.returncode} {process.communicate()[1]}")
        if time.monotonic() > end:
            pytest.fail("never came to the point where it was to be caught")
        time.sleep(0.001)


def has_logged(run: Path, text: str) -> bool:
    return (run / "log.txt").exists() and text in (run / "log.txt").read_text()


def in_training(run: Path, name: str) -> bool:
    """Tell whether training `name` is in the middle of its second epoch, or further."""
    for path in (run / name).glob("checkpoint-*.safetensors"):
        found = checkpoint.load(path)
        if found is not None and (found[1]["epoch"], found[1]["step"]) >= (1, 2):
            return True
    return False


def at(point: str, run: Path) -> Callable[[], bool]:
    if point == "the start":
        return lambda: (run / "record.json").exists()
    if point in ("evaluate", "export"):
        return lambda: has_logged(run, f"{point}: started")
    return lambda: in_training(run, point)


def killed(process: subprocess.Popen[str], point: str, run: Path) -> records.Record:
    wait_for(process, at(point, run))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"ended before it could be killed in {point}"
    record = records.load(run)
    assert record.status == "running"
    assert point not in record.stages
    return record


def check_gone_on(before: records.Record, run: Path, expected: dict[str, str]) -> None:
    after = records.load(run)
    assert (after.status, after.failure) == ("done", None)
    assert list(after.stages) == STAGES
    assert {name: work_done(after)[name] for name in before.stages} == work_done(before)
    assert weights(run) == expected
    assert not list(run.rglob("checkpoint-*"))


@pytest.mark.slow
def test_killed_again_and_again(photos: Path, undisturbed: dict[str, str], begin: Begin, tmp_path: Path) -> None:
    run = tmp_path / "run"
    record = killed(begin("distill", *words(photos, **LONG), "--out", run), "the start", run)
    assert list(record.stages) == []
    for point in ("teacher", "baseline-0", "student-1", "evaluate", "export"):
        before, record = record, killed(begin("resume", run), point, run)
        assert list(record.stages) == STAGES[: STAGES.index(point)]
        assert {name: work_done(record)[name] for name in before.stages} == work_done(before)
    api.resume(run)
    check_gone_on(record, run, undisturbed)


@pytest.mark.slow
def test_asked_to_stop_and_resumed(photos: Path, undisturbed: dict[str, str], begin: Begin, tmp_path: Path) -> None:
    """By `kill`, and then by Ctrl-C. Nothing but the wish to stop writes a checkpoint here."""
    run = tmp_path / "run"
    over = {**LONG, "checkpoint_seconds": 1e9}
    command = ["distill", *words(photos, **over), "--out", run]
    for number, name in ((signal.SIGTERM, "baseline-0"), (signal.SIGINT, "student-1")):
        process = begin(*command)
        wait_for(process, lambda: has_logged(run, f"{name}: started"))  # noqa: B023 - called before the next turn
        process.send_signal(number)
        said = process.communicate(timeout=SECONDS)[1].splitlines()
        assert process.returncode == 130
        assert said == [
            "Stopping after this step; press Ctrl-C again to stop at once.",
            f"Stopped; all that was done is kept. Go on with: understudy resume {run}",
        ]
        before = records.load(run)
        assert (before.status, list(before.stages)) == ("failed", STAGES[: STAGES.index(name)])
        assert len(list((run / name).glob("checkpoint-*.safetensors"))) == 1
        command = ["resume", run]
    api.resume(run)
    check_gone_on(before, run, undisturbed)


@pytest.mark.slow
def test_a_folder_that_another_process_works_on_is_refused(
    photos: Path,
    begin: Begin,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    owner = begin("distill", *words(photos, **LONG), "--out", run)
    wait_for(owner, lambda: in_training(run, "teacher"))
    owner.send_signal(signal.SIGSTOP)
    before = small_runs.snapshot(run)
    with pytest.raises(RunError, match=f"Another process is working on {run}"):
        api.run(tiny(photos, **LONG), run)
    monkeypatch.setattr(sys, "argv", ["understudy", "resume", str(run)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        f"Error: Another process is working on {run}. Wait for it to end, or choose another folder with --out."
    ]
    assert small_runs.snapshot(run) == before
    assert owner.poll() is None


class Death(BaseException):
    """The process ends here, as far as files can tell."""


class Mortal:
    """Dies when it is about to put file number `last` in its place, and writes nothing more."""

    def __init__(self, last: int, patch: pytest.MonkeyPatch) -> None:
        self.last = last
        self.count = 0
        self.died = False
        self._replace = Path.replace
        patch.setattr(Path, "replace", lambda path, target: self.replace(path, target))

    def replace(self, path: Path, target: Path) -> Path:
        if self.count == self.last:
            self.died = True
            raise Death
        self.count += 1
        return self._replace(path, target)


@pytest.mark.slow
def test_wherever_it_dies_it_can_be_resumed(photos: Path, tmp_path: Path) -> None:
    """Before every file that a run writes, one after the other, until a run has fewer to write."""
    over = {"seeds": [0]}
    whole = small_runs.distilled(photos, tmp_path / "whole", **over)
    for last in itertools.count():
        run = tmp_path / f"run-{last}"
        with pytest.MonkeyPatch.context() as patch:
            mortal = Mortal(last, patch)
            with contextlib.suppress(Death):
                small_runs.distilled(photos, run, **over)
        if not mortal.died:  # what it wrote varies: the cache may hold some of it
            break
        # the same command, since there may be no record to resume yet
        result = small_runs.distilled(photos, run, **over)
        assert list(result.record.stages) == list(whole.record.stages), last
        assert weights(run) == weights(whole.folder), last
        assert result.verdict == whole.verdict
        assert (run / "export/student.onnx").is_file()
        assert result.report.is_file()
    assert last > 20
