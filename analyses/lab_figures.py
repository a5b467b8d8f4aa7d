"""Figures (plotly) of one prompt: attributions beside ablations, logit lens, patching, layers.

They have no ground of their own, so that they fit a light page, a dark page and a notebook. Maps
are read by hovering and carry an invisible point a cell, which a page can let a person click. Gold
is how much of something there is; effects run from rust (against) over clear to blue (for), as
logits do elsewhere.
"""

import html
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from analyses.plots import BLUE, GOLD, GRAY, GRID, PLUM, RUST
from probe.lens import Lens
from probe.patching import PatchGrid
from saes.attribution import Ablation

AMOUNT = [[0.0, "rgba(224,165,38,0.04)"], [1.0, "rgba(224,165,38,1)"]]
"""Colour scale of what has an amount."""
EFFECT = [[0.0, RUST], [0.5, "rgba(139,134,128,0.10)"], [1.0, BLUE]]
"""Colour scale of what speaks for or against."""
ROW_HEIGHT, MOST_TICKS = 21, 60
CLICKED = 14
"""Pixels across of the point in the middle of each cell."""
MAP_WIDTH, LETTER = 880, 6.4
"""Pixels that a map is wide about, and a letter in a cell."""


def shown(token: str) -> str:
    """A token as a label: spaces as dots, line breaks as arrows, nothing that plotly would read as
    a tag."""
    visible = token.replace("\r", "").replace("\n", "\u21b5").replace(" ", "\u00b7")
    return html.escape(visible, quote=False) or "(empty)"


def heat_map(
    values: Float[np.ndarray, "r c"],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    hover: Sequence[Sequence[str]],
    limits: tuple[float, float],
    title: str,
    cells: Sequence[Sequence[str]] | None = None,
    signed: bool = False,
) -> go.Figure:
    """A map of rows (the first one at the bottom) by columns.

    Args:
        values: what the colour shows.
        rows: names of the rows.
        columns: names of the columns.
        hover: what is read on hovering over each cell.
        limits: values of the ends of the colour scale.
        title: what the colour shows, beside its scale.
        cells: what is written in each cell; left out where there is no room.
        signed: colours for effects, with 0 in the middle.
    """
    height, width = values.shape
    figure = go.Figure(
        go.Heatmap(
            z=values, zmin=limits[0], zmax=limits[1], colorscale=EFFECT if signed else AMOUNT,
            xgap=1, ygap=1, hoverinfo="skip",
            colorbar={
                "title": {"text": title, "side": "right"}, "thickness": 12, "outlinewidth": 0,
            },
            text=_fitting(cells, width), texttemplate="%{text}", textfont={"size": 10},
        )
    )  # fmt: skip
    places = [(row, column) for row in range(height) for column in range(width)]
    figure.add_scatter(
        x=[column for _, column in places], y=[row for row, _ in places],
        mode="markers", marker={"size": CLICKED, "opacity": 0, "symbol": "square", "color": GRAY},
        selected={"marker": {"opacity": 0}}, unselected={"marker": {"opacity": 0}},
        hovertext=[hover[row][column] for row, column in places],
        hovertemplate="%{hovertext}<extra></extra>", showlegend=False,
    )  # fmt: skip
    every = max(1, -(-width // MOST_TICKS))
    ticks = list(range(0, width, every))
    dressed(figure, "", "", ROW_HEIGHT * height + 120)
    figure.update_xaxes(
        tickvals=ticks, ticktext=[columns[i] for i in ticks], tickangle=-60, showgrid=False,
        range=[-0.5, width - 0.5],
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(height)), ticktext=list(rows), showgrid=False,
        range=[-0.5, height - 0.5],
    )  # fmt: skip
    return figure


def lens_figure(lens: Lens) -> go.Figure:
    """Probability of the followed token by layer and position; in the cells the likeliest one."""
    probability = lens.probability.numpy()
    hover, cells = [], []
    for layer in range(lens.n_layers):
        line, names = [], []
        for position, token in enumerate(lens.prompt.texts):
            best = lens.top_texts(layer, position)[0]
            followed = lens.texts[int(lens.target[position])]
            names.append(best)
            line.append(
                f"layer {layer}, after token {position} {shown(token)}<br>likeliest {shown(best)} "
                f"{float(lens.top_probability[layer, position, 0]):.3g}<br>"
                f"{shown(followed)} {probability[layer, position]:.3g}, rank "
                f"{int(lens.rank[layer, position]):,}"
            )
        hover.append(line)
        cells.append(names)
    return heat_map(
        probability, rows=[f"{layer}" for layer in range(lens.n_layers)],
        columns=_columns(lens.prompt.texts), hover=hover, limits=(0.0, 1.0), cells=cells,
        title="probability of the final token",
    ).update_yaxes(title_text="Layer")  # fmt: skip


def patching_figure(grid: PatchGrid, *, control: bool = False) -> go.Figure:
    """Effect of patching by layer and position; `control` shows that of the unrelated prompt."""
    effect = (grid.control if control else grid.effect).numpy()
    pair = grid.pair
    texts = [(pair.clean.texts[i], pair.corrupted.texts[i]) for i in grid.positions]
    names = [
        f"{i} {shown(one)}" + ("" if one == other else f" | {shown(other)}")
        for i, (one, other) in zip(grid.positions, texts, strict=True)
    ]
    hover = [
        [f"{grid.kind}.{layer}, token {name}<br>effect {effect[row, column]:.3f}"
         for column, name in enumerate(names)]
        for row, layer in enumerate(grid.layers)
    ]  # fmt: skip
    largest = float(grid.effect.abs().max())
    reach = max(1.0 if pair.gap is not None else 1e-6, largest)
    if pair.gap is not None:
        reach = min(reach, 1.5)
    return heat_map(
        effect, rows=[str(layer) for layer in grid.layers], columns=names, hover=hover,
        limits=(-reach, reach), signed=True,
        title="effect (0 corrupted, 1 clean)" if pair.gap is not None else "effect (logits)",
    ).update_yaxes(title_text="Layer")  # fmt: skip


def effects_figure(ablation: Ablation) -> go.Figure:
    """Bars by feature: the estimate, what taking the feature out does, and the random direction."""
    table = ablation.table
    names = [
        f"{row['feature']} at {row['position']} {shown(row['token'])}"
        if ablation.where == "token"
        else f"{row['feature']} (most at {shown(row['token'])})"
        for row in table.to_dict("records")
    ]
    figure = go.Figure()
    for column, name, colour in (
        ("attribution", "gradient x activation", GOLD),
        ("ablation", "the feature, taken out", BLUE),
        ("control", "a random direction, taken out", GRAY),
    ):
        figure.add_bar(
            x=table[column], y=names, name=name, orientation="h",
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate=f"%{{y}}<br>{name}: %{{x:.4f}}<extra></extra>",
        )  # fmt: skip
    dressed(figure, "Effect on the metric (logits)", "", 34 * len(table) + 110)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(zeroline=True, zerolinecolor=GRAY, gridcolor=GRID, showgrid=True)
    return figure.update_layout(bargap=0.25)


def agreement_figure(ablation: Ablation) -> go.Figure:
    """Estimates against measurements, a point a feature; on the dashed line they are equal."""
    table = ablation.table
    both = np.concatenate([table["attribution"], table["ablation"], [0.0]])
    ends = [1.05 * float(both.min()), 1.05 * float(both.max())]
    figure = go.Figure()
    figure.add_scatter(
        x=ends, y=ends, mode="lines", hoverinfo="skip", name="equal",
        line={"color": GRAY, "dash": "dash", "width": 1.4},
    )  # fmt: skip
    figure.add_scatter(
        x=table["attribution"], y=table["ablation"], mode="markers", name="features",
        marker={"size": 9, "color": PLUM, "opacity": 0.75},
        customdata=[f"{f} at {shown(t)}" for f, t in zip(table["feature"], table["token"],
                                                         strict=True)],
        hovertemplate="%{customdata}<br>estimated %{x:.4f}<br>measured %{y:.4f}<extra></extra>",
    )  # fmt: skip
    dressed(figure, "Gradient x activation (logits)", "Taken out (logits)", 340)
    return figure.update_layout(showlegend=False).update_xaxes(showgrid=True, gridcolor=GRID)


def dressed(figure: go.Figure, x_title: str, y_title: str, height: int) -> go.Figure:
    """A figure without a ground of its own, with titles on its axes."""
    figure.update_layout(
        height=height, margin={"l": 8, "r": 8, "t": 30, "b": 8}, legend=LEGEND,
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", hoverlabel={"align": "left"},
    )  # fmt: skip
    figure.update_xaxes(title_text=x_title, zeroline=False, automargin=True, showgrid=False)
    figure.update_yaxes(title_text=y_title, zeroline=False, automargin=True, gridcolor=GRID)
    return figure


def _fitting(cells: Sequence[Sequence[str]] | None, width: int) -> list[list[str]] | None:
    """The texts of cells, cut to what there is room for; None where that is next to nothing."""
    letters = int(MAP_WIDTH / width / LETTER)
    if cells is None or letters < 3:
        return None
    return [[shown(text[:letters]) if text else "" for text in row] for row in cells]


def _columns(texts: Sequence[str]) -> list[str]:
    return [f"{i} {shown(text)}" for i, text in enumerate(texts)]


LEGEND = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left"}
"""Above the axes, at the left."""
