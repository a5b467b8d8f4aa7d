"""A mask painted on an image in the browser; `mask_canvas.js` is what runs there.

The mask has the places of a feature map, not the pixels: what is painted is what is edited.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamlit.components.v2 import component

Rows = tuple[tuple[float, ...], ...]
"""Weights from 0 to 1, row by row."""


def _text(ending: str) -> str:
    return Path(__file__).with_suffix(ending).read_text(encoding="utf-8")


_CANVAS = component("lorgnette_mask", html=_text(".html"), css=_text(".css"), js=_text(".js"))


def mask_canvas(
    image: str,
    mask: Rows,
    *,
    size: tuple[int, int],
    key: str,
    label: str,
    version: int = 0,
    others: Rows | None = None,
) -> Rows:
    """The image with its places to paint on, and the mask as it is painted now.

    Args:
        image: its address (`data:...`).
        mask: what is painted to begin with.
        size: height and width of the image in pixels.
        key: of the widget.
        label: what it is, for those who cannot see it.
        version: another one forgets what was painted and begins again with `mask`.
        others: a mask of the same places, shown hatched.
    """
    data = {
        "image": image, "mask": mask, "others": others, "label": label, "version": version,
        "aspect": size[1] / size[0],
    }  # fmt: skip
    found = _CANVAS(
        key=key, data=data, default={"mask": None}, on_mask_change=lambda: None, width="stretch"
    )
    return painted_rows(found.get("mask"), mask, version)


def painted_rows(state: Any, mask: Rows, version: int) -> Rows:
    """What the browser says is painted, where it has the mask's shape and version; else `mask`."""
    if not isinstance(state, dict) or state.get("version") != version:
        return mask
    rows = state.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return mask
    if [len(row) for row in rows] != [len(row) for row in mask]:
        return mask
    if not all(isinstance(w, int | float) and 0 <= w <= 1 for row in rows for w in row):
        return mask
    return tuple(tuple(float(weight) for weight in row) for row in rows)


def rectangle(grid: tuple[int, int], rows: Sequence[int], columns: Sequence[int]) -> Rows:
    """A mask of a rectangle of places: from the first to the last row and column, both included."""
    return tuple(
        tuple(
            float(rows[0] <= y <= rows[1] and columns[0] <= x <= columns[1])
            for x in range(grid[1])
        )
        for y in range(grid[0])
    )  # fmt: skip
