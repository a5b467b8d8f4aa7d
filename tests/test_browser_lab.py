"""The prompt lab in headless Chromium: type, chat, pick a token, attribution, patching."""

import re

import pytest
from browsing import CHROMIUM

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}"),
]
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

PLACE = """(plot, [x, y]) => {
  const box = plot.getBoundingClientRect(), axes = plot._fullLayout;
  return [box.left + axes.xaxis._offset + axes.xaxis.l2p(x),
          box.top + axes.yaxis._offset + axes.yaxis.l2p(y)];
}"""


def click_cell(page, key: str, row: int, column: int) -> None:
    """Click a cell of a map as a hand does."""
    plot = page.locator(f".st-key-{key} .js-plotly-plot")
    plot.scroll_into_view_if_needed()
    page.wait_for_timeout(800)
    x, y = plot.evaluate(PLACE, [column, row])
    page.mouse.move(x - 30, y, steps=3)
    page.mouse.move(x, y, steps=4)
    page.wait_for_timeout(300)
    page.mouse.down()
    page.mouse.up()


def view(page, name: str) -> None:
    page.get_by_role("radio", name=name, exact=True).click()


def test_a_text_is_read_in_every_view(page, address):
    page.goto(f"{address}/prompt_lab")
    expect(page.get_by_text("10 features with the most activation")).to_be_visible()
    page.get_by_label("Text", exact=True).fill("Anna <b>met Tom.")
    page.get_by_role("button", name="Read the text").click()
    page.get_by_role("radio", name="<", exact=True).click()
    expect(page.get_by_text("most activation on token 6, <")).to_be_visible()

    view(page, "Layers")
    expect(page.locator(".st-key-layers_map .js-plotly-plot").first).to_be_visible()
    click_cell(page, "layers_map", 0, 3)
    expect(page.get_by_text("resid_post.1, token 3, n")).to_be_visible()

    view(page, "Logit lens")
    expect(page.get_by_text("after layer 1 and token 16, .")).to_be_visible()
    click_cell(page, "lens_map", 0, 5)
    expect(page.get_by_text("after layer 0 and token 5")).to_be_visible()

    view(page, "Attribution")
    expect(page.locator(".st-key-effects .js-plotly-plot").first).to_be_visible()
    expect(
        page.get_by_text(re.compile("Estimate against measurement, 10 features"))
    ).to_be_visible()
    box = page.get_by_role("combobox", name="minus logit of")
    box.fill(" Kim")
    box.press("Enter")
    expect(
        page.get_by_text(re.compile("is 4 tokens of .* where one token was wanted"))
    ).to_be_visible()
    box.fill("x")
    box.press("Enter")
    expect(page.get_by_text(re.compile("where one token was wanted"))).to_have_count(0)
    expect(page.locator(".st-key-effects .js-plotly-plot").first).to_be_visible()
    assert page.get_by_test_id("stException").count() == 0
    assert page.get_by_test_id("stAlert").count() == 0


def test_two_texts_are_patched(page, address):
    page.goto(f"{address}/prompt_lab")
    page.get_by_label("Text", exact=True).fill("Anna met Tom.")
    page.get_by_role("button", name="Read the text").click()
    view(page, "Patching")
    second = page.get_by_label(re.compile("The second text"))
    second.fill("Anna met Emma.")
    page.get_by_role("button", name="Patch between").click()
    expect(page.get_by_text("the corrupted one 15")).to_be_visible()
    second.fill("Anna met Kim.")
    page.get_by_role("button", name="Patch between").click()
    expect(page.locator(".st-key-patch_map .js-plotly-plot").first).to_be_visible()
    expect(page.locator(".st-key-patch_control .js-plotly-plot").first).to_be_visible()
    click_cell(page, "patch_map", 0, 1)
    expect(page.get_by_text("resid_post.0, token 11")).to_be_visible()
    assert page.get_by_test_id("stException").count() == 0


def test_a_chat_without_a_template_says_so(page, address):
    page.goto(f"{address}/prompt_lab")
    page.get_by_role("radio", name="Chat", exact=True).click()
    expect(page.get_by_text("has no chat template")).to_be_visible()
    page.get_by_role("button", name="Add a turn").click()
    expect(page.get_by_label("Says")).to_have_count(3)
