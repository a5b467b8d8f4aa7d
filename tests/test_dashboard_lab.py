"""The prompt lab: every view on a tiny model, and what it says where something is wrong."""

import json
import shutil
from pathlib import Path

import pytest
from artifact_tree import Tree
from dashboard_pages import ENTRY, words
from streamlit.testing.v1 import AppTest

from probe.runs import read_json
from probe.toy import byte_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
TEXT, OTHER = "Anna met Tom.", "Anna met Kim."


@pytest.fixture
def tree(browsed) -> Tree:
    return browsed


@pytest.fixture
def lab(monkeypatch, tree):
    """Opens the prompt lab on a view, with a text."""

    def open_lab(view: str = "features", text: str = TEXT, root: Path | None = None) -> AppTest:
        monkeypatch.setenv("LORGNETTE_ROOT", str(root or tree.root))
        app = AppTest.from_file(str(ENTRY), default_timeout=120)
        app.session_state["prompt_text"], app.session_state["lab_view"] = text, view
        app = app.run().switch_page("pages/prompt_lab.py").run()
        assert not app.exception and app.text_area[0].value == text
        return app

    return open_lab


def press(app: AppTest, label: str) -> None:
    next(button for button in app.button if button.label == label).click().run()


def type_token(app: AppTest, key: str, text: str) -> None:
    """Type a token that is not among those offered."""
    for box in app.selectbox:  # AppTest knows only the options that were offered
        box.options.append(box.format_func(text if box.key == key else box.value))
    next(box for box in app.selectbox if box.key == key).set_value(text).run()


def figures(app: AppTest) -> list[dict]:
    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]


def test_every_token_with_its_strongest_features(lab):
    app = lab()
    table = next(element.proto.body for element in app.html if "<th>1.</th>" in element.proto.body)
    assert table.count("<tr") == 1 + 1 + len(TEXT)
    assert "features with the most activation" in words(app)


def test_layers_has_a_row_and_says_how_to_get_more(lab):
    app = lab("layers")
    assert not app.error and not app.warning
    heat = figures(app)[0]["data"][0]
    assert len(heat["y"] if "y" in heat else heat["text"]) == 1
    assert any("lorgnette sweep" in code.value and "--sites" in code.value for code in app.code)


def test_layers_of_two_saes_are_two_rows(lab, tree, tmp_path):
    root = tmp_path / "two"
    shutil.copytree(tree.root, root)
    second = root / "saes" / "second-00000000"
    shutil.copytree(root / "saes" / tree.sae.path.name, second)
    config = read_json(second / "config.json") | {"site": "resid_post.0"}
    (second / "config.json").write_text(json.dumps(config))
    app = lab("layers", root=root)
    assert not app.error and not app.warning
    layout = figures(app)[0]["layout"]
    assert layout["yaxis"]["ticktext"] == ["resid_post.0", "resid_post.1"]
    app.get_by_key("layer_saes").set_value(["second-00000000"]).run()
    assert figures(app)[0]["layout"]["yaxis"]["ticktext"] == ["resid_post.0"]
    app.get_by_key("layer_saes").set_value([]).run()
    assert "Choose an SAE" in words(app)


def test_lens_has_a_row_a_layer_and_follows_a_token(lab):
    app = lab("lens")
    assert not app.error and not app.warning
    layout = figures(app)[0]["layout"]
    assert layout["yaxis"]["ticktext"] == ["0", "1"]
    assert len(layout["xaxis"]["ticktext"]) == 1 + len(TEXT)
    assert "after layer 1 and token 13" in words(app)
    type_token(app, "lens_token", "T")
    assert not app.warning
    type_token(app, "lens_token", "two words")
    assert "where one token was wanted" in app.warning[0].value


def test_attribution_shows_estimate_measurement_and_control(lab):
    app = lab("attribution")
    assert not app.error and not app.warning
    bars, scatter = figures(app)
    assert [trace["name"] for trace in bars["data"]] == [
        "gradient x activation", "the feature, taken out", "a random direction, taken out",
    ]  # fmt: skip
    assert len(scatter["data"]) == 2
    assert "Estimate against measurement, 10 features" in words(app)
    table = app.dataframe[0].value
    assert {"attribution", "ablation", "control", "label"} <= set(table.columns)
    assert table["feature"].str.startswith("/feature?sae=").all()
    app.get_by_key("ablate_where").set_value("everywhere").run()
    app.get_by_key("read_at").set_value(4).run()
    type_token(app, "attribution_contrast", "x")
    assert not app.exception and not app.error and not app.warning
    type_token(app, "attribution_target", "\u00b7Mary")
    assert "' Mary' is 5 tokens" in app.warning[0].value


def test_patching_shows_effect_control_and_features(lab):
    app = lab("patching")
    assert "Change a word of the second text" in words(app)
    second = next(area for area in app.text_area if area.label.startswith("The second text"))
    second.set_value(OTHER)
    press(app, "Patch between the two")
    assert not app.error
    effect, control = figures(app)
    assert effect["layout"]["yaxis"]["ticktext"] == ["0", "1"]
    assert effect["layout"]["xaxis"]["ticktext"][:2] == ["10 T | K", "11 o | i"]
    assert control["layout"]["xaxis"] == effect["layout"]["xaxis"]
    assert "on the first (clean) prompt" in words(app)
    assert {"estimate", "effect", "control"} <= set(app.dataframe[0].value.columns)
    app.get_by_key("patch_into").set_value("clean").run()
    app.get_by_key("patch_kind").set_value("mlp_out").run()
    app.get_by_key("patch_every").set_value("every 2nd").run()
    assert not app.exception and not app.error
    assert figures(app)[0]["layout"]["yaxis"]["ticktext"] == ["1"]


def test_texts_of_different_lengths_are_told_with_both_counts(lab):
    app = lab("patching")
    second = next(area for area in app.text_area if area.label.startswith("The second text"))
    second.set_value("Anna met Emma.")
    press(app, "Patch between the two")
    assert "clean one has 14 and the corrupted one 15" in app.warning[0].value


@pytest.mark.parametrize("view", ["features", "layers", "lens", "attribution", "patching"])
def test_an_empty_text_is_told_in_a_sentence(lab, view):
    app = lab(view, text="")
    assert not app.exception and len(app.warning) == 1
    assert "type a word" in app.warning[0].value


def test_a_text_longer_than_the_context_says_what_is_left_out(lab):
    app = lab("features", text="x" * 300)
    assert "The text has 301 tokens and the first 256 are read" in app.warning[0].value


def test_a_chat_without_a_template_is_told_in_a_sentence(lab):
    app = lab()
    app.get_by_key("input_kind").set_value("chat").run()
    assert not app.exception and "no chat template" in app.warning[0].value


def test_a_chat_is_read_through_the_template(lab, tree, tmp_path):
    root = tmp_path / "chat"
    shutil.copytree(tree.root, root)
    folder = tmp_path / "model"
    shutil.copytree(tree.sae.config["model"]["spec"], folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    path = root / "saes" / tree.sae.path.name / "config.json"
    config = read_json(path)
    config["model"]["spec"] = str(folder)
    path.write_text(json.dumps(config))
    app = lab(root=root)
    app.get_by_key("input_kind").set_value("chat").run()
    assert not app.exception and not app.warning
    press(app, "Add a turn")
    app.get_by_key("role_2").set_value("assistant")
    app.get_by_key("said_2").set_value("Lis")
    app.get_by_key("remove_0").click().run()
    app.get_by_key("said_1").set_value("Capital?")
    app.get_by_key("read_chat").click().run()
    assert not app.exception and not app.warning
    pills = app.get_by_key("picked_token").options
    assert len(pills) == len("<user>Capital?<assistant>Lis")
