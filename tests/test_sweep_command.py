"""The command `sweep`: several values after an option, what becomes of them, and a whole sweep."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import small_runs
from understudy import cli, sweeping
from understudy import record as records
from understudy.config import RunConfig
from understudy.sweeping import spread


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("sweep D --alpha 0 0.25 1", "sweep D --alpha=0 --alpha=0.25 --alpha=1"),
        ("sweep D --alpha 0 .5 --temperature 1 1e1", "sweep D --alpha=0 --alpha=.5 --temperature=1 --temperature=1e1"),
        ("sweep --alpha 0 .5 D --seeds 3", "sweep --alpha=0 --alpha=.5 D --seeds 3"),
        ("sweep D --alpha 0 --alpha 1", "sweep D --alpha=0 --alpha=1"),
        ("sweep D --alpha=0 --alpha 1 2", "sweep D --alpha=0 --alpha=1 --alpha=2"),
        ("sweep D --alpha 0,0.5 1", "sweep D --alpha=0,0.5 --alpha=1"),
        ("sweep D --alpha -0.5 1 --open", "sweep D --alpha=-0.5 --alpha=1 --open"),
        ("sweep D --student a m:f --lr 1 2 --open", "sweep D --student=a --student=m:f --lr=1 --lr=2 --open"),
        ("sweep --student a b digits", "sweep --student=a --student=b digits"),
        ("sweep --student digits b", "sweep --student=digits --student=b"),
        ("sweep D --alpha", "sweep D --alpha"),
        ("sweep D --alpha --open", "sweep D --alpha --open"),
        ("sweep D --alpha high", "sweep D --alpha=high"),
        ("sweep D --alpha 0 -- 1", "sweep D --alpha=0 -- 1"),
        ("distill D --alpha 0 1", "distill D --alpha 0 1"),
        ("", ""),
    ],
)
def test_values_may_follow_one_option(given: str, meant: str) -> None:
    assert spread(given.split()) == meant.split()


def test_a_folder_ends_a_list_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert spread(["sweep", "--student", "a", "b", "photos"]) == ["sweep", "--student=a", "--student=b", "photos"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Catch the configuration that a command line asks for, instead of running it."""
    found: list[RunConfig] = []
    monkeypatch.setattr(cli, "_run", lambda config, *rest: found.append(config))
    return found


def call(words: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["understudy", *words.split(), *more])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_several_values_are_varied(asked: list[RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    words = "sweep digits --alpha 0 .5,1 --temperature 2 8 --lr 1e-3 1e-2 --student mnist_small cnn3 --trials 9"
    assert call(f"{words} --workers 3 --threads 1 --seeds 2 --teacher mnist_large", monkeypatch) == 0
    (config,) = asked
    sweep = config.sweep
    assert sweep is not None
    assert (sweep.alpha, sweep.temperature, sweep.lr) == ((0, 0.5, 1), (2, 8), (1e-3, 1e-2))
    assert (sweep.student, sweep.method, sweep.trials, sweep.workers) == (("mnist_small", "cnn3"), (), 9, 3)
    assert (config.student.model, config.train.lr, config.threads) == ("mnist_small", 1e-3, 1)
    assert (config.seeds, config.teacher.model, config.data.source) == ((0, 1), "mnist_large", "digits")


def test_one_value_is_a_setting_like_any(asked: list[RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("sweep digits --student mnist_small --lr 0.01 --method kd --ray local", monkeypatch) == 0
    (config,) = asked
    assert config.sweep is not None
    assert (config.student.model, config.train.lr, config.distill.method) == ("mnist_small", 0.01, "kd")
    assert (config.sweep.student, config.sweep.lr, config.sweep.method) == ((), (), ())
    assert len(config.sweep.alpha) == len(config.sweep.temperature) == 5
    assert config.sweep.ray == "local"
    assert config.sweep.stacked == "auto"


@pytest.mark.parametrize("word", ["auto", "never", "always"])
def test_whether_cells_are_stacked_can_be_said(
    word: str, asked: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(f"sweep digits --stacked {word}", monkeypatch) == 0
    (config,) = asked
    assert config.sweep is not None
    assert config.sweep.stacked == word


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("sweep digits --alpha 0 2", 1, "'sweep.alpha.1': input should be less than or equal to 1"),
        ("sweep digits --alpha 0 half", 2, "unexpected extra argument"),
        ("sweep digits --alpha half", 1, "'sweep.alpha.0': input should be a valid number"),
        ("sweep digits --temperature -1 2", 1, "'sweep.temperature.0': input should be greater than 0"),
        ("sweep --alpha 0 1", 1, "No data given"),
        ("sweep digits --alpha", 2, "requires an argument"),
        ("sweep digits --workers 0", 1, "'sweep.workers'"),
        ("sweep digits --stacked often", 1, "'sweep.stacked': input should be 'auto', 'never' or 'always'"),
        ("sweep digits --stacked always --ray local", 1, "students are stacked in one process"),
    ],
)
def test_wrong_words_end_as_a_sentence(
    words: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(words, monkeypatch) == code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_sweep_prints_its_plan_its_table_and_its_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_runs.without_export(monkeypatch)
    monkeypatch.chdir(tmp_path)
    photos = small_runs.stripes(tmp_path / "photos")
    words = "sweep --alpha 0 0.5 --temperature 1 4 --workers 1 --out run"
    assert call(words, monkeypatch, *small_runs.words(photos)) == 0
    text = capsys.readouterr().out.replace("\u00a0", " ")
    assert "4 cells, 6 trainings of students, one at a time" in text
    assert "sweep: 100 %" in text
    assert "Chosen on validation: alpha 0.5, T" in text
    found = records.load(tmp_path / "run")
    assert found.verdict is not None
    assert found.verdict.outcome in text
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The search" in page
    shutil.rmtree(tmp_path / "run" / "export")
    assert call("resume run", monkeypatch) == 0
    assert records.load(tmp_path / "run").sweep == found.sweep


def test_the_command_explains_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("sweep --help", monkeypatch) == 0
    text = capsys.readouterr().out
    for option in (*sweeping._NUMBERS, *sweeping._NAMES, "--trials", "--workers", "--ray", "--stacked", "--seeds"):
        assert option in text


def test_nothing_here_is_left_to_any(asked: list[Any]) -> None:
    """The command and the configuration name the same settings."""
    from understudy.config import VARIED

    assert {word.removeprefix("--") for word in (*sweeping._NUMBERS, *sweeping._NAMES)} == set(VARIED)
