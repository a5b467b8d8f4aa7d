"""The page Simplicity in headless Chromium."""

import re

import pytest
from browsing import CHROMIUM, settled

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}"),
]
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

CYCLES = re.compile(r"Its mean frequency is ([0-9.]+) cycles")


def cycles(page) -> float:
    """The complexity that the page names."""
    found = CYCLES.search(page.get_by_text(CYCLES).inner_text())
    assert found is not None
    return float(found[1])


def test_a_function_is_drawn_measured_and_found_in_the_map(page, address):
    page.goto(f"{address}/simplicity")
    expect(page.get_by_text(CYCLES)).to_be_visible(timeout=120_000)
    expect(page.locator(".st-key-simplicity_function .js-plotly-plot").first).to_be_visible()
    relu = cycles(page)
    assert 2 < relu < 6

    page.get_by_role("combobox", name="Activation").click()
    page.get_by_role("option", name="sine", exact=True).click()
    expect(page.get_by_role("heading", name="sine by depth and weight scale")).to_be_visible()
    expect(page.get_by_text(CYCLES)).not_to_contain_text(f"{relu:.2f} cycles")
    first = cycles(page)
    assert first > relu, "at scale 4 sine is more complex"

    page.get_by_role("button", name="Next draw").click()
    expect(page.get_by_text(CYCLES)).not_to_contain_text(f"{first:.2f} cycles")
    expect(page.get_by_role("spinbutton", name="Draw")).to_have_value("1")

    plain = cycles(page)
    page.get_by_text("residual", exact=True).click()
    expect(page.get_by_text(CYCLES)).not_to_contain_text(f"{plain:.2f} cycles")
    settled(page)
    second = page.locator(".st-key-simplicity_map .js-plotly-plot")
    box = second.locator(".nsewdrag").first.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] * 0.5 / 7, box["y"] + box["height"] * 5.5 / 6)
    expect(page.get_by_role("slider", name="Hidden layers")).to_have_attribute(
        "aria-valuetext", "1", timeout=30_000
    )
    expect(page.get_by_text("hardly more than a slope")).to_be_visible()
