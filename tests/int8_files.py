"""A network that knows digits, its file and that in eight bits, for the tests of the quantization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from understudy.export import conformance
from understudy.export.int8 import quantize
from understudy.export.onnx import export_onnx
from understudy.models.small import mnist_small
from understudy.record import InputSpec

SPEC = InputSpec(channels=1, sizes=(8,), mean=(0.3,), std=(0.35,))
DIGITS = [str(digit) for digit in range(10)]
Images = np.ndarray
TRAINED, TESTED = slice(0, 600), slice(600, 1797)


def digits() -> tuple[Images, np.ndarray]:
    """Return the digits of scikit-learn, uint8 [1797, 8, 8, 1], and their labels."""
    found = load_digits()
    return (found.images * (255 / 16)).round().astype(np.uint8)[..., None], found.target


def trained(images: Images, truth: np.ndarray, steps: int = 60) -> nn.Module:
    torch.manual_seed(0)
    net = mnist_small(10, 1, 8)
    inputs = (torch.from_numpy(images[TRAINED]).permute(0, 3, 1, 2).float() / 255 - 0.3) / 0.35
    wanted = torch.from_numpy(truth[TRAINED])
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), wanted).backward()
        optimizer.step()
    return net.eval()


def write(path: Path, net: nn.Module, spec: InputSpec = SPEC, *, temperature: float = 1.0) -> Path:
    channels = 1 if spec.channels == 1 else 3
    export_onnx(
        net,
        spec,
        network_channels=channels,
        classes=DIGITS,
        path=path,
        provenance={"architecture": "tiny", "data": "0123"},
        temperature=temperature,
    )
    return path


def logits(path: Path, images: Images) -> np.ndarray:
    answer: np.ndarray = conformance.open_session(path, threads=1).run(["logits"], {"image": images})[0]
    return answer


def edited(source: Path, target: Path, edit: Callable[[ModelProto], None]) -> Path:
    model = onnx.load(source)
    edit(model)
    onnx.save(model, target)
    return target


@pytest.fixture(scope="module")
def data() -> tuple[Images, np.ndarray]:
    return digits()


@pytest.fixture(scope="module")
def batches(data: tuple[Images, np.ndarray]) -> list[Images]:
    return [data[0][start : start + 50] for start in range(0, 300, 50)]


@pytest.fixture(scope="module")
def net(data: tuple[Images, np.ndarray]) -> nn.Module:
    return trained(*data)


@pytest.fixture(scope="module")
def float_file(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("int8") / "model.onnx", net)


@pytest.fixture(scope="module")
def int8_file(float_file: Path, batches: list[Images]) -> Path:
    path = float_file.with_name("int8.onnx")
    quantize(float_file, path, batches)
    return path
