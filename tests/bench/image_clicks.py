"""The pages of images with toy-turbo: seconds from a click until what was asked for is drawn."""

import contextlib
import statistics
import tempfile
from pathlib import Path

import pandas as pd
from playwright.sync_api import Page, expect, sync_playwright

from probe.toyturbo.parts import UNET_WIDTHS
from tests.bench.clicks import ROUNDS, served, timed
from tests.bench.images import SITES, toy_turbo
from tests.browsing import ARGUMENTS, CHROMIUM
from tests.image_tree import make_sae

WIDTH = UNET_WIDTHS[-1]
D_SAE, K = 4 * WIDTH, 10
"""The published expansion and sparsity."""
QUERY = "prompt=a+large+red+disc+at+the+top+left"
WAYS = ("Explore: an image, its features, a map", "Paint: before and after")


def measure() -> pd.DataFrame:
    """Each click several times, on a server that has drawn both pages once."""
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        address = held.enter_context(served(make_root(folder)))
        playwright = held.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1440, "height": 1300})
        page.set_default_timeout(120_000)
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        explore(page, address, seconds[WAYS[0]])
        paint(page, address, seconds[WAYS[1]])
        browser.close()
    return pd.DataFrame(
        [
            {"click": name, "seconds": statistics.median(took), "longest": max(took)}
            for name, took in seconds.items()
        ]
    )


def make_root(folder: Path) -> Path:
    """Random SAEs of toy-turbo's four blocks, which cost what trained ones do."""
    model = toy_turbo()
    spec = model.spec
    if spec != "toy-turbo":
        spec = str(folder / "toy")
        model.pipeline.save_pretrained(spec)
    for seed, site in enumerate(SITES):
        make_sae(folder / "artifacts", spec, site, seed, width=WIDTH, d_sae=D_SAE, k=K)
    return folder / "artifacts"


def explore(page: Page, address: str, seconds: list[float]) -> None:
    """Draw the prompt from one seed after the other."""
    page.goto(f"{address}/explore?{QUERY}")
    for counted in range(-1, ROUNDS):
        drawn = remembered(page, ".lg-picture img")
        took = timed(page, page.get_by_role("button", name="Next seed").click, drawn)
        seconds += [took] if counted >= 0 else []


def paint(page: Page, address: str, seconds: list[float]) -> None:
    """Paint the whole image of one seed after the other with a feature."""
    page.goto(f"{address}/paint?{QUERY}")
    canvas = page.get_by_role("application")
    expect(canvas).to_be_visible(timeout=120_000)
    page.get_by_role("button", name="All", exact=True).click()
    table = page.locator(".lg-table")
    expect(table).to_contain_text("all", timeout=60_000)
    page.get_by_role("button", name="Apply").click()
    for counted in range(-1, ROUNDS):
        drawn = remembered(page, ".st-key-paint_result_images img")
        page.get_by_role("button", name="Next seed").click()
        expect(page.get_by_text("earlier painting")).to_be_visible()
        page.wait_for_timeout(1000)
        took = timed(page, page.get_by_role("button", name="Apply").click, drawn)
        seconds += [took] if counted >= 0 else []


def remembered(page: Page, selector: str) -> str:
    """Keep a picture's address; gives the JavaScript that is true once it is another one."""
    page.wait_for_selector(selector)
    page.wait_for_timeout(1500)
    page.evaluate(f"window.before = document.querySelector('{selector}').src")
    return f"document.querySelector('{selector}')?.src != window.before"
