"""The page Steer: a recipe is made, run, saved and loaded; mistakes are told in a sentence."""

import json
from pathlib import Path

import pytest
from artifact_tree import D_SAE, Tree
from dashboard_pages import words
from streamlit.testing.v1 import AppTest

from app.recipe_editor import parsed_span, span_text
from probe.errors import UserError
from saes.recipes import Feature, read_recipe


@pytest.fixture
def page(browsed: Tree, at_root):
    """Opens the page on the small tree, with a query."""

    def open_page(root: Path = browsed.root, **query: str) -> AppTest:
        return at_root(root, "steer", **query)

    return open_page


def widget(kind, label: str):
    return next(one for one in kind if one.label == label)


def press(app: AppTest, label: str) -> AppTest:
    widget(app.button, label).click()
    return app.run()


def test_a_feature_from_the_address_is_steered(page, browsed):
    app = page(sae=browsed.sae.path.name, feature="7")
    assert not app.exception and not app.error
    assert widget(app.number_input, "Feature").value == 7
    app.session_state["steer_tokens"] = 5
    widget(app.text_area, "Prompt").set_value("Rain fell on the harbour")
    app = press(app, "Steer")
    assert not app.exception and not app.warning
    assert "Default" in words(app) and "Steered" in words(app)
    assert "KL(default || steered)" in words(app)


def test_a_recipe_is_saved_and_loaded_again(page, browsed):
    app = page(sae=browsed.sae.path.name, feature="7")
    widget(app.text_input, "Recipe").set_value("my own: one")
    widget(app.selectbox, "Operation").set_value("set")
    widget(app.number_input, "Strength").set_value(1.5)
    app = press(app.run(), "Save")
    path = browsed.root / "recipes" / "my-own-one.json"
    try:
        saved = read_recipe(path)
        target = saved.edits[0].target
        assert saved.edits[0].op == "set" and isinstance(target, Feature)
        assert target.feature == 7 and target.statistics
        again = page(recipe="my-own-one")
        assert widget(again.text_input, "Recipe").value == "my own: one"
        assert widget(again.number_input, "Strength").value == 1.5
    finally:
        path.unlink(missing_ok=True)


def test_several_features_are_transported(page, browsed):
    app = page(sae=browsed.sae.path.name, feature="7")
    widget(app.selectbox, "Operation").set_value("transport")
    widget(app.selectbox, "Target").set_value("features")
    app = app.run()
    widget(app.text_input, "Features, with commas").set_value("7, 3")
    widget(app.text_input, "From the prompt").set_value("Snow fell on the mountains")
    app.session_state["steer_tokens"] = 3
    widget(app.text_area, "Prompt").set_value("Snow fell on the mountains")
    app = press(app.run(), "Steer")
    assert not app.exception and not app.warning, words(app)
    assert "Steered" in words(app)
    widget(app.text_input, "Features, with commas").set_value("7 and 3")
    assert "is no list of whole numbers" in words(app.run())


def test_the_reconstruction_is_chosen(page, browsed):
    app = page(sae=browsed.sae.path.name, feature="7")
    widget(app.selectbox, "Operation").set_value("reconstruct")
    widget(app.selectbox, "Target").set_value("sae")
    app.session_state["steer_tokens"] = 3
    widget(app.text_area, "Prompt").set_value("Rain")
    app = press(app.run(), "Steer")
    assert not app.exception and not app.warning, words(app)
    assert "Steered" in words(app)


def test_recipes_of_images_are_for_the_page_paint(page, browsed):
    path = browsed.root / "recipes" / "a-picture.json"
    path.parent.mkdir(exist_ok=True)
    edit = {"site": "mid.0", "op": "zero", "target": "site"}
    picture = {"schema": 2, "name": "a picture", "draw": {}, "edits": [edit]}
    path.write_text(json.dumps(picture | {"model": {"spec": "toy-turbo"}}))
    try:
        app = page()
        assert not app.exception
        assert "a-picture" not in widget(app.selectbox, "Saved recipes").options
        assert "draws images; open it on the page Paint" in words(page(recipe="a-picture"))
    finally:
        path.unlink()


def test_edits_are_added_and_removed(page, browsed):
    app = press(page(sae=browsed.sae.path.name, feature="7"), "Add an edit")
    assert sum(one.label == "Operation" for one in app.selectbox) == 2
    app = press(app, "Remove")
    assert sum(one.label == "Operation" for one in app.selectbox) == 1


@pytest.mark.parametrize(
    ("prompt", "feature", "sentence"),
    [
        (" ", "7", "The prompt is empty"),
        ("a" * 400, "7", "reads at most 256"),
        ("Rain", str(D_SAE), f"no feature {D_SAE}"),
    ],
)
def test_mistakes_are_told(page, browsed, prompt, feature, sentence):
    app = page(sae=browsed.sae.path.name, feature="7")
    widget(app.number_input, "Feature").set_value(int(feature))
    widget(app.text_area, "Prompt").set_value(prompt)
    app = press(app.run(), "Steer")
    assert not app.exception
    assert sentence in words(app)


def test_addresses_that_name_nothing(page, browsed, tmp_path):
    assert "no recipe 'nobody'" in words(page(recipe="nobody"))
    assert "is not a number" in words(page(sae=browsed.sae.path.name, feature="x"))
    empty = page(root=tmp_path)
    assert not empty.exception and "lorgnette demo" in json.dumps([c.value for c in empty.code])


def test_ranges_are_read_as_they_are_written():
    for span in ([1, 5], [1, None], [-3, -1]):
        assert parsed_span(span_text(span)) == span
    assert span_text(None) == ""
    with pytest.raises(UserError, match="is no range"):
        parsed_span("a:b")
