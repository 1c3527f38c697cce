"""The ONNX file: preprocessing against Pillow, answers against PyTorch, labels, and the check that refuses it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn
from torch.nn import functional as F

from understudy.errors import DataError, ModelError
from understudy.export import conformance
from understudy.export.onnx import describe, export_onnx, labels
from understudy.record import Agreement, InputSpec

GREY = InputSpec(channels=1, sizes=(16,), mean=(0.45,), std=(0.25,))
COLOUR = InputSpec(channels=3, sizes=(16,), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PREPROCESSING = {
    "grey": (GREY, 1),
    "colour": (COLOUR, 3),
    "grey for a network of 3 channels": (GREY, 3),
    "grey, with a mean for each of 3 channels": (COLOUR.model_copy(update={"channels": 1}), 3),
    "colour for a network of 1 channel": (GREY.model_copy(update={"channels": 3}), 1),
    "squash": (COLOUR.model_copy(update={"fit": "squash"}), 3),
    "smaller in two steps": (COLOUR.model_copy(update={"sizes": (36, 20, 16)}), 3),
    "larger, and one step that is none": (GREY.model_copy(update={"sizes": (12, 12, 16)}), 1),
}
SIDES = [(16, 16), (17, 16), (64, 64), (61, 97), (200, 75), (9, 9), (5, 16), (16, 300), (1, 1), (400, 400)]


def image_of(height: int, width: int, channels: int) -> np.ndarray:
    """Return noise over smooth patches, uint8 [height, width, channels], with both ends of the range in it."""
    rng = np.random.default_rng([height, width, channels])
    patches = rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + rng.integers(-40, 40, smooth.shape)).clip(0, 255).astype(np.uint8)[..., :channels]


def seen(image: np.ndarray, spec: InputSpec, network_channels: int) -> torch.Tensor:
    """Return what the network must see, by Pillow and PyTorch: float [network_channels, size, size]."""
    picture = Image.fromarray(image if spec.channels == 3 else image[..., 0])
    if spec.fit == "crop":
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    frame = np.array(picture.resize((spec.sizes[0], spec.sizes[0]), Image.Resampling.BILINEAR))
    view = torch.from_numpy(frame).reshape(*frame.shape[:2], -1).permute(2, 0, 1)[None].double() / 255
    for size in spec.sizes[1:]:
        view = F.interpolate(view, [size, size], mode="bilinear", antialias=True, align_corners=False)
    if spec.channels > network_channels:
        view = 0.299 * view[:, :1] + 0.587 * view[:, 1:2] + 0.114 * view[:, 2:]
    view = view.expand(-1, network_channels, -1, -1)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (spec.mean, spec.std))
    return ((view - mean) / std)[0].float()


class Convolutions(nn.Sequential):
    """A convolution, batch normalisation with running statistics that matter, and a head."""

    def __init__(self, channels: int, classes: int, *, running: bool = True) -> None:
        normalise = nn.BatchNorm2d(12, track_running_stats=running)
        super().__init__(
            nn.Conv2d(channels, 12, 3, stride=2),
            normalise,
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.LazyLinear(classes),
        )
        generator = torch.Generator().manual_seed(0)
        self(torch.rand(2, channels, 16, 16, generator=generator))
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.4 * (tensor.ndim > 1))
        with torch.no_grad():
            self[-1].weight *= 0.03  # logits of a few units, so that probabilities are neither 0 nor 1
        self.eval()


class Constant(nn.Module):
    """Answers every image with the same logits."""

    def __init__(self, logits: Sequence[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits + 0 * images.flatten(1).sum(1, keepdim=True)


def write(path: Path, net: nn.Module, spec: InputSpec, network_channels: int, classes: int) -> Path:
    names = [f"class {i}" for i in range(classes)]
    export_onnx(net, spec, network_channels=network_channels, classes=names, path=path, provenance={})
    return path


def answer(net: nn.Module, inputs: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return net(inputs).softmax(1).numpy()


def outputs(path: Path, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    session = conformance.open_session(path, threads=1)
    probabilities, logits = session.run(["probabilities", "logits"], {"image": images})
    return probabilities, logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def pixels(folder: Path) -> Callable[[str], Path]:
    """Return files whose logits are the pixels that the network sees."""

    @cache
    def exported(name: str) -> Path:
        spec, network_channels = PREPROCESSING[name]
        return write(folder / f"{name}.onnx", nn.Flatten(), spec, network_channels, network_channels * spec.size**2)

    return exported


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return Convolutions(3, 4)


@pytest.fixture(scope="module")
def file(folder: Path, net: nn.Module) -> Path:
    path = folder / "net.onnx"
    provenance = {"architecture": "tiny", "data": "0123"}
    names = ["cat", "dög", 'a "b" </script>', "猫"]
    export_onnx(net, COLOUR, network_channels=3, classes=names, path=path, provenance=provenance)
    return path


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Stored frames at the size of `sizes[0]`, uint8 [images, channels, side, side]."""
    return np.random.default_rng(1).integers(0, 256, (70, 3, 16, 16), dtype=np.uint8)


@pytest.fixture(scope="module")
def expected(net: nn.Module, frames: np.ndarray) -> np.ndarray:
    return answer(net, torch.stack([seen(frame.transpose(1, 2, 0), COLOUR, 3) for frame in frames]))


# Preprocessing


@pytest.mark.parametrize("name", PREPROCESSING)
def test_an_image_of_the_first_size_keeps_its_exact_pixels(pixels: Callable[[str], Path], name: str) -> None:
    spec, network_channels = PREPROCESSING[name]
    image = image_of(spec.sizes[0], spec.sizes[0], spec.channels)
    _, logits = outputs(pixels(name), image[None])
    wanted = seen(image, spec, network_channels).numpy()
    # Grey by 16-bit weights, as Pillow's, is up to 1e-5 from grey by three decimals.
    grey = 1e-4 if spec.channels > network_channels else 0
    np.testing.assert_allclose(logits.reshape(wanted.shape), wanted, rtol=1e-6, atol=2e-6 + grey)


@pytest.mark.parametrize("name", PREPROCESSING)
def test_an_image_of_any_size_is_what_pillow_makes_of_it(pixels: Callable[[str], Path], name: str) -> None:
    spec, network_channels = PREPROCESSING[name]
    for height, width in SIDES:
        image = image_of(height, width, spec.channels)
        probabilities, logits = outputs(pixels(name), image[None])
        wanted = seen(image, spec, network_channels)
        levels = 255 * np.array(spec.std).reshape(-1, 1, 1) * np.abs(logits.reshape(wanted.shape) - wanted.numpy())
        assert levels.max() < 1.01, (height, width)
        # Pillow resizes the columns of a tall image first and the graph never does: where both axes round, more differ.
        tall = spec.fit == "squash" and height > width
        assert (levels > 0.5).mean() < (0.3 if tall else 0.02), (height, width)
        np.testing.assert_allclose(probabilities, torch.from_numpy(logits).softmax(1), rtol=1e-5)


def test_images_of_a_batch_are_taken_one_by_one(pixels: Callable[[str], Path]) -> None:
    images = np.stack([image_of(40, 52, 3), image_of(40, 52, 3)[::-1], np.zeros((40, 52, 3), np.uint8)])
    _, together = outputs(pixels("colour"), images)
    alone = np.concatenate([outputs(pixels("colour"), image[None])[1] for image in images])
    np.testing.assert_array_equal(together, alone)


def test_real_radiographs_are_what_pillow_makes_of_them(pixels: Callable[[str], Path], shared_data: Path) -> None:
    paths = sorted((shared_data / "chest_xray").glob("val/*/*.*"))
    if not paths:
        pytest.skip("no chest_xray in the shared data")
    for path in paths:
        image = np.asarray(Image.open(path).convert("L"))[..., None]
        _, logits = outputs(pixels("grey"), image[None])
        levels = np.abs(logits.reshape(1, 16, 16) - seen(image, GREY, 1).numpy()) * 0.25 * 255
        assert levels.max() < 1.01


# Answers


@pytest.mark.parametrize("images", [1, 2, 7])
def test_the_file_answers_as_the_network_does(
    file: Path, frames: np.ndarray, expected: np.ndarray, images: int
) -> None:
    probabilities, logits = outputs(file, frames[:images].transpose(0, 2, 3, 1))
    np.testing.assert_allclose(probabilities, expected[:images], atol=1e-6)
    np.testing.assert_allclose(probabilities, torch.from_numpy(logits).softmax(1), atol=1e-6)


def test_predict_is_the_answer_to_one_image(file: Path, net: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    image = image_of(16, 16, 3)
    np.testing.assert_allclose(
        conformance.predict(file, image), answer(net, seen(image, COLOUR, 3)[None])[0], atol=1e-6
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_network_that_normalises_by_the_batch_agrees_on_the_same_batch(folder: Path, frames: np.ndarray) -> None:
    net = Convolutions(3, 4, running=False)
    path = write(folder / "batch.onnx", net, COLOUR, 3, 4)
    inputs = torch.stack([seen(frame.transpose(1, 2, 0), COLOUR, 3) for frame in frames])
    batches = [frames[:50], frames[50:]]
    same = np.concatenate([answer(net, inputs[:50]), answer(net, inputs[50:])])
    agreement = conformance.compare(path, batches, same, same.argmax(1))
    assert agreement.max_difference < 1e-5
    assert conformance.compare(path, [frames], same, same.argmax(1)).max_difference > 1e-3
    assert describe(path)["batch_statistics"] is True
    assert conformance.depends_on_batch(path, frames, 1e-3)
    assert not conformance.depends_on_batch(write(folder / "own.onnx", Convolutions(3, 4), COLOUR, 3, 4), frames, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet18", "mobilenet_v3_small", "vit_tiny_patch16_224"])
def test_networks_of_the_libraries(tmp_path: Path, architecture: str, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    if architecture.startswith("vit"):
        timm = pytest.importorskip("timm")
        net = timm.create_model(architecture, num_classes=5, img_size=64).eval()
    else:
        models = pytest.importorskip("torchvision.models")
        net = models.get_model(architecture, num_classes=5).eval()
    spec = COLOUR.model_copy(update={"sizes": (72, 64)})
    capfd.readouterr()
    path = write(tmp_path / "net.onnx", net, spec, 3, 5)
    assert capfd.readouterr() == ("", "")
    frames = np.random.default_rng(0).integers(0, 256, (5, 3, 72, 72), dtype=np.uint8)
    wanted = answer(net, torch.stack([seen(frame.transpose(1, 2, 0), spec, 3) for frame in frames]))
    agreement = conformance.compare(path, [frames[:1], frames[1:]], wanted, wanted.argmax(1))
    assert agreement.max_difference < 1e-5
    conformance.check(agreement)


# The file


def test_the_file_says_what_it_is(file: Path) -> None:
    assert labels(file) == ["cat", "dög", 'a "b" </script>', "猫"]
    described = describe(file)
    assert InputSpec.model_validate(described.pop("input")) == COLOUR
    assert described.pop("version")
    assert described == {
        "format": "understudy-onnx/1",
        "architecture": "tiny",
        "network_channels": 3,
        "batch_statistics": False,
        "temperature": 1.0,
        "precision": "float32",
        "provenance": {"data": "0123"},
    }


def test_logits_are_divided_by_the_temperature(tmp_path: Path, net: nn.Module, file: Path) -> None:
    path = tmp_path / "net.onnx"
    names = list("abcd")
    export_onnx(net, COLOUR, network_channels=3, classes=names, path=path, provenance={}, temperature=2.5)
    images = np.stack([image_of(16, 16, 3), image_of(16, 16, 3)[::-1]])
    probabilities, divided = outputs(path, images)
    np.testing.assert_allclose(divided, outputs(file, images)[1] / 2.5, rtol=1e-6)
    np.testing.assert_allclose(probabilities, torch.from_numpy(divided).softmax(1), atol=1e-6)
    assert np.ptp(divided) > 0.1
    assert describe(path)["temperature"] == 2.5
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite temperature above 0"):
            export_onnx(net, COLOUR, network_channels=3, classes=names, path=path, provenance={}, temperature=wrong)


def test_nodes_are_named_by_their_modules(file: Path) -> None:
    names = [node.name for node in onnx.load(file).graph.node]
    assert len(set(names)) == len(names)
    assert [name for name in names if not name.startswith("image/")] == [
        *("0/Conv", "2/Relu", "4/Reshape", "5/Gemm"),
        "softmax",
    ]


def test_its_interface_is_named(file: Path) -> None:
    session = conformance.open_session(file, threads=1)
    interface = [(node.name, node.type, node.shape) for node in [*session.get_inputs(), *session.get_outputs()]]
    assert interface == [
        ("image", "tensor(uint8)", ["batch", "height", "width", 3]),
        ("probabilities", "tensor(float)", ["batch", 4]),
        ("logits", "tensor(float)", ["batch", 4]),
    ]
    model = onnx.load(file)
    assert "tiny" in model.doc_string
    assert all(node.doc_string for node in [*model.graph.input, *model.graph.output])


def test_it_holds_no_paths_of_this_machine(file: Path) -> None:
    data = file.read_bytes()
    for trace in (b"site-packages", b"stack_trace", b"container.py", sys.prefix.encode(), str(Path.cwd()).encode()):
        assert trace not in data


@pytest.mark.slow
def test_the_same_network_gives_the_same_bytes_and_is_left_alone(tmp_path: Path) -> None:
    net = Convolutions(1, 2).train()
    net[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    first = write(tmp_path / "a.onnx", net, GREY, 1, 2)
    second = write(tmp_path / "b.onnx", net, GREY, 1, 2)
    assert first.read_bytes() == second.read_bytes()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_weights_of_half_precision_are_written_as_float32(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 2)).bfloat16()
    path = write(tmp_path / "net.onnx", net, GREY, 1, 2)
    image = image_of(16, 16, 1)
    wanted = answer(net.float(), seen(image, GREY, 1)[None])
    np.testing.assert_allclose(conformance.predict(path, image), wanted[0], atol=1e-6)


def test_modules_may_bear_the_names_of_the_outputs(tmp_path: Path) -> None:
    net = nn.Sequential()
    net.add_module("image", nn.Flatten())
    net.add_module("logits", nn.Linear(256, 3))
    net.add_module("probabilities", nn.Linear(3, 3))
    path = write(tmp_path / "net.onnx", net, GREY, 1, 3)
    image = image_of(16, 16, 1)
    np.testing.assert_allclose(conformance.predict(path, image), answer(net, seen(image, GREY, 1)[None])[0], atol=1e-6)


@pytest.mark.slow
def test_exporting_is_quiet_and_needs_neither_torchvision_nor_timm(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from understudy.export.onnx import export_onnx
from understudy.record import InputSpec
from torch.nn import BatchNorm2d, Conv2d, Flatten, Linear, Sequential
net = Sequential(Conv2d(1, 4, 3), BatchNorm2d(4), Flatten(), Linear(144, 2))
spec = InputSpec(channels=1, sizes=(8,), mean=(0.5,), std=(0.5,))
path = Path({str(tmp_path / "net.onnx")!r})
export_onnx(net, spec, network_channels=1, classes=["a", "b"], path=path, provenance={{}})
loaded = {{"torchvision", "timm", "sklearn", "accelerate"}} & sys.modules.keys()
sys.exit(f"loaded {{loaded}}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert labels(tmp_path / "net.onnx") == ["a", "b"]


# What is refused


class Stubborn(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)[:, :2]
        return flat if flat.sum() > 0 else -flat


class FixedBatch(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.reshape(2, -1)[:, :2]


class Pair(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.flatten(1)[:, :2], images


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (Stubborn(), "The network 'Stubborn' cannot be exported to ONNX: "),
        (FixedBatch(), "The network 'FixedBatch' cannot be exported to ONNX: "),
        (Pair(), "The network returns a tuple; only one that returns logits"),
        (Constant([1.0, 2.0, 3.0]), r"a tensor of shape \[2, 3\], but 2 classes need \[2, 2\]"),
    ],
)
def test_a_network_that_cannot_be_exported(tmp_path: Path, refused: nn.Module, message: str) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"of before")
    with pytest.raises(ModelError, match=message) as error:
        write(path, refused, GREY, 1, 2)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == b"of before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("read", [labels, describe, lambda path: conformance.predict(path, image_of(4, 4, 3))])
def test_files_that_are_none(tmp_path: Path, file: Path, read: Callable[[Path], object]) -> None:
    data = file.read_bytes()
    bad = {"empty": b"", "text": b"no model", "cut": data[: len(data) // 2], "zeros": bytes(4000)}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=f"{name} is damaged or not an ONNX file .*Export it again") as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ModelError, match="does not exist or is not a file"):
            read(path)


def test_files_of_others(tmp_path: Path, file: Path) -> None:
    model = onnx.load(file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "nameless.onnx")
    with pytest.raises(ModelError, match="carries no labels"):
        labels(tmp_path / "nameless.onnx")
    node = helper.make_node("Identity", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    with pytest.raises(ModelError, match=r"not exported by understudy: .*\['x'\] and \['y'\]"):
        labels(tmp_path / "g.onnx")


@pytest.mark.parametrize(
    "image", [image_of(8, 8, 1), image_of(8, 8, 3)[..., 0], image_of(8, 8, 3) / 255, image_of(8, 8, 3)[:0]]
)
def test_images_of_another_kind(file: Path, image: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"takes uint8 images \[height, width, 3\].*RGB"):
        conformance.predict(file, image)
    with pytest.raises(DataError, match="takes uint8 images"):
        conformance.latency(file, image)


# Conformance


def test_compare_counts_what_it_sees(file: Path, frames: np.ndarray, expected: np.ndarray) -> None:
    truth = expected.argmax(1)
    truth[:14] = (truth[:14] + 1) % 4
    told = []

    def progress(task: str, /, *, done: int, total: int, note: str = "") -> None:
        told.append((done, total))

    batches = (frames[start : start + 32] for start in range(0, 70, 32))
    agreement = conformance.compare(file, batches, expected, truth, progress=progress)
    assert (agreement.images, agreement.agreement, agreement.tolerance) == (70, 1.0, 1e-4)
    assert agreement.accuracy == pytest.approx(56 / 70)
    assert 0 <= agreement.max_difference < 1e-6
    assert told == [(32, 70), (64, 70), (70, 70)]
    conformance.check(agreement)


def test_frames_of_another_size_are_resized(file: Path, net: nn.Module) -> None:
    large = np.random.default_rng(2).integers(0, 256, (6, 3, 48, 48), dtype=np.uint8)
    wanted = answer(net, torch.stack([seen(frame.transpose(1, 2, 0), COLOUR, 3) for frame in large]))
    assert conformance.compare(file, [large], wanted, wanted.argmax(1)).max_difference < 0.02


@pytest.mark.parametrize("share", [0.02, 1.5])
def test_a_tampered_file_is_refused(
    tmp_path: Path, file: Path, frames: np.ndarray, expected: np.ndarray, share: float
) -> None:
    model = onnx.load(file)
    weights = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("5.weight"))
    values = numpy_helper.to_array(weights)
    noise = np.random.default_rng(3).standard_normal(values.shape).astype(np.float32)
    weights.CopyFrom(numpy_helper.from_array(values + share * values.std() * noise, weights.name))
    path = tmp_path / "tampered.onnx"
    onnx.save(model, path)
    agreement = conformance.compare(path, [frames], expected, expected.argmax(1))
    probabilities, _ = outputs(path, frames.transpose(0, 2, 3, 1))
    assert agreement.max_difference == pytest.approx(np.abs(probabilities - expected).max(), rel=1e-5)
    changed = int((probabilities.argmax(1) != expected.argmax(1)).sum())
    assert (changed > 0) == (share > 1)
    with pytest.raises(ModelError, match=rf"up to [\d.]+ \(allowed: 0\.0001\), and {changed} of 70 answers changed"):
        conformance.check(agreement)


def constant(path: Path, probabilities: Sequence[float]) -> Path:
    return write(path, Constant(np.log(probabilities).tolist()), GREY, 1, len(probabilities))


def test_a_tie_is_no_change_of_answer(tmp_path: Path) -> None:
    path = constant(tmp_path / "net.onnx", [0.40004, 0.39996, 0.2])
    frames, truth = [np.zeros((2, 1, 16, 16), np.uint8)], np.array([0, 1])
    tie = conformance.compare(path, frames, np.float32([[0.39996, 0.40004, 0.2]] * 2), truth)
    assert (tie.agreement, tie.accuracy) == (1.0, 0.5)
    conformance.check(tie)
    changed = conformance.compare(path, frames, np.float32([[0.3996, 0.4004, 0.2], [0.40004, 0.39996, 0.2]]), truth)
    assert changed.agreement == 0.5
    assert changed.max_difference == pytest.approx(4.4e-4, rel=1e-3)
    with pytest.raises(ModelError, match=r"up to 0\.00044 .* and 1 of 2 answers changed"):
        conformance.check(changed)


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    path = constant(tmp_path / "net.onnx", [0.7, 0.3])
    frames, truth = [np.zeros((2, 1, 16, 16), np.uint8)], np.array([0, 0])
    agreement = conformance.compare(path, frames, np.float32([[np.nan, np.nan], [0.7, 0.3]]), truth)
    assert (agreement.max_difference, agreement.agreement) == (1.0, 0.5)
    with pytest.raises(ModelError, match="1 of 2 answers changed"):
        conformance.check(agreement)


@pytest.mark.parametrize(("difference", "agree"), [(2e-4, 1.0), (5e-5, 0.9)])
def test_check_asks_for_both(difference: float, agree: float) -> None:
    good = Agreement(images=10, max_difference=5e-5, agreement=1.0, accuracy=0.9, tolerance=1e-4)
    conformance.check(good)
    with pytest.raises(ModelError):
        conformance.check(good.model_copy(update={"max_difference": difference, "agreement": agree}))


def test_compare_refuses_what_does_not_belong_together(file: Path, frames: np.ndarray, expected: np.ndarray) -> None:
    truth = expected.argmax(1)
    for few in ([frames[:69]], [frames, frames[:1]], []):
        with pytest.raises(ValueError, match="frames for 70 expected rows"):
            conformance.compare(file, few, expected, truth)
    with pytest.raises(ValueError, match="as many labels"):
        conformance.compare(file, [frames], expected, truth[:5])
    with pytest.raises(ValueError, match="at least one"):
        conformance.compare(file, [], expected[:0], truth[:0])
    with pytest.raises(ModelError, match="has 4 classes, but PyTorch answered for 3"):
        conformance.compare(file, [frames], expected[:, :3], truth)


def test_latency_rests_on_the_runs_it_names(file: Path) -> None:
    measured = conformance.latency(file, image_of(40, 30, 3), runs=7, seconds=60)
    assert (measured.runs, measured.threads) == (7, 1)
    assert measured.runtime == f"ONNX Runtime {onnxruntime.__version__}"
    assert 0 < measured.p50 <= measured.p95
    assert conformance.latency(file, image_of(40, 30, 3), runs=10**9, seconds=0, threads=2).runs == 1


def test_the_description_is_plain_json(file: Path) -> None:
    kept = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert kept.keys() == {"labels", "understudy"}
    assert json.loads(kept["labels"])[0] == "cat"
    assert json.loads(kept["understudy"])["input"]["sizes"] == [16]
