"""From a feature's page to a steered text, a saved recipe and back, in headless Chromium."""

import re

import pytest
from browsing import CHROMIUM

from saes.recipes import Feature, read_recipe

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}"),
]
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


def test_a_feature_is_found_steered_and_its_recipe_saved(page, address, browsed):
    name = browsed.sae.path.name
    page.goto(f"{address}/feature?sae={name}&feature=9")
    page.get_by_role("link", name="Steer with this feature").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Steer")
    expect(page.get_by_label("Feature", exact=True)).to_have_value("9")
    page.get_by_label("Prompt", exact=True).fill("Rain fell on the harbour")
    page.get_by_label("New tokens", exact=True).fill("6")
    page.get_by_label("New tokens", exact=True).press("Enter")
    page.get_by_role("button", name="Steer", exact=True).click()
    texts = page.locator(".st-key-steer_texts")
    expect(texts.get_by_role("heading", name="Steered")).to_be_visible()
    expect(texts.locator(".lg-tokens").first).to_contain_text("Rain fell on the harbour")

    page.get_by_label("Recipe", exact=True).fill("from the browser")
    page.get_by_label("Recipe", exact=True).press("Enter")
    page.wait_for_timeout(1500)  # the form is drawn again
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text(re.compile("Saved to .*from-the-browser.json"))).to_be_visible()
    path = browsed.root / "recipes" / "from-the-browser.json"
    try:
        target = read_recipe(path).edits[0].target
        assert isinstance(target, Feature) and target.feature == 9
        page.goto(f"{address}/steer?recipe=from-the-browser")
        expect(page.get_by_label("Recipe", exact=True)).to_have_value("from the browser")
    finally:
        path.unlink(missing_ok=True)
