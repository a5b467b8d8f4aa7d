"""Every notebook runs from top to bottom, on the real model."""

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from probe.errors import Failure
from probe.models import smollm2_folder

FOLDER = Path(__file__).parent.parent / "analyses" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STORE = {"tokens=20_000": "tokens=6_000", "steps=100": "steps=40"}
SMALLER = {
    "01_capture_and_train": STORE,
    "02_interventions_nnsight": STORE,
    "03_interventions_transformer_lens": STORE,
    "04_attribution": STORE,
    "06_images_with_nnsight": {"images=1000": "images=200", "steps=400": "steps=100"},
    "07_collapse": {
        "lengths_up_to(501)": "lengths_up_to(51)", "[11, 101, 501]": "[11, 51]",
        "[11, 51, 101, 251]": "[11, 51]", '"ones"), 120)': '"ones"), 40)',
    },
    "08_circuit_breakers": {
        "STEPS = 30": "STEPS = 2", "[one.ids], 30)": "[one.ids], 8)",
        "[::7], tokens=32": "[::20], tokens=16",
        "[::9], tokens=32": "[::30], tokens=16", "[::13], tokens=32": "[::20], tokens=16",
    },
    "09_simplicity": {"steps=300": "steps=20", "50_000": "20_000"},
}  # fmt: skip
"""What has other numbers here than for a reader; every cell runs all the same."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One root for all: what one notebook captures and trains the next one finds."""
    try:
        smollm2_folder()
    except Failure as failure:
        pytest.skip(f"SmolLM2 cannot be had here: {failure}")
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def kernel(root) -> Iterator[KernelManager]:
    """One kernel for all, emptied before each: the libraries are loaded once."""
    with pytest.MonkeyPatch.context() as here:
        here.setenv("LORGNETTE_ROOT", str(root))
        here.setenv("PLOTLY_RENDERER", "json")
        here.setenv("OMP_NUM_THREADS", "1")  # other tests have the other core
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(cwd=str(FOLDER))
    yield manager
    manager.shutdown_kernel(now=True)


def test_there_are_nine():
    assert len(NOTEBOOKS) == 9


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, kernel):
    notebook = nbformat.read(path, as_version=4)
    for said, smaller in SMALLER.get(path.stem, {}).items():
        assert any(said in cell.source for cell in notebook.cells), said
        for cell in notebook.cells:
            cell.source = cell.source.replace(said, smaller)
    notebook.cells.insert(0, new_code_cell("%reset -f"))
    NotebookClient(notebook, km=kernel, timeout=600).execute()
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "application/json" in output.get("data", {})
    ]
    assert len(figures) >= 2, "a notebook shows plots"
    titles = [
        cell.source.splitlines()[0] for cell in notebook.cells if cell.cell_type == "markdown"
    ]
    assert titles[0].startswith("# ")
