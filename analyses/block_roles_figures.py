"""The block-roles study's figures: heat maps of blocks and factors, curves, and real images."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses import plots
from analyses.block_roles_locality import KINDS
from analyses.block_roles_measured import ALL_BLOCKS, Frame, Measured
from analyses.block_roles_numbers import (
    accuracy,
    changed_unasked,
    from_draws,
    locality_by_feature,
    mean_of,
    moved_share,
    others_changed,
    patches,
    pushed_by_value,
    select,
    share_of,
    value_mean,
)
from analyses.block_roles_probes import PAIR
from analyses.block_roles_sweep import in_steps
from analyses.block_roles_tables import value_states
from analyses.plots import Axis, Line, Point
from probe.pictures import decode
from probe.toyturbo.world import FACTORS

WORTH_NAMING = 0.1
"""Share moved from which a point of transport with the least or most units has a name beside it."""
SHADES = [[0.0, plots.PAPER], [0.5, "#d9a9be"], [1.0, plots.PLUM]]
"""From nothing to all."""
DARK = 0.6
"""Share from which a cell's number is written in white."""
SCALE = 2
"""Pixels of a figure for each of an image's."""
STRIP_GAP = 4


def figures(measured: Measured) -> dict[str, go.Figure]:
    """Every figure by name; those of nothing measured are left out."""
    makers: dict[str, tuple[str, Callable[[Measured], go.Figure]]] = {}
    if measured.known:
        makers = {
            "prediction_by_block": ("answers", prediction_figure),
            "patching_by_block": ("causes", patching_figure),
            "patched_images": ("patched", patched_figure),
            "ablation_by_block": ("causes", ablation_figure),
            "best_feature_of_every_value": ("values", values_figure),
            "doses_of_features": ("pushed", doses_figure),
            "pushes_by_dose": ("pushes", pushes_figure),
        }
    makers |= {
        "locality_by_block": ("locality", locality_figure),
        "top_images_by_block": ("scores", scores_figure),
        "k_and_width": ("widths", widths_figure),
        "variance_explained_by_step": ("steps", steps_figure),
        "transport": ("transports", transport_figure),
    }
    return {
        name: make(measured) for name, (table, make) in makers.items() if shown(measured, table)
    }


def shown(measured: Measured, table: str) -> bool:
    """Whether a table has anything to show: of pairs, any that counts."""
    rows = measured.table(table)
    return len(rows) > 0 and (
        table == "causes" or "counts" not in rows or bool(rows["counts"].any())
    )


# ------------------------------------------------------------------------------------- heat maps


def heat_maps(
    shown: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str], title: str
) -> go.Figure:
    """Shares from 0 to 1 as panels of cells side by side, each cell with its number in per cent.

    Args:
        shown: a panel's name -> its shares, rows by columns; nan is left blank.
        rows: names of the rows, the first at the top.
        columns: names of the columns.
        title: of the figure.
    """
    figure = make_subplots(
        rows=1, cols=len(shown), subplot_titles=list(shown), shared_yaxes=True,
        horizontal_spacing=0.03,
    )  # fmt: skip
    for place, values in enumerate(shown.values(), start=1):
        numbers = [["" if np.isnan(v) else f"{100 * v:.0f}" for v in row] for row in values]
        figure.add_heatmap(
            z=values, x=list(columns), y=list(rows), text=numbers, texttemplate="%{text}",
            zmin=0, zmax=1, colorscale=SHADES, showscale=False, xgap=2, ygap=2,
            hovertemplate="%{x}, %{y}: %{text} %<extra></extra>", row=1, col=place,
        )  # fmt: skip
    figure.update_layout(
        template=plots.TEMPLATE, title_text=title, width=plots.WIDTH, height=plots.HEIGHT,
        margin={"t": 90, "b": 80},
    )  # fmt: skip
    figure.update_xaxes(showgrid=False, ticks="", tickangle=-60, tickfont_size=12)
    figure.update_annotations(font_size=13)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", ticksuffix="  ")
    return figure


def _grid(
    rows: Sequence[str], columns: Sequence[str], value: Callable[[str, str], float]
) -> np.ndarray:
    return np.array([[value(row, column) for column in columns] for row in rows], dtype=float)


def prediction_figure(measured: Measured) -> go.Figure:
    """How well each block's features tell each factor."""
    m, factors = measured, list(FACTORS)

    def panel(value: Callable[[str, str], float]) -> np.ndarray:
        return _grid(factors, m.blocks, lambda f, b: value(b, f))

    shown = {
        "linear probe on codes": panel(lambda b, f: accuracy(m, b, f, "codes").value),
        "on the update": panel(lambda b, f: accuracy(m, b, f, "update").value),
        "best features, F1": panel(lambda b, f: value_mean(m, b, f, "f1").value),
        "shuffled labels": panel(lambda b, f: accuracy(m, b, f, "shuffled").value),
    }
    if m.twins:
        shown["twin's codes"] = panel(lambda b, f: accuracy(m, b, f, "codes", "twin").value)
    return heat_maps(shown, factors, m.blocks, "What each block's features predict (%)")


def patching_figure(measured: Measured) -> go.Figure:
    """What swapping each block's update moves, and what else it changes."""
    m, factors = measured, list(FACTORS)
    blocks = [*m.blocks, ALL_BLOCKS]

    def panel(value: Callable[[str, str], float]) -> np.ndarray:
        return _grid(factors, blocks, lambda f, b: value(b, f))

    shown = {
        "became the source's": panel(lambda b, f: moved_share(m, b, f).value),
        "something else changed": panel(lambda b, f: others_changed(patches(m, b, f), f).value),
        "changed by other noise": panel(lambda b, f: changed_unasked(m, b, f, "noise").value),
    }
    if m.twins:
        shown["twin: became the source's"] = panel(lambda b, f: moved_share(m, b, f, "twin").value)
    return heat_maps(shown, factors, blocks, "What a swapped update moves (% of pairs)")


def ablation_figure(measured: Measured) -> go.Figure:
    """Which factors are no longer as they were without a block's update."""
    m, factors = measured, list(FACTORS)
    shown = {
        f"update {words}": _grid(
            factors, m.blocks, lambda f, b, w=what: changed_unasked(m, b, f, w).value
        )
        for what, words in (("zero", "0"), ("mean", "its mean over images"))
    }
    return heat_maps(
        shown, factors, m.blocks, "What changes without a block's update (% of images)"
    )


def values_figure(measured: Measured) -> go.Figure:
    """F1 of the best feature of every value, by block."""
    names, columns = [], {}
    for weights, blocks in (("trained", measured.blocks), ("twin", measured.twins)):
        for block in blocks:
            states = value_states(measured, block, weights)
            single = states[states["factor"] != PAIR]
            names = [f"{f} {v}" for f, v in zip(single["factor"], single["value"], strict=True)]
            column = block if weights == "trained" else f"twin {block}"
            columns[column] = single["best"].to_numpy(float)
    values = np.stack(list(columns.values()))
    figure = heat_maps(
        {"": values}, list(columns), names, "F1 of the best feature of every value (%)"
    )
    figure.update_layout(margin={"b": 150})
    return figure


# ---------------------------------------------------------------------------------- real images


def picture_table(
    images: Sequence[Sequence[bytes]], rows: Sequence[str], columns: Sequence[str], title: str
) -> go.Figure:
    """Drawn images in rows and columns, with the names of both."""
    sheets = [np.stack([decode(one).numpy() for one in row]) for row in images]
    height, width = (size * SCALE for size in sheets[0].shape[1:3])
    sheet = np.full(
        (len(rows) * (height + STRIP_GAP), len(columns) * (width + STRIP_GAP), 3), 253, np.uint8
    )
    for y, row in enumerate(sheets):
        for x, image in enumerate(row):
            large = image.repeat(SCALE, 0).repeat(SCALE, 1)
            top, left = y * (height + STRIP_GAP), x * (width + STRIP_GAP)
            sheet[top : top + height, left : left + width] = large
    figure = px.imshow(sheet, binary_string=True, binary_format="png")
    figure.update_traces(hoverinfo="skip", hovertemplate=None)
    left, right, top, bottom = 130, 16, 90, 16
    shrunk = min(1.0, (plots.WIDTH - left - right) / sheet.shape[1])
    figure.update_layout(
        template=plots.TEMPLATE, title_text=title, width=plots.WIDTH,
        height=top + bottom + shrunk * sheet.shape[0],
        margin={"l": left, "r": right, "t": top, "b": bottom},
    )  # fmt: skip
    for update, size, names in (
        (figure.update_xaxes, width, columns), (figure.update_yaxes, height, rows)
    ):  # fmt: skip
        places = [i * (size + STRIP_GAP) + size / 2 for i in range(len(names))]
        update(tickvals=places, ticktext=list(names), showgrid=False, ticks="", title_text="")
    figure.update_xaxes(side="top", tickangle=0, tickfont_size=13)
    return figure


def patched_figure(measured: Measured) -> go.Figure:
    """One caption's drawing with each block's update from its partner's, factor by factor."""
    table = select(measured.table("patched"), {"weights": "trained", "unit": 0})
    columns = ["target", "source", *measured.blocks, ALL_BLOCKS]
    images = [
        [select(table, {"factor": factor, "block": block})["data"].iloc[0] for block in columns]
        for factor in FACTORS
    ]
    return picture_table(
        images, list(FACTORS), columns, "A drawing with each block's update from the source"
    )


def doses_figure(measured: Measured) -> go.Figure:
    """For every factor the feature that brings its value about best, at each dose."""
    rates = pushed_by_value(measured, KINDS[0])
    table = measured.table("pushed")
    doses = sorted(table["dose"].unique())
    images, names = [], []
    for factor in FACTORS:
        of = rates[rates.index.get_level_values("factor") == factor]
        if not len(of):
            continue
        block, _, value = of.idxmax()
        chosen = select(table, {"block": block, "factor": factor, "value": value})
        by_dose = chosen.drop_duplicates("dose").set_index("dose")["data"]
        images.append([by_dose[dose] for dose in doses])
        names.append(f"{value}<br>({block})")
    columns = ["unchanged", *(f"{dose:g} x mean" for dose in doses[1:])]
    return picture_table(images, names, columns, "A feature added, in units of its mean activation")


# ------------------------------------------------------------------------------------- features


def pushes_figure(measured: Measured) -> go.Figure:
    """How often a push brings the value about, by dose."""
    table = measured.table("pushes")
    shown = {}
    for block in measured.blocks:
        of_block = select(table, {"block": block, "counts": True})
        lines = []
        for kind in KINDS:
            of = of_block[of_block["kind"] == kind]
            by_value = of.groupby(["dose", "factor", "value"])["became"].mean()
            doses = sorted(of["dose"].unique())
            lines.append(Line(name=kind, x=doses, y=[mean_of(by_value[d]) for d in doses]))
        shown[block] = lines
    figure = plots.panels(
        shown, title="What adding a value's best feature brings about",
        x=Axis(title="Dose (times the mean activation)", log=True, ticks=measured.settings.doses),
        y=Axis(title="Became the value", percent=True), columns=2,
    )  # fmt: skip
    figure.update_yaxes(matches="y", rangemode="nonnegative")
    return figure


def locality_figure(measured: Measured) -> go.Figure:
    """Share of the change that is inside the heat map."""
    shown = {}
    for block in measured.blocks:
        for kind in KINDS:
            shown[f"{block}: {kind}"] = mean_of(locality_by_feature(measured, block, kind))
        there = locality_by_feature(measured, block, KINDS[0], elsewhere=True)
        shown[f"{block}: seen through another's map"] = mean_of(there)
    figure = plots.bars(
        {name: one for name, one in shown.items() if one.n},
        title="Where features act: share of the change inside the heat map (1/2 is no locality)",
        x=Axis(title="Inside / (inside + outside)"),
    )
    figure.update_layout(height=max(plots.HEIGHT, 120 + 26 * len(shown)))
    return figure


def scores_figure(measured: Measured) -> go.Figure:
    """The scores of top images less those of random ones, by block."""
    table = select(measured.table("scores"), {"weights": "trained"})
    names = list(dict.fromkeys(table["score"]))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.05
    )
    for place, name in enumerate(names):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        found = {}
        for block in measured.blocks:
            of = select(table, {"block": block, "score": name})
            found[block] = mean_of(of["value"] - of["random"]) if len(of) else mean_of(np.array([]))
        estimates = list(found.values())
        figure.add_scatter(
            x=[e.value for e in estimates], y=list(found), mode="markers",
            marker={"size": 10, "color": plots.PLUM}, showlegend=False,
            error_x=plots.errors(estimates, plots.PLUM), **at,
        )  # fmt: skip
        line = {"color": plots.GRAY, "dash": "dot"}
        figure.add_vline(x=0, line=line, row=at["row"], col=at["col"])  # type: ignore[arg-type]
    figure.update_layout(
        template=plots.TEMPLATE, title_text="Top images of features less random images",
        width=plots.WIDTH, height=max(plots.HEIGHT, 130 + 190 * rows), margin={"t": 90},
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_annotations(font_size=13)
    return figure


# ----------------------------------------------------------------------- k, width, steps, transport


def widths_figure(measured: Measured) -> go.Figure:
    """Variance explained and values with their own feature, against k, by width."""
    table, n = measured.table("widths"), measured.settings.images
    shown: dict[str, list[Line]] = {}
    columns = {"explained": "explained"}
    if measured.known:
        columns["owned"] = "values found"
    for column, words in columns.items():
        for block in measured.blocks:
            of = table[table["block"] == block]
            shown[f"{block}: {words}"] = [
                _line(f"{width} features", part.sort_values("k"), "k", column, n)
                for width, part in of.groupby("d_sae")
            ]
    return plots.panels(
        shown, title="Variance explained, and values with a feature of their own",
        x=Axis(title="k", log=True, ticks=tuple(sorted({float(k) for k in table["k"]}))),
        y=Axis(title="Share"), columns=len(measured.blocks),
    )  # fmt: skip


def _line(name: str, rows: Frame, x: str, column: str, n: int) -> Line:
    return Line(name=name, x=rows[x].tolist(), y=[from_draws(draws, n) for draws in rows[column]])


def steps_figure(measured: Measured) -> go.Figure:
    """Variance explained of each of four steps."""
    table = measured.table("steps")
    four = table[table["steps"] > 1]
    one = table[table["steps"] == 1].set_index("block")["explained"]
    series = [
        _line(
            f"{block} (one step: {one[block][0]:.2f})",
            rows,
            "step",
            "explained",
            in_steps(measured.settings),
        )
        for block in measured.blocks
        for rows in [four[four["block"] == block].sort_values("step")]
    ]
    return plots.lines(
        series, title="What SAEs of one step explain of each of four steps",
        x=Axis(title="Step", ticks=(1.0, 2.0, 3.0, 4.0)), y=Axis(title="Variance explained"),
    )  # fmt: skip


def transport_figure(measured: Measured) -> go.Figure:
    """Success against cost of every way of transport and setting."""
    table = measured.table("transports")
    counted = table[table["counts"].astype(bool)]
    ends = counted.groupby("method")["k"].agg(["min", "max"])
    shown = []
    for (method, k, m), of in counted.groupby(["method", "k", "m"], sort=False):
        name = f"m {m:g}" if k == 0 else f"{k}, m {m:g}"
        moved = share_of(of["moved"])
        # All names would lie on each other; the table has them.
        named = moved.value > WORTH_NAMING and k in ends.loc[method].to_list()
        name = name if named else ""
        shown.append(Point(name=name, x=share_of(of["others"]), y=moved, group=str(method)))
    return plots.points(
        shown, title="Transport between captions: success against cost (k, m)",
        x=Axis(title="Something else changed", percent=True),
        y=Axis(title="Became the source's", percent=True),
    )  # fmt: skip
