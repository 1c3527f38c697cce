"""An exported file re-run on its real runtime: does it answer as PyTorch did, and how fast?

The pipeline and the command line use it. Only numpy and ONNX Runtime, no torch: what runs here runs on
the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from understudy.errors import DataError, ModelError
from understudy.progress import Progress, silent
from understudy.record import Agreement, Latency

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

RUNTIME = "ONNX Runtime"
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def open_session(file: Path | bytes, *, threads: int) -> InferenceSession:
    """Open an ONNX file, or its bytes, in ONNX Runtime on the CPU with so many threads.

    Raises:
        ModelError: the file is missing, damaged, or nothing that `understudy` exported.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    source, name = (file, "The exported graph") if isinstance(file, bytes) else (str(file), str(file))
    if isinstance(file, Path) and not file.is_file():
        raise ModelError(f"{name} does not exist or is not a file. Name an .onnx file.")
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has a dozen unrelated exception types
        raise ModelError(
            f"{name} is damaged or not an ONNX file that {RUNTIME} can run ({first_line(error)}). Export it again."
        ) from error
    names = [node.name for node in session.get_inputs()], [node.name for node in session.get_outputs()]
    if names != (["image"], ["probabilities", "logits"]):
        raise ModelError(
            f"{name} was not exported by understudy: its inputs and outputs are {names[0]} and {names[1]}."
        )
    return session


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)


def predictor(path: Path, *, threads: int = 1) -> Callable[[Bytes], Floats]:
    """Open a file once; return a function from one image, uint8 [height, width, channels], to probabilities [classes].

    Raises:
        ModelError: as for `open_session`.
        DataError: by the function, where an image is not of the kind that the file takes.
    """
    session = open_session(path, threads=threads)
    return lambda image: _run(session, _batch_of_one(session, image)).reshape(-1)


def predict(path: Path, image: Bytes) -> Floats:
    """Return the probabilities [classes] that a file gives one image; as `predictor`, for a single one."""
    return predictor(path)(image)


def compare(
    path: Path,
    frames: Iterable[Bytes],
    expected: Floats,
    labels: NDArray[np.int64],
    *,
    tolerance: float = 1e-4,
    threads: int = 1,
    progress: Progress = silent,
) -> Agreement:
    """Run a file over stored frames and compare its probabilities with PyTorch's.

    Two answers count as the same where differences within the tolerance can explain the change: where PyTorch gives the
    file's answer a probability at most 2 x `tolerance` below that of its own.

    Args:
        path: an exported file.
        frames: batches of uint8 [n, channels, side, side]. Each runs as one batch, which matters to a network that
            normalises by the statistics of the batch: `expected` must then come from the same batches.
        expected: PyTorch's probabilities [images, classes] for the frames in their order.
        labels: true classes [images].
        tolerance: largest difference between two probabilities that `check` accepts.
        threads: threads of the runtime.
        progress: told of images done.

    Returns:
        The comparison; a probability that is not a number counts as a difference of 1.

    Raises:
        ModelError: the file cannot be opened, or has another number of classes.
        ValueError: no images, or `frames`, `expected` and `labels` differ in length.
    """
    total = len(expected)
    if not total or labels.shape != (total,):
        raise ValueError(
            f"compare needs as many labels as expected rows, and at least one; got {labels.shape}, {total}"
        )
    session = open_session(path, threads=threads)
    answers, done = [], 0
    for batch in frames:
        answers.append(_run(session, np.ascontiguousarray(batch.transpose(0, 2, 3, 1))))
        done += len(batch)
        progress("compare the exported file", done=done, total=total)
    if done != total:
        raise ValueError(f"compare got {done} frames for {total} expected rows")
    return _agreement(np.concatenate(answers), expected, labels, tolerance)


def check(agreement: Agreement) -> None:
    """Refuse a float export that does not answer as PyTorch does.

    Raises:
        ModelError: a probability differs by more than the tolerance, or an answer changed; the numbers are named.
    """
    within = agreement.max_difference <= agreement.tolerance
    if within and agreement.agreement == 1:
        return
    changed = round((1 - agreement.agreement) * agreement.images)
    raise ModelError(
        f"The exported file does not give PyTorch's answers: probabilities differ by up to "
        f"{agreement.max_difference:.2g} (allowed: {agreement.tolerance:.2g}), and {changed} of {agreement.images} "
        f"answers changed. Do not use the file; export it again, and if this stays report the architecture."
    )


def latency(path: Path, image: Bytes, *, threads: int = 1, runs: int = 200, seconds: float = 2.0) -> Latency:
    """Time a file on one image, uint8 [height, width, channels], preprocessing included.

    After a warm-up of a tenth of the budget, single images are timed until `runs` are done or `seconds` have passed.

    Returns:
        Median and 95th percentile in milliseconds, and the number of runs that they rest on.

    Raises:
        ModelError, DataError: as for `predict`.
    """
    import onnxruntime

    session = open_session(path, threads=threads)
    batch = _batch_of_one(session, image)
    _timed_runs(session, batch, runs // 10, seconds / 10)
    times = _timed_runs(session, batch, runs, seconds)
    p50, p95 = np.percentile(times, [50, 95]) / 1e6
    runtime = f"{RUNTIME} {onnxruntime.__version__}"
    return Latency(runtime=runtime, threads=threads, runs=len(times), p50=float(p50), p95=float(p95))


def _run(session: InferenceSession, batch: Bytes) -> Floats:
    """Return the probabilities [n, classes] for uint8 [n, height, width, channels]."""
    probabilities: Any = session.run(["probabilities"], {"image": batch})[0]
    return np.asarray(probabilities, dtype=np.float32)


def _batch_of_one(session: InferenceSession, image: Bytes) -> Bytes:
    channels = session.get_inputs()[0].shape[3]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels or not image.size:
        raise DataError(
            f"The file takes uint8 images [height, width, {channels}], not {image.dtype} {list(image.shape)}. "
            f"Convert the image to {'grey' if channels == 1 else 'RGB'} first."
        )
    return np.ascontiguousarray(image[None])


def _agreement(answers: Floats, expected: Floats, labels: NDArray[np.int64], tolerance: float) -> Agreement:
    if answers.shape != expected.shape:
        raise ModelError(
            f"The exported file has {answers.shape[1]} classes, but PyTorch answered for {expected.shape[1]}: "
            "it belongs to another model. Export it again."
        )
    difference = np.abs(answers.astype(np.float64) - expected)
    choice = answers.argmax(axis=1)
    shortfall = expected.max(axis=1) - expected[np.arange(len(choice)), choice]
    return Agreement(
        images=len(expected),
        max_difference=float(np.nan_to_num(difference, nan=1.0).max()),
        agreement=float((shortfall <= 2 * tolerance).mean()),
        accuracy=float((choice == labels).mean()),
        tolerance=tolerance,
    )


def _timed_runs(session: InferenceSession, batch: Bytes, runs: int, seconds: float) -> list[int]:
    """Return nanoseconds per run; at least one run."""
    times: list[int] = []
    deadline = time.perf_counter() + seconds
    while not times or (len(times) < runs and time.perf_counter() < deadline):
        start = time.perf_counter_ns()
        _run(session, batch)
        times.append(time.perf_counter_ns() - start)
    return times
