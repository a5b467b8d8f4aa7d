"""The dashboard at 18,432 features: seconds from a click until what was asked for is drawn."""

import contextlib
import statistics
import tempfile
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
    expect(page.get_by_test_id("stMetricValue").first).to_have_text("17,510", timeout=60_000)
    page.wait_for_timeout(1500)
    choose_all = page.get_by_role("radio", name="All", exact=True)
    listed = f"document.querySelector('[data-testid=stMetricValue]').innerText == '{WIDTH:,}'"
    seconds["filter"].append(timed(page, choose_all.click, listed))
    page.wait_for_timeout(1000)
    examples = "document.querySelector('.lg-rows')"
    seconds["row to feature page"].append(timed(page, lambda: click_row(page, 2), examples))
    page.wait_for_timeout(500)
    before = page.get_by_role("heading", level=1).inner_text()
    following = page.get_by_role("button", name="Next", exact=False)
    another = f"document.querySelector('h1').innerText != '{before}'"
    seconds["next feature"].append(timed(page, following.click, another))


def shown(page: Page) -> None:
    """Wait until a feature's examples are drawn."""
    expect(page.locator(".lg-rows").first).to_be_visible(timeout=60_000)


def timed(page: Page, act: Callable[[], None], drawn: str) -> float:
    """Seconds from the press of the button to the first frame where `drawn` (JavaScript) holds.

    The browser itself looks at the clock: the driver's own polling would add a tenth of a second.
    """
    page.evaluate(f"""() => {{
        window.pressed = window.drawn = null;
        addEventListener("pointerdown", () => window.pressed = performance.now(),
                         {{capture: true, once: true}});
        const look = () => {{
            if (window.pressed && {drawn}) window.drawn = performance.now();
            else requestAnimationFrame(look);
        }};
        look();
    }}""")
    act()
    page.wait_for_function("window.drawn")
    return page.evaluate("window.drawn - window.pressed") / 1000
