"""What the page Simplicity draws: figures and sentences, without Streamlit."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from analyses.cells import Frame
from analyses.lab_figures import heat_map
from analyses.plots import BLUE, GRID, INK, PAPER, RUST, SIGNED, TEMPLATE
from analyses.simplicity.networks import Architecture
from analyses.simplicity.numbers import MEASURES

UNITS = {
    "fourier": "cycles", "polynomial": "order", "lz": "phrases", "variation": "deviations",
}  # fmt: skip
"""What each measure counts."""


def function_figure(values: Float[np.ndarray, "r c"]) -> go.Figure:
    """A function on the square: rust below its mean, blue above, as dark as it is far."""
    centred = values - values.mean()
    reach = float(np.abs(centred).max()) or 1.0
    places = np.linspace(-1, 1, len(values))
    figure = go.Figure(
        go.Heatmap(
            z=centred.T, x=places, y=places, zmin=-reach, zmax=reach, colorscale=SIGNED,
            showscale=False, customdata=values.T,
            hovertemplate="f(%{x:.2f}, %{y:.2f}) = %{customdata:.3g}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(template=TEMPLATE, height=440, margin={"l": 8, "r": 8, "t": 8, "b": 8})
    figure.update_xaxes(visible=False, constrain="domain")
    figure.update_yaxes(visible=False, scaleanchor="x", constrain="domain")
    return figure


def peers_figure(peers: pd.DataFrame, number: int) -> go.Figure:
    """Each measure of this network (a line) among others of its kind (dots)."""
    figure = go.Figure()
    names = list(MEASURES)
    for row, name in enumerate(reversed(names)):
        values = peers[name].to_numpy(float)
        low, high = np.nanmin(values), np.nanmax(values)
        places = (values - low) / ((high - low) or 1.0)
        hover = [f"{MEASURES[name]} {value:.3g} {UNITS[name]}" for value in values]
        figure.add_scatter(
            x=places, y=np.full(len(places), row), mode="markers", hovertext=hover,
            marker={"color": BLUE, "size": 9, "opacity": 0.35}, hoverinfo="text",
            showlegend=False,
        )  # fmt: skip
        figure.add_scatter(
            x=[places[number]], y=[row], mode="markers", hovertext=[hover[number]],
            marker={"color": RUST, "size": 15, "symbol": "diamond",
                    "line": {"color": PAPER, "width": 1.5}},
            hoverinfo="text", showlegend=False,
        )  # fmt: skip
        for place, value in ((0.0, low), (1.0, high)):
            figure.add_annotation(
                x=place, y=row, text=f"{value:.3g}", showarrow=False, yshift=-18,
                font={"size": 12, "color": INK},
            )  # fmt: skip
    figure.update_layout(
        template=TEMPLATE, height=300, margin={"l": 110, "r": 24, "t": 12, "b": 24}
    )
    figure.update_xaxes(visible=False, range=[-0.08, 1.08])
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=[MEASURES[n] for n in reversed(names)],
        range=[-0.6, len(names) - 0.5], gridcolor=GRID,
    )  # fmt: skip
    return figure


def map_figure(table: pd.DataFrame, chosen: Architecture) -> go.Figure:
    """Mean Fourier complexity by depth and weight scale; the chosen kind is framed."""
    values = table.to_numpy(float)
    scales = [float(scale) for scale in table.columns]
    hover = [
        [f"{depth} layer(s), scale {scale:g}<br>{value:.3g} cycles"
         for scale, value in zip(scales, row, strict=True)]
        for depth, row in zip(table.index, values, strict=True)
    ]  # fmt: skip
    known = np.log2(values)
    figure = heat_map(
        known, rows=[f"{depth}" for depth in table.index],
        columns=[f"{scale:g}" for scale in scales], hover=hover,
        limits=(0.0, max(3.0, float(np.nanmax(known)))), title="log2 of cycles",
    )  # fmt: skip
    figure.update_xaxes(title_text="Weight scale", tickangle=0)
    figure.update_yaxes(title_text="Layers")
    if chosen.depth in table.index and chosen.scale in scales:
        row, column = list(table.index).index(chosen.depth), scales.index(chosen.scale)
        figure.add_shape(
            type="rect", x0=column - 0.5, x1=column + 0.5, y0=row - 0.5, y1=row + 0.5,
            line={"color": RUST, "width": 3},
        )  # fmt: skip
    return figure


def reading(peers: pd.DataFrame, number: int) -> str:
    """What the measures say of the network, in a sentence or two."""
    own = peers.iloc[number]
    if not np.isfinite(own["fourier"]):
        return (
            "This function is constant but for rounding, so its complexity means nothing: larger "
            "weights or biases, or another draw, make one that is not."
        )
    known = peers["fourier"].dropna()
    below = float((known < own["fourier"]).mean())
    return (
        f"Its mean frequency is **{own['fourier']:.2f} cycles** over the square, more than "
        f"{below:.0%} of {len(known)} draws of its kind; {_beside(float(own['fourier']))}"
    )


def _beside(cycles: float) -> str:
    ends: Sequence[tuple[float, str]] = (
        (1.5, "hardly more than a slope."), (4.0, "a few smooth hills."),
        (12.0, "a landscape of many hills."),
    )  # fmt: skip
    return next((words for end, words in ends if cycles < end), "near the 24 of white noise.")


def shares(peers: Frame) -> str:
    """How many draws are constant."""
    constant = int(peers["fourier"].isna().sum())
    return f"{constant} of {len(peers)} draws of this kind are constant." if constant else ""
