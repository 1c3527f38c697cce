"""How well logits fit labels: accuracy, calibration, and agreement with a teacher. Numpy only.

Everything is computed in float64 from stable log-probabilities. Rows above `evaluate` may import this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from understudy.errors import DataError, ModelError
from understudy.record import Bin, Metrics

BINS = 15
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def measure(
    logits: NDArray[Any],
    labels: NDArray[Any],
    classes: Sequence[str],
    teacher_logits: NDArray[Any] | None = None,
) -> Metrics:
    """Return all metrics of one model on one split.

    With two classes the second, `classes[1]`, is the positive one: sensitivity is its recall, specificity the
    recall of the first, and AUROC ranks images by its log-odds. The Brier score is the mean over images of the sum
    over classes of the squared error, in [0, 2] (Brier 1950, eq. 2). Macro F1 averages over the classes present.

    Args:
        logits: [images, classes], any float type.
        labels: [images], integers in 0 .. classes - 1.
        classes: the names, in the order of the logits.
        teacher_logits: [images, classes] of the model's teacher, for `agreement` and `kl_to_teacher`.

    Raises:
        DataError: there is no image, or one without a usable label.
        ModelError: the logits have another number of classes, or hold NaN or infinities.
    """
    log_probs = log_softmax(_checked(logits, labels, classes, who="model"))
    truth = labels.astype(np.int64)
    answers = log_probs.argmax(axis=1)
    probs = np.exp(log_probs)
    counts = confusion(truth, answers, len(classes))
    bins = reliability(probs.max(axis=1), answers == truth)
    result = Metrics(
        images=len(truth),
        accuracy=float((answers == truth).mean()),
        recall=dict(zip(classes, recalls(counts), strict=True)),
        macro_f1=macro_f1(counts),
        nll=float(-log_probs[np.arange(len(truth)), truth].mean()),
        brier=float(((probs - np.eye(len(classes))[truth]) ** 2).sum(axis=1).mean()),
        ece=expected_calibration_error(bins),
        confusion=counts.tolist(),
        reliability=bins,
    )
    if len(classes) == 2:
        _add_binary(result, log_probs, truth, classes)
    if teacher_logits is not None:
        teacher = log_softmax(_checked(teacher_logits, labels, classes, who="teacher"))
        result.agreement = float((teacher.argmax(axis=1) == answers).mean())
        result.kl_to_teacher = kl_divergence(teacher, log_probs)
    return result


def log_softmax(logits: NDArray[Any]) -> Floats:
    """Return the log-probabilities of logits [images, classes], in float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def confusion(truth: Integers, answers: Integers, classes: int) -> Integers:
    """Return counts [classes, classes]; `counts[truth][answer]`."""
    counts: Integers = np.bincount(truth * classes + answers, minlength=classes * classes).astype(np.int64)
    return counts.reshape(classes, classes)


def recalls(counts: Integers) -> list[float | None]:
    """Return the recall of each class from a confusion matrix; None for a class without images."""
    return [int(row[k]) / int(row.sum()) if row.sum() else None for k, row in enumerate(counts)]


def macro_f1(counts: Integers) -> float:
    """Return the mean F1 over the classes that have images; F1 = 2 TP / (2 TP + FP + FN)."""
    present = counts.sum(axis=1) > 0
    sizes = counts.sum(axis=1) + counts.sum(axis=0)
    return float((2 * counts.diagonal()[present] / sizes[present]).mean())


def reliability(confidence: Floats, right: NDArray[np.bool_]) -> list[Bin]:
    """Sort images into 15 bins of equal width by the probability of their answer; a bin holds its upper edge.

    Source: Guo, Pleiss, Sun and Weinberger 2017, On Calibration of Modern Neural Networks, section 2.
    """
    edges = np.linspace(0.0, 1.0, BINS + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, BINS - 1)
    return [_bin(edges[b], edges[b + 1], confidence[index == b], right[index == b]) for b in range(BINS)]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean over images of |accuracy - confidence| of the image's bin (Guo et al. 2017, eq. 3)."""
    total = sum(b.count for b in bins)
    gaps = (
        b.count * abs(b.accuracy - b.confidence) for b in bins if b.accuracy is not None and b.confidence is not None
    )
    return sum(gaps) / total


def auroc(scores: Floats, positive: NDArray[np.bool_]) -> float | None:
    """Return the area under the ROC curve, ties counted half; None where only one class is present.

    It is the Mann-Whitney statistic U / (positives x negatives) (Hanley and McNeil 1982).
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    u = ranks[positive].sum() - positives * (positives + 1) / 2
    return float(u / (positives * negatives))


def kl_divergence(teacher: Floats, model: Floats) -> float:
    """Return the mean over images of KL(teacher || model), in nats, from log-probabilities [images, classes]."""
    divergence = float((np.exp(teacher) * (teacher - model)).sum(axis=1).mean())
    return max(divergence, 0.0)  # equal logits can round to a hair below zero


def _checked(logits: NDArray[Any], labels: NDArray[Any], classes: Sequence[str], *, who: str) -> NDArray[Any]:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} are not [N, C] and [N]")
    if logits.shape[1] != len(classes):
        raise ModelError(
            f"The {who} answers with {logits.shape[1]} classes, but the data have {len(classes)}; "
            "use a model made for these classes."
        )
    if len(labels) == 0:
        raise DataError("There are no images to measure on; give this split at least one image per class.")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DataError("Some images have no label among the classes; measure on labelled images only.")
    _refuse_non_finite(logits, who)
    return logits


def _refuse_non_finite(logits: NDArray[Any], who: str) -> None:
    bad = int((~np.isfinite(logits)).any(axis=1).sum())
    if bad:
        raise ModelError(
            f"The {who} gives outputs that are not finite numbers on {bad} of {len(logits)} images; "
            "its weights are damaged or its training diverged: train it again with a lower learning rate, "
            "or with precision fp32."
        )


def _bin(low: float, high: float, confidence: Floats, right: NDArray[np.bool_]) -> Bin:
    filled = len(confidence) > 0
    return Bin(
        low=low,
        high=high,
        count=len(confidence),
        confidence=float(confidence.mean()) if filled else None,
        accuracy=float(right.mean()) if filled else None,
    )


def _add_binary(result: Metrics, log_probs: Floats, truth: Integers, classes: Sequence[str]) -> None:
    negative, positive = classes
    result.positive = positive
    result.sensitivity = result.recall[positive]
    result.specificity = result.recall[negative]
    # The log-odds rank as the probability does, and do not saturate at 1.
    result.auroc = auroc(log_probs[:, 1] - log_probs[:, 0], truth == 1)
