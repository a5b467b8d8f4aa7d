"""Figures of reports: what is drawn where, by hand."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analyses import plots
from analyses.plots import Axis, Line, Point
from analyses.statistics import Estimate


def known(value: float, reach: float = 0.5) -> Estimate:
    return Estimate(value=value, low=value - reach, high=value + reach, n=3)


def alone(value: float) -> Estimate:
    return Estimate(value=value, low=None, high=None, n=1)


def drawn(figure: Any) -> dict[str, Any]:
    """The figure as the browser gets it, arrays as lists."""
    return json.loads(json.dumps(figure.to_dict(), default=lambda array: array.tolist()))


def names_at(figure: Any, y: Axis, reach: tuple[float, float]) -> dict[str, float]:
    """Pixels from the bottom of the names of lines, where the axis shows `reach`."""
    scale = (plots.HEIGHT - plots.ABOVE - plots.BELOW) / (
        1.1 * (y.place(reach[1]) - y.place(reach[0]))
    )
    return {note["text"]: note["y"] * scale + note["yshift"] for note in
            drawn(figure)["layout"]["annotations"]}  # fmt: skip


def test_a_line_has_a_band_where_it_has_intervals():
    line = Line(name="a", x=[1, 2, 4], y=[known(1.0), alone(2.0), known(4.0)])
    band, trace = drawn(plots.lines([line], title="t", x=Axis(title="x"), y=Axis(title="y")))[
        "data"
    ]
    assert (band["x"], band["y"]) == ([1, 4, 4, 1], [1.5, 4.5, 3.5, 0.5])
    assert (trace["x"], trace["y"], trace["name"]) == ([1, 2, 4], [1.0, 2.0, 4.0], "a")
    assert trace["customdata"] == ["[0.5, 1.5]", "", "[3.5, 4.5]"]


def test_lines_differ_in_more_than_colour():
    many = [Line(name=str(i), x=[0, 1], y=[alone(float(i))] * 2) for i in range(6)]
    traces = drawn(plots.lines(many, title="", x=Axis(title=""), y=Axis(title="")))["data"]
    looks = {(t["line"]["color"], t["line"]["dash"], t["marker"]["symbol"]) for t in traces}
    assert len(looks) == len({look[0] for look in looks}) == len({look[2] for look in looks}) == 6
    assert len({look[1] for look in looks}) == 6


def test_levels_are_lines_with_a_name_at_the_margin():
    line = Line(name="a", x=[1, 10], y=[alone(1.0), alone(3.0)])
    y = Axis(title="y")
    figure = plots.lines([line], title="", x=Axis(title="x", log=True), y=y, levels={"PCA": 2.0})
    layout = drawn(figure)["layout"]
    assert [shape["y0"] for shape in layout["shapes"]] == [2.0]
    assert {(note["text"], note["x"], note["xref"]) for note in layout["annotations"]} == {
        ("a", 1, "x domain"),
        ("PCA", 1, "x domain"),
    }
    assert layout["margin"]["r"] > 7 * len("PCA")


def test_a_line_that_ends_early_is_named_there():
    long, short = ([1, 100], [alone(1.0)] * 2), ([1, 10], [alone(5.0)] * 2)
    lines = [Line(name=name, x=x, y=y) for name, (x, y) in zip("ls", (long, short), strict=True)]
    figure = plots.lines(lines, title="", x=Axis(title="", log=True), y=Axis(title=""))
    notes = {note["text"]: note for note in drawn(figure)["layout"]["annotations"]}
    assert (notes["s"]["x"], notes["s"]["xref"]) == (1.0, "x")  # log10 of 10
    assert notes["l"]["xref"] == "x domain"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=2, max_size=7))
def test_names_of_lines_never_overlap(heights):
    heights = [0.0, 10.0, *heights]
    lines = [Line(name=str(i), x=[0.0, 1.0], y=[alone(h), alone(h)]) for i, h in enumerate(heights)]
    y = Axis(title="")
    placed = names_at(plots.lines(lines, title="", x=Axis(title=""), y=y), y, (0.0, 10.0))
    places = sorted(placed.values())
    assert min(b - a for a, b in itertools.pairwise(places)) > plots.LINE_HEIGHT - 1e-6
    order = sorted(range(len(heights)), key=heights.__getitem__)
    assert places == [placed[str(i)] for i in order]


def test_names_far_apart_stay_where_they_are_and_near_ones_share_the_way():
    y = Axis(title="")
    heights = {"low": 0.0, "a": 5.0, "b": 5.0, "high": 10.0}
    lines = [Line(name=n, x=[0.0, 1.0], y=[alone(h), alone(h)]) for n, h in heights.items()]
    figure = plots.lines(lines, title="", x=Axis(title=""), y=y)
    shifts = {note["text"]: note["yshift"] for note in drawn(figure)["layout"]["annotations"]}
    half = plots.LINE_HEIGHT / 2
    assert shifts == pytest.approx({"low": 0, "a": -half, "b": half, "high": 0})


def test_points_have_intervals_both_ways_and_a_group_each_look():
    shown = [
        Point(name="k = 5", x=known(2.0, 0.25), y=alone(7.0), group="ours"),
        Point(name="k = 9", x=alone(3.0), y=known(6.0), group="theirs"),
    ]
    figure = drawn(plots.points(shown, title="", x=Axis(title="", log=True), y=Axis(title="")))
    first, second = figure["data"]
    assert (first["x"], first["y"], first["text"]) == ([2.0], [7.0], ["k = 5"])
    assert (first["error_x"]["array"], first["error_x"]["arrayminus"]) == ([0.25], [0.25])
    assert (first["error_y"]["array"], first["error_y"]["arrayminus"]) == ([0], [0])
    assert second["error_y"]["array"] == [0.5]
    assert first["marker"]["symbol"] != second["marker"]["symbol"]
    assert figure["layout"]["showlegend"] and figure["layout"]["xaxis"]["type"] == "log"


def test_rows_of_points_have_a_name_and_a_panel_for_each_number():
    shown = [
        Point(name="ours", x=known(2.0, 0.25), y=alone(7.0), group="a"),
        Point(name="theirs", x=alone(3.0), y=known(6.0), group="b"),
    ]
    x, y = Axis(title="rise"), Axis(title="cost", log=True)
    figure = drawn(plots.point_rows(shown, title="", x=x, y=y))
    found = [(trace["xaxis"], trace["x"], trace["y"]) for trace in figure["data"]]
    assert found == [
        ("x", [2.0], ["ours"]), ("x", [3.0], ["theirs"]),
        ("x2", [7.0], ["ours"]), ("x2", [6.0], ["theirs"]),
    ]  # fmt: skip
    assert figure["data"][0]["error_x"]["array"] == [0.25]
    layout = figure["layout"]
    assert (layout["xaxis"]["type"], layout["xaxis2"]["type"]) == ("linear", "log")
    assert layout["xaxis2"]["title"]["text"] == "cost"
    assert layout["yaxis"]["categoryarray"] == ["ours", "theirs"]


def test_bars_carry_their_number_past_the_interval():
    measured = {"ours": known(4.0), "theirs": alone(8.0)}
    figure = drawn(plots.bars(measured, title="", x=Axis(title="")))
    assert figure["data"][0]["x"] == [4.0, 8.0] and figure["data"][0]["y"] == ["ours", "theirs"]
    notes = [(note["y"], note["x"], note["text"]) for note in figure["layout"]["annotations"]]
    assert notes == [("ours", 4.5, "4"), ("theirs", 8.0, "8")]
    shares = drawn(plots.bars({"a": alone(0.125)}, title="", x=Axis(title="", percent=True)))
    assert shares["layout"]["annotations"][0]["text"] == "12.5 %"


def test_a_montage_by_hand():
    images = np.array([[[1.0, -0.5]], [[0.0, 0.0]], [[-4.0, 2.0]]])
    wanted = [
        [127, -64, 0, 0, 0],  # each scaled by its own largest: 1 -> 127, -0.5 -> -63.5 -> -64
        [0, 0, 0, 0, 0],
        [-127, 64, 0, 0, 0],
    ]
    assert plots.montage(images, columns=2).tolist() == wanted


def test_an_image_grid_has_a_panel_for_each_set():
    images = {"k = 5": np.ones((3, 2, 2)), "k = 9": np.zeros((1, 2, 2))}
    figure = drawn(plots.image_grid(images, title="filters", columns=2))
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["k = 5", "k = 9"]
    assert all((trace["zmin"], trace["zmax"]) == (-127, 127) for trace in figure["data"])
