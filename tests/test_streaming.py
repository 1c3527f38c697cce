"""Images decoded as they are read: the same frames as from a store, ahead of the reader, and clear words when files go.

The mixed folder holds what users have: JPEG and PNG, grey and colour, one turned by EXIF, some much larger than the
frames.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import tracemalloc
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

from imagefiles import LONG_AGO, encode, make_folder, png, put, texture
from small_runs import distilled, stripes, weights, without_export
from test_store import PETS, Log, opened
from understudy import storage
from understudy.data import frames
from understudy.data.batches import Epochs, Split
from understudy.data.decode import decode_file
from understudy.data.frames import Geometry, StoredFrames
from understudy.data.mixing import Mix
from understudy.data.streaming import StreamedFrames
from understudy.data.views import POLICIES
from understudy.errors import DataError, UnderstudyError

TINY = 1e-9
"""A budget of one byte."""


def streamed(folder, cache, **options):
    return opened(folder, cache, store_budget=TINY, **options)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "data", PETS)


@pytest.fixture
def mixed(tmp_path):
    root = tmp_path / "mixed"
    for number in range(12):
        for kind, place in (("JPEG", "cat"), ("PNG", "dog")):
            channels = 1 if number % 3 else 3
            pixels = texture(2 * number + (kind == "PNG"), 150 if number % 2 else 30, 170, channels)
            put(root / place / f"{number}.{kind.lower()}", encode(Image.fromarray(pixels), kind))
    turned = Image.Exif()
    turned[0x0112] = 6
    put(root / "cat" / "turned.jpeg", encode(Image.fromarray(texture(99, 60, 80)), "JPEG", exif=turned))
    return root


def decoders():
    """Return the threads that decode."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def counted(*, images=40, workers=2, decode=None):
    """Return frames whose pixels are their row."""

    def plain(name):
        return np.full((1, 2, 2), int(name), np.uint8)

    names = [str(row) for row in range(images)]
    return StreamedFrames(names, decode or plain, Geometry(2, 1, "crop"), workers=workers)


# ---------------------------------------- the same as stored


@pytest.mark.parametrize("options", [{}, {"image_size": 16}, {"channels": "grey"}, {"fit": "squash", "image_size": 20}])
def test_streamed_frames_are_stored_frames_bit_by_bit(mixed, cache, options):
    some, other = streamed(mixed, cache, **options), opened(mixed, cache, **options)
    assert isinstance(some.frames, StreamedFrames)
    assert isinstance(other.frames, StoredFrames)
    assert some.frames.shape == other.frames.shape
    assert some.frames.nbytes == other.frames.nbytes == other.frames[:].nbytes
    assert np.array_equal(some.frames[:], other.frames[:])
    assert other.frames[:].std() > 10
    assert some.names == other.names
    assert np.array_equal(some.labels, other.labels)
    assert np.array_equal(some.ids, other.ids)
    assert {name: rows.tolist() for name, rows in some.splits.items()} == {
        name: rows.tolist() for name, rows in other.splits.items()
    }
    assert some.fingerprint == other.fingerprint
    assert [note for note in some.notes if note not in other.notes] == [
        note for note in some.notes if note.startswith("Decoded, the images would take")
    ]


def test_grey_files_stay_one_channel(tmp_path, cache):
    for number in range(12):
        put(tmp_path / "x" / "a" / f"{number}.jpg", encode(Image.fromarray(texture(number, 40, 40)), "JPEG"))
        put(tmp_path / "x" / "b" / f"{number}.png", png(50 + number, side=40))
    found = streamed(tmp_path / "x", cache)
    assert found.frames.shape == (24, 1, 40, 40)
    assert found.frames[3].shape == (1, 40, 40)


def test_arrays_stream_too(cache):
    some, other = streamed("digits", cache, image_size=12), opened("digits", cache, image_size=12)
    assert isinstance(some.frames, StreamedFrames)
    assert np.array_equal(some.frames[:], other.frames[:])


@pytest.mark.parametrize("kind", [streamed, opened])
def test_frames_are_read_as_from_an_array(mixed, cache, kind):
    found = kind(mixed, cache, image_size=16).frames
    every = found[:]
    assert len(found) == len(every) == 25
    assert every.dtype == np.uint8
    for wanted in (
        3,
        np.int64(24),
        -1,
        slice(4, 9, 2),
        np.array([7, 7, 0]),
        np.array([], np.int64),
        np.array([[1], [2]]),
    ):
        assert np.array_equal(found[wanted], every[wanted])
        assert found[wanted].shape == every[wanted].shape
    assert np.array_equal(found.read(np.array([5, 2])), every[[5, 2]])
    every[:] = 0
    assert found[:].any()  # what was read is the reader's own
    with pytest.raises(IndexError):
        found[25]


@pytest.mark.parametrize("kind", [streamed, opened])
def test_batches_read_ahead_come_in_order(mixed, cache, kind):
    found = kind(mixed, cache, image_size=16).frames
    order = np.random.default_rng(0).permutation(25)
    batches = list(found.ahead(np.split(order, [10, 20])))
    assert [len(batch) for batch in batches] == [10, 10, 5]
    assert np.array_equal(np.concatenate(batches), found[:][order])


# ---------------------------------------- ahead of the reader


def test_no_more_than_depth_batches_are_begun_ahead():
    begun = []

    def reads():
        for start in range(0, 40, 4):
            begun.append(start)
            yield np.arange(start, start + 4)

    for depth in (0, 1, 3):
        begun.clear()
        for number, batch in enumerate(counted().ahead(reads(), depth=depth)):
            assert batch[:, 0, 0, 0].tolist() == list(range(4 * number, 4 * number + 4))
            assert len(begun) == min(number + 1 + depth, 10)
        assert number == 9


def test_the_next_batch_is_decoded_while_the_reader_works():
    reached = threading.Event()

    def decode(name):
        if name == "15":
            reached.set()
        return np.full((1, 2, 2), int(name), np.uint8)

    batches = counted(decode=decode).ahead(np.split(np.arange(40), 5), depth=1)
    next(batches)
    assert reached.wait(20)  # an image of the second batch, which nobody asked for yet
    batches.close()


def test_images_are_decoded_in_parallel():
    both = threading.Barrier(2)

    def decode(name):
        if name in ("0", "12"):
            both.wait(20)  # raises unless another thread comes while this one waits
        return np.full((1, 2, 2), int(name), np.uint8)

    assert counted(decode=decode).read(np.arange(16))[:, 0, 0, 0].tolist() == list(range(16))


def test_no_threads_are_left_behind():
    reader = counted()
    before = len(decoders())
    batches = reader.ahead(np.split(np.arange(40), 10))
    next(batches)
    assert len(decoders()) > before
    batches.close()
    assert len(decoders()) == before
    reader.read(np.arange(40))
    assert len(decoders()) == before


def test_what_a_thread_raises_reaches_the_reader_and_ends_the_threads():
    def decode(name):
        if name == "21":
            raise DataError("21 is gone")
        return np.full((1, 2, 2), int(name), np.uint8)

    before = len(decoders())
    batches = counted(decode=decode).ahead(np.split(np.arange(40), 4))
    assert next(batches)[:, 0, 0, 0].tolist() == list(range(10))
    with pytest.raises(DataError, match="21 is gone"):
        list(batches)
    assert len(decoders()) == before


def test_memory_holds_the_batches_in_flight_only(tmp_path, cache):
    folder = make_folder(tmp_path / "data", {"a": 60, "b": 60}, side=120, channels=3)
    found = streamed(folder, cache, workers=1)
    tracemalloc.start()
    try:
        total = sum(batch.nbytes for batch in found.frames.ahead(np.split(np.arange(120), 30)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == found.frames.nbytes == 120 * 120 * 120 * 3
    assert peak < total / 4


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


# ---------------------------------------- training


@pytest.mark.parametrize("mix", [None, Mix("mixup"), Mix("cutmix")])
def test_streamed_batches_are_stored_batches_bit_by_bit(mixed, cache, mix):
    epochs = [
        Epochs(
            Split(found.frames, found.labels, found.ids, np.arange(25), size=16, device=torch.device("cpu")),
            policy=POLICIES["light"],
            view_seed=0,
            batch_size=8,
            mix=mix,
        )
        for found in (kind(mixed, cache, image_size=16) for kind in (streamed, opened))
    ]
    some, other = (list(each.epoch(1, 2)) for each in epochs)
    assert len(some) == len(other) == epochs[0].steps == 3
    for left, right in zip(some, other, strict=True):
        assert torch.equal(left.images, right.images)
        assert torch.equal(left.labels, right.labels)
        assert torch.equal(left.positions, right.positions)
    some, other = (list(each.split.whole(7)) for each in epochs)
    assert all(torch.equal(*pair) for pair in zip(some, other, strict=True))


def test_an_epoch_that_is_left_early_leaves_no_threads(mixed, cache):
    found = streamed(mixed, cache)
    split = Split(found.frames, found.labels, found.ids, np.arange(25), size=30, device=torch.device("cpu"))
    before = len(decoders())
    batches = Epochs(split, policy=POLICIES["none"], view_seed=0, batch_size=4).epoch(0, 0)
    next(batches)
    assert len(decoders()) > before
    batches.close()
    assert len(decoders()) == before


@pytest.mark.slow
def test_a_run_streams_to_the_same_weights(tmp_path, monkeypatch):
    without_export(monkeypatch)
    source = stripes(tmp_path / "data")
    found = []
    for name, budget in (("streamed", TINY), ("stored", None)):
        monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / f"cache of {name}"))
        distilled(source, tmp_path / name, data={"store_budget": budget}, seeds=[0])
        found.append(weights(tmp_path / name))
    assert list((tmp_path / "cache of streamed").glob("stores/*")) == []
    assert len(found[0]) == 3
    assert found[0] == found[1]
    assert "so they are not stored but decoded again in every epoch" in (tmp_path / "streamed/record.json").read_text()
