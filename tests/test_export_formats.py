"""Exported files of every format: the same pixels as Pillow's, the same answers as PyTorch's, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from onnx_networks import COLOUR, GREY, Convolutions, answer, image_of, seen
from test_export import PREPROCESSING, SIDES, Pair, Stubborn
from understudy.errors import DataError, ModelError
from understudy.export import conformance, runtimes
from understudy.export.formats import FORMATS
from understudy.export.graph import Exportable, read_card
from understudy.export.runtimes import Session, open_file
from understudy.record import Agreement, InputSpec

TORCH = ("torch", "torchscript")
LIBRARY = {"executorch": "executorch", "litert": "litert_torch"}
SPECS = {
    "colour in three steps": (COLOUR.model_copy(update={"sizes": (36, 20, 16)}), 3),
    "grey, squashed": (GREY.model_copy(update={"fit": "squash", "sizes": (18, 16)}), 1),
    "grey for a network of 3 channels": (COLOUR.model_copy(update={"channels": 1}), 3),
    "colour for a network of 1 channel": (GREY.model_copy(update={"channels": 3, "sizes": (12, 16)}), 1),
}
CLASSES = ["cat", "dög", 'a "b"', "猫"]


def exportable(spec: InputSpec = COLOUR, network_channels: int = 3, net: nn.Module | None = None) -> Exportable:
    net = net or Convolutions(network_channels, 4)
    return Exportable(net, spec, network_channels, CLASSES, {"architecture": "tiny", "data": "0123"})


def pixels_of(name: str, *, any_size: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Return what a file's graph lets the network see of an image: float [channels, size, size]."""
    spec, network_channels = PREPROCESSING[name]
    classes = [str(number) for number in range(network_channels * spec.size**2)]
    whole = Exportable(nn.Flatten(), spec, network_channels, classes, {}).whole(any_size=any_size)
    shape = (network_channels, spec.size, spec.size)
    return lambda image: whole(torch.from_numpy(image[None]))[1].numpy().reshape(shape)


def frames_of(spec: InputSpec, count: int = 9) -> np.ndarray:
    """Return frames as a store holds them, uint8 [count, channels, side, side]."""
    side = spec.sizes[0]
    return np.random.default_rng(1).integers(0, 256, (count, spec.channels, side, side), dtype=np.uint8)


def written(folder: Path, name: str, model: Exportable) -> Path:
    if name in LIBRARY and importlib.util.find_spec(LIBRARY[name]) is None:
        pytest.skip(f"{LIBRARY[name]} is not installed")
    path = folder / f"net{FORMATS[name].suffix}"
    FORMATS[name].write(model, path)
    return path


# The graph


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize("name", PREPROCESSING)
def test_an_image_of_the_first_size_keeps_its_exact_pixels(name: str, any_size: bool) -> None:
    spec, network_channels = PREPROCESSING[name]
    image = image_of(spec.sizes[0], spec.sizes[0], spec.channels)
    wanted = seen(image, spec, network_channels).numpy()
    # Grey by 16-bit weights, as Pillow's, is up to 1e-5 from grey by three decimals.
    grey = 1e-4 if spec.channels > network_channels else 0
    np.testing.assert_allclose(pixels_of(name, any_size=any_size)(image), wanted, rtol=1e-6, atol=3e-6 + grey)


@pytest.mark.parametrize("name", PREPROCESSING)
def test_an_image_of_any_size_is_what_pillow_makes_of_it(name: str) -> None:
    spec, network_channels = PREPROCESSING[name]
    look = pixels_of(name, any_size=True)
    for height, width in SIDES:
        image = image_of(height, width, spec.channels)
        off = look(image) - seen(image, spec, network_channels).numpy()
        levels = 255 * np.array(spec.std).reshape(-1, 1, 1) * np.abs(off)
        assert levels.max() < 1.01, (height, width)
        # Pillow resizes the columns of a tall image first and torch never does: where both axes round, more differ.
        tall = spec.fit == "squash" and height > width
        assert (levels > 0.5).mean() < (0.3 if tall else 0.02), (height, width)


# Files


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "name",
    [
        "torchscript",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "torch", "executorch", "litert")),
    ],
)
def test_a_file_answers_as_pytorch_does(
    tmp_path: Path, name: str, spec: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = exportable(*SPECS[spec])
    path = written(tmp_path, name, model)
    frames = frames_of(model.spec)
    inputs = [seen(frame.transpose(1, 2, 0), model.spec, model.network_channels) for frame in frames]
    wanted = answer(model.net, torch.stack(inputs))
    session = open_file(path, trusted=True)
    assert capfd.readouterr() == ("", "")
    agreement = conformance.compare(session, [frames[:4], frames[4:]], wanted, wanted.argmax(1))
    # Grey by 16-bit weights is a little off grey by three decimals.
    assert agreement.max_difference < (1e-4 if model.spec.channels > model.network_channels else 2e-6)
    conformance.check(agreement)
    assert session.channels == model.spec.channels
    assert (session.side, session.batch) == (
        (model.spec.sizes[0], 1) if name in ("executorch", "litert") else (None, None)
    )


@pytest.fixture(scope="module", params=TORCH)
def any_size(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Exportable, Path]:
    model = exportable(COLOUR.model_copy(update={"sizes": (18, 16)}))
    return model, written(tmp_path_factory.mktemp("files"), request.param, model)


@pytest.mark.slow
def test_8_bits_stay_8_bits_in_executorch(tmp_path: Path) -> None:
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    from understudy.compress import qat

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 96, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(96, 4)).eval()
    frames = frames_of(COLOUR, 24)
    inputs = torch.stack([seen(frame.transpose(1, 2, 0), COLOUR, 3) for frame in frames])
    quantized = qat.calibrate(net, [inputs])
    path = written(tmp_path, "executorch", exportable(net=quantized))
    whole = path.stat().st_size
    found = open_file(path)(frames.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(found, answer(quantized, inputs), atol=5e-3)
    assert whole < 0.6 * written(tmp_path, "executorch", exportable(net=net)).stat().st_size


def test_files_of_torch_take_images_of_any_size(any_size: tuple[Exportable, Path]) -> None:
    model, path = any_size
    session, whole = open_file(path, trusted=True), model.whole(any_size=True)
    for count, (height, width) in enumerate(SIDES, 1):
        images = np.stack([image_of(height, width, 3)] * count)
        with torch.no_grad():
            wanted = whole(torch.from_numpy(images))[0].numpy()
        np.testing.assert_allclose(session(images), wanted, atol=1e-6)


def test_a_file_is_described_beside_it_and_inside(any_size: tuple[Exportable, Path]) -> None:
    model, path = any_size
    card = read_card(path)
    assert card["labels"] == CLASSES
    assert InputSpec.model_validate(card["input"]) == model.spec
    assert (card["architecture"], card["provenance"], card["side"]) == ("tiny", {"data": "0123"}, None)
    kept: dict[str, Any] = {runtimes.DESCRIPTION: ""}
    if path.suffix == ".pt2":
        torch.export.load(path, extra_files=kept)
    else:
        with pytest.warns(FutureWarning, match="deprecated"):
            torch.jit.load(path, _extra_files=kept)
    del card["hash"]
    assert json.loads(kept[runtimes.DESCRIPTION]) == card


def test_a_card_of_another_file_is_refused(any_size: tuple[Exportable, Path], tmp_path: Path) -> None:
    path = tmp_path / any_size[1].name
    path.write_bytes(any_size[1].read_bytes() + b" ")
    with pytest.raises(ModelError, match="has no card"):
        read_card(path)
    (tmp_path / f"{path.name}.json").write_bytes(any_size[1].with_name(f"{path.name}.json").read_bytes())
    with pytest.raises(ModelError, match="is not the file that"):
        read_card(path)
    (tmp_path / f"{path.name}.json").write_text("{}")
    with pytest.raises(ModelError, match="is no card"):
        read_card(path)


def test_the_temperature_divides_the_logits(tmp_path: Path) -> None:
    net = Convolutions(1, 4)
    model = Exportable(net, GREY, 1, CLASSES, {}, temperature=2.5)
    path = written(tmp_path, "torchscript", model)
    image = image_of(16, 16, 1)
    with torch.no_grad():
        wanted = (net(seen(image, GREY, 1)[None]) / 2.5).softmax(1).numpy()
    np.testing.assert_allclose(open_file(path, trusted=True)(image[None]), wanted, atol=1e-6)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ModelError, match="temperature must be"):
            Exportable(net, GREY, 1, CLASSES, {}, temperature=wrong)


def test_the_network_is_left_alone(tmp_path: Path) -> None:
    net = Convolutions(1, 4).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    written(tmp_path, "torchscript", exportable(GREY, 1, net))
    assert all(module.training for module in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


# What is refused


@pytest.mark.parametrize(("net", "message"), [(Pair(), "with a tuple"), (Convolutions(1, 3), r"with \[2, 3\], but 4")])
def test_what_gives_no_logits_of_the_classes(net: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        exportable(GREY, 1, net)


def test_what_torch_cannot_capture(tmp_path: Path) -> None:
    model = Exportable(Stubborn(), GREY, 1, ["a", "b"], {})
    with pytest.raises(ModelError, match=r"'Stubborn' cannot be exported for torch\.export: ") as error:
        FORMATS["torch"].write(model, tmp_path / "net.pt2")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "suffix",
    [
        ".pt2",
        ".torchscript",
        ".onnx",
        *(pytest.param(suffix, marks=pytest.mark.slow) for suffix in (".pte", ".tflite")),
    ],
)
def test_damaged_and_missing_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    with pytest.raises(ModelError, match="does not exist or is not a file"):
        open_file(path, trusted=True)
    for content in (b"", b"neither weights nor graph", bytes(4000)):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"is damaged or not a|is not installed") as error:
            open_file(path, trusted=True)
        assert "\n" not in str(error.value)


def test_a_file_of_a_kind_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Unknown kind of exported file '\.onx'. Did you mean '\.onnx'"):
        open_file(tmp_path / "net.onx")


def test_programs_of_strangers_are_not_opened(
    any_size: tuple[Exportable, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for loader in (torch.export, torch.jit):
        monkeypatch.setattr(loader, "load", lambda *given, **more: pytest.fail("it was opened"))
    with pytest.raises(ModelError, match="is a program: opening it can run any code"):
        open_file(any_size[1])


def test_files_that_others_wrote(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(ModelError, match="was not exported by understudy"):
        open_file(tmp_path / "net.pt2", trusted=True)


@pytest.mark.parametrize(("name", "library"), [("executorch", "executorch"), ("litert", "litert_torch")])
def test_a_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str) -> None:
    parts = [module for module in sys.modules if module.startswith(f"{library}.")]  # an earlier test imported them
    for module in (library, f"{library}.runtime", "ai_edge_litert.interpreter", *parts):
        monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / f"net{FORMATS[name].suffix}"
    with pytest.raises(ModelError, match=rf"is not installed. .*understudy\[{name}\]"):
        FORMATS[name].write(exportable(), path)
    path.write_bytes(b"any")
    with pytest.raises(ModelError, match=rf"is not installed. .*understudy\[{name}\]"):
        open_file(path)


# Sessions


class Counting:
    """Answers with the mean grey level of each image, and notes how many images a run had."""

    def __init__(self) -> None:
        self.runs: list[int] = []

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.runs.append(len(images))
        share = images.reshape(len(images), -1).mean(1) / 255
        return np.stack([share, 1 - share], 1).astype(np.float32)


def session(answers: Counting, *, batch: int | None = None, side: int | None = None) -> Session:
    return Session("a runtime 1.0", 1, 1, side, batch, answers)


@pytest.mark.parametrize(("batch", "runs"), [(None, [10]), (1, [1] * 10), (4, [4, 4, 4])])
def test_a_fixed_batch_runs_several_times(batch: int | None, runs: list[int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 6, 6, 1), dtype=np.uint8)
    answers = Counting()
    found = session(answers, batch=batch)(images)
    assert answers.runs == runs
    np.testing.assert_array_equal(found, Counting()(images))


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 6, 6, 3), np.uint8),
        np.zeros((1, 6, 6, 1), np.float32),
        np.zeros((6, 6, 1), np.uint8),
        np.zeros((0, 6, 6, 1), np.uint8),
        np.zeros((1, 6, 7, 1), np.uint8),
    ],
)
def test_images_that_a_file_does_not_take(images: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"takes uint8 images \[6, 6, 1\].*grey and resize it first"):
        session(Counting(), side=6)(images)


def test_conformance_works_on_any_session() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (10, 1, 6, 6), dtype=np.uint8)
    wanted = Counting()(frames)
    open_one = session(Counting(), batch=4, side=6)
    agreement = conformance.compare(open_one, [frames], wanted, wanted.argmax(1))
    assert (agreement.images, agreement.max_difference, agreement.agreement, agreement.accuracy) == (10, 0, 1, 1)
    timed = conformance.latency(open_one, frames[0].transpose(1, 2, 0), runs=120, seconds=60)
    assert (timed.runtime, timed.runs) == ("a runtime 1.0", 120)
    assert timed.p99 is not None
    assert timed.p50 <= timed.p95 <= timed.p99
    assert conformance.latency(open_one, frames[0].transpose(1, 2, 0), runs=20, seconds=60).p99 is None


def test_8_bits_are_judged_by_their_answers() -> None:
    far = Agreement(images=200, max_difference=0.4, agreement=0.97, accuracy=0.9, tolerance=1e-4)
    conformance.check_quantized(far, 0.97)
    with pytest.raises(ModelError, match=r"answers 6 of 200 images otherwise .*allowed: 2\.0%"):
        conformance.check_quantized(far, 0.98)
