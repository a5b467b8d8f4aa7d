"""How well a number tells two groups apart: the area under the ROC curve, with intervals.

    AUROC = share of the pairs (positive, negative) in which the positive has the larger number,
            ties counting one half

(Mann and Whitney 1947; Hanley and McNeil 1982, Radiology 143). Intervals are percentile bootstraps
that draw positives and negatives each on their own. Where the groups do not overlap at all every
resample says 1, and the interval shrinks to a point: it then says nothing of rare overlaps.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

N_RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """AUROCs of several numbers on the same prompts."""

    auroc: Float[np.ndarray, " c"]
    """Area under the curve of each."""
    low: Float[np.ndarray, " c"]
    """Lower end of its 95 % interval."""
    high: Float[np.ndarray, " c"]
    """Upper end."""


def auroc(
    positive: Float[np.ndarray, "n c"], negative: Float[np.ndarray, "m c"]
) -> Float[np.ndarray, " c"]:
    """The AUROC of each column. Raises `ValueError` where a group is empty."""
    return wins(positive, negative).mean(axis=(1, 2))


def separation(
    positive: Float[np.ndarray, "n c"],
    negative: Float[np.ndarray, "m c"],
    *,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> Separation:
    """The AUROC of each column with its bootstrap interval; all columns share the resamples.

    Raises `ValueError` where a group is empty.
    """
    won = wins(positive, negative)
    resampled = resampled_means(won, seed=seed, n_resamples=n_resamples)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=1)
    return Separation(auroc=won.mean(axis=(1, 2)), low=low, high=high)


def resampled_means(
    won: Float[np.ndarray, "c n m"], *, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> Float[np.ndarray, "c r"]:
    """Means over pairs when positives and negatives are drawn again, each on their own."""
    _, n, m = won.shape
    rng = np.random.default_rng(seed)
    first = rng.multinomial(n, np.full(n, 1 / n), n_resamples) / n
    second = rng.multinomial(m, np.full(m, 1 / m), n_resamples) / m
    return np.stack([((first @ column) * second).sum(axis=1) for column in won])


def wins(
    positive: Float[np.ndarray, "n c"], negative: Float[np.ndarray, "m c"]
) -> Float[np.ndarray, "c n m"]:
    """Each pair of each column: 1 where the positive is larger, 1/2 where both are equal, else 0.

    Raises `ValueError` where a group is empty.
    """
    if not len(positive) or not len(negative):
        raise ValueError(
            f"AUROC takes both groups, got {len(positive)} positives, {len(negative)} negatives."
        )
    a, b = positive.T[:, :, None], negative.T[:, None, :]
    return (a > b) + 0.5 * (a == b)
