"""Questions to an index of images: where and when a feature fires, and the images themselves.

`FeatureIndex.images` is one of these. As there, only the row groups that a question touches are
read, and nothing is ever written.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from probe.errors import Failure
from saes.sorted_parquet import SortedParquet


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What a sequence of an index of images is: one pass of the U-Net over one image."""

    sequence: int
    """Its number."""
    image: int
    """Number of the image."""
    step: int
    """Denoising step, counted from 0."""
    conditional: bool
    """Whether the pass read the prompt."""
    kept: tuple[int, ...] | None
    """Places whose activations are known; None for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedImage:
    """An image that some example is of."""

    image: int
    """Its number."""
    doc: int
    """Number of its prompt."""
    seed: int
    """The seed of its noise: prompt and seed draw it again."""
    prompt: str
    """What was asked for."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    format: str | None
    """`png` or `jpeg`; None where no picture was kept."""
    data: bytes | None
    """The encoded image; None where no picture was kept."""


class ImageTables:
    """Passes, images, places and steps of an index."""

    def __init__(self, path: Path, summary: Mapping[str, Any]) -> None:
        """Open the tables of the index in `path`; `summary` is its manifest's."""
        self.path = path
        height, width = summary["grid"]
        self.grid: tuple[int, int] = (height, width)
        self.image_size: tuple[int, int] = (summary["image_size"][0], summary["image_size"][1])
        self.n_steps: int = summary["steps"]
        self.guidance: float = summary["guidance"]
        self.passes_of_step: tuple[str, ...] = tuple(summary["passes_of_step"])
        self._passes = SortedParquet(path / "passes.parquet", "sequence")
        self._images = SortedParquet(path / "images.parquet", "image")
        self._places = SortedParquet(path / "places.parquet", "feature")
        self._steps = SortedParquet(path / "steps.parquet", "feature")

    def passes(self, sequences: Sequence[int]) -> dict[int, Pass]:
        """What some sequences are, by number."""
        with self._explaining():
            rows = self._passes.read(sequences).to_pylist()
        return {
            row["sequence"]: Pass(**row | {"kept": row["kept"] and tuple(row["kept"])})
            for row in rows
        }

    def images(self, numbers: Sequence[int]) -> dict[int, IndexedImage]:
        """Images by number; one that no example is of is not there."""
        with self._explaining():
            rows = self._images.read(numbers).to_pylist()
        names = [field.name for field in fields(IndexedImage)]
        return {row["image"]: IndexedImage(**{name: row[name] for name in names}) for row in rows}

    def mean_map(self, feature: int) -> Float[np.ndarray, "h w"]:
        """The mean of a feature's code at each place, over all images and steps; 0 of a dead one.

        At a place of which the index has no row it is 0, too.
        """
        found = np.zeros(self.grid[0] * self.grid[1])
        row = self._row(feature)
        if row is not None:
            found[row["places"]] = row["mean"]
        return found.reshape(self.grid)

    def firings_map(self, feature: int) -> Int[np.ndarray, "h w"]:
        """How often a feature fires at each place."""
        found = np.zeros(self.grid[0] * self.grid[1], np.int64)
        row = self._row(feature)
        if row is not None:
            found[row["places"]] = row["n"]
        return found.reshape(self.grid)

    def steps(self, feature: int) -> pd.DataFrame:
        """A feature's firings by step and row of guidance: columns of steps.parquet."""
        with self._explaining():
            return self._steps.read([feature]).to_pandas()

    def map_of(
        self, positions: Int[np.ndarray, " n"], activations: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, "h w"]:
        """An example's activations on the grid, 0 where the feature does not fire."""
        found = np.zeros(self.grid[0] * self.grid[1])
        found[positions] = activations
        return found.reshape(self.grid)

    def known(self, one: Pass) -> Bool[np.ndarray, "h w"]:
        """The places of a pass whose activations are known."""
        found = np.full(self.grid[0] * self.grid[1], one.kept is None)
        if one.kept is not None:
            found[np.asarray(one.kept, np.int64)] = True
        return found.reshape(self.grid)

    def _row(self, feature: int) -> dict[str, Any] | None:
        with self._explaining():
            rows = self._places.read([feature]).to_pylist()
        return rows[0] if rows else None

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """A file that cannot be read is a `Failure` with a way out."""
        try:
            yield
        except (OSError, pa.ArrowInvalid) as error:
            raise Failure(
                f"the index in {self.path} cannot be read ({str(error).splitlines()[0]}); delete "
                f"it and run `lorgnette index {self.path.parent}`."
            ) from error
