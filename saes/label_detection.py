"""How well a rule tells active contexts from silent ones, with an interval and a control.

The score is balanced accuracy,

    score = (sensitivity + specificity) / 2,

over the held-out contexts of `saes.label_contexts`: 1/2 is what a coin, a rule that always says
yes, or one that never does, reaches. Its 95 % interval joins the Wilson intervals of both shares by
their squares (Newcombe 1998, method 10, doi 10.1002/(SICI)1097-0258(19980430)17:8<873), which needs
no resampling and does not collapse where a share is 0 or 1. Contexts are taken as independent;
several may lie in one sequence, so intervals are a little too short.

The control is the same score of the same contexts with other features' rules.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from scipy import stats

Z = float(stats.norm.ppf(0.975))
"""Standard deviations on each side of a 95 % interval."""
LEAST_CONTEXTS = 5
"""Contexts of each sort below which nothing is scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Balanced accuracy of detection."""

    value: float
    """Mean of sensitivity and specificity."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""
    sensitivity: float
    """Share of the active contexts that are called active."""
    specificity: float
    """Share of the silent contexts that are called silent."""


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share = hits / n
    centre = share + Z * Z / (2 * n)
    spread = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def balanced_accuracy(hits: int, n_positive: int, rejections: int, n_negative: int) -> Score:
    """The score of so many right answers among active and among silent contexts."""
    assert n_positive and n_negative, "a score needs contexts of both sorts"
    sensitivity, specificity = hits / n_positive, rejections / n_negative
    value = (sensitivity + specificity) / 2
    (low_1, high_1), (low_2, high_2) = wilson(hits, n_positive), wilson(rejections, n_negative)
    below = math.hypot(sensitivity - low_1, specificity - low_2) / 2
    above = math.hypot(high_1 - sensitivity, high_2 - specificity) / 2
    return Score(
        value=value,
        low=max(0.0, value - below),
        high=min(1.0, value + above),
        sensitivity=sensitivity,
        specificity=specificity,
    )


def score_answers(said_active: Bool[np.ndarray, " b"], n_positive: int) -> Score | None:
    """The score of answers on contexts, active ones first; None where there are too few."""
    n_negative = len(said_active) - n_positive
    if min(n_positive, n_negative) < LEAST_CONTEXTS:
        return None
    hits = int(said_active[:n_positive].sum())
    rejections = n_negative - int(said_active[n_positive:].sum())
    return balanced_accuracy(hits, n_positive, rejections, n_negative)
