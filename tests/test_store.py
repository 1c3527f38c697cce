"""Images decoded once: what is kept, and when it is reused."""

from __future__ import annotations

import os
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagefiles import encode, make_folder, png, put, texture
from opened_store import PETS, Log, cache, folder, opened
from understudy import storage
from understudy.data import listing, store
from understudy.data.decode import decode_file
from understudy.errors import DataError

__all__ = ["cache", "folder"]  # fixtures

# ---------------------------------------- what is kept


def test_every_frame_belongs_to_its_name_label_and_id(folder, cache):
    found = opened(folder, cache)
    assert found.frames.shape == (26, 1, 12, 12)
    assert (found.frames[:1].dtype, found.labels.dtype, found.ids.dtype) == (np.uint8, np.int64, np.uint64)
    assert found.classes == ("cat", "dog")
    for row, name in enumerate(found.names):
        assert np.array_equal(found.frames[row], decode_file(folder / name, side=12, channels=1, fit="crop"))
        assert found.classes[found.labels[row]] == name.split("/")[0]
        assert int(found.ids[row]) == int(storage.hash_file(folder / name)[:16], 16)
    assert (np.diff(found.ids) > 0).all()
    together = np.concatenate(list(found.splits.values()))
    assert sorted(together.tolist()) == list(range(26))
    assert found.frames.path.read_bytes() == found.frames[:].tobytes()
    totals = {name: sum(part[name] for part in found.counts().values()) for name in found.classes}
    assert totals == PETS


def test_digits_are_stored_untouched(cache):
    from sklearn.datasets import load_digits

    found = opened("digits", cache)
    raw = load_digits()
    assert (found.frame, found.image_size, found.channels) == (8, 8, 1)
    rows = [int(name) for name in found.names]
    assert np.array_equal(found.frames[:][:, 0], np.rint(raw.images[rows] * 255 / 16))
    assert np.array_equal(found.labels, raw.target[rows])
    counts = {name: sum(part.values()) for name, part in found.counts().items()}
    assert sum(counts.values()) == 1797
    assert 0.12 < counts["test"] / 1797 < 0.18
    assert 0.12 < counts["val"] / (1797 - counts["test"]) < 0.18
    assert all(min(part.values()) >= 10 for part in found.counts().values())
    assert opened("digits", cache).reused


@pytest.mark.parametrize(
    ("sides", "image_size", "expected"),
    [
        ([64], 64, (64, 64)),
        ([64], None, (64, 64)),
        ([72], 64, (64, 64)),  # exactly 9/8: no margin
        ([73], 64, (72, 64)),
        ([500], None, (252, 224)),
        ([500], 96, (108, 96)),
        ([40], 64, (64, 64)),
        ([20, 30, 90], None, (30, 30)),
    ],
)
def test_frame_has_a_margin_where_there_are_pixels_for_it(tmp_path, cache, sides, image_size, expected):
    for seed, side in enumerate(sides * 4):
        image = Image.fromarray(texture(seed, side, side + 9))
        for name in ("cat", "dog"):
            put(tmp_path / "data" / name / f"{seed}.png", encode(image.rotate(180 * (name == "dog")), "PNG"))
    found = opened(tmp_path / "data", cache, image_size=image_size)
    assert (found.frame, found.image_size) == expected
    assert found.frames.shape[2:] == (found.frame, found.frame)


def test_channels_follow_the_images_or_the_user(tmp_path, cache):
    grey = make_folder(tmp_path / "grey", PETS)
    assert opened(grey, cache).channels == 1
    colour = opened(grey, cache, channels="colour")
    assert colour.frames.shape[1] == 3
    assert (colour.frames[:][:, 0] == colour.frames[:][:, 2]).all()
    put(grey / "cat" / "colour.png", png(77, channels=3))
    mixed = opened(grey, cache)
    assert mixed.channels == 3
    assert any(note.startswith("1 of 27 images are stored in colour, so all are kept") for note in mixed.notes)
    assert opened(grey, cache, channels="grey").channels == 1
    assert not any("stored in colour" in note for note in opened(grey, cache, channels="grey").notes)


def test_arrays_resize_and_change_channels_like_files(cache):
    found = opened("digits", cache, image_size=16, channels="colour")
    assert found.frames.shape[1:] == (3, 16, 16)
    raw = opened("digits", cache)
    row = 5
    image = Image.fromarray(raw.frames[raw.names.index(found.names[row])][0])
    assert np.array_equal(found.frames[row][1], np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)))


def test_squash_and_crop_are_kept_apart(tmp_path, cache):
    for seed in range(12):
        for name in ("cat", "dog"):
            image = Image.fromarray(texture(seed + 100 * (name == "dog"), 20, 40))
            put(tmp_path / "data" / name / f"{seed}.png", encode(image, "PNG"))
    crop, squash = (opened(tmp_path / "data", cache, fit=fit) for fit in ("crop", "squash"))
    assert (crop.fit, squash.fit) == ("crop", "squash")
    assert crop.fingerprint != squash.fingerprint
    name = crop.names[0]
    assert np.array_equal(crop.frames[0][0], np.asarray(Image.open(tmp_path / "data" / name))[:, 10:30])
    assert not np.array_equal(crop.frames[:], squash.frames[:])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path, cache):
    folder = make_folder(tmp_path / "data", {"a": 150, "b": 150}, side=160, channels=3)
    total = 300 * 160 * 160 * 3
    tracemalloc.start()
    try:
        found = opened(folder, cache, workers=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.frames.nbytes == total
    assert peak < total / 4


# ---------------------------------------- reuse


def nothing_is_read(monkeypatch):
    def refuse(path):
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(listing, "read", refuse)
    monkeypatch.setattr(store, "read", refuse)


def test_second_opening_reads_and_decodes_nothing(folder, cache, monkeypatch):
    first = opened(folder, cache)
    nothing_is_read(monkeypatch)
    log = Log()
    second = opened(folder, cache, progress=log)
    assert (first.reused, second.reused) == (False, True)
    assert log.count("decode") == log.count("read images") == 0
    assert np.array_equal(first.frames[:], second.frames[:])
    assert first.fingerprint == second.fingerprint
    assert first.names == second.names


@pytest.mark.parametrize("change", [{"val_fraction": 0.3}, {"split_seed": 1}, {"max_bad_share": 0.0}])
def test_settings_that_leave_frames_alone_reuse_them(folder, cache, change):
    first = opened(folder, cache)
    second = opened(folder, cache, **change)
    assert second.reused
    assert (second.fingerprint == first.fingerprint) == ("max_bad_share" in change)


@pytest.mark.parametrize("change", [{"image_size": 10}, {"channels": "colour"}, {"fit": "squash"}])
def test_another_geometry_is_decoded_beside_the_first(folder, cache, change):
    first = opened(folder, cache)
    assert not opened(folder, cache, **change).reused
    assert opened(folder, cache).reused
    assert first.frames.shape == (26, 1, 12, 12)


def test_moved_or_copied_folder_reuses_the_frames(folder, cache, tmp_path):
    first = opened(folder, cache)
    shutil.copytree(folder, tmp_path / "copy")
    folder.rename(tmp_path / "moved")
    for place in ("copy", "moved"):
        log = Log()
        found = opened(tmp_path / place, cache, progress=log)
        assert found.reused
        assert log.count("read images") == 26  # hashed again, since its path is new
        assert log.count("decode") == 0
        assert found.fingerprint == first.fingerprint


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_names_that_are_no_text_can_be_written_down(folder, cache):
    (folder / "cat" / "003.png").rename(folder / "cat" / os.fsdecode(b"\xe9.png"))
    put(folder / "cat" / os.fsdecode(b"\xff.png"), b"")
    for _ in range(2):
        found = opened(folder, cache)
        assert "cat/\\udce9.png" in found.names
        assert found.skipped == {"cat/\\udcff.png": "empty file"}


def test_only_a_changed_image_is_read_again_and_its_frame_is_new(folder, cache):
    first = opened(folder, cache)
    put(folder / "cat" / "003.png", png(500))
    os.utime(folder / "cat" / "003.png", (1_700_000_000, 1_700_000_000))
    log = Log()
    second = opened(folder, cache, progress=log)
    assert log.count("read images") == 1
    assert not second.reused
    assert second.fingerprint != first.fingerprint
    pixels = second.frames[second.names.index("cat/003.png")]
    assert np.array_equal(pixels[0], texture(500))
    assert np.array_equal(first.frames[first.names.index("cat/003.png")][0], texture(3))  # the old store is intact


def test_file_rewritten_within_the_resolution_of_its_time_stamp_is_seen(tmp_path, cache):
    folder = make_folder(tmp_path / "data", PETS)
    fresh = put(folder / "cat" / "raw.bmp", encode(Image.fromarray(texture(90)), "BMP"), aged=False)
    opened(folder, cache)
    before = fresh.stat()
    fresh.write_bytes(encode(Image.fromarray(texture(91)), "BMP"))
    os.utime(fresh, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fresh.stat().st_size == before.st_size
    found = opened(folder, cache)
    assert np.array_equal(found.frames[found.names.index("cat/raw.bmp")][0], texture(91))


def test_relabelled_image_changes_the_fingerprint(folder, cache):
    first = opened(folder, cache)
    (folder / "cat" / "003.png").rename(folder / "dog" / "moved.png")
    second = opened(folder, cache)
    assert second.fingerprint != first.fingerprint
    assert second.classes[second.labels[second.names.index("dog/moved.png")]] == "dog"


def test_renamed_image_does_not_change_the_fingerprint(folder, cache):
    first = opened(folder, cache)
    (folder / "cat" / "003.png").rename(folder / "cat" / "another name.png")
    assert opened(folder, cache).fingerprint == first.fingerprint


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "understudy-listing/1", "files": {"cat/003.png": [1, 2]}}'])
def test_damaged_listing_is_read_anew(folder, cache, damage):
    first = opened(folder, cache)
    (kept,) = (cache / "listings").iterdir()
    kept.write_text(damage)
    assert opened(folder, cache).fingerprint == first.fingerprint


@pytest.mark.parametrize("damage", ["truncate", "manifest", "no manifest", "no frames"])
def test_damaged_store_is_built_anew(folder, cache, damage):
    first = opened(folder, cache)
    frames_file = first.frames.path
    expected = first.frames[:]
    if damage == "truncate":
        os.truncate(frames_file, frames_file.stat().st_size - 1)
    elif damage == "manifest":
        (frames_file.parent / "manifest.json").write_text('{"rows": 26')
    else:
        (frames_file if damage == "no frames" else frames_file.parent / "manifest.json").unlink()
    second = opened(folder, cache)
    assert not second.reused
    assert np.array_equal(second.frames[:], expected)
    assert opened(folder, cache).reused


@pytest.mark.parametrize("left", [0, 1000])
def test_store_cut_short_while_it_is_in_use_is_told_and_decoded_anew(folder, cache, left):
    first = opened(folder, cache)
    expected = first.frames[:]
    first.frames.check()
    os.truncate(first.frames.path, left)
    for use in (first.frames.check, lambda: first.frames[0], lambda: next(first.frames.ahead([np.arange(3)]))):
        with pytest.raises(
            DataError, match=r"frames\.u8 was truncated while it was in use\. Run the same command again"
        ):
            use()
    second = opened(folder, cache)
    assert not second.reused
    assert np.array_equal(second.frames[:], expected)
    with pytest.raises(DataError, match="truncated"):  # the new file is another one
        first.frames.check()


def test_store_deleted_while_it_is_in_use_lives_on_and_is_decoded_anew(folder, cache):
    first = opened(folder, cache)
    expected = first.frames[:]
    shutil.rmtree(cache)
    first.frames.check()
    assert np.array_equal(first.frames[:], expected)
    second = opened(folder, cache)
    assert not second.reused
    assert second.frames.path.exists()
    assert np.array_equal(first.frames[:], second.frames[:])


def test_store_leaves_no_open_file_behind(folder, cache):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")

    def descriptors():
        return [link for link in map(_target, Path("/proc/self/fd").iterdir()) if link.endswith("frames.u8")]

    found = opened(folder, cache)
    assert len(descriptors()) == 1  # the map's own, by which it is checked
    del found
    assert descriptors() == []


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # of the listing itself
        return ""
