"""The figures of the k-sparse study."""

import plotly.graph_objects as go

from analyses import plots, support_recovery
from analyses.ksparse_findings import alpha_error
from analyses.ksparse_measured import (
    LABELS,
    Measured,
    at_setting,
    dead_units,
    error,
    fact,
    spread,
    wrong,
)
from analyses.plots import Axis, Line, Point
from analyses.statistics import crossed_interval

ALPHA_LINES = 4
"""Values of k whose errors are drawn against alpha."""


def figures(measured: Measured) -> dict[str, go.Figure]:
    """The figures by name."""
    return {
        "error_by_k": error_by_k(measured),
        "methods": methods_figure(measured),
        "alpha": alpha_figure(measured),
        "annealing": annealing_figure(measured),
        "error_and_fidelity": fidelity_figure(measured),
        "filters": plots.image_grid(
            measured.filters,
            title="Filters of some units (blue positive, rust negative)",
            columns=5,
        ),
        "theorem": theorem_figure(measured),
    }


ERROR = Axis(title="Linear probe error (% of test images)")


def k_axis(measured: Measured) -> Axis:
    """The axis of k."""
    return Axis(title="Active units k (log)", log=True, ticks=tuple(map(float, measured.config.ks)))


def error_by_k(measured: Measured) -> go.Figure:
    """Probe error against k."""
    ks, n_test = measured.config.ks, measured.n[2]
    sweeps = [measured.sweep(k) for k in ks]
    return plots.lines(
        [
            Line(name="alpha by validation", x=ks, y=[error(cells, n_test) for cells in sweeps]),
            Line(
                name="alpha = 1",
                x=ks,
                y=[crossed_interval(wrong(at_setting(cells, 1.0), n_test)) for cells in sweeps],
            ),
        ],
        title="Linear probe error on k-sparse codes (bands: 95 %)",
        x=k_axis(measured),
        y=ERROR,
        levels={
            LABELS[method]: error(measured.rival(method), n_test).value
            for method in LABELS
            if method != "k_sparse"
        },
    )


def methods_figure(measured: Measured) -> go.Figure:
    """Probe error of every method."""
    errors = {label: error(measured.rival(m), measured.n[2]) for m, label in LABELS.items()}
    return plots.bars(errors, title="Linear probe error by method", x=ERROR)


def alpha_figure(measured: Measured) -> go.Figure:
    """Probe error against alpha for some k."""
    series = []
    for k in spread(measured.config.ks, ALPHA_LINES):
        errors = {alpha: alpha_error(measured, k, alpha) for alpha in measured.config.alphas}
        known = {alpha: e for alpha, e in errors.items() if e is not None}
        series.append(Line(name=f"k = {k}", x=list(known), y=list(known.values())))
    return plots.lines(
        series,
        title="Keeping alpha k units for the probe (bands: 95 %)",
        x=Axis(title="alpha (units kept / units active in training)", ticks=measured.config.alphas),
        y=ERROR,
    )


def annealing_figure(measured: Measured) -> go.Figure:
    """Dead units against k, with and without annealing."""
    ks, small = measured.config.ks, measured.config.small_ks
    cells = {
        "annealed": {k: measured.sweep(k) for k in ks},
        "k from the start": {k: measured.cells("k_sparse", k=k) for k in small},
    }
    series = [
        Line(name=name, x=list(some), y=[dead_units(results) for results in some.values()])
        for name, some in cells.items()
        if some and all(some.values())
    ]
    return plots.lines(
        series,
        title="Units that fire on no training image (bands: 95 %)",
        x=k_axis(measured),
        y=Axis(title="Dead units (% of all)", from_zero=True),
    )


def fidelity_figure(measured: Measured) -> go.Figure:
    """Probe error against reconstruction error."""
    shown = [
        Point(
            name=f"k = {k}",
            x=fact(measured.sweep(k), "fvu"),
            y=error(measured.sweep(k), measured.n[2]),
            group="k-sparse",
        )
        for k in measured.config.ks
    ]
    return plots.points(
        shown,
        title="Probe error against reconstruction error (intervals: 95 %)",
        x=Axis(
            title="Fraction of variance unexplained on test images (FVU, log)",
            log=True,
            ticks=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
        ),
        y=ERROR,
    )


def theorem_figure(measured: Measured) -> go.Figure:
    """Share of supports found against the theorem's condition."""
    rates = support_recovery.recovery_rates(measured.trials)
    series = [
        Line(name=family, x=[place for place, _ in found], y=[rate for _, rate in found])
        for family, found in rates.items()
        if found
    ]
    figure = plots.lines(
        series,
        title="Supports found by the k-sparse encoder (bands: 95 %)",
        x=Axis(
            title="2 k mu z_1 / z_k (the theorem speaks up to 1; log)",
            log=True,
            ticks=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        ),
        y=Axis(title="Supports found (% of trials)", percent=True, from_zero=True),
        steps=True,
    )
    figure.add_vline(x=1, line={"color": plots.INK, "width": 1.4, "dash": "dash"})
    return figure
