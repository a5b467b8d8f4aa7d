"""Where and when a feature of an image model fires, over all images: figure and table."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float, Int

from app.tiles import DARKEST, SCALE
from app.wording import number, percent

HEIGHT = 250


def place_figure(
    mean: Float[np.ndarray, "h w"],
    firings: Int[np.ndarray, "h w"],
    *,
    aspect: float,
) -> go.Figure:
    """The mean activation at each place of all images, as a map of squares.

    Args:
        mean: over all images and steps, silent ones as 0.
        firings: how often it fires at each place.
        aspect: height over width of the images.
    """
    from plotly.colors import sample_colorscale

    points = np.linspace(DARKEST, 1, 24)
    colours = [[float(i / 23), c] for i, c in enumerate(sample_colorscale(SCALE, points.tolist()))]
    figure = go.Figure(
        go.Heatmap(
            z=np.where(firings > 0, mean, np.nan),
            customdata=firings,
            colorscale=colours,
            zmin=0,
            hoverongaps=False,
            xgap=1,
            ygap=1,
            hovertemplate="y %{y}, x %{x}<br>mean activation %{z:.4g}"
            "<br>fires %{customdata:,} times<extra></extra>",
            colorbar={"thickness": 10, "len": 0.9, "outlinewidth": 0, "title": {"text": "mean"}},
        )
    )
    height, width = mean.shape
    figure.update_layout(
        height=HEIGHT,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(128,120,112,.12)",
    )
    axis = {"showgrid": False, "zeroline": False, "constrain": "domain"}
    figure.update_xaxes(**axis, range=[-0.5, width - 0.5], tickvals=_few(width), title_text="x")
    figure.update_yaxes(
        **axis, range=[height - 0.5, -0.5], tickvals=_few(height), title_text="y",
        scaleanchor="x", scaleratio=aspect * width / height,
    )  # fmt: skip
    return figure


def _few(n: int) -> list[int]:
    """Some of the numbers up to `n`, the first and the last among them."""
    return sorted({round(i * (n - 1) / 3) for i in range(4)})


def steps_frame(steps: pd.DataFrame, *, guided_rows: bool) -> pd.DataFrame:
    """When a feature fires, a row a step, as a person reads it.

    Args:
        steps: of `saes.feature_places`.
        guided_rows: the index has passes with and without the prompt.
    """
    shown = {"step": [str(step + 1) for step in steps["step"]]}
    if guided_rows:
        shown["pass"] = ["with prompt" if one else "without" for one in steps["conditional"]]
    shown |= {
        "share of its firings": [percent(share) for share in steps["share"]],
        "density": [percent(density) for density in steps["density"]],
        "mean": [number(mean) for mean in steps["mean"]],
    }
    return pd.DataFrame(shown)
