"""Images decoded once: bad ones, what survives a crash or a neighbour, and identical ones across splits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from imagefiles import make_folder, ordinary_user, png, put, shared_folder
from opened_store import PETS, Log, cache, folder, opened
from understudy import storage
from understudy.data import frames
from understudy.data.decode import decode_file
from understudy.errors import DataError, UnderstudyError

__all__ = ["cache", "folder"]  # fixtures


def names_of(found, split):
    return {found.names[row] for row in found.splits[split]}


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
