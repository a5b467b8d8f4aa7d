"""The figures of the benchmark: curves over latents, bars of absorption, histograms of cosines."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from analyses.benchmark_measured import NAMES, Measured, Results
from analyses.plots import HEIGHT, SERIES, TEMPLATE, WIDTH, Axis, Line, bars, lines

BIN = 0.01
"""Width of a histogram's bin."""


def figures(measured: Results) -> dict[str, go.Figure]:
    """A figure for each suite that was measured."""
    drawn = {}
    if found := measured.of("probing"):
        drawn["probing"] = probing_figure(found)
    if found := measured.of("tpp"):
        title = "Targeted probe perturbation"
        drawn[NAMES["tpp"]] = perturbation_figure(found, title, "TPP score")
    if found := measured.of("scr", measured.headline_target):
        title = f"Spurious-correlation removal: {measured.headline_target}"
        drawn[NAMES["scr"]] = perturbation_figure(found, title, "SCR score")
    if found := measured.of("absorption"):
        drawn["absorption"] = absorption_figure(found)
    if measured.matched:
        title = "Latents matched one to one"
        drawn["matching"] = histograms(measured.matched, title, "|cosine| of a latent's partner")
    if measured.nearest:
        title = "Coherence of the dictionary"
        drawn["coherence"] = histograms(
            measured.nearest, title, "largest |cosine| with another latent of the dictionary"
        )
    return drawn


def probing_figure(found: Sequence[Measured]) -> go.Figure:
    """Accuracy over the number of latents; what sees the whole activation as levels."""
    curves = _curves(found, "dense")
    return lines(
        curves,
        title="Classes of texts from k latents",
        x=Axis(title="latents that the probe sees (k)", log=True, ticks=_ticks(curves)),
        y=Axis(title="mean accuracy on test texts", percent=True),
        levels=_levels(found, "dense") | {"guessing": 0.5},
    )


def perturbation_figure(found: Sequence[Measured], title: str, score: str) -> go.Figure:
    """A score over the number of latents taken out."""
    curves = _curves(found, "probe")
    return lines(
        curves,
        title=title,
        x=Axis(title="latents, components or channels taken out", log=True, ticks=_ticks(curves)),
        y=Axis(title=score, from_zero=True),
        levels=_levels(found, "probe"),
    )


def _levels(found: Sequence[Measured], control: str) -> dict[str, float]:
    """The control that has no place on the axis of k or n, by name."""
    return {each.label: each.estimate.value for each in found if each.name == control}


def _curves(found: Sequence[Measured], control: str) -> list[Line]:
    """A line a dictionary, over k or n, without that control."""
    grouped: dict[tuple[str, str], list[Measured]] = {}
    for each in found:
        if each.name == control:
            continue
        grouped.setdefault((each.subject, each.name), []).append(each)
    return [
        Line(
            name=line[0].label,
            x=[float(each.setting) for each in line],
            y=[each.estimate for each in line],
        )
        for line in grouped.values()
    ]


def _ticks(curves: Sequence[Line]) -> tuple[float, ...]:
    return tuple(sorted({place for line in curves for place in line.x}))


def absorption_figure(found: Sequence[Measured]) -> go.Figure:
    """Mean absorption under both rules: of every dictionary, and the controls of the first."""
    own = found[0].name
    shown = [each for each in found if each.subject == "sae" or "/" not in each.name]
    shown = [each for each in shown if "/" not in each.name or each.name.startswith(f"{own}/")]
    shown.sort(key=lambda each: each.setting)
    return bars(
        {f"{each.label} ({each.setting})": each.estimate for each in shown},
        title="First-letter absorption, by rule",
        x=Axis(title="share that other latents carry", from_zero=True),
    )


def histograms(values: Mapping[str, np.ndarray], title: str, x: str) -> go.Figure:
    """Distributions over latents, as outlines on one axis."""
    edges = np.arange(0, 1 + BIN / 2, BIN)
    figure = go.Figure()
    for number, (name, each) in enumerate(values.items()):
        shares = np.histogram(np.clip(each, 0, 1), edges)[0] / max(len(each), 1)
        figure.add_scatter(
            x=edges[:-1] + BIN / 2,
            y=shares,
            name=name,
            mode="lines",
            line={"color": SERIES[number % len(SERIES)], "width": 2.4, "shape": "hvh"},
        )
    figure.update_layout(
        template=TEMPLATE,
        title_text=title,
        width=WIDTH,
        height=HEIGHT,
        legend={"x": 0.99, "xanchor": "right", "y": 0.99, "yanchor": "top"},
    )
    figure.update_xaxes(title_text=x, range=[0, 1])
    figure.update_yaxes(title_text="share of latents", rangemode="tozero")
    return figure
