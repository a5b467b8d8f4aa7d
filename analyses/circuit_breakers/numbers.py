"""Numbers with intervals, read out of the tables of the circuit-breaker study.

A unit is a prompt or passage; every seed was measured on the same ones, so intervals resample both
(`statistics.crossed_interval`). Concepts are pooled: their prompts are units side by side.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from analyses.cells import Frame, select
from analyses.circuit_breakers.measured import HARMFUL, MAIN, ORIGINAL, Measured
from analyses.statistics import (
    N_RESAMPLES,
    Estimate,
    crossed_interval,
    mean_interval,
    proportion_interval,
)

WORDED = ("none", "paraphrase", "prefill", "few-shot")
MADE = ("soft tokens", "steering 0.65", "steering 1")
ATTACKS = (*WORDED, *MADE)
"""Attacks in the order in which they are shown; `none` is just asking."""


def concepts(measured: Measured) -> list[str]:
    """The harmless subjects."""
    return [name for name in measured.subjects if name != HARMFUL]


def by_seed(table: Frame, value: str) -> Float[np.ndarray, "s n"]:
    """A column as seeds by units; a unit is a row of a subject."""
    if not len(table):
        return np.zeros((0, 0))
    unit = (table["subject"] + " " + table["row"].astype(str)).rename("unit")
    means = table[value].astype(float).groupby([table["seed"], unit]).mean()
    return means.unstack("unit").dropna(axis=1).to_numpy(dtype=float)


def crossed(table: Frame, value: str) -> Estimate | None:
    """Mean over seeds and units with its interval; None where nothing was measured.

    Of yes or no that is always the same, the exact interval of as many trials as there are units.
    """
    values = by_seed(table, value)
    if not values.size:
        return None
    if not isinstance(table[value].iloc[0], bool | np.bool_):
        return crossed_interval(values)
    if (values == values.flat[0]).all():
        n = values.shape[1]
        return proportion_interval(int(values.flat[0]) * n, n)
    return crossed_interval(values).clipped(0, 1)


def at_layers(
    measured: Measured, name: str, layers: Sequence[int], subjects: Sequence[str]
) -> Frame:
    """Rows of table `layers` of one set (`concept`, `near`, `ordinary`) at some layers."""
    table = select(measured.table("layers"), {"set": name, "run": MAIN})
    return table[table["layer"].isin(layers) & table["subject"].isin(subjects)]


def selected(table: Frame, subjects: Sequence[str]) -> Frame:
    """The rows of some subjects."""
    return table[table["subject"].isin(subjects)] if len(table) else table


# ----------------------------------------------------------------------------------------- outputs


def answers(measured: Measured, attack: str, run: str, subjects: Sequence[str]) -> Frame:
    """Rows of table `outputs` of an attack."""
    return selected(select(measured.table("outputs"), {"attack": attack, "run": run}), subjects)


def prompt_means(
    measured: Measured, value: str, run: str, attacks: Sequence[str], subjects: Sequence[str]
) -> Float[np.ndarray, "s n"]:
    """A column of `outputs`, means over attacks: seeds by prompts."""
    table = selected(select(measured.table("outputs"), {"run": run}), subjects)
    return by_seed(table[table["attack"].isin(attacks)], value) if len(table) else np.zeros((0, 0))


def relative_fall(
    before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"], *, seed: int = 0
) -> Estimate:
    """1 - mean(after) / mean(before) with a percentile bootstrap over paired units; nan of 0."""
    if not before.any():
        return Estimate(value=float("nan"), low=None, high=None, n=len(before))
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(before), size=(N_RESAMPLES, len(before)))
    means = before[chosen].mean(1)
    falls = 1 - after[chosen].mean(1) / np.where(means == 0, np.nan, means)
    low, high = np.nanquantile(falls, [0.025, 0.975])
    value = 1 - after.mean() / before.mean() if before.mean() else float("nan")
    return Estimate(value=float(value), low=float(low), high=float(high), n=len(before))


def rise(measured: Measured, attack: str, subjects: Sequence[str]) -> Estimate | None:
    """How much less likely the original's answers became, nats a token."""
    before = by_seed(answers(measured, attack, ORIGINAL, subjects), "expected_nll")
    after = by_seed(answers(measured, attack, MAIN, subjects), "expected_nll")
    if not before.size or not after.size or before.shape[1] != after.shape[1]:
        return None
    return crossed_interval(after - before[0])


# ---------------------------------------------------------------------------- paired measurements


def paired(table: Frame, measure: str) -> Float[np.ndarray, "s n"]:
    """Broken minus original of a measure of `capability` or `brief`: seeds by units."""
    rows = select(table, {"measure": measure})
    if not len(rows):
        return np.zeros((0, 0))
    return by_seed(rows.assign(difference=rows["broken"] - rows["original"]), "difference")


def capability(measured: Measured, measure: str) -> Estimate | None:
    """Broken minus original, over all subjects."""
    values = paired(measured.table("capability"), measure)
    return crossed_interval(values) if values.size else None


def ablation(measured: Measured, run: str, measure: str) -> Float[np.ndarray, "s n"]:
    """Broken minus original of a measure of an ablation: seeds by units."""
    return paired(select(measured.table("brief"), {"run": run}), measure)


def ablation_names(measured: Measured) -> list[str]:
    """Ablations that were measured, the main run first."""
    table = measured.table("brief")
    return list(dict.fromkeys(table["run"])) if len(table) else []


def ablation_state(
    measured: Measured, run: str, name: str, layers: Sequence[int], value: str = "cosine"
) -> Estimate | None:
    """Cosine (or log length ratio) of an ablation on one set at some layers."""
    table = select(measured.table("ablation_layers"), {"run": run, "set": name})
    return crossed(table[table["layer"].isin(layers)], value) if len(table) else None


def difference(a: Float[np.ndarray, "s n"], b: Float[np.ndarray, "r n"]) -> Estimate | None:
    """Mean of a minus mean of b over units that both have, seeds averaged."""
    if not a.size or not b.size or a.shape[1] != b.shape[1]:
        return None
    return mean_interval(a.mean(0) - b.mean(0))


# ---------------------------------------------------------------------------------------- recovery


def recovered(
    broken: Float[np.ndarray, " n"],
    mended: Float[np.ndarray, " n"],
    original: Float[np.ndarray, " n"],
) -> Estimate:
    """Share of the lost likelihood that came back, of means, bootstrapped over units: 1 is all."""
    return relative_fall(broken - original, mended - original)


def curve(
    measured: Measured, table: str, by: str, run: str, *, text: str | None = None
) -> dict[int, Float[np.ndarray, " n"]]:
    """Mean negative log-likelihood by steps or turns: units, seeds averaged. `text` chooses what
    was fine-tuned on."""
    wanted = {"run": run} | ({} if text is None else {"text": text})
    rows = selected(select(measured.table(table), wanted), concepts(measured))
    if not len(rows):
        return {}
    return {int(n): by_seed(some, "nll").mean(0) for n, some in rows.groupby(by)}


def put_back(measured: Measured, sae: str) -> dict[tuple[str, int], Float[np.ndarray, " n"]]:
    """Negative log-likelihood with features of an SAE put back, by change and number."""
    rows = selected(select(measured.table("readded"), {"sae": sae}), concepts(measured))
    if not len(rows):
        return {}
    return {
        (str(change), int(n)): by_seed(some, "nll").mean(0)
        for (change, n), some in rows.groupby(["change", "n"])
    }
