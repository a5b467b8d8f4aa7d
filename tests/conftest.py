"""How the tests are run: in which order, and with which fixtures (`shared_fixtures`)."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: several processes share the cores

LONGEST = ("test_browser", "test_notebooks", "test_block_roles_study", "test_ranks",
           "test_toyturbo_training", "test_breaking_study", "test_simplicity_study", "test_cli",
           "test_ksparse")  # fmt: skip
"""Files that take longest; begun first, they do not keep one process waiting at the end."""


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, and the libraries under them, but not where tests are only dealt out."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; each keeps its order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(_together(item.nodeid), len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Deal out what belongs together to one process, so that nothing is set up twice."""
    from xdist.scheduler import LoadScopeScheduling

    class WholeFiles(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _together(nodeid)

    return WholeFiles(config, log)


def _together(nodeid: str) -> str:
    """Which tests one process runs: those of a file, and all in a browser, which share servers."""
    file = Path(nodeid.partition("::")[0]).stem
    return "test_browser" if file.startswith("test_browser") else file
