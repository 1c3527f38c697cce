"""The teacher is checked before it teaches. Numpy and scipy only.

To turn a good teacher away is worse than to miss a bad one: a check refuses only what the statistics leave no doubt
about, and `--force` goes on anyway. Rows above `evaluate` may import this file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from understudy.errors import ModelError
from understudy.evaluate.intervals import wilson
from understudy.record import Finding, Metrics

Head = tuple[NDArray[Any], NDArray[Any] | None]
"""Weight [classes, features] and bias [classes] (or none) of the layer that yields the logits."""
Severity = Literal["refuse", "warn"]

_ALPHA = 0.05
_SURELY = 2.326
"""Normal quantile of 99 %: answers and labels belong together beyond doubt."""
_FRESH_P = 0.001
_KS_SAMPLE = 10_000


def examine(
    *,
    val: Metrics | None,
    val_counts: Sequence[int],
    teacher_classes: Sequence[str],
    data_classes: Sequence[str],
    head: Head | None,
) -> list[Finding]:
    """Return what the gate finds: the classes, the head, and accuracy against chance; causes before effects.

    Args:
        val: the teacher on the validation images; None before it has been measured, and then only the classes are
            checked. They also stand alone where they are refused: under wrong names the rest means nothing.
        val_counts: validation images of each class.
        teacher_classes: names in the order of the teacher's logits; empty where its file does not say.
        data_classes: names in the order of the labels.
        head: the teacher's last layer; None where it is unknown.
    """
    classes = check_classes(teacher_classes, data_classes)
    if val is None or refuses(classes):
        return [classes]
    chance = check_chance(val, val_counts, data_classes)
    comparable = sum(count > 0 for count in val_counts) > 1
    unproven = comparable and not chance.ok
    return [classes, check_head(head, unproven=unproven, guessing=refuses(chance)), chance]


def refuses(finding: Finding) -> bool:
    """Return whether a finding stops the run."""
    return not finding.ok and finding.severity == "refuse"


def refuse(findings: Sequence[Finding], *, force: bool) -> None:
    """Stop at the first finding that refuses the teacher, unless `force`.

    Raises:
        ModelError: its sentence, and that --force goes on.
    """
    for finding in findings:
        if refuses(finding) and not force:
            raise ModelError(f"{finding.text} To go on anyway, give the whole command again with --force.")


def check_classes(teacher: Sequence[str], data: Sequence[str]) -> Finding:
    """Compare the names of the classes and their order; any difference refuses the teacher."""
    if not teacher:
        order = _listed(data)
        return _finding(
            "classes",
            "The teacher does not name its classes, so they were taken to be in the order of the data "
            f"({order}): if that is wrong, name them in the card beside its weights.",
            severity="warn",
        )
    if list(teacher) == list(data):
        text = f"The teacher knows the {len(data)} classes of the data, in the same order ({_listed(data)})."
        return _finding("classes", text, ok=True)
    return _finding("classes", _difference(teacher, data))


def check_chance(val: Metrics, counts: Sequence[int], classes: Sequence[str]) -> Finding:
    """Ask whether the teacher beats the best guess that does not look, on the validation images.

    The guess always names the commonest class (which is at least 1/C of the images). Beaten means: an exact one-sided
    binomial test at 5 % against that share. A teacher that does not beat it may still see something, as one trained for
    balanced recall does on lopsided data: where its answers agree with the labels more often than shuffled answers
    would (one-sided permutation test at 1 %), it is only a warning.
    """
    right = sum(val.confusion[k][k] for k in range(len(classes)))
    total = sum(counts)
    top = max(range(len(classes)), key=lambda k: counts[k])
    score = f"The teacher is right on {right} of {val.images} validation images ({_percent(val.accuracy)})"
    if counts[top] == total:
        text = f"{score}, but they are all '{classes[top]}', so its accuracy cannot be compared with guessing."
        return _finding("chance", text, severity="warn")
    guess = f"always answering '{classes[top]}' ({_percent(counts[top] / total)})"
    if binomial_tail(right, val.images, counts[top] / total) < _ALPHA:
        return _finding("chance", f"{score}, better than {guess}.", ok=True)
    z = agreement_score(val.confusion)
    if z > _SURELY:
        text = (
            f"{score}, no better than {guess}, though its answers do depend on the image (mean recall "
            f"{_mean_recall(val)} against {_percent(1 / len(classes))} for guessing): does its training fit these data?"
        )
        return _finding("chance", text, severity="warn")
    swapped = ", and is wrong more often than by accident (are its classes in another order?)" if z < -_SURELY else ""
    return _finding(
        "chance",
        f"{score}, which cannot be told from guessing such as {guess}{swapped}: train it longer (--teacher-epochs, "
        "with another --out), or check its weights, its input size and its normalisation.",
    )


def check_head(head: Head | None, *, unproven: bool, guessing: bool) -> Finding:
    """Ask whether the last layer is as it was created, never trained.

    Weights still uniform within +-1/sqrt(features), which is how `torch.nn.Linear` is born, are a warning, and refuse
    the teacher only where its accuracy is `unproven`. Other births leave no such trace: a bias of all zeros is common
    to them, but a trained layer may have it too, so it counts only where the teacher is `guessing`.

    Args:
        head: weight and bias; None where the layer is unknown.
        unproven: the teacher's accuracy is not above that of the best blind guess.
        guessing: nor do its answers depend on the image.
    """
    if head is None:
        text = "The teacher's last layer is not known, so whether it was trained was not checked."
        return _finding("head", text, ok=True)
    weight, bias = head
    flat = weight.reshape(len(weight), -1)
    bound = 1 / math.sqrt(flat.shape[1])
    if looks_fresh(flat, bias):
        why = f"its {flat.size} weights are spread evenly within ±{bound:.4f}, as a new layer's are"
        return _fresh_head(why, refused=unproven)
    if guessing and _blank(flat, bias):
        return _fresh_head("its biases are all exactly 0, as a new layer's often are", refused=True)
    text = f"The teacher's last layer ({flat.size} weights) does not look newly created."
    return _finding("head", text, ok=True)


def check_seen(seen: Mapping[str, tuple[int, int]]) -> list[Finding]:
    """Warn of images that are to judge, and that the teacher learned from; nothing is said where there are none.

    Args:
        seen: for "validation" and "test" the number of images that it learned from, and of all.
    """
    told = [f"{count} of the {total} {name} images" for name, (count, total) in seen.items() if count]
    text = (
        f"The teacher learned from {' and '.join(told)}: its accuracy on them says nothing, and what it teaches gives "
        "them away, so do not trust the verdict. Train it on this division of the images, or let it be trained here."
    )
    return [_finding("seen", text, severity="warn")] if told else []


def check_statistics(by_batch: bool) -> list[Finding]:
    """Warn of a teacher whose answers depend on the other images of a batch; nothing is said of any other."""
    text = (
        "The teacher normalises by the statistics of each batch, so its answer to an image depends on those beside "
        "it, and so does what it teaches. Let its batch normalisation keep running statistics."
    )
    return [_finding("statistics", text, severity="warn")] if by_batch else []


def examine_against_baseline(teacher_val_accuracy: float, baseline_val_accuracies: Sequence[float]) -> Finding:
    """Compare the teacher with the student trained alone, on the validation images; a warning at most."""
    alone = sum(baseline_val_accuracies) / len(baseline_val_accuracies)
    seeds = len(baseline_val_accuracies)
    over = f", mean of {seeds} seeds" if seeds > 1 else ""
    numbers = f"({_percent(teacher_val_accuracy)} against {_percent(alone)} of the validation images{over})"
    if teacher_val_accuracy > alone:
        text = f"The teacher is better than the student trained alone {numbers}."
        return _finding("baseline", text, ok=True, severity="warn")
    return _finding(
        "baseline",
        f"The teacher is no better than the student trained alone {numbers}: expect little of it, or train it longer.",
        severity="warn",
    )


def examine_shift(val: Metrics, test: Metrics) -> Finding:
    """Compare the teacher on validation and test images; a warning where their 95 % intervals lie apart."""
    low, high = (wilson(round(m.accuracy * m.images), m.images) for m in (test, val))
    numbers = f"{_percent(val.accuracy)} of the validation images and {_percent(test.accuracy)} of the test images"
    if high.low <= low.high:
        return _finding("shift", f"The teacher is right on {numbers}, which fits together.", ok=True, severity="warn")
    return _finding(
        "shift",
        f"The teacher is right on {numbers}: the test images differ from those it learned from, so what was best on "
        "validation need not be best on them.",
        severity="warn",
    )


def binomial_tail(right: int, total: int, share: float) -> float:
    """Return the probability of at least `right` successes in `total` trials of probability `share`."""
    from scipy import special

    return 1.0 if right == 0 else float(special.bdtrc(right - 1, total, share))


def agreement_score(confusion: Sequence[Sequence[int]]) -> float:
    """Return how many standard deviations the right answers lie above those of the same answers, shuffled.

    Mean and variance of the diagonal's sum under random pairing of answers with labels, both margins fixed:
    mean = sum_k r_k c_k / N, variance = sum_kl r_k c_l (1[k = l] - c_k / N - r_l / N + mean / N)^2 / (N - 1)
    (Hoeffding 1951, A combinatorial central limit theorem, for the indicator of a right answer). It is 0 where
    all answers, or all labels, are the same.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    truth, answers, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    expected = float(truth @ answers / total)
    # Of a cell (k, l): its row mean is the share of answers k, its column mean the share of labels l.
    centred = np.eye(len(counts)) - answers[:, None] / total - truth[None, :] / total + expected / total
    variance = float((truth[:, None] * answers[None, :] * centred**2).sum() / max(total - 1, 1))
    return (float(counts.trace()) - expected) / math.sqrt(variance) if variance > 1e-9 else 0.0


def looks_fresh(weight: NDArray[Any], bias: NDArray[Any] | None) -> bool:
    """Return whether weight [classes, features] and bias are as `torch.nn.Linear` creates them.

    Uniform within +-1/sqrt(features): nothing lies outside, and a Kolmogorov-Smirnov test at 0.1 % (on at most 10,000
    weights) does not object. A bias must lie within the same bounds, or be all zero.
    """
    bound = 1 / math.sqrt(weight.shape[1])
    values = np.concatenate([weight.ravel(), [] if bias is None else bias.ravel()]).astype(np.float64)
    if not np.isfinite(values).all() or np.abs(values).max() > bound * 1.004:  # bfloat16 rounds by up to 2^-8
        return False
    return _uniform_p(weight.ravel().astype(np.float64) / bound) > _FRESH_P


def _uniform_p(values: NDArray[np.float64]) -> float:
    """Return the p-value of the Kolmogorov-Smirnov test that values in [-1, 1] are uniform."""
    from scipy import special

    sample = np.sort(values[:: -(-len(values) // _KS_SAMPLE)])
    shares = (sample + 1) / 2
    steps = np.arange(len(sample) + 1) / len(sample)
    distance = max((steps[1:] - shares).max(), (shares - steps[:-1]).max())
    return float(special.kolmogorov(math.sqrt(len(sample)) * distance))


def _blank(weight: NDArray[Any], bias: NDArray[Any] | None) -> bool:
    return not np.any(weight if bias is None else bias)


def _fresh_head(why: str, *, refused: bool) -> Finding:
    if not refused:
        text = f"The teacher's last layer looks newly created ({why}): check that its weights were loaded whole."
        return _finding("head", text, severity="warn")
    text = (
        f"The teacher's last layer looks newly created, never trained: {why}, and its accuracy is no better than "
        "always naming the commonest class; train the teacher first, or load weights that include the last layer."
    )
    return _finding("head", text)


def _difference(teacher: Sequence[str], data: Sequence[str]) -> str:
    if len(teacher) != len(data):
        missing = [name for name in data if name not in teacher] or [name for name in teacher if name not in data]
        first = f" ('{missing[0]}' is the first that only one of them has)" if missing else ""
        return (
            f"The teacher knows {len(teacher)} classes, the data have {len(data)}{first}: use a teacher trained on "
            "these classes, or leave its weights out and let one be trained."
        )
    place = next(k for k, pair in enumerate(zip(teacher, data, strict=True)) if pair[0] != pair[1])
    where = f"class {place + 1} is '{teacher[place]}' for the teacher and '{data[place]}' in the data"
    if sorted(teacher) == sorted(data):
        return (
            f"The teacher has the classes in another order: {where}; rename the folders or reorder the teacher's card."
        )
    return f"The teacher has other classes: {where}; rename the folders, or use a teacher trained on these classes."


def _finding(check: str, text: str, *, ok: bool = False, severity: Severity = "refuse") -> Finding:
    return Finding(check=check, ok=ok, severity=severity, text=text)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _mean_recall(val: Metrics) -> str:
    known = [recall for recall in val.recall.values() if recall is not None]
    return _percent(sum(known) / len(known))
