"""An exported file re-run on its real runtime: does it answer as PyTorch did, and how fast?

The pipeline and the command line use it. Only numpy and the runtime of the file: what runs here runs on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from understudy.errors import ModelError
from understudy.export.runtimes import ONNX_RUNTIME as RUNTIME
from understudy.export.runtimes import Bytes, Floats, Session, open_file
from understudy.export.runtimes import first_line as first_line
from understudy.export.runtimes import open_session as open_session
from understudy.progress import Progress, silent
from understudy.record import Agreement, Latency

__all__ = ["RUNTIME", "check", "check_quantized", "compare", "depends_on_batch", "latency", "predict", "predictor"]

_FOR_P99 = 100
"""Runs below which one in a hundred is no more than the slowest."""


def predictor(model: Path | Session, *, threads: int = 1) -> Callable[[Bytes], Floats]:
    """Open a file once; return a function from one image, uint8 [height, width, channels], to probabilities [classes].

    Raises:
        ModelError: as for `open_file`.
        DataError: by the function, where an image is not of the kind that the file takes.
    """
    session = _opened(model, threads)
    return lambda image: session(image[None]).reshape(-1)


def predict(model: Path | Session, image: Bytes) -> Floats:
    """Return the probabilities [classes] that a file gives one image; as `predictor`, for a single one."""
    return predictor(model)(image)


def compare(
    model: Path | Session,
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
        model: an exported file, or one that is open.
        frames: batches of uint8 [n, channels, side, side]. Each runs as one batch, where the file takes more than one
            image, which matters to a network that normalises by the statistics of the batch: `expected` must then come
            from the same batches.
        expected: PyTorch's probabilities [images, classes] for the frames in their order.
        labels: true classes [images].
        tolerance: largest difference between two probabilities that `check` accepts.
        threads: threads of the runtime that opens a file.
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
    session = _opened(model, threads)
    answers, done = [], 0
    for batch in frames:
        answers.append(session(batch.transpose(0, 2, 3, 1)))
        done += len(batch)
        progress("compare the exported file", done=done, total=total)
    if done != total:
        raise ValueError(f"compare got {done} frames for {total} expected rows")
    return _agreement(np.concatenate(answers), expected, labels, tolerance)


def depends_on_batch(model: Path | Session, frames: Bytes, tolerance: float) -> bool:
    """Tell whether a file answers images asked for together otherwise than one by one, as devices ask.

    So does a network that normalises by the statistics of each batch, in evaluation too.

    Args:
        model: an exported file, or one that is open.
        frames: uint8 [n, channels, side, side]; a few are enough.
        tolerance: between two probabilities; must bear sums in another order.

    Raises:
        ModelError: as for `open_file`.
    """
    session = _opened(model, threads=1)
    images = frames.transpose(0, 2, 3, 1)
    alone = np.concatenate([session(images[row : row + 1]) for row in range(len(images))])
    return bool(np.abs(session(images) - alone).max() > tolerance)


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


def check_quantized(agreement: Agreement, min_agreement: float) -> None:
    """Refuse an 8-bit file that answers too many images otherwise than the float network it was made of.

    How far a probability moved says little: quantized networks are judged by their answers.

    Args:
        agreement: with the float network.
        min_agreement: smallest share of images with the same answer.

    Raises:
        ModelError: fewer; the numbers are named.
    """
    if agreement.agreement >= min_agreement:
        return
    changed = round((1 - agreement.agreement) * agreement.images)
    raise ModelError(
        f"The 8-bit file answers {changed} of {agreement.images} images otherwise than the network it was made of "
        f"(allowed: {1 - min_agreement:.1%}). Do not use it; quantize with more training images, or by --int8 qat."
    )


def latency(model: Path | Session, image: Bytes, *, threads: int = 1, runs: int = 200, seconds: float = 2.0) -> Latency:
    """Time a file on one image, uint8 [height, width, channels], preprocessing included.

    After a warm-up of a tenth of the budget, single images are timed until `runs` are done or `seconds` have passed.

    Returns:
        Median, 95th and 99th percentile in milliseconds (the last where 100 runs were timed), and the number of runs.

    Raises:
        ModelError, DataError: as for `predict`.
    """
    session = _opened(model, threads)
    batch = image[None]
    _timed_runs(session, batch, runs // 10, seconds / 10)
    times = _timed_runs(session, batch, runs, seconds)
    p50, p95, p99 = (float(value) for value in np.percentile(times, [50, 95, 99]) / 1e6)
    return Latency(
        runtime=session.runtime,
        threads=session.threads,
        runs=len(times),
        p50=p50,
        p95=p95,
        p99=p99 if len(times) >= _FOR_P99 else None,
    )


def _opened(model: Path | Session, threads: int) -> Session:
    return open_file(model, threads=threads) if isinstance(model, Path) else model


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


def _timed_runs(session: Session, batch: Bytes, runs: int, seconds: float) -> list[int]:
    """Return nanoseconds per run; at least one run."""
    times: list[int] = []
    deadline = time.perf_counter() + seconds
    while not times or (len(times) < runs and time.perf_counter() < deadline):
        start = time.perf_counter_ns()
        session(batch)
        times.append(time.perf_counter_ns() - start)
    return times
