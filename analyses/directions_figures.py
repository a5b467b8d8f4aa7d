"""The figures of the directions study."""

import numpy as np
import plotly.graph_objects as go

from analyses import plots
from analyses.directions_findings import (
    auroc_by_place,
    effect_estimates,
    own_estimate,
    spread,
)
from analyses.directions_measured import Chosen, Measured
from analyses.plots import Axis, Line
from analyses.statistics import Estimate

HALF_UP = [[0.0, plots.RUST], [0.5, plots.PAPER], [1.0, plots.BLUE]]
"""AUROC 0, one half (chance) and 1."""


def figures(measured: Measured) -> dict[str, go.Figure]:
    """The figures by name."""
    found = {
        "AUROC_by_layer": layers_figure(measured),
        "AUROC_by_layer_and_position": places_figure(measured),
        "projections": projections_figure(measured),
    }
    if measured.chosen is not None:
        found["effects"] = effects_figure(measured.chosen)
        found["candidates"] = candidates_figure(measured.chosen)
    return found


def layers_figure(measured: Measured) -> go.Figure:
    """AUROC at the chosen position by layer, beside the controls."""
    trained, twin = auroc_by_place(measured.trained), auroc_by_place(measured.twin)
    p, n = measured.place[1], len(measured.trained.labels) // 2
    sites = range(len(measured.sites))
    x = [site.layer if site.layer is not None else s for s, site in enumerate(measured.sites)]
    series = [
        Line(name="difference of means", x=x, y=[own_estimate(trained, s, p, n) for s in sites]),
        Line(name="random directions", x=x, y=[spread(trained.random[s, p]) for s in sites]),
        Line(name="shuffled labels", x=x, y=[spread(trained.shuffled[s, p]) for s in sites]),
        Line(name="random-weight twin", x=x, y=[own_estimate(twin, s, p, n) for s in sites]),
    ]
    figure = plots.lines(
        series,
        title=f"Held-out AUROC by layer, position {measured.position}",
        x=Axis(title=f"Layer ({measured.config.site})"),
        y=Axis(title="AUROC"),
        levels={"chance": 0.5},
    )
    figure.update_yaxes(range=[0.0, 1.05])
    return figure


def places_figure(measured: Measured) -> go.Figure:
    """AUROC at every layer and position."""
    places = auroc_by_place(measured.trained)
    texts = measured.position_texts
    names = [f"{p}  {texts[-p - 1]!r}" if -p <= len(texts) else str(p) for p in measured.positions]
    x = [site.layer for site in measured.sites]
    figure = go.Figure(
        go.Heatmap(
            z=places.own.T, x=x, y=names, zmin=0, zmax=1, colorscale=HALF_UP,
            colorbar={"title": {"text": "AUROC"}, "thickness": 14},
            hovertemplate="layer %{x}, position %{y}<br>AUROC %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_scatter(
        x=[x[measured.place[0]]], y=[names[measured.place[1]]], mode="markers",
        marker={"symbol": "circle-open", "size": 18, "color": plots.INK, "line": {"width": 2.5}},
        hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    return _dressed(
        figure,
        "Held-out AUROC by layer and position (circle: the chosen direction)",
        f"Layer ({measured.config.site})",
        "Position",
    )


def projections_figure(measured: Measured) -> go.Figure:
    """Test prompts' projections on the chosen direction, a dot a prompt."""
    values = measured.trained.own[(slice(None), *measured.place)]
    rng = np.random.default_rng(0)
    figure = go.Figure()
    groups = (
        (measured.contrast.positive, 1, plots.PLUM),
        (measured.contrast.negative, 0, plots.BLUE),
    )
    for place, (name, label, colour) in enumerate(groups):
        chosen = values[measured.trained.labels == label]
        figure.add_scatter(
            x=chosen, y=-place + rng.uniform(-0.28, 0.28, len(chosen)), name=name, mode="markers",
            marker={"color": colour, "size": 9, "opacity": 0.75, "symbol": plots.MARKERS[place]},
            hovertemplate=f"{name}: %{{x:.4g}}<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(
        tickvals=[0, -1], ticktext=[name for name, *_ in groups], showgrid=False, range=[-1.6, 0.6]
    )
    figure.update_layout(showlegend=False)
    return _dressed(
        figure,
        f"Held-out prompts on the chosen direction ({measured.site}, position {measured.position})",
        "Projection on the direction of length 1",
        "",
    )


def effects_figure(chosen: Chosen) -> go.Figure:
    """How far test prompts' score moves the expected way: down by ablation, up by addition."""
    shown = {
        name: _turned(e) if name.startswith("ablated") else e
        for name, e in effect_estimates(chosen.effects).items()
    }
    return plots.bars(
        shown,
        title="How far the score of test prompts moves the expected way, beside controls",
        x=Axis(title="Fall of the score (ablated) or rise (added), nats"),
    )


def _turned(estimate: Estimate) -> Estimate:
    """The negative of an estimate."""
    return Estimate(
        value=-estimate.value,
        low=None if estimate.high is None else -estimate.high,
        high=None if estimate.low is None else -estimate.low,
        n=estimate.n,
    )


def candidates_figure(chosen: Chosen) -> go.Figure:
    """What every candidate does on validation prompts."""
    figure = go.Figure()
    rows = list(enumerate(zip(chosen.candidates, chosen.selection.misses, strict=True)))
    for place, (name, passing) in enumerate(
        (("meets all criteria", True), ("misses a criterion", False))
    ):
        members = [(n, c) for n, (c, misses) in rows if (not misses) == passing]
        figure.add_scatter(
            x=[c.ablated for _, c in members], y=[c.added for _, c in members], name=name,
            mode="markers+text", textposition="top center",
            text=[f"{c.site.layer}, {c.position}" if len(rows) <= 24 else "" for _, c in members],
            textfont={"size": 11, "color": plots.FAINT_INK},
            customdata=[[str(c.site), c.position, c.kl] for _, c in members],
            marker={"size": 10, "symbol": plots.MARKERS[place], "color": plots.SERIES[place]},
            hovertemplate="%{customdata[0]}, position %{customdata[1]}<br>ablated %{x:.3f}, added "
            "%{y:.3f}<br>KL %{customdata[2]:.4f}<extra></extra>",
        )  # fmt: skip
    best = chosen.candidates[chosen.selection.chosen]
    figure.add_scatter(
        x=[best.ablated], y=[best.added], name="chosen", mode="markers", hoverinfo="skip",
        marker={"symbol": "circle-open", "size": 18, "color": plots.INK, "line": {"width": 2.5}},
    )  # fmt: skip
    dotted = {"color": plots.GRAY, "dash": "dot"}
    figure.add_hline(
        y=chosen.criteria.added, line=dotted, annotation_text="least that is wanted",
        annotation_position="bottom left", annotation_font_color=plots.FAINT_INK,
    )  # fmt: skip
    figure.add_vline(
        x=chosen.plain[0], line=dotted, annotation_text="nothing ablated",
        annotation_position="bottom left", annotation_font_color=plots.FAINT_INK,
    )  # fmt: skip
    figure.update_layout(
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"}
    )
    return _dressed(
        figure,
        "Candidates (layer, position) on validation prompts",
        "Score of positive prompts, ablated (nats)",
        "Score of negative prompts, added (nats)",
    )


def _dressed(figure: go.Figure, title: str, x: str, y: str) -> go.Figure:
    """The look of all figures."""
    figure.update_layout(
        template=plots.TEMPLATE, title_text=title, width=plots.WIDTH, height=plots.HEIGHT
    )
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figure
