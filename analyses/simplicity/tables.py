"""The tables of the simplicity-bias study's report."""

import pandas as pd

from analyses.cells import Frame, select
from analyses.simplicity.measured import Measured
from analyses.simplicity.networks import PRIORS
from analyses.simplicity.numbers import MEASURES, estimate, functions, law_ratio
from analyses.statistics import Estimate


def tables(measured: Measured) -> dict[str, pd.DataFrame]:
    """Every table of what was measured."""
    made = {
        "complexity": complexity(measured),
        "components": components(measured),
        "priors": priors(measured),
        "boolean_functions": boolean(measured),
        "likeliest_functions": likeliest(measured),
        "slopes_by_decade_of_ranks": measured.table("rank_slopes"),
        "perceptrons": measured.table("signs"),
        "modulo": modulo(measured),
        "shortcut": shortcut(measured),
        "sequences": sequences(measured),
        "scores_of_saes": scores(measured),
        "scores_that_cannot_be_compared": measured.table("score_notes"),
        "headline_numbers": headlines(measured),
        "lines_between_texts": lines(measured),
    }
    return {name: table for name, table in made.items() if len(table)}


def _shown(value: Estimate | None) -> str:
    return "-" if value is None else str(value)


def _wide(
    rows: Frame, row: str, column: str, value: str, named: str, *, share: bool = False
) -> pd.DataFrame:
    """Means with intervals: a row a value of `row`, a column a value of `column`."""
    found: dict[str, dict[str, str]] = {}
    for (a, b), some in rows.groupby([row, column], sort=False):
        name = f"{b:g}" if isinstance(b, (int, float)) else str(b)
        found.setdefault(str(a), {})[name] = _shown(estimate(some[value], share=share))
    return pd.DataFrame([{named: name} | cells for name, cells in found.items()])


def complexity(measured: Measured) -> pd.DataFrame:
    """Fourier complexity by activation, depth and weight scale."""
    table = functions(measured, "maps")
    if not len(table):
        return table
    kinds = table.assign(kind=table["activation"] + ", " + table["depth"].astype(str))
    return _wide(kinds, "kind", "scale", "fourier", "activation, layers")


def components(measured: Measured) -> pd.DataFrame:
    """The same with components, at the largest of their depths."""
    table = functions(measured, "components", depth=max(measured.settings.component_depths))
    if not len(table):
        return table
    kinds = table.assign(kind=table["activation"] + ", " + table["component"])
    return _wide(kinds, "kind", "scale", "fourier", "network")


def priors(measured: Measured) -> pd.DataFrame:
    """Other laws of the weights beside the uniform one."""
    names = functions(measured, "laws")
    if not len(names):
        return names
    rows = []
    for activation in names["activation"].unique():
        ratios = {p: law_ratio(measured, activation, "prior", p, "uniform") for p in PRIORS[1:]}
        rows.append({"activation": activation} | {p: _shown(one) for p, one in ratios.items()})
    return pd.DataFrame(rows)


def boolean(measured: Measured) -> pd.DataFrame:
    """Truth tables by complexity."""
    table = measured.table("boolean")
    return table.drop(columns="lowest") if len(table) else table


def likeliest(measured: Measured) -> pd.DataFrame:
    """The likeliest truth tables by rank."""
    table = measured.table("ranks")
    return table[table["rank"] <= 20] if len(table) else table


def modulo(measured: Measured) -> pd.DataFrame:
    """Test accuracy by modulus, activation and prefactor."""
    table = measured.table("modulo")
    if not len(table):
        return table
    kinds = table.assign(kind="M = " + table["modulus"].astype(str) + ", " + table["activation"])
    return _wide(kinds, "kind", "prefactor", "test", "task, activation", share=True)


def shortcut(measured: Measured) -> pd.DataFrame:
    """What predictions go by, by activation and prefactor."""
    table = measured.table("shortcut")
    if not len(table):
        return table
    both = [
        _wide(table.assign(kind=table["activation"] + f": {cue}"), "kind", "prefactor", cue,
              "activation: cue", share=True)
        for cue in ("colour", "digit")
    ]  # fmt: skip
    return pd.concat(both, ignore_index=True)


def sequences(measured: Measured) -> pd.DataFrame:
    """Sequences by kind of transformer."""
    table = measured.table("sequences")
    if not len(table):
        return table
    rows = []
    for _, some in table.groupby(["model", "activation", "depth", "norm_scale"], dropna=False):
        first = some.iloc[0]
        plain = isinstance(first["model"], str)
        rows.append(
            {"model": first["model"] if plain else "small GPT-2",
             "activation": "as it is" if plain else first["activation"],
             "blocks": "-" if plain else f"{first['depth']:g}",
             "gains x": "-" if plain else f"{first['norm_scale']:g}", "sequences": len(some),
             "phrases": _shown(estimate(some["lz"]))}
        )  # fmt: skip
    return pd.DataFrame(rows)


def scores(measured: Measured) -> pd.DataFrame:
    """The benchmark's scores of both SAEs."""
    rows = measured.table("scores").to_dict("records")
    return pd.DataFrame(
        [
            {"score": row["score"], "trained": row["trained"], "twin": row["twin"],
             "difference": _shown(Estimate(value=row["difference"], low=row["low"],
                                           high=row["high"], n=row["n"]))}
            for row in rows
        ]
    )  # fmt: skip


def headlines(measured: Measured) -> pd.DataFrame:
    """How well each number of a feature tells the two apart."""
    rows = measured.table("headlines").to_dict("records")
    return pd.DataFrame(
        [
            {"number": row["number"].replace("_", " "), "median, trained": row["trained"],
             "median, twin": row["twin"],
             "AUROC": _shown(Estimate(value=row["auroc"], low=row["low"], high=row["high"],
                                      n=row["n"]))}
            for row in rows
        ]
    )  # fmt: skip


def lines(measured: Measured) -> pd.DataFrame:
    """Complexity along lines between texts."""
    table = measured.table("lines")
    if not len(table):
        return table
    rows = []
    for weights in ("trained", "twin"):
        for read in ("feature", "encoder", "random"):
            some = select(table, {"weights": weights, "read": read})
            rows.append(
                {"weights": weights, "read": read, "lines": len(some),
                 "varying there": f"{some['n'].mean():.0f}"}
                | {MEASURES[name]: _shown(estimate(some[name])) for name in ("variation",
                                                                              "fourier")}
            )  # fmt: skip
    return pd.DataFrame(rows)
