"""The figures of the top-AFA study."""

import math

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses import plots
from analyses.plots import Axis, Line
from analyses.statistics import Estimate, mean_interval
from analyses.top_afa_findings import comparisons
from analyses.top_afa_measured import LABELS, Family, Measured, Result, advantage, over_seeds

COMPARED: tuple[Family, ...] = ("topk", "batch_topk", "top_afa")
WEDGES = (0.25, 0.5)
"""Values of epsilon (h - 1) whose bounds a ZF plot shades."""


def figures(measured: Measured) -> dict[str, go.Figure]:
    """The figures by name."""
    return {
        "fidelity_against_l0": fidelity_figure(measured),
        "matched_l0": matched_figure(measured),
        "settling": settling_figure(measured),
        "choice_of_setting": choice_figure(measured),
        "zf": zf_figure(measured),
    }


def fidelity_figure(measured: Measured) -> go.Figure:
    """FVU and CE lost against L0, a column for each layer."""
    layers = measured.settings.layers
    figure = make_subplots(
        rows=2, cols=len(layers), shared_xaxes=True, shared_yaxes=True, vertical_spacing=0.06,
        horizontal_spacing=0.03, column_titles=[f"layer {layer}" for layer in layers],
        row_titles=["FVU", "1 - CE recovered"],
    )  # fmt: skip
    for column, layer in enumerate(layers, start=1):
        for place, family in enumerate(COMPARED):
            results = measured.pick(family, layer=layer)
            values = sorted({r.cell.setting for r in results})
            by_setting = [[r for r in results if r.cell.setting == v] for v in values]
            for row, value in ((1, lambda r: r.fact("fvu")), (2, _ce_lost)):
                _add_curve(figure, by_setting, value, place, row, column, LABELS[family])
    for update, whole in ((figure.update_xaxes, True), (figure.update_yaxes, False)):
        ticks = [digit * 10.0**power for power in range(-4, 5) for digit in (1, 3)]
        shown = [tick for tick in ticks if (tick >= 1) == whole]
        update(type="log", tickvals=shown, ticktext=[f"{tick:g}" for tick in shown])
    figure.update_xaxes(title_text="L0 (log)", row=2)
    return _dressed(figure, "Fidelity against the number of active latents", height=640)


def _ce_lost(result: Result) -> float:
    """1 - CE recovered; nan where it is not above 0, which a logarithm cannot show."""
    lost = 1 - result.fact("ce_recovered")
    return lost if lost > 0 else math.nan


def _add_curve(figure, by_setting, value, place: int, row: int, column: int, name: str) -> None:
    """One family's curve in one panel: means over seeds, intervals as bars."""
    ys = [over_seeds(results, value) for results in by_setting]
    xs = [over_seeds(results, lambda r: r.fact("l0")) for results in by_setting]
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None]
    colour = plots.SERIES[place]
    figure.add_scatter(
        x=[x.value for x, _ in pairs], y=[y.value for _, y in pairs], name=name,
        mode="lines+markers", legendgroup=name, showlegend=row == column == 1,
        line={"color": colour, "dash": plots.DASHES[place]},
        marker={"symbol": plots.MARKERS[place], "size": 9, "color": colour},
        error_y=_bars([y for _, y in pairs], colour), row=row, col=column,
        hovertemplate=f"{name}<br>L0 %{{x:.4g}}<br>%{{y:.4g}}<extra></extra>",
    )  # fmt: skip


def _bars(estimates: list[Estimate], colour: str) -> dict[str, object]:
    """Intervals as error bars; a lower end that a logarithm cannot show stops at the point."""
    return {
        "type": "data", "symmetric": False, "color": colour, "thickness": 1.4, "width": 4,
        "array": [0 if e.high is None else e.high - e.value for e in estimates],
        "arrayminus": [
            0 if e.low is None or e.low <= 0 else e.value - e.low for e in estimates
        ],
    }  # fmt: skip


def matched_figure(measured: Measured) -> go.Figure:
    """What each saves of TopK's FVU at the same L0."""
    found = {n: advantage(measured, results) for n, results in comparisons(measured).items()}
    shown = {name: value for name, value in found.items() if value is not None}
    axis = Axis(title="Share of TopK's FVU saved at the same L0", percent=True)
    return plots.bars(shown, title="Against TopK at matched L0", x=axis)


def settling_figure(measured: Measured) -> go.Figure:
    """top-AFA's L0 in training, at the middle layer."""
    series = []
    for afa in measured.settings.afas:
        results = measured.pick("top_afa", layer=measured.settings.middle, setting=afa)
        courses = np.array([[l0 for _, l0 in r.course] for r in results])
        series.append(
            Line(
                name=f"lambda {afa:.4g}",
                x=[float(step) for step, _ in results[0].course],
                y=[mean_interval(column) for column in courses.T],
            )
        )
    return plots.lines(
        series,
        title=f"Active latents in training, layer {measured.settings.middle}",
        x=Axis(title="Step"),
        y=Axis(title="L0 of the batch", from_zero=True),
        levels={f"d = {measured.d_in}": float(measured.d_in)},
    )


def choice_figure(measured: Measured) -> go.Figure:
    """FVU against the setting, counted from the smallest of its grid."""
    series = []
    for family in COMPARED:
        results = measured.pick(family, layer=measured.settings.middle)
        values = sorted({r.cell.setting for r in results})
        found = [
            over_seeds([r for r in results if r.cell.setting == v], lambda r: r.fact("fvu"))
            for v in values
        ]
        known = [(v, y) for v, y in zip(values, found, strict=True) if y is not None]
        setting = "lambda" if family == "top_afa" else "k"
        series.append(
            Line(
                name=f"{LABELS[family]}, {setting} from {values[0]:.3g}",
                x=[v / values[0] for v, _ in known],
                y=[y for _, y in known],
            )
        )
    return plots.lines(
        series,
        title=f"What the choice of the setting changes, layer {measured.settings.middle}",
        x=Axis(
            title="Setting over the smallest of its grid (log)",
            log=True,
            ticks=tuple(k / measured.settings.ks[0] for k in measured.settings.ks),
        ),
        y=Axis(title="FVU", from_zero=True),
    )


def zf_figure(measured: Measured) -> go.Figure:
    """Norm of the code against norm of the input, a dot a row, first seed, middle layer."""
    s = measured.settings
    middle_k = float(s.ks[len(s.ks) // 2])
    shown: dict[str, list[Result]] = {
        f"TopK, k = {middle_k:g}": measured.pick("topk", layer=s.middle, setting=middle_k, seed=0),
        f"top-AFA, lambda = {s.middle_afa:.3g}": measured.pick(
            "top_afa", layer=s.middle, setting=s.middle_afa, seed=0
        ),
        "rows not standardised": measured.pick(
            "top_afa", rows="scale", setting=s.middle_afa, seed=0
        ),
    }
    figure = make_subplots(rows=1, cols=len(shown), subplot_titles=list(shown))
    for column, (name, results) in enumerate(shown.items(), start=1):
        _add_zf(figure, results[0], column, name)
    figure.update_xaxes(title_text="norm of the input")
    figure.update_yaxes(title_text="norm of the code", col=1)
    figure.update_layout(showlegend=False)
    return _dressed(figure, "ZF plot: below the dashed line codes are under-activated", height=430)


def _add_zf(figure: go.Figure, result: Result, column: int, name: str) -> None:
    """The dots, the line of equal norms, and the bounds for two coherences."""
    x, y = result.zf["input_norm"], result.zf["code_norm"]
    low, high = min(x) * 0.97, max(x) * 1.03
    for bound in WEDGES:
        slopes = [math.sqrt(1 / (1 + sign * bound)) for sign in (1, -1)]
        figure.add_scatter(
            x=[low, high, high, low],
            y=[slopes[0] * low, slopes[0] * high, slopes[1] * high, slopes[1] * low],
            fill="toself", fillcolor="rgba(44,111,179,.08)", line={"width": 0}, mode="lines",
            hoverinfo="skip", row=1, col=column,
        )  # fmt: skip
    figure.add_scatter(
        x=[low, high], y=[low, high], mode="lines", hoverinfo="skip", row=1, col=column,
        line={"color": plots.INK, "dash": "dash", "width": 1.2},
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=y, mode="markers", name=name, row=1, col=column,
        marker={"size": 4, "color": plots.PLUM, "opacity": 0.55},
        hovertemplate="input %{x:.4g}<br>code %{y:.4g}<extra></extra>",
    )  # fmt: skip


def _dressed(figure: go.Figure, title: str, height: int) -> go.Figure:
    """The look of all figures, for one of several panels."""
    figure.update_layout(
        template=plots.TEMPLATE, title_text=title, width=plots.WIDTH, height=height,
        margin={"t": 96},
        legend={"orientation": "h", "y": 1.07, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )  # fmt: skip
    return figure
