"""The page Collapse in headless Chromium, on the real SmolLM2."""

import re

import pytest
from browsing import CHROMIUM

from probe.errors import Failure
from probe.models import smollm2_folder

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}"),
]
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

PERCENT = re.compile(r"At n = ([0-9,]+) the two outputs are ([0-9.]+) % of their length apart")


def said(page) -> tuple[int, float]:
    """The length and the distance that the page names."""
    found = PERCENT.search(page.get_by_text(PERCENT).inner_text())
    assert found is not None
    return int(found[1].replace(",", "")), float(found[2])


def test_length_prompt_and_gradients(page, address):
    try:
        smollm2_folder()
    except Failure as failure:
        pytest.skip(f"SmolLM2 cannot be had here: {failure}")
    page.goto(f"{address}/collapse")
    expect(page.get_by_text(PERCENT)).to_be_visible(timeout=120_000)
    expect(page.locator(".st-key-collapse_curve .js-plotly-plot").first).to_be_visible()
    n, ones = said(page)
    assert n == 300 and 0.5 < ones < 3, "two ones of three hundred"

    slider = page.get_by_role("slider", name="Repetitions n")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    expect(page.get_by_text("At n = 297")).to_be_visible()

    page.get_by_role("combobox", name="Repeated").click()
    page.get_by_role("option", name=re.compile("digits")).click()
    expect(page.get_by_text("contradicts nothing")).to_be_visible()
    _, digits = said(page)
    assert digits > 3 * ones, "random digits collapse less"

    page.get_by_role("button", name="Measure").click()
    expect(page.locator(".st-key-collapse_sensitivity .js-plotly-plot").first).to_be_visible()
