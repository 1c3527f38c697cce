"""Files that survive a crash, folders with one owner, and training states in one file."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from understudy import checkpoint, storage
from understudy.errors import RunError, UnderstudyError


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- atomic writes ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    storage.write_bytes(deep / "bytes", b"\0\xff")
    storage.write_text(deep / "text", "grüße\n")
    storage.write_json(deep / "json", {"b": [1, None, 0.1], "a": "é"})
    assert (deep / "bytes").read_bytes() == b"\0\xff"
    assert (deep / "text").read_bytes() == "grüße\n".encode()
    assert json.loads((deep / "json").read_bytes()) == {"b": [1, None, 0.1], "a": "é"}
    assert _names(deep) == ["bytes", "json", "text"]


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        storage.write_text(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_the_file_appears_under_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with storage.atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == tmp_path  # a rename must not cross disks
    assert path.read_text() == "half"


@pytest.mark.parametrize("fault", [ValueError("mine"), KeyboardInterrupt(), OSError(errno.EIO, "disk")])
def test_a_failure_in_the_middle_leaves_the_old_bytes(tmp_path: Path, fault: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def work() -> None:
        with storage.atomic_path(path) as temporary:
            temporary.write_text("half of the ne")
            raise fault

    with pytest.raises(type(fault)):
        work()
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["file"]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    seen: list[tuple[int, bool]] = []

    def fsync(descriptor: int) -> None:
        seen.append((os.fstat(descriptor).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    storage.write_bytes(path, b"12345")
    assert seen[0] == (5, False)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "The disk is full"),
        (errno.EDQUOT, "The disk is full"),
        (errno.EFBIG, "The disk is full"),
        (errno.EROFS, "cannot be written (Read-only file system)"),
        (errno.EACCES, "cannot be written (Permission denied)"),
    ],
)
def test_a_full_or_read_only_disk_is_one_sentence(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UnderstudyError) as told:
            storage.write_text(path, "new")
    assert words in str(told.value)
    assert str(path) in str(told.value)
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["file/below", "x" * 300])
def test_a_path_that_cannot_be_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(UnderstudyError, match="cannot be written"):
        storage.write_text(tmp_path / name, "new")
    with pytest.raises(UnderstudyError, match="cannot be written"), storage.own(tmp_path / name):
        pass
    assert _names(tmp_path) == ["file"]


def test_other_faults_of_the_system_stay_what_they_are() -> None:
    with pytest.raises(OSError, match="broken"), storage.disk_errors(Path("x")):
        raise OSError(errno.EIO, "broken")


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to write more than `size` bytes to any file, as a full disk would."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "save",
    [
        lambda path, size: storage.write_bytes(path, bytes(size)),
        lambda path, size: checkpoint.save(path, {"x": torch.zeros(size // 4)}, {}),
    ],
)
def test_a_file_that_the_system_cuts_short_never_gets_its_name(
    save: Callable[[Path, int], None], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    save(path, 1000)
    before = path.read_bytes()
    with _files_of_at_most(20_000), pytest.raises(UnderstudyError, match="The disk is full") as told:
        save(path, 1_000_000)
    assert str(path) in str(told.value)
    assert path.read_bytes() == before
    assert _names(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_holds_numbers_only(number: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(tmp_path / "file", {"a": [number]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.fingerprint({"a": [number]})
    assert _names(tmp_path) == []


# --- names of content ------------------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _reversed(value: object) -> object:
    if isinstance(value, dict):
        return {key: _reversed(inner) for key, inner in reversed(value.items())}
    return [_reversed(inner) for inner in value] if isinstance(value, list) else value


@given(_JSON)
def test_a_fingerprint_knows_no_order_of_keys(value: object) -> None:
    assert storage.fingerprint(value) == storage.fingerprint(_reversed(value))


@given(_JSON, _JSON)
def test_different_values_have_different_fingerprints(one: object, other: object) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (storage.fingerprint(one) == storage.fingerprint(other)) is same


def test_a_fingerprint_is_the_same_in_every_process_and_version() -> None:
    # runs and caches of earlier versions are found by it
    text = b'{"a":"\\u00e4","b":[1,2.5,null]}'
    expected = hashlib.blake2b(text, digest_size=8).hexdigest()
    assert storage.fingerprint({"b": [1, 2.5, None], "a": "ä"}) == expected
    assert storage.fingerprint([1, 2]) != storage.fingerprint([2, 1])


def test_the_hash_of_a_file_is_blake2b(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert storage.hash_file(tmp_path / "file") == hashlib.blake2b(data, digest_size=16).hexdigest()


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"UNDERSTUDY_CACHE": "/a/b", "XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/a/b"),
        ({"UNDERSTUDY_CACHE": "~/b", "HOME": "/h"}, "/h/b"),
        ({"UNDERSTUDY_CACHE": "", "XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/c/understudy"),
        ({"HOME": "/h"}, "/h/.cache/understudy"),
    ],
)
def test_the_cache_folder(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UNDERSTUDY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert storage.cache_dir() == Path(expected)


def test_free_space_of_a_folder_that_is_yet_to_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = {tmp_path: SimpleNamespace(free=5), Path("."): SimpleNamespace(free=7)}
    monkeypatch.setattr(shutil, "disk_usage", usage.__getitem__)
    assert storage.free_bytes(tmp_path / "a" / "b" / "c") == 5
    monkeypatch.chdir(tmp_path)
    assert storage.free_bytes(Path("a/b")) == 7


# --- one owner -------------------------------------------------------------------------------------------------------

_OWNER = """
import sys, time
from pathlib import Path
from understudy import storage
with storage.own(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def _owner(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _OWNER, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _owns(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == "mine\n"


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_a_folder_has_one_owner_until_it_ends_or_is_killed(tmp_path: Path, end: str) -> None:
    folder = tmp_path / "run"
    with _owner(folder) as first:
        assert _owns(first)
        with pytest.raises(RunError, match="Another process is working on") as told, storage.own(folder):
            pass
        assert str(folder) in str(told.value)
        assert "--out" in str(told.value)
        if end == "killed":
            first.send_signal(signal.SIGKILL)
        else:
            first.communicate()
        first.wait(10)
        with storage.own(folder):
            assert folder.is_dir()


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with storage.own(tmp_path), _owner(tmp_path) as second:
        assert not _owns(second)
        _, errors = second.communicate()
        assert "RunError: Another process is working on" in errors


def test_a_folder_is_free_again_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage.own(tmp_path):
        raise ZeroDivisionError
    with storage.own(tmp_path), pytest.raises(RunError), storage.own(tmp_path):
        pass
    with storage.own(tmp_path):
        pass


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_tensors_of_every_kind_and_a_state(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    whole = torch.arange(12.0).view(3, 4)
    tensors: dict[str, Tensor] = {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "half": torch.tensor([1.0, math.inf]).bfloat16(),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "tied": whole,
        "tied too": whole,
        "turned": whole.T,
        "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "learned": nn.Parameter(torch.ones(2)),
    }
    state = {"epoch": 3, "history": [{"lr": 0.1}], "text": "é"}
    checkpoint.save(path, tensors, state)
    found = checkpoint.load(path)
    assert found is not None
    assert found[1] == state
    assert found[0].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[0][name].dtype == tensor.dtype
        assert torch.equal(found[0][name], tensor.detach())


def _damage(path: Path) -> list[Callable[[], object]]:
    data = path.read_bytes()
    return [
        lambda: path.unlink(),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(data[:-1]),
        lambda: path.write_bytes(data[:20]),
        lambda: path.write_bytes(b"\xff" * len(data)),
        lambda: path.write_bytes(data.replace(b"understudy-checkpoint/1", b"understudy-checkpoint/0")),
        lambda: path.write_bytes(data.replace(b'{\\"epoch', b'[\\"epoch')),
    ]


@pytest.mark.parametrize("number", range(7))
def test_what_is_no_whole_checkpoint_of_ours_is_none(number: int, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    checkpoint.save(path, {"x": torch.ones(5)}, {"epoch": 3})
    before = path.read_bytes()
    assert checkpoint.load(path) is not None
    _damage(path)[number]()
    assert not path.exists() or path.read_bytes() != before
    assert checkpoint.load(path) is None


def test_prefixes_come_and_go() -> None:
    tensors = {"a.b": torch.ones(1), "c": torch.zeros(1)}
    both = checkpoint.with_prefix("student.", tensors) | checkpoint.with_prefix("best.", {"a.b": torch.ones(2)})
    assert sorted(both) == ["best.a.b", "student.a.b", "student.c"]
    assert checkpoint.under_prefix("student.", both) == tensors
