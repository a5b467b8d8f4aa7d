"""The main path through the dashboard in headless Chromium, asserted by what a person sees."""

import re
from collections.abc import Iterator

import pytest
from artifact_tree import make_wide_tree
from browsing import CHROMIUM, click_row, serving

WIDTH = 18_432
"""Features of the wide index: the largest dictionary that the project trains."""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}"),
]
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


@pytest.fixture(scope="module")
def wide_address(tmp_path_factory) -> Iterator[str]:
    yield from serving(make_wide_tree(tmp_path_factory.mktemp("wide"), WIDTH))


def go(page, name: str) -> None:
    page.get_by_role("link", name=name, exact=True).first.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(re.compile(f"^{name}"))


def title(page) -> str:
    return page.get_by_role("heading", level=1).inner_text()


def listed(page) -> int:
    return int(page.get_by_test_id("stMetricValue").first.inner_text().replace(",", ""))


def no_trouble(page) -> None:
    assert page.get_by_test_id("stException").count() == 0
    assert page.get_by_test_id("stAlert").count() == 0


def test_deep_link_is_the_first_address_a_new_server_is_asked_for(page, address, browsed):
    name = browsed.sae.path.name
    page.goto(f"{address}/feature?sae={name}&feature=9")
    expect(page.get_by_role("heading", level=1)).to_have_text("Feature 9")
    expect(page.get_by_role("link", name="Prompt lab", exact=True)).to_be_visible()
    expect(page.get_by_text("Provenance", exact=True)).to_be_visible()
    no_trouble(page)


def test_main_path(page, address, browsed):
    page.goto(address)
    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")
    expect(page.get_by_text(browsed.sae.path.name).first).to_be_visible()
    expect(page.get_by_role("columnheader", name="CE recovered")).to_be_visible()

    go(page, "Features")
    expect(page.get_by_test_id("stDataFrame")).to_be_visible()
    alive = listed(page)
    page.get_by_role("radio", name="All", exact=True).click()
    expect(page.get_by_test_id("stMetricValue").first).to_have_text("64")
    page.get_by_role("radio", name="Alive", exact=True).click()
    expect(page.get_by_test_id("stMetricValue").first).to_have_text(str(alive))
    search = page.get_by_placeholder("letters of a token")
    search.fill("w")
    search.press("Enter")
    expect(page.get_by_test_id("stMetricValue").first).not_to_have_text(str(alive))
    assert 0 < listed(page) < alive
    page.get_by_role("radio", name="Largest first").click()
    page.wait_for_timeout(1500)

    click_row(page, 0)
    expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(r"Feature \d+"))
    expect(page.get_by_text("Strongest", exact=True)).to_be_visible()
    first = title(page)
    assert f"feature={first.split()[1]}" in page.url and browsed.sae.path.name in page.url

    page.get_by_role("button", name="Next").click()
    expect(page.get_by_role("heading", level=1)).not_to_have_text(first)
    page.get_by_role("button", name="Previous").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(first)
    page.get_by_role("button", name="Random").click()
    expect(page.get_by_text("Strongest", exact=True)).to_be_visible()
    page.get_by_role("button", name="Link").click()
    expect(page.get_by_text(f"{address}/feature?sae={browsed.sae.path.name}")).to_be_visible()
    page.keyboard.press("Escape")

    own = page.get_by_placeholder("Type a sentence and press Enter")
    own.fill("A <b>letter</b> came in winter.")
    own.press("Enter")
    expect(
        page.get_by_text(re.compile("Largest activation here|does not fire on this text"))
    ).to_be_visible()
    result = page.locator(".st-key-own_text_result .lg-tokens")
    expect(result).to_contain_text("A <b>letter</b> came in winter.")
    result.locator(".lg-t").nth(2).hover()
    tip = page.locator(".lg-t:hover").get_attribute("data-tip")
    assert re.search(r"token .*\nactivation \d+\.\d{4}\nposition 3$", tip)

    go(page, "Prompt lab")
    expect(
        page.get_by_text("10 features with the most activation on the whole text")
    ).to_be_visible()
    page.get_by_role("radio", name="k", exact=True).first.click()
    expect(page.get_by_text(re.compile("most activation on token"))).to_be_visible()

    go(page, "Training")
    expect(page.get_by_text("Training loss").first).to_be_visible()
    expect(page.locator(".js-plotly-plot").first).to_be_visible()

    go(page, "Reports")
    expect(page.get_by_role("heading", name="A toy study")).to_be_visible()
    expect(page.get_by_text("Ours is <b>better</b>.", exact=True)).to_be_visible()
    expect(page.get_by_text("difference 2.5 [1.5, 3.5]")).to_be_visible()
    expect(page.locator(".js-plotly-plot .gtitle")).to_have_text("Errors by method")
    page.get_by_text("Table: by method").click()
    expect(page.get_by_role("cell", name="<b>ours")).to_be_visible()
    no_trouble(page)


def test_wide_index_is_filtered_and_opened(page, wide_address):
    page.goto(f"{wide_address}/features")
    expect(page.get_by_test_id("stDataFrame")).to_be_visible()
    features = page.get_by_test_id("stMetricValue").first
    expect(features).to_have_text("17,510")
    pick(page, "All")
    expect(features).to_have_text(f"{WIDTH:,}")
    pick(page, "Alive")
    expect(features).to_have_text("17,510")
    page.wait_for_timeout(1500)
    click_row(page, 2)
    expect(page.locator(".lg-rows").first).to_be_visible()


def pick(page, name: str) -> None:
    page.get_by_role("radio", name=name, exact=True).click()
