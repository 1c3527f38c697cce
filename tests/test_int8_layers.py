"""Eight bits after training, layer by layer: which stay float, what is noted of each, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import nn

from int8_files import Images, batches, data, edited, float_file, int8_file, logits, net, write
from understudy.errors import DataError, ModelError
from understudy.export.int8 import examine, quantize
from understudy.export.onnx import describe

__all__ = ["batches", "data", "float_file", "int8_file", "net"]  # fixtures


# Layers that stay float


@pytest.mark.parametrize(("keep", "kept"), [(["conv2"], ["conv2"]), (["head", "conv1"], ["conv1", "head"])])
def test_layers_kept_float(
    tmp_path: Path, float_file: Path, batches: list[Images], keep: list[str], kept: list[str]
) -> None:
    path = tmp_path / "int8.onnx"
    quantize(float_file, path, batches, keep_float=keep)
    tensors = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    for name in ("conv1", "conv2", "head"):
        assert (tensors.get(f"{name}.weight") == TensorProto.FLOAT) == (name in kept)
        assert (tensors.get(f"{name}.weight_quantized") == TensorProto.INT8) == (name not in kept)
    assert [note.name for note in examine(float_file, path, batches) if note.kept_float] == kept
    assert describe(path)["quantization"]["keep_float"] == kept


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (["conv3"], "Unknown layer 'conv3'. Did you mean 'conv"),
        (["conv"], "Unknown layer 'conv'. Did you mean 'conv"),
        (["head.weight"], "Unknown layer 'head.weight'"),
        (["conv1", "conv2", "head"], "no convolution or linear layer to quantize"),
    ],
)
def test_layers_that_cannot_be_kept(
    tmp_path: Path, float_file: Path, batches: list[Images], keep: list[str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        quantize(float_file, tmp_path / "int8.onnx", batches, keep_float=keep)
    assert not list(tmp_path.iterdir())


# Notes on layers


def test_notes_tell_ranges_and_errors(
    net: nn.Module, float_file: Path, int8_file: Path, data: tuple[Images, np.ndarray], batches: list[Images]
) -> None:
    seen: dict[str, torch.Tensor] = {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        net((torch.from_numpy(data[0][:300]).permute(0, 3, 1, 2).float() / 255 - 0.3) / 0.35)
    notes = {note.name: note for note in examine(float_file, int8_file, iter(batches))}
    assert list(notes) == ["conv1", "conv2", "head"]
    for name, note in notes.items():
        assert (note.low, note.high) == pytest.approx((seen[name].min().item(), seen[name].max().item()), rel=1e-4)
        assert 1e-3 < note.error < 0.03
        assert not note.kept_float
    exact, rounded = (logits(path, data[0][:300]) for path in (float_file, int8_file))
    assert notes["head"].error == pytest.approx(np.linalg.norm(exact - rounded) / np.linalg.norm(exact), rel=1e-3)


def test_notes_name_a_bad_layer(tmp_path: Path, float_file: Path, int8_file: Path, batches: list[Images]) -> None:
    def spoil(model: ModelProto) -> None:
        scale = next(tensor for tensor in model.graph.initializer if tensor.name == "conv2.weight_scale")
        scale.CopyFrom(numpy_helper.from_array(1.5 * numpy_helper.to_array(scale), scale.name))

    good = examine(float_file, int8_file, batches)
    bad = examine(float_file, edited(int8_file, tmp_path / "bad.onnx", spoil), batches)
    assert bad[0] == good[0]
    assert bad[1].error > 0.3 > 10 * good[1].error
    assert bad[2].error > good[2].error  # what a layer takes over from those before it


def test_layers_of_other_names_are_paired_by_place(
    tmp_path: Path, float_file: Path, int8_file: Path, batches: list[Images]
) -> None:
    def rename(model: ModelProto) -> None:
        for number, node in enumerate(model.graph.node):
            node.name = f"node{number}"

    renamed = edited(int8_file, tmp_path / "renamed.onnx", rename)
    assert examine(float_file, renamed, batches) == examine(float_file, int8_file, batches)


# What is refused


def test_batches_of_another_kind(tmp_path: Path, float_file: Path) -> None:
    def none() -> Iterator[Images]:
        yield from ()

    for empty in (none(), [np.zeros((0, 8, 8, 1), np.uint8)]):
        with pytest.raises(DataError, match="no image to calibrate"):
            quantize(float_file, tmp_path / "int8.onnx", empty)
    for shape, kind in [((2, 8, 8, 3), np.uint8), ((8, 8, 1), np.uint8), ((2, 8, 8, 1), np.float32)]:
        with pytest.raises(DataError, match=r"batches of uint8 images \[n, height, width, 1\]"):
            quantize(float_file, tmp_path / "int8.onnx", [np.zeros(shape, kind)])
    assert not list(tmp_path.iterdir())


def test_files_of_another_kind(tmp_path: Path, float_file: Path, int8_file: Path, batches: list[Images]) -> None:
    (tmp_path / "text.onnx").write_bytes(b"no model")
    target = tmp_path / "int8.onnx"
    with pytest.raises(ModelError, match="damaged or not an ONNX file"):
        quantize(tmp_path / "text.onnx", target, batches)
    with pytest.raises(ModelError, match="is quantized already"):
        quantize(int8_file, target, batches)
    before = float_file.read_bytes()
    with pytest.raises(ModelError, match="is the float file itself"):
        quantize(float_file, float_file.parent / "." / float_file.name, batches)
    assert float_file.read_bytes() == before
    assert not target.exists()


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_values_that_are_no_numbers(tmp_path: Path, float_file: Path, batches: list[Images], method: str) -> None:
    def spoil(model: ModelProto) -> None:
        weights = next(tensor for tensor in model.graph.initializer if tensor.name == "conv2.weight")
        values = numpy_helper.to_array(weights).copy()
        values[3] = np.nan
        weights.CopyFrom(numpy_helper.from_array(values, weights.name))

    bad = edited(float_file, tmp_path / "bad.onnx", spoil)
    with pytest.raises(ModelError, match="values at 'conv2' are not all finite") as error:
        quantize(bad, tmp_path / "int8.onnx", batches, method=method)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.onnx"]


def test_a_network_without_layers(tmp_path: Path, batches: list[Images], int8_file: Path) -> None:
    class Means(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :10]

    path = write(tmp_path / "float.onnx", Means())
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        quantize(path, tmp_path / "int8.onnx", batches)
    with pytest.raises(ModelError, match="do not hold the same layers"):
        examine(path, int8_file, batches)
