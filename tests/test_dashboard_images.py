"""The pages that text and image features share, on an SAE of an image model."""

import base64
import csv
import html
import io
import json
import re
import urllib.parse

import numpy as np
import pytest
from dashboard_pages import htmls, words
from image_index_tree import D_SAE, GRID, ImageTree, make_image_tree

from app.commands import label
from app.commands.map import Command as Map
from app.commands.map import run as draw_map
from app.commands.options import Common
from app.tiles import Tile, colours, heat_pixels, picture_url, pixels_url, tile_html
from probe.pictures import decode
from saes.feature_queries import FeatureIndex
from saes.label_schema import LabelConfig


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> ImageTree:
    made = make_image_tree(tmp_path_factory.mktemp("images"), steps=2)
    common = Common(root=made.root)
    few = LabelConfig(pool_sequences=20)
    label.run(label.Command(sae=made.sae.path, labels=few, device="cpu", common=common))
    draw_map(Map(sae=made.sae.path, common=common))
    return made


@pytest.fixture(scope="module")
def index(tree) -> FeatureIndex:
    return FeatureIndex.open(next(tree.sae.path.glob("index-*")))


@pytest.mark.parametrize(
    "page", ["overview", "features", "feature", "map", "compare", "training", "prompt_lab", "steer"]
)
def test_every_page_shows_without_trouble(at_root, tree, page):
    app = at_root(tree.root, page)
    assert not app.exception and not app.error and not app.warning
    assert app.title[0].value


def test_the_feature_page_shows_images_with_maps(at_root, tree, index):
    feature = index.random_alive(3)
    app = at_root(tree.root, "feature", sae=tree.sae.path.name, feature=str(feature))
    headings = [element.value for element in app.subheader]
    wanted = {"Where it fires", "When it fires", "Icon", "Examples", "Fire on the same places",
              "Activations", "Nearest decoder directions", "Provenance"}  # fmt: skip
    assert wanted <= set(headings) and "Effect on the logits" not in headings
    rows = index.examples(feature)
    bodies = [body for body in htmls(app) if '"lg-tiles' in body]
    assert len(bodies) == 3, "strongest, by interval, random"
    top = rows[rows["kind"] == "top"].to_dict("records")
    passes = index.images.passes([row["sequence"] for row in top])
    images = index.images.images([one.image for one in passes.values()])
    tiles = bodies[0].split("<figure")[1:]
    assert len(tiles) == len(top)
    for tile, row in zip(tiles, top, strict=True):
        one = passes[row["sequence"]]
        picture = images[one.image]
        assert picture.data is not None
        assert picture_url(picture.data, "png") in tile, "the picture itself"
        heat = index.images.map_of(row["positions"], row["activations"])
        scale = index.feature(feature)["max"]
        assert pixels_url(heat_pixels(heat, scale)) in tile, "and its map"
        prompt = picture.prompt.replace("<", "&lt;").replace(">", "&gt;")
        assert f'alt="{prompt}"' in tile and f"step {one.step + 1}" in tile
        link = f"explore?sae={tree.sae.path.name}&amp;f={feature}&amp;prompt="
        assert link in tile and f"&amp;seed={picture.seed}&amp;steps=2" in tile
    shares = re.findall(r"Contains ([\d.]+) %", bodies[1])
    assert sum(map(float, shares)) == pytest.approx(100, abs=1)
    assert "<b>fox" not in "".join(htmls(app))


def test_heat_maps_are_clear_where_nothing_fires(index):
    heat = np.array([[0.0, 1.0], [2.0, 4.0]])
    pixels = heat_pixels(heat, 4.0)
    assert pixels[0, 0, 3] == 0 and (pixels[..., 3] > 0).sum() == 3
    assert pixels[1, 1, :3].tolist() == colours()[255].tolist()
    assert pixels[0, 1, :3].tolist() == colours()[64].tolist()
    known = np.array([[False, True], [True, True]])
    assert heat_pixels(heat, 4.0, known)[0, 0, 3] > 0, "an unknown place is not a silent one"
    url = pixels_url(pixels)
    data = url.removeprefix("data:image/png;base64,")
    assert decode(base64.b64decode(data)).shape == (2, 2, 3)


def test_a_picture_that_was_not_kept_is_said_and_prompts_are_escaped():
    tile = Tile(
        picture="", size=(32, 64), heat=np.eye(2), known=np.ones((2, 2), bool), focus=(1, 1),
        image=7, prompt='"><script>x', seed=3, step=0, conditional=False, draw={},
    )  # fmt: skip
    shown = tile_html(tile, scale=1.0, explore={"sae": "a&b"})
    assert "The picture was not kept." in shown and "without the prompt" in shown
    assert "<script" not in shown and "aspect-ratio:64/32" in shown
    query = urllib.parse.parse_qs(html.unescape(shown).split("explore?")[1].split('"')[0])
    assert query == {"sae": ["a&b"], "prompt": ['"><script>x'], "seed": ["3"]}
    assert "explore" not in tile_html(tile, scale=1.0, explore=None)


def test_large_pictures_are_shrunk():
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (600, 300), (200, 10, 10)).save(file, "JPEG")
    url = picture_url(file.getvalue(), "jpeg")
    shown = decode(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))
    assert shown.shape == (128, 256, 3) and (shown[64, 128].int() - 10).abs()[1:].max() < 8


def test_maps_are_hidden_by_a_switch(at_root, tree, index):
    app = at_root(tree.root, "feature", feature=str(index.random_alive(3)))
    assert any("--lg-heat:0.65" in body for body in htmls(app))
    app.get_by_key("heat_opacity").set_value(0.3).run()
    assert any("--lg-heat:0.30" in body for body in htmls(app))
    app.get_by_key("heat").set_value(False).run()
    assert any("--lg-heat:0.00" in body for body in htmls(app))


def test_the_icon_is_that_of_its_recipe(at_root, tree, index):
    from app.feature_icon import GAMMAS
    from probe.diffusion import DrawConfig
    from saes.drawing import prepare
    from saes.recipe_making import icon_recipe

    feature = index.random_alive(3)
    app = at_root(tree.root, "feature", feature=str(feature))
    app.get_by_key("icons").set_value(True).run()
    assert not app.exception and not app.warning
    draw = DrawConfig(steps=2, height=32, width=32)
    drawing = prepare(icon_recipe(tree.sae, feature, draw=draw), root=tree.root, device="cpu")
    page = "".join(htmls(app))
    for gamma in GAMMAS:
        assert pixels_url(drawing.draw([""], [42], times=gamma)[0].numpy()) in page


def test_features_are_searched_by_the_prompts_of_their_images(at_root, tree, index):
    app = at_root(tree.root, "features")
    assert len(app.dataframe[0].value) == index.n_alive
    assert "positive_tokens" not in app.dataframe[0].value, "there are no logits"
    app.get_by_key("q").set_value("RED BOAT").run()
    found = app.dataframe[0].value
    expected = {}
    for feature in range(D_SAE):
        rows = index.examples(feature, "top").head(8)
        passes = index.images.passes(rows["sequence"].tolist())
        images = index.images.images([one.image for one in passes.values()])
        prompts = [images[passes[s].image].prompt for s in rows["sequence"]]
        if share := np.mean(["red boat" in prompt for prompt in prompts] or [0]):
            expected[feature] = share
    assert dict(zip(found["feature"], found["match"], strict=True)) == pytest.approx(expected)
    assert found["match"].is_monotonic_decreasing
    app.get_by_key("look").set_value("pictures").run()
    gallery = next(body for body in htmls(app) if '"lg-tiles' in body)
    assert gallery.count("<figure") == len(expected) and "feature?sae=" in gallery


def test_maps_name_prompts_and_labels(at_root, tree):
    app = at_root(tree.root, "map", sae=tree.sae.path.name)
    hover = json.loads(app.get("plotly_chart")[0].proto.spec)["data"][0]["text"]
    assert len(hover) == D_SAE and all("<br>" in text for text in hover)


def test_overview_counts_images(at_root, tree):
    app = at_root(tree.root, "overview")
    assert "40 images" in words(app) and "Pixels recovered" in words(app)


def test_text_pages_say_where_image_features_are(at_root, tree):
    app = at_root(tree.root, "prompt_lab", sae=tree.sae.path.name)
    assert "is of an image model" in words(app)


def test_downloads_hold_maps_and_pictures(tree, index, monkeypatch):
    from app import data, feature_data, feature_download

    monkeypatch.setenv("LORGNETTE_ROOT", str(tree.root))
    feature = index.random_alive(3)
    content = feature_data.feature_content(data.sae_record(tree.sae.path.name), feature)
    rows = list(csv.DictReader(io.StringIO(feature_download.examples_csv(content))))
    examples = index.examples(feature)
    assert len(rows) == sum(map(len, examples["positions"]))
    first = next(row for row in rows if row["kind"] == "top")
    top = examples[examples["kind"] == "top"].iloc[0]
    place = int(first["y"]) * GRID[1] + int(first["x"])
    fired = dict(zip(top["positions"], top["activations"], strict=True))
    assert float(first["activation"]) == pytest.approx(fired[place])
    document = json.loads(feature_download.document_json(content))
    assert np.allclose(document["in_images"]["mean_map"], index.images.mean_map(feature))
    sequence = document["examples"][0]["sequences"][0]
    assert np.array(sequence["activations"]).shape == GRID and sequence["prompt"]
    page = feature_download.page_html(content)
    assert "img-src data:" in page and "<script" not in page and 'src="http' not in page
    assert page.count('alt="heat map"') == len(examples)
