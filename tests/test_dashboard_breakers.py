"""The page Circuit breakers on a tiny broken model: maps, answers, features, the empty state."""

import json

import numpy as np
import pytest
from breaker_tree import broken_root
from dashboard_pages import words

from app import data, live_breakers


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return broken_root(tmp_path_factory.mktemp("breakers"))


@pytest.fixture
def opened(at_root, root):
    return at_root(root, "breakers")


def figures(app) -> list[dict]:
    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]


def choose(app, subject: str):
    box = app.get_by_key("breaker_model")
    return box.set_value(next(m for m in box.options if m.startswith(subject))).run()


def test_without_a_broken_model_it_says_what_to_run(at_root, browsed):
    app = at_root(browsed.root, "breakers")
    assert not app.exception and "lorgnette analyse circuit-breakers" in words(app)


def test_a_concept_shows_training_attacks_answers_maps_and_features(opened):
    app = choose(opened, "recipes")
    assert not app.exception and not app.error and not app.warning
    training, cosine, length, line = figures(app)
    assert {trace["name"] for trace in training["data"] if trace.get("name")} >= {
        "rerouted", "kept"}  # fmt: skip
    assert cosine["data"][0]["type"] == length["data"][0]["type"] == "heatmap"
    assert len(cosine["data"][0]["y"]) == 3, "embeddings, a block's output, the normed last"
    assert line["layout"]["title"]["text"] == "State 2 by token"
    said = words(app)
    for text in ("The model as it was", "The broken model", "Attacks", "prefill",
                 "Rerouted: fire less", "Appeared: fire more", "a token, most at"):  # fmt: skip
        assert text in said, text
    links = [link.proto.query_string for link in app.get("page_link")]
    assert any("feature=" in link for link in links), "features lead to their pages"


def test_another_request_and_layer_are_measured(opened):
    app = choose(opened, "recipes")
    before = figures(app)[1]["layout"]["xaxis"]["ticktext"]
    app.get_by_key("breaker_request_recipes").set_value("Something else entirely").run()
    assert figures(app)[1]["layout"]["xaxis"]["ticktext"] != before
    app.get_by_key("breaker_layer").set_value(1).run()
    assert figures(app)[3]["layout"]["title"]["text"] == "State 1 by token"
    app.get_by_key("breaker_request_recipes").set_value("  ").run()
    assert "Type a request" in words(app) and not app.exception


def test_after_harmful_prompts_no_answer_is_written(opened, monkeypatch):
    monkeypatch.setattr(live_breakers.Ask, "continuations", None)
    app = choose(opened, "harmful")
    app.get_by_key("breaker_request_harmful").set_value("Some request or other").run()
    assert not app.exception and not app.error
    said = words(app)
    assert "no answer is written" in said and "The broken model" not in said
    assert len(figures(app)) == 4


def test_states_are_compared_from_the_first_token_that_differs(root, monkeypatch):
    monkeypatch.setenv("LORGNETTE_ROOT", str(root))
    model = next(m for m in data.broken_models() if m.subject == "recipes")
    found = live_breakers.compared(str(model.adapter), model.base, "Cook an egg", answering=True)
    assert found.texts[0] == "C" and found.cosine.shape == found.longer.shape
    assert found.cosine.shape[1] == len(found.texts) == len(found.ids) - found.start
    assert found.cosine[0] == pytest.approx(1, abs=1e-5), "embeddings have no adapter"
    assert np.abs(found.longer[0]).max() < 1e-5
