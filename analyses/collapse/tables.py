"""The tables of the collapse study's report."""

import pandas as pd

from analyses.cells import Frame, select
from analyses.collapse.curves import PUBLISHED
from analyses.collapse.features import FOLLOWS
from analyses.collapse.figures import remedy_estimates
from analyses.collapse.measured import Measured
from analyses.collapse.numbers import (
    LONG,
    PLAIN,
    as_ratio,
    counters_of,
    distances,
    early_over_late,
    floor_crossing,
    geometric,
    in_formats,
    last_telling,
    log_ratios,
    long_distances,
    long_lengths,
    long_mean,
    margins_of,
    rank_correlations,
    remedy_margins,
    sensitivity,
    slopes,
)
from analyses.collapse.parts import BETAS
from analyses.collapse.precision import equal_from
from analyses.collapse.remedies import BASELINE
from analyses.statistics import effect_size, mean_interval, paired_difference

OTHER_SUMS = ("measured beta", "beta 10, first token out", "uniform")
CLAMPED = ("separator feature", "random direction", "random feature")
"""Remedies that are tried on fewer lengths."""


def tables(measured: Measured) -> dict[str, pd.DataFrame]:
    """Every table of what was measured."""
    made = {
        "final_distance": final_distance(measured),
        "curves": curves(measured),
        "number_formats": formats(measured),
        "path_sums": path_table(measured),
        "paths_of_one_head": one_head(measured),
        "copying": copying(measured),
        "counting": counting(measured),
        "features_by_layer": features(measured),
        "separator_feature": separator(measured),
        "remedies": remedies(measured),
        "shapes": shapes(measured),
    }
    return {name: table for name, table in made.items() if len(table)}


def final_distance(measured: Measured) -> pd.DataFrame:
    """Distances of every family at the paper's lengths: n against n + 1."""
    rows = []
    for family in measured.config.families:
        table = distances(measured, family)
        if len(table):
            at = {f"n = {n:,}": str(geometric(table[n])) for n in PUBLISHED if n in table.columns}
            rows.append({"family": family} | at)
    return pd.DataFrame(rows)


def curves(measured: Measured) -> pd.DataFrame:
    """Every curve: slope, and distance in long sequences."""
    table = measured.table("curves")
    if not len(table):
        return table
    rows = []
    keys = ["family", "form", "attention", "weights", "more"]
    for values, _ in table.groupby(keys, sort=False):
        wanted = dict(zip(keys, values, strict=True))
        by_length = distances(measured, str(wanted["family"]), PLAIN | wanted)
        rows.append(
            {"n +" if name == "more" else name: value for name, value in wanted.items()}
            | {
                "slope": str(mean_interval(slopes(by_length))),
                f"distance, n of {LONG} or more": str(geometric(long_distances(by_length))),
                "same next token": _same_top(table, wanted),
            }
        )
    return pd.DataFrame(rows)


def _same_top(table: Frame, wanted: dict) -> float:
    rows = select(table, wanted)
    return float(rows[rows["n"].isin(long_lengths(rows["n"]))]["same_top"].mean())


def formats(measured: Measured) -> pd.DataFrame:
    """Of each family and format: from where on pairs are equal, and what rounding does."""
    rows = []
    for family in ("ones", "digits", "commas"):
        table = in_formats(measured, family)
        for format in measured.settings.formats if len(table) else ():
            here = select(table, {"format": format})
            long = here[here["n"].isin(long_lengths(here["n"]))]
            crossing = floor_crossing(measured, family, format)
            rows.append(
                {
                    "family": family, "format": format,
                    "equal hidden from n": _from(here, "same_hidden"),
                    "equal logits from n": _from(here, "same_logits"),
                    "same next token from n": _from(here, "same_top"),
                    "equal coordinates, long": float(long["equal_coordinates"].mean()),
                    "own error, long": float(long["floor"].mean()),
                    "error above distance from n": "never" if crossing is None else f"{crossing:,}",
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _from(rows: Frame, column: str) -> str:
    """From which length on all pairs of all phrasings are equal."""
    every = rows.groupby("n")[column].all()
    found = equal_from(every.index.tolist(), every.tolist())
    return "never" if found is None else f"{found:,}"


def path_table(measured: Measured) -> pd.DataFrame:
    """Rank correlation of every kind of path sum with the gradient, and attention to the first
    token."""
    table = measured.table("sensitivity")
    rows = []
    keys = ["family", "attention", "weights"]
    for values, _ in table.groupby(keys, sort=False) if len(table) else ():
        of, attention, weights = map(str, values)
        here = sensitivity(measured, of, attention=attention, weights=weights)
        columns = [*(f"beta {beta:g}" for beta in BETAS), *OTHER_SUMS]
        found = {name: float(rank_correlations(here, name, "gradient").mean()) for name in columns}
        rows.append(
            {"of": of, "attention": attention, "weights": weights}
            | found
            | {
                "early over late": 10 ** float(early_over_late(here).mean()),
                "attention to the first token": float(here["first token"].mean()),
            }
        )
    return pd.DataFrame(rows)


def one_head(measured: Measured) -> pd.DataFrame:
    """Path sums along one head in every layer: rank correlation with the gradient of the first
    prompt, attention held constant."""
    table = measured.table("heads")
    if not len(table):
        return table
    first = table[table["layer"] == 0]
    made = first.pivot(index=["family", "attention", "weights"], columns="head", values="alone")
    return made.rename(columns=lambda head: f"head {head}").reset_index()


def copying(measured: Measured) -> pd.DataFrame:
    """Margins and accuracy of every way of asking."""
    table = measured.table("copying")
    if not len(table):
        return table
    rows = []
    keys = ["end", "order", "hint"]
    for values, of in table.groupby(keys, sort=False):
        wanted = dict(zip(keys, values, strict=True))
        by_length = margins_of(measured, wanted)
        long = of[of["n"].isin(long_lengths(of["n"]))]
        rows.append(
            wanted
            | {
                f"margin, {LONG} digits or more": str(mean_interval(long_mean(by_length))),
                "both choices right": float(long["right"].mean()),
            }
        )
    return pd.DataFrame(rows)


def counting(measured: Measured) -> pd.DataFrame:
    """How far off the written numbers are, beside always giving the median of the true ones."""
    table = measured.table("counting")
    if not len(table):
        return table
    rows = []
    for what, of in table.groupby("what", sort=False):
        written = of.dropna(subset=["answer"])
        error = (written["answer"] - written["true"]).abs()
        constant = (of["true"] - of["true"].median()).abs()
        rows.append(
            {
                "what": what,
                "right": float((of["answer"] == of["true"]).mean()),
                "median error": float(error.median()),
                "error of a constant answer": float(constant.median()),
                "most frequent answer": float(written["answer"].mode().iloc[0])
                if len(written)
                else float("nan"),
                "margin of the true count": str(mean_interval(of["margin"].to_numpy())),
            }
        )
    return pd.DataFrame(rows)


def features(measured: Measured) -> pd.DataFrame:
    """By source and layer: the last length at which a feature tells, and features that count."""
    last = last_telling(measured, "ones")
    if not len(last):
        return last
    table = last.rename(columns={"n": "last telling n, ones"})
    for family in ("words", "digits"):
        other = last_telling(measured, family).rename(columns={"n": f"last telling n, {family}"})
        table = table.merge(other, on=["source", "layer"], how="left")
    counted = counters_of(measured, FOLLOWS)
    if len(counted):
        counted = counted.rename(
            columns={
                "ones": "follow n in ones", "words": "and in words",
                "digits": "and position in digits", "all_words": "follow n in words",
            }
        )  # fmt: skip
        table = table.merge(counted, on=["source", "layer"], how="left")
    return table.fillna(0)


def separator(measured: Measured) -> pd.DataFrame:
    """The separator feature that was set."""
    table = measured.table("separator")
    return table.drop_duplicates() if len(table) else table


def remedies(measured: Measured) -> pd.DataFrame:
    """Every remedy's margin, what it adds to none's, its size in standard deviations (Hedges' g of
    the pairs of digits), and what it does to the distance of n and n + 1 ones."""
    rows = []
    for name, value in remedy_estimates(measured).items():
        found = remedy_margins(measured, name)
        lengths = measured.settings.clamp_lengths if name in CLAMPED else None
        own, none = (
            table.mean(axis=1).to_numpy()
            for table in (found, remedy_margins(measured, BASELINE, lengths))
        )
        other = _remedied_distances(measured, name)
        plain = distances(measured, "copying" if name == "commas" else "ones")
        ratio = as_ratio(mean_interval(log_ratios(other, plain))) if len(other) else None
        rows.append(
            {
                "remedy": name,
                "margin, nats": str(value),
                "more than without": str(paired_difference(own, none)),
                "Hedges' g": effect_size(own, none),
                "distance over plain": "-" if ratio is None else str(ratio),
            }
        )
    return pd.DataFrame(rows)


def _remedied_distances(measured: Measured, remedy: str) -> Frame:
    """Distances of n and n + 1 under a remedy; empty where it has none of its own."""
    if remedy == "commas":
        return distances(measured, "commas")
    if remedy.startswith("window"):
        return distances(measured, "ones", PLAIN | {"attention": remedy})
    return pd.DataFrame()


def shapes(measured: Measured) -> pd.DataFrame:
    """The shape of a sequence's tokens at a few layers."""
    table = measured.table("shapes")
    if not len(table):
        return table
    layers = sorted({0, measured.n_layers // 2, measured.n_layers})
    return table[table["layer"].isin(layers)].reset_index(drop=True)
