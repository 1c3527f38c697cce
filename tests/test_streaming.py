"""Images decoded as they are read: the same frames as from a store, ahead of the reader, and the same training."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from imagefiles import encode, make_folder, png, put, texture
from opened_store import cache, opened
from small_runs import distilled, stripes, weights, without_export
from streamed_frames import TINY, decoders, mixed, streamed
from understudy.data.batches import Epochs, Split
from understudy.data.frames import Geometry, StoredFrames
from understudy.data.mixing import Mix
from understudy.data.streaming import StreamedFrames
from understudy.data.views import POLICIES
from understudy.errors import DataError

__all__ = ["cache", "mixed"]  # fixtures


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
