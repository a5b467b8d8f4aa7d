"""A bar chart of `app.figures` as SVG: for files that have to show it without a script."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from app.style import GOLD
from app.wording import escaped, short

WIDTH, HEIGHT = 640.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 8.0, 8.0, 44.0
"""Space around the bars, for titles and ticks."""


def bars_svg(figure: go.Figure) -> str:
    """A figure of one trace of bars on a logarithmic count axis, at any width.

    Args:
        figure: of `app.figures.activation_figure`.
    """
    traces: Any = figure.data
    (bars,) = traces
    axis = figure.layout.xaxis
    centres, counts, widths = ([float(v) for v in part] for part in (bars.x, bars.y, bars.width))
    low, high = centres[0] - widths[0] / 2, centres[-1] + widths[-1] / 2
    top = max(math.log10(max(*counts, 10)) * 1.05, 1.0)
    parts = [
        *_rows(top),
        *(
            _bar(centre, count, width, low, high, top)
            for centre, count, width in zip(centres, counts, widths, strict=True)
            if count
        ),
        *_ticks(axis.tickvals or (), axis.ticktext or (), low, high),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, axis.title.text, "middle"),
        f'<text transform="translate(12 {HEIGHT / 2 - 10}) rotate(-90)" text-anchor="middle" '
        f'class="lg-axis">{escaped(figure.layout.yaxis.title.text)}</text>',
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'class="lg-chart">{"".join(parts)}</svg>'
    )


def _across(value: float, low: float, high: float) -> float:
    return LEFT + (value - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)


def _up(power: float, top: float) -> float:
    """Height of a power of ten; the axis begins a third of a decade below 1."""
    return TOP + (top - power) / (top + 0.35) * (HEIGHT - TOP - BOTTOM)


def _bar(centre: float, count: float, width: float, low: float, high: float, top: float) -> str:
    left, right = (_across(centre + side * width / 2, low, high) for side in (-1, 1))
    upper = _up(math.log10(count), top)
    return (
        f'<rect x="{left:.1f}" y="{upper:.1f}" width="{right - left:.1f}" '
        f'height="{HEIGHT - BOTTOM - upper:.1f}" fill="{GOLD}"><title>{count:,.0f}</title></rect>'
    )


def _rows(top: float) -> list[str]:
    """A line and a number at each power of ten."""
    parts = []
    for power in range(int(top) + 1):
        y = _up(float(power), top)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" class="lg-grid"/>')
        parts.append(_text(LEFT - 6, y + 4, short(10**power), "end"))
    return parts


def _ticks(values: Sequence[float], names: Sequence[str], low: float, high: float) -> list[str]:
    return [
        _text(_across(value, low, high), HEIGHT - BOTTOM + 16, name, "middle")
        for value, name in zip(values, names, strict=True)
        if low <= value <= high
    ]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="lg-axis">'
        f"{escaped(text)}</text>"
    )
