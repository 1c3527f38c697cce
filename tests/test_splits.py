"""Which images are held out: shares, seeds, stability, identical images, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from understudy.data import splits
from understudy.errors import DataError

SPLIT = {"classes": ("a", "b"), "val_fraction": 0.15, "test_fraction": 0.2, "seed": 0}


def hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


def test_shares_are_those_that_were_asked_for():
    count = 40_000
    labels = (np.arange(count) % 4 == 0).astype(np.int64)
    parts, notes = splits.split(labels, np.full(count, -1, np.int8), hashes(count), **SPLIT)
    for label, total in ((0, 30_000), (1, 10_000)):
        test, val = (int((labels[parts[name]] == label).sum()) for name in ("test", "val"))
        assert abs(test - 0.2 * total) < 4 * (total * 0.2 * 0.8) ** 0.5  # binomial, 4 sigma
        assert abs(val - 0.15 * (total - test)) < 4 * (total * 0.8 * 0.15 * 0.85) ** 0.5
    test, val = len(parts["test"]), len(parts["val"])
    tail = "drawn by class with split seed 0."
    assert notes == [
        f"The test split was held out of the training images: {test} of 40000 (20 %), {tail}",
        f"The validation split was held out of the training images: {val} of {40_000 - test} (15 %), {tail}",
    ]


def test_shares_do_not_depend_on_ids_being_spread_out():
    ids = np.arange(20_000, dtype=np.uint64)
    labels = (ids % 2).astype(np.int64)
    parts, _ = splits.split(labels, np.full(len(ids), -1, np.int8), ids, **SPLIT)
    assert abs(len(parts["test"]) - 4000) < 4 * (20_000 * 0.2 * 0.8) ** 0.5


def test_seed_changes_the_choice_and_nothing_else_does():
    labels = np.arange(2000, dtype=np.int64) % 2
    none = np.full(2000, -1, np.int8)
    ids = hashes(2000)
    first, _ = splits.split(labels, none, ids, **SPLIT)
    again, _ = splits.split(labels, none, ids, **SPLIT)
    other, _ = splits.split(labels, none, ids, **{**SPLIT, "seed": 1})
    assert all(np.array_equal(first[name], again[name]) for name in first)
    common = len(set(first["test"]) & set(other["test"]))
    assert 40 < common < 120  # 2000 x 0.2 x 0.2 = 80 by chance


@settings(max_examples=150, deadline=None)
@drawn(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 3)), min_size=3, max_size=25, unique_by=lambda pair: pair[0]),
    st.lists(
        st.tuples(st.integers(40, 99), st.integers(1, 3)), min_size=3, max_size=25, unique_by=lambda pair: pair[0]
    ),
    st.integers(0, 5),
    st.floats(0.01, 0.49),
    st.randoms(use_true_random=False),
)
def test_split_holds_its_promises(first, second, seed, fraction, random):
    pairs = [(0, id_) for id_, times in first for _ in range(times)] + [
        (1, id_) for id_, times in second for _ in range(times)
    ]
    random.shuffle(pairs)
    labels, ids = (np.array(column) for column in zip(*pairs, strict=True))
    ids = ids.astype(np.uint64)
    how = {"classes": ("a", "b"), "val_fraction": fraction, "test_fraction": fraction, "seed": seed}
    parts, _ = splits.split(labels, np.full(len(ids), -1, np.int8), ids, **how)
    rows = np.concatenate(list(parts.values()))
    assert sorted(rows.tolist()) == list(range(len(ids)))  # disjoint, and nothing is lost
    for name, part in parts.items():
        assert (np.diff(part) > 0).all(), name
        assert set(labels[part].tolist()) == {0, 1}, name  # each class in each split
    where = [set(ids[part].tolist()) for part in parts.values()]
    assert sum(map(len, where)) == len(set().union(*where))  # identical images together
    order = np.array(random.sample(range(len(ids)), len(ids)))
    shuffled, _ = splits.split(labels[order], np.full(len(ids), -1, np.int8), ids[order], **how)
    assert all(set(ids[order][shuffled[name]].tolist()) == set(ids[parts[name]].tolist()) for name in parts)


def roles(train: int, val: int, test: int) -> tuple[np.ndarray, np.ndarray]:
    given = np.repeat(np.array([0, 1, 2], np.int8), [train, val, test])
    return np.arange(len(given), dtype=np.int64) % 2, given


def test_given_splits_are_kept():
    labels, given = roles(100, 60, 80)
    parts, notes = splits.split(labels, given, hashes(240), **SPLIT)
    assert notes == []
    assert [parts[name].tolist() for name in ("train", "val", "test")] == [
        list(range(100)),
        list(range(100, 160)),
        list(range(160, 240)),
    ]


def test_tiny_validation_split_joins_train_and_a_new_one_is_held_out():
    labels, given = roles(1000, 16, 100)
    parts, notes = splits.split(labels, given, hashes(1116), **SPLIT)
    assert parts["test"].tolist() == list(range(1016, 1116))
    assert 100 < len(parts["val"]) < 210
    assert len(parts["train"]) + len(parts["val"]) == 1016
    assert (
        "has 16 images only, too few to choose by (fewer than 50), so they were added to the 1000 training" in notes[0]
    )
    assert f"{len(parts['val'])} of 1016" in notes[1]


@pytest.mark.parametrize(
    ("train", "val", "kept"), [(1000, 49, False), (1000, 50, True), (49, 49, True), (50, 49, False), (40, 45, True)]
)
def test_what_counts_as_tiny(train, val, kept):
    labels, given = roles(train, val, 60)
    parts, notes = splits.split(labels, given, hashes(len(labels)), **SPLIT)
    assert (parts["val"].tolist() == list(range(train, train + val))) is kept
    assert bool(notes) is not kept


def test_ten_for_each_class_on_average():
    classes = tuple("abcdefgh")
    given = np.repeat(np.array([0, 1, 2], np.int8), [800, 79, 80])
    labels = np.arange(len(given), dtype=np.int64) % 8
    _, notes = splits.split(labels, given, hashes(len(given)), **{**SPLIT, "classes": classes})
    assert "79 images only, too few to choose by (fewer than 80)" in notes[0]


def test_missing_test_split_is_held_out_of_train_beside_a_given_validation():
    labels, given = roles(1000, 100, 0)
    parts, notes = splits.split(labels, given, hashes(1100), **SPLIT)
    assert parts["val"].tolist() == list(range(1000, 1100))
    assert 150 < len(parts["test"]) < 250
    assert [note.split(":")[0] for note in notes] == ["The test split was held out of the training images"]


def test_too_few_images_are_refused():
    one = np.array([0, 0, 0, 0, 1], np.int64)
    none = np.full(5, -1, np.int8)
    with pytest.raises(DataError, match=r"The class 'b' has too few usable images \(1\)"):
        splits.split(one, none, hashes(5), **SPLIT)
    with pytest.raises(DataError, match="too few different images to hold any out for 'test'"):
        splits.split(np.array([0, 0, 1, 1], np.int64), none[:4], hashes(4), **SPLIT)
    same = np.array([7] * 6 + [8, 9, 10], np.uint64)  # class a: the same image six times
    labels = np.array([0] * 6 + [1] * 3, np.int64)
    parts, notes = splits.split(labels, np.full(9, -1, np.int8), same, **SPLIT)
    assert set(range(6)) <= set(parts["train"].tolist())
    assert notes[2:] == [f"Classes of too few images to have any in '{name}': 'a'." for name in ("val", "test")]
    untrained = np.array([0, 0, 2, 2, 0, 1], np.int8)
    with pytest.raises(DataError, match="The class 'b' has no image left to train on"):
        splits.split(np.array([0, 0, 1, 1, 0, 0], np.int64), untrained, hashes(6), **SPLIT)
