"""Figures of the map and of the comparison, without Streamlit."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Bool, Float

from app.style import BLUE, GOLD, GRAY, PLUM, SERIES
from app.wording import escaped, percent

Plane = Literal["tsne", "pca"]
Colour = Literal["density", "score", "cluster", "list"]

SCALE = [[0.0, BLUE], [0.5, PLUM], [1.0, GOLD]]
"""From little to much; all of it can be seen on a light page and on a dark one."""
HEIGHT = 660
NAMES_SHOWN = 14
"""Clusters that have their name on the map."""
FADED = "rgba(139,134,128,.45)"


def map_figure(
    places: pd.DataFrame,
    plane: Plane,
    colour: Colour,
    *,
    clusters: pd.DataFrame,
    members: Collection[int] = (),
    found: Collection[int] = (),
    ink: str = GRAY,
) -> go.Figure:
    """Features as points, drawn with WebGL; the first trace holds all of them, row by row.

    Args:
        places: a row a feature: feature, `<plane>_x`, `<plane>_y`, cluster, density, score, label,
            tokens (the last four may be missing).
        plane: which layout.
        colour: what the colour says.
        clusters: a row a cluster; those that stand out have a colour, and the largest a name.
        members: features of the chosen list, for the colour "list".
        found: features to put a ring around.
        ink: colour of the clusters' names.
    """
    x, y = (places[f"{plane}_{axis}"].to_numpy(np.float32) for axis in "xy")
    figure = go.Figure()
    figure.add_scattergl(
        x=x, y=y, mode="markers", text=hover_texts(places), hovertemplate="%{text}<extra></extra>",
        marker={"size": point_size(len(places)), "line": {"width": 0}}
        | marker(places, colour, clusters, members),
        selected={"marker": {"opacity": 1}}, unselected={"marker": {"opacity": 0.12}},
    )  # fmt: skip
    ringed = places["feature"].isin(list(found)).to_numpy()
    if ringed.any():
        figure.add_scattergl(
            x=x[ringed], y=y[ringed], mode="markers", hoverinfo="skip",
            marker={"size": 12, "color": PLUM, "symbol": "circle-open", "line": {"width": 2}},
            selected={"marker": {"opacity": 1}}, unselected={"marker": {"opacity": 1}},
        )  # fmt: skip
    if colour == "cluster":
        _name_clusters(figure, places, plane, clusters, ink)
    figure.update_layout(
        height=HEIGHT,
        margin={"l": 0, "r": 0, "t": 8, "b": 0},
        dragmode="lasso",
        hovermode="closest",
        showlegend=False,
        uirevision=plane,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"align": "left"},
    )
    figure.update_layout(modebar={"bgcolor": "rgba(0,0,0,0)", "color": GRAY, "activecolor": PLUM})
    axis = {"showgrid": False, "zeroline": False, "showticklabels": False, "ticks": ""}
    figure.update_xaxes(**axis, range=_span(x))
    figure.update_yaxes(**axis, range=_span(y))
    return figure


def _span(values: Float[np.ndarray, " n"]) -> list[float]:
    """The range of an axis: all of the values and a little around them."""
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    room = 0.03 * (high - low) or 1.0
    return [low - room, high + room]


def point_size(n: int) -> float:
    """Diameter of a point, in pixels: smaller where there are many."""
    return float(np.clip(400 / np.sqrt(max(n, 1)), 3, 8))


def hover_texts(places: pd.DataFrame) -> list[str]:
    """Number of each feature and, in a second line, its label or else its tokens."""
    lines = said(places) if "label" in places else [""] * len(places)
    return [
        f"{feature}<br>{escaped(line)}" if line else str(feature)
        for feature, line in zip(places["feature"], lines, strict=True)
    ]


def marker(
    places: pd.DataFrame, colour: Colour, clusters: pd.DataFrame, members: Collection[int]
) -> dict[str, Any]:
    """Colours of the points, and the bar that explains them where they are numbers."""
    if colour == "cluster":
        out = clusters.loc[clusters["stands_out"], "cluster"].to_numpy()
        palette = np.array([FADED, *SERIES[:-1]], dtype=object)
        place = {cluster: 1 + i % (len(palette) - 1) for i, cluster in enumerate(out.tolist())}
        return {"color": palette[[place.get(c, 0) for c in places["cluster"]]], "opacity": 0.9}
    if colour == "list":
        on_list = places["feature"].isin(list(members)).to_numpy()
        return {"color": np.where(on_list, GOLD, FADED), "opacity": 0.9}
    values = (
        places[colour].to_numpy(np.float64) if colour in places else np.full(len(places), np.nan)
    )
    if colour == "density":
        with np.errstate(divide="ignore"):
            values = np.where(values > 0, np.log10(values), np.nan)
    if not np.isfinite(values).any():
        return {"color": GRAY, "opacity": 0.8}
    return {
        "color": values.astype(np.float32),
        "colorscale": SCALE,
        "opacity": 0.8,
        "colorbar": _bar(colour, values[np.isfinite(values)]),
    }


def _bar(colour: Colour, values: Float[np.ndarray, " n"]) -> dict[str, Any]:
    bar: dict[str, Any] = {
        "thickness": 10,
        "len": 0.6,
        "outlinewidth": 0,
        "title": {"side": "right"},
    }
    if colour == "score":
        return bar | {"title": {"text": "Detection score", "side": "right"}}
    powers = list(range(int(np.floor(values.min())), int(np.ceil(values.max())) + 1))
    return bar | {
        "title": {"text": "Density (log)", "side": "right"},
        "tickvals": powers,
        "ticktext": [percent(10.0**power) for power in powers],
    }


def _name_clusters(
    figure: go.Figure, places: pd.DataFrame, plane: Plane, clusters: pd.DataFrame, ink: str
) -> None:
    out = clusters[clusters["stands_out"] & (clusters["name"] != "")].head(NAMES_SHOWN)
    for cluster, name in zip(out["cluster"], out["name"], strict=True):
        inside = places.loc[places["cluster"] == cluster, [f"{plane}_x", f"{plane}_y"]].to_numpy()
        figure.add_annotation(
            x=float(np.median(inside[:, 0])), y=float(inside[:, 1].max()),
            text=escaped(name), showarrow=False, yshift=10, font={"size": 12, "color": ink},
        )  # fmt: skip


# -------------------------------------------------------------------------------- comparison


def cosine_figure(
    cosines: Float[np.ndarray, " n"],
    chance: dict[str, Float[np.ndarray, " m"]],
    *,
    threshold: float | None = None,
) -> go.Figure:
    """Histogram of |cos| of pairs, with that of chance as lines.

    Args:
        cosines: of the matched pairs, of either sign.
        chance: name -> |cos| of pairs with directions of chance.
        threshold: a cosine to mark.
    """
    edges = np.linspace(0, 1, 51)
    middle = (edges[:-1] + edges[1:]) / 2
    counts = np.histogram(np.abs(cosines).clip(0, 1), edges)[0]
    figure = go.Figure(
        go.Bar(
            x=middle, y=counts, width=np.diff(edges) * 0.94, name="the two SAEs",
            marker={"color": PLUM, "line": {"width": 0}},
            hovertemplate="|cos| %{x:.2f}<br>%{y:,} pairs<extra></extra>",
        )
    )  # fmt: skip
    for colour, dash, (name, values) in zip(
        (GOLD, BLUE), ("solid", "dash"), chance.items(), strict=False
    ):
        figure.add_scatter(
            x=middle, y=np.histogram(values.clip(0, 1), edges)[0], mode="lines", name=name,
            line={"color": colour, "width": 2, "shape": "hvh", "dash": dash},
            hovertemplate="|cos| %{x:.2f}<br>%{y:,} pairs<extra></extra>",
        )  # fmt: skip
    if threshold is not None:
        figure.add_vline(x=threshold, line={"color": GRAY, "width": 1.5, "dash": "dot"})
    figure.update_layout(
        height=260,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        bargap=0,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    figure.update_xaxes(
        title_text="|cos| of a matched pair's directions", range=[0, 1], showgrid=False,
        zeroline=False, ticks="outside",
    )  # fmt: skip
    figure.update_yaxes(title_text="Pairs", zeroline=False, gridcolor="rgba(128,120,112,.18)")
    return figure


def contains(rows: pd.DataFrame, columns: Sequence[str], wanted: str) -> Bool[np.ndarray, " n"]:
    """Rows with a text that contains the wanted one, in any case and taken literally."""
    low, found = wanted.lower(), np.zeros(len(rows), bool)
    for column in columns:
        found |= [low in str(text).lower() for text in rows[column].fillna("")]
    return found


def said(rows: pd.DataFrame, prefix: str = "") -> list[str]:
    """What there is to say of each row's feature: its label, or else the tokens it fires on."""
    label, tokens = (rows[f"{prefix}{name}"].fillna("") for name in ("label", "tokens"))
    return [own or line for own, line in zip(label, tokens, strict=True)]


def cluster_sentence(summary: Mapping[str, Any]) -> str:
    """What the clusters are worth, in words: how many stand out, beside the controls."""
    found = summary["clusters"]
    own = found["sae"]
    controls = [found[name] for name in ("random", "shaped") if name in found]
    of_chance = " and ".join(str(control["n_clusters"]) for control in controls)
    return (
        f"{own['n_clusters']} clusters, of which **{summary['n_standing_out']}** stand out: their "
        "directions agree more than those of any neighbourhood of the same size among random "
        f"directions. In these, the same steps find {of_chance} clusters, too."
    )
