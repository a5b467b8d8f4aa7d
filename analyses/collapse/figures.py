"""The figures of the collapse study."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from analyses.cells import Frame, select
from analyses.collapse.features import MLP
from analyses.collapse.measured import Measured
from analyses.collapse.numbers import (
    PLAIN,
    distances,
    geometric,
    in_formats,
    last_telling,
    layer_distances,
    margins_of,
    rank_correlations,
    remedy_margins,
    sensitivity,
)
from analyses.collapse.parts import BETAS, PHASE, TEXT
from analyses.collapse.remedies import BASELINE
from analyses.plots import Axis, Line, bars, heat_maps, lines, panels
from analyses.statistics import Estimate, mean_interval
from probe.attention import AS_IT_IS, Visible

REPETITIONS = Axis(title="Repetitions n", log=True, decades=True)
DISTANCE = Axis(title="Relative distance, n to n + 1", log=True, decades=True)
COPIED = (5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 400.0)
SMALLEST = 1e-8
"""Below this a distance is drawn here: it is 0 in float32."""
PLACES = 60
"""Groups of neighbouring tokens in a map over positions."""


def figures(measured: Measured) -> dict[str, go.Figure]:
    """Every figure of what was measured."""
    makers = {
        "distance_by_family": by_family,
        "distance_under_controls": controls,
        "distance_at_the_same_phase": phases,
        "distance_by_layer": by_layer,
        "distance_by_head": by_head,
        "synthetic": synthetic,
        "number_formats": formats,
        "sensitivity_by_token": sensitivity_by_token,
        "sensitivity_by_depth": sensitivity_by_depth,
        "path_sums_and_gradients": agreement,
        "paths_by_head": heads,
        "copying": copying,
        "counting": counting,
        "telling_features": telling,
        "last_telling_length": last_lengths,
        "shapes": shapes,
        "remedies": remedies,
    }
    drawn = {name: make(measured) for name, make in makers.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


# --------------------------------------------------------------------------------- distances


def distance_line(name: str, by_length: Frame) -> Line:
    """Distances by length, geometric means over units with their intervals."""
    lengths = [int(n) for n in by_length.columns]
    values = [geometric(np.maximum(by_length[n].to_numpy(), SMALLEST)) for n in lengths]
    return Line(name=name, x=lengths, y=[_above(value) for value in values])


def _above(estimate: Estimate) -> Estimate:
    """An estimate with what is below the drawn range moved to its edge."""
    low = None if estimate.low is None else max(estimate.low, SMALLEST)
    return Estimate(value=estimate.value, low=low, high=estimate.high, n=estimate.n)


def _distance_lines(
    measured: Measured, wanted: Mapping[str, tuple[str, Mapping[str, object]]]
) -> list[Line]:
    tables = {name: distances(measured, family, PLAIN | dict(condition))
              for name, (family, condition) in wanted.items()}  # fmt: skip
    return [distance_line(name, table) for name, table in tables.items() if len(table)]


def by_family(measured: Measured) -> go.Figure | None:
    """The paper's figure 5 by family."""
    shown = _distance_lines(measured, {name: (name, {}) for name in measured.config.families})
    if not shown:
        return None
    return lines(shown, title="Last token's final output at n and n + 1", x=REPETITIONS, y=DISTANCE)


def controls(measured: Measured) -> go.Figure | None:
    """Ones under every control."""
    conditions: dict[str, Mapping[str, object]] = {
        "as it is": {},
        "random weights": {"weights": "twin"},
        "question shuffled": {"form": "shuffled"},
        "chat template": {"form": "chat"},
        "first token hidden": {"attention": "first token hidden"},
    }
    for window in measured.settings.windows[:1]:
        conditions |= {
            f"window {window}": {"attention": f"window {window}"},
            f"window {window}, first kept": {"attention": f"window {window}, first token kept"},
        }
    shown = _distance_lines(measured, {name: ("ones", c) for name, c in conditions.items()})
    if len(shown) < 2:
        return None
    return lines(shown, title="Ones, under controls", x=REPETITIONS, y=DISTANCE)


def phases(measured: Measured) -> go.Figure | None:
    """Commas at n + 1 and at the same phase of a group."""
    shown = _distance_lines(
        measured,
        {
            "commas, n + 1": ("commas", {}),
            f"commas, n + {PHASE}": ("commas", {"more": PHASE}),
            f"ones, n + {PHASE}": ("ones", {"more": PHASE}),
            "copying, n + 1": ("copying", {}),
        },
    )
    if len(shown) < 2:
        return None
    return lines(
        shown, title="Commas: the next number, and the next of the same phase", x=REPETITIONS,
        y=Axis(title="Relative distance", log=True, decades=True),
    )  # fmt: skip


def by_layer(measured: Measured) -> go.Figure | None:
    """Distances by layer and length."""
    tables = {name: layer_distances(measured, name) for name in ("ones", "digits", "commas")}
    tables = {name: table for name, table in tables.items() if len(table)}
    if not tables:
        return None
    return length_maps(
        tables, title="Distance by layer (the last row is the final norm)",
        amount="log10 distance", limits=(-3.0, 0.0),
    )  # fmt: skip


def length_maps(
    tables: Mapping[str, Frame], *, title: str, amount: str, limits: tuple[float, float]
) -> go.Figure:
    """Maps of tables with a row a layer and a column a number of repetitions."""
    lengths = next(iter(tables.values())).columns.to_numpy(dtype=float)
    figure = heat_maps(
        {name: table.to_numpy() for name, table in tables.items()}, title=title,
        x=Axis(title="Repetitions n"), y=Axis(title="Layer"), columns=list(np.log10(lengths)),
        amount=amount, limits=limits,
    )  # fmt: skip
    ticks = [n for n in (1, 10, 100, 1000) if n <= lengths.max()]
    figure.update_xaxes(tickvals=list(np.log10(ticks)), ticktext=[f"{n:,}" for n in ticks])
    return figure


def by_head(measured: Measured) -> go.Figure | None:
    """The paper's own measure: each head's largest difference, at the last layer."""
    table = measured.table("curves")
    shown = []
    for name in measured.config.families:
        rows = select(table, PLAIN | {"family": name, "layer": measured.n_layers - 1})
        if len(rows):
            by_length = rows.pivot(index="unit", columns="n", values="head_mean")
            shown.append(distance_line(name, by_length))
    if not shown:
        return None
    return lines(
        shown, title="Largest difference of a head's output at the last layer, mean of the heads",
        x=REPETITIONS, y=Axis(title="L-infinity distance", log=True, decades=True),
        levels={"2^-7": 2.0**-7},
    )  # fmt: skip


def synthetic(measured: Measured) -> go.Figure | None:
    """The paper's figures 8, 9 and 10."""
    if not measured.synthetic:
        return None
    names = {"decoder block": "Figure 8: a block", "noise on 200 entries": "Figure 9: softmaxes"}
    shown: dict[str, list[Line]] = {}
    for one in measured.synthetic:
        values = [geometric(column.numpy()) for column in one.values.T]
        line = Line(name=one.name, x=one.lengths, y=values)
        shown.setdefault(names.get(one.name, "Figure 10: one layer"), []).append(line)
    return panels(
        shown, title="Synthetic: L1 distance by number of tokens",
        x=Axis(title="Tokens n", log=True, decades=True), y=Axis(title="L1 distance", log=True),
    )  # fmt: skip


def formats(measured: Measured) -> go.Figure | None:
    """Distances and rounding floors by format."""
    shown: dict[str, list[Line]] = {}
    for family in ("ones", "digits", "commas"):
        rows = in_formats(measured, family)
        if not len(rows):
            continue
        exact = select(rows, {"format": "float64"})
        drawn = [
            distance_line("n to n + 1, exact", exact.pivot(index="unit", columns="n",
                                                           values="distance"))
        ]  # fmt: skip
        for format in measured.settings.formats:
            if format not in ("float64", "float32"):
                table = select(rows, {"format": format})
                by_length = table.pivot(index="unit", columns="n", values="floor")
                drawn.append(distance_line(f"{format}'s error", by_length))
        shown[family] = drawn
    if not shown:
        return None
    return panels(
        shown, title="What a format's own error hides", x=REPETITIONS,
        y=Axis(title="Relative distance", log=True, decades=True),
    )  # fmt: skip


# -------------------------------------------------------------------------------------- paths


def sensitivity_by_token(measured: Measured) -> go.Figure | None:
    """Gradients and path sums along a sequence."""
    shown: dict[str, list[Line]] = {}
    columns = {
        "gradient": "gradient", "attention held constant": "frozen",
        "path sums, beta 10": "beta 10", "path sums, beta 1": "beta 1",
    }  # fmt: skip
    windows = [Visible(window=window).name for window in measured.settings.windows]
    wanted = {of: (of, AS_IT_IS.name) for of in ("ones", "digits", TEXT)}
    wanted |= {f"ones, {window}": ("ones", window) for window in windows}
    for title, (of, attention) in wanted.items():
        rows = sensitivity(measured, of, attention=attention)
        if len(rows):
            shown[title] = [_along(rows, name, column) for name, column in columns.items()]
    if not shown:
        return None
    return panels(
        shown, title="How sensitive the last output is to each token (over the mean token)",
        x=Axis(title="Token of the sequence"),
        y=Axis(title="Share of the mean", log=True, decades=True),
    )  # fmt: skip


def _along(rows: Frame, name: str, column: str) -> Line:
    """A column over its mean by groups of neighbouring tokens, geometric means over prompts."""
    by_position = rows.pivot(index="unit", columns="position", values=column).dropna(axis=1)
    values = by_position.to_numpy() / by_position.to_numpy().mean(1, keepdims=True)
    groups = np.array_split(np.arange(values.shape[1]), min(PLACES // 3, values.shape[1]))
    means = [10 ** np.log10(np.maximum(values[:, group], SMALLEST)).mean(1) for group in groups]
    places = [float(by_position.columns.to_numpy()[group].mean()) for group in groups]
    return Line(name=name, x=places, y=[_above(geometric(mean)) for mean in means])


def sensitivity_by_depth(measured: Measured) -> go.Figure | None:
    """Gradients beside path sums, over position and depth, of the first prompt."""
    depths = select(
        measured.table("depths"), {"family": "ones", "weights": "trained", "attention": "all"}
    )
    if not len(depths):
        return None
    shown = {
        "gradient": depth_map(depths, "gradient"),
        "attention fixed": depth_map(depths, "frozen"),
        "paths, beta 10": depth_map(depths, "path"),
        "paths, beta 1": depth_map(depths, "published path"),
    }
    positions = np.sort(depths["position"].unique())
    places = [float(group.mean()) for group in np.array_split(positions, PLACES)]
    return heat_maps(
        shown, title="Ones: sensitivity by token and depth (log10, each row's largest is 0)",
        x=Axis(title="Token"), y=Axis(title="Depth"), columns=places,
        amount="log10 share", limits=(-3.0, 0.0),
    )  # fmt: skip


def depth_map(depths: Frame, column: str) -> np.ndarray:
    """log10 of a column by depth and groups of positions, each row against its largest."""
    table = depths.pivot(index="depth", columns="position", values=column).to_numpy()
    groups = np.array_split(np.arange(table.shape[1]), min(PLACES, table.shape[1]))
    grouped = np.stack([table[:, group].mean(1) for group in groups], axis=1)
    share = grouped / grouped.max(1, keepdims=True)
    return np.log10(np.maximum(share, SMALLEST))


def heads(measured: Measured) -> go.Figure | None:
    """Of what passes each head on its way to the last token, how much is the first token's."""
    rows = select(
        measured.table("heads"), {"family": "ones", "weights": "trained", "attention": "all"}
    )
    if not len(rows):
        return None
    share = rows.assign(share=rows["from first"] / rows["passing"])
    by = share.pivot(index="layer", columns="head", values="share")
    return heat_maps(
        {"": by.to_numpy()},
        title="Ones: of what passes a head to the last token, the first token's share",
        x=Axis(title="Head"), y=Axis(title="Layer"), columns=list(by.columns), amount="share",
        limits=(0.0, 1.0),
    )  # fmt: skip


def agreement(measured: Measured) -> go.Figure | None:
    """Rank correlation of path sums and gradients, by divisor."""
    shown = []
    for of in ("ones", "digits", TEXT):
        rows = sensitivity(measured, of)
        if len(rows):
            values = [mean_interval(rank_correlations(rows, f"beta {b:g}", "gradient"))
                      for b in BETAS]  # fmt: skip
            shown.append(Line(name=of, x=list(BETAS), y=values))
    if not shown:
        return None
    return lines(
        shown, title="Do path sums rank the tokens as the gradient does?",
        x=Axis(title="Divisor beta of the attention", log=True, ticks=BETAS),
        y=Axis(title="Rank correlation"), levels={"none": 0.0},
    )  # fmt: skip


# ---------------------------------------------------------------------------------- behaviour


def copying(measured: Measured) -> go.Figure | None:
    """Margins by length."""
    wanted = {
        "first": {"end": "first"},
        "first, hint": {"end": "first", "hint": True},
        "last": {"end": "last"},
        "last, hint": {"end": "last", "hint": True},
        "last of alternating": {"end": "alternating"},
    }
    shown = []
    for name, asked in wanted.items():
        table = margins_of(measured, asked)
        if len(table):
            lengths = [int(n) for n in table.columns]
            values = [mean_interval(table[n].to_numpy()) for n in lengths]
            shown.append(Line(name=name, x=lengths, y=values))
    if not shown:
        return None
    return lines(
        shown, title="Does the other digit reach the answer?",
        x=Axis(title="Digits of the sequence", log=True, ticks=COPIED),
        y=Axis(title="Margin (nats)"),
        levels={"not at all": 0.0},
    )  # fmt: skip


def counting(measured: Measured) -> go.Figure | None:
    """How far the written number is from the truth."""
    table = measured.table("counting").dropna()
    if not len(table):
        return None
    shown: dict[str, list[Line]] = {}
    for what, rows in table.groupby("what", sort=False):
        ordered = rows.sort_values("true").drop_duplicates("true")
        true = [int(n) for n in ordered["true"]]
        written = [Estimate(value=float(a), low=None, high=None, n=1) for a in ordered["answer"]]
        right = [Estimate(value=float(n), low=None, high=None, n=1) for n in true]
        shown[str(what)] = [
            Line(name="written", x=true, y=written), Line(name="right", x=true, y=right)
        ]  # fmt: skip
    return panels(
        shown, title="The number that is written", x=Axis(title="True count"),
        y=Axis(title="Number", log=True, decades=True), columns=2,
    )  # fmt: skip


# ----------------------------------------------------------------------------------- features


def telling(measured: Measured) -> go.Figure | None:
    """MLP units that tell, by layer and length."""
    table = select(measured.table("telling"), {"source": MLP})
    wanted = {
        "ones": ("ones", "trained"), "digits": ("digits", "trained"),
        "ones, random weights": ("ones", "twin"),
    }  # fmt: skip
    shown: dict[str, Frame] = {}
    for name, (family, weights) in wanted.items():
        rows = select(table, {"family": family, "weights": weights})
        if len(rows):
            share = rows.assign(share=rows["tell"] / rows["active"].clip(lower=1))
            shown[name] = share.pivot_table(index="layer", columns="n", values="share")
    if not shown:
        return None
    return length_maps(
        shown, title="Share of the active MLP units that tell n from n + 1 (by 10 %)",
        amount="share", limits=(0.0, 1.0),
    )  # fmt: skip


def last_lengths(measured: Measured) -> go.Figure | None:
    """SAE features that tell, by length, a line a layer."""
    table = measured.table("telling")
    if not len(table):
        return None
    shown = []
    rows = select(table, {"family": "ones", "weights": "trained"})
    for layer, of in rows[rows["source"] != MLP].groupby("layer"):
        by = of.pivot(index="unit", columns="n", values="tell")
        lengths = [int(n) for n in by.columns]
        values = [mean_interval(by[n].to_numpy(dtype=float)) for n in lengths]
        shown.append(Line(name=f"layer {layer}", x=lengths, y=values))
    if not shown:
        return _last_of_units(measured)
    return lines(
        shown, title="SAE features that tell n from n + 1 ones (by 10 %)", x=REPETITIONS,
        y=Axis(title="Features", from_zero=True),
    )  # fmt: skip


def _last_of_units(measured: Measured) -> go.Figure:
    """Without SAEs: the largest length at which any MLP unit tells, by layer."""
    shown = []
    for family in ("ones", "digits"):
        rows = select(last_telling(measured, family), {"source": MLP})
        if len(rows):
            values = [Estimate(value=float(n), low=None, high=None, n=1) for n in rows["n"]]
            shown.append(Line(name=family, x=[int(i) for i in rows["layer"]], y=values))
    return lines(
        shown, title="Largest n at which an MLP unit tells n from n + 1", x=Axis(title="Layer"),
        y=Axis(title="Repetitions n", from_zero=True),
    )  # fmt: skip


def shapes(measured: Measured) -> go.Figure | None:
    """Effective rank of a sequence's tokens by layer."""
    table = measured.table("shapes")
    if not len(table):
        return None
    shown: dict[str, list[Line]] = {}
    for weights, words in (("trained", "trained"), ("twin", "random weights")):
        for of, rows in select(table, {"weights": weights}).groupby("of", sort=False):
            ranks = [
                Estimate(value=float(v), low=None, high=None, n=1) for v in rows["effective rank"]
            ]
            line = Line(name=str(of), x=[int(i) for i in rows["layer"]], y=ranks)
            shown.setdefault(words, []).append(line)
    return panels(
        shown, title="Effective rank of the tokens of a sequence, by layer",
        x=Axis(title="Layer (the last is the final norm)"),
        y=Axis(title="Effective rank", log=True, decades=True), columns=2,
    )  # fmt: skip


# ----------------------------------------------------------------------------------- remedies


def remedies(measured: Measured) -> go.Figure | None:
    """Every remedy's margin."""
    found = remedy_estimates(measured)
    if not found:
        return None
    return bars(found, title="Margin of the last digit", x=Axis(title="Margin (nats)"))


def remedy_estimates(measured: Measured) -> dict[str, Estimate]:
    """Mean margin by remedy, over pairs of digits."""
    table = measured.table("remedies")
    names: Sequence[str] = [] if not len(table) else list(dict.fromkeys(table["remedy"]))
    order = sorted(names, key=lambda name: name != BASELINE)
    return {
        name: mean_interval(remedy_margins(measured, name).mean(axis=1).to_numpy())
        for name in order
    }
