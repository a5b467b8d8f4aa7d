"""How well a linear classifier reads classes out of features.

Multinomial logistic regression (scikit-learn, L-BFGS) on frozen features, with an L2 penalty whose
strength is chosen on validation images. Features are divided by one number, the root of their total
variance over the training rows, so that the same strengths mean the same for pixels, components,
codes and units that never rest; they are not standardised one by one, which would blow up what
hardly varies (a pixel at the border, a unit that fires on one image).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from analyses.images import ImageData, Images

STRENGTHS = (3.0, 10.0, 30.0, 100.0)
"""Inverse strengths C of the L2 penalty to choose from: where the best one lay for 7,000 MNIST
images as pixels, principal components and codes; beyond either end little changes."""
MAX_STEPS = 300
"""L-BFGS steps at most; pixels take about 150."""
Rows = Float[np.ndarray, "_ _"] | sparse.csr_array
"""Features of images, a row an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a method makes of the three parts of a data set."""

    train: Rows
    """Of the training images."""
    validation: Rows
    """Of the validation images."""
    test: Rows
    """Of the test images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What the chosen probe gets wrong."""

    strength: float
    """The chosen inverse strength C."""
    validation_error: float
    """Share of the validation images that it gets wrong; chosen to be small, so too small."""
    wrong: Int[np.ndarray, " m"]
    """Numbers of the test images that it gets wrong, ascending."""


def features_of(data: ImageData, make: Callable[[Float32[np.ndarray, "n d"]], Rows]) -> Features:
    """What `make` makes of the pixels of each part."""
    return Features(
        train=make(data.train.pixels),
        validation=make(data.validation.pixels),
        test=make(data.test.pixels),
    )


def probe_features(
    features: Features, data: ImageData, strengths: Sequence[float] = STRENGTHS
) -> ProbeResult:
    """Fit a probe for each strength, keep the best on validation (the strongest penalty of equal
    ones), and test it."""
    scale = 1 / (total_variance(features.train) ** 0.5 or 1.0)
    errors = []
    probes = []
    for strength in sorted(strengths):
        probes.append(fit_classifier(features.train * scale, data.train.labels, strength))
        wrong = _wrong(probes[-1], features.validation * scale, data.validation)
        errors.append(float(wrong.mean()))
    best = int(np.argmin(errors))
    wrong = _wrong(probes[best], features.test * scale, data.test)
    return ProbeResult(
        strength=sorted(strengths)[best],
        validation_error=errors[best],
        wrong=np.flatnonzero(wrong),
    )


def fit_classifier(
    rows: Rows, labels: Int[np.ndarray, " n"], strength: float
) -> LogisticRegression:
    """Logistic regression of that inverse strength, at most `MAX_STEPS` steps."""
    with warnings.catch_warnings():
        # Weak penalties do not converge within the steps; early stopping is one more candidate
        # among which validation chooses.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=MAX_STEPS).fit(rows, labels)


def _wrong(probe: LogisticRegression, rows: Rows, images: Images) -> Bool[np.ndarray, " n"]:
    return np.asarray(probe.predict(rows)) != images.labels


def total_variance(rows: Rows) -> float:
    """Mean square distance of the rows from their mean."""
    values = np.asarray(rows if isinstance(rows, np.ndarray) else rows.data)
    n = len(rows) if isinstance(rows, np.ndarray) else len(rows.indptr) - 1
    mean = np.asarray(rows.sum(0), dtype=np.float64) / n
    squares = np.square(values, dtype=np.float64).sum() / n
    return max(0.0, float(squares - np.square(mean).sum()))
