"""Random networks as Boolean functions, and the perceptron's exact law.

A network of 7 inputs is a truth table of 128 bits: 1 where its output is above 0, inputs in the
order of the binary numbers 0 to 127, most significant bit first. Networks (7, 40, 40, 1) with ReLU
are drawn by the million and their tables counted (Valle-Perez, Camargo and Louis 2018, arXiv
1805.08522, who draw 10^8 and more); a table's complexity is `measures.boolean_lz`.

A perceptron without a bias maps t of the 2^n points of {0, 1}^n to 1, and every t from 0 to 2^n - 1
is equally likely where the law of its weights does not care about their signs (Mingard et al. 2019,
arXiv 1909.11522). More is true: for any |w| in general position, each of the 2^n choices of signs
gives another t. On {-1, 1}^n exactly half of the points are mapped to 1.
"""

import itertools
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats

from analyses.cells import Frame
from analyses.simplicity.measures import boolean_lz
from analyses.statistics import Estimate

INPUTS, HIDDEN = 7, (40, 40)
BITS = 2**INPUTS
LN_FUNCTIONS = BITS * np.log(2)
"""Natural logarithm of the number of Boolean functions: Zipf's law is P(rank) = 1 / (rank times
this), as if probabilities of all functions together were 1."""
NETWORKS_AT_ONCE, TABLES_AT_ONCE = 512, 20_000


def truth_points(n: int, *, centred: bool = False) -> Float[torch.Tensor, "p n"]:
    """All points of {0, 1}^n, or of {-1, 1}^n, in the order of the binary numbers."""
    bits = (torch.arange(2**n)[:, None] >> torch.arange(n - 1, -1, -1)) & 1
    return (2 * bits - 1 if centred else bits).float()


# ------------------------------------------------------------------------------------ networks


def count_tables(n: int, *, seed: int, bias: float | int = 1.0) -> Frame:
    """Truth tables of `n` random networks: `high` and `low` (64 bits each) and `count`.

    Weights are N(0, 1 / fan in), biases N(0, bias^2).
    """
    generator, points = torch.Generator().manual_seed(seed), truth_points(INPUTS)
    packed = np.empty((n, BITS // 8), dtype=np.uint8)
    for start in range(0, n, NETWORKS_AT_ONCE):
        size = min(NETWORKS_AT_ONCE, n - start)
        given = _outputs(points, size, generator, float(bias))
        packed[start : start + size] = np.packbits((given > 0).numpy(), axis=1)
    words = packed.view(">i8").astype(np.int64)
    table: Frame = pd.DataFrame({"high": words[:, 0], "low": words[:, 1]})
    return table.groupby(["high", "low"], sort=False).size().rename("count").reset_index()


def _outputs(
    points: Float[torch.Tensor, "p i"], n: int, generator: torch.Generator, bias: float
) -> Float[torch.Tensor, "n p"]:
    x = points.expand(n, -1, -1)
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise((INPUTS, *HIDDEN, 1))):
        weight = torch.randn(n, fan_in, fan_out, generator=generator) / fan_in**0.5
        shift = torch.randn(n, 1, fan_out, generator=generator) * bias
        x = torch.baddbmm(shift, x, weight)
        if layer < len(HIDDEN):
            x = x.relu_()
    return x[..., 0]


def merged(tables: list[Frame]) -> Frame:
    """Counts of several draws together, the most frequent first, with `complexity` and `ones`."""
    every: Frame = pd.concat(tables)
    counts = every.groupby(["high", "low"], sort=False)["count"].sum().reset_index()
    counts = counts.sort_values(["count", "high", "low"], ascending=[False, True, True])
    found = [
        _described(counts.iloc[start : start + TABLES_AT_ONCE])
        for start in range(0, len(counts), TABLES_AT_ONCE)
    ]
    return pd.concat(found, ignore_index=True)


def _described(counts: Frame) -> Frame:
    bits = unpacked(counts[["high", "low"]].to_numpy())
    return counts.assign(complexity=boolean_lz(bits), ones=bits.sum(1))


def unpacked(words: Int[np.ndarray, "n 2"]) -> np.ndarray:
    """The bits of truth tables, [n, 128], of which `words` has 64 in a number."""
    return np.unpackbits(np.ascontiguousarray(words, ">i8").view(np.uint8), axis=1).astype(bool)


def by_complexity(counts: Frame) -> Frame:
    """Of each complexity: `functions` seen, `probability` of all together, `highest` of one."""
    total = counts["count"].sum()
    grouped = counts.groupby("complexity")["count"]
    return pd.DataFrame(
        {
            "functions": grouped.size(), "probability": grouped.sum() / total,
            "highest": grouped.max() / total, "lowest": grouped.min() / total,
            "seen_twice": grouped.agg(lambda c: int((c > 1).sum())),
        }
    ).reset_index()  # fmt: skip


def by_rank(counts: Frame, points: int = 200) -> Frame:
    """Probability of the functions at some ranks: `rank` (1 is the most frequent), `probability`,
    `complexity`, `zipf`."""
    ranks = np.unique(np.geomspace(1, len(counts), points).round().astype(int))
    rows = counts.iloc[ranks - 1]
    return pd.DataFrame(
        {
            "rank": ranks, "probability": rows["count"].to_numpy() / counts["count"].sum(),
            "complexity": rows["complexity"].to_numpy(), "zipf": 1 / (ranks * LN_FUNCTIONS),
        }
    )  # fmt: skip


def rank_slope(counts: Frame) -> float:
    """Slope of log probability over log rank, of the functions from rank 3 on (the first two are
    the constants) that were seen ten times or more: -1 is Zipf's law."""
    often = counts["count"].to_numpy()
    ranks = np.arange(1, len(often) + 1)
    chosen = (often >= 10) & (ranks >= 3)
    if chosen.sum() < 3:
        return float("nan")
    places = np.unique(np.geomspace(3, ranks[chosen][-1], 100).round().astype(int))
    fitted: Any = stats.linregress(np.log(places), np.log(often[places - 1]))
    return float(fitted.slope)


def decade_slopes(counts: Frame) -> Frame:
    """The same between ranks: a row a decade of ranks (the first from 3 on), as far as functions
    were seen ten times."""
    often = counts["count"].to_numpy()
    last = int((often >= 10).sum())
    ends = [3, *(10**n for n in range(1, 20) if 10**n < last), last]
    rows = [
        {"from_rank": a, "to_rank": b, "slope": np.log(often[b - 1] / often[a - 1]) / np.log(b / a)}
        for a, b in itertools.pairwise(ends) if b > a
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["from_rank", "to_rank", "slope"])


def upper_bound(grouped: Frame) -> tuple[Estimate, float]:
    """a (with its interval) and b of P <= 2^(-a C - b), the bound of Dingle, Camargo and Louis.

    A line through the highest log2 probability of each complexity of which a function was seen
    twice, moved up until none lies above it. The interval is that of the line's slope. All nan
    where fewer than three complexities are left.
    """
    rows = grouped[grouped["seen_twice"] > 0]
    if len(rows) < 3:
        nothing = float("nan")
        return Estimate(value=nothing, low=nothing, high=nothing, n=len(rows)), nothing
    complexity, highest = rows["complexity"].to_numpy(float), np.log2(rows["highest"].to_numpy())
    fitted: Any = stats.linregress(complexity, highest)
    reach = float(stats.t.ppf(0.975, len(rows) - 2)) * fitted.stderr
    above = (highest - fitted.slope * complexity).max()
    slope = Estimate(
        value=-fitted.slope, low=-fitted.slope - reach, high=-fitted.slope + reach, n=len(rows)
    )
    return slope, float(-above)


# ---------------------------------------------------------------------------------- perceptron


def signed_counts(
    sizes: Float[np.ndarray, " n"], *, centred: bool = False
) -> Int[np.ndarray, " s"]:
    """How many points each perceptron with weights of these sizes maps to 1: one a choice of signs.

    Args:
        sizes: |w|, a size for each input.
        centred: points of {-1, 1}^n in place of {0, 1}^n.
    """
    n = len(sizes)
    points = truth_points(n, centred=centred).numpy().astype(np.float64)
    signs = truth_points(n, centred=True).numpy().astype(np.float64)
    found = np.zeros(len(signs), dtype=np.int64)
    for start in range(0, len(signs), 256):
        chosen = signs[start : start + 256] * sizes
        found[start : start + 256] = (points @ chosen.T > 0).sum(0)
    return found


def drawn_counts(inputs: int, n: int, *, seed: int, bias: float | int = 0.0) -> Frame:
    """How many points `n` perceptrons with Gaussian weights map to 1: `ones`, `count`."""
    rng = np.random.default_rng(seed)
    points = truth_points(inputs).numpy().astype(np.float64)
    weights, shift = rng.standard_normal((n, inputs)), bias * rng.standard_normal((n, 1))
    ones = np.concatenate(
        [
            ((weights[i : i + 4096] @ points.T + shift[i : i + 4096]) > 0).sum(1)
            for i in range(0, n, 4096)
        ]
    )
    values, counts = np.unique(ones, return_counts=True)
    return pd.DataFrame({"ones": values, "count": counts})
