"""Numbers with intervals, read out of the tables of the collapse study.

A unit is a phrasing of the question (of digits: also other digits), a prompt, or a pair of digits.
Distances, gradients and their ratios are averaged as logarithms, so that intervals are of ratios.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from analyses.cells import Frame, select
from analyses.collapse.features import MLP
from analyses.collapse.measured import Measured
from analyses.statistics import Estimate, mean_interval

SLOPE_FROM, SLOPE_TO = 10, 1001
"""Lengths over which a curve's slope is taken."""
LONG = 100
"""From here on a sequence counts as long."""
PLAIN = {"form": "raw", "attention": "all", "weights": "trained", "more": 1}
"""The condition of the paper's figure 5."""


def distances(measured: Measured, family: str, wanted: Mapping[str, object] = PLAIN) -> Frame:
    """Final distances: a row a unit, a column a length; empty where that was not measured."""
    rows = select(
        measured.table("curves"),
        PLAIN | dict(wanted) | {"family": family, "layer": measured.n_layers},
    )
    return rows.pivot(index="unit", columns="n", values="distance") if len(rows) else rows


def layer_distances(measured: Measured, family: str) -> Frame:
    """Mean final distances of all units: a row a layer, a column a length."""
    rows = select(measured.table("curves"), PLAIN | {"family": family})
    if not len(rows):
        return rows
    logs = rows.assign(log=np.log10(rows["distance"].clip(lower=np.finfo(np.float32).tiny)))
    return logs.pivot_table(index="layer", columns="n", values="log")


def long_lengths(lengths: Iterable[int]) -> list[int]:
    """The lengths that count as long; the longest where none does."""
    known = [int(n) for n in lengths]
    return [n for n in known if n >= LONG] or [max(known)]


def slopes(by_length: Frame) -> Float[np.ndarray, " u"]:
    """Each unit's slope of log distance over log length: -1 where the distance falls as 1 / n."""
    chosen = [n for n in by_length.columns if SLOPE_FROM <= n <= SLOPE_TO]
    logs = np.log10(by_length[chosen].clip(lower=np.finfo(np.float32).tiny).to_numpy())
    return by_decade(chosen, logs)


def by_decade(lengths: Iterable[int], values: Float[np.ndarray, "u n"]) -> Float[np.ndarray, " u"]:
    """Each row's slope over log10 of the length: what a factor of ten in length adds."""
    n = np.log10(np.array(list(lengths), dtype=float))
    centred = n - n.mean()
    return (values - values.mean(1, keepdims=True)) @ centred / (centred**2).sum()


def log_ratios(
    by_length: Frame, other: Frame, lengths: Sequence[int] | None = None
) -> Float[np.ndarray, " u"]:
    """Each unit's mean log10 ratio of distances at long lengths."""
    both = [n for n in by_length.columns if n in other.columns]
    chosen = long_lengths(both) if lengths is None else list(lengths)
    tiny = np.finfo(np.float32).tiny
    logs = [np.log10(table[chosen].clip(lower=tiny).to_numpy()) for table in (by_length, other)]
    return (logs[0] - logs[1]).mean(1)


def geometric(values: Frame) -> Estimate:
    """Geometric mean of positive units with the interval of the logarithms."""
    found = np.asarray(values, dtype=float)
    logs = mean_interval(np.log10(np.clip(found, np.finfo(np.float32).tiny, None)))
    ends = (logs.low, logs.high)
    low, high = (None if end is None else float(10**end) for end in ends)
    return Estimate(value=float(10**logs.value), low=low, high=high, n=logs.n)


def as_ratio(estimate: Estimate) -> Estimate:
    """An estimate of a log10 as one of the ratio itself."""
    low, high = (None if end is None else 10**end for end in (estimate.low, estimate.high))
    return Estimate(value=10**estimate.value, low=low, high=high, n=estimate.n)


# ---------------------------------------------------------------------------------- precision


def in_formats(measured: Measured, family: str) -> Frame:
    """Rows of a family in every format."""
    return select(measured.table("precision"), {"family": family})


def floor_crossing(measured: Measured, family: str, format: str) -> int | None:
    """The shortest length from which on the exact distance is under the format's rounding floor;
    None where it is not."""
    rows = in_formats(measured, family)
    exact = select(rows, {"format": "float64"}).groupby("n")["distance"].mean()
    floor = select(rows, {"format": format}).groupby("n")["floor"].mean()
    under = (exact < floor)[::-1].cummin()[::-1]
    return int(under.index[under][0]) if under.any() else None


# -------------------------------------------------------------------------------------- paths


def sensitivity(
    measured: Measured, of: str, *, weights: str = "trained", attention: str = "all"
) -> Frame:
    """Gradients and path sums of the tokens of a sequence, the last token and those before the
    sequence left out."""
    rows = select(
        measured.table("sensitivity"), {"family": of, "weights": weights, "attention": attention}
    )
    if not len(rows):
        return rows
    last = rows.groupby("unit")["position"].transform("max")
    return rows[(rows["position"] >= 0) & (rows["position"] < last)]


def rank_correlations(rows: Frame, a: str, b: str) -> Float[np.ndarray, " u"]:
    """Spearman's correlation of two columns, by prompt."""
    return np.array(
        [float(stats.spearmanr(unit[a], unit[b])[0]) for _, unit in rows.groupby("unit")]  # type: ignore[arg-type]
    )


def early_over_late(rows: Frame, column: str = "gradient") -> Float[np.ndarray, " u"]:
    """Each prompt's log10 ratio of the first quarter's geometric mean over the last quarter's."""
    found = []
    for _, unit in rows.groupby("unit"):
        values = unit.sort_values("position")[column].to_numpy()
        ordered = np.log10(np.maximum(values, np.finfo(np.float64).tiny))  # unseen tokens have 0
        quarter = len(ordered) // 4
        found.append(ordered[:quarter].mean() - ordered[-quarter:].mean())
    return np.array(found)


# ---------------------------------------------------------------------------------- behaviour


def margins_of(measured: Measured, wanted: Mapping[str, object]) -> Frame:
    """Margins of a way of copying: a row a pair of digits, a column a length."""
    asked = {"hint": False, "order": "sequence first", "separators": False} | dict(wanted)
    rows = select(measured.table("copying"), asked)
    return rows.pivot(index="pair", columns="n", values="margin") if len(rows) else rows


def long_distances(by_length: Frame) -> Float[np.ndarray, " u"]:
    """Each unit's geometric mean distance at long lengths."""
    long = by_length[long_lengths(by_length.columns)].to_numpy()
    return 10 ** np.log10(np.maximum(long, np.finfo(np.float32).tiny)).mean(1)


def long_mean(by_length: Frame) -> Float[np.ndarray, " u"]:
    """Each unit's mean over long sequences."""
    return by_length[long_lengths(by_length.columns)].mean(axis=1).to_numpy()


def remedy_margins(measured: Measured, remedy: str, lengths: Sequence[int] | None = None) -> Frame:
    """A remedy's mean margin by pair of digits and control."""
    rows = select(measured.table("remedies"), {"remedy": remedy})
    if lengths is not None and len(rows):
        rows = rows[rows["n"].isin(list(lengths))]
    return rows.groupby(["pair", "control"])["margin"].mean().unstack() if len(rows) else rows


# ----------------------------------------------------------------------------------- features


def telling_units(measured: Measured, family: str, *, of_saes: bool) -> Frame:
    """Features that tell, summed over all layers' MLPs or all SAEs: a row a unit, a column a
    length."""
    rows = select(measured.table("telling"), {"family": family, "weights": "trained"})
    if not len(rows):
        return rows
    rows = rows[(rows["source"] != MLP) == of_saes]
    if not len(rows):
        return rows
    return rows.groupby(["unit", "n"])["tell"].sum().unstack()


def n_features(measured: Measured) -> int:
    """MLP units of all layers and features of all SAEs that were looked at."""
    sizes = select(measured.table("sizes"), {"weights": "trained"})
    return int(sizes.drop_duplicates(["source", "layer"])["features"].sum())


def last_telling(measured: Measured, family: str) -> Frame:
    """By source and layer, the largest length at which a feature tells in over half of the units;
    0 where none ever does."""
    rows = select(measured.table("telling"), {"family": family, "weights": "trained"})
    if not len(rows):
        return pd.DataFrame(columns=["source", "layer", "n"])
    told = rows.assign(told=rows["tell"] > 0).groupby(["source", "layer", "n"])["told"].mean()
    told = told.reset_index()
    told["n"] = np.where(told["told"] > 0.5, told["n"], 0)
    return told.groupby(["source", "layer"])["n"].max().reset_index()


def counters_of(measured: Measured, threshold: float, weights: str = "trained") -> Frame:
    """By source and layer: features that follow n in ones, those of them that follow it the same
    way in words (a count whatever is counted), those that follow the position in random digits as
    well, and those that follow n in both and no position; besides, all that follow it in words."""
    table = select(measured.table("following"), {"weights": weights})
    if not len(table):
        return pd.DataFrame()
    strong = table[table["rho"].abs() > threshold]
    keys = ["source", "layer", "feature"]
    signs = {
        name: rows.set_index(keys)["rho"].apply(np.sign) for name, rows in strong.groupby("family")
    }
    ones = signs.get("ones", pd.Series(dtype=float))
    frame = pd.DataFrame({"ones": ones})
    for other in ("words", "digits"):
        theirs = signs.get(other, pd.Series(dtype=float)).reindex(frame.index)
        frame[other] = theirs == frame["ones"]
    frame["count"] = frame["words"] & ~frame["digits"]
    counted: Frame = frame.assign(ones=True).groupby(level=["source", "layer"])
    found = counted[["ones", "words", "digits", "count"]].sum()
    everywhere: Frame = strong[strong["family"] == "words"].groupby(["source", "layer"]).size()
    return found.assign(all_words=everywhere.reindex(found.index).fillna(0)).reset_index()
