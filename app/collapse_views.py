"""What the page Collapse draws: figures and sentences, without Streamlit."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from analyses.cells import Frame
from analyses.collapse.figures import SMALLEST, length_maps
from analyses.plots import Axis, Line, heat_maps, lines
from analyses.statistics import Estimate

PLACES = 80
"""Groups of neighbouring tokens in a map."""


def curve_figure(curves: Mapping[str, Frame], n_layers: int, n: int) -> go.Figure:
    """Final distances by length, a line a curve, with a mark at the chosen length."""
    shown = []
    for name, table in curves.items():
        final = table[table["layer"] == n_layers].sort_values("n")
        values = [
            Estimate(value=max(float(v), SMALLEST), low=None, high=None, n=1)
            for v in final["distance"]
        ]
        shown.append(Line(name=name, x=[int(i) for i in final["n"]], y=values))
    figure = lines(
        shown, title="Last token's final output at n and n + 1",
        x=Axis(title="Repetitions n", log=True),
        y=Axis(title="Relative distance", log=True, decades=True),
    )  # fmt: skip
    figure.add_vline(x=n, line={"color": "#8b8680", "width": 1.2, "dash": "dot"})
    return figure


def layer_figure(table: Frame) -> go.Figure:
    """Distances by layer and length."""
    logs = table.assign(log=np.log10(table["distance"].clip(lower=SMALLEST)))
    by = logs.pivot(index="layer", columns="n", values="log")
    return length_maps(
        {"": by}, title="Distance by layer (the last row is the final norm)", amount="log10",
        limits=(-3.0, 0.0),
    )  # fmt: skip


def sensitivity_figure(
    gradient: Float[np.ndarray, "depths t"], path: Float[np.ndarray, "depths t"], beta: float
) -> go.Figure:
    """Gradients beside path sums, by token and depth."""
    places = [float(group.mean()) for group in groups_of(gradient.shape[1])]
    return heat_maps(
        {"gradient": shares(gradient), f"paths, beta {beta:g}": shares(path)},
        title="How much each token reaches the last, by depth", x=Axis(title="Token"),
        y=Axis(title="Depth"), columns=places, amount="log10",
        limits=(-3.0, 0.0),
    )  # fmt: skip


def shares(values: Float[np.ndarray, "depths t"]) -> Float[np.ndarray, "depths g"]:
    """log10 of each row over its largest, by groups of neighbouring tokens."""
    grouped = np.stack([values[:, group].mean(1) for group in groups_of(values.shape[1])], axis=1)
    return np.log10(np.maximum(grouped / grouped.max(1, keepdims=True), SMALLEST))


def groups_of(n: int) -> Sequence[np.ndarray]:
    """The tokens in at most `PLACES` groups of neighbours."""
    return np.array_split(np.arange(n), min(PLACES, n))


def reading(table: Frame, n_layers: int, n: int) -> str:
    """The distance at the length nearest to n, in a sentence."""
    final = table[table["layer"] == n_layers]
    row = final.iloc[(final["n"] - n).abs().argmin()]
    top = "the same" if row["same_top"] else "another"
    return (
        f"At n = {int(row['n']):,} the two outputs are {100 * row['distance']:.2g} % of their "
        f"length apart, and {top} token is the likeliest to follow."
    )
