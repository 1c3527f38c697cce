"""Metrics against scikit-learn, torch and slow loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from understudy.errors import DataError, ModelError
from understudy.evaluate.metrics import log_softmax, measure


def _example(images=300, classes=4, seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    logits = rng.normal(0, scale, (images, classes)) + 1.5 * np.eye(classes)[labels]
    return logits.astype(np.float32), labels.astype(np.int64), [f"c{k}" for k in range(classes)]


def _slow_ece(probs, labels, bins=15):
    """Guo et al. 2017, eq. 3, by a loop over bins; bin m is ((m - 1) / M, m / M]."""
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, p in enumerate(probs) if (m - 1) / bins < max(p) <= m / bins]
        if inside:
            accuracy = sum(int(np.argmax(probs[i])) == labels[i] for i in inside) / len(inside)
            confidence = sum(max(probs[i]) for i in inside) / len(inside)
            total += len(inside) / len(probs) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("seed", range(3))
def test_against_scikit_learn(classes, seed):
    logits, labels, names = _example(classes=classes, seed=seed)
    probs = torch.softmax(torch.from_numpy(logits).double(), 1).numpy()
    answers = logits.argmax(1)
    got = measure(logits, labels, names)
    assert got.images == 300
    assert got.accuracy == pytest.approx(sk.accuracy_score(labels, answers), abs=1e-12)
    assert got.macro_f1 == pytest.approx(sk.f1_score(labels, answers, average="macro"), abs=1e-12)
    assert list(got.recall.values()) == pytest.approx(sk.recall_score(labels, answers, average=None), abs=1e-12)
    assert got.nll == pytest.approx(sk.log_loss(labels, probs, labels=range(classes)), abs=1e-12)
    assert got.brier == pytest.approx(
        sk.brier_score_loss(labels, probs, labels=range(classes), scale_by_half=False), abs=1e-12
    )
    assert got.confusion == sk.confusion_matrix(labels, answers).tolist()
    assert got.ece == pytest.approx(_slow_ece(probs, labels), abs=1e-12)


def test_two_classes_against_scikit_learn():
    logits, labels, _ = _example(classes=2, scale=1.0)
    logits = np.round(logits)  # ties
    probability = torch.softmax(torch.from_numpy(logits).double(), 1)[:, 1].numpy()
    got = measure(logits, labels, ["healthy", "ill"])
    answers = logits.argmax(1)
    assert got.positive == "ill"
    assert got.sensitivity == pytest.approx(sk.recall_score(labels, answers, pos_label=1))
    assert got.specificity == pytest.approx(sk.recall_score(labels, answers, pos_label=0))
    assert got.auroc == pytest.approx(sk.roc_auc_score(labels, probability), abs=1e-12)
    assert len(np.unique(probability)) < 30


def test_auroc_does_not_saturate():
    # Both probabilities are 1.0 in float64; only the log-odds tell them apart.
    got = measure(np.array([[0, 500], [0, 900]], dtype=np.float32), np.array([0, 1]), ["a", "b"])
    assert got.auroc == 1.0


def test_one_class_present():
    logits, _, names = _example(images=20, classes=2)
    got = measure(logits, np.ones(20, dtype=np.int64), names)
    assert got.auroc is None
    assert got.specificity is None
    assert got.recall == {"c0": None, "c1": got.accuracy}
    assert got.sensitivity == got.accuracy


def test_absent_classes_do_not_enter_macro_f1():
    logits, labels, names = _example(classes=4)
    keep = labels != 2
    got = measure(logits[keep], labels[keep], names)
    answers = logits[keep].argmax(1)
    assert got.recall["c2"] is None
    assert got.macro_f1 == pytest.approx(
        sk.f1_score(labels[keep], answers, labels=[0, 1, 3], average="macro"), abs=1e-12
    )
    assert got.positive is got.sensitivity is got.auroc is None


def test_by_hand():
    # Probabilities .8, .6 (right, right) and .9 (wrong); three bins hold one image each.
    probs = np.array([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]])
    got = measure(np.log(probs).astype(np.float64), np.array([0, 1, 1]), ["a", "b"])
    assert got.accuracy == pytest.approx(2 / 3)
    assert got.nll == pytest.approx(-(math.log(0.8) + math.log(0.6) + math.log(0.1)) / 3)
    assert got.brier == pytest.approx((2 * 0.2**2 + 2 * 0.4**2 + 2 * 0.9**2) / 3)
    assert got.ece == pytest.approx((0.2 + 0.4 + 0.9) / 3)
    filled = {b.count: (b.low < 0.8 <= b.high, b.accuracy) for b in got.reliability if b.low < 0.8 <= b.high}
    assert filled == {1: (True, 1.0)}
    empty = got.reliability[0]
    assert (empty.low, empty.count, empty.confidence, empty.accuracy) == (0.0, 0, None, None)
    assert got.reliability[-1].high == 1.0


def test_a_bin_holds_its_upper_edge():
    third = measure(np.zeros((1, 3)), np.array([0]), ["a", "b", "c"])
    assert [k for k, b in enumerate(third.reliability) if b.count] == [4]  # (4/15, 5/15]
    sure = measure(np.array([[1000.0, 0.0]]), np.array([0]), ["a", "b"])
    assert [k for k, b in enumerate(sure.reliability) if b.count] == [14]
    assert sure.ece == 0.0


def test_teacher_against_torch():
    logits, labels, names = _example(seed=1)
    teacher, _, _ = _example(seed=2)
    got = measure(logits, labels, names, teacher)
    p, q = (torch.log_softmax(torch.from_numpy(z).double(), 1) for z in (teacher, logits))
    oracle = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert got.kl_to_teacher == pytest.approx(oracle.item(), abs=1e-12)
    assert got.agreement == pytest.approx((teacher.argmax(1) == logits.argmax(1)).mean())
    assert 0.2 < got.agreement < 0.9
    itself = measure(logits, labels, names, logits)
    assert (itself.agreement, itself.kl_to_teacher) == (1.0, 0.0)


def test_extreme_logits_stay_finite():
    logits = np.array([[3e38, -3e38], [-3e38, 3e38]], dtype=np.float32)
    got = measure(logits, np.array([0, 0]), ["a", "b"], -logits)
    assert got.nll == pytest.approx(3e38, rel=1e-6)
    assert got.brier == 1.0
    assert math.isfinite(got.kl_to_teacher)


def test_half_precision_is_widened():
    logits, labels, names = _example()
    half = logits.astype(np.float16)
    assert measure(half, labels, names) == measure(half.astype(np.float64), labels, names)


@settings(max_examples=60, deadline=None)
@given(
    logits=hnp.arrays(
        np.float32, st.tuples(st.integers(1, 30), st.integers(2, 5)), elements=st.floats(-30, 30, width=32)
    ),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 99),
)
def test_properties(logits, shift, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, logits.shape[1], len(logits))
    names = [str(k) for k in range(logits.shape[1])]
    got = measure(logits, labels, names)
    order = rng.permutation(len(logits))
    permuted = measure(logits[order], labels[order], names)
    shifted = measure(logits.astype(np.float64) + shift, labels, names)
    for name in ("nll", "brier", "macro_f1"):
        assert getattr(got, name) == pytest.approx(getattr(permuted, name), abs=1e-9)
    assert got.nll == pytest.approx(shifted.nll, abs=1e-9)
    assert 0 <= got.ece <= 1
    assert 0 <= got.brier <= 2
    assert got.accuracy == pytest.approx(np.trace(got.confusion) / got.images)
    assert sum(b.count for b in got.reliability) == got.images
    assert np.exp(log_softmax(logits)).sum(axis=1) == pytest.approx(1, abs=1e-12)
    # |accuracy - mean confidence| never exceeds ECE (triangle inequality)
    confidence = np.exp(log_softmax(logits)).max(axis=1).mean()
    assert abs(got.accuracy - confidence) <= got.ece + 1e-9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits(bad):
    logits, labels, names = _example(images=10)
    logits[3, 1] = bad
    with pytest.raises(ModelError, match="The model gives outputs that are not finite numbers on 1 of 10 images"):
        measure(logits, labels, names)
    with pytest.raises(ModelError, match="The teacher gives outputs"):
        measure(np.zeros_like(logits), labels, names, logits)


def test_bad_input():
    logits, labels, names = _example(images=10)
    with pytest.raises(ModelError, match="The model answers with 4 classes, but the data have 3"):
        measure(logits, labels, names[:3])
    with pytest.raises(ModelError, match="The teacher answers with 2 classes, but the data have 4"):
        measure(logits, labels, names, logits[:, :2])
    with pytest.raises(DataError, match="no images"):
        measure(logits[:0], labels[:0], names)
    with pytest.raises(DataError, match="no label"):
        measure(logits, labels - 1, names)
    with pytest.raises(DataError, match="no label"):
        measure(logits, labels + 4, names)
    with pytest.raises(ValueError, match=r"not \[N, C\]"):
        measure(logits, labels[:5], names)
