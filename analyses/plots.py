"""Figures of reports (plotly): one look for all of them, readable at 900 x 480 pixels.

Seven forms: `lines` with bands and `panels` of them, `points` with intervals, `bars` and
`grouped_bars` with intervals, `heat_maps`, `image_grid`. Every interval is a 95 % one
(`analyses.statistics.Estimate`).

Colours follow the dashboard's, in an order in which neighbours differ in lightness as well as hue,
so they can be told apart without colour vision; lines also differ in dash and marker, and `lines`
names each at its right end. Signed pictures run from rust (negative) over paper white to blue
(positive), as logits do in the dashboard.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from analyses.statistics import Estimate

WIDTH, HEIGHT = 900, 480
"""Pixels of a figure as the report's picture shows it."""
ABOVE, BELOW = 60, 78
"""Pixels above and below the axes."""
PLUM, BLUE, GOLD, GREEN, RUST = "#a04a70", "#2c6fb3", "#c08a12", "#3a7d6b", "#b8562b"
VIOLET, GRAY = "#6b5b95", "#8b8680"
SERIES = (PLUM, BLUE, GOLD, GREEN, RUST, VIOLET, GRAY)
"""The colours of the dashboard's charts, in its order."""
PAPER, INK, FAINT_INK, GRID = "#fdfcf9", "#2a2522", "#6b6661", "rgba(128,120,112,.22)"
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
SIGNED = [[0.0, RUST], [0.5, PAPER], [1.0, BLUE]]
"""Colour scale of signed pictures."""
HEAT = [[0.0, "#2b2140"], [0.35, "#7c3f6e"], [0.7, "#d98a5b"], [1.0, "#f6e7c8"]]
"""Colour scale of amounts."""
LEVELS = 127
"""Steps of brightness on either side of zero in a picture: one byte a pixel in the JSON."""
LINE_HEIGHT = 19
"""Pixels between the names of two lines."""
PANEL_HEIGHT = 250
"""Pixels of a row of panels."""
LEGEND_HEIGHT = 30
"""Pixels of a legend between the title and rows of panels."""
GAP = 1
"""Pixels between the images of a grid."""

FONT = "Source Sans, Source Sans 3, Noto Sans, DejaVu Sans, Arial, sans-serif"
AXIS = {
    "gridcolor": GRID, "zeroline": False, "ticks": "outside", "automargin": True,
    "title": {"font": {"size": 16}, "standoff": 12},
}  # fmt: skip
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 15, "color": INK},
        "title": {"font": {"size": 18}, "x": 0.01, "xanchor": "left", "y": 0.97, "yanchor": "top"},
        "colorway": list(SERIES),
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "margin": {"l": 80, "r": 30, "t": ABOVE, "b": BELOW},
        "hoverlabel": {"align": "left"},
        "xaxis": AXIS,
        "yaxis": AXIS,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of a figure: one estimate at each place."""

    name: str
    """What it shows, in a few words."""
    x: Sequence[float | int]
    """Places, ascending."""
    y: Sequence[Estimate]
    """What was measured there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of a figure, each coordinate with its interval."""

    name: str
    """What it is, in a few words."""
    x: Estimate
    """Horizontal."""
    y: Estimate
    """Vertical."""
    group: str
    """Points of one group share colour and marker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """An axis."""

    title: str
    """What it shows and, in brackets, its unit."""
    log: bool = False
    """Logarithmic; all values must then be above 0."""
    percent: bool = False
    """Values are shares, and read as per cent."""
    from_zero: bool = False
    """Starts at 0."""
    ticks: tuple[float, ...] = ()
    """Places of the ticks; chosen by plotly where empty."""
    decades: bool = False
    """Logarithmic over several powers of ten, which alone are labelled."""

    def place(self, value: float | int) -> float:
        """Where a value lies, in the units in which plotly places what is no trace."""
        return math.log10(value) if self.log else float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Where the name of a line goes."""

    name: str
    """The name."""
    x: float | None
    """Place of the line's end; None where it ends at the right margin."""
    y: float
    """Height of the line's end."""
    colour: str
    """Colour of the line."""


def lines(
    series: Sequence[Line],
    *,
    title: str,
    x: Axis,
    y: Axis,
    levels: Mapping[str, float] | None = None,
    steps: bool = False,
) -> go.Figure:
    """Lines with their intervals as bands, each named at its right end.

    `levels` are horizontal lines by name: what has no place on the horizontal axis. `steps` is for
    values that belong to ranges, their places being the middles: nothing is drawn between them.
    """
    figure = go.Figure()
    ends: list[End] = []
    furthest = max((place for line in series for place in line.x), default=0.0)
    shape = "hvh" if steps else "linear"
    for number, line in enumerate(series):  # bands lie under all lines
        _add_band(figure, line, SERIES[number % len(SERIES)], shape)
    for number, line in enumerate(series):
        colour = SERIES[number % len(SERIES)]
        figure.add_scatter(
            x=list(line.x), y=[e.value for e in line.y], name=line.name, mode="lines+markers",
            line={"color": colour, "width": 2.4, "dash": DASHES[number % len(DASHES)],
                  "shape": shape},
            marker={"symbol": MARKERS[number % len(MARKERS)], "size": 9, "color": colour},
            customdata=[_interval_text(e) for e in line.y],
            hovertemplate="%{x}: %{y:.4g} %{customdata}",
        )  # fmt: skip
        inside = None if line.x[-1] == furthest else x.place(line.x[-1])
        ends.append(End(name=line.name, x=inside, y=y.place(line.y[-1].value), colour=colour))
    for name, level in (levels or {}).items():
        figure.add_hline(y=level, line={"color": GRAY, "width": 1.6, "dash": "dot"})
        ends.append(End(name=name, x=None, y=y.place(level), colour=FAINT_INK))
    _dress(figure, title, x, y)
    reach = [y.place(value) for line in series for e in line.y for value in (e.value, e.low, e.high)
             if value is not None and (value > 0 or not y.log)]  # fmt: skip
    zero = [0.0] if y.from_zero and not y.log else []
    _name_ends(figure, ends, [*reach, *zero, *(end.y for end in ends)])
    return figure


def panels(
    shown: Mapping[str, Sequence[Line]], *, title: str, x: Axis, y: Axis, columns: int = 3
) -> go.Figure:
    """Small figures of lines side by side, by name; lines of one name share colour and legend."""
    n_rows = -(-len(shown) // columns)
    columns = min(columns, len(shown))
    figure = make_subplots(
        rows=n_rows, cols=columns, subplot_titles=list(shown), horizontal_spacing=0.09,
        vertical_spacing=0.16 / max(n_rows - 1, 1),
    )  # fmt: skip
    names = list(dict.fromkeys(line.name for series in shown.values() for line in series))
    seen: set[str] = set()
    for place, series in enumerate(shown.values()):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        for line in series:
            _add_band(figure, line, SERIES[names.index(line.name) % len(SERIES)], "linear", at)
        for line in series:
            number = names.index(line.name)
            colour = SERIES[number % len(SERIES)]
            figure.add_scatter(
                x=list(line.x), y=[e.value for e in line.y], name=line.name, mode="lines+markers",
                line={"color": colour, "width": 2, "dash": DASHES[number % len(DASHES)]},
                marker={"symbol": MARKERS[number % len(MARKERS)], "size": 6, "color": colour},
                customdata=[_interval_text(e) for e in line.y], legendgroup=line.name,
                hovertemplate="%{x}: %{y:.4g} %{customdata}", showlegend=line.name not in seen,
                **at,
            )  # fmt: skip
            seen.add(line.name)
    _dress(figure, title, x, y)
    figure.for_each_yaxis(lambda axis: axis.update(title_text=""))
    figure.update_yaxes(title={"text": y.title, "font": {"size": 13}}, col=1)
    figure.for_each_xaxis(lambda axis: axis.update(title_text=""))
    figure.update_xaxes(title={"text": x.title, "font": {"size": 13}}, row=n_rows)
    top = ABOVE + LEGEND_HEIGHT
    height = top + BELOW + PANEL_HEIGHT * n_rows
    figure.update_layout(
        height=height,
        margin={"r": 24, "t": top},
        legend={"orientation": "h", "y": 1 - 0.7 * ABOVE / height, "yref": "container",
                "yanchor": "top", "x": 0.01, "xref": "container", "xanchor": "left"},
    )  # fmt: skip
    return figure


def _grouped(shown: Sequence[Point]) -> Iterator[tuple[str, list[Point], str, str]]:
    """Each group's name, points, colour and marker, in order of appearance."""
    for place, group in enumerate(dict.fromkeys(point.group for point in shown)):
        members = [point for point in shown if point.group == group]
        yield group, members, SERIES[place % len(SERIES)], MARKERS[place % len(MARKERS)]


def points(shown: Sequence[Point], *, title: str, x: Axis, y: Axis) -> go.Figure:
    """Points with intervals both ways, each named beside it; groups differ in colour and marker."""
    figure = go.Figure()
    for group, members, colour, marker in _grouped(shown):
        figure.add_scatter(
            x=[p.x.value for p in members], y=[p.y.value for p in members], name=group,
            text=[p.name for p in members], mode="markers+text", textposition="top right",
            textfont={"size": 12, "color": colour},
            marker={"symbol": marker, "size": 11, "color": colour},
            error_x=errors([p.x for p in members], colour),
            error_y=errors([p.y for p in members], colour),
            hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}",
        )  # fmt: skip
    _dress(figure, title, x, y)
    figure.update_layout(
        showlegend=len({point.group for point in shown}) > 1,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )
    return figure


def point_rows(shown: Sequence[Point], *, title: str, x: Axis, y: Axis) -> go.Figure:
    """A row a name with two points, each with its interval: `x` in the left panel, `y` right.

    For more points than can be named beside each other in `points`.
    """
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04)
    _dress(figure, title, x, Axis(title=""))
    for column, axis in enumerate((x, y), start=1):
        for group, members, colour, marker in _grouped(shown):
            estimates = [point.x if column == 1 else point.y for point in members]
            figure.add_scatter(
                x=[e.value for e in estimates], y=[point.name for point in members], name=group,
                mode="markers", error_x=errors(estimates, colour), showlegend=False,
                marker={"symbol": marker, "size": 9, "color": colour},
                customdata=[_interval_text(e) for e in estimates],
                hovertemplate="%{y}: %{x:.4g} %{customdata}", row=1, col=column,
            )  # fmt: skip
        figure.update_xaxes(title_text=axis.title, type="log" if axis.log else "linear", col=column)
        if axis.log:
            figure.update_xaxes(tickformat=",.6~g", dtick=1, col=column)
    names = [point.name for point in shown]
    figure.update_yaxes(
        categoryorder="array", categoryarray=names, autorange="reversed", ticks="", ticksuffix="  "
    )
    return figure.update_layout(height=ABOVE + BELOW + 30 * len(names))


def bars(measured: Mapping[str, Estimate], *, title: str, x: Axis) -> go.Figure:
    """Horizontal bars by name, the first at the top, each with its interval and its number."""
    estimates = list(measured.values())
    figure = go.Figure(
        go.Bar(
            x=[e.value for e in estimates], y=list(measured), orientation="h",
            marker={"color": PLUM, "line": {"width": 0}},
            error_x=errors(estimates, INK),
            customdata=[_interval_text(e) for e in estimates],
            hovertemplate="%{y}: %{x:.4g} %{customdata}<extra></extra>",
        )
    )  # fmt: skip
    _dress(figure, title, x, Axis(title=""))
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", ticksuffix="  ")
    figure.update_layout(bargap=0.42)
    for name, e in measured.items():
        figure.add_annotation(
            x=e.value if e.high is None else max(e.high, e.value), y=name, xanchor="left", xshift=6,
            text=f"{100 * e.value:.3g} %" if x.percent else f"{e.value:.3g}", showarrow=False,
        )  # fmt: skip
    return figure


def grouped_bars(
    measured: Mapping[str, Mapping[str, Estimate]], *, title: str, y: Axis
) -> go.Figure:
    """Upright bars side by side: a colour a series, a group a name, each with its interval."""
    figure = go.Figure()
    for place, (series, estimates) in enumerate(measured.items()):
        colour, shown = SERIES[place % len(SERIES)], list(estimates.values())
        figure.add_bar(
            x=list(estimates), y=[e.value for e in shown], name=series,
            marker={"color": colour, "line": {"width": 0}}, error_y=errors(shown, INK),
            customdata=[_interval_text(e) for e in shown],
            hovertemplate="%{x}: %{y:.4g} %{customdata}",
        )  # fmt: skip
    _dress(figure, title, Axis(title=""), y)
    figure.update_layout(
        barmode="group", bargap=0.25,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"t": ABOVE + LEGEND_HEIGHT},
    )  # fmt: skip
    return figure.update_xaxes(showgrid=False, ticks="")


def heat_maps(
    shown: Mapping[str, Float[np.ndarray, "r c"]],
    *,
    title: str,
    x: Axis,
    y: Axis,
    columns: Sequence[float | int | str],
    amount: str,
    limits: tuple[float, float],
    rows: Sequence[float | int | str] | None = None,
    across: int | None = None,
) -> go.Figure:
    """Maps side by side on one colour scale, dark for little: rows upwards, by columns.

    Args:
        shown: name of a panel -> its values; nan where there is none.
        title: of the figure.
        x: the columns' axis.
        y: the rows' axis.
        columns: places of the columns on their axis, or their names.
        amount: what the colour shows.
        limits: values of the scale's ends.
        rows: places of the rows, or their names; 0 and up where there are none.
        across: panels side by side; all of them where there is none.
    """
    wide = across or len(shown)
    tall = -(-len(shown) // wide)
    figure = make_subplots(
        rows=tall, cols=wide, subplot_titles=list(shown), horizontal_spacing=0.07 if tall == 1
        else 0.04, vertical_spacing=0.16,
    )  # fmt: skip
    for place, values in enumerate(shown.values()):
        row, column = divmod(place, wide)
        figure.add_trace(
            go.Heatmap(
                z=values, x=list(columns), y=list(rows or range(len(values))),
                zmin=limits[0], zmax=limits[1],
                colorscale=HEAT, showscale=place == len(shown) - 1,
                colorbar={"title": {"text": f"{amount}<br> ", "side": "top"}, "thickness": 12,
                          "outlinewidth": 0},
                hovertemplate=f"{x.title} %{{x}}, {y.title} %{{y}}: %{{z:.3g}}<extra></extra>",
            ),
            row=row + 1, col=column + 1,
        )  # fmt: skip
    _dress(figure, title, x, y)
    figure.update_xaxes(type="category" if isinstance(columns[0], str) else None)
    figure.update_yaxes(
        title_text="", type="category" if rows and isinstance(rows[0], str) else None
    )
    figure.update_yaxes(title_text=y.title, col=1)
    if tall > 1:
        figure.update_xaxes(title_text="")
        figure.update_xaxes(title_text=x.title, row=tall)
        figure.update_layout(height=HEIGHT + (tall - 1) * PANEL_HEIGHT // 2)
    figure.update_layout(margin={"t": ABOVE + LEGEND_HEIGHT, "r": 110})
    return figure


def image_grid(
    images: Mapping[str, Float[np.ndarray, "n h w"]], *, title: str, columns: int = 8
) -> go.Figure:
    """Signed images in panels side by side, each image scaled by its own largest absolute value.

    Args:
        images: name of a panel -> its images.
        title: of the figure.
        columns: images in a row of a panel.
    """
    figure = make_subplots(
        rows=1, cols=len(images), subplot_titles=list(images), horizontal_spacing=0.03
    )
    for place, panel in enumerate(images.values(), start=1):
        figure.add_trace(
            go.Heatmap(
                z=montage(panel, columns), zmin=-LEVELS, zmax=LEVELS, colorscale=SIGNED,
                showscale=False, hoverinfo="skip",
            ),
            row=1, col=place,
        )  # fmt: skip
        figure.update_yaxes(scaleanchor=f"x{place}" if place > 1 else "x", row=1, col=place)
    figure.update_layout(template=TEMPLATE, title_text=title, width=WIDTH, height=HEIGHT)
    figure.update_layout(margin={"l": 16, "r": 16, "t": 84, "b": 16})
    figure.update_xaxes(visible=False, constrain="domain")
    figure.update_yaxes(visible=False, autorange="reversed", constrain="domain")
    return figure


def montage(images: Float[np.ndarray, "n h w"], columns: int) -> np.ndarray:
    """Images in rows of `columns`, as one array of bytes -127 to 127 with gaps of 0 between them.

    An image that is zero everywhere stays so; the last row is filled with 0.
    """
    n, h, w = images.shape
    rows = math.ceil(n / columns)
    sheet = np.zeros((rows * (h + GAP) - GAP, columns * (w + GAP) - GAP), dtype=np.int8)
    for place, image in enumerate(images):
        top, left = place // columns * (h + GAP), place % columns * (w + GAP)
        largest = float(np.abs(image).max()) or 1.0
        sheet[top : top + h, left : left + w] = np.round(image / largest * LEVELS)
    return sheet


def _add_band(
    figure: go.Figure, line: Line, colour: str, shape: str, at: Mapping[str, int] | None = None
) -> None:
    """The intervals of a line as a band, where it has any; in a panel, where one is given."""
    known = [(x, e.low, e.high) for x, e in zip(line.x, line.y, strict=True) if e.low is not None]
    if not known:
        return
    places, low, high = zip(*known, strict=True)
    figure.add_scatter(
        x=[*places, *places[::-1]], y=[*high, *low[::-1]], fill="toself", mode="lines",
        fillcolor=_faded(colour, 0.16), line={"width": 0, "shape": shape}, hoverinfo="skip",
        showlegend=False, name=f"{line.name}, 95 % interval", **(at or {}),
    )  # fmt: skip


def _name_ends(figure: go.Figure, ends: Sequence[End], reach: Sequence[float]) -> None:
    """Names of lines: at the right margin, moved apart where they would overlap, or at their end.

    `reach` are places that the vertical axis has to show.
    """
    pixels = (HEIGHT - ABOVE - BELOW) / ((max(reach) - min(reach)) * 1.1 or 1.0)
    aside = [end for end in ends if end.x is None]
    places = _apart([end.y * pixels for end in aside], LINE_HEIGHT)
    shifts = [place - end.y * pixels for end, place in zip(aside, places, strict=True)]
    for end, shift in [
        *zip(aside, shifts, strict=True),
        *((end, LINE_HEIGHT / 2) for end in ends if end.x is not None),
    ]:
        figure.add_annotation(
            x=1 if end.x is None else end.x, xref="x domain" if end.x is None else "x", y=end.y,
            xanchor="left", xshift=8, yshift=shift, text=end.name, showarrow=False,
            font={"color": end.colour, "size": 13}, align="left",
        )  # fmt: skip
    longest = max((len(end.name) for end in aside), default=0)
    figure.update_layout(showlegend=False, margin={"r": 24 + 7.2 * longest})


def _apart(places: Sequence[float], distance: int) -> list[float]:
    """The places, moved as little as need be for neighbours to be `distance` apart.

    Neighbours that are too near are put side by side about their mean, again and again (the pool of
    adjacent violators, Barlow et al. 1972).
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    pools: list[list[float]] = []  # each the sum of wanted starts and the number of its members
    for rank, index in enumerate(order):
        pools.append([places[index] - rank * distance, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    starts = [total / count for total, count in pools for _ in range(int(count))]
    moved = [0.0] * len(places)
    for rank, index in enumerate(order):
        moved[index] = starts[rank] + rank * distance
    return moved


def _dress(figure: go.Figure, title: str, x: Axis, y: Axis) -> None:
    figure.update_layout(template=TEMPLATE, title_text=title, width=WIDTH, height=HEIGHT)
    for axis, update in ((x, figure.update_xaxes), (y, figure.update_yaxes)):
        update(title_text=axis.title)
        if axis.log:
            update(type="log", tickformat=",.6~g")
        if axis.decades:
            update(dtick=1)
        if axis.percent:
            update(tickformat=".3~%")
        if axis.from_zero:
            update(rangemode="tozero")
        if axis.ticks:
            update(tickvals=list(axis.ticks), ticktext=[f"{tick:g}" for tick in axis.ticks])


def errors(estimates: Sequence[Estimate], colour: str) -> dict[str, object]:
    """The intervals as plotly's `error_x` or `error_y`."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [0 if e.high is None else max(0.0, e.high - e.value) for e in estimates],
        "arrayminus": [0 if e.low is None else max(0.0, e.value - e.low) for e in estimates],
        "color": colour,
        "thickness": 1.6,
        "width": 5,
    }


def _interval_text(estimate: Estimate) -> str:
    return "" if estimate.low is None else f"[{estimate.low:.4g}, {estimate.high:.4g}]"


def _faded(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
