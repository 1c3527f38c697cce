"""What a run notes of the files for the device: compressed stages, exported files, and what devices said of them."""

from __future__ import annotations

from typing import Any, Literal

from understudy.record.measured import Latency, Metrics
from understudy.record.parts import Interval, Part


class Agreement(Part):
    """An exported file against PyTorch."""

    images: int
    max_difference: float
    """Largest difference between two probabilities."""
    agreement: float
    """Share of images with the same answer."""
    accuracy: float
    tolerance: float


class Export(Part):
    """One exported file."""

    format: str
    path: str
    bytes: int
    runtime: str
    seed: int
    on_frames: Agreement
    """The stored validation frames."""
    latency: Latency
    stage: str = "student"
    """What was exported: the chosen student, or the name of a compressed stage."""
    hash: str = ""
    """Of the file (`storage.hash_file`)."""
    golden: str = ""
    """Folder of the golden images and answers, relative to the run folder."""
    load_ms: float | None = None
    memory_bytes: int | None = None
    """Largest resident memory of a process that opens the file and answers."""
    one_by_one: Agreement | None = None
    """Where answers depend on what else is in the batch: the file asked for one image at a time, as devices do, against
    PyTorch's answers to batches."""
    note: str = ""
    """What a reader must know, in a sentence."""


class LayerNote(Part):
    """One layer of a quantized network, as calibration images show it."""

    name: str
    low: float
    """Smallest value of its output."""
    high: float
    error: float
    """Root mean square of what quantizing changes in its output, relative to that of the output itself."""
    kept_float: bool = False


class Quantized(Part):
    """How a network came to 8 bits."""

    way: Literal["post-training", "quantization-aware"]
    images: int
    """Training images that calibrated the ranges, or those seen in an epoch."""
    layers: list[LayerNote] = []
    """In the order of the network."""


class Compressed(Part):
    """A network in one form, and what it lost against the form that it was made of."""

    name: str
    """Also its folder below `compressed/`: `teacher`, `student-1`, `pruned`, `int8-ptq`, `int8-qat`, `calibrated`."""
    before: str
    """The form it was made of; empty for a model of the run as it was."""
    path: str
    """Of the file that answers, relative to the run folder."""
    settings: dict[str, Any] = {}
    """What was asked for."""
    seconds: float = 0.0
    parameters: int
    macs: int
    """Multiply-accumulates for one image."""
    bytes: int
    """Size of its ONNX file."""
    latency: Latency
    """Of its ONNX file, preprocessing included."""
    memory_bytes: int | None = None
    """Largest resident memory of a process that opens the ONNX file and answers."""
    val: Metrics | None = None
    test: Metrics | None = None
    accuracy: Interval | None = None
    """On the test split."""
    drop: Interval | None = None
    """Test accuracy of the form before less that of this one, image by image."""
    changed: float | None = None
    """Share of test images that the form before answers otherwise."""
    changed_from_teacher: float | None = None
    recall_change: dict[str, float | None] = {}
    """Per class, against the form before, on the test split."""
    temperature: float = 1.0
    """That the logits are divided by in the file."""
    quantized: Quantized | None = None
    accepted: bool = True
    """Whether it lost no more validation accuracy than was allowed."""
    note: str = ""
    """What became of it, in a sentence."""


class DeviceReport(Part):
    """What `conformance.py` found on a device."""

    format: Literal["understudy-device/1"] = "understudy-device/1"
    file: str
    """Name of the exported file."""
    hash: str
    """Of the file, as in `Export`."""
    date: str
    device: str
    """Machine and system, in words."""
    runtime: str
    images: int
    """Golden images."""
    same: int
    """Of them, those with the expected answer."""
    max_difference: float
    """Largest difference between two probabilities."""
    tolerance: float
    passed: bool
    latency: Latency
    load_ms: float
    peak_memory_bytes: int | None = None
