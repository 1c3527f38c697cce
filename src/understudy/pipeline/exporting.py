"""The stage that exports the chosen student and proves that the file answers as PyTorch does."""

from __future__ import annotations

import numpy as np

from understudy.export import conformance
from understudy.export.onnx import export_onnx
from understudy.pipeline.folder import Run
from understudy.pipeline.judge import predictions
from understudy.pipeline.materials import Materials
from understudy.pipeline.trainings import load
from understudy.record import Export

FILE = "export/student.onnx"
_BATCH = 256


def export(run: Run, materials: Materials) -> None:
    """Write the chosen student as ONNX, run the file over the validation frames and compare."""
    chosen = run.record.chosen
    if chosen is None:
        return
    inputs = {"weights": run.record.models[chosen].weights_hash, "input": materials.spec.model_dump(mode="json")}
    run.stage("export", inputs, [FILE], lambda: _export(run, materials, chosen))


def _export(run: Run, materials: Materials, chosen: str) -> None:
    path = run.folder / FILE
    student = load(run, chosen)
    model = run.record.models[chosen]
    run.progress("export", done=0, total=3, note="writing ONNX")
    export_onnx(
        student.net,
        student.spec,
        network_channels=student.network_channels,
        classes=student.classes,
        path=path,
        provenance={
            "architecture": model.architecture,
            "weights": model.weights_hash,
            "data": materials.store.fingerprint,
            "run": run.record.name,
        },
    )
    run.progress("export", done=1, total=3, note="comparing with PyTorch")
    rows = materials.store.splits["val"]
    frames = (np.asarray(materials.store.frames[part]) for part in np.split(rows, range(_BATCH, len(rows), _BATCH)))
    agreement = conformance.compare(
        path, frames, _softmax(predictions(run)[f"val/{chosen}"]), materials.store.labels[rows]
    )
    conformance.check(agreement)
    run.progress("export", done=2, total=3, note="measuring latency")
    image = np.ascontiguousarray(materials.store.frames[rows[0]].transpose(1, 2, 0))
    latency = conformance.latency(path, image)
    run.record.exports = [
        Export(
            format="ONNX",
            path=FILE,
            bytes=path.stat().st_size,
            runtime=latency.runtime,
            seed=model.seed or 0,
            on_frames=agreement,
            latency=latency,
        )
    ]
    run.progress("export", done=3, total=3)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True), dtype=np.float32)
