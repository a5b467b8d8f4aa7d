"""Views: artifacts -> figures, tables and HTML."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import views
from app.strips import shade, tokens_html, window
from app.wording import fact, visible


def layout(figure: Any) -> Any:
    """Axes, shapes and titles of a figure."""
    return figure.layout


def traces(figure: Any) -> list[Any]:
    """The lines or bars of a figure."""
    return list(figure.data)


def strip(**changes: Any) -> views.Strip:
    fields = {
        "tokens": (" the", "\n", "<b>", " end"),
        "activations": (0.0, 2.0, 4.0, 0.0),
        "focus": 2,
        "document": "doc-1",
    }
    return views.Strip(**(fields | changes))


def test_shade_is_zero_where_nothing_fires_and_one_at_the_scale():
    assert [shade(a, 4.0) for a in (0.0, -1.0, 4.0, 8.0)] == [0.0, 0.0, 1.0, 1.0]
    assert shade(2.0, 4.0) == pytest.approx(0.55)
    assert shade(1.0, 0.0) == shade(math.nan, 1.0) == 0.0


def test_tokens_are_escaped_and_carry_four_decimals():
    text = tokens_html(strip(), scale=4.0, line_breaks=False)
    assert "<b>" not in text and "&lt;b&gt;" in text
    assert "activation 4.0000&#10;position 2&#10;document doc-1" in text
    assert text.count("background:rgba(224,165,38,1.00)") == 1
    assert text.count("background:rgba(224,165,38,0.55)") == 1
    assert text.count("<span") == 4


def test_a_document_name_cannot_break_out_of_its_attribute():
    text = tokens_html(strip(document='"><script>x'), scale=4.0, line_breaks=False)
    assert "<script>" not in text and "&quot;&gt;&lt;script&gt;x" in text


def test_line_breaks_are_marked_and_broken_only_on_demand():
    assert "\u21b5\n" not in tokens_html(strip(), scale=1.0, line_breaks=False)
    assert "\u21b5\n" in tokens_html(strip(), scale=1.0, line_breaks=True)


@pytest.mark.parametrize(
    ("focus", "first", "length", "where"), [(0, 0, 6, 0), (20, 15, 11, 5), (39, 34, 6, 5)]
)
def test_window_keeps_five_tokens_on_either_side(focus, first, length, where):
    whole = views.Strip(
        tokens=tuple(map(str, range(40))), activations=(0.0,) * 39 + (1.0,), focus=focus
    )
    part = window(whole, "Stacked")
    assert (part.first_position, len(part.tokens), part.focus) == (first, length, where)
    assert part.tokens[where] == str(focus)
    assert window(whole, "Full") == whole


@given(st.integers(1, 60), st.data())
def test_window_never_moves_a_token_from_its_position(length, data):
    focus = data.draw(st.integers(0, length - 1))
    whole = views.Strip(
        tokens=tuple(map(str, range(length))), activations=(0.0,) * length, focus=focus
    )
    part = window(whole, data.draw(st.sampled_from(["Stacked", "Snippet", "Full"])))
    assert part.tokens == tuple(
        map(str, range(part.first_position, part.first_position + len(part.tokens)))
    )
    assert part.focus is not None and part.tokens[part.focus] == str(focus)


def test_groups_have_exact_intervals():
    group = views.ExampleGroup(kind="interval", low=1.5, high=3.0, share=0.125, examples=(strip(),))
    text = views.groups_html([group], scale=4.0, context="Stacked", line_breaks=False)
    assert "Interval 1.5 \u2013 3" in text and "(Contains 12.5 %)" in text
    assert "lg-left" in text and '<span class="lg-value">4</span>' in text
    assert "Interval" not in views.groups_html(
        [views.ExampleGroup(kind="top", low=0.0, high=0.0, share=1.0, examples=(strip(),))],
        scale=4.0,
        context="Full",
        line_breaks=True,
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12.345, "12.3"),
        (-0.5, "\u22120.5"),
        (12345.6, "12,346"),
        (0.00012, "1.2e-04"),
        (None, "\u2013"),
        (math.nan, "\u2013"),
    ],
)
def test_number(value, text):
    assert views.number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (1, "100 %"), (0.1234, "12.3 %"), (0.01234, "1.23 %"), (0.001234, "0.123 %"),
     (1e-7, "<0.001 %"), (None, "\u2013")],
)  # fmt: skip
def test_percent(share, text):
    assert views.percent(share) == text


def test_short_counts():
    shown = [views.short(n) for n in (950, 9999, 12_345, 1_234_567, 2e9, None)]
    assert shown == ["950", "9,999", "12.3 k", "1.23 M", "2 G", "\u2013"]


def test_spaced_shows_leading_trailing_and_only_spaces():
    shown = [views.spaced(token) for token in (" the", "a ", "  ", "", "\n", "\x00", "x y")]
    assert shown == ["\u00b7the", "a\u00b7", "\u00b7\u00b7", "(empty)", "\u21b5", "\\x00", "x y"]
    assert visible("\r\n") == "\u21b5"


def test_markdown_shows_every_character_as_it_is():
    assert views.markdown("a*b_[c]$") == "a\\*b\\_\\[c\\]\\$"


def test_facts_leave_out_what_is_empty_and_escape_the_rest():
    text = views.facts_html({"a": {"b": 1234}, "none": None, "c": "<i>", "no": ""})
    assert text.count("<dt>") == 2
    assert "<dt>a.b</dt><dd>1,234</dd>" in text and "&lt;i&gt;" in text
    assert fact([True, 0.25, "x"]) == "yes, 0.25, x"


def test_bars_are_as_long_as_their_share_of_the_largest():
    text = views.bars_html([" a", "b"], [-2.0, -1.0], colour=views.RUST_RGB)
    assert "width:100.0%" in text and "width:50.0%" in text
    assert "\u22122" in text and "\u00b7a" in text
    assert "width" not in views.bars_html([], [], colour=views.RUST_RGB)


def test_comparison_drops_columns_without_a_value_and_marks_the_sae():
    rows = [
        {"name": "sae", "label": "SAE", "fvu": 0.1, "fvu_low": 0.09, "fvu_high": 0.12, "kl": None},
        {"name": "pca", "label": "PCA & co", "fvu": 0.3, "ce_recovered": 0.5, "kl": None},
    ]
    text = views.comparison_html(rows)
    assert "KL" not in text and "CE recovered" in text
    assert text.count("lg-lead") == 1 and "PCA &amp; co" in text
    assert "95 % interval 0.09 to 0.12" in text and "<td>50 %</td>" in text


def test_density_figure_counts_the_living_only():
    figure = views.density_figure(np.array([0.0, 0.001, 0.001, 0.5]), selected=(0.0, 0.01))
    assert sum(traces(figure)[0].y) == 3
    assert layout(figure).xaxis.title.text.startswith("Density (share of tokens")
    assert layout(figure).yaxis.title.text == "Features"
    assert len(layout(figure).shapes) == 1


def test_density_figure_of_dead_features_only_is_empty():
    figure = views.density_figure(np.zeros(3), selected=None)
    assert sum(traces(figure)[0].y) == 0


def test_activation_figure_keeps_all_counts_and_marks_the_text():
    counts = [0, 0, 3, 0, 5, 0]
    figure = views.activation_figure(counts, np.geomspace(0.01, 10, 7).tolist(), marker=1.0)
    assert sum(traces(figure)[0].y) == 8
    assert layout(figure).yaxis.type == "log"
    assert layout(figure).xaxis.title.text == "Activation (log)"
    assert layout(figure).shapes[0].x0 == 0.0
    assert all(0 < float(text) <= 10 for text in layout(figure).xaxis.ticktext)


def test_activation_figure_of_nothing_does_not_fail():
    assert sum(traces(views.activation_figure([0, 0], [0.1, 1.0, 10.0]))[0].y) == 0


def test_training_figure_leaves_out_runs_without_the_metric():
    runs = {
        "a": pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 0.0, 1.0]}),
        "b": pd.DataFrame({"step": [1], "fvu": [0.5]}),
    }
    figure = views.training_figure(runs, "loss", x="step", log_y=False)
    assert [trace.name for trace in traces(figure)] == ["a"]
    assert list(traces(figure)[0].y) == [3.0, 0.0, 1.0]
    assert list(traces(views.training_figure(runs, "loss", x="step", log_y=True))[0].y) == [
        3.0,
        1.0,
    ]
    assert layout(figure).xaxis.title.text == "Training step"


def test_zf_figure_has_the_line_of_equal_norms_and_a_dot_for_each_row():
    line, dots = traces(views.zf_figure([10.0, 20.0], [9.0, 21.0]))
    assert list(line.x) == list(line.y) == [9.7, 20.6]
    assert (list(dots.x), list(dots.y)) == ([10.0, 20.0], [9.0, 21.0])


def test_training_row_of_a_run_without_metrics():
    row = views.training_row("x", pd.DataFrame(), complete=False)
    assert row["step"] == "\u2013" and row["state"] == "not complete"


def test_next_commands_come_in_order_and_end_with_the_doctor(tmp_path):
    nothing = {
        "unfinished_stores": [],
        "stores": [],
        "trained_on": set(),
        "unfinished_saes": [],
        "not_evaluated": [],
        "not_indexed": [],
    }
    assert [command for _, command in views.next_commands(**nothing)] == ["lorgnette doctor"]
    sae, store = tmp_path / "s", tmp_path / "acts-1"
    asked = nothing | {"not_evaluated": [sae], "not_indexed": [sae], "stores": [store]}
    assert [command for _, command in views.next_commands(**asked)] == [
        f"lorgnette train {store}",
        f"lorgnette evaluate {sae}",
        f"lorgnette index {sae}",
    ]
    used = views.next_commands(**(nothing | {"stores": [store], "trained_on": {"acts-1"}}))
    assert used[0][1] == "lorgnette doctor"
