"""The cache of a real run: that a look at what it keeps notices damage, and what the commands tell of it."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cachefiles import cache, store
from small_runs import snapshot, stripes, tiny
from understudy import cli, housekeeping
from understudy.cachefolder import entries
from understudy.errors import RunError
from understudy.pipeline import Run, teaching, trainings
from understudy.pipeline.materials import gather

__all__ = ["cache"]  # a fixture


# --- with a real run ---


@dataclass(frozen=True)
class Kept:
    """A run whose teacher is ready, the cache that it filled, and its outputs in there."""

    run: Path
    cache: Path

    @property
    def outputs(self) -> Path:
        (found,) = (self.cache / "outputs").iterdir()
        return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    place = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNDERSTUDY_CACHE", str(place / "cache"))
        with Run.opened(place / "run", tiny(stripes(place / "photos"), teacher={"epochs": 2})) as run:
            materials = gather(run)
            trainings.teacher(run, materials)
            teaching.prepare(run, materials)
    return Kept(place / "run", place / "cache")


@pytest.fixture
def kept(finished: Kept, cache: Path, tmp_path: Path) -> Kept:
    """Return a copy of the cache, so that a test may do harm to it; the run is only read."""
    import shutil

    shutil.copytree(finished.cache, cache)
    return Kept(finished.run, cache)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_what_a_run_keeps_is_sound_and_is_answered_again(kept: Kept) -> None:
    before = snapshot(kept.run)
    for checked in (housekeeping.verify(), housekeeping.verify_run(kept.run)):
        assert (checked.problems, checked.notes) == ([], [])
        assert checked.answers == 2 * 80
    assert snapshot(kept.run) == before


def test_a_flipped_bit_is_noticed_and_its_view_alone_removed(kept: Kept) -> None:
    torn = kept.outputs / "view-00001.rows"
    flip(torn, 100)
    for checked in (housekeeping.verify(), housekeeping.verify_run(kept.run)):
        assert [problem.path for problem in checked.problems] == [torn]
        assert "1 of 2 blocks of view 2 fail their checksums" in checked.problems[0].text
    assert housekeeping.repair(checked) == [torn]
    assert [path.name for path in sorted(kept.outputs.iterdir())] == ["card.json", "view-00000.rows"]
    assert housekeeping.verify().problems == []


def test_a_view_that_is_not_full_yet_is_no_damage(kept: Kept) -> None:
    os.truncate(kept.outputs / "view-00000.rows", 0)
    checked = housekeeping.verify()
    assert checked.problems == []
    assert checked.answers == 80


def test_a_damaged_card_is_noticed(kept: Kept) -> None:
    card = kept.outputs / "card.json"
    said = json.loads(card.read_text())
    card.write_text(json.dumps({**said, "rows": 79}))
    assert [problem.path for problem in housekeeping.verify().problems] == [kept.outputs]


def test_answers_that_the_teacher_does_not_give_are_noticed(kept: Kept) -> None:
    """With checksums that are right: as if another teacher's outputs had come under this one's name."""
    from understudy.data import kept as folders

    folder = folders.read(kept.outputs)
    assert folder is not None
    file = folder.view(0)
    rows = file.read(0)
    assert rows is not None
    wrong = rows.copy()
    wrong["logits"][3, 1] += 1
    file.write(0, wrong)
    file.close()
    for checked in (housekeeping.verify(chance=random.Random(0)), housekeeping.verify_run(kept.run)):
        assert [problem.path for problem in checked.problems] == [file.path]
        assert "the teacher answers 1 of 64 images otherwise" in checked.problems[0].text


def test_what_cannot_be_answered_again_is_told(kept: Kept, tmp_path: Path) -> None:
    card = kept.outputs / "card.json"
    said = json.loads(card.read_text())
    for change, reason in (
        ({"run": str(tmp_path / "gone")}, "the run of its teacher is gone"),
        ({"weights": "0" * 32}, "holds another teacher now"),
        ({"store": str(tmp_path / "gone")}, "its decoded images are gone"),
    ):
        card.write_text(json.dumps({**said, **change}))
        checked = housekeeping.verify()
        assert (checked.problems, checked.answers) == ([], 0)
        assert [reason in note for note in checked.notes] == [True]


def test_only_the_user_lets_a_look_import_code(kept: Kept, tmp_path: Path) -> None:
    import shutil

    run = Path(shutil.copytree(kept.run, tmp_path / "run"))
    record = json.loads((run / "record.json").read_text())
    record["config"]["student"]["model"] = "danger:net"
    (run / "record.json").write_text(json.dumps(record))
    card = kept.outputs / "card.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "run": str(run)}))
    (note,) = housekeeping.verify().notes
    assert f"it would import code; understudy cache verify {run} does" in note


def test_a_run_without_outputs_and_a_folder_that_is_no_run(kept: Kept, tmp_path: Path) -> None:
    housekeeping.repair(housekeeping.Checked(problems=[housekeeping.Problem(kept.outputs, "")]))
    checked = housekeeping.verify_run(kept.run)
    assert checked.notes == [f"no outputs of the teacher of {kept.run} are kept"]
    assert checked.entries == 1
    with pytest.raises(RunError, match="is not a run folder"):
        housekeeping.verify_run(tmp_path)


# --- the commands ---


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command line in this process: exit code, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["understudy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


Call = Callable[..., tuple[int, str, str]]


def test_ls_lists_what_is_kept(kept: Kept, call: Call) -> None:
    code, out, err = call("cache", "ls")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["Kind", "What"]
    (outputs,) = [line for line in lines if line.startswith("outputs")]
    assert "mnist_small on photos" in outputs
    assert outputs.split()[4:6] == ["80", "2"]
    assert any(line.startswith("stores") and "10 x 10 pixels, grey" in line for line in lines)
    assert lines[-1].endswith(f"of at most 20.0 GB in {kept.cache}")


def test_ls_as_json_adds_up(kept: Kept, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE_LIMIT", "1GB")
    code, out, _ = call("cache", "ls", "--json")
    told = json.loads(out)
    assert (code, told["folder"], told["limit"]) == (0, str(kept.cache), 10**9)
    assert told["bytes"] == sum(entry["nbytes"] for entry in told["entries"])
    assert told["bytes"] == sum(
        path.stat().st_size for path in kept.cache.rglob("*") if path.is_file() and path.suffix != ".lock"
    )
    (outputs,) = [entry for entry in told["entries"] if entry["kind"] == "outputs"]
    assert (outputs["images"], outputs["views"], outputs["path"]) == (80, 2, str(kept.outputs))


def test_what_a_card_says_cannot_steer_the_terminal(kept: Kept, call: Call) -> None:
    card = kept.outputs / "card.json"
    said = json.loads(card.read_text())
    card.write_text(json.dumps({**said, "teacher": "\x1b[2Jnet [red]", "data": "\u202eX", "run": "\x1b]0;x\x07"}))
    for command in ("ls", "verify"):
        code, out, _ = call("cache", command)
        assert code == 0
        assert not {"\x1b", "\u202e", "\x07"} & set(out)
    assert "net [red]" in call("cache", "ls")[1]


def test_verify_tells_repairs_and_is_content(kept: Kept, call: Call) -> None:
    code, out, err = call("cache", "verify")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].endswith("160 answers of teachers computed again.")
    flip(kept.outputs / "view-00000.rows", 50)
    code, out, err = call("cache", "verify")
    assert code == 1
    assert err == "Error: What is kept is damaged in 1 places. Remove them with understudy cache verify --repair.\n"
    assert "fail their checksums" in out
    code, out, err = call("cache", "verify", kept.run, "--repair")
    assert (code, err) == (0, "")
    assert f"removed {kept.outputs / 'view-00000.rows'}" in out
    assert call("cache", "verify")[0] == 0


def test_verify_of_no_run_is_one_sentence(cache: Path, call: Call, tmp_path: Path) -> None:
    code, _, err = call("cache", "verify", tmp_path)
    assert code == 1
    assert err == f"Error: {tmp_path} is not a run folder: it holds no record.json.\n"


def test_prune_tells_what_was_freed(cache: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for age in (1, 4, 20):
        store(cache, f"used-{age}", age=age, side=100)
    assert call("cache", "prune") == (0, "Removed 0 entries, 0 B; 300.2 KB are left.\n", "")
    assert call("cache", "prune", "--older-than", 10)[1] == "Removed 1 entries, 100.1 KB; 200.1 KB are left.\n"
    assert call("cache", "prune", "--max-size", "150KB")[1] == "Removed 1 entries, 100.1 KB; 100.1 KB are left.\n"
    monkeypatch.setenv("UNDERSTUDY_CACHE_LIMIT", "1KB")
    assert call("cache", "prune")[1] == "Removed 1 entries, 100.1 KB; 0 B are left.\n"
    store(cache, "last")
    assert call("cache", "prune", "--all")[1].endswith("; 0 B are left.\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max-size", "big"], "Error: --max-size takes a size such as 20GB or 500MB, not 'big'."),
        (["--older-than", "-1"], "Error: --older-than takes days, 0 or more, not -1."),
        (["--older-than", "nan"], "Error: --older-than takes days, 0 or more, not nan."),
    ],
)
def test_wrong_words_are_one_sentence_and_remove_nothing(
    words: list[str], sentence: str, cache: Path, call: Call
) -> None:
    store(cache, "photos")
    assert call("cache", "prune", *words) == (1, "", f"{sentence}\n")
    assert len(entries()) == 1


@pytest.mark.parametrize("command", ["ls", "verify", "prune"])
def test_every_command_explains_itself(command: str, call: Call) -> None:
    code, out, err = call("cache", command, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: understudy cache {command}" in out
