"""Web pages of tiny models, served and opened in a real browser; for the tests of the page."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

import browser as chromium
from browser import Browser
from test_web import HOSTILE, export
from understudy.errors import ConfigError
from understudy.export import web

MANY = [f"class {number}" for number in range(12)]
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
needs_chromium = pytest.mark.skipif(chromium.find() is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("exported"), 3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the engine of this user's cache, or fetch it once for these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNDERSTUDY_CACHE", str(Path.home() / ".cache" / "understudy"))
        try:
            return web.engine()
        except ConfigError:
            patch.setenv("UNDERSTUDY_CACHE", str(tmp_path_factory.mktemp("engine")))
        patch.setenv("npm_config_fetch_retries", "0")
        try:
            return web.engine(download=True)
        except ConfigError as error:
            pytest.skip(f"ONNX Runtime Web cannot be had here: {error}")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, exported: Path, engine: Path) -> Path:
    """Return the root of a web site that has pages in sub-paths: `colour/` and `grey/`."""
    root = tmp_path_factory.mktemp("site")
    files = {"colour": exported, "grey": export(tmp_path_factory.mktemp("grey"), 1, classes=MANY)}
    for name, file in files.items():
        web.export_web(
            root / "a b" / name, file, golden=file.parent / "golden", engine=engine, title=f"{name} {HOSTILE}"
        )
    return root


class Server(ThreadingHTTPServer):
    """Serves a folder; notes what it is asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    """Knows what every server knows: pages, style sheets, scripts and pictures."""

    extensions_map: ClassVar = {
        ".html": "text/html",
        ".css": "text/css",
        ".js": "text/javascript",
        ".svg": "image/svg+xml",
    }

    def log_message(self, format: str, *args: object) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path)


@pytest.fixture(scope="module")
def server(site: Path) -> Iterator[Server]:
    server = Server(site)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chromium, "FLAGS", (*chromium.FLAGS, *CAMERA))
        window = Browser(tmp_path_factory.mktemp("profile"))
    yield window
    window.close()


def wait(window: Browser, condition: str) -> None:
    """Wait until a JavaScript expression is true."""
    end = time.monotonic() + 60
    while not window.evaluate(f"Boolean({condition})"):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def visit(window: Browser, url: str, *, ready: str = "!give.hidden", width: int = 900, dark: bool = False) -> None:
    """Load a page and wait until a JavaScript expression is true of it; its elements are there by their id."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    window.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    window.call("Emulation.setEmulatedMedia", features=[scheme])
    window.events.clear()
    window.call("Page.navigate", url=url)
    while not window.named("Page.loadEventFired"):
        window.events.append(window._receive())
    wait(window, ready)


def complaints(window: Browser) -> list[object]:
    return window.named(
        "Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Page.javascriptDialogOpening"
    )
