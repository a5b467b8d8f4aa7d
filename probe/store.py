"""Activations on disk, read memory-mapped.

    config.json                         `StoreConfig`
    <site>/acts-00000.safetensors       values [n, d]; sum [d], sum_squares [d], norm_sum, count
    rows-00000.safetensors              doc, sequence, position, token [n];
                                        tokens, sequence_doc [s, t]; first_sequence
    statistics.safetensors              <site>/mean, <site>/sd [d]; <site>/mean_norm, <site>/count
    documents.parquet                   doc, id
    manifest.json

A row is one kept token of one sequence (`probe.rows` says which are kept). The rows of a sequence
lie together, in order, in one shard. `probe.store_writing` writes what is read here.
"""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from probe.errors import Failure, UserError
from probe.runs import Run
from probe.sites import Site, parse_site

KIND, SCHEMA = "activations", 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DROP = {"position_0": True, "special_tokens": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """What to capture and how to keep it; with the weights it decides every byte of the store."""

    model: dict[str, Any]
    """The model: `spec`, `random_weights` (seed or None) and `dtype`."""
    corpus: str
    """The text it reads, by the names of `probe.corpora`."""
    sites: tuple[str, ...]
    """Names of the sites to keep, all captured in one pass."""
    tokens: int = 1_000_000
    """Tokens to read, before any are dropped, rounded up to whole sequences; fewer where the corpus
    ends first."""
    context: int = 128
    """Length of a sequence, in tokens."""
    batch_sequences: int = 16
    """Sequences in one forward pass."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the values on disk."""
    max_norm: float = 10.0
    """Rows of a norm above so many times the site's median norm (over the first batch) are left
    out, at all sites, as attention sinks; 0 keeps every row."""
    shard_batches: int = 32
    """Batches in one shard: held in memory, and the most that a killed capture does again."""

    def __post_init__(self) -> None:
        for name in ("tokens", "context", "batch_sequences", "shard_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.max_norm >= 0:
            raise UserError(f"max_norm must be at least 0, got {self.max_norm}; 0 keeps every row.")
        if self.context > 2**15:
            raise UserError(f"context must be at most {2**15} tokens, got {self.context}.")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise UserError(f"sites must be one or more, each once; got {list(self.sites)}.")

    def run_config(self) -> dict[str, Any]:
        """The run folder's `config.json`, every default spelled out."""
        fixed = {"kind": KIND, "schema": SCHEMA, "drop": DROP}
        return fixed | asdict(self) | {"sites": list(self.sites), "site_folders": self.folders()}

    @staticmethod
    def from_run_config(config: Mapping[str, Any]) -> "StoreConfig":
        """Read back what `run_config` gave. Raises `UserError` for another kind, schema or key."""
        if config.get("kind") != KIND:
            raise UserError(
                f"a store of activations was wanted and this is a run of kind "
                f"{config.get('kind')!r}; give a folder that `lorgnette capture` wrote."
            )
        names = {field.name for field in fields(StoreConfig)}
        wanted = names | {"kind", "schema", "drop", "site_folders"}
        if config.get("schema") != SCHEMA or set(config) != wanted or config["drop"] != DROP:
            raise UserError(
                f"the store's config.json (schema {config.get('schema')!r}) is not one that this "
                f"version reads (schema {SCHEMA}); capture again, or use the version that wrote it."
            )
        values: dict[str, Any] = {name: config[name] for name in names}
        values["sites"] = tuple(config["sites"])
        return StoreConfig(**values)

    def folders(self) -> dict[str, str]:
        """Each site's folder name; two names that would fall together are numbered apart."""
        folders: dict[str, str] = {}
        for name in self.sites:
            base = parse_site(name).folder
            taken = {folder.lower() for folder in folders.values()}
            candidates = itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2)))
            folders[name] = next(folder for folder in candidates if folder.lower() not in taken)
        return folders


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


class ActivationStore:
    """A complete store, read memory-mapped: opening costs nothing, reading costs what is read."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config = StoreConfig.from_run_config(run.config)
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
        StoreConfig.from_run_config(run.config)
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
            **{name: rows.get_tensor(name) for name in names},
        )

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
