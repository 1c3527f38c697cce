"""Networks to export as ONNX, images, and what a network must see of them by Pillow and PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from understudy.export import conformance
from understudy.export.onnx import export_onnx
from understudy.record import InputSpec

GREY = InputSpec(channels=1, sizes=(16,), mean=(0.45,), std=(0.25,))
COLOUR = InputSpec(channels=3, sizes=(16,), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


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
