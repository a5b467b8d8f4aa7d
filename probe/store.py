"""Activations on disk: written shard by shard while a model reads a corpus, read memory-mapped.

    config.json                         `StoreConfig`
    <site>/acts-00000.safetensors       values [n, d]; sum [d], sum_squares [d], norm_sum, count
    rows-00000.safetensors              doc, sequence, position, token [n];
                                        tokens, sequence_doc [s, t]; first_sequence
    statistics.safetensors              <site>/mean, <site>/sd [d]; <site>/mean_norm, <site>/count
    documents.parquet                   doc, id
    manifest.json

A row is one kept token of one sequence. The rows of a sequence lie together, in order, in one
shard. Position 0 and special tokens carry outlier norms (Sun et al. 2024, 2402.17762) and are left
out. Where a sequence begins with a repeated or a punctuation token the outlier moves to a later
position, so rows whose norm is over `max_norm` medians of the first batch are left out too: in
SmolLM2's middle layers 1 row in 4,000, with nine tenths of the variance.

A shard ends where a batch ends, and its `rows` file is renamed into place after all its `acts`
files: the shard exists if and only if that file does. A capture that was killed therefore goes on
with the batch that follows the last whole shard and ends with the same bytes as one that never
stopped.

Sums are taken in float64 over the values as stored: the statistics are those of what is read back.
"""

import contextlib
import errno
import itertools
import logging
import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
import torch
from jaxtyping import Float, Float64, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from probe.capture import capturing, site_width
from probe.corpora import TokenBatch, document_ids, token_batches
from probe.errors import Failure, UserError
from probe.language import LanguageModel
from probe.runs import Run, atomic_path
from probe.sites import Site, parse_site

logger = logging.getLogger(__name__)

KIND, SCHEMA = "activations", 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DROP = {"position_0": True, "special_tokens": True}
HEADER_BYTES = 1024
ROW_BYTES = 4 + 4 + 2 + 4


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
class StoreEstimate:
    """What a capture will take; upper bounds, since dropped tokens are not known before."""

    sequences: int
    """Sequences read."""
    rows: int
    """Rows kept of each site."""
    shards: int
    """Shards written."""
    disk_bytes: int
    """Size of the finished store."""
    memory_bytes: int
    """Size of the shard held in memory (the model and its activations come on top)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Running sums over rows, in float64."""

    sum: Float64[Tensor, " d"]
    """Sum of the rows."""
    sum_squares: Float64[Tensor, " d"]
    """Sum of the squared rows."""
    norm_sum: Float64[Tensor, ""]
    """Sum of the rows' Euclidean norms."""
    count: Int[Tensor, ""]
    """Number of rows."""

    @staticmethod
    def of(values: Float[Tensor, "n d"]) -> "Sums":
        """Sums of some rows, brought to the CPU."""
        exact = values.double()
        squares = exact.square()
        return Sums(
            sum=exact.sum(0).cpu(),
            sum_squares=squares.sum(0).cpu(),
            norm_sum=squares.sum(1).sqrt().sum().cpu(),
            count=torch.tensor(len(values)),
        )

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            sum=self.sum + other.sum,
            sum_squares=self.sum_squares + other.sum_squares,
            norm_sum=self.norm_sum + other.norm_sum,
            count=self.count + other.count,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, as a shard keeps them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


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


# ------------------------------------------------------------------------------------ writing


def estimate_store(config: StoreConfig, widths: Mapping[str, int]) -> StoreEstimate:
    """Disk and memory that a capture takes, from the sites' widths, without running anything."""
    sequences = -(-config.tokens // config.context)
    shard_sequences = config.batch_sequences * config.shard_batches
    shards = -(-sequences // shard_sequences)
    width = sum(widths[site] for site in config.sites)
    row_bytes = width * DTYPES[config.dtype].itemsize + ROW_BYTES
    kept = max(config.context - 1, 0)
    sums = len(config.sites) * HEADER_BYTES + 16 * width
    per_sequence = kept * row_bytes + 8 * config.context
    return StoreEstimate(
        sequences=sequences,
        rows=sequences * kept,
        shards=shards,
        disk_bytes=sequences * per_sequence + shards * (HEADER_BYTES + sums) + 2 * sums,
        memory_bytes=min(sequences, shard_sequences) * per_sequence,
    )


def write_store(
    run: Run,
    model: LanguageModel,
    *,
    inputs: Mapping[str, str] | None = None,
    progress: bool = True,
) -> "ActivationStore":
    """Run the model over the corpus and keep its activations; goes on where a killed run stopped.

    Args:
        run: a folder made with `StoreConfig.run_config()`; a complete one is opened as it is.
        model: the model that the config names.
        inputs: hashes of what went in (weights, corpus), for the manifest.
        progress: show a bar on stderr.

    Raises:
        UserError: a site is not in the model, the corpus is empty, or another process writes here.
        Failure: non-finite activations, or a disk too small or full.
    """
    config = StoreConfig.from_run_config(run.config)
    with run.lock():
        if not run.complete:
            _remove_leftovers(run.path)
            _write_shards(run.path, config, model, progress=progress)
            with _explaining_full_disk(run.path):
                _finish(run, config, model, inputs or {})
    return ActivationStore.open(run.path)


def capture_rows(
    model: LanguageModel, batch: TokenBatch, sites: Sequence[Site], dtype: torch.dtype
) -> dict[Site, Float[Tensor, "n d"]]:
    """The activations of a batch's kept tokens at each site, in `dtype`, on the model's device.

    Raises `UserError` where a site is not reached or is not `[b, t, d]`, and `Failure` where a
    value is not finite: the message says which site, document and position.
    """
    with torch.no_grad(), capturing(model, sites) as seen:
        model.run(batch.tokens)
    kept = batch.keep.flatten().nonzero().squeeze(1)
    rows = {}
    for site in sites:
        if site not in seen or seen[site].shape[:-1] != batch.tokens.shape:
            found = list(seen[site].shape) if site in seen else "nothing"
            raise UserError(
                f"site {site} gave {found} where [sequences, positions, width] = "
                f"[{', '.join(map(str, batch.tokens.shape))}, d] was wanted; choose another site."
            )
        raw = seen[site].flatten(0, 1).index_select(0, kept.to(seen[site].device))
        rows[site] = raw.to(dtype)
        if not rows[site].isfinite().all():
            raise _not_finite(site, batch, kept, raw, rows[site])
    return rows


def norm_limits(rows: Mapping[Site, Float[Tensor, "n d"]], max_norm: float) -> dict[Site, float]:
    """The largest usual norm at each site: `max_norm` medians of these rows; infinity for 0."""
    if max_norm == 0:
        return dict.fromkeys(rows, math.inf)
    return {site: max_norm * float(row_norms(values).median()) for site, values in rows.items()}


def row_norms(values: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Euclidean norm of each row, in float32."""
    return torch.linalg.vector_norm(values, dim=1, dtype=torch.float32)


def without_outliers(
    batch: TokenBatch, rows: Mapping[Site, Float[Tensor, "n d"]], limits: Mapping[Site, float]
) -> tuple[TokenBatch, dict[Site, Float[Tensor, "m d"]]]:
    """The batch and its rows without those whose norm is above the limit at any site."""
    usual = torch.stack([row_norms(values) <= limits[site] for site, values in rows.items()]).all(0)
    if usual.all():
        return batch, dict(rows)
    keep = batch.keep.clone()
    keep[batch.keep] = usual.to(keep.device)
    return replace(batch, keep=keep), {site: values[usual] for site, values in rows.items()}


def _not_finite(site: Site, batch: TokenBatch, kept: Tensor, raw: Tensor, row: Tensor) -> Failure:
    first = int((~row.isfinite()).any(1).nonzero()[0])
    place = int(kept[first])
    sequence, position = divmod(place, batch.tokens.shape[1])
    where = (
        f"document {int(batch.doc.flatten()[place])}, position {position} of sequence "
        f"{batch.first_sequence + sequence} (token {int(batch.tokens.flatten()[place])})"
    )
    if raw[first].isfinite().all():
        return Failure(
            f"site {site} gave {float(raw[first].abs().max()):g} at {where}, too large for "
            f"{row.dtype}; store it as bfloat16 or float32."
        )
    return Failure(
        f"site {site} gave NaN or infinity at {where}; run the model in float32, or leave out that "
        "document."
    )


class _ShardBuffer:
    """The shard being filled: each site's rows in the store's dtype, their places, their sums."""

    def __init__(self, config: StoreConfig, widths: Mapping[str, int], n_sequences: int) -> None:
        n_rows = min(n_sequences, config.shard_batches * config.batch_sequences) * config.context
        dtype = DTYPES[config.dtype]
        self.values = {site: torch.empty(n_rows, widths[site], dtype=dtype) for site in widths}
        self.clear()

    def clear(self) -> None:
        """Forget the rows; the memory is used again."""
        self.n_rows = 0
        self.batches: list[TokenBatch] = []
        self.sums: dict[str, Sums] = {}

    def add(self, batch: TokenBatch, rows: Mapping[Site, Tensor]) -> None:
        """Append a batch's kept rows."""
        start = self.n_rows
        for site, values in rows.items():
            name = str(site)
            self.values[name][start : start + len(values)] = values
            sums = Sums.of(values)
            self.sums[name] = self.sums[name] + sums if name in self.sums else sums
        self.n_rows += int(batch.keep.sum())
        self.batches.append(batch)

    def write(self, folder: Path, number: int, site_folders: Mapping[str, str]) -> None:
        """Write the shard's files, the one that makes it exist last."""
        for name, values in self.values.items():
            tensors = {"values": values[: self.n_rows]} | self.sums[name].tensors()
            _save_tensors(_acts_path(folder, site_folders[name], number), tensors)
        _save_tensors(_rows_path(folder, number), self._places())

    def _places(self) -> dict[str, Tensor]:
        tokens = torch.cat([batch.tokens for batch in self.batches]).cpu()
        doc = torch.cat([batch.doc for batch in self.batches]).cpu()
        keep = torch.cat([batch.keep for batch in self.batches]).cpu()
        sequence, position = keep.nonzero(as_tuple=True)
        first = self.batches[0].first_sequence
        return {
            "doc": doc[keep].int(),
            "sequence": (sequence + first).int(),
            "position": position.short(),
            "token": tokens[keep].int(),
            "tokens": tokens.int(),
            "sequence_doc": doc.int(),
            "first_sequence": torch.tensor(first),
        }


def _write_shards(
    folder: Path, config: StoreConfig, model: LanguageModel, *, progress: bool
) -> None:
    sites = [parse_site(name) for name in config.sites]
    widths = {str(site): site_width(model, site) for site in sites}
    number, sequence = _whole_shards(folder, config)
    estimate = estimate_store(config, widths)
    _check_disk(folder, estimate, done=sequence / estimate.sequences)
    buffer = _ShardBuffer(config, widths, estimate.sequences)
    dtype = DTYPES[config.dtype]
    limits: dict[Site, float] = {}
    if sequence:
        first = next(_read_tokens(config, model, 0))
        limits = norm_limits(capture_rows(model, first, sites, dtype), config.max_norm)
    with _progress_bar(config, sequence, estimate.sequences, show=progress) as bar:
        for batch in _read_tokens(config, model, sequence):
            assert batch.first_sequence == sequence, "batches must follow one another"
            rows = capture_rows(model, batch, sites, dtype)
            limits = limits or norm_limits(rows, config.max_norm)
            buffer.add(*without_outliers(batch, rows, limits))
            sequence += len(batch.tokens)
            bar.update(batch.tokens.numel())
            if len(buffer.batches) == config.shard_batches:
                number = _flush(buffer, folder, number, config)
        if buffer.batches:
            number = _flush(buffer, folder, number, config)


def _read_tokens(config: StoreConfig, model: LanguageModel, sequence: int) -> Iterator[TokenBatch]:
    return token_batches(
        config.corpus,
        model,
        context=config.context,
        batch_sequences=config.batch_sequences,
        max_tokens=config.tokens,
        start_sequence=sequence,
    )


def _flush(buffer: _ShardBuffer, folder: Path, number: int, config: StoreConfig) -> int:
    with _explaining_full_disk(folder):
        buffer.write(folder, number, config.folders())
    buffer.clear()
    return number + 1


def _progress_bar(config: StoreConfig, sequence: int, n_sequences: int, *, show: bool) -> tqdm:
    return tqdm(
        total=n_sequences * config.context,
        initial=sequence * config.context,
        desc="capture",
        unit=" tokens",
        unit_scale=True,
        disable=not show,
    )


def _acts_path(folder: Path, site_folder: str, number: int) -> Path:
    return folder / site_folder / f"acts-{number:05d}.safetensors"


def _rows_path(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:05d}.safetensors"


def _open_tensors(path: Path) -> Any:
    """A safetensors file, memory-mapped. Raises `Failure` where it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise Failure(
            f"{path} cannot be read ({error}); delete its folder and capture again."
        ) from error


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a writer that was killed."""
    for path in folder.rglob(".*.tmp"):
        path.unlink()


def _whole_shards(folder: Path, config: StoreConfig) -> tuple[int, int]:
    """How many whole shards lead the store, and the number of the sequence that follows them."""
    sequence = 0
    for number in itertools.count():
        path = _rows_path(folder, number)
        if not path.exists():
            return number, sequence
        try:
            rows = _open_tensors(path)
            lengths = {
                _open_tensors(_acts_path(folder, name, number)).get_slice("values").get_shape()[0]
                for name in config.folders().values()
            }
        except Failure as error:
            logger.warning("capturing again from shard %d on: %s", number, error)
            return number, sequence
        if lengths != {rows.get_slice("doc").get_shape()[0]}:
            logger.warning("capturing again from shard %d on: its files differ in length", number)
            return number, sequence
        sequence = int(rows.get_tensor("first_sequence")) + rows.get_slice("tokens").get_shape()[0]
    raise AssertionError("unreachable")


def _check_disk(folder: Path, estimate: StoreEstimate, done: float) -> None:
    needed = round(estimate.disk_bytes * max(0.0, 1 - done))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise Failure(
            f"the capture needs up to {_size(needed)} and {folder} has {_size(free)} free; free "
            "some space, or ask for fewer tokens, fewer sites or dtype bfloat16."
        )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


@contextlib.contextmanager
def _explaining_full_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors wraps the system's error and keeps its number in the text only.
        full = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) not in full and not any(
            f"(os error {number})" in str(error) for number in full
        ):
            raise
        raise Failure(
            f"the disk that holds {folder} is full; free some space and run the same command "
            "again: it goes on after the last whole shard."
        ) from error


def _finish(run: Run, config: StoreConfig, model: LanguageModel, inputs: Mapping[str, str]) -> None:
    """Combine the shards' sums, name the documents, count what was dropped, write the manifest."""
    n_shards, n_sequences = _whole_shards(run.path, config)
    summary = _count(run.path, n_shards, model.special_ids)
    if summary["n_rows"] == 0:
        raise UserError(
            "no row is left once position 0 and special tokens are dropped; choose a longer "
            f"context than {config.context} or another corpus."
        )
    widths = _write_statistics(run.path, config, n_shards)
    _write_documents(run.path / "documents.parquet", config.corpus, summary["n_documents"])
    seed = config.model.get("random_weights")
    run.finish(
        summary=summary | {"n_sequences": n_sequences, "n_shards": n_shards, "widths": widths},
        inputs=inputs,
        seeds={} if seed is None else {"random_weights": seed},
        device=str(model.device),
    )


def _count(folder: Path, n_shards: int, special_ids: Collection[int]) -> dict[str, Any]:
    """Rows, tokens and documents of the store, and how many tokens were dropped and why."""
    n_rows = n_tokens = n_sequences = n_special = n_documents = 0
    special = torch.tensor(sorted(special_ids))
    for number in range(n_shards):
        rows = _open_tensors(_rows_path(folder, number))
        tokens, sequence_doc = rows.get_tensor("tokens"), rows.get_tensor("sequence_doc")
        n_rows += len(rows.get_tensor("position"))
        n_special += int(torch.isin(tokens[:, 1:], special).sum())
        n_tokens += tokens.numel()
        n_sequences += len(tokens)
        n_documents = max(n_documents, int(sequence_doc.max()) + 1)
    return {
        "n_rows": n_rows,
        "n_tokens": n_tokens,
        "n_documents": n_documents,
        "dropped_position_0": n_sequences,
        "dropped_special_tokens": n_special,
        "dropped_outlier_norms": n_tokens - n_rows - n_sequences - n_special,
    }


def _write_statistics(folder: Path, config: StoreConfig, n_shards: int) -> dict[str, int]:
    """Write `statistics.safetensors`; gives the sites' widths."""
    tensors: dict[str, Tensor] = {}
    widths: dict[str, int] = {}
    for site, name in config.folders().items():
        shards = [_open_tensors(_acts_path(folder, name, i)) for i in range(n_shards)]
        keys = [field.name for field in fields(Sums)]
        sums = [Sums(**{key: shard.get_tensor(key) for key in keys}) for shard in shards]
        total = sum(sums[1:], start=sums[0])
        mean = total.sum / total.count
        variance = (total.sum_squares / total.count - mean.square()).clamp(min=0)
        tensors |= {
            f"{name}/mean": mean,
            f"{name}/sd": variance.sqrt(),
            f"{name}/mean_norm": total.norm_sum / total.count,
            f"{name}/count": total.count,
        }
        widths[site] = len(mean)
    _save_tensors(folder / "statistics.safetensors", tensors)
    return widths


def _write_documents(path: Path, corpus: str, n_documents: int) -> None:
    ids = document_ids(corpus, n_documents)
    if len(ids) != n_documents:
        raise Failure(
            f"corpus {corpus!r} has {len(ids)} documents and had {n_documents} when it was read; "
            f"delete {path.parent} and capture again."
        )
    numbers = pyarrow.array(range(n_documents), pyarrow.int32())
    table = pyarrow.table({"doc": numbers, "id": pyarrow.array(ids, pyarrow.string())})
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")


# ------------------------------------------------------------------------------------ reading


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
        rows = (_open_tensors(_rows_path(run.path, i)) for i in range(self.n_shards))
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
        path = _acts_path(self.run.path, self._folders[self._name(site)], number)
        values = _open_tensors(path).get_tensor("values")
        wanted = (self.first_rows[number + 1] - self.first_rows[number], self.d(site))
        if tuple(values.shape) != wanted or values.dtype != self.dtype:
            raise Failure(
                f"{path} holds {list(values.shape)} {values.dtype} where {list(wanted)} "
                f"{self.dtype} belongs; delete {self.run.path} and capture again."
            )
        return values

    def shard(self, number: int, site: Site | str) -> Shard:
        """One shard of one site with its rows' places. Raises `UserError` for a missing site."""
        rows = _open_tensors(_rows_path(self.run.path, number))
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
        file = _open_tensors(self.run.path / "statistics.safetensors")
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
