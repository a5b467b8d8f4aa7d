"""Image features in headless Chromium: open one, see a heat map over an image, hide it."""

import re
from collections.abc import Iterator

import pytest
from browsing import CHROMIUM, coincide, serving, size
from image_index_tree import make_image_tree

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}"),
]
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Iterator[str]:
    yield from serving(make_image_tree(tmp_path_factory.mktemp("browsed")).root)


def test_a_feature_is_seen_in_its_images(page, images):
    page.goto(f"{images}/features")
    page.get_by_role("radio", name="Pictures").click()
    cards = page.locator(".lg-tiles .lg-tile")
    expect(cards.first).to_be_visible()
    cards.nth(2).get_by_role("link").last.click()
    expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(r"Feature \d+"))
    tile = page.locator(".lg-tiles .lg-tile").first
    expect(tile).to_be_visible()
    heat, image = tile.locator("img.lg-heat"), tile.locator("img.lg-small")
    for shown in (heat, image):
        expect(shown).to_be_visible()
    assert size(image) == [32, 32]
    assert size(heat) == [4, 4], "a pixel a place"
    assert heat.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert coincide(heat, image), "the map lies over the image"
    assert heat.bounding_box()["width"] > 60
    expect(heat).to_have_css("opacity", "0.65")
    page.get_by_text("Heat map", exact=True).click()
    expect(heat).to_have_css("opacity", "0")
    address = tile.get_by_role("link").get_attribute("href")
    assert re.match(r"explore\?sae=.*&f=\d+&prompt=a\+.*&seed=\d+$", address)
    assert page.get_by_test_id("stException").count() == 0
