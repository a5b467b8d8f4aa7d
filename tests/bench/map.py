"""The map at 20,000 features: seconds until what is circled is listed, and frames while panning."""

import contextlib
import itertools
import statistics
import tempfile
from pathlib import Path

import pandas as pd
from playwright.sync_api import Page, WebSocket, expect, sync_playwright

from probe.runs import find_runs
from tests.artifact_tree import make_wide_tree
from tests.bench.clicks import served
from tests.browsing import ARGUMENTS, CHROMIUM
from tests.map_tree import make_synthetic_map

WIDTH = 20_000
ROUNDS = 5
PLOT = ".js-plotly-plot .nsewdrag"
LASSOS = {"a tenth of the points": 0.125, "all points": 0.497}
"""Half of the side of what is circled, as a share of the plot."""
WATCH = """() => {
    window.released = window.drawn = null;
    addEventListener("mouseup", () => window.released ??= performance.now(), {capture: true});
    const look = () => {
        const said = document.body.innerText.includes("features circled");
        if (window.released && said) window.drawn = performance.now();
        else requestAnimationFrame(look);
    };
    look();
}"""
FRAMES = """() => {
    window.frames_at = [];
    const look = (at) => { window.frames_at.push(at); requestAnimationFrame(look); };
    requestAnimationFrame(look);
}"""


def measure() -> pd.DataFrame:
    """Circle some points and all points, and drag the map about, in headless Chromium.

    The browser draws WebGL in software here, so a frame takes longer than with a graphics card.
    """
    with contextlib.ExitStack() as held:
        root = make_wide_tree(Path(held.enter_context(tempfile.TemporaryDirectory())), WIDTH)
        make_synthetic_map(find_runs(root, "sae")[0], WIDTH)
        address = held.enter_context(served(root))
        playwright = held.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1440, "height": 1300})
        opened(page, address)
        rows = [row("open the page (s)", [opened(page, address) for _ in range(ROUNDS)])]
        for name, half in LASSOS.items():
            times = [circled(page, address, half) for _ in range(ROUNDS)]
            rows.append(row(f"lasso to table, {name} (s)", [seconds for seconds, _ in times]))
            rows.append(row(f"sent to the browser then (kB), {name}", [sent for _, sent in times]))
        frames = [frame for _ in range(3) for frame in panned(page, address)]
        rows.append(row("a frame while panning (s)", frames))
        browser.close()
    return pd.DataFrame(rows)


def row(what: str, values: list[float]) -> dict[str, str | float]:
    """Median, nineteen of twenty, and longest."""
    ordered = sorted(values)
    return {
        "what": what,
        "median": statistics.median(ordered),
        "95 %": ordered[int(0.95 * len(ordered))],
        "longest": ordered[-1],
    }


def opened(page: Page, address: str) -> float:
    """Seconds from the address to the first frame with a drawn map."""
    page.goto(f"{address}/map")
    page.wait_for_function(f"document.querySelector('{PLOT}')")
    return page.evaluate("performance.now()") / 1000


def ready(page: Page, address: str) -> dict[str, float]:
    """Open the page afresh; gives the box of the plot."""
    page.goto(f"{address}/map")
    expect(page.locator(PLOT).first).to_be_visible(timeout=60_000)
    page.wait_for_timeout(2500)
    box = page.locator(PLOT).first.bounding_box()
    assert box is not None
    return {name: float(box[name]) for name in ("x", "y", "width", "height")}


def circled(page: Page, address: str, half: float) -> tuple[float, float]:
    """Seconds from the release of the button to the table, and kB that the server sent for it."""
    sent: list[int] = []

    def listen(socket: WebSocket) -> None:
        socket.on("framereceived", lambda frame: sent.append(len(frame)))

    page.once("websocket", listen)
    box = ready(page, address)
    corners = [(-half, -half), (half, -half), (half, half), (-half, half), (-half, -half)]
    way = [
        (box["x"] + (0.5 + x) * box["width"], box["y"] + (0.5 + y) * box["height"])
        for x, y in corners
    ]
    page.evaluate(WATCH)
    page.mouse.move(*way[0])
    page.mouse.down()
    for place in way[1:]:
        page.mouse.move(*place, steps=5)
    before = len(sent)
    page.mouse.up()
    page.wait_for_function("window.drawn", timeout=60_000)
    page.wait_for_timeout(500)
    seconds = page.evaluate("window.drawn - window.released") / 1000
    return seconds, sum(sent[before:]) / 1000


def panned(page: Page, address: str) -> list[float]:
    """Seconds between frames while the map is dragged about."""
    box = ready(page, address)
    page.locator('.modebar-btn[data-val="pan"]').first.click()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.evaluate(FRAMES)
    for step in range(60):
        page.mouse.move(x + 2 * step, y + step)
    at = page.evaluate("window.frames_at")
    page.mouse.up()
    return [(after - before) / 1000 for before, after in itertools.pairwise(at)]
