"""What the top-AFA study concludes: verdicts, tables and words."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from analyses.report import Verdict
from analyses.statistics import Estimate, mean_interval
from analyses.top_afa_measured import (
    LABELS,
    Family,
    Measured,
    Result,
    advantage,
    matched,
    over_seeds,
)
from saes.afa import DEFINITIONS as AFA_DEFINITIONS
from saes.afa import welch

COLUMNS = (
    "fvu", "ce_recovered", "kl", "l0", "dead_share", "bits", "code_over_input", "over_share",
    "elbo", "elbo_support", "elbo_reconstruction",
)  # fmt: skip
"""Facts in the table of SAEs."""
OF_ELBO = 0.5
"""Two layers are said to differ where they do more often than this."""


def verdicts(measured: Measured) -> list[Verdict]:
    """The questions of the study, each with its answer."""
    return [
        *beats_top_k(measured),
        settles_above_d(measured),
        *only_above_d(measured),
        easier_to_choose(measured),
        *layers_differ(measured),
        elbo_of_training(measured),
    ]


def beats_top_k(measured: Measured) -> list[Verdict]:
    """Does top-AFA reconstruct better than TopK with as many active latents?"""
    statistic = "share of TopK's FVU at the same L0 that is saved"
    compared = {
        "At the same L0 top-AFA reconstructs better than TopK (rows standardised, all layers).": (
            measured.pick("top_afa")
        ),
        "The same without standardising the rows (middle layer).": measured.pick(
            "top_afa", rows="scale"
        ),
        "The same with the conventions of the authors' code (middle layer).": measured.pick(
            "top_afa_paper"
        ),
        "The same on the random-weight twin, a control (middle layer).": measured.pick(
            "top_afa", weights="random"
        ),
        "At the same L0 BatchTopK reconstructs better than TopK (all layers).": measured.pick(
            "batch_topk"
        ),
    }
    found = {claim: advantage(measured, results) for claim, results in compared.items()}
    return [
        make_verdict(claim, f"{statistic}, {n_seeds(value)}", value, value.above(0))
        for claim, value in found.items()
        if value is not None
    ]


def settles_above_d(measured: Measured) -> Verdict:
    """Where does top-AFA settle?"""
    over_d = over_seeds(measured.pick("top_afa"), lambda r: r.fact("l0") / measured.d_in)
    assert over_d is not None, "every SAE has an L0"
    return make_verdict(
        "top-AFA settles above L0 = d, where the published gains over TopK are.",
        f"its L0 over d = {measured.d_in}, mean over layers and lambdas, {n_seeds(over_d)}",
        over_d,
        over_d.above(1),
    )


def only_above_d(measured: Measured) -> list[Verdict]:
    """Does it beat TopK above L0 = d and not below?"""
    compared = [result for result, _ in matched(measured, measured.pick("top_afa"))]
    above = advantage(measured, [r for r in compared if r.fact("l0") > measured.d_in])
    below = advantage(measured, [r for r in compared if r.fact("l0") <= measured.d_in])
    shown = above or below
    if shown is None:
        return []
    nothing = "" if above and below else ", the only side on which SAEs settled"
    side = "above" if above else "below"
    holds = above is not None and above.above(0) and (below is None or not below.above(0))
    return [
        make_verdict(
            "top-AFA beats TopK above L0 = d, and only there.",
            f"share of TopK's FVU that is saved {side} L0 = d{nothing}, {n_seeds(shown)}",
            shown,
            holds,
        )
    ]


def easier_to_choose(measured: Measured) -> Verdict:
    """Does a wrong lambda cost less than a wrong k?"""
    by_k, by_afa = (slopes(measured, family) for family in ("topk", "top_afa"))
    difference = mean_interval(by_k - by_afa)
    return make_verdict(
        "FVU depends less on lambda than on k.",
        "change of log2 FVU for a doubling of the setting, k's minus lambda's (sizes, over each "
        f"grid's whole range), {n_seeds(difference)}",
        difference,
        difference.above(0),
    )


def slopes(measured: Measured, family: Family) -> np.ndarray:
    """Size of the change of log2 FVU for a doubling of the setting, by seed; mean over layers."""
    return np.array(
        [
            np.mean([_slope(measured, family, layer, seed) for layer in measured.settings.layers])
            for seed in range(measured.settings.seeds)
        ]
    )


def _slope(measured: Measured, family: Family, layer: int, seed: int) -> float:
    results = measured.pick(family, layer=layer, seed=seed)
    fvu = np.log2([r.fact("fvu") for r in results])
    setting = np.log2([r.cell.setting for r in results])
    return float(np.ptp(fvu) / max(np.ptp(setting), 1e-9))


def layers_differ(measured: Measured) -> list[Verdict]:
    """Is the layer of the worst FVU another one than that of the worst epsilon-LBO?"""
    if len(measured.settings.layers) < 2:
        return []
    verdicts = []
    for family in ("topk", "top_afa"):
        share = differing_layers(measured, family)
        verdicts.append(
            make_verdict(
                f"The layers of worst FVU and of worst epsilon-LBO differ ({LABELS[family]}).",
                "share of the settings in which they differ (unrelated orders: "
                f"{1 - 1 / len(measured.settings.layers):.2f}), {n_seeds(share)}",
                share,
                share.above(OF_ELBO),
            )
        )
    return verdicts


def differing_layers(measured: Measured, family: Family) -> Estimate:
    """Share of a family's settings in which the worst layers differ, over seeds."""
    found = []
    for seed in range(measured.settings.seeds):
        of_seed = measured.pick(family, seed=seed)
        settings = sorted({r.cell.setting for r in of_seed})
        by_setting = [[r for r in of_seed if r.cell.setting == s] for s in settings]
        found.append(np.mean([worst(rs, "fvu") != worst(rs, "elbo") for rs in by_setting]))
    share = mean_interval(np.array(found))
    if share.low is None or share.high is None:
        return share
    return replace(share, low=max(0.0, share.low), high=min(1.0, share.high))


def worst(results: Sequence[Result], name: str) -> int:
    """The layer where a fact is largest."""
    return max(results, key=lambda r: r.fact(name)).cell.group.layer


def elbo_of_training(measured: Measured) -> Verdict:
    """Does training lower the epsilon-LBO at all?"""
    untrained = {r.cell.group: r.fact("elbo") for r in measured.pick("untrained")}
    ratio = over_seeds(
        measured.pick("top_afa", setting=measured.settings.middle_afa),
        lambda r: math.log2(r.fact("elbo") / untrained[r.cell.group]),
    )
    assert ratio is not None, "every group has an untrained control"
    return make_verdict(
        "A trained top-AFA SAE has a lower epsilon-LBO than an untrained one.",
        f"log2 of the median epsilon-LBO over the untrained one's, {n_seeds(ratio)}",
        ratio,
        ratio.below(0),
    )


def make_verdict(claim: str, statistic: str, value: Estimate, holds: bool) -> Verdict:
    """A verdict on an estimate."""
    return Verdict(
        claim=claim, statistic=statistic, value=value.value, low=value.low, high=value.high,
        holds=holds,
    )  # fmt: skip


def n_seeds(estimate: Estimate) -> str:
    """How many seeds an estimate rests on, in words."""
    return f"{estimate.n} seed{'' if estimate.n == 1 else 's'}"


def tables(measured: Measured) -> dict[str, pd.DataFrame]:
    """Every SAE, mean over seeds, and what was compared at matched L0."""
    return {"SAEs_mean_over_seeds": sae_table(measured), "matched_L0": matched_table(measured)}


def sae_table(measured: Measured) -> pd.DataFrame:
    """One row for each cell but its seed."""
    rows = []
    for r in measured.results:
        group = r.cell.group
        rows.append(
            {
                "family": LABELS[r.cell.family],
                "setting": r.cell.setting,
                "layer": group.layer,
                "rows": group.rows,
                "weights": group.weights,
                **{name: r.fact(name) for name in COLUMNS},
            }
        )
    keys = ["family", "setting", "layer", "rows", "weights"]
    grouped = pd.DataFrame(rows).groupby(keys, sort=False, as_index=False)
    return pd.DataFrame(grouped[list(COLUMNS)].mean())


def matched_table(measured: Measured) -> pd.DataFrame:
    """What is saved of TopK's FVU at the same L0, by what was compared."""
    rows = []
    for name, results in comparisons(measured).items():
        found = advantage(measured, results)
        compared = list(matched(measured, results))
        if found is not None:
            rows.append(
                {
                    "compared": name,
                    "FVU saved": found.value,
                    "low": found.low,
                    "high": found.high,
                    "SAEs": len(compared),
                    "out of TopK's range": len(results) - len(compared),
                    "mean L0": float(np.mean([r.fact("l0") for r, _ in compared])),
                }
            )
    return pd.DataFrame(rows)


def comparisons(measured: Measured) -> dict[str, list[Result]]:
    """What is compared with TopK at the same L0, by name."""
    found: dict[str, list[Result]] = {}
    for family in ("top_afa", "batch_topk"):
        for layer in measured.settings.layers:
            found[f"{LABELS[family]}, layer {layer}"] = measured.pick(family, layer=layer)
    found[f"{LABELS['top_afa_paper']}"] = measured.pick("top_afa_paper")
    found["top-AFA, rows not standardised"] = measured.pick("top_afa", rows="scale")
    found["top-AFA, random-weight twin"] = measured.pick("top_afa", weights="random")
    return found


def numbers(measured: Measured) -> dict[str, object]:
    """Key figures for metrics.json."""
    l0 = [r.fact("l0") for r in measured.pick("top_afa")]
    return {
        "n_saes": sum(r.cell.family != "untrained" for r in measured.results),
        "rows_trained_on": measured.settings.steps * measured.settings.batch_size,
        "top_afa_l0_least": min(l0),
        "top_afa_l0_most": max(l0),
        "d_in": measured.d_in,
    }


def text(measured: Measured) -> str:
    """What was done and how to read it."""
    s = measured.settings
    layers = ", ".join(map(str, s.layers))
    floor = welch(s.d_sae, measured.d_in)
    return f"""
Sparse autoencoders of {s.d_sae} latents on {s.model} ({s.site}, layers {layers}), reading
{s.corpus}: TopK and BatchTopK with k in {_listed(s.ks)}, top-AFA (Lee et al. 2025) with lambda in
{_listed(s.afas)}; seeds: {s.seeds}, each with its own initial weights and order of the rows. All
SAEs of a layer and a seed see the same {s.steps} batches of {s.batch_size} rows, rows standardised
one by one as the authors do; matrix products in {s.products}. At layer {s.middle} also: the rows
merely scaled, the mixed conventions of the authors' code, and a random-weight twin of the model.
The untrained control is a random dictionary whose latents top-AFA's rule chooses.

**This is a short training**: {s.steps * s.batch_size:,} rows an SAE, where the authors give 82
million. It compares the families under one small budget, and the L0 at which top-AFA settles was
still falling for some (see the figure); it does not speak of where long training ends.

FVU, CE recovered and the rest are of {s.n_rows:,} held-out rows and {s.n_ce_tokens:,} held-out
tokens, the same for all. "At the same L0" interpolates TopK's log FVU in log L0 between its values
of k, in the same layer, seed and rows; SAEs outside its range are left out. Intervals are 95 %,
Student's t over seeds: with so few they are wide, and a claim that does not show may still be true.

`bits` is the authors' description length, L0 (7 + log2 {s.d_sae}). `elbo` is the epsilon-LBO, in
three readings: {AFA_DEFINITIONS["elbo"]}; `elbo_support`: {AFA_DEFINITIONS["elbo_support"]};
`elbo_reconstruction`: {AFA_DEFINITIONS["elbo_reconstruction"]}. No {s.d_sae} directions in
{measured.d_in} dimensions have a coherence below {floor:.3f} (Welch 1974), so an epsilon-LBO far
below that certifies nothing.

FVU depends on k because k is the L0: whoever sets k sets the price that they pay. A setting that
matters less is easier to choose only where the L0 does not matter.
"""


def _listed(values: Sequence[float] | Sequence[int]) -> str:
    return "{" + ", ".join(f"{value:.4g}" for value in values) + "}"
