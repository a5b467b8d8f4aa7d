"""The k-sparse study's options and what it measured, and how numbers are read out of that."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from analyses.ksparse_cells import CellResult, Method, Variant
from analyses.statistics import Estimate, crossed_interval, mean_interval
from analyses.support_recovery import Trials
from probe.errors import UserError

LABELS: dict[Method, str] = {
    "pixels": "raw pixels",
    "pca": "PCA",
    "untrained": "untrained dictionary",
    "denoising": "denoising autoencoder",
    "k_sparse": "k-sparse autoencoder",
}
HUNDRED = 100
"""Errors are given in per cent, their differences in percentage points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The k-sparse autoencoder of Makhzani and Frey (2013) on images.

    Sweeps k and alpha, turns annealing off, and reads the digits out of its codes with a linear
    probe, beside raw pixels, PCA, a denoising autoencoder of the same budget and an untrained
    dictionary; shows its filters and checks its theorem. What is trained is kept below the root: a
    stopped study goes on where it was.

    Example: lorgnette analyse ksparse --images mnist/
    """

    images: str = "digits"
    """A folder of MNIST's IDX files (compressed or not), or one of them; or `digits`, those that
    scikit-learn carries."""
    units: int = 1000
    """Hidden units of every autoencoder. The paper: 1,000 on MNIST."""
    ks: tuple[int, ...] = (5, 10, 25, 40, 70, 150, 400)
    """Numbers of active units to train with."""
    small_ks: tuple[int, ...] = (5, 10)
    """Those of them that are trained without annealing too."""
    alphas: tuple[float, ...] = (1.0, 1.5, 2.0, 4.0)
    """Times k, the units kept for the probe."""
    k_start: int = 100
    """Active units at the start of training, wherever k is smaller. The paper: 100."""
    anneal_share: float = 0.5
    """Share of the steps over which they fall to k. The paper: the first half."""
    seeds: int = 3
    """Repetitions with other weights and batches."""
    epochs: int = 20
    """Passes through the training images."""
    batch_size: int = 128
    """Images in a batch. The paper's code: 128."""
    lr: float = 3e-3
    """Adam's peak learning rate for k-sparse autoencoders: of 1e-3, 3e-3 and 1e-2 the best for 20
    epochs of 7,000 MNIST digits, by the probe's validation error."""
    denoising_lr: float = 0.04
    """The same for the denoising autoencoder: the best of eight between 3e-4 and 0.16."""
    noise: float = 0.2
    """Share of the pixels that the denoising autoencoder loses. The paper: 0.2."""
    trials: int = 200
    """Sparse vectors drawn for each dictionary of the theorem's check."""

    def __post_init__(self) -> None:
        for name in ("ks", "alphas"):
            values = getattr(self, name)
            if not values or values[0] < 1 or sorted(set(values)) != list(values):
                raise UserError(f"{name} must be growing numbers from 1 on, got {list(values)}.")
        if self.alphas[0] != 1 or not set(self.small_ks) <= set(self.ks):
            raise UserError(
                f"alphas must begin with 1 and small_ks be among ks {list(self.ks)}; got "
                f"{list(self.alphas)} and {list(self.small_ks)}."
            )
        if max(*self.ks, self.k_start) > self.units:
            raise UserError(
                f"k and k_start can be at most the number of units, {self.units}; got "
                f"{max(self.ks)} and {self.k_start}."
            )
        for name in ("seeds", "epochs", "batch_size", "trials"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.noise < 1:
            raise UserError(f"noise must be at least 0 and below 1, got {self.noise}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the study measured."""

    config: Config
    """What was asked."""
    images: str
    """Name of the data set."""
    source: str
    """Where it is from."""
    n: tuple[int, int, int]
    """Training, validation and test images."""
    results: tuple[CellResult, ...]
    """Every cell's result."""
    filters: dict[str, Float[np.ndarray, "n h w"]]
    """Some filters of the first seed, by the panel's name."""
    trials: Trials
    """Trials of the theorem's check."""

    @property
    def best_k(self) -> int:
        """The k of the sweep that validation prefers."""
        return self.best_of(self.config.ks)

    def best_of(self, ks: Sequence[int]) -> int:
        """That of `ks` whose autoencoders have the smallest mean validation error."""
        return min(ks, key=lambda k: np.mean(validation_errors(self.sweep(k))))

    def sweep(self, k: int) -> list[CellResult]:
        """The k-sparse cells of one k in the sweep, a seed each."""
        annealed = is_annealed(self.config, k)
        return self.cells("k_sparse", k=k, annealed=annealed)

    def cells(self, method: Method, *, k: int = 0, annealed: bool = False) -> list[CellResult]:
        """The cells of a method, a seed each."""
        wanted = (method, k, annealed)
        return [
            result
            for result in self.results
            if (result.cell.method, result.cell.k, result.cell.annealed) == wanted
        ]

    def rival(self, method: Method) -> list[CellResult]:
        """The cells that stand for a method: for k_sparse those of the best k."""
        return self.sweep(self.best_k) if method == "k_sparse" else self.cells(method)


def is_annealed(config: Config, k: int) -> bool:
    """Whether the sweep's autoencoder of that k starts with more active units."""
    return k < config.k_start


def validation_errors(results: Sequence[CellResult]) -> list[float]:
    """Each seed's smallest validation error."""
    return [result.best.probe.validation_error for result in results]


def spread(values: Sequence[int], n: int) -> list[int]:
    """At most `n` of the values, evenly spaced, both ends among them."""
    places = np.linspace(0, len(values) - 1, min(n, len(values))).round().astype(int)
    return [values[place] for place in places]


def wrong(variants: Sequence[Variant], n_test: int) -> Float64[np.ndarray, "s n"]:
    """100 where a probe gets an image wrong, else 0: one row a variant. Its mean is in per cent."""
    marks = np.zeros((len(variants), n_test))
    for row, variant in zip(marks, variants, strict=True):
        row[variant.probe.wrong] = HUNDRED
    return marks


def best_wrong(results: Sequence[CellResult], n_test: int) -> Float64[np.ndarray, "s n"]:
    """The same for the variant of each cell that validation prefers."""
    return wrong([result.best for result in results], n_test)


def at_setting(results: Sequence[CellResult], setting: float) -> list[Variant]:
    """The variant of that setting of each cell; none where the cells have it not."""
    return [v for result in results for v in result.variants if v.setting == setting]


def error(results: Sequence[CellResult], n_test: int) -> Estimate:
    """Probe error in per cent."""
    return crossed_interval(best_wrong(results, n_test))


def difference(a: Float64[np.ndarray, "s n"], b: Float64[np.ndarray, "t n"]) -> Estimate:
    """Mean of a - b in percentage points, paired; a method without seeds is paired with each."""
    return crossed_interval(a - b)


def fact(results: Sequence[CellResult], name: str) -> Estimate:
    """Mean over seeds of something measured of every cell."""
    return mean_interval(np.array([result.facts[name] for result in results]))


def dead_units(results: Sequence[CellResult]) -> Estimate:
    """Dead units in per cent, the interval kept within what is possible."""
    found = mean_interval(HUNDRED * np.array([result.facts["dead_share"] for result in results]))
    low = None if found.low is None else max(0.0, found.low)
    high = None if found.high is None else min(float(HUNDRED), found.high)
    return Estimate(value=found.value, low=low, high=high, n=found.n)
