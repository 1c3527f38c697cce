"""Rows in checked blocks: whatever happens to the file, what is read is what was written, or missing."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from imagefiles import ordinary_user
from understudy.data.rowfile import RowFile

ROW = np.dtype([("logits", "<f2", (3,)), ("rest", "<u2")])
ROWS, BLOCK = 11, 4  # two whole blocks and a short one


def rows(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    made = np.zeros(count, ROW)
    made["logits"] = rng.normal(0, 9, (count, 3))
    made["rest"] = rng.integers(1, 2**16, count)
    return made


def file(folder: Path, *, salt: str = "teacher/0", count: int = ROWS, name: str = "view.rows") -> RowFile:
    return RowFile(folder / name, ROW, count, block=BLOCK, salt=salt)


@pytest.fixture
def full(tmp_path: Path) -> RowFile:
    made = file(tmp_path)
    for block in range(made.blocks):
        made.write(block, rows(ROWS)[made.span(block)])
    made.close()
    return made


def overwrite(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as raw:
        raw.seek(place)
        raw.write(data)


def test_what_is_written_is_read(full: RowFile) -> None:
    loaded, missing = full.load()
    assert (missing, full.missing(), full.damaged()) == ([], [], [])
    assert np.array_equal(loaded, rows(ROWS))
    for block in range(3):
        assert np.array_equal(full.read(block), rows(ROWS)[full.span(block)])
    wanted = np.array([10, 0, 3, 4, 7, 8, 0])
    assert np.array_equal(full.take(wanted), rows(ROWS)[wanted])
    assert len(full.take(np.array([], np.int64))) == 0


def test_the_last_block_is_short_and_the_size_is_known(full: RowFile) -> None:
    assert [full.span(block) for block in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 11)]
    assert full.path.stat().st_size == full.nbytes == 3 * 4 + 11 * 8


def test_any_order_of_writing_gives_the_same_file(full: RowFile, tmp_path: Path) -> None:
    other = file(tmp_path, name="other.rows")
    for block in (2, 0, 1, 0):
        other.write(block, rows(ROWS)[other.span(block)])
    other.close()
    assert other.path.read_bytes() == full.path.read_bytes()


def test_no_file_reads_as_all_missing_and_is_not_made(tmp_path: Path) -> None:
    none = file(tmp_path / "nowhere")
    loaded, missing = none.load()
    assert missing == none.missing() == [0, 1, 2]
    assert none.damaged() == []
    assert not loaded["rest"].any()
    assert none.read(1) is None
    assert none.take(np.array([0])) is None
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("place", range(0, 3 * 4 + 11 * 8, 7))
def test_a_changed_byte_damages_its_block_alone(full: RowFile, place: int) -> None:
    before = full.path.read_bytes()[place]
    overwrite(full.path, place, bytes([before ^ 0x10]))
    hit = place // (4 + BLOCK * 8)
    assert full.missing() == full.damaged() == [hit]
    loaded, _ = full.load()
    whole = np.ones(ROWS, bool)
    whole[full.span(hit)] = False
    assert np.array_equal(loaded[whole], rows(ROWS)[whole])
    assert not loaded[~whole]["rest"].any()


@pytest.mark.parametrize("size", range(3 * 4 + 11 * 8))
def test_a_file_cut_short_anywhere(full: RowFile, size: int) -> None:
    os.truncate(full.path, size)
    stride = 4 + BLOCK * 8
    whole = size // stride
    assert full.missing() == list(range(whole, 3))
    assert full.damaged() == ([whole] if size % stride and any(full.path.read_bytes()[whole * stride :]) else [])
    taken = full.take(np.arange(ROWS))
    assert taken is None
    if whole:
        assert np.array_equal(full.take(np.arange(4)), rows(ROWS)[:4])


def test_a_file_of_zeros_is_missing_and_not_damaged(full: RowFile) -> None:
    full.path.write_bytes(bytes(full.nbytes))
    assert full.missing() == [0, 1, 2]
    assert full.damaged() == []
    assert full.take(np.array([5])) is None


def test_holes_are_noticed_by_whoever_has_the_file_open(full: RowFile) -> None:
    """One process reads row by row, a file is cut short, another process writes it further on."""
    assert full.take(np.array([1])) is not None
    os.truncate(full.path, 0)
    other = file(full.path.parent)
    other.write(2, rows(ROWS)[8:])
    other.close()
    assert full.take(np.array([9, 1])) is None
    assert np.array_equal(full.take(np.array([9])), rows(ROWS)[[9]])


def test_rows_of_zeros_that_were_written_are_no_holes(tmp_path: Path) -> None:
    zeros = file(tmp_path)
    for block in range(3):
        zeros.write(block, np.zeros(zeros.span(block).stop - zeros.span(block).start, ROW))
    assert zeros.missing() == []
    assert not zeros.take(np.arange(ROWS))["rest"].any()


def test_a_block_in_another_place_is_damaged(full: RowFile) -> None:
    stride = 4 + BLOCK * 8
    data = full.path.read_bytes()
    overwrite(full.path, 0, data[stride : 2 * stride])
    assert full.missing() == full.damaged() == [0]


@pytest.mark.parametrize("salt", ["teacher/1", "teacher/", "other/0", ""])
def test_a_file_of_something_else_is_missing(full: RowFile, salt: str) -> None:
    assert file(full.path.parent, salt=salt).missing() == [0, 1, 2]


def test_a_shorter_split_finds_nothing_in_the_last_block(full: RowFile) -> None:
    assert file(full.path.parent, count=10).missing() == [2]


def test_two_writers_of_the_same_rows(full: RowFile, tmp_path: Path) -> None:
    one, other = file(tmp_path, name="shared.rows"), file(tmp_path, name="shared.rows")
    for block in range(3):
        one.write(block, rows(ROWS)[one.span(block)])
        other.write(2 - block, rows(ROWS)[one.span(2 - block)])
    assert np.array_equal(one.load()[0], rows(ROWS))
    assert one.path.read_bytes() == full.path.read_bytes()


def test_a_block_mixed_of_two_writers_is_damaged(full: RowFile) -> None:
    """Answers of two processes may differ in their last bits: half of one and half of the other fail the checksum."""
    other = file(full.path.parent, name="other.rows")
    other.write(0, rows(ROWS, seed=1)[:4])
    other.close()
    overwrite(full.path, 0, other.path.read_bytes()[:20])
    assert full.damaged() == [0]


def test_a_handle_reads_what_others_write_later(tmp_path: Path) -> None:
    reader, writer = file(tmp_path), file(tmp_path)
    writer.write(1, rows(ROWS)[4:8])
    assert reader.read(0) is None
    writer.write(0, rows(ROWS)[:4])
    assert np.array_equal(reader.read(0), rows(ROWS)[:4])


def test_a_deleted_folder_is_made_again_by_the_next_write(full: RowFile) -> None:
    shutil.rmtree(full.path.parent)
    full.write(0, rows(ROWS)[:4])
    full.close()
    assert full.missing() == [1, 2]


def test_a_deleted_file_lives_on_for_those_who_read_it(full: RowFile) -> None:
    assert full.read(0) is not None
    full.path.unlink()
    assert np.array_equal(full.load()[0], rows(ROWS))


def test_a_folder_that_cannot_be_written() -> None:
    with ordinary_user() as place:
        closed = place / "closed"
        closed.mkdir()
        closed.chmod(0o500)
        with pytest.raises(PermissionError):
            file(closed).write(0, rows(4))


def test_a_file_that_cannot_be_read_is_missing() -> None:
    with ordinary_user() as place:
        made = file(place)
        made.write(0, rows(4))
        made.close()
        assert made.missing() == [1, 2]
        made.close()
        made.path.chmod(0)
        assert made.missing() == [0, 1, 2]


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("not a folder")
    blocked = file(tmp_path / "outputs")
    assert blocked.missing() == [0, 1, 2]
    with pytest.raises(OSError, match="outputs"):
        blocked.write(0, rows(4))


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "view.rows").mkdir()
    assert file(tmp_path).missing() == [0, 1, 2]
    with pytest.raises(IsADirectoryError):
        file(tmp_path).write(0, rows(4))


def test_a_disk_that_takes_a_part_only(full: RowFile) -> None:
    class Small:
        """A file on a disk that is full after a few bytes."""

        def seek(self, place: int) -> None:
            pass

        def write(self, data: bytes) -> int:
            return 7

        def writable(self) -> bool:
            return True

        def close(self) -> None:
            pass

    full._file = Small()
    with pytest.raises(OSError, match="No space left") as raised:
        full.write(0, rows(4))
    assert raised.value.errno == errno.ENOSPC
