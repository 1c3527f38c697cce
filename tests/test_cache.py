"""The cache folder: what it holds, what goes first, what is told of it, and that a look at it notices damage."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from small_runs import snapshot, stripes, tiny
from understudy import api, cachefolder, cli, housekeeping
from understudy.cachefolder import DEFAULT_LIMIT, Entry, entries, make_room, parse_size, size_text
from understudy.config import DataConfig
from understudy.data.frames import StoredFrames
from understudy.data.store import open_store
from understudy.errors import ConfigError, RunError
from understudy.pipeline import Run, teaching, trainings
from understudy.pipeline.materials import gather

DAY = 86400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, without a limit that the machine may have set."""
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNDERSTUDY_CACHE_LIMIT", raising=False)
    return tmp_path / "cache"


def store(cache: Path, name: str, *, side: int = 10, images: int = 10, age: float = 0.0) -> Path:
    """Put decoded grey images into a cache, last used `age` days ago."""
    folder = cache / "stores" / name
    folder.mkdir(parents=True)
    (folder / "frames.u8").write_bytes(bytes(images * side * side))
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"format": "understudy-store/1", "rows": images, "skipped": {}}))
    return aged(manifest, age).parent


def small(cache: Path, kind: str, name: str, *, nbytes: int = 20, age: float = 0.0) -> Path:
    path = cache / kind / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps("x" * (nbytes - 2)))
    return aged(path, age)


def aged(path: Path, days: float) -> Path:
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path


def names(found: list[Entry]) -> list[str]:
    return [entry.path.stem for entry in found]


# --- sizes ---


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("20GB", 20 * 10**9),
        ("500 mb", 5 * 10**8),
        ("1.5g", 15 * 10**8),
        ("0", 0),
        ("1000", 1000),
        (" 2TB ", 2 * 10**12),
    ],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_size(text, "It") == nbytes


@pytest.mark.parametrize(
    "text", ["", "much", "-1GB", "1e9", "nan", "inf", "1 PB", "GB", "1GB2", "1,5GB", "٣GB", "9" * 400]
)
def test_nonsense_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--max-size takes a size such as 20GB or 500MB, not "):
        parse_size(text, "--max-size")


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (2.5e7, "25.0 MB"), (2e12, "2,000.0 GB")]
)
def test_sizes_are_told(nbytes: float, text: str) -> None:
    assert size_text(nbytes) == text


def test_the_limit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cachefolder.limit() == DEFAULT_LIMIT == 20 * 10**9
    monkeypatch.setenv("UNDERSTUDY_CACHE_LIMIT", "3MB")
    assert cachefolder.limit() == 3_000_000
    monkeypatch.setenv("UNDERSTUDY_CACHE_LIMIT", "some")
    with pytest.raises(ConfigError, match="UNDERSTUDY_CACHE_LIMIT"):
        cachefolder.limit()


# --- what there is ---


def test_the_least_recently_used_comes_first(cache: Path) -> None:
    store(cache, "new", age=1)
    store(cache, "old", age=9)
    small(cache, "listings", "middle", age=5)
    found = entries()
    assert names(found) == ["old", "middle", "new"]
    assert [entry.kind for entry in found] == ["stores", "listings", "stores"]
    assert found[0].nbytes == sum(path.stat().st_size for path in (cache / "stores/old").iterdir())
    assert found[0].said["rows"] == 10
    assert found[0].used == pytest.approx(time.time() - 9 * DAY, abs=60)


def test_a_touch_makes_it_the_last_to_go(cache: Path) -> None:
    old = store(cache, "old", age=9)
    store(cache, "new", age=1)
    cachefolder.touch(old)
    assert names(entries()) == ["new", "old"]
    cachefolder.touch(cache / "stores" / "nowhere")
    cachefolder.touch(cache)
    assert not (cache / "stores" / "nowhere").exists()


def test_no_cache_holds_nothing(cache: Path) -> None:
    assert entries() == []
    assert make_room(10**15) == []
    assert not cache.exists()


def test_what_is_not_ours_is_neither_counted_nor_removed(cache: Path) -> None:
    for name in ("fault.txt", "datasets/mnist.gz", "stores/some.lock", "listings/notes.txt", "outputs/loose.txt"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("x" * 1000)
    before = snapshot(cache)
    assert entries() == []
    make_room(10**15)
    housekeeping.prune(everything=True)
    assert snapshot(cache) == before


def test_a_folder_without_a_card_is_as_old_as_its_newest_file(cache: Path) -> None:
    folder = cache / "outputs" / "torn"
    folder.mkdir(parents=True)
    aged(folder / "view-00000.rows", 0) if (folder / "view-00000.rows").write_bytes(b"x" * 50) else None
    store(cache, "middle", age=1)
    assert names(entries()) == ["middle", "torn"]
    assert entries()[1].said == {}


# --- making room ---


def test_room_is_made_by_what_was_not_used_for_the_longest_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age in range(1, 6):
        store(cache, f"used-{age}", age=age)
    each = entries()[0].nbytes
    monkeypatch.setenv("UNDERSTUDY_CACHE_LIMIT", str(5 * each))
    assert make_room(0) == []
    assert names(make_room(each + 1)) == ["used-5", "used-4"]
    assert names(entries()) == ["used-3", "used-2", "used-1"]
    assert make_room(2 * each) == []


def test_what_is_in_use_stays_even_beyond_the_limit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = store(cache, "mine", age=9)
    store(cache, "other", age=1)
    monkeypatch.setenv("UNDERSTUDY_CACHE_LIMIT", "10")
    assert names(make_room(10**9, in_use=[mine])) == ["other"]
    assert names(entries()) == ["mine"]


def test_numerics_make_no_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tiny, and a run that is made again chooses the same numerics as long as they are there."""
    small(cache, "numerics", "choice", age=30)
    small(cache, "listings", "files", age=20)
    small(cache, "examined", "images", age=10)
    monkeypatch.setenv("UNDERSTUDY_CACHE_LIMIT", "0")
    assert names(make_room(1)) == ["files", "images"]
    assert names(housekeeping.prune(everything=True)) == ["choice"]


def test_a_store_that_is_being_built_stays_and_one_that_was_given_up_goes(cache: Path) -> None:
    for name in ("alive", "dead"):
        building = cache / "stores" / f"{name}.building"
        building.mkdir(parents=True)
        (building / "frames.u8").write_bytes(bytes(1000))
    with FileLock(cache / "stores" / "alive.lock"):
        gone = cachefolder.evict(0)
    assert [entry.path.name for entry in gone] == ["dead.building"]
    assert [(entry.kind, entry.path.name) for entry in entries()] == [("unfinished", "alive.building")]


def test_decoded_images_make_room_and_count_as_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (DataConfig(source=str(stripes(tmp_path / name, seed=seed))) for seed, name in enumerate("ab"))
    found = open_store(first).frames
    assert isinstance(found, StoredFrames)
    mine = found.path.parent
    each = sum(entry.nbytes for entry in entries() if entry.path == mine)
    aged(mine / "manifest.json", 3)
    store(cache, "older", age=2)
    assert open_store(first).reused
    assert names(entries())[0] == "older"
    monkeypatch.setenv("UNDERSTUDY_CACHE_LIMIT", str(2 * each + 500))
    assert not open_store(second).reused
    assert "older" not in names(entries())
    assert open_store(first).reused


def test_a_limit_that_is_no_size_is_told_before_anything_long(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE_LIMIT", "a lot")
    with pytest.raises(ConfigError, match="UNDERSTUDY_CACHE_LIMIT"):
        api.run(tiny(stripes(tmp_path / "photos")), tmp_path / "run")
    assert not cache.exists()


# --- pruning ---


def test_prune_by_age_and_by_size(cache: Path) -> None:
    for age in (1, 4, 8, 20):
        store(cache, f"used-{age}", age=age)
    each = entries()[0].nbytes
    assert names(housekeeping.prune(older_than=10)) == ["used-20"]
    assert names(housekeeping.prune(older_than=5, max_bytes=each)) == ["used-8", "used-4"]
    assert names(entries()) == ["used-1"]
    assert housekeeping.prune() == []


# --- a look at what is kept ---


def test_sound_stores_of_either_kind(cache: Path) -> None:
    store(cache, "grey", side=7)
    folder = store(cache, "colour", side=1, images=4)
    (folder / "frames.u8").write_bytes(bytes(4 * 3 * 11 * 11))
    assert housekeeping.verify().problems == []
    assert {line.what for line in housekeeping.lines()} == {"7 x 7 pixels, grey", "11 x 11 pixels, colour"}


@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "no manifest", "manifest"])
def test_a_damaged_store_is_noticed_and_removed(damage: str, cache: Path) -> None:
    folder = store(cache, "photos")
    if damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text('{"rows": "ten"}')
    elif damage == "gone":
        (folder / "frames.u8").unlink()
    else:
        os.truncate(folder / "frames.u8", 999 if damage == "cut" else 1001)
    checked = housekeeping.verify()
    assert [problem.path for problem in checked.problems] == [folder]
    assert housekeeping.repair(checked) == [folder]
    assert entries() == []


def test_a_damaged_listing_is_noticed(cache: Path) -> None:
    path = small(cache, "listings", "files")
    path.write_text("{")
    checked = housekeeping.verify()
    assert [problem.path for problem in checked.problems] == [path]
    housekeeping.repair(checked)
    assert not path.exists()


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
