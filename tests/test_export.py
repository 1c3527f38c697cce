"""Networks exported as ONNX: preprocessing against Pillow, networks of all kinds, and what cannot be exported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from onnx_networks import COLOUR, GREY, Constant, Convolutions, answer, folder, image_of, outputs, seen, write
from understudy.errors import ModelError
from understudy.export import conformance
from understudy.export.onnx import labels

__all__ = ["folder"]  # a fixture

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


@pytest.fixture(scope="module")
def pixels(folder: Path) -> Callable[[str], Path]:
    """Return files whose logits are the pixels that the network sees."""

    @cache
    def exported(name: str) -> Path:
        spec, network_channels = PREPROCESSING[name]
        return write(folder / f"{name}.onnx", nn.Flatten(), spec, network_channels, network_channels * spec.size**2)

    return exported


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


# Networks


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
