"""From a prompt to a heat map, and from paint to a changed image, in headless Chromium."""

import re
from collections.abc import Iterator

import pytest
from browsing import CHROMIUM, coincide, serving, settled, size
from image_tree import BLOCKS, ImageTree, make_image_tree

from saes.recipes import read_recipe

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}"),
]
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> ImageTree:
    return make_image_tree(tmp_path_factory.mktemp("image-browser"))


@pytest.fixture(scope="module")
def address(tree) -> Iterator[str]:
    yield from serving(tree.root)


def no_trouble(page) -> None:
    assert page.get_by_test_id("stException").count() == 0
    assert page.get_by_test_id("stAlert").count() == 0


def test_from_a_prompt_to_a_heat_map(page, address, tree):
    page.goto(address)
    page.get_by_role("link", name="Explore", exact=True).first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Explore")
    page.get_by_label("Prompt", exact=True).fill("a red circle")
    page.get_by_label("Prompt", exact=True).press("Enter")
    heat = page.locator("img.lg-heat")
    expect(heat).to_have_count(1)
    assert size(heat) == [4, 4]
    assert coincide(heat, page.locator(".lg-picture img").first), "the map covers the image"
    assert heat.evaluate("one => getComputedStyle(one).imageRendering") == "pixelated"
    no_trouble(page)
    assert "prompt=a+red+circle" in page.url and "f=" in page.url

    settled(page)
    table = page.get_by_test_id("stDataFrame").bounding_box()
    page.mouse.click(table["x"] + 16, table["y"] + 38 + 46 + 23)  # the second row's box
    expect(heat).to_have_count(2)
    page.wait_for_timeout(500)
    page.goto(page.url)
    expect(heat).to_have_count(2)
    page.get_by_text("Heat map", exact=True).click()
    expect(heat.first).to_have_css("opacity", "0")


def test_from_paint_to_a_changed_image(page, address, tree):
    name = tree.saes[BLOCKS[0]].path.name
    page.goto(f"{address}/paint?sae={name}&feature=5&prompt=a+red+circle&seed=7")
    canvas = page.get_by_role("application")
    expect(canvas).to_be_visible()
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_text("Nothing is painted on the image yet")).to_be_visible()

    settled(page)
    box = canvas.bounding_box()
    place = box["width"] / 4
    page.mouse.move(box["x"] + 2.5 * place, box["y"] + 1.5 * place)
    page.mouse.down()
    page.mouse.move(box["x"] + 3.5 * place, box["y"] + 1.5 * place, steps=4)
    page.mouse.up()
    table = page.locator(".lg-table")
    expect(table).to_contain_text("2 of 16")
    canvas.press("ArrowDown")
    canvas.press("Space")  # from the place where the stroke began, one below
    expect(table).to_contain_text("3 of 16")
    page.get_by_role("button", name="Undo").click()
    expect(table).to_contain_text("2 of 16")

    page.get_by_role("button", name="Apply").click()
    pictures = page.locator(".st-key-paint_result_images img")
    expect(pictures).to_have_count(3)
    before, after = (pictures.nth(n).get_attribute("src") for n in (0, 1))
    assert before != after
    no_trouble(page)

    settled(page)
    page.get_by_label("Recipe", exact=True).fill("from the canvas")
    page.get_by_label("Recipe", exact=True).press("Enter")
    page.wait_for_timeout(1000)  # the form is drawn again
    settled(page)
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text(re.compile(r"Saved to .*from-the-canvas\.json"))).to_be_visible()
    (edit,) = read_recipe(tree.root / "recipes" / "from-the-canvas.json").edits
    assert edit.positions.canvas == ((0, 0, 0, 0), (0, 0, 1, 1), (0, 0, 0, 0), (0, 0, 0, 0))
