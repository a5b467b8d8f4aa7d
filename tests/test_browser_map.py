"""Map and Compare in headless Chromium: circle features, see them listed, open one."""

import re
from collections.abc import Iterator

import pytest
from artifact_tree import make_wide_tree
from browsing import CHROMIUM, click_row, serving
from map_tree import make_synthetic_map

from probe.runs import find_runs

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}"),
]
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


@pytest.fixture(scope="module")
def mapped(tmp_path_factory) -> Iterator[str]:
    root = make_wide_tree(tmp_path_factory.mktemp("mapped"), 2000)
    make_synthetic_map(find_runs(root, "sae")[0], 2000)
    yield from serving(root)


def drag(page, *places: tuple[float, float]) -> None:
    """Draw along places of the plot, given as shares of its width and height."""
    box = page.locator(".js-plotly-plot .nsewdrag").first.bounding_box()
    way = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*way[0], steps=4)
    page.mouse.down()
    for place in way[1:]:
        page.mouse.move(*place, steps=12)
    page.mouse.up()


@pytest.mark.parametrize("tool", ["lasso", "box"])
def test_what_is_circled_is_listed_and_opens(page, mapped, tool):
    page.goto(f"{mapped}/map")
    expect(page.locator(".js-plotly-plot .nsewdrag").first).to_be_visible()
    expect(page.get_by_text("Clusters that stand out")).to_be_visible()
    page.wait_for_timeout(1000)
    if tool == "box":
        page.locator('.modebar-btn[data-val="select"]').first.click()
        drag(page, (0.003, 0.997), (0.15, 0.85))
    else:
        drag(page, (0.003, 0.997), (0.003, 0.85), (0.15, 0.85), (0.15, 0.995), (0.01, 0.997))
    expect(page.get_by_text("9 features circled")).to_be_visible()
    page.wait_for_timeout(1000)
    click_row(page, 3)
    expect(page.get_by_role("heading", level=1)).to_have_text("Feature 4")
    assert "feature=4" in page.url


def test_a_found_feature_is_ringed(page, mapped):
    page.goto(f"{mapped}/map?find=77")
    expect(page.get_by_text("1 feature found")).to_be_visible()
    rings = "document.querySelector('.js-plotly-plot')?.data?.length == 2"
    page.wait_for_function(rings)
    page.get_by_role("radio", name="PCA", exact=True).click()
    expect(page.get_by_text(re.compile("of the directions' variance"))).to_be_visible()
    assert page.get_by_test_id("stException").count() == 0
