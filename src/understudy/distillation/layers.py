"""Which layers of two networks can be compared: stages by resolution, found by running each network once.

Works on any module that maps images to logits, convolutional or a transformer. Used by the distiller and by
`understudy layers`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from understudy.distillation.hooks import Place
from understudy.distillation.inputs import Inputs, answer
from understudy.errors import ConfigError, unknown

MOST_PAIRS = 4
_FAR = 0.75
"""Octaves: maps whose resolutions, each relative to its own deepest map, differ by more are not paired."""
_NUMBERED = re.compile(r"(^|[._])\d+$")
"""The name of one of many: a number, alone or behind a word."""
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.PReLU, nn.Mish)


class Layer(NamedTuple):
    """One layer as it was seen running."""

    name: str
    kind: Literal["map", "channels-last map", "tokens", "vector"]
    channels: int
    side: int
    """Height and width in pixels; 1 for a vector."""
    weighted: bool
    """Whether weights of this resolution ran before it ended: what is only pooled holds nothing new."""
    activation: str | None = None
    """The activation whose output is the layer's own: what that is given is the layer's pre-activation."""
    runs: int = 1
    """How often it runs for one answer: a module that is used in several places is heard at the last of them only."""

    @property
    def shape(self) -> tuple[str, int, int]:
        """What tells whether another layer gives tensors of the same shape."""
        return self.kind, self.channels, self.side


class Head(NamedTuple):
    """The final layer: what it is given is the embedding."""

    name: str
    module: nn.Linear | nn.Conv2d
    width: int
    """Length of the embedding."""


def trace(network: nn.Module, images: Inputs) -> list[Layer]:
    """Return the layers that ran, in the order in which they ended; containers end after what they hold.

    What runs before the first weights, such as normalisation, is left out.

    Args:
        network: run once in evaluation mode, without gradients; left as it was.
        images: [batch, channels, height, width], or tensors by the names of its arguments.
    """
    seen = _Trace(len(images if isinstance(images, Tensor) else next(iter(images.values()))))

    def hook(name: str) -> object:
        return lambda module, given, returned: seen.note(name, module, returned)

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules() if name]
    try:
        with _evaluating(network):
            answer(network, images)
    finally:
        for handle in handles:
            handle.remove()
    return seen.layers()


class _Trace:
    """What hooks on all modules of a network tell while it runs once on `batch` images."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._ran: list[Layer] = []
        self._runs: Counter[str] = Counter()
        self._weighted_sides: set[int] = set()
        self._activated: tuple[Tensor, int, str, int] | None = None
        """The output of the last activation, as it was then; its name, and which of its runs that was."""
        self._run_of_activation: list[int] = []

    def note(self, name: str, module: nn.Module, returned: object) -> None:
        """Take down one run of a module."""
        self._runs[name] += 1
        returned = returned[0] if isinstance(returned, tuple) and returned else returned
        if not isinstance(returned, Tensor):
            return
        if isinstance(module, _ACTIVATIONS):
            self._activated = returned, _version(returned), name, self._runs[name]
        found = _describe(returned, self._batch)
        if found is None:
            return
        if next(module.parameters(recurse=False), None) is not None:
            self._weighted_sides.add(found[2])
        if self._weighted_sides:
            activation, run = self._ending(returned)
            self._ran.append(Layer(name, *found, found[2] in self._weighted_sides, activation))
            self._run_of_activation.append(run)

    def layers(self) -> list[Layer]:
        """Return what ran; an activation that runs again later is not heard here, so it ends no layer."""
        return [
            layer._replace(
                runs=self._runs[layer.name],
                activation=layer.activation if layer.activation and self._runs[layer.activation] == run else None,
            )
            for layer, run in zip(self._ran, self._run_of_activation, strict=True)
        ]

    def _ending(self, returned: Tensor) -> tuple[str | None, int]:
        """Return the activation that a tensor comes from unchanged, and its run: nothing was added to it since."""
        if self._activated is None:
            return None, 0
        output, version, name, run = self._activated
        places = [(one.data_ptr(), one.shape, one.stride()) for one in (output, returned)]
        return (name, run) if places[0] == places[1] and _version(returned) == version else (None, 0)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written over."""
    return 0 if tensor.is_inference() else tensor._version


def _describe(
    output: Tensor, batch: int
) -> tuple[Literal["map", "channels-last map", "tokens", "vector"], int, int] | None:
    """Return kind, channels and side; views are square, so two equal sides tell where the channels are.

    What is not of the whole batch, such as windows of attention, is none of them.
    """
    shape = output.shape
    if not shape or shape[0] != batch:
        return None
    if output.ndim == 4 and shape[2] == shape[3]:
        return ("map", shape[1], shape[2]) if shape[2] > 1 else ("vector", shape[1], 1)
    if output.ndim == 4 and shape[1] == shape[2]:
        return "channels-last map", shape[3], shape[1]
    if output.ndim == 3 and shape[1] > 3:
        return "tokens", shape[2], math.isqrt(shape[1])
    return ("vector", shape[1], 1) if output.ndim == 2 else None


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def stages(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layer that ends each stage, from shallow to deep.

    A stage is a run of layers of one resolution, give or take a border; its end is the last of its outermost layers.
    Transformers keep one resolution, so that their blocks are taken: the ends of each quarter of the depth. A module
    that runs in several places ends none: only the last place would be heard.

    Args:
        layers: in the order in which they ended.
    """
    maps = [layer for layer in layers if layer.kind != "vector" and layer.runs == 1]
    blocks = _outermost([layer for layer in maps if layer.kind == "tokens" and _NUMBERED.search(layer.name)])
    if blocks:
        ends = [math.ceil(len(blocks) * part / MOST_PAIRS) - 1 for part in range(1, MOST_PAIRS + 1)]
        return [blocks[end] for end in dict.fromkeys(ends)]
    of_octave: dict[int, Layer] = {}
    outermost: dict[int, int] = {}
    containers = {layer.name[:end] for layer in maps for end, letter in enumerate(layer.name) if letter == "."}
    smallest = math.inf
    for layer in maps:
        smallest = min(smallest, layer.side)
        if layer.side > smallest or not layer.weighted:  # padded, enlarged or pooled: nothing new in it
            continue
        octave, depth = round(math.log2(layer.side)), layer.name.count(".")
        outermost[octave] = min(depth, outermost.get(octave, depth))
        # the stem may be a child of the network, and the stages those of a list
        listed = layer.name in containers and _NUMBERED.search(layer.name) is not None
        if depth <= outermost[octave] + listed:
            of_octave[octave] = layer
    return [of_octave[octave] for octave in sorted(of_octave, reverse=True)]


def _outermost(layers: list[Layer]) -> list[Layer]:
    names = {layer.name for layer in layers}
    return [layer for layer in layers if not any(layer.name.startswith(f"{other}.") for other in names)]


def pair(student: list[Layer], teacher: list[Layer]) -> list[tuple[Layer, Layer]]:
    """Pair stages from the deepest, which always meet, to the shallowest; returned from shallow to deep.

    A stage of the student meets the next teacher's stage whose resolution relative to the deepest map is nearest. Where
    one network keeps one resolution, stages meet in their order.

    Args:
        student: its stages, from shallow to deep.
        teacher: likewise.
    """
    if not student or not teacher:
        return []
    in_order = any(len({layer.side for layer in one}) == 1 for one in (student, teacher))
    pairs = [(student[-1], teacher[-1])]
    rest = list(teacher[:-1])
    for layer in reversed(student[:-1]):
        if not rest or len(pairs) == MOST_PAIRS:
            break
        if in_order:
            pairs.append((layer, rest.pop()))
            continue
        nearest = min(reversed(rest), key=lambda other: _distance(layer, other, pairs[0]))
        if _distance(layer, nearest, pairs[0]) <= _FAR:
            pairs.append((layer, nearest))
            rest = rest[: rest.index(nearest)]
    return pairs[::-1]


def _distance(student: Layer, teacher: Layer, deepest: tuple[Layer, Layer]) -> float:
    """Return how far apart two resolutions are, in octaves above the deepest maps."""
    octaves = [math.log2(layer.side / end.side) for layer, end in zip((student, teacher), deepest, strict=True)]
    return abs(octaves[0] - octaves[1])


def find(layers: Sequence[Layer], name: str) -> Layer:
    """Return a layer by its name, which may leave out the names of what the network is wrapped in.

    Raises:
        ConfigError: no such layer ran, it gives no map, or maps of several shapes in several places.
    """
    maps = {layer.name: layer for layer in layers if layer.kind != "vector"}
    fitting = [full for full in maps if full == name or full.endswith(f".{name}")]
    if not fitting:
        raise ConfigError(unknown("feature map", name, maps) + " `understudy layers` lists them.")
    found = maps[min(fitting, key=len)]
    if any(layer.name == found.name and layer.shape != found.shape for layer in layers):
        raise ConfigError(
            f"The layer '{found.name}' runs {found.runs} times, on maps of several shapes. Name one that runs once, "
            "such as the convolution or the block before it; `understudy layers` lists them."
        )
    return found


def as_map(tensor: Tensor, layer: Layer) -> Tensor:
    """Return what a layer gave as a map [batch, channels, side, side]; tokens beside the grid (class, registers) go.

    Args:
        tensor: as the layer gave it.
        layer: what was seen of it.
    """
    if layer.kind == "channels-last map":
        return tensor.permute(0, 3, 1, 2)
    if layer.kind == "tokens":
        grid = tensor[:, tensor.shape[1] - layer.side**2 :]
        return grid.transpose(1, 2).reshape(len(tensor), layer.channels, layer.side, layer.side)
    return tensor


def head(network: nn.Module, images: Inputs) -> Head | None:
    """Return the final linear layer (or 1x1 convolution) that ran and gave as many values as there are logits.

    Args:
        network: run once in evaluation mode, without gradients; left as it was.
        images: [batch, channels, height, width], or tensors by the names of its arguments.
    """
    found: list[Head] = []

    def note(name: str, module: nn.Linear | nn.Conv2d) -> None:
        found[:] = [Head(name, module, module.weight.shape[1])]

    def hook(name: str) -> object:
        return lambda module, given, returned: note(name, module)

    handles = [
        module.register_forward_hook(hook(name))  # type: ignore[arg-type]
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    try:
        with _evaluating(network):
            classes = answer(network, images).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return next((last for last in found if last.module.weight.shape[0] == classes), None)


def embedding(given: Tensor) -> Tensor:
    """Return what the head was given as a vector for each image, [batch, width]: maps are averaged, so are tokens."""
    if given.ndim == 4:
        return given.mean((2, 3))
    return given.mean(1) if given.ndim == 3 else given


def place_of_embedding(head: Head) -> Place:
    """Return where the embedding is taken."""
    return Place(head.name, before=True)
