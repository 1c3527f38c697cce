"""Images decoded as they are read: where a disk is full, images are bad or files change, and the words for it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from imagefiles import LONG_AGO, encode, make_folder, png, put, texture
from opened_store import PETS, Log, cache, folder, opened
from streamed_frames import decoders, mixed, streamed
from understudy import storage
from understudy.data import frames
from understudy.data.decode import decode_file
from understudy.data.frames import StoredFrames
from understudy.data.streaming import StreamedFrames
from understudy.errors import DataError, UnderstudyError

__all__ = ["cache", "folder", "mixed"]  # fixtures


# ---------------------------------------- the budget


def test_nothing_is_stored_beyond_the_budget_and_a_note_says_so(folder, cache):
    found = opened(folder, cache, store_budget=3.7e-6)
    assert isinstance(found.frames, StreamedFrames)
    assert found.notes[0] == (
        "Decoded, the images would take 0.0 MB, more than data.store_budget allows (0.0 MB), so they are not stored "
        "but decoded again in every epoch: the results are the same, and it takes longer."
    )
    assert not (cache / "stores").exists()
    assert isinstance(opened(folder, cache, store_budget=3.8e-6).frames, StoredFrames)  # 26 x 144 bytes


def test_frames_that_are_stored_already_are_used_whatever_the_budget(folder, cache):
    opened(folder, cache)
    found = streamed(folder, cache)
    assert isinstance(found.frames, StoredFrames)
    assert found.reused
    assert not any("Decoded" in note for note in found.notes)


Disk = namedtuple("Disk", "total used free")


@pytest.mark.parametrize(
    ("total", "free", "expected"),
    [
        (1e12, 500e9, 495e9),  # a large disk keeps 5 GB free
        (20e9, 10e9, 8e9),  # a small one 10 %
        (1e12, 5.02e9, 50.2e6),  # hardly more than the reserve: a hundredth of what is free
        (1e12, 1e9, 10e6),
        (1e12, 0, 0),
    ],
)
def test_by_default_the_disk_keeps_a_reserve(tmp_path, monkeypatch, total, free, expected):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(int(total), int(total - free), int(free)))
    assert frames.room(tmp_path / "not" / "there") == expected


def test_by_default_what_does_not_fit_is_streamed(folder, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage, "free_bytes", lambda path: 1000)
        found = opened(folder, cache)
    assert isinstance(found.frames, StreamedFrames)
    assert "more than leaves the disk its reserve" in found.notes[0]
    assert np.array_equal(found.frames[:], opened(folder, cache).frames[:])


def failing_disk(monkeypatch, number):
    """Let whatever is written to the disk for good fail there."""

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up_on_the_way_means_streaming(mixed, cache, monkeypatch, number):
    failing_disk(monkeypatch, number)
    log = Log()
    for _ in range(2):
        found = opened(mixed, cache, progress=log)
        assert isinstance(found.frames, StreamedFrames)
        assert not found.reused
        assert any("more than there is room for on the disk" in note for note in found.notes)
        assert found.frames[2].any()
    assert log.count("decode") == log.count("examine") == 25
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_with_a_budget_a_full_disk_is_one_sentence(mixed, cache, monkeypatch):
    failing_disk(monkeypatch, errno.ENOSPC)
    with pytest.raises(UnderstudyError, match=r"^The disk is full: .*stores could not be written\..*free some space"):
        opened(mixed, cache, store_budget=1)


@pytest.mark.parametrize("kind", [streamed, opened])
def test_disk_that_cannot_be_written_is_one_sentence(mixed, cache, monkeypatch, kind):
    failing_disk(monkeypatch, errno.EROFS)
    with pytest.raises(UnderstudyError, match=r"cannot be written \(Read-only file system\)\..*UNDERSTUDY_CACHE"):
        kind(mixed, cache)


# ---------------------------------------- bad images


@pytest.fixture
def damaged(folder):
    put(folder / "cat" / "empty.png", b"")
    put(folder / "dog" / "cut.png", png(60, side=40)[:-300])
    put(folder / "dog" / "text.jpg", b"not an image at all")
    return folder


def test_bad_images_are_the_same_as_in_a_store(damaged, cache):
    some, other = streamed(damaged, cache, max_bad_share=0.2), opened(damaged, cache, max_bad_share=0.2)
    assert some.skipped == other.skipped
    assert some.skipped["dog/cut.png"] == "truncated"
    assert len(some.skipped) == 3
    assert some.names == other.names
    assert np.array_equal(some.frames[:], other.frames[:])
    assert some.fingerprint == other.fingerprint


def test_images_are_examined_once(damaged, cache):
    logs = Log(), Log()
    first, second = (streamed(damaged, cache, max_bad_share=0.2, progress=log) for log in logs)
    assert ("examine", 27, 27, "1 skipped") in logs[0].calls
    assert logs[1].count("examine") == 0
    assert (first.reused, second.reused) == (False, True)
    assert first.skipped == second.skipped
    assert np.array_equal(first.frames[:], second.frames[:])
    with pytest.raises(DataError, match=r"^3 of 29 images cannot be used \(10\.3 %\): "):
        streamed(damaged, cache, max_bad_share=0.1)


@pytest.mark.parametrize("damage", ["{", "[]", "null", '{"format": "understudy-examined/1", "skipped": [1]}', "{}"])
def test_damaged_answer_is_examined_anew(damaged, cache, damage):
    first = streamed(damaged, cache, max_bad_share=0.2)
    (kept,) = (cache / "examined").glob("*.json")
    assert json.loads(kept.read_text())["skipped"] == {"dog/cut.png": "truncated"}
    kept.write_text(damage)
    second = streamed(damaged, cache, max_bad_share=0.2)
    assert not second.reused
    assert second.skipped == first.skipped
    assert streamed(damaged, cache, max_bad_share=0.2).reused


def test_interrupted_examination_leaves_nothing_and_the_next_time_works(folder, cache):
    def killed(task, /, *, done, total, note=""):
        if task == "examine":
            raise KeyboardInterrupt

    before = len(decoders())
    with pytest.raises(KeyboardInterrupt):
        streamed(folder, cache, progress=killed)
    assert not list((cache / "examined").glob("*.json"))
    assert len(decoders()) == before
    assert not streamed(folder, cache).reused
    assert streamed(folder, cache).reused


def test_of_two_processes_one_examines_and_the_other_waits(folder, cache):
    streamed(folder, cache)
    (kept,) = (cache / "examined").glob("*.json")
    kept.rename(cache / "aside")
    lock = frames.FileLock(kept.with_suffix(".lock"))
    lock.acquire()
    log = Log()

    def finish(task, /, *, done, total, note=""):
        log(task, done=done, total=total, note=note)
        if note == "another process is at it":
            (cache / "aside").rename(kept)
            lock.release()

    assert streamed(folder, cache, progress=finish).reused
    assert [call for call in log.calls if call[0] == "examine"] == [("examine", 0, 26, "another process is at it")]


# ---------------------------------------- files that change later


def test_removed_file_is_named_when_it_is_read(folder, cache):
    found = streamed(folder, cache)
    (folder / "cat" / "003.png").unlink()
    row = found.names.index("cat/003.png")
    with pytest.raises(DataError, match=r"cat/003\.png could be read when .* \(No such file or directory\)\. Bring it"):
        found.frames[row]
    assert np.array_equal(
        found.frames[row - 1], decode_file(folder / found.names[row - 1], side=12, channels=1, fit="crop")
    )


@pytest.mark.parametrize("how", ["another size", "another time"])
def test_changed_file_is_named_when_it_is_read(tmp_path, cache, how):
    folder = make_folder(tmp_path / "data", PETS)
    path = put(folder / "cat" / "raw.bmp", encode(Image.fromarray(texture(90)), "BMP"))
    found = streamed(folder, cache)
    if how == "another size":
        put(path, png(91))
    else:
        path.write_bytes(encode(Image.fromarray(texture(91)), "BMP"))
    with pytest.raises(DataError, match=r"raw\.bmp has changed since the run began\. Put it back"):
        found.frames[:]
    put(path, encode(Image.fromarray(texture(90)), "BMP"))
    assert np.array_equal(found.frames[found.names.index("cat/raw.bmp")][0], texture(90))


def test_file_that_is_merely_touched_is_the_same(folder, cache):
    found = streamed(folder, cache)
    before = found.frames[:]
    for path in folder.rglob("*.png"):
        os.utime(path, (LONG_AGO + 5, LONG_AGO + 5))
    assert np.array_equal(found.frames[:], before)


def test_files_are_hashed_again_only_where_their_time_is_another(folder, cache, monkeypatch):
    found = streamed(folder, cache)

    def refuse(data):
        raise AssertionError("hashed")

    monkeypatch.setattr("understudy.data.streaming.hash_bytes", refuse)
    assert found.frames[:].any()
    os.utime(folder / "cat" / "003.png", (LONG_AGO + 5, LONG_AGO + 5))
    with pytest.raises(AssertionError, match="hashed"):
        found.frames[:]


def test_image_that_changes_while_it_is_examined_stops(folder, cache):
    def change(task, /, *, done, total, note=""):
        if task == "read images" and done == total:
            put(folder / "cat" / "003.png", png(501))

    with pytest.raises(DataError, match=r"003\.png changed while it was being read"):
        streamed(folder, cache, progress=change)
    assert not list((cache / "examined").glob("*.json"))


def test_sound_image_that_cannot_be_decoded_any_more_is_named(folder, cache, monkeypatch):
    found = streamed(folder, cache)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"^The image (cat|dog)/\d+\.png was sound before and now is too large"):
        found.frames[0]


def test_a_new_image_is_examined_with_the_others(folder, cache):
    first = streamed(folder, cache)
    make_folder(folder, {"cat/new": 3}, seed=900)
    second = streamed(folder, cache)
    assert not second.reused
    assert second.fingerprint != first.fingerprint
    assert len(second.frames) == 29
