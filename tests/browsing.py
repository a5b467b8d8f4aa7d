"""A dashboard being served and a hand on its table, for the browser tests and their bench."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

CHROMIUM = Path("/usr/bin/chromium")
TOP = Path(__file__).parent.parent
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def serving(root: Path) -> Iterator[str]:
    """Serve a root as `lorgnette dashboard` does; gives the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "dashboard",
        "--root",
        str(root),
        "--port",
        str(port),
    ]
    server = subprocess.Popen(
        command, cwd=TOP, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/_stcore/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for(url: str) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    raise AssertionError(f"{url} does not answer")


def settled(page) -> None:
    """Wait for the script's end: until then what the last run drew stands beside the new."""
    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=60_000)


def size(image) -> list[int]:
    """The width and height of an image as sent; waits for it, and fails where it is broken."""
    return image.evaluate(
        "async image => { await image.decode(); return [image.naturalWidth, image.naturalHeight]; }"
    )


def coincide(one, other) -> bool:
    """Whether two elements cover the same place, both measured at one moment.

    Asked for one after the other they may differ by what the page has moved in between.
    """
    places = "(one, other) => [one, other].map(e => JSON.stringify(e.getBoundingClientRect()))"
    first, second = one.evaluate(places, other.element_handle())
    return first == second


def click_row(page, row: int) -> None:
    """Click a row of the table as a hand does: the table listens to the pointer's way there."""
    box = page.get_by_test_id("stDataFrame").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 52 + 35 * row, steps=8)
    page.wait_for_timeout(250)
    page.mouse.down()
    page.mouse.up()
