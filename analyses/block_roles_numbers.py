"""Numbers with intervals, read out of the tables of the block-roles study.

Intervals have 95 % confidence. Of what was predicted they resample the held-out images (each with
its own caption and noise); of what was changed they are over pairs of captions (exact for shares),
over features, or over values, as each function says.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64

from analyses.block_roles_locality import shares
from analyses.block_roles_measured import OWN, Frame, Measured, Method
from analyses.block_roles_probes import PAIR, drawn_images
from analyses.cells import select
from analyses.statistics import Estimate, mean_interval, proportion_interval
from probe.toyturbo.world import FACTORS
from saes.metrics import interval

UNKNOWN = Estimate(value=float("nan"), low=None, high=None, n=0)
PROBE_SEED = 0
"""Of the resamples of answers; those of features have the study's own."""


def from_draws(draws: Sequence[float] | Float64[np.ndarray, " r"], n: int) -> Estimate:
    """A number and its resamples as an estimate."""
    values = torch.tensor(np.asarray(draws, dtype=np.float64))
    low, high = interval(values[1:], n)
    known = n > 1 and not np.isnan(low)
    return Estimate(
        value=float(values[0]), low=low if known else None, high=high if known else None, n=n
    )


def mean_of(values: Frame) -> Estimate:
    """Mean of some units, those that are not numbers left out; unknown without any."""
    found = np.asarray(values, dtype=np.float64)
    found = found[np.isfinite(found)]
    return mean_interval(found) if len(found) else UNKNOWN


def share_of(happened: Frame) -> Estimate:
    """Share of the times that something happened; unknown where it was not tried."""
    found = np.asarray(happened, dtype=bool)
    return proportion_interval(int(found.sum()), len(found)) if len(found) else UNKNOWN


# ------------------------------------------------------------------------------------ prediction


def accuracy_draws(
    measured: Measured, block: str, factor: str, source: str, weights: str = "trained"
) -> Float64[np.ndarray, " r"] | None:
    """Accuracy of a linear probe and its resamples over images; None where it was not measured."""
    rows = select(
        measured.table("answers"),
        {"weights": weights, "block": block, "factor": factor, "source": source},
    )
    if not len(rows):
        return None
    n = measured.settings.images
    held_out = n - n // 2
    image = rows["image"].to_numpy() - n // 2
    right = np.bincount(image, rows["label"] == rows["answer"], held_out)
    weighted = drawn_images(held_out, PROBE_SEED)
    return (weighted @ right) / (weighted @ np.bincount(image, minlength=held_out)).clip(1e-300)


def accuracy(
    measured: Measured, block: str, factor: str, source: str, weights: str = "trained"
) -> Estimate:
    """The same as an estimate."""
    draws = accuracy_draws(measured, block, factor, source, weights)
    return UNKNOWN if draws is None else from_draws(draws, measured.settings.images // 2)


def skill(measured: Measured, block: str, factor: str) -> float:
    """How far the codes' accuracy is from that on shuffled labels (0) to all right (1)."""
    own, floor = (accuracy(measured, block, factor, s).value for s in ("codes", "shuffled"))
    return (own - floor) / (1 - floor) if floor < 1 else float("nan")


def value_rows(
    measured: Measured, block: str, control: str = "", weights: str = "trained"
) -> Frame:
    """A block's best features of the values of single factors."""
    rows = select(
        measured.table("values"), {"weights": weights, "block": block, "control": control}
    )
    return rows[rows["factor"] != PAIR] if len(rows) else rows


def value_mean(
    measured: Measured, block: str, factor: str, column: str, control: str = "",
    weights: str = "trained",
) -> Estimate:  # fmt: skip
    """Mean over a factor's values of what their best features score: `f1`, `auroc`, `union`."""
    rows = select(
        measured.table("values"),
        {"weights": weights, "block": block, "factor": factor, "control": control},
    )
    if not len(rows):
        return UNKNOWN
    draws = np.stack([np.asarray(one, float) for one in rows[column]])
    return from_draws(draws.mean(0), measured.settings.images // 2)


def owned_draws(
    measured: Measured, weights: str = "trained", control: str = "", least: float = OWN
) -> Float64[np.ndarray, " r"] | None:
    """Share of the values that have a feature of F1 `least` in one of the blocks, and resamples.

    None where it was not measured.
    """
    of_blocks = []
    for block in measured.blocks:
        rows = value_rows(measured, block, control, weights)
        if len(rows):
            of_blocks.append(np.stack([np.asarray(one, float) for one in rows["f1"]]))
    if not of_blocks:
        return None
    return (np.max(of_blocks, axis=0) >= least).mean(0)


# ------------------------------------------------------------------------------------- causation


def patches(measured: Measured, block: str, factor: str, weights: str = "trained") -> Frame:
    """The patches of pairs that differ in a factor, of those that count for it."""
    rows = select(
        measured.table("causes"),
        {"weights": weights, "what": "patch", "block": block, "factor": factor},
    )
    return rows[rows["counts"].astype(bool)] if len(rows) else rows


def moved_share(measured: Measured, block: str, factor: str, weights: str = "trained") -> Estimate:
    """How often the factor became the source's; exact interval over pairs."""
    rows = patches(measured, block, factor, weights)
    return share_of(rows["moved"]) if len(rows) else UNKNOWN


def others_changed(rows: Frame, factor: str) -> Estimate:
    """How often anything but the factor changed, in some patches of it."""
    if not len(rows):
        return UNKNOWN
    columns = [name for name in outcome_columns(rows) if name != factor]
    return share_of(rows[columns].to_numpy(dtype=bool).any(1))


def outcome_columns(rows: Frame) -> list[str]:
    """The columns that say what changed."""
    return [name for name in (*FACTORS, "other thing") if name in rows]


def changed_unasked(
    measured: Measured, block: str, factor: str, what: str, weights: str = "trained"
) -> Estimate:
    """How often a factor changed though the source has the same value.

    Of `patch`, by sources that differ in another factor; of `noise`, by the same caption from other
    noise; of `zero` and `mean`, by ablation.
    """
    rows = select(measured.table("causes"), {"weights": weights, "what": what, "block": block})
    if what == "patch" and len(rows):
        rows = rows[rows["factor"] != factor]
    return share_of(rows[factor]) if len(rows) else UNKNOWN


def by_unit(
    measured: Measured, block: str, factors: Sequence[str], weights: str = "trained"
) -> Frame:
    """Share of some factors that became the source's, by base caption."""
    rows = pd.concat([patches(measured, block, factor, weights) for factor in factors])
    return rows.groupby("unit")["moved"].mean() if len(rows) else pd.Series(dtype=float)


def mover(measured: Measured, factor: str) -> str:
    """The block whose patch moves a factor most often."""
    return max(measured.blocks, key=lambda b: _or_zero(moved_share(measured, b, factor).value))


def predictor(measured: Measured, factor: str) -> str:
    """The block whose codes predict a factor best."""
    return max(
        measured.blocks, key=lambda b: _or_zero(accuracy(measured, b, factor, "codes").value)
    )


def _or_zero(value: float) -> float:
    return 0.0 if np.isnan(value) else value


# -------------------------------------------------------------------------------------- features


def locality_by_feature(
    measured: Measured, block: str | None, kind: str, *, elsewhere: bool = False,
    weights: str = "trained",
) -> Frame:  # fmt: skip
    """Share of the change that is inside, by block and feature, mean over images and amounts."""
    wanted: dict[str, object] = {"weights": weights, "kind": kind}
    rows = select(measured.table("locality"), wanted | ({} if block is None else {"block": block}))
    if not len(rows):
        return pd.Series(dtype=float)
    suffix = "_elsewhere" if elsewhere else ""
    parts = (rows[f"{side}{suffix}"].to_numpy(float) for side in ("inside", "outside"))
    share = pd.Series(shares(*parts), index=rows.index)
    return share.groupby([rows["block"], rows["feature"]]).mean()


def pushed_by_value(
    measured: Measured, kind: str, *, block: str | None = None, column: str = "became"
) -> Frame:
    """How often a push did something, by block, factor and value, mean over images and doses."""
    wanted: dict[str, object] = {"kind": kind, "counts": True}
    rows = select(measured.table("pushes"), wanted | ({} if block is None else {"block": block}))
    if not len(rows):
        return pd.Series(dtype=float)
    return rows.groupby(["block", "factor", "value"])[column].mean()


def owned_values(measured: Measured) -> pd.MultiIndex:
    """Block, factor and value of every feature that has a value as its own."""
    rows: Frame = pd.concat([value_rows(measured, block) for block in measured.blocks])
    own = rows[[draws[0] >= OWN for draws in rows["f1"]]]
    return pd.MultiIndex.from_frame(own[["block", "factor", "value"]])


# ------------------------------------------------------------------------------------- transport


def transport_means(rows: Frame) -> Frame:
    """Moved, others and outside by method, k and m: means over the pairs that count."""
    counted = rows[rows["counts"].astype(bool)]
    columns = ["moved", "others", "outside"]
    return counted.groupby(["method", "k", "m"])[columns].mean().reset_index()


def settings_at_cost(means: Frame, rival: Method) -> tuple[pd.Series, pd.Series]:
    """The setting of features with the best balance, and the rival's best at that cost or less.

    The balance is moved - others. A rival whose every setting costs more has its cheapest.
    """
    own = means[means["method"] == "features"]
    best = own.loc[(own["moved"] - own["others"]).idxmax()]
    other = means[means["method"] == rival]
    affordable = other[other["others"] <= best["others"] + 1e-9]
    if len(affordable):
        return best, affordable.loc[affordable["moved"].idxmax()]
    return best, other.loc[other["others"].idxmin()]


def at_matched_cost(rows: Frame, rival: Method) -> Estimate:
    """How much oftener features move a factor than a rival does at the same cost, or a lower one.

    Settings are chosen on half of the pairs and compared on the other half, both ways round.
    """
    differences = [pd.Series(dtype=float)]
    for half in (0, 1):
        means = transport_means(rows[rows["unit"] % 2 == half])
        if not {"features", rival} <= set(means["method"]):
            continue
        chosen = settings_at_cost(means, rival)
        judged = rows[(rows["unit"] % 2 != half) & rows["counts"].astype(bool)]
        sides = [
            select(judged, {"method": one["method"], "k": one["k"], "m": one["m"]})
            .set_index(["factor", "unit"])["moved"]
            .astype(float)
            for one in chosen
        ]
        differences.append((sides[0] - sides[1]).dropna())
    return mean_of(np.concatenate(differences))
