"""The verdict against hand-computed analysis of variance, scipy, and simulation with known truth."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from understudy.errors import DataError
from understudy.evaluate.intervals import mean_squares, quantile, wilson
from understudy.evaluate.verdict import accuracy_interval, judge, points

PAGE = Path(__file__).parents[1] / "docs" / "verdict.md"


def _judge(student, baseline, *, teacher_accuracy=0.97, min_gain=0.005):
    return judge(student, baseline, seeds=range(len(student)), teacher_accuracy=teacher_accuracy, min_gain=min_gain)


def _from_differences(differences):
    return differences >= 0, differences <= 0


def _slow_anova(table):
    """Mean squares by loops over the definition; (MS of seeds, of images, of the rest)."""
    S, N = len(table), len(table[0])
    grand = sum(sum(row) for row in table) / (S * N)
    seed = [sum(row) / N for row in table]
    image = [sum(table[s][i] for s in range(S)) / S for i in range(N)]
    ss_seed = sum(N * (m - grand) ** 2 for m in seed)
    ss_image = sum(S * (m - grand) ** 2 for m in image)
    ss_all = sum((table[s][i] - grand) ** 2 for s in range(S) for i in range(N))
    rest = ss_all - ss_seed - ss_image
    return ss_seed / (S - 1), ss_image / (N - 1), rest / ((S - 1) * (N - 1))


def _slow_interval(table, pseudo):
    """The page's formulas by hand, for three seeds or more."""
    table = [[float(v) for v in row] + list(pseudo) for row in table]
    S, N = len(table), len(table[0])
    ms_s, ms_i, ms_r = _slow_anova(table)
    numerator = ms_s + max(ms_i - ms_r, 0)
    t = stats.t.ppf(0.975, numerator**2 / (ms_s**2 / (S - 1))) if ms_s > 1e-15 else stats.norm.ppf(0.975)
    half = t * math.sqrt(numerator / (S * N))
    mean = sum(map(sum, table)) / (S * N)
    return mean - half, mean + half


def _simulate(rng, *, seeds, images, seed_sd, noise_sd, student=1.5, baseline=1.3):
    """Right where a latent normal score is above 0; returns both tables and the true gain and accuracy."""
    shared = rng.normal(0, 1, images)

    def table(mean):
        own = rng.normal(0, 0.3, images)
        return mean + rng.normal(0, seed_sd, (seeds, 1)) + shared + own + rng.normal(0, noise_sd, (seeds, images)) > 0

    sd = math.sqrt(1 + 0.3**2 + seed_sd**2 + noise_sd**2)
    truth = stats.norm.cdf(student / sd) - stats.norm.cdf(baseline / sd)
    return table(student), table(baseline), truth, stats.norm.cdf(student / sd)


@pytest.mark.parametrize(("seeds", "images"), [(3, 7), (4, 50), (9, 5)])
def test_mean_squares_against_loops(seeds, images):
    table = np.random.default_rng(seeds).integers(-1, 2, (seeds, images))
    got = mean_squares(table)
    assert (got.ms_seeds, got.ms_images, got.ms_rest) == pytest.approx(_slow_anova(table.tolist()), abs=1e-12)
    assert got.mean == pytest.approx(table.mean())


@pytest.mark.parametrize("seeds", [3, 4, 8])
def test_intervals_against_loops(seeds):
    rng = np.random.default_rng(seeds)
    student, baseline, _, _ = _simulate(rng, seeds=seeds, images=60, seed_sd=0.1, noise_sd=0.3)
    differences = student.astype(int) - baseline
    half = math.sqrt(0.5)
    got = _judge(student, baseline).gain
    assert (got.low, got.high) == pytest.approx(_slow_interval(differences.tolist(), (half, -half)), abs=1e-12)
    assert got.value == pytest.approx(differences.mean())
    accuracy = accuracy_interval(student)
    assert (accuracy.low, accuracy.high) == pytest.approx(_slow_interval(student.tolist(), (1, 1, 0, 0)), abs=1e-12)
    assert accuracy.value == pytest.approx(student.mean())


def test_pseudo_images_are_agresti_and_min():
    # One seed: Agresti and Min 2005 add 1/2 to each cell of the 2 x 2 table of n pairs.
    gained, lost, images = 12, 5, 200
    row = np.array([1] * gained + [-1] * lost + [0] * (images - gained - lost))
    got = _judge(*_from_differences(row[None])).gain
    b, c, n = gained + 0.5, lost + 0.5, images + 2
    half = stats.norm.ppf(0.975) * math.sqrt((b + c - (b - c) ** 2 / n) / n**2)
    assert (got.low, got.high) == pytest.approx(((b - c) / n - half, (b - c) / n + half), abs=2e-4)  # n, not n - 1


def test_without_seed_differences_it_is_the_normal_interval_over_images():
    rng = np.random.default_rng(0)
    row = rng.integers(-1, 2, 80)
    squares = mean_squares(np.tile(row, (3, 1)))
    assert squares.ms_seeds == pytest.approx(0, abs=1e-20)
    assert squares.ms_rest == pytest.approx(0, abs=1e-20)
    se = stats.sem(row)
    assert squares.half_width == pytest.approx(stats.norm.ppf(0.975) * se, rel=1e-9)


def test_with_seed_differences_only_it_is_the_t_interval_over_seeds():
    means = np.array([0.1, 0.4, 0.25, 0.3])
    squares = mean_squares(np.tile(means[:, None], (1, 50)))
    assert squares.freedom == pytest.approx(3)
    low, high = stats.t.interval(0.95, 3, means.mean(), stats.sem(means))
    assert squares.half_width == pytest.approx((high - low) / 2)


def test_two_seeds_follow_banerjee():
    table = np.array([[1, 0, 0, 1, 0, -1], [1, 1, 0, 1, 0, 0]])
    ms_s, ms_i, ms_r = _slow_anova(table.tolist())
    half = math.sqrt((stats.t.ppf(0.975, 1) ** 2 * ms_s + stats.norm.ppf(0.975) ** 2 * max(ms_i - ms_r, 0)) / 12)
    assert mean_squares(table).half_width == pytest.approx(half)


def test_expected_mean_squares_at_another_size():
    rng = np.random.default_rng(1)
    squares = mean_squares(rng.normal(0, 1, (4, 30)) + np.arange(4)[:, None] + rng.normal(0, 3, 30))
    assert squares.ms_seeds > squares.ms_rest
    assert squares.ms_images > squares.ms_rest
    same = squares.at(4, 30)
    assert (same.ms_seeds, same.ms_images) == pytest.approx((squares.ms_seeds, squares.ms_images))
    twice = squares.at(8, 60)
    e, a, b = squares.ms_rest, (squares.ms_seeds - squares.ms_rest) / 30, (squares.ms_images - squares.ms_rest) / 4
    assert (twice.ms_seeds, twice.ms_images, twice.ms_rest) == pytest.approx((60 * a + e, 8 * b + e, e))
    assert twice.variance == pytest.approx(a / 8 + b / 60 + e / 480)
    assert squares.at(8, 30).half_width < squares.half_width
    assert squares.at(4, 60).half_width < squares.half_width


def test_quantile_against_scipy():
    for freedom in (1, 2, 3.7, 200.5):
        assert quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-10)
    assert quantile(math.inf) == pytest.approx(stats.norm.ppf(0.975), rel=1e-12)


@pytest.mark.parametrize(("right", "images"), [(0, 10), (10, 10), (1, 1), (937, 1000)])
def test_wilson_against_scipy(right, images):
    got = wilson(right, images)
    oracle = stats.binomtest(right, images).proportion_ci(0.95, method="wilson")
    assert (got.low, got.high) == pytest.approx((oracle.low, oracle.high), abs=1e-12)
    row = np.arange(images) < right
    assert accuracy_interval(row[None]) == got


@pytest.mark.parametrize(
    ("seeds", "seed_sd", "noise_sd"),
    [(1, 0.0, 0.02), (2, 0.1, 0.3), (3, 0.0, 0.02), (3, 0.0, 0.4), (3, 0.05, 0.3), (3, 0.3, 0.3), (6, 0.1, 0.3)],
)
def test_coverage(seeds, seed_sd, noise_sd):
    rng = np.random.default_rng(20)
    repeats = 1000
    hits = accurate = above = 0
    for _ in range(repeats):
        student, baseline, gain, accuracy = _simulate(rng, seeds=seeds, images=200, seed_sd=seed_sd, noise_sd=noise_sd)
        got, alone = _judge(student, baseline).gain, accuracy_interval(student)
        hits += got.low <= gain <= got.high
        above += got.low > gain
        accurate += alone.low <= accuracy <= alone.high
    assert 0.92 <= hits / repeats <= 0.99
    assert 0.91 <= accurate / repeats <= 0.995
    assert above / repeats <= 0.045


def test_few_differing_answers_do_not_look_certain():
    differences = np.zeros((3, 400), dtype=int)
    differences[:, :4] = 1
    exact = stats.binomtest(4, 4).pvalue  # McNemar: 4 gained, none lost
    assert exact > 0.05
    assert _judge(*_from_differences(differences)).outcome == "INCONCLUSIVE"
    differences[:, :8] = 1
    assert _judge(*_from_differences(differences)).outcome == "BEATS"


def test_equal_answers():
    right = np.random.default_rng(0).random((3, 100)) < 0.9
    small = _judge(right, right)
    assert small.gain.value == 0
    assert small.gain.low == pytest.approx(-small.gain.high)
    assert small.gain.high == pytest.approx(1.96 / 102, rel=0.01)
    assert small.outcome == "INCONCLUSIVE"
    assert "exactly as accurate as the same student trained alone" in small.text
    right = np.tile(right, (1, 20))
    large = _judge(right, right)
    assert large.outcome == "NO GAIN"
    assert large.text.startswith("No gain worth having: the distilled student is exactly as accurate")


def test_all_gained_and_a_single_image():
    all_gained = _judge(np.ones((3, 50), bool), np.zeros((3, 50), bool))
    assert (all_gained.gain.value, all_gained.gain.high, all_gained.outcome) == (1.0, 1.0, "BEATS")
    assert 0.85 < all_gained.gain.low < 1
    one = _judge(np.ones((3, 1), bool), np.zeros((3, 1), bool))
    assert one.outcome == "INCONCLUSIVE"
    assert "3 seeds, 1 test image)" in one.text


def _table(gained, lost, images=1000, seeds=3):
    """Differences with other images for every seed, so that the seeds agree in number only."""
    rng = np.random.default_rng(gained + lost)
    row = np.array([1] * gained + [-1] * lost + [0] * (images - gained - lost))
    return _from_differences(np.stack([rng.permutation(row) for _ in range(seeds)]))


def test_beats():
    got = _judge(*_table(60, 20))
    assert got.outcome == "BEATS"
    gain = got.gain
    assert got.text == (
        "The distilled student beats the same student trained alone by 4.0 points (95 % interval "
        f"{100 * gain.low:.1f} to {100 * gain.high:.1f}; 3 seeds, 1000 test images)."
    )
    assert got.per_seed == {"0": 0.04, "1": 0.04, "2": 0.04}
    assert (got.seeds, got.images, got.min_gain) == (3, 1000, 0.005)
    assert "Hillis 2007" in got.method
    assert "Agresti and Min 2005" in got.method


def test_beats_by_less_than_was_asked_for():
    got = _judge(*_table(60, 20), min_gain=0.2)
    assert got.outcome == "BEATS"
    assert got.text.endswith("Even so, it is less than the 20.0 points asked for.")


def test_worse():
    got = _judge(*_table(20, 60), teacher_accuracy=1.0)
    assert got.outcome == "NO GAIN"
    assert got.text.startswith("No gain: the teacher made it worse. The distilled student is 4.0 points below")
    assert got.gap_closed < 0


def test_no_gain_worth_having():
    got = _judge(*_table(3, 3, images=5000))
    assert got.outcome == "NO GAIN"
    assert got.gain.low < 0 < got.gain.high < 0.005
    assert got.text.endswith("and a gain of 0.5 points can be ruled out.")


def test_inconclusive_names_the_larger_part():
    images = np.zeros((3, 40), dtype=int)
    images[:, :6], images[:, 6:10] = 1, -1  # all seeds alike: only images vary
    got = _judge(*_from_differences(images))
    assert got.outcome == "INCONCLUSIVE"
    assert "leaves room for no gain and for a gain worth having, at least 0.5 points." in got.text
    assert "More test images would help most: with 80 test images expect about ±" in got.text
    seeds = np.zeros((3, 4000), dtype=int)
    seeds[0, :200], seeds[1, 1000:1300], seeds[2, 2000:2020] = 1, -1, 1
    got = _judge(*_from_differences(seeds))
    assert got.outcome == "INCONCLUSIVE"
    assert "0.7 points below" in got.text
    assert "More seeds would help most: with 6 seeds expect about ±" in got.text
    before, after = map(float, re.findall(r"±(\d+\.\d)", got.text)[::-1])
    assert after < before / 1.4


def test_one_seed_never_decides():
    for differences in (np.ones((1, 500), int), -np.ones((1, 500), int), np.zeros((1, 50000), int)):
        got = _judge(*_from_differences(differences))
        assert got.outcome == "INCONCLUSIVE"
        assert got.text.startswith("One seed cannot tell luck from gain; use --seeds 3.")
        assert "over the test images only (one seed)" in got.method


def test_gap_closed():
    student, baseline = _table(60, 20)
    alone = baseline.mean()
    assert _judge(student, baseline, teacher_accuracy=alone + 0.08).gap_closed == pytest.approx(0.5)
    assert _judge(student, baseline, teacher_accuracy=alone + 0.001).gap_closed == pytest.approx(40)
    assert _judge(student, baseline, teacher_accuracy=alone + 0.0009).gap_closed is None
    assert _judge(student, baseline, teacher_accuracy=alone - 0.1).gap_closed is None


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.int8, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=st.integers(-1, 1)))
def test_properties(differences):
    student, baseline = _from_differences(differences)
    got, reverse = _judge(student, baseline), _judge(baseline, student)
    assert -1 <= got.gain.low <= got.gain.value <= got.gain.high <= 1
    assert (got.gain.low, got.gain.high) == pytest.approx((-reverse.gain.high, -reverse.gain.low), abs=1e-9)
    order = np.random.default_rng(0).permutation(differences.shape[1])
    assert _judge(student[:, order], baseline[:, order]).gain.low == pytest.approx(got.gain.low, abs=1e-9)
    assert _judge(student[::-1], baseline[::-1]).gain.high == pytest.approx(got.gain.high, abs=1e-9)
    accuracy = accuracy_interval(student)
    assert 0 <= accuracy.low <= accuracy.value <= accuracy.high <= 1
    assert "nan" not in got.text + got.method
    assert np.mean(list(got.per_seed.values())) == pytest.approx(got.gain.value)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.018, "1.8"),
        (-0.004, "-0.4"),
        (0.0004, "0.04"),
        (-0.0004, "-0.04"),
        (0.0, "0.0"),
        (-1e-9, "0.0"),
        (1.0, "100.0"),
    ],
)
def test_points(share, text):
    assert points(share) == text


def test_bad_input():
    table = np.ones((3, 5), bool)
    with pytest.raises(DataError, match="no test images"):
        _judge(table[:, :0], table[:, :0])
    with pytest.raises(DataError, match="no test images"):
        accuracy_interval(table[:, :0])
    with pytest.raises(ValueError, match="do not match"):
        _judge(table, table[:, :4])
    with pytest.raises(ValueError, match="2 seeds do not match"):
        judge(table, table, seeds=[0, 1], teacher_accuracy=1.0, min_gain=0.005)
    with pytest.raises(ValueError, match="wanted"):
        accuracy_interval(table[0])


def test_the_page_says_what_the_code_gives():
    page = PAGE.read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.S)
    names = {}
    exec(code.group(1), names)  # the page's own example
    verdict = names["verdict"]
    assert verdict.text in page
    table = names["student"].astype(int) - names["baseline"]
    half = math.sqrt(0.5)
    mean_squares_by_hand = _slow_anova([[*map(float, row), half, -half] for row in table.tolist()])
    assert "MS_S {:.4f}, MS_I {:.4f}, MS_R {:.4f};".format(*mean_squares_by_hand) in page
    assert f"{verdict.gain.low:.4f} to {verdict.gain.high:.4f}" in page
    assert "84.2" in page
    assert "84.2 Satterthwaite degrees of freedom" in verdict.method
