"""Fixtures that several test modules share; `conftest` has them loaded."""

# ruff: noqa: F401, I001
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

# Before the project's own modules: what those import first, jaxtyping's hook compiles anew.
import diffusers
import numba
import peft
import plotly.express
import pyarrow.parquet
import pytest
import sklearn
import streamlit.testing.v1
import torch
import transformers

from artifact_tree import Tree, make_report, make_tree
from browsing import ARGUMENTS, CHROMIUM, serving
from dashboard_pages import ENTRY
from streamlit.testing.v1 import AppTest

from probe.errors import Failure
from probe.language import LanguageModel
from probe.models import load_language_model
from probe.toy import tiny_gpt2, tiny_llama


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Tiny models run faster on one thread than on several that wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def frozen_libraries() -> None:
    """Streamlit collects garbage after each run of a page: let it pass over what stays anyway."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_main() -> Iterator[None]:
    """A page run in a test takes the place of `__main__`, which spawned processes run first."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


@pytest.fixture(scope="session")
def llama() -> LanguageModel:
    """A Llama of two layers with random weights."""
    return tiny_llama()


@pytest.fixture(scope="session")
def gpt2() -> LanguageModel:
    """A GPT-2 of two layers with random weights."""
    return tiny_gpt2()


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """The real SmolLM2-135M-Instruct in float32."""
    try:
        return load_language_model("smollm2", dtype="float32")
    except Failure as failure:
        pytest.skip(f"SmolLM2 cannot be had here: {failure}")


@pytest.fixture
def at_root(monkeypatch):
    """Opens a page of the dashboard on a root."""

    def open_page(root: Path, page: str, **query: str) -> AppTest:
        monkeypatch.setenv("LORGNETTE_ROOT", str(root))
        app = AppTest.from_file(str(ENTRY), default_timeout=120).run()
        for name, value in query.items():
            app.query_params[name] = value
        return app.switch_page(f"pages/{page}.py").run()

    return open_page


# ------------------------------------------------------------- a real browser on a real server


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window."""
    playwright_api = pytest.importorskip("playwright.sync_api")
    playwright_api.expect.set_options(timeout=60_000)
    with playwright_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A fresh tab that fails the test on an error nobody caught and on a request to elsewhere."""
    tab = browser.new_page(viewport={"width": 1440, "height": 1300})
    tab.set_default_timeout(60_000)
    elsewhere: list[str] = []
    tab.on(
        "request",
        lambda request: None if is_local(request.url) else elsewhere.append(request.url),
    )
    yield tab
    assert not elsewhere, f"the dashboard asked the network for {elsewhere}"
    tab.close()


def is_local(url: str) -> bool:
    """Whether a browser asks its own machine."""
    return url.startswith(("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:"))


@pytest.fixture(scope="session")
def browsed(tmp_path_factory) -> Tree:
    """The artifacts that `address` serves."""
    made = make_tree(tmp_path_factory.mktemp("browser"))
    make_report(made.root)
    return made


@pytest.fixture(scope="session")
def address(browsed) -> Iterator[str]:
    """Where a dashboard is served, to all browser tests."""
    yield from serving(browsed.root)
