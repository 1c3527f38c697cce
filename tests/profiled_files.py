"""Files and runs for `understudy profile`, and sessions that only note what they were asked; for its tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper, save_model
from typer.testing import CliRunner, Result

from understudy import profilecommands
from understudy import record as records
from understudy.evaluate import energy
from understudy.export import runtimes
from understudy.export.runtimes import Session
from understudy.models import build, files
from understudy.profiling import resident
from understudy.profiling.resident import Request, Resident
from understudy.record import Agreement, Export, InputSpec, Latency, Record

SPEC = InputSpec(channels=1, sizes=(12, 8), mean=(0.5,), std=(0.5,))


def onnx_file(path: Path, width: int = 4) -> Path:
    """Write an ONNX file as ours: one layer between 3 means of colours and 2 classes, `width` values wide."""
    rng = np.random.default_rng(0)
    weights = {"first": rng.normal(size=(3, width)), "second": rng.normal(size=(width, 2))}
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "first"], ["wide"]),
        helper.make_node("MatMul", ["wide", "second"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "height", "width", 3])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("probabilities", "logits")
    ]
    constants = [numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()]
    constants.append(numpy_helper.from_array(np.array([1, 2], np.int64), "axes"))
    graph = helper.make_graph(nodes, "understudy", [image], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    described = {"labels": json.dumps(["a", "b"]), "understudy": json.dumps({"input": {"channels": 3, "sizes": [6]}})}
    helper.set_model_props(model, described)
    save_model(model, path)
    return path


def weights_file(path: Path) -> Path:
    network = build.build("mnist_small", classes=["a", "b"], spec=SPEC, seed=0)
    files.save(network.eval(), path)
    return path


def run_folder(folder: Path, record: Record, *absent: str) -> Path:
    """Save a record, with an empty file wherever it names one."""
    places = [model.weights for model in record.models.values()]
    places += [row.path for row in record.compressed] + [one.path for one in record.exports]
    for place in places:
        if place not in absent:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).touch()
    records.save(record, folder)
    return folder


def export(stage: str, path: str) -> Export:
    agreement = Agreement(images=3, max_difference=0, agreement=1, accuracy=1, tolerance=1e-4)
    latency = Latency(runtime="x", threads=1, runs=1, p50=1, p95=1)
    return Export(
        format="x", path=path, bytes=1, runtime="x", seed=0, on_frames=agreement, latency=latency, stage=stage
    )


def command(*words: object) -> Result:
    """Run the command alone; a mistake of the user's comes back as the exception."""
    app = typer.Typer()
    profilecommands.add(app)
    return CliRunner().invoke(app, [str(word) for word in words])


class Spies:
    """Sessions that note their names when they answer, and no child processes."""

    def __init__(self, patch: pytest.MonkeyPatch, found: Resident | None = None) -> None:
        self.order: list[str] = []
        self.side: int | None = 5
        self.shapes: set[tuple[int, ...]] = set()
        self.asked: list[Request] = []
        self.found = found or Resident(peak=70_000_000, before=50_000_000, load_ms=3.0)
        patch.setattr(runtimes, "open_file", self.open)
        patch.setattr(resident, "ask", self.ask)
        patch.setattr(energy, "zones", lambda: "Energy was not measured.")

    def open(self, path: Path, *, threads: int, trusted: bool) -> Session:
        if path.suffix == ".pte":
            raise runtimes.missing("ExecuTorch", "executorch")

        def answer(images: np.ndarray) -> np.ndarray:
            self.order.append(path.stem)
            self.shapes.add(images.shape)
            return np.zeros((len(images), 2), np.float32)

        return Session("Runtime 1", threads, 3, self.side, None, answer)

    def ask(self, request: Request) -> Resident:
        self.asked.append(request)
        return self.found


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> Spies:
    return Spies(monkeypatch)


def files_named(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).write_bytes(b"x" * 300)
    return [folder / name for name in names]
