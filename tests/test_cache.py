"""The cache folder: what it holds, what goes first, and that a look at it notices damage."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from cachefiles import DAY, aged, cache, small, store
from small_runs import snapshot, stripes, tiny
from understudy import api, cachefolder, housekeeping
from understudy.cachefolder import DEFAULT_LIMIT, Entry, entries, make_room, parse_size, size_text
from understudy.config import DataConfig
from understudy.data.frames import StoredFrames
from understudy.data.store import open_store
from understudy.errors import ConfigError

__all__ = ["cache"]  # a fixture


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
