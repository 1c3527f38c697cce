"""The ONNX file: answers against PyTorch, what it says of itself, what it refuses, and the check that refuses it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from onnx_networks import COLOUR, GREY, Constant, Convolutions, answer, folder, image_of, outputs, seen, write
from understudy.errors import DataError, ModelError
from understudy.export import conformance
from understudy.export.onnx import describe, export_onnx, labels
from understudy.record import Agreement, InputSpec

__all__ = ["folder"]  # a fixture


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


# What is refused


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
