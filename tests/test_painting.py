"""Masks, layers and pictures of the pages of images, against what one counts by hand."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from app import image_input, image_views, paint_layers, tiles
from app.image_input import Asked, asked_of
from app.mask_canvas import painted_rows, rectangle
from probe.errors import UserError

HALF = ((1.0, 0.0), (0.5, 0.0))


def test_an_overlay_is_clear_where_nothing_fires():
    picture = torch.zeros(4, 4, 3, dtype=torch.uint8)
    picture[..., 0] = 200
    heat = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    shown = image_views.overlay(picture, heat, opacity=0.5, pixels=8)
    assert shown.shape == (8, 8, 3)
    brightest, middle = (torch.from_numpy(tiles.colours())[n].double() for n in (255, 128))
    ground = torch.tensor([200.0, 0.0, 0.0]).double()
    for rows, columns, wanted in (
        (slice(0, 4), slice(0, 4), ground),
        (slice(0, 4), slice(4, 8), (ground + brightest) / 2),
        (slice(4, 8), slice(0, 4), (ground + middle) / 2),
        (slice(4, 8), slice(4, 8), ground),
    ):
        part = shown[rows, columns].double()
        assert (part - wanted).abs().max() <= 0.5, "a place is one square of one colour"
    assert torch.equal(
        image_views.overlay(picture, 0 * heat, opacity=1.0, pixels=8),
        image_views.enlarged(picture, 8),
    )


def test_pictures_are_enlarged_by_whole_pixels():
    picture = torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3)
    shown = image_views.enlarged(picture, 7)
    assert shown.shape == (6, 6, 3) and torch.equal(shown[::3, ::3], picture)
    assert torch.equal(image_views.enlarged(picture, 1), picture), "never smaller"
    large = torch.tensor([[0, 10, 20, 30], [2, 12, 22, 32]], dtype=torch.uint8)
    small = image_views.shrunk(large[..., None].expand(2, 4, 3).contiguous(), 2)
    assert small[..., 0].tolist() == [[6, 26]]
    assert torch.equal(image_views.shrunk(picture, 2), picture), "never larger"


def test_the_change_is_the_mean_over_channels():
    before = torch.zeros(1, 2, 3, dtype=torch.uint8)
    after = torch.tensor([[[30, 0, 60], [255, 255, 255]]], dtype=torch.uint8)
    shown, top = image_views.change(before, after)
    assert top == 255
    assert shown[0, 1].tolist() == tiles.colours()[255].tolist()
    assert shown[0, 0].tolist() == tiles.colours()[30].tolist()
    assert image_views.change(after, after)[1] == 0


def test_layers_of_html_say_what_they_are():
    pixels = tiles.heat_pixels(np.array([[0.0, 3.0]]), 3.0)
    html = tiles.layered_html("data:x", pixels, size=(64, 32), alt='a "red" <b>disc')
    assert "a &quot;red&quot; &lt;b&gt;disc" in html and "aspect-ratio:32/64" in html
    encoded = html.split("base64,")[1].split('"')[0]
    found = np.array(Image.open(io.BytesIO(base64.b64decode(encoded))))
    assert found[0, 0, 3] == 0 and found[0, 1].tolist() == [*tiles.colours()[255].tolist(), 255]
    assert "<img" not in tiles.layered_html("", None, size=(1, 1), alt="")


# ----------------------------------------------------------------------------------------- masks


def test_a_rectangle_counts_from_0_and_holds_both_ends():
    assert rectangle((2, 3), (0, 1), (1, 2)) == ((0, 1, 1), (0, 1, 1))
    assert rectangle((2, 3), (1, 1), (0, 0)) == ((0, 0, 0), (1, 0, 0))
    assert rectangle((1, 2), (1, 0), (0, 1)) == ((0, 0),), "an upside-down one is empty"


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"version": 0, "rows": [[1, 1], [1, 1]]},
        {"version": 1, "rows": [[1, 1]]},
        {"version": 1, "rows": [[1, 1], [1]]},
        {"version": 1, "rows": [[1, 1], [1, 2]]},
        {"version": 1, "rows": [[1, 1], [1, "x"]]},
        {"version": 1, "rows": [[1, 1], [1, float("nan")]]},
        {"version": 1, "rows": "1111"},
        {"version": 1, "rows": [5, [1, 1], [1, 1]]},
        "x",
    ],
)
def test_what_a_browser_sends_is_checked(state):
    assert painted_rows(state, HALF, 1) == HALF


def test_what_a_browser_paints_is_taken():
    assert painted_rows({"version": 1, "rows": [[0, 1], [1, 0.25]]}, HALF, 1) == ((0, 1), (1, 0.25))


# ---------------------------------------------------------------------------------------- layers


def edit(**changes) -> dict:
    return {
        "site": "mid.0", "op": "add", "target": {"feature": 3, "sae": "mid.0"},
        "strength": {"value": 10.0, "unit": "mean"}, "positions": "all", "steps": None,
    } | changes  # fmt: skip


def test_masks_of_layers():
    assert paint_layers.mask_of(edit(), (1, 2)) == ((1, 1),)
    rows = [[0, 0.5], [1, 0]]
    for kind in ("mask", "canvas"):
        found = paint_layers.mask_of(edit(positions={kind: rows}), (1, 2))
        assert found == ((0, 0.5), (1, 0)), "a layer has the places that it was painted with"
    empty = edit(positions={"canvas": [[0.0]]})
    assert paint_layers.mask_of(empty, (1, 2)) == ((0, 0),)
    assert paint_layers.positions_of(((0.0, 0.5), (1.0, 0.0))) == {"canvas": rows}
    assert paint_layers.positions_of(((1.0, 1.0), (1.0, 1.0))) == "all"
    document = {"edits": [edit(), empty, edit(positions={"mask": rows})]}
    assert paint_layers.unpainted(document) == [1]
    assert paint_layers.union([]) is None
    assert paint_layers.union([HALF]) == HALF
    assert paint_layers.union([HALF, ((0.0, 0.2), (1.0, 0.0))]) == ((1, 0.2), (1, 0))


def test_layers_in_words():
    assert paint_layers.target_words(edit()) == "feature 3"
    assert paint_layers.strength_words(edit()) == "10 x mean"
    for target, words in (
        ("site", "the whole block"),
        ({"sae": "main"}, "what its SAE says"),
        ({"features": [1, 2], "sae": "main"}, "2 features"),
        ({"neurons": [7]}, "1 neurons"),
        ({"direction": "red.safetensors"}, "direction red.safetensors"),
    ):
        other = edit(target=target, op="zero", strength=None)
        assert paint_layers.target_words(other) == words and not paint_layers.is_painted(other)
        assert paint_layers.strength_words(other) == ""
    assert paint_layers.is_painted(edit())
    assert not paint_layers.is_painted(edit(op="scale"))
    assert not paint_layers.is_painted(edit(target={"neuron": 1}))
    assert not paint_layers.is_painted(edit(target={"direction": "x"}))


def test_a_painting_is_of_its_image_and_names_only_saes_that_it_uses():
    document = {"saes": {"mid.0": {}, "up.0.0": {}}, "edits": [edit(), edit(target="site")]}
    found = paint_layers.drawn_as(document, Asked(prompt="x", seed=3, steps=2, guidance=1.5))
    assert found["saes"] == {"mid.0": {}} and found["prompts"] == ["x"] and found["seeds"] == [3]
    assert found["draw"] == {"steps": 2, "guidance": 1.5, "height": None, "width": None}
    assert paint_layers.asked_of(found) == Asked(prompt="x", seed=3, steps=2, guidance=1.5)
    sized = found | {"seeds": [], "draw": {"steps": 1, "guidance": 0.0, "height": 64, "width": 32}}
    assert paint_layers.asked_of(sized) == Asked(prompt="x", seed=42, height=64, width=32)
    assert paint_layers.asked_of(found | {"prompts": []}) is None


# --------------------------------------------------------------------------------------- addresses


def test_an_image_and_its_address():
    for one in (Asked(prompt=""), Asked(prompt="a & b = c", seed=0, steps=4, guidance=7.5)):
        assert asked_of(one.address) == one
    assert Asked(prompt="x").address == {"prompt": "x", "seed": "42"}
    assert asked_of({"seed": "x"}) is None, "nothing is asked for without a prompt"
    for address, sentence in (
        ({"seed": "1.5"}, "seed must be a whole number from 0"),
        ({"seed": str(2**32)}, "seed must be a whole number from 0 to 4294967295"),
        ({"seed": "9" * 5000}, "seed must be a whole number"),
        ({"steps": "1001"}, "steps must be a whole number from 1 to 1000"),
        ({"guidance": "inf"}, "guidance must be a number from 0"),
        ({"guidance": "-1"}, "guidance must be a number from 0"),
        ({"guidance": "x"}, "guidance must be a number from 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            asked_of({"prompt": "x"} | address)
    assert Asked(prompt="", seed=1).words == "seed 1, 1 step"
    sized = Asked(prompt="", steps=2, guidance=4.0, height=64, width=64)
    assert sized.words == "seed 42, 2 steps, guidance 4, 64 by 64 pixels"
    assert Asked(prompt="", guidance=1.0).guided is False
    assert image_input.MOST_SEED == 2**32 - 1
