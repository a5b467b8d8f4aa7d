"""When the k-sparse encoder finds the right units: the theorem, on dictionaries made for it.

Makhzani and Frey 2013 (arXiv 1312.5663, theorem 3.1): let x = W z with unit columns w_i of
coherence mu = max_{i != j} |<w_i, w_j>| and z of k positive entries z_1 >= ... >= z_k, on the
support S. If

    k mu <= z_k / (2 z_1)

then the k largest entries of W^T x are those of S. For i in S, w_i^T x >= z_k - (k - 1) mu z_1;
for j outside, w_j^T x <= k mu z_1; so (2 k - 1) mu < z_k / z_1 is enough.

The check is of the product's own encoder: W becomes the tied weights of a `SparseAutoencoder` with
`KSparse` and no biases. A trial is one z; its condition number here is 2 k mu z_1 / z_k, at most 1
where the theorem speaks. Three families of dictionaries:

- `gaussian`: independent Gaussian columns in 64 to 4,096 dimensions;
- `clustered`: columns scattered about a few common directions, as alike as learnt filters are;
- `adversarial`: the worst case. The columns of S lean away from each other (-mu) and one more
  column leans towards all of them (+mu), so both bounds of the proof are met with equality, and for
  equal entries of z recovery fails as soon as (2 k - 1) mu > 1. It exists for mu < 1 / k.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from analyses.statistics import Estimate, proportion_interval
from saes.activations import KSparse
from saes.models import SaeConfig, SparseAutoencoder

N_COLUMNS = 128
"""Columns of a dictionary."""
DIMENSIONS = (64, 256, 1024, 4096)
"""Dimensions of the Gaussian dictionaries: the more, the less coherent."""
N_CLUSTERS = 16
SPARSITIES = (2, 3, 5, 10)
"""Numbers k of active columns."""
RATIOS = (1.0, 2.0, 4.0)
"""Bounds on z_1 / z_k: entries are drawn evenly between 1 and so much."""
N_COHERENCES = 12
"""Coherences of the adversarial dictionaries, evenly spaced below 1 / k."""
FAMILIES = ("gaussian", "clustered", "adversarial")
N_BINS = 12
BINS = np.logspace(-1, 2, N_BINS + 1)
"""Bounds of the condition numbers that a recovery rate is taken over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """Some trials."""

    family: tuple[str, ...]
    """Family of each one's dictionary."""
    condition: Float64[np.ndarray, " t"]
    """2 k mu z_1 / z_k; the theorem speaks up to 1."""
    found: Bool[np.ndarray, " t"]
    """Whether exactly the support was named."""

    def of(self, family: str) -> "Trials":
        """Those of one family."""
        chosen = np.array([name == family for name in self.family], dtype=bool)
        return Trials(
            family=(family,) * int(chosen.sum()),
            condition=self.condition[chosen],
            found=self.found[chosen],
        )

    def errors(self, *, within: bool) -> tuple[int, int]:
        """Supports missed and trials, where the theorem speaks or beyond."""
        there = self.condition <= 1 if within else self.condition > 1
        return int((~self.found[there]).sum()), int(there.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A dictionary and how many of its columns are active."""

    family: str
    """One of `FAMILIES`."""
    columns: Float64[Tensor, "d n"]
    """W, of unit columns."""
    k: int
    """Active columns."""
    support: Int[np.ndarray, " k"] | None
    """Which are active; None for a random choice each time."""


def check_theorem(trials: int, seed: int) -> Trials:
    """Trials on every dictionary, sparsity and ratio.

    `trials` z are drawn for each; one where all would be the same.
    """
    rng = np.random.default_rng(seed)
    drawn = [
        draw_trials(problem, ratio, trials, rng)
        for problem in make_problems(rng)
        for ratio in RATIOS
    ]
    return Trials(
        family=tuple(name for part in drawn for name in part.family),
        condition=np.concatenate([part.condition for part in drawn]),
        found=np.concatenate([part.found for part in drawn]),
    )


def make_problems(rng: np.random.Generator) -> Iterator[Problem]:
    """Dictionaries of all families, for every sparsity."""
    for k in SPARSITIES:
        for d in DIMENSIONS:
            columns = unit_columns(rng.standard_normal((d, N_COLUMNS)))
            yield Problem(family="gaussian", columns=columns, k=k, support=None)
        for spread in (0.5, 1.0, 2.0, 4.0):
            columns = clustered_columns(1024, spread, rng)
            yield Problem(family="clustered", columns=columns, k=k, support=None)
        for mu in np.arange(1, N_COHERENCES) / N_COHERENCES / k:
            columns = adversarial_columns(k, float(mu))
            yield Problem(family="adversarial", columns=columns, k=k, support=np.arange(k))


def draw_trials(problem: Problem, ratio: float, trials: int, rng: np.random.Generator) -> Trials:
    """Draw `trials` z for a dictionary and see whether the encoder finds their support."""
    n, k = problem.columns.shape[1], problem.k
    if ratio == 1 and problem.support is not None:
        trials = 1  # all would be the same
    values = rng.uniform(1, ratio, (trials, k)) if ratio > 1 else np.ones((trials, k))
    support = np.broadcast_to(np.arange(k), (trials, k))
    if problem.support is None:
        support = np.argsort(rng.random((trials, n)), axis=1)[:, :k]
    z = np.zeros((trials, n))
    np.put_along_axis(z, support, values, axis=1)
    spread = values.max(1) / values.min(1)
    return Trials(
        family=(problem.family,) * trials,
        condition=2 * k * coherence(problem.columns) * spread,
        found=finds_support(problem.columns, torch.from_numpy(z), k).numpy(),
    )


def finds_support(
    columns: Float64[Tensor, "d n"], z: Float64[Tensor, "t n"], k: int
) -> Bool[Tensor, " t"]:
    """Whether the k-sparse encoder of tied weights W^T names exactly the non-zero entries of z.

    Each row of z has `k` of them.
    """
    config = SaeConfig(
        d_in=columns.shape[0], d_sae=columns.shape[1], activation=KSparse(k=k), tied=True
    )
    weights = {
        "W_dec": columns.T.float(),
        "b_enc": torch.zeros(columns.shape[1]),
        "b_dec": torch.zeros(columns.shape[0]),
    }
    encoder = SparseAutoencoder.from_tensors(config, weights)
    with torch.no_grad():
        codes = encoder.encode((z @ columns.T).float())
    named = torch.zeros_like(z, dtype=torch.bool).scatter(1, codes.indices.long(), True)
    return (named == (z != 0)).all(1)


def coherence(columns: Float64[Tensor, "d n"]) -> float:
    """mu: the largest |<w_i, w_j>| of two different unit columns; 0 for a single one."""
    gram = (columns.T @ columns).abs()
    return float(gram.fill_diagonal_(0).max())


def unit_columns(columns: Float64[np.ndarray, "d n"]) -> Float64[Tensor, "d n"]:
    """The columns, scaled to unit norm."""
    return torch.from_numpy(columns / np.linalg.norm(columns, axis=0))


def clustered_columns(d: int, spread: float, rng: np.random.Generator) -> Float64[Tensor, "d n"]:
    """Unit columns scattered about `N_CLUSTERS` unit directions.

    `spread` is the scatter's length over that of the common part; two columns of one cluster have a
    cosine of about 1 / (1 + spread^2).
    """
    centres = rng.standard_normal((d, N_CLUSTERS))
    common = centres[:, np.arange(N_COLUMNS) % N_CLUSTERS]
    return unit_columns(common + spread * rng.standard_normal((d, N_COLUMNS)))


def adversarial_columns(k: int, mu: float) -> Float64[Tensor, "d n"]:
    """k unit columns of inner products -mu, one of +mu with each of them, the others orthogonal.

    The Gram matrix is positive definite where k mu < 1; its Cholesky factor gives the columns.
    """
    assert 0 < mu * k < 1, (k, mu)
    gram = np.eye(N_COLUMNS)
    gram[:k, :k] -= mu * (1 - np.eye(k))
    gram[:k, k] = gram[k, :k] = mu
    return torch.from_numpy(np.linalg.cholesky(gram).T.copy())


def recovery_rates(trials: Trials) -> dict[str, list[tuple[float, Estimate]]]:
    """By family, the share of trials whose support was found, over bins of the condition number.

    A bin's place is the geometric mean of its bounds; bins without a trial are left out.
    """
    rates: dict[str, list[tuple[float, Estimate]]] = {}
    for family in FAMILIES:
        some = trials.of(family)
        bins = np.digitize(some.condition, BINS) - 1
        counts = [(int(some.found[bins == i].sum()), int((bins == i).sum())) for i in range(N_BINS)]
        rates[family] = [
            (float(np.sqrt(BINS[i] * BINS[i + 1])), proportion_interval(found, total))
            for i, (found, total) in enumerate(counts)
            if total
        ]
    return rates


def summary(trials: Trials) -> pd.DataFrame:
    """By family: trials and errors where the theorem speaks, and beyond."""
    rows = []
    for family in FAMILIES:
        some = trials.of(family)
        within, beyond = some.errors(within=True), some.errors(within=False)
        missed = some.condition[~some.found]
        rows.append(
            {
                "family": family,
                "trials within": within[1],
                "errors within": within[0],
                "trials beyond": beyond[1],
                "errors beyond": beyond[0],
                "first error at condition": float(missed.min()) if len(missed) else None,
            }
        )
    return pd.DataFrame(rows)
