"""What the simplicity-bias study's tables say: the estimates behind verdicts, tables and figures.

Complexities are compared as base-2 logarithms of ratios: 1 is twice as complex. Network i of a kind
has multiples of the same draws at every scale and depth (`networks`), so that differences between
scales, depths and components are taken draw by draw. Functions that are constant have no complexity
and are left out.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from analyses.cells import Frame, select
from analyses.simplicity.measured import Measured
from analyses.statistics import Estimate, crossed_interval, mean_interval, welch_difference

MEASURES = {
    "fourier": "Fourier", "polynomial": "polynomials", "lz": "LZ-78", "variation": "variation",
}  # fmt: skip
"""Columns of complexities and what they are called."""
RISING = ("tanh", "gaussian", "sine")
"""Activations whose complexity is said to rise."""
GENTLE = ("gelu", "swish", "selu")
"""Those said to rise a little."""


# -------------------------------------------------------------------------------------- functions


def functions(
    measured: Measured, part: str, *, activation: str | None = None, depth: int | None = None,
    component: str | None = None,
) -> Frame:  # fmt: skip
    """Rows of one part's networks; of one activation, depth, component where they are named."""
    table = measured.table("functions")
    wanted = {"part": part, "activation": activation, "depth": depth, "component": component}
    return select(table, _named(wanted)) if len(table) else table


def _named(wanted: Mapping[str, object]) -> dict[str, object]:
    return {column: value for column, value in wanted.items() if value is not None}


def logs(table: Frame, measure: str = "fourier") -> Frame:
    """log2 of a measure: a row a draw, a column a (depth, scale); nan of constants."""
    wide = table.set_index(["draw", "depth", "scale"])[measure].unstack(["depth", "scale"])
    return np.log2(wide)


def corners(measured: Measured) -> tuple[tuple[int, float], tuple[int, float]]:
    """Depth and scale of the simplest networks in the maps and of the most complex: those of one
    layer at the smallest scale, and the deepest at 8 (or the largest, where that is smaller)."""
    settings = measured.settings
    large = max((s for s in settings.scales if s <= 8), default=max(settings.scales))
    return (min(settings.depths), min(settings.scales)), (max(settings.depths), large)


def rise(measured: Measured, activation: str) -> Frame:
    """How far complexity rises from one corner of a map to the other, a number a draw."""
    table = functions(measured, "maps", activation=activation)
    if not len(table):
        return pd.Series(dtype=float)
    wide, (low, high) = logs(table), corners(measured)
    if low == high or low not in wide or high not in wide:
        return pd.Series(dtype=float)
    return (wide[high] - wide[low]).dropna()


def paired(a: Frame, b: Frame) -> Estimate | None:
    """Mean of a - b over the draws that both have; None where there are none."""
    both = pd.concat([a, b], axis=1).dropna().to_numpy(float)
    return mean_interval(both[:, 0] - both[:, 1]) if len(both) else None


def estimate(values: Frame, *, share: bool = False) -> Estimate | None:
    """Mean of what there is, None where there is nothing; a share's interval ends at 0 and 1."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if not len(known):
        return None
    found = mean_interval(known)
    if not share or found.low is None or found.high is None:
        return found
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def cell_means(measured: Measured, activation: str, measure: str) -> Frame:
    """Means over draws: a row a depth, a column a scale; nan where all are constant."""
    table = functions(measured, "maps", activation=activation)
    return table.groupby(["depth", "scale"])[measure].mean().unstack("scale")


def spread(measured: Measured, activation: str) -> Frame:
    """Standard deviation over draws of log2 complexity, a number a (depth, scale)."""
    table = functions(measured, "maps", activation=activation)
    return logs(table).std() if len(table) else pd.Series(dtype=float)


def slopes(table: Frame) -> Frame:
    """log2 complexity over log2 weight scale of the deepest networks: a slope a draw.

    Scales at which half of the draws or more are constant are left out, and then draws that are.
    """
    if not len(table):
        return pd.Series(dtype=float)
    wide = logs(select(table, {"depth": table["depth"].max()}))
    wide = wide.loc[:, wide.notna().mean() > 0.5].dropna()
    if wide.shape[1] < 2:
        return pd.Series(dtype=float)
    places = np.log2([scale for _, scale in wide.columns])
    centred = places - places.mean()
    return (wide.sub(wide.mean(axis=1), axis=0) * centred).sum(axis=1) / (centred**2).sum()


def component_change(measured: Measured, component: str, activation: str) -> Frame:
    """log2 of a component's complexity over the plain network's, deep and large: one a draw."""
    found = [
        functions(measured, "components", activation=activation, component=name)
        for name in (component, "plain")
    ]
    if not all(len(table) for table in found):
        return pd.Series(dtype=float)
    wide = [logs(table) for table in found]
    depth = max(measured.settings.component_depths)
    large = [s for s in measured.settings.scales if 2 <= s <= 8] or [max(measured.settings.scales)]
    columns = [(depth, scale) for scale in large]
    return (wide[0][columns] - wide[1][columns]).mean(axis=1).dropna()


def law_ratio(measured: Measured, activation: str, column: str, a: object, b: object) -> (
    Estimate | None
):  # fmt: skip
    """log2 of the ratio of mean complexities at two values of a law, independent draws."""
    table = functions(measured, "laws", activation=activation)
    found = [_law_values(measured, table, column, value) for value in (a, b)]
    if min(map(len, found)) < 2:
        return None
    return welch_difference(np.log2(found[0]), np.log2(found[1]))


def _law_values(measured: Measured, table: Frame, column: str, value: object) -> (
    Float[np.ndarray, " n"]
):  # fmt: skip
    plain = {"width": measured.config.width, "bias_scale": 1.0, "prior": "uniform"}
    rows = select(table, plain | {column: value}).drop_duplicates("draw")
    return rows["fourier"].dropna().to_numpy(float)


def agreement(measured: Measured, a: str, b: str, *, below: float | None = None) -> Estimate | None:
    """Spearman correlation of two measures over the maps' cells, its interval by the jackknife over
    draws (resampled ones would lower it: noise counts twice); None where less than three cells
    have half of their draws or more that are not constant.

    Args:
        measured: what was measured.
        a: a measure.
        b: another.
        below: cells whose mean of `a` is as much or more are left out.
    """
    table = functions(measured, "maps")
    if not len(table):
        return None
    keys = ["activation", "depth", "scale"]
    wide = [
        table.pivot_table(index=keys, columns="draw", values=measure, dropna=False)
        for measure in (a, b)
    ]
    values = np.stack([frame.to_numpy(float) for frame in wide])
    values = values[:, (~np.isnan(values)).mean(axis=2).min(axis=0) >= 0.5]
    if below is not None:
        values = values[:, np.nanmean(values[0], axis=1) < below]
    if values.shape[1] < 3:
        return None
    draws = values.shape[2]
    value = float(rank_correlations(values, np.ones((1, draws)))[0])
    if draws < 2:
        return Estimate(value=value, low=None, high=None, n=draws)
    left_out = rank_correlations(values, 1 - np.eye(draws))
    reach = float(stats.t.ppf(0.975, draws - 1)) * float(left_out.std() * np.sqrt(draws - 1))
    return Estimate(
        value=value, low=max(-1.0, value - reach), high=min(1.0, value + reach), n=draws
    )


def rank_correlations(
    values: Float[np.ndarray, "2 k n"], times: Float[np.ndarray, "r n"]
) -> Float[np.ndarray, " r"]:
    """Spearman correlation over k cells of two measures' means, draw i taken `times` i; cells that
    a row of `times` leaves without a value are left out of all."""
    known = ~np.isnan(values)
    sums = np.einsum("rn,mkn->mrk", times, np.where(known, values, 0.0))
    counts = np.einsum("rn,mkn->mrk", times, known.astype(float))
    kept = (counts > 0).all(axis=(0, 1))
    ranks = stats.rankdata(sums[..., kept] / counts[..., kept], axis=2)
    ranks -= ranks.mean(axis=2, keepdims=True)
    ranks /= np.linalg.norm(ranks, axis=2, keepdims=True)
    return (ranks[0] * ranks[1]).sum(axis=1)


def _spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    known = ~(np.isnan(a) | np.isnan(b))
    found: Any = stats.spearmanr(a[known], b[known])
    return float(found.statistic)


# ------------------------------------------------------------------------------------------ tasks


def by_kind(table: Frame, column: str) -> Frame:
    """A column of a task by seed (rows) and by activation and prefactor (columns)."""
    return table.pivot_table(index="seed", columns=["activation", "prefactor"], values=column)


def fit_prediction(table: Frame, target: float) -> Float[np.ndarray, " s"]:
    """Of each seed: Spearman correlation, over activations and prefactors, of how far the initial
    complexity is from the task's (log2) with accuracy on what was not trained on."""
    far = np.abs(np.log2(by_kind(table, "initial") / target))
    right = by_kind(table, "test")
    return np.array([_spearman(far.loc[seed].to_numpy(), right.loc[seed].to_numpy())
                     for seed in right.index])  # fmt: skip


def kept_order(table: Frame) -> Float[np.ndarray, " s"]:
    """Of each seed: Spearman correlation of complexity before training and after."""
    before, after = by_kind(table, "initial"), by_kind(table, "final")
    return np.array([_spearman(before.loc[seed].to_numpy(), after.loc[seed].to_numpy())
                     for seed in after.index])  # fmt: skip


def best_prefactors(table: Frame, column: str = "test") -> Frame:
    """log2 of the prefactor with the best mean of the other seeds: a row a seed, a column an
    activation."""
    found = {}
    for activation, rows in table.groupby("activation"):
        wide = rows.pivot_table(index="seed", columns="prefactor", values=column)
        total = wide.sum()
        found[activation] = (total - wide).idxmax(axis=1).map(np.log2)
    return pd.DataFrame(found)


def at_best(table: Frame, column: str) -> Frame:
    """A column at the prefactor that is best for the other seeds: a row a seed, a column an
    activation."""
    best = best_prefactors(table, column)
    return pd.DataFrame(
        {
            activation: [
                select(table, {"activation": activation, "seed": seed, "prefactor": 2.0**place})[
                    column
                ].mean()
                for seed, place in best[activation].items()
            ]
            for activation in best
        },
        index=best.index,
    )


def crossed_frame(table: Frame) -> Estimate | None:
    """Mean over seeds (rows) and activations (columns), both resampled."""
    known = table.dropna(axis=1)
    return crossed_interval(known.to_numpy(float).T) if known.size else None


# ---------------------------------------------------------------------------------------- sequences


def written(
    measured: Measured, *, activation: str | None = None, depth: int | None = None,
    norm_scale: float | None = None, model: str | None = None,
) -> Float[np.ndarray, " n"]:  # fmt: skip
    """Complexities of the sequences of one kind of transformer."""
    table = measured.table("sequences")
    wanted = _named(
        {"activation": activation, "depth": depth, "norm_scale": norm_scale, "model": model}
    )
    if not len(table) or not set(wanted) <= set(table.columns):
        return np.empty(0)
    return select(table, wanted)["lz"].to_numpy(float)
