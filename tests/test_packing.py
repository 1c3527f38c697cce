"""How logits are kept: what is lost is what rounding and the chosen bound allow, by an independent slow computation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from understudy.data import packing
from understudy.data.packing import DENSE_UP_TO, LOST_AT_MOST, Packing, choose, lost

HALF = 2.0**-11  # largest relative error of a number rounded to half precision


def confident(images: int, classes: int, seed: int = 0, *, peak: float = 12.0) -> np.ndarray:
    """Return logits of a teacher that is fairly sure of one class of each image."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (images, classes)).astype(np.float32)
    logits[np.arange(images), rng.integers(0, classes, images)] += peak
    return logits


def softmax(row: np.ndarray, temperature: float) -> np.ndarray:
    scaled = row.astype(np.float64) / temperature
    shifted = np.exp(scaled - scaled.max())
    return shifted / shifted.sum()


def slowly_lost(logits: np.ndarray, top: int, temperature: float) -> float:
    """Compute what is lost image by image and class by class, in float64, but for the rounding to halves."""
    said = missing = 0.0
    for row in logits.astype(np.float64):
        order = sorted(range(len(row)), key=lambda place: -row[place])
        spread = np.log(np.mean([np.exp(row[place]) for place in order[top:]]))
        kept = np.full(len(row), np.float64(np.float16(spread)))
        for place in order[:top]:
            kept[place] = np.float16(row[place])
        p, q = softmax(row, temperature), softmax(kept, temperature)
        missing += float(sum(p * np.log(p / q)))
        said += float(sum(p * np.log(p * len(row))))
    return missing / said


# --- dense ---


@given(arrays.arrays(np.float32, (5, 7), elements=st.floats(-6e4, 6e4, width=32)))
def test_all_logits_come_back_within_half_precision(logits: np.ndarray) -> None:
    dense = Packing(7)
    back = dense.logits(dense.pack(logits))
    assert back.dtype == np.float32
    assert (np.abs(back - logits) <= np.abs(logits) * HALF + 2.0**-25).all()


def test_what_half_precision_cannot_hold_becomes_its_largest_number() -> None:
    logits = np.array([[1e30, -1e30, 65504.0, 7e4, 3.0]], np.float32)
    for form in (Packing(5), Packing(5, top=4)):
        back = form.logits(form.pack(logits))
        assert np.isfinite(back).all()
        assert back[0].tolist() == [65504.0, -65504.0, 65504.0, 65504.0, 3.0]


def test_a_row_takes_the_bytes_that_it_should() -> None:
    assert Packing(10).row.itemsize == 20
    assert Packing(1000, top=16).row.itemsize == 16 * 4 + 2
    assert Packing(70_000, top=16).row.itemsize == 16 * 6 + 2
    assert Packing(10, embedding=8).row.itemsize == 36


def test_the_embedding_is_kept_as_well() -> None:
    embedding = np.random.default_rng(0).normal(0, 3, (4, 6)).astype(np.float32)
    for form in (Packing(200, embedding=6), Packing(200, top=8, embedding=6)):
        rows = form.pack(confident(4, 200), embedding)
        np.testing.assert_allclose(rows["embedding"].astype(np.float32), embedding, rtol=HALF, atol=1e-6)


# --- the largest ones with the mass of the rest ---


@pytest.mark.parametrize(("classes", "top"), [(200, 8), (1000, 32), (21_841, 64)])
def test_the_mass_of_the_rest_is_kept(classes: int, top: int) -> None:
    logits = confident(6, classes, peak=float(np.log(classes)) + 2)
    form = Packing(classes, top)
    back = form.logits(form.pack(logits))
    for row, kept in zip(logits, back, strict=True):
        largest = np.argsort(-row)[:top]
        rest = np.setdiff1d(np.arange(classes), largest)
        np.testing.assert_allclose(kept[largest], row[largest], rtol=HALF)
        assert len(np.unique(kept[rest])) == 1
        mass, kept_mass = (softmax(one, 1)[rest].sum() for one in (row, kept))
        # rounding shifts a logit by a share of its size, and so the mass by that much
        assert kept_mass == pytest.approx(mass, rel=HALF * 2 * float(np.abs(row).max()) + 1e-3)
        assert mass > 0.01


def test_places_are_those_of_the_largest_whatever_their_order() -> None:
    logits = confident(50, 300, seed=3)
    rows = Packing(300, top=8).pack(logits)
    for row, places in zip(logits, rows["places"], strict=True):
        assert set(places.tolist()) == set(np.argsort(-row)[:8].tolist())


def test_places_beyond_65535_are_kept() -> None:
    logits = np.zeros((1, 70_000), np.float32)
    logits[0, [0, 65_535, 65_536, 69_999]] = [5, 6, 7, 8]
    form = Packing(70_000, top=4)
    back = form.logits(form.pack(logits))
    assert back[0, [0, 65_535, 65_536, 69_999]].tolist() == [5, 6, 7, 8]
    assert back[0, 1] == back[0, 30_000] == 0


def test_equal_logits_lose_nothing() -> None:
    same = np.full((3, 400), 2.5, np.float32)
    form = Packing(400, top=8)
    assert (form.logits(form.pack(same)) == 2.5).all()
    assert lost(same, form, 1.0) == 0


def test_the_rest_may_lie_far_below_what_exp_can_hold() -> None:
    logits = np.full((1, 200), -800.0, np.float32)
    logits[0, 7] = 900.0
    form = Packing(200, top=8)
    assert form.logits(form.pack(logits))[0, [7, 0, 199]].tolist() == [900.0, -800.0, -800.0]


# --- what is lost, and the choice ---


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 16.0])
@pytest.mark.parametrize("top", [8, 32, 100])
def test_lost_equals_the_slow_computation(temperature: float, top: int) -> None:
    logits = confident(12, 150, peak=4.0)
    fast, slow = lost(logits, Packing(150, top), temperature), slowly_lost(logits, top, temperature)
    assert fast == pytest.approx(slow, rel=1e-6, abs=1e-12)
    assert 0 < fast < 1


def test_less_is_lost_the_more_is_kept() -> None:
    logits = confident(20, 500, peak=5.0)
    shares = [lost(logits, Packing(500, top), 4.0) for top in (8, 16, 32, 64, 128, 256)]
    assert shares == sorted(shares, reverse=True)
    assert lost(logits, Packing(500), 4.0) < 1e-5


@pytest.mark.parametrize("classes", [2, 10, DENSE_UP_TO])
def test_few_classes_are_kept_whole(classes: int) -> None:
    assert choose(confident(20, classes), [1.0, 4.0]) == Packing(classes)


@pytest.mark.parametrize(("peak", "temperatures"), [(12.0, [1.0]), (25.0, [1.0, 4.0]), (9.0, [1.0]), (30.0, [2.0])])
def test_the_smallest_form_within_the_bound_is_chosen(peak: float, temperatures: list[float]) -> None:
    logits = confident(64, 1000, peak=peak)
    chosen = choose(logits, temperatures)
    assert chosen.top is not None
    assert max(slowly_lost(logits, chosen.top, t) for t in temperatures) <= LOST_AT_MOST
    if chosen.top > 8:
        assert max(slowly_lost(logits, chosen.top // 2, t) for t in temperatures) > LOST_AT_MOST


def test_where_nothing_smaller_is_good_enough_all_are_kept() -> None:
    shapeless = np.random.default_rng(0).normal(0, 1, (64, 400)).astype(np.float32)
    assert choose(shapeless, [1.0, 16.0]) == Packing(400)


def test_a_higher_temperature_never_keeps_fewer() -> None:
    logits = confident(64, 2000, peak=14.0)
    kept = [choose(logits, [temperature]).top or 2000 for temperature in (1.0, 2.0, 4.0)]
    assert kept == sorted(kept)


def test_twenty_two_thousand_classes() -> None:
    """ImageNet's full list: a sure teacher takes kilobytes less, and the loss stays within the bound."""
    logits = confident(48, 21_841, peak=22.0)
    chosen = choose(logits, [1.0], embedding=4)
    assert (chosen.classes, chosen.embedding) == (21_841, 4)
    assert chosen.top is not None
    assert chosen.row.itemsize < 21_841 * 2
    assert lost(logits, chosen, 1.0) <= LOST_AT_MOST
    assert chosen.pack(logits, np.zeros((48, 4), np.float32))["places"].max() > 2**14


# --- how far rows are off ---


@pytest.mark.parametrize("form", [Packing(300), Packing(300, top=16)])
def test_rows_are_not_off_from_what_they_were_made_of(form: Packing) -> None:
    logits = confident(30, 300)
    assert form.error(form.pack(logits), logits).tolist() == [0] * 30


@pytest.mark.parametrize("form", [Packing(300), Packing(300, top=16)])
def test_a_logit_that_is_off_shows_as_a_share_of_the_largest(form: Packing) -> None:
    logits = confident(30, 300)
    moved = logits.copy()
    place = int(moved[4].argmax())
    moved[4, place] *= 1.1
    error = form.error(form.pack(logits), moved)
    assert error[4] == pytest.approx(0.1 / 1.1, abs=2e-3)
    assert np.delete(error, 4).max() == 0
    assert (form.error(form.pack(logits), confident(30, 300, seed=1)) > 0.3).all()


def test_a_change_among_the_rest_shows_in_their_mass() -> None:
    logits = confident(5, 300)
    form = Packing(300, top=16)
    moved = np.where(logits < np.sort(logits, 1)[:, [-16]], logits + 2, logits)
    assert (form.error(form.pack(logits), moved) > 0.05).all()


def test_answers_that_are_no_numbers_are_not_close() -> None:
    logits = confident(2, 10)
    broken = logits.copy()
    broken[1, 3] = np.nan
    with np.errstate(invalid="ignore"):
        error = Packing(10).error(Packing(10).pack(logits), broken)
    assert error[0] == 0
    assert not error[1] <= 1


def test_what_a_packing_says_of_itself_makes_it_again() -> None:
    for form in (Packing(10), Packing(1000, 32, 16)):
        assert Packing(**form.describe()) == form
    assert packing.DENSE_UP_TO == 128
