"""The page Collapse on a tiny model: curve, conditions, sensitivities, words."""

import json

import pytest
from collapse_tree import saved_llama
from dashboard_pages import words

from app import live_collapse
from app.collapse_sections import FAMILY_LINES
from app.live_collapse import EXACT, Chosen


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return saved_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def opened(at_root, browsed, monkeypatch, spec):
    """The page, on a tiny model in the place of SmolLM2."""
    from app import collapse_sections

    def models() -> dict[str, tuple[str, int | None]]:
        return {"tiny": (spec, None), "tiny, random weights": (spec, 0)}

    monkeypatch.setattr(collapse_sections, "_models", models)
    monkeypatch.setattr(collapse_sections, "LONGEST", 100)
    return at_root(browsed.root, "collapse")


def figures(app) -> list[dict]:
    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]


def test_it_opens_with_a_curve_its_control_and_the_conditions(opened):
    assert not opened.exception and not opened.error and not opened.warning
    curve, layers = figures(opened)
    assert [trace["name"] for trace in curve["data"]] == ["ones", "random digits"]
    assert max(curve["data"][0]["x"]) == 100 and layers["data"][0]["type"] == "heatmap"
    said = words(opened)
    assert "positions fade with distance" in said and "% of their length apart" in said
    assert ":material/close:" not in said
    assert "lorgnette analyse collapse" in said, "what makes the report"


def test_choices_are_measured(opened):
    before = figures(opened)[0]["data"][0]["y"]
    opened.get_by_key("collapse_family").set_value("commas").run()
    assert ":material/close:" in words(opened) and "contradicts nothing" in words(opened)
    opened.get_by_key("collapse_family").set_value("ones").run()
    opened.get_by_key("collapse_format").set_value("bfloat16").run()
    rounded = figures(opened)[0]["data"][0]["y"]
    assert rounded != before and not opened.exception
    opened.get_by_key("collapse_form").set_value("chat").run()
    opened.get_by_key("collapse_window").set_value(16).run()
    opened.get_by_key("collapse_model").set_value("tiny, random weights").run()
    assert not opened.exception and not opened.error


def test_sensitivities_are_measured_when_asked_for(opened):
    assert len(figures(opened)) == 2
    next(button for button in opened.button if button.label == "Measure").click().run()
    gradient, path = figures(opened)[2]["data"]
    assert gradient["type"] == path["type"] == "heatmap"
    opened.get_by_key("collapse_held").set_value(20).run()
    assert len(figures(opened)) == 3 and not opened.exception


def test_the_slider_ends_where_the_context_does(spec):
    chosen = Chosen(spec, None, "ones", "raw", EXACT, None)
    assert live_collapse.longest(chosen, 50) == 50
    assert 1900 < live_collapse.longest(chosen, 5000) < 2048


def test_next_tokens_are_shares_after_both_prompts(spec):
    table = live_collapse.next_tokens(Chosen(spec, None, "ones", "raw", EXACT, None), 20)
    assert list(table.columns) == ["token", "after n", "after n + 1"]
    assert bool((table[["after n", "after n + 1"]].sum() <= 1).all()) and len(FAMILY_LINES) == 6
