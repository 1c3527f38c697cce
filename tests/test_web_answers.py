"""What the web page answers in a real browser: PyTorch's answers, from the pixels that Pillow sees."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from browser import Browser
from test_web import CLASSES, frames, write_golden
from understudy import storage
from understudy.data.decode import decode_upright
from understudy.export import conformance, int8, web
from web_pages import MANY, Server, complaints, engine, exported, needs_chromium, server, site, visit, window

__all__ = ["engine", "exported", "server", "site", "window"]  # fixtures

pytestmark = [
    pytest.mark.slow,  # npm may have to fetch the engine
    needs_chromium,
]


def check(window: Browser, url: str) -> dict[str, Any]:
    visit(window, f"{url}/?check", ready="document.getElementById('check-result').dataset.passed")
    found = window.evaluate("({...document.getElementById('check-result').dataset})")
    return {key: json.loads(value) for key, value in found.items()} | {
        "text": window.evaluate("document.getElementById('check-result').textContent")
    }


@pytest.mark.parametrize("kind", ["colour", "grey"])
def test_its_answers_are_pytorchs(window: Browser, server: Server, kind: str) -> None:
    found = check(window, f"{server.address}/a%20b/{kind}")
    assert (found["passed"], found["same"], found["images"]) == (True, 16, 16)
    assert 0 < found["largest"] < 1e-5
    assert found["text"].startswith("16 of 16 as expected; largest difference ")
    assert complaints(window) == []


def test_a_file_of_8_bits_runs(
    window: Browser, server: Server, site: Path, exported: Path, engine: Path, tmp_path: Path
) -> None:
    images, path = frames(16, 32, 3), tmp_path / "int8.onnx"
    int8.quantize(exported, path, [images])
    answers = np.stack([conformance.predict(path, image) for image in images])
    assert abs(answers - [conformance.predict(exported, image) for image in images]).max() > 1e-3
    write_golden(tmp_path / "golden", path, images, answers, CLASSES, eight_bits=True)
    web.export_web(site / "int8", path, golden=tmp_path / "golden", engine=engine, title="8 bits")
    found = check(window, f"{server.address}/int8")
    assert (found["passed"], found["same"], found["images"]) == (True, 16, 16)
    assert found["largest"] < 0.05
    assert "allowed" not in found["text"]


def test_the_check_finds_what_is_wrong(window: Browser, server: Server, site: Path) -> None:
    answers = site / "a b" / "grey" / "golden" / "answers.json"
    kept = answers.read_bytes()
    wrong = json.loads(kept)
    wrong["images"][3]["probabilities"][0] += 2e-4
    least = np.argmin(wrong["images"][5]["probabilities"])
    wrong["images"][5]["probabilities"] = [float(one == least) for one in range(len(MANY))]
    try:
        storage.write_json(answers, wrong)
        found = check(window, f"{server.address}/a%20b/grey")
        assert (found["passed"], found["same"], found["images"]) == (False, 15, 16)
        assert found["largest"] > 0.5
        del wrong["images"][5]
        storage.write_json(answers, wrong)
        found = check(window, f"{server.address}/a%20b/grey")
        assert (found["passed"], found["same"], found["images"]) == (False, 15, 15)
        assert found["largest"] == pytest.approx(2e-4, rel=0.01)
        storage.write_json(answers, {**wrong, "by_class": True})
        assert check(window, f"{server.address}/a%20b/grey")["passed"] is True
        answers.unlink()
        visit(window, f"{server.address}/a%20b/grey/?check", ready="document.querySelector('[data-passed=false]')")
        text = window.evaluate("document.getElementById('check-result').textContent")
        assert text == "golden/answers.json is not on the server (404). Copy the whole folder to it."
    finally:
        answers.write_bytes(kept)


# Pixels


def pictures(folder: Path) -> dict[str, Path]:
    """Write images whose pixels a browser and Pillow could see differently."""
    rng = np.random.default_rng(7)
    colour = Image.fromarray(rng.integers(0, 256, (30, 41, 3), dtype=np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (30, 41, 4), dtype=np.uint8))
    linear = PngImagePlugin.PngInfo()
    linear.add(b"gAMA", struct.pack(">I", 100000))
    clear = colour.quantize(32)
    clear.info["transparency"] = 3
    files = {
        "colour.png": (colour, {}),
        "grey.png": (colour.convert("L"), {}),
        "alpha.png": (alpha, {}),
        "grey and alpha.png": (alpha.convert("LA"), {}),
        "palette.png": (clear, {"transparency": 3}),
        "linear.png": (colour, {"pnginfo": linear}),
        "one bit.png": (colour.convert("1"), {}),
        "colour.bmp": (colour, {}),
        "still.gif": (colour.quantize(64), {}),
        "lossless.webp": (colour, {"lossless": True}),
        "one pixel.png": (colour.crop((0, 0, 1, 1)), {}),
    }
    for name, (image, options) in files.items():
        image.save(folder / name, **options)
    return {name: folder / name for name in files}


def read(window: Browser, page: str, file: str, channels: int) -> np.ndarray:
    """Return the pixels that the page would give the model."""
    found = window.evaluate(f"""(async () => {{
        const {{ decode, read }} = await import("{page}/classify.js");
        const bitmap = await decode(await (await fetch("{file}")).blob());
        const {{ pixels, width, height }} = read(bitmap, {channels});
        return [[...pixels], height, width];
    }})()""")
    return np.uint8(found[0]).reshape(found[1], found[2], channels)


def test_it_sees_the_pixels_that_pillow_sees(window: Browser, server: Server, site: Path) -> None:
    (site / "pictures").mkdir()
    page = f"{server.address}/a%20b/colour"
    visit(window, page + "/")
    for name, file in pictures(site / "pictures").items():
        for channels in (1, 3):
            expected = decode_upright(file, channels=channels)
            found = read(window, page, f"{server.address}/pictures/{name}", channels)
            assert np.array_equal(found, expected), name


def test_photographs_are_upright(window: Browser, server: Server, site: Path) -> None:
    image = Image.fromarray(frames(1, 64, 3)[0]).resize((64, 40))
    page = f"{server.address}/a%20b/colour"
    visit(window, page + "/")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(site / "turned.jpg", exif=exif, quality=95, subsampling=0)
        expected = decode_upright(site / "turned.jpg", channels=3).astype(int)
        found = read(window, page, f"{server.address}/turned.jpg?{orientation}", 3).astype(int)
        assert found.shape == expected.shape
        assert abs(found - expected).max() <= 1  # decoders of JPEG may round otherwise
