"""Teacher outputs where nothing can be written, where they exceed the memory, and where several fill them at once."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from imagefiles import ordinary_user
from kept_outputs import ALL, BLOCK, COUNT, LIGHT, Teacher, cache, close, opened, reader, shuffled, small_blocks, split
from understudy.data import outputs
from understudy.data.outputs import Viewed
from understudy.data.rowfile import RowFile
from understudy.errors import ConfigError, UnderstudyError

__all__ = ["cache", "small_blocks"]  # fixtures

# --- nothing can be written ---


def full_disk(self: RowFile, block: int, rows: np.ndarray) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_once_and_costs_the_teacher_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowFile, "write", full_disk)
    teacher, viewed, told = Teacher(), Viewed(split(), LIGHT, 0), []
    kept = opened(teacher, cache, viewed)
    kept.notice = told.append
    for view in (0, 1, 0):
        close(kept.view(view).rows(shuffled()).logits, teacher.directly(viewed, view)[shuffled()])
    assert kept.work.images == 3 * COUNT
    assert len(told) == 1
    assert "No space left" in told[0]
    assert told[0].endswith("the teacher runs again for every training.")


def test_nothing_is_prepared_that_cannot_be_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowFile, "write", full_disk)
    kept = opened(Teacher(), cache)
    kept.prepare(range(50))
    assert kept.work.images == COUNT


def test_a_folder_that_cannot_be_written() -> None:
    with ordinary_user() as place:
        closed = place / "closed"
        closed.mkdir()
        closed.chmod(0o500)
        teacher, viewed, told = Teacher(), Viewed(split(), LIGHT, 0), []
        kept = opened(teacher, closed / "cache", viewed)
        kept.notice = told.append
        kept.prepare(range(3))
        close(kept.view(2).rows(ALL).logits, teacher.directly(viewed, 2))
        assert len(told) == 1
        assert "Permission denied" in told[0]


def test_a_file_in_the_place_of_the_cache(cache: Path) -> None:
    cache.write_text("not a folder")
    teacher, viewed, told = Teacher(), Viewed(split(), LIGHT, 0), []
    kept = opened(teacher, cache, viewed)
    kept.notice = told.append
    close(kept.view(0).rows(ALL).logits, teacher.directly(viewed, 0))
    assert len(told) == 1


def test_room_is_made_but_not_of_what_is_in_use(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = opened(Teacher(), cache, identity={"weights": "old"})
    old.prepare([0])
    store = cache / "stores" / "images"
    store.mkdir(parents=True)
    (store / "frames.u8").write_bytes(bytes(5000))
    (store / "manifest.json").write_text("{}")
    os.utime(store / "manifest.json", (1, 1))
    os.utime(old.kept.path / "card.json", (2, 2))
    monkeypatch.setenv("UNDERSTUDY_CACHE_LIMIT", "1KB")
    kept = opened(Teacher(), cache)
    kept.in_use = (store,)
    kept.prepare(range(3))
    assert store.exists()
    assert not old.kept.path.exists()
    assert kept.missing(0) == kept.missing(2) == 0


def test_a_limit_that_is_no_size_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE_LIMIT", "a lot")
    with pytest.raises(ConfigError, match=r"UNDERSTUDY_CACHE_LIMIT takes a size such as 20GB or 500MB, not 'a lot'\."):
        opened(Teacher(), cache).view(0)


# --- larger than the memory ---


@pytest.fixture
def never_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_IN_MEMORY", 0)


@pytest.mark.usefixtures("never_in_memory")
@pytest.mark.parametrize("classes", [3, 1000])
def test_a_large_view_is_read_row_by_row(classes: int, cache: Path) -> None:
    teacher, viewed = Teacher(classes, gain=20.0), Viewed(split(), LIGHT, 0)
    kept = opened(teacher, cache, viewed, temperatures=(1.0,))
    found = kept.view(1).rows(shuffled()).logits
    if kept.packing.top is None:
        close(found, teacher.directly(viewed, 1)[shuffled()])
    assert torch.equal(found.argmax(1), teacher.directly(viewed, 1)[shuffled()].argmax(1))
    assert torch.equal(reader(cache, temperatures=(1.0,)).view(1).rows(shuffled()).logits, found)


@pytest.mark.usefixtures("never_in_memory")
@pytest.mark.parametrize("size", [0, 3, 150, 240])
def test_a_large_view_is_cut_short_while_it_is_read(size: int, cache: Path) -> None:
    teacher, viewed = Teacher(), Viewed(split(), LIGHT, 0)
    opened(teacher, cache, viewed).prepare([0])
    again = Teacher()
    kept = opened(again, cache)
    table = kept.view(0)
    os.truncate(kept.kept.view(0).path, size)
    for _ in range(2):
        close(table.rows(shuffled()).logits, teacher.directly(viewed, 0)[shuffled()])
    assert sum(again.asked) == COUNT - size // (4 + BLOCK * 6) * BLOCK


@pytest.mark.usefixtures("never_in_memory")
def test_a_large_view_is_deleted_while_it_is_read(cache: Path) -> None:
    teacher, viewed = Teacher(), Viewed(split(), LIGHT, 0)
    kept = opened(teacher, cache, viewed)
    table = kept.view(0)
    table.rows(ALL)
    shutil.rmtree(cache)
    close(table.rows(ALL).logits, teacher.directly(viewed, 0))


@pytest.mark.usefixtures("never_in_memory")
def test_a_large_view_needs_a_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowFile, "write", full_disk)
    with pytest.raises(UnderstudyError, match="Free some space, set UNDERSTUDY_CACHE to another folder, or take"):
        opened(Teacher(), cache).view(0)


# --- several at once ---


def test_shares_of_several_processes_fill_a_view(cache: Path) -> None:
    """Each computes its blocks; after the barrier each has all of them."""
    barrier, viewed = threading.Barrier(2), Viewed(split(), LIGHT, 0)
    teachers, found = [Teacher(), Teacher()], {}

    def work(rank: int) -> None:
        kept = opened(teachers[rank], cache)
        kept.shard, kept.any = (rank, 2), lambda stopped: barrier.wait() < 0 or stopped
        kept.prepare(range(2))
        found[rank] = (kept.view(1).rows(ALL).logits, kept.work.images)

    opened(Teacher(), cache)  # both find the card
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for logits, _ in found.values():
        close(logits, teachers[0].directly(viewed, 1))
    assert [found[rank][1] for rank in range(2)] == [2 * (16 + 8), 2 * 16]


def test_a_share_that_another_process_could_not_write_is_computed(cache: Path) -> None:
    teacher, viewed = Teacher(), Viewed(split(), LIGHT, 0)
    kept = opened(teacher, cache, viewed)
    kept.shard = (1, 2)  # and nobody is 0
    close(kept.view(0).rows(ALL).logits, teacher.directly(viewed, 0))
    assert kept.work.images == COUNT


@pytest.mark.parametrize("run", range(3))
def test_threads_that_fill_the_same_view_at_once(run: int, cache: Path) -> None:
    viewed, found = Viewed(split(), LIGHT, 0), []

    def work() -> None:
        kept = opened(Teacher(), cache, Viewed(split(), LIGHT, 0))
        kept.prepare(range(2))
        found.append([kept.view(view).rows(ALL).logits for view in range(2)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for views in found:
        for view, logits in enumerate(views):
            close(logits, Teacher().directly(viewed, view))
    assert reader(cache).missing(0) == reader(cache).missing(1) == 0


def _fill(cache: Path, place: str) -> None:
    torch.set_num_threads(1)
    outputs._LARGEST_BLOCK = BLOCK
    kept = opened(Teacher(), cache)
    kept.prepare(range(20))
    np.save(place, kept.view(19).rows(ALL).logits.numpy())


@pytest.mark.slow
def test_processes_that_fill_the_same_views_at_once(cache: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    places = [str(tmp_path / f"{rank}.npy") for rank in range(2)]
    processes = [context.Process(target=_fill, args=(cache, place)) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for place in places:
        close(torch.from_numpy(np.load(place)), Teacher().directly(Viewed(split(), LIGHT, 0), 19))
    assert [reader(cache).missing(view) for view in range(20)] == [0] * 20
