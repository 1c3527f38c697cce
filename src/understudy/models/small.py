"""Our own small CNNs and those of published distillation pairs. Plain torch; `build.py` finds them in `SMALL`.

Each takes the number of classes, the channels of its input and the side of the square that it sees, in pixels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from understudy.errors import ModelError


def cnn3(classes: int, channels: int = 3, size: int = 64) -> nn.Sequential:
    """Return a 3-layer CNN for images of 16 px and more.

    For 2 classes it has 278,754 parameters with 3 channels, 278,178 with 1, and at 64 px 23,888,448 or 23,298,624
    multiply-accumulates.

    Raises:
        ModelError: images smaller than 16 px.
    """
    _at_least(16, size, "cnn3")
    return nn.Sequential(
        OrderedDict(
            block1=_cnn3_block(channels, 32, stride=2, pool=True),
            block2=_cnn3_block(32, 96, stride=1, pool=True),
            block3=_cnn3_block(96, 288, stride=1, pool=False),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(288, classes),
        )
    )


def cifar_large(classes: int, channels: int = 3, size: int = 32) -> nn.Sequential:
    """Return the large, VGG-like net of an annotated CIFAR-10 pair: 14,728,266 parameters for 10 classes.

    Thirteen 3x3 convolutions, each after dropout of 0.1 and before batch norm *without running statistics* and ReLU;
    2x2 max-pooling after each of five blocks; one linear layer. Sizes of 32 px and more are accepted; what five
    poolings leave beyond 1x1 (from 64 px) is averaged.

    As published, batch norm uses the statistics of the batch in evaluation, too, so that an answer depends on the other
    images of its batch. A run lets it keep running statistics, unless `train.running_statistics` is false.

    Raises:
        ModelError: images smaller than 32 px.
    """
    _at_least(32, size, "cifar_large")
    blocks = [(64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)]
    return _vgg_like(blocks, classes=classes, channels=channels, dropout=0.1)


def cifar_small(classes: int, channels: int = 3, size: int = 32) -> nn.Sequential:
    """Return the small net of the same pair: 437,034 parameters for 10 classes.

    Seven convolutions without dropout; otherwise as `cifar_large`, batch norm included.

    Raises:
        ModelError: images smaller than 32 px.
    """
    _at_least(32, size, "cifar_small")
    return _vgg_like([(32, 32), (64, 64), (128,), (128,), (128,)], classes=classes, channels=channels, dropout=0)


def mnist_large(classes: int, channels: int = 1, size: int = 28) -> nn.Sequential:
    """Return the large net of Keras' MNIST pair: 1,433,610 parameters for 10 classes at 28 px.

    Convolutions of 256 and 512 filters, no activation between the second and the dense layer; padding and initial
    weights as Keras has them. The dense layer, and so the number of parameters, grows with `size`.

    Raises:
        ModelError: images smaller than 4 px.
    """
    _at_least(4, size, "mnist_large")
    return _keras_like((256, 512), classes=classes, channels=channels, size=size)


def mnist_small(classes: int, channels: int = 1, size: int = 28) -> nn.Sequential:
    """Return the small net of the same pair, 16 and 32 filters: 20,490 parameters for 10 classes at 28 px.

    Raises:
        ModelError: images smaller than 4 px.
    """
    _at_least(4, size, "mnist_small")
    return _keras_like((16, 32), classes=classes, channels=channels, size=size)


SMALL: dict[str, Callable[[int, int, int], nn.Module]] = {
    "cnn3": cnn3,
    "cifar_large": cifar_large,
    "cifar_small": cifar_small,
    "mnist_large": mnist_large,
    "mnist_small": mnist_small,
}


def _at_least(least: int, size: int, name: str) -> None:
    if size < least:
        raise ModelError(
            f"'{name}' needs images of at least {least} x {least} pixels, not {size} x {size}. "
            f"Choose mnist_small, which works from 4 px, or a larger size with --image-size."
        )


def _cnn3_block(inputs: int, outputs: int, *, stride: int, pool: bool) -> nn.Sequential:
    layers = [
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


def _vgg_like(blocks: Sequence[Sequence[int]], *, classes: int, channels: int, dropout: float) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for number, widths in enumerate(blocks, start=1):
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Dropout(dropout)] if dropout else []
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.BatchNorm2d(width, track_running_stats=False),
                nn.ReLU(inplace=True),
            ]
            channels = width
        parts[f"block{number}"] = nn.Sequential(*layers, nn.MaxPool2d(2))
    parts["pool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["head"] = nn.Linear(channels, classes)
    return nn.Sequential(parts)


def _keras_like(widths: tuple[int, int], *, classes: int, channels: int, size: int) -> nn.Sequential:
    half = math.ceil(size / 2)
    quarter = math.ceil(half / 2)
    net = nn.Sequential(
        OrderedDict(
            pad1=_same_padding(size),
            conv1=nn.Conv2d(channels, widths[0], 3, stride=2),
            activation=nn.LeakyReLU(0.2),
            pool=_SameMaxPool(),
            pad2=_same_padding(half),
            conv2=nn.Conv2d(widths[0], widths[1], 3, stride=2),
            flatten=nn.Flatten(),
            head=nn.Linear(widths[1] * quarter**2, classes),
        )
    )
    net.apply(_initialise_as_keras)
    return net


def _same_padding(size: int) -> nn.ZeroPad2d:
    """Pad for a 3x3 convolution of stride 2 as TensorFlow's "same" does: the odd zero goes to the right and below."""
    total = (math.ceil(size / 2) - 1) * 2 + 3 - size
    before, after = total // 2, total - total // 2
    return nn.ZeroPad2d((before, after, before, after))


class _SameMaxPool(nn.Module):
    """2x2 max-pooling of stride 1 with padding "same": the window reaches to the right and below, never into zeros."""

    def forward(self, images: Tensor) -> Tensor:
        # padding on all sides and dropping the first row and column needs no -inf in a graph that may be quantized
        return F.max_pool2d(images, 2, stride=1, padding=1)[:, :, 1:, 1:]


def _initialise_as_keras(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
