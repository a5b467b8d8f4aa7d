"""The dashboard at 18,432 features: seconds from a click until what was asked for is drawn."""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from playwright.sync_api import Page, expect, sync_playwright

from tests.artifact_tree import make_wide_tree
from tests.browsing import ARGUMENTS, CHROMIUM, click_row, serving

WIDTH = 18_432
ROUNDS = 5


def measure() -> pd.DataFrame:
    """Each click several times, on a server that has drawn both pages once."""
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        address = held.enter_context(served(make_wide_tree(folder, WIDTH)))
        playwright = held.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1440, "height": 1300})
        page.goto(f"{address}/feature?feature=5")
        shown(page)
        seconds = {name: [] for name in ("filter", "row to feature page", "next feature")}
        for _ in range(ROUNDS):
            browse(page, address, seconds)
        browser.close()
    return pd.DataFrame(
        [
            {"click": name, "seconds": statistics.median(took), "longest": max(took)}
            for name, took in seconds.items()
        ]
    )


served = contextlib.contextmanager(serving)


def browse(page: Page, address: str, seconds: dict[str, list[float]]) -> None:
    """One round: filter the table, open a row, go on to the next feature."""
    page.goto(f"{address}/features")
    count = page.get_by_test_id("stMetricValue").first
    expect(count).to_have_text("17,510")
    page.wait_for_timeout(1500)
    choose_all = page.get_by_role("radio", name="All", exact=True)
    seconds["filter"].append(
        timed(choose_all.click, lambda: expect(count).to_have_text(f"{WIDTH:,}"))
    )
    page.wait_for_timeout(1000)
    seconds["row to feature page"].append(timed(lambda: click_row(page, 2), lambda: shown(page)))
    page.wait_for_timeout(500)
    heading = page.get_by_role("heading", level=1)
    before = heading.inner_text()
    following = page.get_by_role("button", name="Next", exact=False)
    seconds["next feature"].append(
        timed(following.click, lambda: expect(heading).not_to_have_text(before))
    )


def shown(page: Page) -> None:
    """Wait until a feature's examples are drawn."""
    expect(page.locator(".lg-rows").first).to_be_visible(timeout=60_000)


def timed(act: Callable[[], None], drawn: Callable[[], None]) -> float:
    """Seconds from the start of an act until its result is drawn."""
    started = time.perf_counter()
    act()
    drawn()
    return time.perf_counter() - started
