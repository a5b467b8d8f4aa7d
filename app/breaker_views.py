"""What the page Circuit breakers draws: figures and tables, without Streamlit."""

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from analyses.cells import Frame
from analyses.plots import Axis, Line, heat_maps, lines, panels
from analyses.statistics import Estimate

if TYPE_CHECKING:
    from app.live_breakers import Compared

CURVES = {
    "cb_cos_sim": "rerouted", "retain_cos_sim": "kept",
    "held_out_cos": "rerouted, unseen", "held_out_retain_cos": "kept, unseen",
}  # fmt: skip
TICKS = 24
"""Tokens whose text stands below a map, at most."""


def _line(name: str, x: list[int], y: Float[np.ndarray, " n"]) -> Line:
    values = [Estimate(value=float(v), low=None, high=None, n=1) for v in y]
    return Line(name=name, x=x, y=values)


def training_figure(log: Frame) -> go.Figure:
    """Cosines with the original by step."""
    shown = []
    for column, name in CURVES.items():
        rows = log[["step", column]].dropna()
        shown.append(_line(name, rows["step"].tolist(), rows[column].to_numpy(float)))
    return lines(
        shown, title="Training: cosine with the original", x=Axis(title="Step"),
        y=Axis(title="Cosine at the target layers"),
    )  # fmt: skip


def attack_rows(attacks: Frame, subject: str) -> Frame:
    """The report's rows of a subject; none where there is no report, or none of it."""
    if not len(attacks):
        return attacks
    return attacks[attacks["broken"] == subject].drop(columns="broken")


def cosine_map(found: "Compared") -> go.Figure:
    """Cosine of the broken states with the original's, by layer and token."""
    return _map(found, found.cosine, "cosine", "Cosine with the original's state", (-0.5, 1.0))


def length_map(found: "Compared") -> go.Figure:
    """Length of the broken states over the original's, by layer and token."""
    return _map(found, found.longer, "log", "Log of the length over the original's", (-1.0, 2.0))


def _map(
    found: "Compared",
    values: Float[np.ndarray, "e t"],
    amount: str,
    title: str,
    limits: tuple[float, float],
) -> go.Figure:
    places = [float(place) for place in range(values.shape[1])]
    figure = heat_maps(
        {"": values}, title=title, x=Axis(title=""), y=Axis(title="State"), columns=places,
        amount=amount, limits=limits,
    )  # fmt: skip
    return figure.update_xaxes(**_ticks(found.texts))


def layer_figure(found: "Compared", layer: int) -> go.Figure:
    """Cosine and length at one layer by token."""
    places = list(range(found.cosine.shape[1]))
    figure = panels(
        {
            "cosine": [_line("cosine", places, found.cosine[layer])],
            "length over the original's": [_line("length", places, np.exp(found.longer[layer]))],
        },
        title=f"State {layer} by token", x=Axis(title=""), y=Axis(title=""), columns=1,
    )  # fmt: skip
    return figure.update_xaxes(**_ticks(found.texts)).update_layout(showlegend=False)


def _ticks(texts: tuple[str, ...]) -> dict[str, Any]:
    """Tokens below an axis of their numbers, not more than can be read."""
    step = max(1, -(-len(texts) // TICKS))
    chosen = list(range(0, len(texts), step))
    shown = [texts[place].replace("\n", "\u21b5") for place in chosen]
    return {"tickvals": chosen, "ticktext": shown, "tickangle": -60, "tickfont": {"size": 10}}
