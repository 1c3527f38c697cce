"""The preprocessing of an `InputSpec` as nodes of an ONNX graph; only `onnx.py` uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from understudy.record import InputSpec

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

PIXELS = "image/pixels"
"""What the network eats."""
# ITU-R 601 in 16-bit fixed point, as Pillow's mode "L" and `distillation.preprocess` have it.
LUMA = np.array([[19595], [38470], [7471]], np.float32) / 65536


def preprocessing(spec: InputSpec, network_channels: int) -> tuple[list[NodeProto], list[TensorProto]]:
    """Return nodes from `image` to `PIXELS`, and their constants; channels stay last until the end."""
    nodes = _Nodes()
    square = _middle_square(nodes) if spec.fit == "crop" else "image"
    # Resizing uint8 rounds between the two axes, as Pillow does; a float resize would not.
    pixels = nodes.add("Cast", [_resize(nodes, square, spec.sizes[0])], "float", to=1)
    for before, size in zip(spec.sizes, spec.sizes[1:], strict=False):
        pixels = pixels if size == before else _resize(nodes, pixels, size)
    if spec.channels > network_channels:
        pixels = nodes.add("MatMul", [pixels, nodes.constant("luma", LUMA)], "grey")
    mean, std = (np.broadcast_to(values, network_channels) for values in (spec.mean, spec.std))
    scale = nodes.constant("scale", (1 / (255 * std)).astype(np.float32))
    shift = nodes.constant("shift", (-mean / std).astype(np.float32))
    # One value per channel of the network: where the pixels are grey, this repeats them.
    pixels = nodes.add("Add", [nodes.add("Mul", [pixels, scale], "scaled"), shift], "normalised")
    nodes.add("Transpose", [pixels], "pixels", perm=[0, 3, 1, 2])
    return nodes.nodes, nodes.constants


def _middle_square(nodes: _Nodes) -> str:
    """Cut out the square of the shorter side; its corner is at floor((side - shorter) / 2)."""
    sides = nodes.add("Shape", ["image"], "sides", start=1, end=3)
    shorter = nodes.add("ReduceMin", [sides], "shorter", keepdims=1)
    surplus = nodes.add("Sub", [sides, shorter], "surplus")
    corner = nodes.add("Div", [surplus, nodes.constant("two", np.array([2], np.int64))], "corner")
    end = nodes.add("Add", [corner, shorter], "end")
    return nodes.add("Slice", ["image", corner, end, nodes.constant("axes", np.array([1, 2], np.int64))], "square")


def _resize(nodes: _Nodes, pixels: str, size: int) -> str:
    """Antialiased bilinear; like Pillow's and PyTorch's filter, it ignores what lies outside the image."""
    sizes = nodes.constant(f"size{size}", np.array([size, size], np.int64))
    return nodes.add(
        "Resize",
        [pixels, "", "", sizes],
        f"resized{len(nodes.nodes)}",
        axes=[1, 2],
        mode="linear",
        antialias=1,
        exclude_outside=1,
        coordinate_transformation_mode="half_pixel",
    )


class _Nodes:
    """Nodes and constants as they are written down, each named `image/...`."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"image/{output}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, label: str, value: np.ndarray[Any, Any]) -> str:
        from onnx import numpy_helper

        name = f"image/{label}"
        if all(name != known.name for known in self.constants):
            self.constants.append(numpy_helper.from_array(value, name))
        return name
