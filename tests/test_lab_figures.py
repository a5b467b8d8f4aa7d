"""Figures of one prompt."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.lab_figures import (
    agreement_figure,
    effects_figure,
    heat_map,
    lens_figure,
    patching_figure,
    shown,
)
from probe.lens import logit_lens
from probe.patching import make_pair, patch_grid
from probe.readout import Metric
from saes.attribution import Ablation


def test_tokens_as_labels():
    assert shown(" a<b>\n") == "\u00b7a&lt;b&gt;\u21b5"
    assert shown("") == "(empty)"


def plain(figure: go.Figure) -> Any:
    """The figure, its traces' properties unknown to the type checker."""
    return figure


def map_of(n_columns: int, cells: list[list[str]] | None) -> Any:
    values = np.zeros((2, n_columns))
    names = [str(i) for i in range(n_columns)]
    figure = heat_map(
        values, rows=["low", "high"], columns=names, hover=[names, names], limits=(0.0, 1.0),
        title="t", cells=cells,
    )  # fmt: skip
    return plain(figure)


def test_maps_have_a_point_a_cell_and_texts_where_there_is_room():
    figure = map_of(3, [["<b>word", "", "c"]] * 2)
    heat, points = figure.data
    assert list(points.x) == [0, 1, 2, 0, 1, 2] and list(points.y) == [0, 0, 0, 1, 1, 1]
    assert list(heat.text[0]) == ["&lt;b&gt;word", "", "c"]
    assert map_of(100, [["a"] * 100] * 2).data[0].text is None
    assert len(map_of(500, None).layout.xaxis.tickvals) <= 60


def test_lens_and_patching_have_a_row_a_layer(llama):
    found = logit_lens(llama, "Anna")
    lens = plain(lens_figure(found))
    assert list(lens.layout.yaxis.ticktext) == ["0", "1"]
    np.testing.assert_allclose(lens.data[0].z, found.probability)
    pair = make_pair(llama, "Anna met Tom.", "Anna met Tim.", Metric(target=5, contrast=6))
    grid = patch_grid(llama, pair)
    for control, values in ((False, grid.effect), (True, grid.control)):
        figure = plain(patching_figure(grid, control=control))
        np.testing.assert_allclose(figure.data[0].z, values)
        assert figure.layout.xaxis.ticktext[0] == "11 o | i"


def test_patching_of_equal_metrics_is_in_logits(llama):
    pair = make_pair(llama, "Anna met Tom.", "Anna met Tim.", Metric(target=5, contrast=5))
    heat = plain(patching_figure(patch_grid(llama, pair))).data[0]
    assert "logits" in heat.colorbar.title.text
    assert heat.zmax > 0


def test_bars_and_scatter_show_the_table():
    table = pd.DataFrame(
        {
            "feature": [3, 4], "position": [1, 2], "token": [" a", "b"], "activation": [1.0, 2.0],
            "attribution": [0.5, -0.1], "ablation": [0.4, -0.2], "control": [0.0, 0.1],
        }
    )  # fmt: skip
    done = Ablation(where="token", value=1.0, table=table)
    bars = plain(effects_figure(done)).data
    assert list(bars[0].y) == ["3 at 1 \u00b7a", "4 at 2 b"]
    assert [list(trace.x) for trace in bars] == [[0.5, -0.1], [0.4, -0.2], [0.0, 0.1]]
    dots = plain(agreement_figure(done)).data[1]
    assert list(dots.x) == [0.5, -0.1] and list(dots.y) == [0.4, -0.2]
