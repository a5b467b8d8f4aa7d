"""The figures of the simplicity-bias study."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go

from analyses.cells import Frame, select
from analyses.plots import Axis, Line, bars, grouped_bars, heat_maps, image_grid, lines, panels
from analyses.simplicity.boolean import BITS
from analyses.simplicity.measured import Measured
from analyses.simplicity.measures import grid
from analyses.simplicity.networks import ACTIVATIONS, Architecture, draw, outputs, square
from analyses.simplicity.numbers import MEASURES, agreement, cell_means, estimate, functions, spread
from analyses.simplicity.sequences import RANDOM
from analyses.statistics import Estimate

SHOWN_SIDE, SHOWN_DRAWS = 48, 4
"""Points a side of the functions in the figure, and functions of each activation."""
COMPLEXITY = Axis(
    title="Fourier complexity (cycles)", log=True, ticks=(1.0, 2.0, 4.0, 8.0, 16.0, 24.0)
)


def figures(measured: Measured) -> dict[str, go.Figure]:
    """Every figure of what was measured."""
    makers = {
        "functions": drawn_functions,
        "complexity_maps": maps,
        "spread_over_draws": spreads,
        "components": components,
        "width": lambda m: by_law(m, "width", "Channels of a layer"),
        "size_of_biases": lambda m: by_law(m, "bias_scale", "Size of the biases"),
        "agreement_of_measures": measures,
        "plain_fourier": plain,
        "boolean_functions": boolean,
        "boolean_ranks": ranks,
        "perceptron": perceptron,
        "modulo": modulo,
        "modulo_and_complexity": fit,
        "shortcut": shortcut,
        "sequences": written,
        "sequences_by_norm": by_norm,
        "headline_numbers": headline_numbers,
        "lines_between_texts": between_texts,
    }
    drawn = {name: make(measured) for name, make in makers.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


# ------------------------------------------------------------------------------------- functions


def drawn_functions(measured: Measured) -> go.Figure | None:
    """Functions of each activation: four draws, three layers, weights of scale 4."""
    if "maps" not in measured.config.parts:
        return None
    points, images = square(grid(SHOWN_SIDE)), {}
    for name in measured.config.activations:
        kind = Architecture(activation=name, depth=3, scale=4.0)
        values = outputs(kind, draw(kind, SHOWN_DRAWS, seed=measured.config.seed), points)
        values = values - values.mean(1, keepdim=True)
        images[name] = values.reshape(-1, SHOWN_SIDE, SHOWN_SIDE).float().numpy()
    title = "Random functions of two inputs, three layers, weight scale 4"
    return image_grid(images, title=title, columns=1)


def maps(measured: Measured) -> go.Figure | None:
    """Fourier complexity by depth and weight scale, a map an activation (figure 4 of the paper)."""
    if not len(functions(measured, "maps")):
        return None
    shown: dict[str, np.ndarray] = {}
    for name in measured.config.activations:
        table = cell_means(measured, name, "fourier")
        shown[name] = np.log2(table.to_numpy(dtype=float))
    high = max((float(value) for one in shown.values() for value in one[np.isfinite(one)].flat),
               default=1.0)  # fmt: skip
    return heat_maps(
        shown, title="Fourier complexity of random networks", x=Axis(title="Weight scale"),
        y=Axis(title="Hidden layers"), columns=[f"{s:g}" for s in measured.settings.scales],
        rows=[str(depth) for depth in measured.settings.depths], amount="log2 cycles",
        limits=(0.0, high), across=min(4, len(shown)),
    )  # fmt: skip


def spreads(measured: Measured) -> go.Figure | None:
    """Standard deviation over draws of log2 complexity, mean over depths and scales."""
    if not len(functions(measured, "maps")):
        return None
    found = {name: estimate(spread(measured, name)) for name in measured.config.activations}
    return bars(
        {name: one for name, one in found.items() if one is not None},
        title="How much complexity varies from draw to draw",
        x=Axis(title="Standard deviation of log2 complexity", from_zero=True),
    )  # fmt: skip


def _scale(measured: Measured) -> Axis:
    return _octaves("Weight scale", measured.settings.scales)


def _octaves(title: str, places: Sequence[float]) -> Axis:
    """A logarithmic axis with a tick at each place; at every other one where they are many."""
    return Axis(title=title, log=True, ticks=tuple(map(float, places[:: 1 + (len(places) > 6)])))


def _line(name: str, table: Frame, column: str, value: str, *, share: bool = False) -> Line | None:
    places = sorted(table[column].unique().tolist())
    found = {place: estimate(table[table[column] == place][value], share=share) for place in places}
    known = {place: one for place, one in found.items() if one is not None}
    return Line(name=name, x=list(known), y=list(known.values())) if known else None


def _lines(
    named: Mapping[str, Frame], column: str, value: str, *, share: bool = False
) -> list[Line]:
    made = [
        _line(name, table, column, value, share=share)
        for name, table in named.items()
        if len(table)
    ]
    return [line for line in made if line is not None]


def components(measured: Measured) -> go.Figure | None:
    """Complexity by weight scale with each component, a panel an activation."""
    depth = max(measured.settings.component_depths)
    shown = {}
    for name in measured.settings.component_activations:
        table = functions(measured, "components", activation=name, depth=depth)
        if len(table):
            named = {c: select(table, {"component": c}) for c in table["component"].unique()}
            shown[name] = _lines(named, "scale", "fourier")
    if not shown:
        return None
    return panels(
        shown, title=f"What components do, {depth} layers", x=_scale(measured), y=COMPLEXITY
    )


def by_law(measured: Measured, column: str, title: str) -> go.Figure | None:
    """Complexity by width or size of the biases."""
    table = functions(measured, "laws")
    if not len(table):
        return None
    plain: dict[str, object] = {
        "width": measured.config.width, "bias_scale": 1.0, "prior": "uniform"
    }  # fmt: skip
    del plain[column]
    rows = select(table, plain)
    named = {name: select(rows, {"activation": name}) for name in rows["activation"].unique()}
    return lines(
        _lines(named, column, "fourier"), title=f"Complexity by {title.lower()}",
        x=_octaves(title, sorted(rows[column].astype(float).unique().tolist())), y=COMPLEXITY,
    )  # fmt: skip


# -------------------------------------------------------------------------------------- measures


def measures(measured: Measured) -> go.Figure | None:
    """Rank correlations of the measures with one another."""
    names = [*MEASURES, "plain_fourier"]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    found = {}
    for a, b in pairs:
        one = agreement(measured, a, b)
        if one is not None:
            found[f"{_title(a)} and {_title(b)}"] = one
    if not found:
        return None
    return bars(
        found, title="Do measures rank kinds of networks alike?",
        x=Axis(title="Spearman correlation over activations, depths and scales"),
    )  # fmt: skip


def _title(measure: str) -> str:
    return MEASURES.get(measure, "plain Fourier")


def plain(measured: Measured) -> go.Figure | None:
    """What a plain Fourier transform makes of the same functions: the edges' step."""
    shown = {}
    for title, column in (("cosine transform", "fourier"), ("plain transform", "plain_fourier")):
        table = functions(measured, "maps", depth=3)
        if not len(table):
            table = functions(measured, "maps", depth=max(measured.settings.depths))
        named = {name: select(table, {"activation": name}) for name in ("relu", "tanh", "sine")}
        shown[title] = _lines(named, "scale", column) if len(table) else []
    if not all(shown.values()):
        return None
    return panels(
        shown, title="A plain transform sees the edges, not the function", x=_scale(measured),
        y=COMPLEXITY, columns=2,
    )  # fmt: skip


# --------------------------------------------------------------------------------------- Boolean


def _exact(value: float) -> Estimate:
    return Estimate(value=value, low=None, high=None, n=1)


def boolean(measured: Measured) -> go.Figure | None:
    """Probability of all functions of a complexity, of the likeliest of those that were seen twice,
    and the bound on it."""
    table = measured.table("boolean")
    if not len(table):
        return None
    twice = select(table.assign(known=table["seen_twice"] > 0), {"known": True})
    shown = [
        Line(name=name, x=rows["complexity"].tolist(), y=[_exact(float(p)) for p in rows[column]])
        for name, rows, column in (("all together", table, "probability"),
                                   ("the likeliest", twice, "highest"),
                                   ("the bound", twice, "bound"))
        if len(rows)
    ]  # fmt: skip
    return lines(
        shown, title="Boolean functions of 7 inputs, networks (7, 40, 40, 1)",
        x=Axis(title="LZ complexity of the truth table"),
        y=Axis(title="Probability", log=True, decades=True),
    )  # fmt: skip


def ranks(measured: Measured) -> go.Figure | None:
    """Probability by rank beside Zipf's law."""
    table = measured.table("ranks")
    if not len(table):
        return None
    places = table["rank"].tolist()
    shown = [
        Line(name=name, x=places, y=[_exact(float(value)) for value in table[column]])
        for name, column in (("drawn", "probability"), ("Zipf's law", "zipf"))
    ]
    return lines(
        shown, title="Boolean functions by rank", x=Axis(title="Rank", log=True, decades=True),
        y=Axis(title="Probability", log=True, decades=True),
    )  # fmt: skip


def perceptron(measured: Measured) -> go.Figure | None:
    """How many points perceptrons map to 1: every number alike without a bias."""
    table = measured.table("perceptrons")
    if not len(table):
        return None
    shown = []
    for bias, rows in table.groupby("bias"):
        share = rows["count"] / rows["count"].sum()
        shown.append(
            Line(name=f"bias x {bias:g}" if bias else "no bias", x=rows["ones"].tolist(),
                 y=[_exact(float(value)) for value in share])
        )  # fmt: skip
    return lines(
        shown, title="Perceptrons of 7 inputs: points mapped to 1",
        x=Axis(title=f"Points of {BITS} mapped to 1"),
        y=Axis(title="Probability", log=True, ticks=(0.003, 0.01, 0.03, 0.1)),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- tasks


def modulo(measured: Measured) -> go.Figure | None:
    """Test accuracy by prefactor, a panel a modulus."""
    table = measured.table("modulo")
    if not len(table):
        return None
    shown = {}
    for modulus in measured.settings.moduli:
        rows = select(table, {"modulus": modulus})
        named = {name: select(rows, {"activation": name}) for name in rows["activation"].unique()}
        shown[f"M = {modulus}"] = _lines(named, "prefactor", "test", share=True)
    return panels(
        shown, title="Modulo addition: accuracy on what was not trained on",
        x=_octaves("Prefactor", measured.settings.prefactors),
        y=Axis(title="Balanced test accuracy", percent=True),
    )  # fmt: skip


def fit(measured: Measured) -> go.Figure | None:
    """Test accuracy by the complexity before training, a panel a modulus."""
    table = measured.table("modulo")
    if not len(table):
        return None
    means = table.groupby(["modulus", "activation", "prefactor"], as_index=False)[
        ["initial", "test", "target"]
    ].mean()
    shown: dict[str, Sequence[Line]] = {}
    for modulus in measured.settings.moduli:
        rows = select(means, {"modulus": modulus})
        target = float(rows["target"].iloc[0])
        named = []
        for name in table["activation"].unique():
            ordered = select(rows, {"activation": name}).sort_values("initial")
            named.append(
                Line(name=name, x=ordered["initial"].tolist(),
                     y=[_exact(float(value)) for value in ordered["test"]])
            )  # fmt: skip
        shown[f"M = {modulus}, task {target:.1f}"] = named
    return panels(
        shown, title="What generalises, by complexity before training",
        x=replace(COMPLEXITY, title="Complexity before training (cycles)"),
        y=Axis(title="Balanced test accuracy", percent=True),
    )  # fmt: skip


def shortcut(measured: Measured) -> go.Figure | None:
    """What predictions go by, the digit or the colour, by prefactor."""
    table = measured.table("shortcut")
    if not len(table):
        return None
    shown = {}
    for title, column in (("colour", "colour"), ("digit", "digit")):
        named = {name: select(table, {"activation": name}) for name in table["activation"].unique()}
        shown[f"the {title}"] = _lines(named, "prefactor", column, share=True)
    return panels(
        shown, title="A digit beside a colour: which of the two is learnt",
        x=_octaves("Prefactor", measured.settings.prefactors),
        y=Axis(title="Share of the predictions' variance", percent=True), columns=2,
    )  # fmt: skip


# -------------------------------------------------------------------------------------- sequences


def written(measured: Measured) -> go.Figure | None:
    """Complexity of untrained transformers' sequences by activation and depth."""
    table = measured.table("sequences")
    if not len(table):
        return None
    plain_norms = select(table, {"norm_scale": 1.0})
    found: dict[str, dict[str, Estimate]] = {}
    for depth in measured.settings.transformer_depths:
        rows = select(plain_norms, {"depth": depth})
        means = {name: estimate(select(rows, {"activation": name})["lz"]) for name in ACTIVATIONS}
        found[f"{depth} blocks"] = {name: one for name, one in means.items() if one is not None}
    top = estimate(select(table, {"model": RANDOM})["lz"])
    title = "What untrained transformers write"
    if top is not None:
        title += f" (random tokens: {top.value:.0f} phrases)"
    return grouped_bars(found, title=title, y=Axis(title="Phrases of LZ-78 in 100 tokens"))


def by_norm(measured: Measured) -> go.Figure | None:
    """The same by the gains of the norms."""
    table = measured.table("sequences")
    if not len(table):
        return None
    rows = select(table, {"depth": measured.settings.transformer_depths[-1]})
    named = {name: select(rows, {"activation": name}) for name in rows["activation"].unique()}
    several = {name: some for name, some in named.items() if some["norm_scale"].nunique() > 1}
    if not several:
        return None
    return lines(
        _lines(several, "norm_scale", "lz"), title="Sequences by the gains of the norms",
        x=_octaves("Gains multiplied with", measured.settings.norm_scales),
        y=Axis(title="Phrases of LZ-78 in 100 tokens"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ twins


def headline_numbers(measured: Measured) -> go.Figure | None:
    """How well each number of a feature tells the trained model's from the twin's."""
    rows = measured.table("headlines").to_dict("records")
    if not rows:
        return None
    found = {
        row["number"].replace("_", " "): Estimate(
            value=row["auroc"], low=row["low"], high=row["high"], n=row["n"]
        )
        for row in rows
    }
    return bars(
        found, title="Which numbers of features tell a trained model from a random one",
        x=Axis(title="AUROC, trained against twin; .5 tells nothing"),
    )  # fmt: skip


def between_texts(measured: Measured) -> go.Figure | None:
    """Complexity of features along lines between texts."""
    table = measured.table("lines")
    if not len(table):
        return None
    found: dict[str, dict[str, Estimate]] = {}
    for weights in ("trained", "twin"):
        rows = select(table, {"weights": weights})
        means = {read: estimate(select(rows, {"read": read})["variation"])
                 for read in ("feature", "encoder", "random")}  # fmt: skip
        found[weights] = {read: one for read, one in means.items() if one is not None}
    return grouped_bars(
        found, title="Features as functions along lines between texts",
        y=Axis(title="Total variation (standard deviations)"),
    )  # fmt: skip
