"""What every test stands on: one thread, no network, a cache folder of its own, and the real data where they are.

Imported by pytest before any test; it imports neither torch nor the package.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
THREADS = 1

# Read by torch and numpy when they are first imported, here and in subprocesses.
os.environ["OMP_NUM_THREADS"] = str(THREADS)

# The same examples on every run, and no time limit on a busy machine.
settings.register_profile("understudy", deadline=None, derandomize=True)
settings.load_profile("understudy")

_ALL_SLOW = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.slow\b", re.MULTILINE)
"""In a file whose tests are all slow."""

_tried: list[str] = []
"""Other machines that the current test reached for."""


class NetworkBlockedError(OSError):
    """A test reached for another machine. An OSError, so that the code under test takes its path for no network."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where slow tests are left out, leave out files that have no others: importing their libraries takes seconds."""
    if config.getoption("markexpr") == "not slow" and collection_path.suffix == ".py":
        return bool(_ALL_SLOW.search(collection_path.read_text("utf-8"))) or None
    return None


def _block_network(event: str, args: tuple[Any, ...]) -> None:
    """Refuse what leaves this machine. Only this process is covered: a subprocess has no such hook."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        host = address[0] if isinstance(address, tuple) else None  # a Unix socket's address is a file name
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = args[0]
    else:
        return
    if not _is_local(host):
        _tried.append(str(host))
        raise NetworkBlockedError(f"tests do not use the network: {host}")


def _is_local(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if not name or name in ("localhost", "0.0.0.0", "::", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


sys.addaudithook(_block_network)


@pytest.fixture(autouse=True)
def no_network() -> Iterator[list[str]]:
    """Fail a test that reached for the network; one that means to be refused clears this list at its end."""
    _tried.clear()
    yield _tried
    assert not _tried, f"the test reached for the network: {_tried}"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Undo what a test did to torch's threads; torch is not imported for it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def _own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the home folder untouched: caches of this package and of its libraries go to a temporary folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNDERSTUDY_CACHE", str(folder / "understudy"))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        patch.setenv("HF_HOME", str(folder / "huggingface"))
        for proxy in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(proxy)  # a proxy on this machine would let requests out
        measuring = sys.modules.get("understudy.pipeline.measuring")
        if measuring is not None:  # what a step takes is learnt less exactly, but sooner, before each kind of run
            patch.setattr(measuring, "_SECONDS", 0.05)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data sets: `$UNDERSTUDY_TEST_DATA`, or `../shared/data` beside the repository."""
    folder = Path(os.environ.get("UNDERSTUDY_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent; UNDERSTUDY_TEST_DATA may name another folder")
    return folder
