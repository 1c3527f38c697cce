"""The three pairs of teacher and student: their images and their networks, the same for every loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import _common as common
from understudy.models.build import build
from understudy.models.classifier import Classifier
from understudy.record import InputSpec

BATCH, TEMPERATURE, ALPHA, RATE = 64, 4.0, 0.5, 1e-3

Tick = Callable[[], bool]
"""Called after each step; it returns False, or ends the training with an exception of its own."""


class Pair(NamedTuple):
    """What a student learns, and from whom."""

    teacher: str
    student: str
    channels: int
    size: int
    """Side of the images in pixels."""
    classes: int
    images: int
    """In the training set."""
    origin: str


PAIRS: dict[str, Pair] = {
    "mnist": Pair("mnist_large", "mnist_small", 1, 28, 10, 60_000, "MNIST, or noise where it is absent"),
    "xray": Pair("resnet18", "cnn3", 3, 64, 2, 4_446, "noise in the shape of the chest X-rays"),
    "cifar10": Pair("resnet50", "mobilenet_v2", 3, 32, 10, 50_000, "noise in the shape of CIFAR-10"),
}


class Data(NamedTuple):
    """A training set in memory."""

    frames: Tensor
    """uint8 [images, channels, size, size]."""
    labels: Tensor
    """int64 [images]."""
    mean: float
    std: float

    def floats(self) -> Tensor:
        """Return the normalised images, float32 [images, channels, size, size], as most loops want them."""
        return self.frames.float().div_(255).sub_(self.mean).div_(self.std)

    def loader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return shuffled batches of normalised images and labels."""
        return DataLoader(TensorDataset(self.floats(), self.labels), batch_size=BATCH, shuffle=True)


class Nets(NamedTuple):
    """Teacher and student; modules of torch, whatever the framework."""

    teacher: nn.Module
    student: nn.Module


def data(pair: Pair, images: int) -> Data:
    """Return the first images of a pair; what they show changes nothing about the time of a step."""
    if pair.teacher == "mnist_large":
        digits = common.mnist()
        return Data(digits.frames[:images], digits.labels[:images], 0.1307, 0.3081)
    generator = torch.Generator().manual_seed(0)
    shape = (images, pair.channels, pair.size, pair.size)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Data(frames, torch.arange(images) % pair.classes, 0.5, 0.25)


def classifiers(pair: Pair, data: Data) -> tuple[Classifier, Classifier]:
    """Return teacher and student with fresh weights; they normalise the images themselves."""
    spec = InputSpec(
        channels=3 if pair.channels == 3 else 1,
        sizes=(pair.size,),
        mean=(data.mean,) * pair.channels,
        std=(data.std,) * pair.channels,
    )
    classes = [str(number) for number in range(pair.classes)]
    teacher = build(pair.teacher, classes=classes, spec=spec, seed=0)
    return teacher, build(pair.student, classes=classes, spec=spec, seed=1)


def networks(pair: Pair, data: Data) -> Nets:
    """Return the bare networks, for images that are normalised already."""
    teacher, student = classifiers(pair, data)
    return Nets(teacher.net.eval(), student.net.train())
