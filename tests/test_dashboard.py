"""Every page of the dashboard, with something to show and with nothing."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from artifact_tree import D_SAE, Tree, make_report, make_tree
from dashboard_pages import ENTRY, htmls, words
from streamlit.testing.v1 import AppTest

from saes.notes import Notes

PAGES = ("overview", "features", "feature", "prompt_lab", "training", "reports")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Tree:
    made = make_tree(tmp_path_factory.mktemp("dashboard"))
    make_report(made.root)
    return made


@pytest.mark.parametrize("page", PAGES)
def test_empty_root_says_what_to_run(at_root, tmp_path, page):
    app = at_root(tmp_path / "nothing", page)
    assert not app.exception and not app.error
    assert any("lorgnette demo" in element.value for element in app.code)
    assert any("make demo" in element.value for element in app.code)


@pytest.mark.parametrize("page", PAGES)
def test_filled_root_shows_the_page_without_trouble(at_root, tree, page):
    app = at_root(tree.root, page)
    assert not app.exception and not app.error and not app.warning
    assert app.title[0].value


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_no_bare_strings_that_streamlit_would_show(page):
    body = ast.parse((ENTRY.parent / "pages" / f"{page}.py").read_text()).body
    bare = [node.lineno for node in body[1:] if isinstance(node, ast.Expr)]
    assert not bare, f"{page}.py, lines {bare}: Streamlit prints it on the page; use a comment"


def test_overview_lists_runs_with_controls_and_next_steps(at_root, tree):
    app = at_root(tree.root, "overview")
    text = words(app)
    assert tree.sae.path.name in text and tree.unfinished.path.name in text
    assert "training not complete" in text and "evaluated" in text
    table = next(body for body in htmls(app) if "lg-lead" in body)
    assert "FVU" in table and "CE recovered" in table and "PCA" in table
    assert {metric.label: metric.value for metric in app.metric}["SAEs"] == "2"
    norms = next(body for body in htmls(app) if "under-activated rows" in body)
    assert "epsilon-LBO" in norms and "Welch bound" in norms
    assert "resumes it" in text


def test_features_filters_sorts_and_searches(at_root, tree):
    app = at_root(tree.root, "features")
    table = app.dataframe[0].value
    alive = len(table)
    dead = D_SAE - alive
    assert app.metric[0].value == str(alive)
    app.get_by_key("state").set_value("dead").run()
    assert (len(app.dataframe[0].value) if app.dataframe else 0) == dead
    app.get_by_key("state").set_value("all").run()
    assert len(app.dataframe[0].value) == D_SAE
    app.get_by_key("order").set_value("max").run()
    app.get_by_key("descending").set_value(True).run()
    assert app.dataframe[0].value["max"].dropna().is_monotonic_decreasing
    app.get_by_key("q").set_value("T").run()
    found = app.dataframe[0].value
    named = found["top_tokens"] + found["positive_tokens"]
    assert 0 < len(found) < D_SAE and named.str.len().all()
    app.get_by_key("q").set_value("no such letters").run()
    assert not app.dataframe and "widen" in app.info[0].value


def test_feature_page_restores_its_address(at_root, tree):
    app = at_root(tree.root, "feature", sae=tree.sae.path.name, feature="7")
    assert app.title[0].value == "Feature 7"
    assert app.get_by_key("jump").value == 7
    assert f"feature?sae={tree.sae.path.name}&feature=7" in app.code[0].value


def test_feature_page_steps_and_jumps(at_root, tree):
    app = at_root(tree.root, "feature", feature="7")
    button = {button.label: button for button in app.button}
    app = button["Next"].click().run()
    following = int(app.title[0].value.split()[1])
    assert following > 7
    app = {button.label: button for button in app.button}["Previous"].click().run()
    app.get_by_key("jump").set_value(20).run()
    assert app.title[0].value == "Feature 20" and app.get_by_key("jump").value == 20
    {button.label: button for button in app.button}["Random"].click().run()
    assert not app.exception


def test_feature_page_has_its_panels(at_root, tree):
    app = at_root(tree.root, "feature", feature=str(living(tree)))
    headings = [element.value for element in app.subheader]
    wanted = {
        "Test it on your own text", "Activations", "Effect on the logits", "Tokens it fires on",
        "Nearest decoder directions", "Examples", "Provenance",
    }  # fmt: skip
    assert wanted <= set(headings)
    text = words(app)
    assert "Contains" in text and "FVU" in text and "resid_post.1" in text
    assert "<b>the" not in "".join(htmls(app))


def label_feature(app: AppTest, tree: Tree, feature: int, label: str) -> AppTest:
    app.text_input(f"notes of {tree.sae.path.name} {feature} label").set_value(label)
    return next(button for button in app.button if button.label == "Save").click().run()


def own_root(tree: Tree, folder: Path) -> Path:
    """A copy of the tree to write notes in."""
    return shutil.copytree(tree.root, folder / "own")


def test_a_label_is_saved_and_shown_on_both_pages(at_root, tree, tmp_path):
    root, feature = own_root(tree, tmp_path), living(tree)
    app = at_root(root, "feature", feature=str(feature))
    assert "No label yet." in words(app)
    app = label_feature(app, tree, feature, "<b>boats</b> *at* sea")
    assert not app.exception and "**\\<b\\>boats" in words(app)
    assert "&lt;b&gt;boats" in words(app), "the history is escaped"
    again = at_root(root, "feature", feature=str(feature))
    assert "boats" in words(again) and any(e.label.startswith("Version 1") for e in again.expander)
    table = at_root(root, "features")
    assert "label" in table.dataframe[0].value
    table.get_by_key("search_in").set_value("label").run()
    table.get_by_key("q").set_value("BOATS").run()
    assert table.dataframe[0].value["feature"].tolist() == [feature]


def test_two_tabs_that_label_the_same_feature_lose_nothing(at_root, tree, tmp_path):
    root, feature = own_root(tree, tmp_path), living(tree)
    one, two = (at_root(root, "feature", feature=str(feature)) for _ in range(2))
    label_feature(one, tree, feature, "first")
    two = label_feature(two, tree, feature, "second")
    (warning,) = two.warning
    assert "saved meanwhile" in warning.value and "“first”" in warning.value
    box = two.text_input(f"notes of {tree.sae.path.name} {feature} label")
    assert box.value == "second", "the text is still in the box"
    two = next(button for button in two.button if button.label == "Save").click().run()
    assert not two.warning and "**second**" in words(two)
    history = Notes(root / "notes.sqlite").history(tree.sae.path.name, feature)
    assert [text.label for text in history] == ["first", "second"]


def test_lists_of_a_feature_and_features_of_a_list(at_root, tree, tmp_path):
    root, feature = own_root(tree, tmp_path), living(tree)
    notes, sae = Notes(root / "notes.sqlite"), tree.sae.path.name
    notes.add_all("sea", sae, [feature, 63])
    notes.add("elsewhere", "another SAE", 5)
    app = at_root(root, "feature", feature=str(feature))
    lists = app.get_by_key(f"notes of {sae} {feature} lists")
    assert lists.value == ["sea"] and lists.options == ["elsewhere", "sea"]
    notes.add("meanwhile", sae, feature)
    lists.set_value(["elsewhere"]).run()
    assert notes.lists_of(sae, feature) == ["elsewhere", "meanwhile"]
    table = at_root(root, "features")
    table.get_by_key("state").set_value("all").run()
    assert table.get_by_key("in_list").options == ["(any)", "elsewhere", "meanwhile", "sea"]
    table.get_by_key("in_list").set_value("sea").run()
    assert table.dataframe[0].value["feature"].tolist() == [63]


def test_features_of_a_text_are_found_best_first(at_root, tree):
    app = at_root(tree.root, "features")
    app.get_by_key("search_in").set_value("text").run()
    assert app.get_by_key("order").value == "match"
    app.get_by_key("q").set_value("The ferry came home late.").run()
    found = app.dataframe[0].value
    assert not app.exception and 0 < len(found) < D_SAE
    assert found["match"].is_monotonic_decreasing and (found["match"] > 0).all()
    app.get_by_key("search_in").set_value("named").run()
    assert app.get_by_key("order").value == "feature"


def test_damaged_notes_are_told_and_everything_else_is_shown(at_root, tree, tmp_path):
    root = own_root(tree, tmp_path)
    (root / "notes.sqlite").write_bytes(b"no database at all, but long enough to be read" * 9)
    app = at_root(root, "feature", feature=str(living(tree)))
    assert not app.exception and "are damaged" in app.error[0].value
    assert "Contains" in words(app)
    table = at_root(root, "features")
    assert not table.exception and len(table.dataframe[0].value) and "are damaged" in words(table)


def test_a_feature_says_what_is_not_there_yet(at_root, tree):
    text = words(at_root(tree.root, "feature", feature=str(living(tree))))
    assert "lorgnette label" in text and "random-weight twin" in text
    assert "Density" in text and "Nearest cosine" in text


def test_contexts_widen(at_root, tree):
    app = at_root(tree.root, "feature", feature=str(living(tree)))
    sizes = []
    for context in ("Stacked", "Snippet", "Full"):
        app.get_by_key("context").set_value(context).run()
        assert not app.exception
        sizes.append(sum(body.count("lg-t") for body in htmls(app)))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_own_text_is_encoded_and_escaped(at_root, tree):
    app = at_root(tree.root, "feature", feature=str(living(tree)))
    app.get_by_key("own_text_box").set_value("<b>letter</b> & winter")
    next(button for button in app.button if button.label == "Test").click().run()
    assert not app.exception and not app.error
    assert any("&lt;" in body and "&amp;" in body for body in htmls(app))
    assert any(
        "on this text" in c.value or "Largest activation here" in c.value for c in app.caption
    )


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"feature": "9999"}, "There is no feature 9999"),
        ({"feature": "two"}, "not a number"),
        ({"sae": "nobody"}, "There is no SAE named 'nobody'"),
    ],
)
def test_wrong_addresses_are_told_in_a_sentence(at_root, tree, query, sentence):
    app = at_root(tree.root, "feature", **query)
    assert not app.exception
    assert sentence in app.warning[0].value


def test_prompt_lab_ranks_features_of_the_text_and_of_one_token(at_root, tree):
    app = at_root(tree.root, "prompt_lab")
    whole = [link.proto.label for link in app.page_link]
    assert len(whole) == 10 and all(":primary[Feature" in label for label in whole)
    app.get_by_key("picked_token").set_value(3).run()
    assert not app.exception and len(app.page_link) <= 4
    for by in ("mean", "frequency"):
        app.get_by_key("ranking").set_value(by).run()
        assert not app.exception
    app.get_by_key("prompt_text").set_value("")
    next(button for button in app.button if button.label == "Read the text").click().run()
    assert "type a word" in app.warning[0].value


def test_training_draws_finished_and_running_saes(at_root, tree):
    app = at_root(tree.root, "training")
    app.get_by_key("training_runs").set_value([tree.sae.path.name, tree.unfinished.path.name]).run()
    assert not app.exception and not app.error
    figures = [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]
    assert len(figures) >= 5
    lengths = sorted(
        len(trace["y"]) for trace in figures[0]["data"] if isinstance(trace["y"], list)
    )
    assert not lengths or lengths[0] == 5
    app.get_by_key("training_axis").set_value("seconds").run()
    app.get_by_key("log_y").set_value(True).run()
    assert not app.exception


def test_reports_show_claims_numbers_figures_and_tables(at_root, tree):
    app = at_root(tree.root, "reports")
    (name,) = app.selectbox[0].options
    assert name.startswith("A toy study  (toy/study-")
    text = words(app)
    assert "A toy study" in text and "What was done, in **two** words." in text
    badges = [element.value for element in app.markdown if "-badge[" in element.value]
    assert ["green" in badge and "holds" in badge for badge in badges] == [True, False]
    assert "orange" in badges[1] and "does not show" in badges[1]
    assert "Ours is &lt;b&gt;better" in text and "difference 2.5 [1.5, 3.5]" in text
    assert "&lt;b&gt;ours" in text and "4.5" in text
    (figure,) = app.get("plotly_chart")
    assert "Errors by method" in figure.proto.spec


def test_reports_restore_their_address_and_say_where_it_is_wrong(at_root, tree, tmp_path):
    root = tmp_path / "two"
    shutil.copytree(tree.root / "reports", root / "reports")
    newer = next(root.glob("reports/toy/study-*"))
    older = newer.with_name("older-00000000")
    shutil.copytree(newer, older)
    manifest = json.loads((older / "manifest.json").read_text())
    (older / "manifest.json").write_text(json.dumps(manifest | {"created": "2020-01-01T00:00"}))
    assert at_root(root, "reports").selectbox[0].value == f"toy/{newer.name}"
    assert at_root(root, "reports", report="toy/older-00000000").selectbox[0].value == (
        "toy/older-00000000"
    )
    wrong = at_root(root, "reports", report="toy/nobody")
    assert "no finished report 'toy/nobody'" in wrong.warning[0].value
    assert wrong.subheader[0].value == "A toy study"


def test_a_damaged_report_is_told_in_a_sentence(at_root, tree, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(tree.root / "reports", root / "reports")
    next(root.glob("reports/toy/*/tables/*.parquet")).write_bytes(b"PAR1 and no more")
    app = at_root(root, "reports")
    assert not app.exception
    assert "make the report again" in app.error[0].value


def test_a_damaged_index_is_told_in_a_sentence(at_root, tree, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(tree.root, root)
    index = next(root.glob("saes/*/index-*/features.parquet"))
    index.write_bytes(index.read_bytes()[:-40])
    for page in ("features", "feature"):
        app = at_root(root, page)
        assert not app.exception
        assert "lorgnette index" in app.error[0].value


def test_an_sae_without_index_says_how_to_make_one(at_root, tree, tmp_path):
    root = tmp_path / "bare"
    shutil.copytree(tree.root, root)
    shutil.rmtree(next(root.glob("saes/*/index-*")))
    app = at_root(root, "features")
    assert not app.exception and any("lorgnette index" in code.value for code in app.code)


def living(tree: Tree) -> int:
    """A feature that fires."""
    from saes.feature_queries import FeatureIndex

    index = FeatureIndex.open(next(tree.sae.path.glob("index-*")))
    return index.next_alive(0)
