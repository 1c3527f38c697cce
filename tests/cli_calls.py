"""How tests call the command line in their own process; imported by the tests of the command line."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from understudy import api, cli
from understudy.config import RunConfig
from understudy.errors import UnderstudyError

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
Say = Callable[..., str]


def caller(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Return a function that runs a command line in this process."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["understudy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Ended(ended.value.code if isinstance(ended.value.code, int) else -1, said.out, said.err)

    return run


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    return caller(capsys, monkeypatch)


@pytest.fixture
def end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command line in this process: exit code, output, errors."""
    call = caller(capsys, monkeypatch)

    def run(*arguments: object) -> tuple[int, str, str]:
        ended = call(*arguments)
        return ended.code, ended.out, ended.err

    return run


@pytest.fixture
def say(end: Callable[..., tuple[int, str, str]]) -> Say:
    """Return a function that runs a command line that has to succeed, and returns what it printed."""

    def run(*arguments: object) -> str:
        code, out, err = end(*arguments)
        assert (code, err) == (0, "")
        return out

    return run


def words(text: str) -> str:
    """Undo the breaking of lines."""
    return " ".join(text.split())


@contextmanager
def signals_given_back() -> Iterator[None]:
    """Give the signals back that a run takes."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep default run folders out of the repository."""
    monkeypatch.chdir(tmp_path)
    with signals_given_back():
        yield


def folders(root: Path, *names: str) -> Path:
    """Make empty folders, and return the one that they lie in."""
    for name in names:
        (root / name).mkdir(parents=True)
    return root


def spoilt(photos: Path, place: Path, count: int) -> Path:
    """Copy photos, and make some of them unreadable."""
    shutil.copytree(photos, place)
    for number in range(count):
        (place / f"train/cat/{number:03d}.png").write_bytes(b"not an image")
    return place


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Carry no runs out; return the list where what was asked for comes."""
    found: list[RunConfig] = []

    def run(given: RunConfig, *rest: object, **options: object) -> None:
        found.append(given)
        raise UnderstudyError("Enough.")

    monkeypatch.setattr(api, "run", run)
    return found
