"""The pages of images: what they draw, paint and transport is what recipes give elsewhere."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from dashboard_pages import ENTRY, words
from image_tree import BLOCKS, D_SAE, ImageTree, loaded_sae, make_image_tree, make_sae
from PIL import Image
from streamlit.components.v2.component_manager import BidiComponentManager
from streamlit.testing.v1 import AppTest

from app import data, live_images, live_transport, paint_state, recipe_shelf
from app.image_input import Asked
from app.pair_input import AskedPair, captions_that_differ
from probe.diffusion import DrawConfig
from probe.errors import UserError
from probe.sites import parse_site
from saes.drawing import prepare
from saes.folder import load_sae
from saes.place_codes import codes_of_image
from saes.recipe_making import feature_recipe
from saes.recipe_saes import LoadedSae
from saes.recipes import Strength, read_recipe, recipe_from, to_json
from saes.scales import SCALES
from saes.transport import Pair, feature_scores, steering_recipe, transport_recipe

PROMPT, SEED = "a red circle", 7
BLOCK = BLOCKS[0]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> ImageTree:
    return make_image_tree(tmp_path_factory.mktemp("images"))


@pytest.fixture
def page(tree, monkeypatch):
    """Opens a page on the tree, with a query."""

    def open_page(name: str, root: Path = tree.root, **query: str) -> AppTest:
        monkeypatch.setenv("LORGNETTE_ROOT", str(root))
        app = AppTest.from_file(str(ENTRY), default_timeout=120)
        # Else each one looks through all installed packages for components of theirs.
        app._bidi_component_manager = BidiComponentManager()
        for key, value in query.items():
            app.query_params[key] = value
        return app.switch_page(f"pages/{name}.py").run()

    return open_page


def widget(kind, label: str):
    return next(one for one in kind if one.label == label)


def press(app: AppTest, label: str, nth: int = 0) -> AppTest:
    [one for one in app.button if one.label == label][nth].click()
    return app.run()


def fine(app: AppTest) -> AppTest:
    assert not app.exception, app.exception[0].value
    assert not app.error and not app.warning, words(app)
    return app


def pixels(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data))))


# ----------------------------------------------------------------------------------------- explore


def test_explore_ranks_features_by_their_mean_over_places(page, tree):
    app = fine(page("explore", sae=tree.saes[BLOCK].path.name))
    assert "Press Draw to see" in words(app)
    widget(app.text_input, "Prompt").set_value(PROMPT)
    widget(app.number_input, "Seed").set_value(SEED)
    app = fine(press(app, "Draw"))
    codes = codes_of_image(
        tree.model, load_sae(tree.saes[BLOCK].path), parse_site(BLOCK), PROMPT, SEED, DrawConfig()
    )
    wanted = codes.strongest(20)
    shown = app.dataframe[0].value
    assert shown["feature"].tolist() == wanted["feature"].tolist()
    assert shown["mean"].tolist() == pytest.approx(wanted["mean"].tolist())
    assert shown["share"].tolist() == pytest.approx((100 * wanted["share"]).tolist())
    assert all(url.startswith("data:image/png") for url in shown["map"])
    assert f"What {BLOCK} says" in words(app)
    wanted = {"sae": tree.saes[BLOCK].path.name, "prompt": PROMPT, "seed": str(SEED)}
    assert wanted.items() <= dict(app.query_params).items()
    assert app.query_params["f"] == str(shown["feature"][0])


def test_an_address_is_an_image_with_maps(page, tree):
    """A feature that the table would not list has a map as well; another step has other numbers."""
    sae = tree.saes[BLOCK]
    draw = DrawConfig(steps=2)
    codes = codes_of_image(tree.model, load_sae(sae.path), parse_site(BLOCK), PROMPT, SEED, draw)
    silent = next(f for f in range(D_SAE) if not codes.heat_map(f).any())
    first = codes.strongest(1)["feature"].to_list()[0]
    app = fine(
        page(
            "explore", sae=sae.path.name, prompt=PROMPT, seed="7", steps="2", f=f"{silent},{first}"
        )
    )
    shown = app.dataframe[0].value
    assert shown["feature"].iloc[-1] == silent and shown["mean"].iloc[-1] == 0
    assert len(maps(app)) == 2 and app.query_params["f"] == f"{silent},{first}"
    over = maps(app)[1]
    assert over.shape == (4, 4, 4)
    assert torch.equal(over[..., 3] > 0, codes.heat_map(first).mean(0) > 0)
    app.session_state["explore_step_2"] = 2
    app = fine(app.run())
    wanted = codes.strongest(20, step=1)
    shown = app.dataframe[0].value["mean"].tolist()[: len(wanted)]
    assert shown == pytest.approx(wanted["mean"].tolist())
    app.session_state["explore_number"] = 11
    app = fine(press(app, "Show its map"))
    assert "11" in app.query_params["f"].split(",") and len(maps(app)) == 3
    app.session_state["explore_blocks"] = True
    app = fine(app.run())
    assert all(f"**{block}**" in words(app) for block in BLOCKS) and len(maps(app)) == 5


def maps(app: AppTest) -> list[torch.Tensor]:
    """The heat maps on a page, a pixel a place."""
    pages = "".join(one.proto.body for one in app.get("html"))
    encoded = re.findall(r'class="lg-heat" src="data:image/png;base64,([^"]+)"', pages)
    return [pixels(base64.b64decode(one)) for one in encoded]


def test_the_dose_strip_is_the_recipes_own(page, tree):
    sae = tree.saes[BLOCK]
    app = page("explore", sae=sae.path.name, prompt=PROMPT, seed=str(SEED))
    app.session_state["dose_images"] = 3
    app = fine(press(app, "Draw the row"))
    feature = int(app.query_params["f"])
    (_, strip) = app.session_state["dose_strip"]
    recipe = feature_recipe(
        sae, feature, op="scale", strength=Strength(value=2.0), draw=DrawConfig()
    )
    drawn = prepare(recipe, root=tree.root).dose_row(PROMPT, SEED, [-10.0, 0.0, 10.0])
    assert [row["strength"] for row in strip] == [-10, 0, 10]
    for row, picture in zip(strip, drawn, strict=True):
        assert torch.equal(pixels(row["png"])[::8, ::8], picture)
    assert strip[1]["whole"] == 0 and strip[2]["inside"] > 0
    moved = (drawn[2].double() - drawn[1].double()).abs().mean()
    assert strip[2]["whole"] == pytest.approx(float(moved))


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"f": str(D_SAE)}, f"has no feature {D_SAE}, only 0 to {D_SAE - 1}"),
        ({"f": "a"}, "The address has f='a' where numbers of features were wanted"),
        ({"seed": "-1"}, "Seed must be a whole number from 0 to"),
        ({"steps": "0"}, "Steps must be a whole number from 1 to 1000"),
        ({"guidance": "nan"}, "Guidance must be a number from 0 (none) to 30"),
        ({"sae": "nobody"}, "no SAE named 'nobody'"),
        ({"prompt": "a circle and a square and a triangle"}, "longer than the model reads"),
    ],
)
def test_addresses_that_make_no_sense_are_told(page, tree, query, sentence):
    asked = {"sae": tree.saes[BLOCK].path.name, "prompt": PROMPT} | query
    app = page("explore", **asked)
    assert not app.exception and sentence in words(app)


def test_an_sae_that_does_not_fit_is_told_and_the_others_go_on(page, tree, tmp_path):
    fits = make_sae(tmp_path, tree.spec, "mid.0", 1)
    narrow = make_sae(tmp_path, tree.spec, "mid.0", 2, width=8)
    strange = make_sae(tmp_path, tree.spec, "up.9.0", 3)
    for run, sentence in (
        (narrow, "reads activations of width 8 and mid.0 of"),
        (strange, "site up.9.0 is not in"),
    ):
        app = page("explore", root=tmp_path, sae=run.path.name, prompt=PROMPT)
        assert not app.exception and sentence in words(app).replace("Site", "site")
    fine(page("explore", root=tmp_path, sae=fits.path.name, prompt=PROMPT))


@pytest.mark.parametrize("name", ["explore", "paint", "prompts"])
def test_with_nothing_there_the_pages_say_what_to_run(page, tmp_path, name):
    app = fine(page(name, root=tmp_path))
    assert "lorgnette capture toy-turbo" in json.dumps([code.value for code in app.code])
    assert "of an image model yet" in words(app)


def test_pages_of_texts_and_of_images_point_to_each_other(page, tree, tmp_path):
    of_texts = make_sae(tmp_path, "tiny", "resid_post.1", 1)
    of_images = make_sae(tmp_path, tree.spec, BLOCK, 2)
    for name in ("prompt_lab", "steer"):
        app = page(name, root=tmp_path, sae=of_images.path.name, feature="1")
        assert "is of an image model; these pages are for it" in words(app)
    for name in ("explore", "paint", "prompts"):
        app = fine(page(name, root=tmp_path, sae=of_texts.path.name, feature="1"))
        assert "is of a language model; these pages are for it" in words(app)


# ------------------------------------------------------------------------------------------- paint


def painted(app: AppTest, *, rows: tuple[int, int], columns: tuple[int, int]) -> AppTest:
    """Paint a rectangle by its numbers."""
    for label, value in zip(
        ("First row", "Last row", "First column", "Last column"), (*rows, *columns), strict=True
    ):
        widget(app.number_input, label).set_value(value)
    return press(app, "Paint it")


def paint(page, tree, feature: int = 5, **query: str) -> AppTest:
    asked = {"sae": tree.saes[BLOCK].path.name, "feature": str(feature), "prompt": PROMPT}
    return fine(page("paint", **asked, seed=str(SEED), **query))


def test_what_is_painted_is_the_recipes_own_image(page, tree):
    app = paint(page, tree)
    assert widget(app.number_input, "Feature").value == 5
    assert widget(app.slider, "Strength").value == 10 and "none painted yet" in html(app)
    app = fine(painted(app, rows=(1, 2), columns=(2, 3)))
    assert "4 of 16" in html(app)
    widget(app.slider, "Strength").set_value(20.0)
    app = fine(press(app.run(), "Apply"))
    document = app.session_state["paint_recipe"]
    (edit,) = document["edits"]
    assert edit["positions"] == {"canvas": RECTANGLE} and edit["op"] == "add"
    assert edit["strength"] == {"value": 20.0, "unit": "mean"} and edit["site"] == BLOCK
    drawn = prepare(recipe_from(document), root=tree.root).compare([PROMPT], [SEED])
    result = app.session_state["paint_result"]
    before, after = map(pixels, result["files"])
    assert torch.equal(before, drawn.before[0]) and torch.equal(after, drawn.after[0])
    assert not torch.equal(before, after)
    (row,) = drawn.moved().to_dict("records")
    assert result["moved"] == row and row["inside"] > 0
    plain = tree.model.generate([PROMPT], [SEED], DrawConfig()).images[0]
    assert torch.equal(before, plain)
    explored = live_images.seen(data.sae_record(tree.saes[BLOCK].path.name), Asked(
        prompt=PROMPT, seed=SEED
    ))  # fmt: skip
    assert torch.equal(explored.image, plain), "reading the blocks changes nothing"


RECTANGLE = [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]


def html(app: AppTest) -> str:
    return "".join(one.proto.body for one in app.get("html"))


def test_layers_of_several_blocks(page, tree):
    app = fine(painted(paint(page, tree), rows=(0, 0), columns=(0, 3)))
    app = fine(press(app, "Add"))
    assert "none painted yet" in html(app)
    other = tree.saes[BLOCKS[1]].path.name
    widget(app.selectbox, "SAE (its block is where it paints)").set_value(other)
    widget(app.number_input, "Feature").set_value(9)
    app = fine(painted(app.run(), rows=(3, 3), columns=(0, 3)))
    app = fine(press(app, "Apply"))
    first, second = app.session_state["paint_recipe"]["edits"]
    assert [first["site"], second["site"]] == list(BLOCKS)
    assert second["target"] == {"feature": 9, "sae": BLOCKS[1]}
    assert set(app.session_state["paint_recipe"]["saes"]) == set(BLOCKS)
    drawn = prepare(recipe_from(app.session_state["paint_recipe"]), root=tree.root)
    after = drawn.compare([PROMPT], [SEED]).after[0]
    assert torch.equal(pixels(app.session_state["paint_result"]["files"][1]), after)
    app = fine(press(app, "Remove"))
    assert len(app.session_state["paint_recipe"]["edits"]) == 1
    assert "earlier painting" in words(app), "the result stays until it is drawn again"
    fewer = app.session_state["paint_recipe"]
    assert set(fewer["saes"]) == {BLOCK} and fewer["edits"] == [first]


def test_steps_and_guidance_are_part_of_a_layer(page, tree):
    app = paint(page, tree, steps="3", guidance="4")
    app = fine(painted(app, rows=(1, 2), columns=(2, 3)))
    widget(app.slider, "Steps").set_range(2, 3)
    app = fine(press(app.run(), "Apply"))
    document = app.session_state["paint_recipe"]
    (edit,) = document["edits"]
    assert edit["steps"] == [1, 3] and edit["rows"] == "opposed"
    assert document["draw"] == {"steps": 3, "guidance": 4.0, "height": None, "width": None}
    drawn = prepare(recipe_from(document), root=tree.root).compare([PROMPT], [SEED])
    assert torch.equal(pixels(app.session_state["paint_result"]["files"][1]), drawn.after[0])
    widget(app.number_input, "Steps").set_value(1)
    app = fine(press(app.run(), "Draw"))
    (edit,) = app.session_state["paint_recipe"]["edits"]
    assert edit["steps"] is None, "one step has no range"


def test_a_painting_is_saved_and_loaded_again(page, tree):
    app = fine(painted(paint(page, tree), rows=(1, 2), columns=(2, 3)))
    widget(app.text_input, "Recipe").set_value("a square")
    app = fine(press(app.run(), "Save"))
    path = tree.root / "recipes" / "a-square.json"
    try:
        assert read_recipe(path).prompts == (PROMPT,) and read_recipe(path).seeds == (SEED,)
        again = fine(page("paint", recipe="a-square"))
        assert widget(again.text_input, "Recipe").value == "a square"
        assert widget(again.text_input, "Prompt").value == PROMPT and "4 of 16" in html(again)
        assert again.session_state["paint_recipe"] == json.loads(path.read_text())
        document = json.loads(path.read_text())
        document["edits"].append({"site": BLOCKS[1], "op": "zero", "target": "site"})
        path.write_text(json.dumps(document))
        app = fine(press(page("paint", recipe="a-square"), "Apply"))
        assert "This layer is no painting: op `zero`" in words(app)
        drawn = prepare(read_recipe(path), root=tree.root).compare([PROMPT], [SEED])
        assert torch.equal(pixels(app.session_state["paint_result"]["files"][1]), drawn.after[0])
    finally:
        path.unlink()


def test_mistakes_are_told_and_nothing_is_lost(page, tree):
    app = press(paint(page, tree), "Apply")
    assert not app.exception and "Nothing is painted on the image yet" in words(app)
    app = painted(app, rows=(1, 2), columns=(2, 3))
    widget(app.number_input, "Feature").set_value(D_SAE)
    app = press(app.run(), "Apply")
    assert not app.exception and f"has no feature {D_SAE}, only 0 to" in words(app)
    assert app.session_state["paint_recipe"]["edits"][0]["positions"] == {"canvas": RECTANGLE}
    widget(app.number_input, "Feature").set_value(6)
    fine(press(app.run(), "Apply"))
    for query, sentence in (
        ({"recipe": "nobody"}, "no recipe 'nobody'"),
        ({"feature": "x"}, "is not a number"),
    ):
        app = page("paint", **query)
        assert not app.exception and sentence in words(app)


def test_recipes_that_are_not_paintings_are_told(page, tree):
    recipe = feature_recipe(tree.saes[BLOCK], 5, strength=Strength(value=1.0), draw=DrawConfig())
    for changes, sentence in (
        ({"model": {"spec": "sdxl-turbo"}}, "for the model sdxl-turbo, of which no SAE is"),
        (
            {"saes": {"main": {"name": "x", "weights": "0" * 64}}},
            "The SAE of this layer, x, is not",
        ),
    ):
        path = tree.root / "recipes" / "strange.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(to_json(recipe) | {"prompts": [PROMPT]} | changes))
        try:
            app = page("paint", recipe="strange")
            assert not app.exception and sentence in words(app)
        finally:
            path.unlink()
    bad = to_json(recipe)
    bad["edits"][0]["strength"]["value"] = float("nan")
    with pytest.raises(UserError, match="must be a finite number"):
        recipe_shelf.uploaded(json.dumps(bad).encode(), "bad.json")
    with pytest.raises(UserError, match=r"bad\.json is not readable as JSON"):
        recipe_shelf.uploaded(b"\xff", "bad.json")
    with pytest.raises(UserError, match="is of texts; open it on the page Steer"):
        paint_state.put({"name": "words", "edits": []}, None)


def test_without_known_sizes_strengths_are_raw(page, tree, tmp_path):
    sae = make_sae(tmp_path, tree.spec, BLOCK, 0)
    (sae.path / SCALES).unlink()
    app = fine(page("paint", root=tmp_path, sae=sae.path.name, feature="5", prompt=PROMPT))
    assert widget(app.selectbox, "Unit").options == ["raw"]
    assert f"lorgnette index {sae.path}" in json.dumps([code.value for code in app.code])
    app = fine(press(painted(app, rows=(0, 3), columns=(0, 3)), "Apply"))
    (edit,) = app.session_state["paint_recipe"]["edits"]
    assert edit["positions"] == "all" and edit["strength"] == {"value": 10.0, "unit": "raw"}


# ----------------------------------------------------------------------------------- two prompts


SOURCE = "two blue boats"


def two(page, **query: str) -> AppTest:
    return fine(page("prompts", source=SOURCE, prompt=PROMPT, seed=str(SEED), **query))


def loaded(tree: ImageTree) -> dict[str, LoadedSae]:
    return {run.path.name: loaded_sae(run) for run in tree.saes.values()}


def test_features_are_transported_as_the_recipe_does(page, tree):
    app = two(page)
    widget(app.number_input, "Features").set_value(6)
    app = fine(press(fine(app.run()), "Transport"))
    pair = Pair(source=SOURCE, target=PROMPT, seed=SEED, draw=DrawConfig())
    recipe = transport_recipe(tree.model, loaded(tree), pair, k=6)
    scores = feature_scores(tree.model, loaded(tree), pair)
    added, removed = (app.dataframe[n].value for n in (0, 1))
    assert added["feature"].tolist() == scores["feature"].tolist()[:40]
    assert removed["feature"].tolist() == scores["feature"].tolist()[:-41:-1]
    one = app.session_state["pair_result"]["methods"]["features"]
    assert sorted(map(str, one["document"]["edits"])) == sorted(map(str, to_json(recipe)["edits"]))
    after = prepare(recipe, root=tree.root, model=tree.model).draw([PROMPT], [SEED])[0]
    assert torch.equal(pixels(one["picture"])[::16, ::16], after)
    other = tree.model.generate([SOURCE], [SEED], DrawConfig()).images[0]
    wanted = float((after.double() - other.double()).abs().mean())
    assert one["from_source"] == pytest.approx(wanted)


def test_baselines_stand_beside(page, tree):
    app = two(page)
    app.session_state["pair_methods"] = ["features", "updates", "neurons"]
    app = fine(press(fine(app.run()), "Transport"))
    methods = app.session_state["pair_result"]["methods"]
    assert list(methods) == ["features", "updates", "neurons"]
    pair = Pair(source=SOURCE, target=PROMPT, seed=SEED, draw=DrawConfig())
    sites = [parse_site(block) for block in BLOCKS]
    wanted = to_json(steering_recipe(tree.model, sites, pair))
    assert sorted(map(str, methods["updates"]["document"]["edits"])) == sorted(
        map(str, wanted["edits"])
    )
    app.session_state["pair_only_add"] = True
    app = fine(press(fine(app.run()), "Transport"))
    for one in app.session_state["pair_result"]["methods"].values():
        assert {edit["op"] for edit in one["document"]["edits"]} == {"transport"}
        assert all(edit["source"] == SOURCE for edit in one["document"]["edits"])
    app.session_state["pair_methods"] = []
    app = press(app.run(), "Transport")
    assert not app.exception and "No way of transporting is chosen" in words(app)


def test_masks_of_both_images_reach_the_recipe(tree, monkeypatch):
    monkeypatch.setenv("LORGNETTE_ROOT", str(tree.root))
    upper = ((1.0,) * 4, (1.0,) * 4, (0.0,) * 4, (0.0,) * 4)
    asked = AskedPair(
        source=SOURCE, target=Asked(prompt=PROMPT, seed=SEED), source_mask=upper,
        target_mask=upper[::-1],
    )  # fmt: skip
    records = tuple(data.sae_record(run.path.name) for run in tree.saes.values())
    pair = live_transport.pair_of(asked)
    scores = live_transport.scores(records, asked, "first")
    by_feature = ["site", "feature"]  # equal scores may come in any order, and rounding moves them
    pd.testing.assert_frame_equal(
        scores.set_index(by_feature).sort_index(),
        feature_scores(tree.model, loaded(tree), pair).set_index(by_feature).sort_index(),
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    made = live_transport.features(records, asked, scores.head(3), scores.iloc[::-1].head(3), m=1.0)
    wanted = transport_recipe(tree.model, loaded(tree), pair, k=3)
    assert sorted(map(str, made["edits"])) == sorted(map(str, to_json(wanted)["edits"]))
    nowhere = replace(asked, source_mask=((0.0,) * 4,) * 4)
    with pytest.raises(UserError, match="is 0 everywhere"):
        live_transport.scores(records, nowhere, "first")


def test_two_saes_of_one_block_are_told(page, tree, tmp_path):
    first = make_sae(tmp_path, tree.spec, BLOCK, 1)
    shutil.copytree(first.path, first.path.parent / "another")
    app = page("prompts", root=tmp_path, source=SOURCE, prompt=PROMPT)
    fine(app)
    names = widget(app.multiselect, "Together with").options
    widget(app.multiselect, "Together with").set_value(names)
    app = app.run()
    assert not app.exception and "One SAE of each block was wanted" in words(app)


def test_captions_that_differ_in_one_factor():
    for seed in range(20):
        one, other = (set(text.split()) for text in captions_that_differ(seed))
        assert 1 <= len(one ^ other) <= 3, "a value, or a place's two words and their article"
