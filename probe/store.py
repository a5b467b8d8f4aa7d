"""Activations on disk, read memory-mapped.

    config.json                         `StoreConfig` or, of images, `ImageStoreConfig`
    <site>/acts-00000.safetensors       values [n, d]; sum [d], sum_squares [d], norm_sum, count
    rows-00000.safetensors              doc, sequence, position, token [n];
                                        tokens, sequence_doc [s, t]; first_sequence;
                                        of images also image, step, y, x [n] and, where both rows of
                                        guidance are kept, conditional [n]
    statistics.safetensors              <site>/mean, <site>/sd [d]; <site>/mean_norm, <site>/count
    documents.parquet                   doc, id; of images also text, the prompt
    images-00000.parquet                of images that are kept: `probe.pictures`
    manifest.json

A row is one kept token of one sequence (`probe.rows` says which are kept). Of images, a sequence is
one pass of the U-Net over one image and a token is one place of the feature map; the document is
the prompt. The rows of a sequence lie together, in order, in one shard. `probe.store_writing`
writes what is read here.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from probe.errors import Failure, UserError
from probe.runs import Run
from probe.sites import Site
from probe.store_config import DTYPES, AnyStoreConfig, StoreConfig, read_store_config

__all__ = ["ActivationStore", "Shard", "SiteStatistics", "StoreConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatistics:
    """Statistics of a site's rows over the whole store (float64 on disk, float32 here)."""

    mean: Float[Tensor, " d"]
    """Mean row."""
    sd: Float[Tensor, " d"]
    """Standard deviation of each coordinate (over n, not n - 1)."""
    mean_norm: float
    """Mean Euclidean norm of a row."""
    count: int
    """Number of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRows:
    """Where in images the rows of a shard are."""

    image: Int[Tensor, " n"]
    """Number of the image, counted over the whole store."""
    step: Int[Tensor, " n"]
    """Denoising step, counted from 0."""
    y: Int[Tensor, " n"]
    """Row of the feature map, from the top."""
    x: Int[Tensor, " n"]
    """Column of the feature map, from the left."""
    conditional: Bool[Tensor, " n"]
    """Whether the pass read the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One shard of one site; tensors are memory-mapped and must not be written to."""

    values: Float[Tensor, "n d"]
    """Activations in the store's dtype."""
    doc: Int[Tensor, " n"]
    """Document number of each row."""
    sequence: Int[Tensor, " n"]
    """Sequence number of each row, counted over the whole store."""
    position: Int[Tensor, " n"]
    """Position of each row in its sequence."""
    token: Int[Tensor, " n"]
    """Token id of each row."""
    tokens: Int[Tensor, "s t"]
    """Token ids of the shard's whole sequences, dropped positions too."""
    sequence_doc: Int[Tensor, "s t"]
    """Document numbers of the shard's whole sequences."""
    first_sequence: int
    """Number of the shard's first sequence."""
    first_row: int
    """Number of the shard's first row, counted over the whole store."""
    in_images: ImageRows | None = None
    """Of images, where in them the rows are; None of text."""


class ActivationStore:
    """A complete store, read memory-mapped: opening costs nothing, reading costs what is read."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config: AnyStoreConfig = read_store_config(run.config)
        self.sites: list[str] = list(self.config.sites)
        self.dtype: torch.dtype = DTYPES[self.config.dtype]
        summary = run.manifest["summary"]
        self.n_shards: int = summary["n_shards"]
        self._widths: dict[str, int] = summary["widths"]
        self._folders = self.config.folders()
        rows = (open_tensors(rows_path(run.path, i)) for i in range(self.n_shards))
        lengths = [shard.get_slice("doc").get_shape()[0] for shard in rows]
        self.first_rows: list[int] = list(itertools.accumulate(lengths, initial=0))
        self.n_rows: int = self.first_rows[-1]

    @staticmethod
    def open(path: Path) -> "ActivationStore":
        """Open a store folder and check that its files have their sizes.

        Raises `UserError` where the folder holds no store, and `Failure` where it is incomplete or
        a file is missing or truncated; `probe.runs.verify` compares checksums too.
        """
        run = Run.open(path)
        read_store_config(run.config)
        for name, recorded in run.manifest["files"].items():
            file = run.path / name
            if not file.is_file() or file.stat().st_size != recorded["bytes"]:
                found = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
                raise Failure(
                    f"{file} should have {recorded['bytes']} bytes and has {found}; delete "
                    f"{run.path} and capture again."
                )
        return ActivationStore(run)

    def d(self, site: Site | str) -> int:
        """Width of a site's rows."""
        return self._widths[self._name(site)]

    def values(self, number: int, site: Site | str) -> Float[Tensor, "n d"]:
        """A shard's activations, memory-mapped, in the store's dtype; not to be written to."""
        path = acts_path(self.run.path, self._folders[self._name(site)], number)
        values = open_tensors(path).get_tensor("values")
        wanted = (self.first_rows[number + 1] - self.first_rows[number], self.d(site))
        if tuple(values.shape) != wanted or values.dtype != self.dtype:
            raise Failure(
                f"{path} holds {list(values.shape)} {values.dtype} where {list(wanted)} "
                f"{self.dtype} belongs; delete {self.run.path} and capture again."
            )
        return values

    def shard(self, number: int, site: Site | str) -> Shard:
        """One shard of one site with its rows' places. Raises `UserError` for a missing site."""
        rows = open_tensors(rows_path(self.run.path, number))
        names = ("doc", "sequence", "position", "token", "tokens", "sequence_doc")
        return Shard(
            values=self.values(number, site),
            first_sequence=int(rows.get_tensor("first_sequence")),
            first_row=self.first_rows[number],
            in_images=self._image_rows(rows),
            **{name: rows.get_tensor(name) for name in names},
        )

    def _image_rows(self, rows: Any) -> ImageRows | None:
        if isinstance(self.config, StoreConfig):
            return None
        columns = {name: rows.get_tensor(name) for name in ("image", "step", "y", "x")}
        if self.config.rows == "both":
            conditional = rows.get_tensor("conditional")
        else:
            read = self.config.rows == "conditional"
            conditional = torch.full(columns["image"].shape, read, dtype=torch.bool)
        return ImageRows(**columns, conditional=conditional)

    def statistics(self, site: Site | str) -> SiteStatistics:
        """Mean, sd and mean norm of a site's rows. Raises `UserError` for a missing site."""
        folder = self._folders[self._name(site)]
        file = open_tensors(self.run.path / "statistics.safetensors")
        return SiteStatistics(
            mean=file.get_tensor(f"{folder}/mean").float(),
            sd=file.get_tensor(f"{folder}/sd").float(),
            mean_norm=float(file.get_tensor(f"{folder}/mean_norm")),
            count=int(file.get_tensor(f"{folder}/count")),
        )

    def document_ids(self) -> list[str]:
        """Ids of the documents, by document number."""
        return pyarrow.parquet.read_table(self.run.path / "documents.parquet")["id"].to_pylist()

    def prompts(self) -> list[str]:
        """The prompts of a store of images, by document number. Raises `UserError` of text."""
        if isinstance(self.config, StoreConfig):
            raise UserError(f"{self.run.path} is a store of text, which has no prompts.")
        return pyarrow.parquet.read_table(self.run.path / "documents.parquet")["text"].to_pylist()

    def _name(self, site: Site | str) -> str:
        if str(site) not in self.sites:
            raise UserError(
                f"{self.run.path} holds no site {site}; it holds {', '.join(self.sites)}."
            )
        return str(site)


def acts_path(folder: Path, site_folder: str, number: int) -> Path:
    """The file of a shard's activations at one site."""
    return folder / site_folder / f"acts-{number:05d}.safetensors"


def rows_path(folder: Path, number: int) -> Path:
    """The file of a shard's tokens; written last, it says that the shard is whole."""
    return folder / f"rows-{number:05d}.safetensors"


def open_tensors(path: Path) -> Any:
    """A safetensors file, memory-mapped. Raises `Failure` where it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise Failure(
            f"{path} cannot be read ({error}); delete its folder and capture again."
        ) from error
