"""Eight bits after training: the file, its answers, other networks, and files whose activations are signed."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import GraphProto, ModelProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import nn

from int8_files import DIGITS, TESTED, Images, batches, data, edited, float_file, int8_file, logits, net, write
from understudy.errors import ModelError
from understudy.export import conformance
from understudy.export.int8 import examine, quantize, shift_to_uint8
from understudy.export.onnx import describe, labels
from understudy.models.small import cifar_small
from understudy.record import InputSpec

__all__ = ["batches", "data", "float_file", "int8_file", "net"]  # fixtures

COLOUR = InputSpec(channels=3, sizes=(32,), mean=(0.5,), std=(0.25,))


def constants(graph: GraphProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def operations(path: Path, name: str) -> list[str]:
    """Return the types of the nodes whose outputs the node of this name takes."""
    graph = onnx.load(path).graph
    node = next(node for node in graph.node if node.name == name)
    return [other.op_type for other in graph.node if not set(other.output).isdisjoint(node.input)]


# The file


def test_inputs_outputs_and_words_stay(float_file: Path, int8_file: Path) -> None:
    sessions = [conformance.open_session(path, threads=1) for path in (float_file, int8_file)]
    one, other = (
        [(node.name, node.type, node.shape) for node in [*session.get_inputs(), *session.get_outputs()]]
        for session in sessions
    )
    assert one == other
    assert labels(int8_file) == DIGITS
    told = describe(int8_file)
    assert told.pop("quantization") == {"method": "minmax", "keep_float": []}
    assert (told.pop("precision"), {**describe(float_file)}.pop("precision")) == ("int8", "float32")
    assert told == {key: value for key, value in describe(float_file).items() if key != "precision"}
    models = [onnx.load(path) for path in (float_file, int8_file)]
    assert models[0].doc_string == models[1].doc_string
    assert [(model.producer_name, model.graph.name) for model in models] == [("understudy", "understudy")] * 2
    assert models[1].graph.output[0].doc_string
    onnx.checker.check_model(models[1], full_check=True)
    assert int8_file.stat().st_size < 0.6 * float_file.stat().st_size


def test_only_the_network_is_quantized(float_file: Path, int8_file: Path) -> None:
    graph = onnx.load(int8_file).graph
    values = constants(graph)
    quantized = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {values[node.input[2]].dtype for node in quantized} == {np.dtype(np.uint8)}
    before = [node for node in onnx.load(float_file).graph.node if node.name.startswith("image/")]
    assert len(before) > 5
    assert before == [node for node in graph.node if node.name in {other.name for other in before}]
    assert [node.input[0] for node in quantized if node.input[0].startswith("image/")] == ["image/pixels"]
    kernels = {"conv1": (16, 1, 3, 3), "conv2": (32, 16, 3, 3), "head": (10, 128)}
    for name, shape in kernels.items():
        weights, scale, zero = (values[f"{name}.weight_{part}"] for part in ("quantized", "scale", "zero_point"))
        assert (weights.dtype, weights.shape, scale.shape) == (np.int8, shape, shape[:1])
        assert not zero.any()
    assert operations(int8_file, "head/Gemm") == ["DequantizeLinear"] * 3
    assert operations(int8_file, "softmax") == ["Gemm"]


def test_answers_are_those_of_the_float_file(
    float_file: Path, int8_file: Path, data: tuple[Images, np.ndarray]
) -> None:
    images, truth = (values[TESTED] for values in data)
    exact, rounded = (logits(path, images) for path in (float_file, int8_file))
    accuracy = [(answer.argmax(1) == truth).mean() for answer in (exact, rounded)]
    assert accuracy[0] > 0.85
    assert abs(accuracy[0] - accuracy[1]) <= 0.01
    assert (exact.argmax(1) == rounded.argmax(1)).mean() >= 0.985  # .995 when this was written
    assert 0 < np.linalg.norm(exact - rounded) / np.linalg.norm(exact) < 0.03


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_other_ways_to_take_ranges(
    tmp_path: Path,
    float_file: Path,
    int8_file: Path,
    data: tuple[Images, np.ndarray],
    method: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "int8.onnx"
    quantize(float_file, path, [data[0][:60]], method=method)  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")
    assert describe(path)["quantization"]["method"] == method
    exact, rounded, minmax = (logits(file, data[0][TESTED]) for file in (float_file, path, int8_file))
    assert (exact.argmax(1) == rounded.argmax(1)).mean() >= 0.97
    assert not np.array_equal(rounded, minmax)


def test_equal_images_give_equal_bytes_however_they_are_cut(
    tmp_path: Path, float_file: Path, int8_file: Path, batches: list[Images]
) -> None:
    quantize(float_file, tmp_path / "again.onnx", iter(batches))
    quantize(float_file, tmp_path / "one.onnx", [np.concatenate(batches)])
    assert (tmp_path / "again.onnx").read_bytes() == int8_file.read_bytes() == (tmp_path / "one.onnx").read_bytes()


def test_it_is_quiet_and_leaves_nothing_behind(
    tmp_path: Path,
    float_file: Path,
    batches: list[Images],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.chdir(scratch)
    before = [path.name for path in sorted(float_file.parent.iterdir())]
    handlers, off = list(logging.root.handlers), logging.root.manager.disable
    with caplog.at_level(logging.DEBUG):
        quantize(float_file, tmp_path / "out" / "int8.onnx", batches[:1])
        assert examine(float_file, tmp_path / "out" / "int8.onnx", batches[:1])
    assert (list(logging.root.handlers), logging.root.manager.disable) == (handlers, off)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert not list(scratch.iterdir())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["int8.onnx"]
    assert [path.name for path in sorted(float_file.parent.iterdir())] == before


# Other networks


class Attention(nn.Module):
    """Tokens of 2x2 pixels, one block of a transformer, and the mean of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, 12, 2, stride=2)
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.out = nn.Linear(12, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.cut(images).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(self.norm(tokens)).chunk(3, dim=2)
        weights = (query @ key.transpose(1, 2) / 12**0.5).softmax(2)
        head: torch.Tensor = self.head((tokens + self.out(weights @ value)).mean(1))
        return head


@pytest.mark.slow
def test_norms_sums_softmax_and_temperature_of_a_transformer_stay_float(tmp_path: Path, batches: list[Images]) -> None:
    torch.manual_seed(0)
    path = write(tmp_path / "float.onnx", Attention().eval(), temperature=1.7)
    quantize(path, tmp_path / "int8.onnx", batches)
    assert describe(tmp_path / "int8.onnx")["temperature"] == 1.7
    assert operations(tmp_path / "int8.onnx", "softmax") == ["Div"]
    notes = examine(path, tmp_path / "int8.onnx", batches)
    assert [note.name for note in notes] == ["cut", "qkv", "out", "head"]
    assert max(note.error for note in notes) < 0.05
    graph = onnx.load(tmp_path / "int8.onnx").graph
    from_codes = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    eating = {node.name for node in graph.node if not from_codes.isdisjoint(node.input)}
    layers = {"cut/Conv", "qkv/MatMul", "out/MatMul", "head/Gemm"}
    assert eating >= layers
    assert {name.partition("-")[0] for name in eating - layers} == {"Reshape"}  # of what "cut" gives


@pytest.mark.slow
def test_mobilenet_gets_smaller(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    path = write(tmp_path / "float.onnx", models.mobilenet_v2(num_classes=10).eval(), COLOUR)
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    quantize(path, tmp_path / "int8.onnx", [images], keep_float=["features.3"])
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "int8.onnx").stat().st_size < 0.35 * path.stat().st_size
    notes = examine(path, tmp_path / "int8.onnx", [images])
    assert len(notes) == 53
    kept = [note.name for note in notes if note.kept_float]
    assert kept == ["features.3.conv.0.0", "features.3.conv.1.0", "features.3.conv.2"]
    assert max(note.error for note in notes) < 0.1
    assert np.isfinite(logits(tmp_path / "int8.onnx", images)).all()


@pytest.mark.slow
def test_a_network_that_normalises_by_the_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = write(tmp_path / "float.onnx", cifar_small(10).eval(), COLOUR)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    quantize(path, tmp_path / "int8.onnx", [images])
    notes = examine(path, tmp_path / "int8.onnx", [images])
    assert len(notes) == 8
    assert max(note.error for note in notes) < 0.2


# From int8 to uint8 activations


class Reader(CalibrationDataReader):
    def __init__(self, batches: list[Images]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, Images] | None:  # type: ignore[override]
        batch = next(self.batches, None)
        return None if batch is None else {"image": batch}


@pytest.fixture
def signed(tmp_path: Path, float_file: Path, batches: list[Images]) -> Path:
    """Return a file with int8 activations, by ONNX Runtime's own hand."""
    nodes = [node.name for node in onnx.load(float_file).graph.node]
    network = nodes[nodes.index("image/pixels") + 1 : nodes.index("softmax")]
    quantize_static(
        onnx.load(float_file),
        tmp_path / "signed.onnx",
        Reader(batches),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=network,
    )
    return tmp_path / "signed.onnx"


def test_shifted_activations_hold_the_same_values(
    tmp_path: Path, signed: Path, data: tuple[Images, np.ndarray]
) -> None:
    shifted = edited(signed, tmp_path / "shifted.onnx", shift_to_uint8)
    one, other = (onnx.load(path).graph for path in (signed, shifted))
    values, new = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer} for graph in (one, other)
    )
    for before, after in zip(one.node, other.node, strict=True):
        if before.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zeros = values[before.input[2]], new[after.input[2]]
            if before.input[0] in values:  # weights and biases
                assert zeros[0].dtype == zeros[1].dtype in (np.int8, np.int32)
                np.testing.assert_array_equal(values[before.input[0]], new[after.input[0]])
            else:
                assert (zeros[0].dtype, zeros[1].dtype) == (np.int8, np.uint8)
                assert zeros[1] == zeros[0].astype(int) + 128
    assert {name for node in other.node for name in node.input} >= set(new)
    onnx.checker.check_model(onnx.load(shifted), full_check=True)
    images = data[0][TESTED]
    step = values["logits_scale"]
    difference = np.abs(logits(signed, images) - logits(shifted, images))
    assert difference.max() <= 1.01 * step
    assert (difference > 0.5 * step).mean() < 0.05


def test_uint8_activations_stay(tmp_path: Path, int8_file: Path) -> None:
    assert edited(int8_file, tmp_path / "same.onnx", shift_to_uint8).read_bytes() == int8_file.read_bytes()


def test_codes_that_cannot_be_shifted(tmp_path: Path, signed: Path) -> None:
    def negate(model: ModelProto) -> None:
        quantizer = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
        model.graph.node.append(onnx.helper.make_node("Neg", [quantizer.output[0]], ["negative"], name="negate"))

    with pytest.raises(ModelError, match="8-bit codes go into Neg 'negate'"):
        shift_to_uint8(onnx.load(edited(signed, tmp_path / "negated.onnx", negate)))
