"""How the tests are run: in which order, and with which fixtures (`shared_fixtures`)."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: several processes share the cores

LONGEST = ("test_notebooks", "test_block_roles_study", "test_ranks", "test_toyturbo_training",
           "test_breaking_study", "test_browser", "test_simplicity_study", "test_cli",
           "test_ksparse")  # fmt: skip
"""Files that take longest; begun first, they do not keep one process waiting at the end."""


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, and the libraries under them, but not where tests are only dealt out."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, each in its order, and say which tests one process runs: those
    of a file, and all that drive the browser, which share servers."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    for item in items:
        together = "browser" if item.get_closest_marker("browser") else item.path.stem
        item.add_marker(pytest.mark.xdist_group(together))
