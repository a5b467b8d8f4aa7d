"""Figures (plotly): densities and activations of features, curves of training runs."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from app.style import GOLD, PLUM, SERIES
from app.wording import Unit, escaped, number, percent

METRIC_TITLES: Mapping[str, str] = {
    "loss": "Training loss",
    "fvu": "Variance unexplained (FVU, share)",
    "l0": "Active features (L0, per token)",
    "dead_share": "Dead features (share)",
    "code_over_input": "Code norm over input norm (1: equal)",
    "tokens_per_s": "Speed (tokens per second)",
    "mse": "Reconstruction loss (MSE term)",
    "auxk": "Dead-feature loss (AuxK term)",
    "lr": "Learning rate",
}
AXIS_TITLES: Mapping[str, str] = {
    "tokens": "Activations seen (tokens)",
    "step": "Training step",
    "seconds": "Time since start (seconds)",
}


def density_figure(
    densities: Float[np.ndarray, " s"],
    *,
    selected: tuple[float, float] | None,
    unit: Unit = "tokens",
) -> go.Figure:
    """How many features have which density; log axis, dead features (density 0) left out.

    Args:
        densities: share of tokens that each feature fires on.
        selected: a range to mark, where one is chosen.
        unit: what features fire on.
    """
    alive = densities[densities > 0]
    low = math.floor(np.log10(alive.min())) if len(alive) else -6
    counts, edges = np.histogram(np.log10(alive), bins=max(-low, 1) * 12, range=(low, 0))
    names = [f"{percent(10**a)} to {percent(10**b)}" for a, b in itertools.pairwise(edges)]
    figure = go.Figure(_bars(edges, counts, names, "features", PLUM))
    figure.update_xaxes(range=[low, 0], **_decades(low, 0, lambda power: percent(10.0**power)))
    if selected is not None:
        left, right = (math.log10(max(bound, 10.0**low)) for bound in selected)
        figure.add_vrect(x0=left, x1=right, fillcolor=GOLD, opacity=0.16, line_width=0)
    return _dressed(figure, f"Density (share of {unit} a feature fires on, log)", "Features", 210)


def activation_figure(
    counts: Sequence[int],
    edges: Sequence[float],
    *,
    marker: float | None = None,
    unit: Unit = "tokens",
) -> go.Figure:
    """Histogram of one feature's activations; both axes are logarithmic.

    Args:
        counts: tokens in each bin, one fewer than `edges`.
        edges: the bins' bounds in activation, ascending and spaced evenly in their logarithm.
        marker: an activation to mark, such as that of a person's own text.
        unit: what features fire on.
    """
    filled = [i for i, count in enumerate(counts) if count] or [0]
    first, last = max(filled[0] - 1, 0), min(filled[-1] + 2, len(counts))
    logs = np.log10(np.asarray(edges, dtype=float))[first : last + 1]
    names = [
        f"{number(float(10**a))} to {number(float(10**b))}" for a, b in itertools.pairwise(logs)
    ]
    shown = np.asarray(counts[first:last])
    figure = go.Figure(_bars(logs, shown, names, unit, GOLD))
    figure.update_xaxes(**_round_ticks(float(logs[0]), float(logs[-1])))
    top = math.log10(max(shown.max(initial=1), 10)) * 1.05
    figure.update_yaxes(type="log", range=[-0.35, top], dtick=1)
    if marker is not None and marker > 0:
        figure.add_vline(x=math.log10(marker), line={"color": PLUM, "width": 2})
        figure.add_annotation(
            x=math.log10(marker), y=1, yref="paper", text="your text", showarrow=False,
            xanchor="left", xshift=4, font={"color": PLUM},
        )  # fmt: skip
    return _dressed(figure, "Activation (log)", f"{unit.capitalize()} (log)", 220)


def _bars(
    edges: np.ndarray, counts: np.ndarray, names: Sequence[str], unit: str, colour: str
) -> go.Bar:
    return go.Bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=counts,
        width=np.diff(edges) * 0.94,
        customdata=names,
        hovertemplate=f"%{{customdata}}<br>%{{y:,}} {unit}<extra></extra>",
        marker={"color": colour, "line": {"width": 0}},
    )


def _decades(low: int, high: int, label: Callable[[int], str]) -> dict[str, Any]:
    powers = list(range(low, high + 1))
    return {"tickvals": powers, "ticktext": [label(power) for power in powers]}


def _round_ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten, fewer where the range is wide."""
    steps = (1, 2, 5) if high - low < 2.2 else (1,)
    values = [
        step * 10.0**power
        for power in range(math.floor(low) - 1, math.ceil(high) + 1)
        for step in steps
        if low <= math.log10(step * 10.0**power) <= high
    ]
    return {"tickvals": [math.log10(v) for v in values], "ticktext": [number(v) for v in values]}


def training_figure(
    runs: Mapping[str, pd.DataFrame], metric: str, *, x: str, log_y: bool
) -> go.Figure:
    """One metric of one or several training runs.

    Args:
        runs: name -> its `metrics.jsonl` as a table.
        metric: a column of it.
        x: "step", "tokens" or "seconds".
        log_y: logarithmic metric axis; values of 0 or less are then left out.
    """
    figure = go.Figure()
    for place, (name, table) in enumerate(runs.items()):
        if metric not in table or x not in table:
            continue
        rows = table[[x, metric]].dropna()
        rows = rows[rows[metric] > 0] if log_y else rows
        figure.add_scatter(
            x=rows[x], y=rows[metric], name=name, mode="lines" if len(rows) > 1 else "markers",
            line={"color": SERIES[place % len(SERIES)], "width": 1.8},
            hovertemplate=f"{AXIS_TITLES[x]} %{{x:,}}<br>%{{y:.4g}}<extra>{escaped(name)}</extra>",
        )  # fmt: skip
    if log_y:
        figure.update_yaxes(type="log")
    elif metric != "lr":
        figure.update_yaxes(rangemode="tozero")
    title = METRIC_TITLES.get(metric, metric)
    figure.update_layout(title={"text": title, "font": {"size": 14}}, showlegend=False)
    return _dressed(figure, AXIS_TITLES[x], title.partition(" (")[0], 260, top=34)


def zf_figure(input_norm: Sequence[float], code_norm: Sequence[float]) -> go.Figure:
    """Norm of the code against norm of the input, a dot a row (Lee et al. 2025, 2503.24277).

    On the dashed line the two are equal; below it a row is under-activated, above it
    over-activated.
    """
    ends = [0.97 * min(input_norm, default=0.0), 1.03 * max(input_norm, default=1.0)]
    figure = go.Figure()
    figure.add_scatter(
        x=ends, y=ends, mode="lines", hoverinfo="skip",
        line={"color": GOLD, "dash": "dash", "width": 1.4},
    )  # fmt: skip
    figure.add_scattergl(
        x=list(input_norm), y=list(code_norm), mode="markers",
        marker={"size": 4, "color": PLUM, "opacity": 0.55},
        hovertemplate="input %{x:.4g}<br>code %{y:.4g}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(showlegend=False)
    return _dressed(figure, "Norm of the input", "Norm of the code", 280)


def _dressed(figure: go.Figure, x_title: str, y_title: str, height: int, top: int = 8) -> go.Figure:
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": 8, "t": top, "b": 8},
        bargap=0,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(title_text=x_title, showgrid=False, zeroline=False, ticks="outside")
    figure.update_yaxes(title_text=y_title, zeroline=False, gridcolor="rgba(128,120,112,.18)")
    return figure
