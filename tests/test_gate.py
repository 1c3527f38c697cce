"""The gate: fresh and guessing teachers are refused, good ones pass."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from understudy.errors import ModelError
from understudy.evaluate.gate import (
    agreement_score,
    binomial_tail,
    check_chance,
    check_classes,
    check_head,
    examine,
    examine_against_baseline,
    examine_shift,
    looks_fresh,
    refuse,
    refuses,
)
from understudy.evaluate.metrics import measure

CLASSES = ["cat", "dog", "owl"]


def _metrics(labels, answers, classes):
    """Metrics of a teacher that gives these answers."""
    labels, answers = np.asarray(labels), np.asarray(answers, dtype=np.int64)
    return measure(np.eye(len(classes))[answers] * 4, labels, classes)


def _teacher(right, *, images=300, classes=CLASSES, seed=0):
    """Even classes; `right` of the images answered rightly, the others wrongly."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % len(classes)
    wrong = (labels + rng.integers(1, len(classes), images)) % len(classes)
    answers = np.where(rng.permutation(images) < right, labels, wrong)
    return _metrics(labels, answers, classes), np.bincount(labels)


def _head(layer):
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    return layer.weight.detach().numpy(), bias


def _fresh(features=64, classes=3, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(features, classes, bias=bias)


def _trained(features, classes, *, seed=0, steps=60, optimizer=torch.optim.AdamW, lr=1e-3):
    """A linear layer after a short training on features that tell the classes apart."""
    torch.manual_seed(seed)
    layer = nn.Linear(features, classes)
    centres = torch.randn(classes, features)
    steps_of = optimizer(layer.parameters(), lr=lr)
    for _ in range(steps):
        labels = torch.randint(0, classes, (64,))
        loss = nn.functional.cross_entropy(layer(centres[labels] + torch.randn(64, features)), labels)
        steps_of.zero_grad()
        loss.backward()
        steps_of.step()
    return layer


# --- classes ---------------------------------------------------------------------------------------------------------


def test_same_classes():
    got = check_classes(CLASSES, CLASSES)
    assert got.ok
    assert got.text == "The teacher knows the 3 classes of the data, in the same order (cat, dog, owl)."


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (["cat", "owl", "dog"], "another order: class 2 is 'owl' for the teacher and 'dog' in the data"),
        (["cat", "dog", "hen"], "other classes: class 3 is 'hen' for the teacher and 'owl' in the data"),
        (["Cat", "dog", "owl"], "class 1 is 'Cat' for the teacher and 'cat' in the data"),
        (["cat", "dog"], "knows 2 classes, the data have 3 ('owl' is the first that only one of them has)"),
        (["cat", "dog", "owl", "elk"], "knows 4 classes, the data have 3 ('elk' is the first that only"),
    ],
)
def test_other_classes_refuse(teacher, words):
    got = check_classes(teacher, CLASSES)
    assert refuses(got)
    assert words in got.text
    assert examine(val=None, val_counts=[], teacher_classes=teacher, data_classes=CLASSES, head=None) == [got]


def test_classes_alone_when_they_differ_or_nothing_was_measured():
    val, counts = _teacher(250)
    arguments = {"val_counts": counts, "data_classes": CLASSES, "head": _head(_fresh())}
    swapped = examine(val=val, teacher_classes=["dog", "cat", "owl"], **arguments)
    assert [finding.check for finding in swapped] == ["classes"]
    early = examine(val=None, teacher_classes=CLASSES, **arguments)
    assert [(finding.check, finding.ok) for finding in early] == [("classes", True)]


def test_unnamed_classes_warn():
    got = check_classes([], CLASSES)
    assert (got.ok, got.severity) == (False, "warn")
    assert "order of the data (cat, dog, owl)" in got.text


# --- chance ----------------------------------------------------------------------------------------------------------


def test_binomial_tail_against_scipy():
    for right, total, share in [(0, 10, 0.5), (10, 10, 0.5), (7, 16, 0.5), (400, 600, 0.6), (3, 5, 1 / 3)]:
        oracle = stats.binomtest(right, total, share, alternative="greater").pvalue
        assert binomial_tail(right, total, share) == pytest.approx(oracle, rel=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
def test_agreement_score_against_shuffling(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 120) * (rng.random(120) < 0.7)
    answers = np.where(rng.random(120) < 0.2, labels, rng.integers(0, classes, 120))
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, answers), 1)
    shuffled = np.array([(rng.permutation(answers) == labels).sum() for _ in range(20000)])
    oracle = ((answers == labels).sum() - shuffled.mean()) / shuffled.std()
    assert agreement_score(confusion.tolist()) == pytest.approx(oracle, abs=0.05)


def test_agreement_score_where_nothing_varies():
    assert agreement_score([[30, 0], [20, 0]]) == 0
    assert agreement_score([[30, 20], [0, 0]]) == 0
    assert agreement_score([[1]]) == 0


def test_better_than_chance():
    val, counts = _teacher(250)
    got = check_chance(val, counts, CLASSES)
    assert got.ok
    assert got.text == (
        "The teacher is right on 250 of 300 validation images (83.3 %), better than always answering 'cat' (33.3 %)."
    )


def test_guessing_is_refused():
    val, counts = _teacher(104)
    got = check_chance(val, counts, CLASSES)
    assert refuses(got)
    assert "104 of 300 validation images (34.7 %), which cannot be told from guessing" in got.text
    assert "another order" not in got.text


def test_always_the_commonest_class_is_refused():
    labels = [0] * 130 + [1] * 390
    got = check_chance(_metrics(labels, [1] * 520, ["healthy", "ill"]), [130, 390], ["healthy", "ill"])
    assert refuses(got)
    assert "always answering 'ill' (75.0 %)" in got.text


def test_significance_depends_on_the_number_of_images():
    def finding(right, images):
        val, counts = _teacher(right, images=images, classes=["a", "b"])
        return check_chance(val, counts, ["a", "b"])

    assert refuses(finding(11, 16))  # p = 0.105
    assert finding(12, 16).ok  # p = 0.038
    assert finding(540, 1000).ok


def test_swapped_classes_are_hinted_at():
    val, counts = _teacher(30)
    got = check_chance(val, counts, CLASSES)
    assert refuses(got)
    assert "are its classes in another order?" in got.text


def test_a_balanced_teacher_on_lopsided_data_is_only_a_warning():
    # 95 % of the images are healthy; a teacher that finds 90 % of both kinds is less often right than 'healthy'.
    labels = np.array([0] * 570 + [1] * 30)
    answers = labels.copy()
    answers[:57], answers[570:573] = 1, 0
    got = check_chance(_metrics(labels, answers, ["healthy", "ill"]), [570, 30], ["healthy", "ill"])
    assert (got.ok, got.severity) == (False, "warn")
    assert "(90.0 %), no better than always answering 'healthy' (95.0 %)" in got.text
    assert "mean recall 90.0 % against 50.0 % for guessing" in got.text


def test_guessing_teachers_are_caught():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 100 + [1] * 200)
    caught = [
        refuses(check_chance(_metrics(labels, rng.random(300) < share, ["a", "b"]), [100, 200], ["a", "b"]))
        for share in np.linspace(0, 1, 200)
    ]
    assert np.mean(caught) > 0.96


def test_one_class_only_cannot_be_compared():
    val = _metrics([0] * 50, [0] * 50, ["a", "b"])
    got = check_chance(val, [50, 0], ["a", "b"])
    assert (got.ok, got.severity) == (False, "warn")
    assert "all 'a'" in got.text
    findings = examine(
        val=val,
        val_counts=[50, 0],
        teacher_classes=["a", "b"],
        data_classes=["a", "b"],
        head=_head(_fresh(classes=2)),
    )
    assert not any(map(refuses, findings))


# --- head ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("features", "classes"), [(32, 2), (128, 2), (512, 10), (2048, 100)])
@pytest.mark.parametrize("bias", [True, False])
def test_fresh_heads_are_detected(features, classes, bias):
    seen = [looks_fresh(*_head(_fresh(features, classes, bias, seed))) for seed in range(60)]
    assert np.mean(seen) >= 0.98


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_fresh_heads_in_half_precision(precision):
    seen = []
    for features in (301, 512, 700, 771):
        layers = [_fresh(features, 100, True, seed).to(precision).float() for seed in range(10)]
        seen += [looks_fresh(*_head(layer)) for layer in layers]
    assert np.mean(seen) >= 0.95


@pytest.mark.parametrize(("features", "classes"), [(32, 2), (128, 2), pytest.param(512, 10, marks=pytest.mark.slow)])
def test_briefly_trained_heads_are_not_fresh(features, classes):
    assert not any(looks_fresh(*_head(_trained(features, classes, seed=seed))) for seed in range(15))
    sgd = [_trained(features, classes, seed=seed, optimizer=torch.optim.SGD, lr=0.1) for seed in range(5)]
    assert not any(looks_fresh(*_head(layer)) for layer in sgd)


def test_good_teachers_with_briefly_trained_heads_are_never_refused():
    for seed in range(15):
        val, counts = _teacher(150, seed=seed)  # half right, of three classes
        findings = examine(
            val=val,
            val_counts=counts,
            teacher_classes=CLASSES,
            data_classes=CLASSES,
            head=_head(_trained(64, 3, seed=seed, steps=5)),
        )
        assert not any(map(refuses, findings))
        refuse(findings, force=False)


@pytest.mark.parametrize("shape", [(10, 512), (10, 512, 1, 1)])
def test_other_births_are_not_taken_for_linear_ones(shape):
    torch.manual_seed(0)
    for weight in (
        torch.randn(shape) * 0.01,
        nn.init.trunc_normal_(torch.empty(shape), std=0.02),
        nn.init.uniform_(torch.empty(shape), -0.01, 0.01),
        torch.zeros(shape),
    ):
        assert not looks_fresh(weight.flatten(1).numpy(), np.zeros(10))
    wide = nn.init.xavier_uniform_(torch.empty(10, 512))  # beyond 1 / sqrt(512)
    assert not looks_fresh(wide.numpy(), np.zeros(10))


def test_a_damaged_head_is_not_fresh():
    weight, bias = _head(_fresh())
    weight = weight.copy()
    weight[0, 0] = math.nan
    assert not looks_fresh(weight, bias)


def test_a_fresh_head_refuses_only_a_teacher_that_guesses():
    arguments = {"teacher_classes": CLASSES, "data_classes": CLASSES, "head": _head(_fresh())}
    bad, counts = _teacher(104)
    classes, head, chance = examine(val=bad, val_counts=counts, **arguments)
    assert (classes.check, head.check, chance.check) == ("classes", "head", "chance")
    assert classes.ok
    assert refuses(head)
    assert refuses(chance)
    assert "192 weights are spread evenly within ±0.1250, as a new layer's are" in head.text
    with pytest.raises(ModelError, match=r"^The teacher's last layer looks newly created.* again with --force\.$"):
        refuse([classes, head, chance], force=False)
    refuse([classes, head, chance], force=True)
    good, counts = _teacher(250)
    _, head, chance = examine(val=good, val_counts=counts, **arguments)
    assert (head.ok, head.severity) == (False, "warn")
    assert chance.ok


def test_a_convolution_as_head():
    torch.manual_seed(0)
    layer = nn.Conv2d(256, 4, 1)
    assert refuses(check_head(_head(layer), unproven=True, guessing=True))


def test_zero_biases_count_only_where_the_teacher_guesses():
    head = (np.random.default_rng(0).normal(0, 0.01, (10, 512)).astype(np.float32), np.zeros(10, np.float32))
    guessing = check_head(head, unproven=True, guessing=True)
    assert refuses(guessing)
    assert "biases are all exactly 0" in guessing.text
    for unproven in (False, True):
        assert check_head(head, unproven=unproven, guessing=False).ok
    assert check_head((head[0], None), unproven=True, guessing=True).ok


def test_an_unknown_head_passes():
    got = check_head(None, unproven=True, guessing=True)
    assert got.ok
    assert "was not checked" in got.text


# --- the rest --------------------------------------------------------------------------------------------------------


def test_a_good_teacher_passes_with_a_sentence_for_each_check():
    val, counts = _teacher(290)
    findings = examine(
        val=val,
        val_counts=counts.tolist(),
        teacher_classes=CLASSES,
        data_classes=CLASSES,
        head=_head(_trained(64, 3)),
    )
    assert [(finding.check, finding.ok) for finding in findings] == [
        ("classes", True),
        ("head", True),
        ("chance", True),
    ]
    assert all(finding.text.endswith(".") for finding in findings)
    refuse(findings, force=False)


def test_against_the_baseline():
    better = examine_against_baseline(0.93, [0.9, 0.92])
    assert better.ok
    assert "(93.0 % against 91.0 % of the validation images, mean of 2 seeds)" in better.text
    for accuracy in (0.91, 0.8):
        worse = examine_against_baseline(accuracy, [0.9, 0.92])
        assert (worse.ok, worse.severity) == (False, "warn")
        assert "no better than the student trained alone" in worse.text
    assert "mean of" not in examine_against_baseline(0.9, [0.8]).text
    refuse([worse], force=False)


def test_test_images_unlike_the_validation_images():
    (good, _), (bad, _), (near, _) = _teacher(290), _teacher(240), _teacher(285)
    finding = examine_shift(good, bad)
    assert (finding.ok, finding.severity) == (False, "warn")
    assert (
        "right on 96.7 % of the validation images and 80.0 % of the test images: the test images differ" in finding.text
    )
    assert examine_shift(good, near).ok
    assert examine_shift(bad, good).ok  # easier test images are no warning
    refuse([finding], force=False)
