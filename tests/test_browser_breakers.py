"""The page Circuit breakers in headless Chromium, on a tiny broken model."""

import re

import pytest
from breaker_tree import broken_root
from browsing import CHROMIUM, serving

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}"),
]
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    yield from serving(broken_root(tmp_path_factory.mktemp("breakers")))


def test_a_request_in_both_models_and_the_way_to_a_feature(page, served):
    page.goto(f"{served}/breakers")
    page.get_by_role("combobox", name="Broken model").click()
    page.get_by_role("option", name=re.compile("recipes")).click()
    expect(page.get_by_text("The model as it was")).to_be_visible(timeout=120_000)
    for key in ("training", "cosine_map", "length_map", "line"):
        expect(page.locator(f".st-key-breaker_{key} .js-plotly-plot").last).to_be_visible()
    request = page.get_by_role("textbox", name="Request")
    request.fill("Describe the moon")
    request.press("Enter")
    ticks = page.locator(".st-key-breaker_cosine_map .xtick")
    expect(ticks.filter(has_text="D").last).to_be_visible()  # tokens are letters here
    page.get_by_role("link", name=re.compile(r"Feature \d+")).first.click()
    expect(page).to_have_url(re.compile(r"/feature\?.*feature=\d+"))
