"""Images decoded once: what is kept, when it is reused, what is held out, and what survives a crash."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagefiles import encode, make_folder, ordinary_user, png, put, shared_folder, texture
from understudy import storage
from understudy.config import DataConfig
from understudy.data import frames, listing, store
from understudy.data.decode import decode_file
from understudy.data.store import open_store
from understudy.errors import DataError, UnderstudyError

PETS = {"cat": 12, "dog": 14}


def opened(folder, cache: Path, *, progress=None, workers=None, **options):
    how = {"progress": progress} if progress else {}
    return open_store(DataConfig(source=str(folder), **options), cache=cache, workers=workers, **how)


class Log:
    """A `Progress` that remembers."""

    def __init__(self):
        self.calls = []

    def __call__(self, task, /, *, done, total, note=""):
        self.calls.append((task, done, total, note))

    def count(self, task):
        return max((done for name, done, _, _ in self.calls if name == task), default=0)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "data", PETS)


def names_of(found, split):
    return {found.names[row] for row in found.splits[split]}


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


# ---------------------------------------- bad images


def test_bad_images_are_skipped_and_listed(folder, cache):
    put(folder / "cat" / "empty.png", b"")
    put(folder / "dog" / "text.jpg", b"not an image at all")
    put(folder / "dog" / "cut.png", png(60, side=40)[:-300])
    (folder / "cat" / "gone.png").symlink_to("nowhere.png")
    expected = {
        "cat/empty.png": "empty file",
        "cat/gone.png": "unreadable: No such file or directory",
        "dog/cut.png": "truncated",
        "dog/text.jpg": "not an image",
    }
    log = Log()
    first = opened(folder, cache, max_bad_share=0.2, progress=log)
    assert dict(sorted(first.skipped.items())) == expected
    assert len(first.names) == 26
    assert ("decode", 27, 27, "1 skipped") in log.calls
    for row, name in enumerate(first.names):
        assert np.array_equal(first.frames[row], decode_file(folder / name, side=12, channels=1, fit="crop"))
    second = opened(folder, cache, max_bad_share=0.2)
    assert second.reused
    assert dict(sorted(second.skipped.items())) == expected
    with pytest.raises(DataError, match=r"^4 of 30 images cannot be used \(13\.3 %\): "):
        opened(folder, cache, max_bad_share=0.1)


def test_too_many_bad_images_are_refused_with_three_of_them(folder, cache):
    for number in range(4):
        put(folder / "cat" / f"bad{number}.png", b"x" * number)
    with pytest.raises(DataError) as caught:
        opened(folder, cache)
    assert str(caught.value) == (
        "4 of 30 images cannot be used (13.3 %): cat/bad0.png (empty file); cat/bad1.png (not an image); "
        "cat/bad2.png (not an image), .... Mend or remove them or allow more with --max-bad-share."
    )
    for name in ("cat", "dog"):
        for file in (folder / name).iterdir():
            file.write_bytes(b"")
    with pytest.raises(DataError, match=r"^30 of 30 images cannot be used \(100\.0 %\).*Mend or remove them\.$"):
        opened(folder, cache, max_bad_share=1)


def test_too_many_truncated_images_leave_no_store(folder, cache):
    for number in range(4):
        put(folder / "cat" / f"bad{number}.png", png(60 + number, side=40)[:-300])
    with pytest.raises(DataError, match="4 of 30 images cannot be used"):
        opened(folder, cache)
    assert [path.name for path in (cache / "stores").iterdir() if path.is_dir()] == []
    assert len(opened(folder, cache, max_bad_share=0.2).skipped) == 4


def test_class_whose_images_are_all_bad_is_named(tmp_path, cache):
    folder = make_folder(tmp_path / "data", {"cat": 12, "dog": 12})
    put(folder / "bird" / "a.png", b"")
    put(folder / "bird" / "b.png", b"")
    with pytest.raises(DataError, match=r"^The class 'bird' has too few usable images \(0\)"):
        opened(folder, cache, max_bad_share=0.5)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipe_is_not_waited_for(folder, cache):
    os.mkfifo(folder / "cat" / "pipe.png")
    assert opened(folder, cache).skipped == {"cat/pipe.png": "unreadable: not a regular file"}


def test_image_that_changes_while_it_is_decoded_stops_the_build(folder, cache):
    def change(task, /, *, done, total, note=""):
        if task == "read images" and done == total:
            put(folder / "cat" / "003.png", png(501))

    with pytest.raises(DataError, match=r"003\.png changed while it was being read"):
        opened(folder, cache, progress=change)


# ---------------------------------------- crashes and neighbours


def killed(task, /, *, done, total, note=""):
    if task == "decode":
        raise KeyboardInterrupt


def test_interrupt_in_the_middle_leaves_nothing_and_the_next_time_works(folder, cache):
    with pytest.raises(KeyboardInterrupt):
        opened(folder, cache, progress=killed)
    assert [path.name for path in (cache / "stores").iterdir() if path.is_dir()] == []
    found = opened(folder, cache)
    assert not found.reused
    assert found.frames.shape[0] == 26


OPEN = """
import os, sys
from pathlib import Path
from understudy.config import DataConfig
from understudy.data.store import open_store
def progress(task, /, *, done, total, note=""):
    if task == "decode" and sys.argv[3] == "die" and done >= 64:
        os.kill(os.getpid(), 9)
found = open_store(DataConfig(source=sys.argv[1]), cache=Path(sys.argv[2]), workers=1, progress=progress)
print(found.reused, found.fingerprint, int(found.frames[:].astype("u8").sum()))
"""


def start(folder, cache, how="live"):
    command = [sys.executable, "-c", OPEN, str(folder), str(cache), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("cleaned_by", ["another", "the same"])
def test_killed_process_leaves_nothing_that_is_taken_for_finished(tmp_path, cache, cleaned_by):
    folder = make_folder(tmp_path / "data", {"a": 60, "b": 60})
    dead = start(folder, cache, "die")
    assert dead.wait(60) == -signal.SIGKILL
    dead.communicate()
    half = [path.name for path in (cache / "stores").glob("*.building")]
    assert len(half) == 1
    if cleaned_by == "another":
        opened(make_folder(tmp_path / "other", PETS), cache)
    else:
        opened(folder, cache)
        shutil.rmtree(next(path for path in (cache / "stores").iterdir() if path.is_dir()))
    assert not list((cache / "stores").glob("*.building"))
    assert not opened(folder, cache).reused
    assert opened(folder, cache).reused


def test_two_processes_at_once_both_end_well(tmp_path, cache):
    folder = make_folder(tmp_path / "data", {"a": 200, "b": 200}, side=48)
    both = [start(folder, cache) for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    (first, second) = (out.split() for out, _ in answers)
    assert first[1:] == second[1:]
    assert "False" in (first[0], second[0])
    assert [path.suffix for path in sorted((cache / "stores").iterdir())] == ["", ".lock"]


def test_a_builder_waits_for_the_one_at_work_and_takes_its_frames(folder, cache, monkeypatch):
    opened(folder, cache)
    (done,) = [path for path in (cache / "stores").iterdir() if path.is_dir()]
    done.rename(cache / "aside")
    lock = frames.FileLock(cache / "stores" / f"{done.name}.lock")
    lock.acquire()
    log = Log()

    def finish(task, /, *, done, total, note=""):
        log(task, done=done, total=total, note=note)
        if note == "another process is at it":
            (cache / "aside").rename(final)
            lock.release()

    final = done
    found = opened(folder, cache, progress=finish)
    assert found.reused
    assert [call for call in log.calls if call[0] == "decode"] == [("decode", 0, 26, "another process is at it")]


def test_full_disk_is_told_before_anything_is_written(folder, cache, monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    with pytest.raises(UnderstudyError, match=r"need 0 MB in .*stores, where 0 MB are free\. Free some space"):
        opened(folder, cache, store_budget=1)


def test_cache_that_cannot_be_written_is_one_sentence_and_a_finished_one_need_not_be():
    with ordinary_user() as place:
        folder, cache = make_folder(place / "data", PETS), place / "cache"
        cache.mkdir(mode=0o555)
        with pytest.raises(UnderstudyError, match=r"cannot be written.*UNDERSTUDY_CACHE"):
            opened(folder, cache)
        cache.chmod(0o755)
        opened(folder, cache)
        for path in [*cache.iterdir(), cache]:
            path.chmod(0o555)
        try:
            assert opened(folder, cache).reused
        finally:
            for path in [cache, *cache.iterdir()]:
                path.chmod(0o755)


# ---------------------------------------- identical images


def test_identical_images_across_splits_are_reported_and_left_in_place(tmp_path, cache):
    counts = {f"{split}/{name}": 60 for split in ("train", "val", "test") for name in ("cat", "dog")}
    folder = make_folder(tmp_path / "data", counts)
    shutil.copy2(folder / "train/cat/001.png", folder / "test/cat/leak.png")
    shutil.copy2(folder / "val/dog/002.png", folder / "test/dog/leak.png")
    shutil.copy2(folder / "train/cat/005.png", folder / "train/cat/copy.png")
    shutil.copy2(folder / "train/cat/006.png", folder / "train/dog/torn.png")
    found = opened(folder, cache)
    assert sorted(map(sorted, found.duplicates)) == [
        ["test/cat/leak.png", "train/cat/001.png"],
        ["test/dog/leak.png", "val/dog/002.png"],
    ]
    assert {"test/cat/leak.png", "test/dog/leak.png"} <= names_of(found, "test")
    assert {"train/cat/001.png", "train/dog/torn.png"} <= names_of(found, "train")
    assert {name: sum(part.values()) for name, part in found.counts().items()} == {
        "train": 122,
        "val": 120,
        "test": 122,
    }
    assert found.notes == [
        "Images that are identical copies of others in the same split: 2.",
        "Identical images stand in different classes: train/cat/006.png (cat); train/dog/torn.png (dog).",
    ]


def test_held_out_splits_never_part_identical_images(tmp_path, cache):
    folder = make_folder(tmp_path / "data", {"cat": 40, "dog": 40})
    for name in ("cat", "dog"):
        for file in sorted((folder / name).iterdir()):
            shutil.copy2(file, file.with_name(f"copy of {file.name}"))
    found = opened(folder, cache)
    assert found.duplicates == []
    assert "Images that are identical copies of others in the same split: 80." in found.notes


def test_adding_images_moves_no_other(tmp_path, cache):
    folder = make_folder(tmp_path / "data", {"cat": 60, "dog": 60})
    before = opened(folder, cache)
    make_folder(folder, {"cat/new": 30}, seed=900)
    after = opened(folder, cache)
    for name in ("train", "val", "test"):
        assert names_of(before, name) == {path for path in names_of(after, name) if "/new/" not in path}
        assert names_of(before, name)
    assert 0 < len([path for path in names_of(after, "train") if "/new/" in path]) < 30


# ---------------------------------------- a real folder


@pytest.mark.slow
def test_chest_xray_as_its_users_have_it(cache):
    folder = shared_folder("chest_xray")
    first = opened(folder, cache)
    assert (first.channels, first.frame, first.image_size) == (1, 96, 96)
    assert first.classes == ("NORMAL", "PNEUMONIA")
    assert first.skipped == {}
    assert first.duplicates == []
    counts = first.counts()
    assert counts["test"] == {"NORMAL": 234, "PNEUMONIA": 390}
    assert counts["train"]["NORMAL"] + counts["val"]["NORMAL"] == 1341 + 8
    assert counts["train"]["PNEUMONIA"] + counts["val"]["PNEUMONIA"] == 3875 + 8
    assert 0.12 < sum(counts["val"].values()) / 5232 < 0.18
    assert "The given validation split has 16 images only" in first.notes[0]
    second = opened(folder, cache)
    assert second.reused
    assert second.fingerprint == first.fingerprint
    manifest = json.loads((first.frames.path.parent / "manifest.json").read_text())
    assert (manifest["rows"], manifest["skipped"]) == (5856, {})
