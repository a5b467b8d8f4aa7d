"""Intervals and tests for the claims of a study, each with its source.

A study's numbers come from few units that were drawn (training seeds) or from many (sequences,
images, prompts), or from both at once. Which interval to take:

- `mean_interval`: units of one sort. Below `FEW` units it is Student's t (Student 1908), from there
  on the percentile bootstrap (Efron 1979). Over three units the percentile interval is their range,
  which misses the mean of a symmetric distribution once in four times (2 * (1/2)^3), not once in
  twenty.
- `paired_difference`: two methods measured on the same units.
- `welch_difference`: two methods on units of their own, of unequal variance (Welch 1947).
- `crossed_interval`: every seed was measured on the same images, so both are resampled, each on its
  own (the pigeonhole bootstrap, Owen 2007, doi 10.1214/07-AOAS122). It counts noise of single
  entries too often, which makes it mildly conservative, and only (s - 1) / s of the variance
  between s seeds, which shows where seeds differ by more than the images' noise.
- `proportion_interval`: successes among trials; exact, so it also speaks of none at all (Clopper
  and Pearson 1934).

Tests give two-sided p-values: `sign_test`, `sign_flip_test` (pairs), `permutation_test` (two
groups). `effect_size` is Hedges' g. All intervals have 95 % confidence.
"""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import special, stats

from saes.metrics import CONFIDENCE, interval, resampling_weights

FEW = 20
"""Number of units below which an interval is Student's t rather than bootstrap."""
N_RESAMPLES = 2000
"""Bootstrap resamples, and random permutations where there are too many to go through."""
EXACT = 2**14
"""Most permutations that a test goes through one by one."""
TIES = 1e-12
"""Two permutations' statistics count as equal when nearer than this, relative to the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number measured on a sample, with its 95 % interval."""

    value: float
    """The estimate."""
    low: float | None
    """Lower end; None where one unit cannot tell."""
    high: float | None
    """Upper end; None where one unit cannot tell."""
    n: int
    """Units it rests on; of two sorts of units the number of the fewer."""

    def __str__(self) -> str:
        """The estimate with its interval, to three digits; "-" where it is not a number."""
        if math.isnan(self.value):
            return "-"
        if self.low is None:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def above(self, bound: float | int) -> bool:
        """Whether the whole interval lies above `bound`; never where there is no interval."""
        return self.low is not None and self.low > bound

    def below(self, bound: float | int) -> bool:
        """Whether the whole interval lies below `bound`; never where there is no interval."""
        return self.high is not None and self.high < bound

    def clipped(self, least: float | int, most: float | int) -> "Estimate":
        """The same with an interval that ends where the number must: a share's at 0 and 1."""
        if self.low is None or self.high is None:
            return self
        return replace(self, low=max(self.low, float(least)), high=min(self.high, float(most)))


def mean_interval(values: Float[np.ndarray, " n"], *, seed: int = 0) -> Estimate:
    """Mean of `n` units: Student's t below `FEW` units, percentile bootstrap from there on.

    `seed` decides the resamples. Raises `ValueError` where there is no unit or one is not finite.
    """
    _check_finite(values)
    if len(values) < FEW:
        return _student(values)
    weights = resampling_weights(len(values), N_RESAMPLES, seed)
    means = weights @ torch.from_numpy(values.astype(np.float64)) / len(values)
    low, high = interval(means, len(values))
    return Estimate(value=float(values.mean()), low=low, high=high, n=len(values))


def paired_difference(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"], *, seed: int = 0
) -> Estimate:
    """Mean of `a - b` over units on which both were measured: `mean_interval` of the differences.

    Raises `ValueError` where the two have not the same number of units.
    """
    if len(a) != len(b):
        raise ValueError(f"pairs need as many of each, got {len(a)} and {len(b)}.")
    return mean_interval(a - b, seed=seed)


def welch_difference(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> Estimate:
    """Mean of `a` minus mean of `b`, units of their own and variances of their own.

    t interval with the Welch-Satterthwaite degrees of freedom (Welch 1947, Biometrika 34).
    """
    _check_finite(a)
    _check_finite(b)
    value, n = float(a.mean() - b.mean()), min(len(a), len(b))
    if n < 2:
        return Estimate(value=value, low=None, high=None, n=n)
    parts = [float(group.var(ddof=1)) / len(group) for group in (a, b)]
    freedom = sum(part**2 / (len(g) - 1) for part, g in zip(parts, (a, b), strict=True))
    return _t_interval(value, math.sqrt(sum(parts)), _ratio(sum(parts) ** 2, freedom), n)


def crossed_interval(
    values: Float[np.ndarray, "s n"], *, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> Estimate:
    """Mean over seeds and images where each of `s` seeds was measured on the same `n` images.

    Pigeonhole bootstrap (Owen 2007): seeds and images are resampled each on their own, and a value
    counts as often as its seed was drawn times its image. With one seed it is `mean_interval`.
    """
    s, n = values.shape
    if s == 1:
        return mean_interval(values[0], seed=seed)
    _check_finite(values)
    seeds = resampling_weights(s, n_resamples, seed)
    images = resampling_weights(n, n_resamples, seed + 1)
    means = ((seeds @ torch.from_numpy(values.astype(np.float64))) * images).sum(1) / (s * n)
    low, high = interval(means, n)
    one = n < 2
    return Estimate(
        value=float(values.mean()),
        low=None if one else low,
        high=None if one else high,
        n=min(s, n),
    )


def proportion_interval(successes: int, trials: int) -> Estimate:
    """Share of successes with its exact interval (Clopper and Pearson 1934, Biometrika 26)."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes of at least one trial were wanted, got {successes}/{trials}.")
    tail = (1 - CONFIDENCE) / 2
    failures = trials - successes
    low = stats.beta.ppf(tail, successes, failures + 1) if successes else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, failures) if failures else 1.0
    return Estimate(value=successes / trials, low=float(low), high=float(high), n=trials)


def sign_test(differences: Float[np.ndarray, " n"]) -> float:
    """Two-sided exact p-value that differences are as often above 0 as below.

    Zeros are left out (Dixon and Mood 1946, JASA 41); without any other the p-value is 1.
    """
    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    if above + below == 0:
        return 1.0
    return float(stats.binomtest(above, above + below).pvalue)


def sign_flip_test(differences: Float[np.ndarray, " n"], *, seed: int = 0) -> float:
    """Two-sided p-value that the mean difference of pairs is 0, from flipping their signs.

    Exact up to 14 pairs (Fisher 1935, The Design of Experiments, section 21), else from random
    flips counted with the one observed (Phipson and Smyth 2010, arXiv 1603.05766). With n pairs it
    is never below 2 / 2^n: three pairs cannot be significant.
    """
    _check_finite(differences)
    n = len(differences)
    if 2**n <= EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), (N_RESAMPLES, n))
    return _as_extreme(signs @ differences / n, float(differences.mean()), exact=2**n <= EXACT)


def permutation_test(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"], *, seed: int = 0
) -> float:
    """Two-sided p-value that two groups differ in mean no more than by chance.

    All ways to divide the units where there are at most `EXACT` (Pitman 1937), else random ones
    counted with the one observed (Phipson and Smyth 2010).
    """
    _check_finite(a)
    _check_finite(b)
    both, n = np.concatenate([a, b]).astype(np.float64), len(a)
    exact = math.comb(len(both), n) <= EXACT
    in_a = _divisions(len(both), n, exact, seed)
    sums = in_a @ both
    differences = sums / n - (both.sum() - sums) / len(b)
    return _as_extreme(differences, float(a.mean() - b.mean()), exact=exact)


def effect_size(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> float:
    """Hedges' g: mean difference over the pooled deviation, freed of its small-sample bias.

    Hedges 1981 (J. Educ. Stat. 6), equations 4 and 6e. nan where a group has one unit or nothing
    varies.
    """
    freedom = len(a) + len(b) - 2
    if min(len(a), len(b)) < 2:
        return math.nan
    pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / freedom
    unbiased = math.exp(
        special.gammaln(freedom / 2)
        - special.gammaln((freedom - 1) / 2)
        - math.log(freedom / 2) / 2
    )
    return _ratio(float(a.mean() - b.mean()) * unbiased, math.sqrt(float(pooled)))


def _student(values: Float[np.ndarray, " n"]) -> Estimate:
    """Mean with Student's t interval."""
    n, value = len(values), float(values.mean())
    if n < 2:
        return Estimate(value=value, low=None, high=None, n=n)
    return _t_interval(value, float(values.std(ddof=1)) / math.sqrt(n), float(n - 1), n)


def _t_interval(value: float, error: float, freedom: float, n: int) -> Estimate:
    if error == 0:
        return Estimate(value=value, low=value, high=value, n=n)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Estimate(value=value, low=value - reach, high=value + reach, n=n)


def _divisions(total: int, n: int, exact: bool, seed: int) -> Bool[np.ndarray, "r t"]:
    """Which units are in the first group, for every division looked at."""
    if exact:
        chosen = np.array(list(itertools.combinations(range(total), n)))
    else:
        rng = np.random.default_rng(seed)
        chosen = np.argsort(rng.random((N_RESAMPLES, total)), axis=1)[:, :n]
    divisions = np.zeros((len(chosen), total), dtype=bool)
    np.put_along_axis(divisions, chosen, True, axis=1)
    return divisions


def _as_extreme(permuted: Float[np.ndarray, " r"], observed: float, *, exact: bool) -> float:
    """Share of the permutations at least as far from 0 as what was observed."""
    near = TIES * max(float(np.abs(permuted).max()), abs(observed))
    extreme = int((np.abs(permuted) >= abs(observed) - near).sum())
    return extreme / len(permuted) if exact else (extreme + 1) / (len(permuted) + 1)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _check_finite(values: Float[np.ndarray, "*n"]) -> None:
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"finite numbers of at least one unit were wanted, got {values}.")
