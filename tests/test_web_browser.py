"""The web page in a real browser: what a user does with it, no other origin, plain words when it cannot."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from browser import Browser
from test_web import CLASSES, HOSTILE, frames
from understudy.data.decode import decode_upright
from understudy.export import conformance
from web_pages import Server, complaints, engine, exported, needs_chromium, server, site, visit, wait, window

__all__ = ["engine", "exported", "server", "site", "window"]  # fixtures

pytestmark = [
    pytest.mark.slow,  # npm may have to fetch the engine
    needs_chromium,
]


def choose(window: Browser, file: Path) -> str:
    """Give a file to the page as a user does in the browser's dialogue; return what the page says of it."""
    window.evaluate("document.getElementById('status').textContent = ''")
    root = window.call("DOM.getDocument")["root"]["nodeId"]
    node = window.call("DOM.querySelector", nodeId=root, selector="#choose")["nodeId"]
    window.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])
    return said(window)


def said(window: Browser) -> str:
    status = "document.getElementById('status').textContent"
    wait(window, f"!['', 'Working …'].includes({status})")
    return str(window.evaluate(status))


def shown(window: Browser) -> dict[str, float]:
    """Return percentages by class, in the order of the page."""
    rows = "[...classes.children].map(row => [...row.querySelectorAll('.class, .value')].map(one => one.textContent))"
    return {name: float(value.removesuffix("\u00a0%")) for name, value in window.evaluate(rows)}


# The page


@pytest.mark.parametrize(("name", "size"), [("tall.png", (60, 97)), ("wide.png", (300, 75)), ("tiny.png", (5, 4))])
def test_a_chosen_image_is_answered(
    window: Browser, server: Server, exported: Path, tmp_path: Path, name: str, size: tuple[int, int]
) -> None:
    Image.fromarray(frames(1, 64, 3)[0]).resize(size).save(tmp_path / name)
    visit(window, f"{server.address}/a%20b/colour/")
    text = choose(window, tmp_path / name)
    expected = conformance.predict(exported, decode_upright(tmp_path / name, channels=3))
    order = (-expected).argsort()
    found = shown(window)
    assert list(found) == [CLASSES[one] for one in order]
    assert list(found.values()) == pytest.approx(100 * expected[order], abs=0.0501)
    assert text.startswith(f"{name}: {CLASSES[order[0]]}, ")
    assert text.endswith("\u00a0ms")
    widths = window.evaluate("[...document.querySelectorAll('.bar span')].map(one => parseFloat(one.style.width))")
    assert widths == pytest.approx(100 * expected[order], abs=1e-2)
    seen = window.evaluate("document.getElementById('seen').textContent")
    assert seen == f"{size[0]}\u202f×\u202f{size[1]} pixels; the model sees the middle square"


def test_an_image_may_be_dropped_or_pasted(window: Browser, server: Server, tmp_path: Path) -> None:
    visit(window, f"{server.address}/a%20b/grey/")
    files = []
    for number, image in enumerate(frames(2, 32, 3)):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(files[-1])
    choose(window, files[1])
    answers = [shown(window)]
    data = {"items": [], "files": [str(files[0])], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        window.call("Input.dispatchDragEvent", type=kind, x=450, y=250, data=data)
    wait(window, "document.getElementById('status').textContent.startsWith('0.png: ')")
    answers.append(shown(window))
    assert answers[0] != answers[1]
    window.evaluate(f"""(async () => {{
        const data = new DataTransfer();
        const canvas = new OffscreenCanvas(8, 8);
        canvas.getContext("2d").fillRect(0, 0, 8, 8);
        data.items.add(new File([await canvas.convertToBlob()], "{HOSTILE}", {{ type: "image/png" }}));
        document.dispatchEvent(new ClipboardEvent("paste", {{ clipboardData: data }}));
    }})()""")
    wait(window, f"document.getElementById('status').textContent.startsWith('{HOSTILE}: ')")
    assert shown(window) not in answers
    assert complaints(window) == []


def test_the_camera_opens_and_closes(window: Browser, server: Server) -> None:
    visit(window, f"{server.address}/a%20b/colour/")
    assert window.evaluate("document.getElementById('photograph').hidden") is True
    window.evaluate("document.getElementById('open-camera').click()")
    wait(window, "document.activeElement.id === 'shoot'")
    window.evaluate("window.track = document.getElementById('video').srcObject.getTracks()[0]")
    window.evaluate("document.getElementById('shoot').click()")
    wait(window, "document.getElementById('status').textContent.startsWith('The photograph: ')")
    assert sum(shown(window).values()) == pytest.approx(100, abs=0.2)
    window.press("Escape", 27)
    assert window.evaluate(
        "[track.readyState, document.activeElement.id, document.getElementById('camera').hidden]"
    ) == [
        "ended",
        "open-camera",
        True,
    ]


def test_names_are_text_and_nothing_is_asked_of_others(window: Browser, server: Server, tmp_path: Path) -> None:
    elsewhere = Server(tmp_path)
    visit(window, f"{server.address}/a%20b/colour/?check", ready="document.querySelector('[data-passed]')")
    assert window.evaluate("document.querySelectorAll('img').length") == 0
    assert window.evaluate("[document.title, document.querySelector('h1').textContent]") == [f"colour {HOSTILE}"] * 2
    assert HOSTILE in window.evaluate("[...document.querySelectorAll('dd')].map(one => one.textContent)")
    asked = [event["request"]["url"] for event in window.named("Network.requestWillBeSent")]
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith(f"{server.address}/a%20b/colour/")] == []
    assert complaints(window) == []
    # What escaping might miss, the policy stops.
    for attempt in (f"fetch('{elsewhere.address}/x')", f"import('{elsewhere.address}/x.js')"):
        assert window.evaluate(f"(async () => {attempt})().then(() => 'done', () => 'stopped')") == "stopped"
    window.evaluate(
        f"document.body.insertAdjacentHTML('beforeend', '<img src={elsewhere.address}/x.png onerror=alert(1)>')"
    )
    window.evaluate("new Promise(done => setTimeout(done, 50))")
    assert window.named("Page.javascriptDialogOpening") == []
    assert elsewhere.asked == []
    elsewhere.shutdown()
    elsewhere.server_close()


def test_what_cannot_be_shown_is_said(window: Browser, server: Server, tmp_path: Path) -> None:
    visit(window, f"{server.address}/a%20b/colour/")
    for name, data in {"cut.png": b"\x89PNG\r\n\x1a\n", "empty.jpg": b"", "text.png": b"no image"}.items():
        (tmp_path / name).write_bytes(data)
        assert choose(window, tmp_path / name) == (
            f"{name} is damaged or of a kind that this browser cannot show. Save it as JPEG or PNG."
        )
    assert window.evaluate("document.getElementById('status').className") == "failed"
    assert window.evaluate("document.getElementById('answer').hidden") is True


def test_a_folder_that_is_not_whole(window: Browser, server: Server, site: Path) -> None:
    page = site / "a b" / "colour"
    shutil.copytree(page, site / "part", copy_function=os.link)
    failed = "document.querySelector('#status.failed')"
    status = "document.getElementById('status').textContent"
    for name, message in {
        "engine/ort.wasm.min.js": "Failed to fetch dynamically imported module",
        "model.onnx": "model.onnx is not on the server (404). Copy the whole folder to it.",
    }.items():
        (site / "part" / name).unlink()
        visit(window, f"{server.address}/part/", ready=failed)
        assert window.evaluate(status).startswith(f"The model could not be loaded: {message}")
        os.link(page / name, site / "part" / name)
    (site / "part" / "model.onnx").unlink()
    (site / "part" / "model.onnx").write_bytes(b"of before")
    visit(window, f"{server.address}/part/", ready=failed)
    assert "model.onnx and model.json differ" in window.evaluate(status)


def test_opened_from_the_disk_it_says_what_to_do(window: Browser, site: Path) -> None:
    address = (site / "a b" / "colour" / "index.html").as_uri()
    notice = "getComputedStyle(document.getElementById('unserved')).visibility === 'visible'"
    visit(window, address, ready=notice)
    assert "python3 -m http.server" in window.evaluate("document.getElementById('unserved').innerText")
    assert window.evaluate("document.getElementById('give').hidden") is True
    assert complaints(window) == []
    window.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        visit(window, address, ready=notice)
    finally:
        window.call("Emulation.setScriptExecutionDisabled", value=False)


def test_every_control_has_a_name_and_can_be_reached(window: Browser, server: Server) -> None:
    visit(window, f"{server.address}/a%20b/colour/")
    reached = []
    for _ in range(4):
        window.press("Tab", 9)
        reached.append(window.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert reached == ["choose", "open-camera", "check-page", "About the model"]
    nodes = window.call("Accessibility.getFullAXTree")["nodes"]
    named = {(node["role"]["value"], node["name"]["value"]) for node in nodes if not node["ignored"] and "name" in node}
    assert {("button", "Choose an image"), ("button", "Use the camera"), ("button", "Check this page")} <= named
    assert not [role for role, name in named if role in ("button", "region", "heading") and not name]


def test_it_fits_a_telephone_and_follows_the_theme(window: Browser, server: Server, tmp_path: Path) -> None:
    Image.fromarray(frames(1, 64, 3)[0]).save(tmp_path / ("a" * 100 + ".png"))
    grounds = []
    for dark in (False, True):
        visit(window, f"{server.address}/a%20b/colour/", width=320, dark=dark)
        choose(window, tmp_path / ("a" * 100 + ".png"))
        window.evaluate("document.querySelector('details').open = true")
        assert window.evaluate("document.documentElement.scrollWidth") == 320
        grounds.append(window.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(252, 252, 250)", "rgb(22, 24, 26)"]


def test_a_huge_photograph_is_shrunk_and_the_page_says_so(
    window: Browser, server: Server, exported: Path, tmp_path: Path
) -> None:
    huge = tmp_path / "huge.png"
    Image.fromarray(frames(1, 64, 3)[0]).resize((4200, 4100), Image.Resampling.NEAREST).save(huge, compress_level=1)
    visit(window, f"{server.address}/a%20b/colour/")
    choose(window, huge)
    assert "Shrunk to 16.8 megapixels first" in window.evaluate("document.getElementById('seen').textContent")
    expected = conformance.predict(exported, decode_upright(huge, channels=3))
    assert [shown(window)[name] for name in CLASSES] == pytest.approx(100 * expected, abs=1)


def test_many_classes_are_folded(window: Browser, server: Server, tmp_path: Path) -> None:
    visit(window, f"{server.address}/a%20b/grey/")
    Image.fromarray(frames(1, 32, 3)[0]).save(tmp_path / "a.png")
    choose(window, tmp_path / "a.png")
    visible = "[...document.querySelectorAll('#classes li')].filter(row => row.offsetHeight).length"
    assert window.evaluate(visible) == 10
    window.evaluate("document.getElementById('all').click()")
    assert window.evaluate(visible) == 12
