"""Intervals and tests of studies: numbers by hand, slow recounts, and scipy as the other one."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from analyses.statistics import (
    FEW,
    Estimate,
    crossed_interval,
    effect_size,
    mean_interval,
    paired_difference,
    permutation_test,
    proportion_interval,
    sign_flip_test,
    sign_test,
    welch_difference,
)

RNG = np.random.default_rng(0)


def ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None and estimate.high is not None
    return estimate.low, estimate.high


def test_a_claim_holds_only_where_the_whole_interval_does():
    found = Estimate(value=1.0, low=0.2, high=1.8, n=3)
    assert found.above(0) and found.above(0.1) and not found.above(0.2)
    assert found.below(2) and not found.below(1.8)
    alone = Estimate(value=1.0, low=None, high=None, n=1)
    assert not alone.above(-9) and not alone.below(9)


def test_an_interval_of_a_share_ends_at_0_and_1():
    assert ends(Estimate(value=0.9, low=0.7, high=1.1, n=3).clipped(0, 1)) == (0.7, 1.0)
    assert ends(Estimate(value=0.1, low=-0.1, high=0.3, n=3).clipped(0, 1)) == (0.0, 0.3)
    assert Estimate(value=1.0, low=None, high=None, n=1).clipped(0, 1).high is None


def test_few_units_get_students_interval():
    # mean 3, deviation 1, t(0.975, 2) = 4.3027, so 3 +- 4.3027 / sqrt(3) = 3 +- 2.4841
    found = mean_interval(np.array([2.0, 3.0, 4.0]))
    assert (found.value, found.n) == (3.0, 3)
    assert ends(found) == pytest.approx((0.5159, 5.4841), abs=1e-4)


def test_a_single_unit_and_units_that_agree():
    assert mean_interval(np.array([7.0])) == Estimate(value=7.0, low=None, high=None, n=1)
    assert mean_interval(np.full(4, 7.0)) == Estimate(value=7.0, low=7.0, high=7.0, n=4)


def test_many_units_get_scipys_percentile_bootstrap():
    values = RNG.exponential(size=80)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=1)
    found = mean_interval(values)
    assert len(values) >= FEW
    assert found.value == values.mean()
    assert ends(found) == pytest.approx(tuple(theirs.confidence_interval), abs=0.03)
    assert mean_interval(values, seed=0) == found != mean_interval(values, seed=5)


def test_pairs_are_their_differences():
    a, b = np.array([5.0, 7.0, 9.0]), np.array([3.0, 4.0, 5.0])
    assert paired_difference(a, b) == mean_interval(np.array([2.0, 3.0, 4.0]))
    with pytest.raises(ValueError, match="as many of each, got 3 and 2"):
        paired_difference(a, b[:2])


def test_welch_is_scipys():
    a, b = RNG.normal(1, 1, 5), RNG.normal(0, 4, 9)
    theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    found = welch_difference(a, b)
    assert ends(found) == pytest.approx((theirs.low, theirs.high), rel=1e-9)
    assert found.value == pytest.approx(a.mean() - b.mean()) and found.n == 5
    assert welch_difference(a[:1], b).low is None
    assert ends(welch_difference(np.ones(3), np.zeros(4))) == (1.0, 1.0)


def test_crossed_interval_counts_seeds_and_images():
    # Independent entries: the pigeonhole's variance is (s - 1) / s^2 + (n - 1) / n^2 per seed and
    # image effects plus the noise of entries, counted up to three times: with pure image effects
    # of variance 1 over n = 400 the deviation of the mean is 1 / 20.
    images = RNG.normal(size=400)
    low, high = ends(crossed_interval(np.tile(images, (3, 1))))
    assert (high - low) / (2 * 1.96) == pytest.approx(images.std() / 20, rel=0.08)
    # Pure seed effects: a resample's mean is that of three seeds drawn out of three.
    seeds = np.array([0.0, 3.0, 6.0])
    low, high = ends(crossed_interval(np.tile(seeds[:, None], (1, 50))))
    means = sorted(np.mean(drawn) for drawn in itertools.product(seeds, repeat=3))
    assert (low, high) == (means[0], means[-1]) == (0.0, 6.0)


def test_crossed_interval_is_a_slow_recount():
    values = RNG.normal(size=(3, 5))
    rng = np.random.default_rng(4)
    means = [
        values[np.ix_(rng.integers(3, size=3), rng.integers(5, size=5))].mean()
        for _ in range(20_000)
    ]
    found = crossed_interval(values, n_resamples=20_000)
    assert found.value == pytest.approx(values.mean()) and found.n == 3
    assert ends(found) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.03)


def test_crossed_interval_of_one_seed_or_one_image():
    row = RNG.normal(size=(1, 30))
    assert crossed_interval(row, seed=3) == mean_interval(row[0], seed=3)
    alone = crossed_interval(np.ones((2, 1)))
    assert (alone.low, alone.high, alone.n) == (None, None, 1)


def test_proportions_are_exact():
    # No success in 10: upper end 1 - 0.025^(1/10); the other way round by symmetry.
    none, all_of_them = proportion_interval(0, 10), proportion_interval(10, 10)
    assert ends(none) == pytest.approx((0.0, 1 - 0.025**0.1))
    assert ends(all_of_them) == pytest.approx((0.025**0.1, 1.0))
    theirs = stats.binomtest(7, 31).proportion_ci()
    assert ends(proportion_interval(7, 31)) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    for successes, trials in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="at least one trial"):
            proportion_interval(successes, trials)


def test_sign_test_by_hand():
    # Five above, none below: 2 / 2^5. A zero says nothing.
    assert sign_test(np.array([1.0, 2.0, 0.0, 3.0, 4.0, 5.0])) == pytest.approx(2 / 32)
    assert sign_test(np.array([1.0, -1.0])) == 1.0
    assert sign_test(np.zeros(3)) == 1.0


def test_sign_flips_by_hand_and_as_scipy_does():
    # Sums of +-1 +-2 +-3 as far out as 6: only the two ends, of eight.
    assert sign_flip_test(np.array([1.0, 2.0, 3.0])) == 2 / 8
    # As far out as |-1 + 2 + 3| = 4: also 1 - 2 - 3, and the two ends.
    assert sign_flip_test(np.array([-1.0, 2.0, 3.0])) == 4 / 8
    values = RNG.normal(0.4, 1, 10)
    theirs = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=10_000
    )
    assert sign_flip_test(values) == pytest.approx(theirs.pvalue)
    many = RNG.normal(0.3, 1, 40)
    assert sign_flip_test(many) == pytest.approx(stats.ttest_1samp(many, 0)[1], abs=0.02)
    assert sign_flip_test(np.full(40, 5.0)) == 1 / 2001


def test_permutations_by_hand_and_as_scipy_does():
    # Of the 6 ways to divide {1, 2, 3, 4}, two are as far apart as {1, 2} and {3, 4}.
    assert permutation_test(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == pytest.approx(2 / 6)
    assert permutation_test(np.ones(3), np.ones(4)) == 1.0
    a, b = RNG.normal(0.8, 1, 5), RNG.normal(0, 1, 7)
    theirs = stats.permutation_test(
        (a, b), lambda x, y: x.mean() - y.mean(), n_resamples=10_000, alternative="two-sided"
    )
    # scipy doubles the smaller tail, which is the same only where both tails are alike.
    assert permutation_test(a, b) == pytest.approx(theirs.pvalue, abs=0.03)
    a, b = RNG.normal(0.5, 1, 30), RNG.normal(0, 1, 40)
    assert permutation_test(a, b) == pytest.approx(stats.ttest_ind(a, b)[1], abs=0.02)


def test_effect_size_by_hand():
    # Means 2 and 5 apart by 3, both of variance 1: d = -3. With 4 degrees of freedom the correction
    # is gamma(2) / (sqrt(2) gamma(1.5)) = 0.7979.
    g = effect_size(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))
    assert g == pytest.approx(-3 * 0.797885, abs=1e-5)
    assert math.isnan(effect_size(np.ones(1), np.ones(5)))
    assert math.isnan(effect_size(np.ones(3), np.zeros(3)))


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_is_not_finite_is_refused(values):
    with pytest.raises(ValueError, match="finite numbers of at least one unit"):
        mean_interval(np.array(values, dtype=np.float64))
