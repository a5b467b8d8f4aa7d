"""Writing a store: shard by shard while a model reads or draws, in bounded memory.

A shard ends where a batch ends, and its `rows` file is renamed into place after all its `acts`
files: the shard exists if and only if that file does. A capture that was killed therefore goes on
with the batch that follows the last whole shard and ends with the same bytes as one that never
stopped.

Several processes (`probe.ranks`) write one store: shard i is that of rank i modulo their number, so
each reads its own stretches of the documents, whatever length the corpus turns out to have. All
tokenise everything and run the model on their own share. The store has the bytes that one process
would have written, and a killed capture may go on with another number of processes.

Sums are taken in float64 over the values as stored: the statistics are those of what is read back.
"""

import contextlib
import errno
import itertools
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow.parquet
import torch
from jaxtyping import Float, Float64, Int
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from probe.capture import site_widths
from probe.corpora import corpus_name
from probe.diffusion import DiffusionModel
from probe.errors import Failure
from probe.language import LanguageModel
from probe.models import model_name, weights_checksum
from probe.pictures import Picture, pictures_path, write_pictures
from probe.ranks import ALONE, Ranks, create_run
from probe.rows import Batch, capture_rows, norm_limits, without_outliers
from probe.runs import Run, atomic_path
from probe.sites import Site, parse_site
from probe.store import ActivationStore, acts_path, open_tensors, rows_path
from probe.store_config import DTYPES, AnyStoreConfig, ImageStoreConfig, read_store_config
from probe.store_sources import Source, documents_table, open_source

logger = logging.getLogger(__name__)

HEADER_BYTES = 1024
PICTURE_HEADER_BYTES = 2048
ROW_BYTES = 4 + 4 + 2 + 4
IMAGE_ROW_BYTES = 4 + 2 + 2 + 2 + 1


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


def estimate_store(
    config: AnyStoreConfig, widths: Mapping[str, int], picture_bytes: int = 0
) -> StoreEstimate:
    """Disk and memory that a capture takes, from the sites' widths, without running anything.

    Args:
        config: the capture.
        widths: channels of each site, by its name.
        picture_bytes: size of an image that is kept.
    """
    sequences, kept = config.n_sequences, config.kept_positions
    shard_sequences = config.batch_sequences * config.shard_batches
    shards = -(-sequences // shard_sequences)
    width = sum(widths[site] for site in config.sites)
    row_bytes = width * DTYPES[config.dtype].itemsize + ROW_BYTES
    headers, pictures = HEADER_BYTES, 0
    if isinstance(config, ImageStoreConfig):
        row_bytes += IMAGE_ROW_BYTES
        pictures = config.images if config.keep_images is None else config.keep_images
        headers += PICTURE_HEADER_BYTES if pictures else 0
    sums = len(config.sites) * HEADER_BYTES + 16 * width
    per_sequence = kept * row_bytes + 8 * config.context
    disk = sequences * per_sequence + shards * (headers + sums) + 2 * sums
    return StoreEstimate(
        sequences=sequences,
        rows=sequences * kept,
        shards=shards,
        disk_bytes=disk + min(pictures, sequences) * picture_bytes,
        memory_bytes=min(sequences, shard_sequences) * per_sequence,
    )


def capture_store(
    parent: Path,
    config: AnyStoreConfig,
    model: LanguageModel | DiffusionModel,
    *,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> "ActivationStore":
    """The store that a config means, in a folder of `parent` named after model and corpus.

    Made now, gone on with, or found; raises as `write_store` does.
    """
    spec, seed = config.model["spec"], config.model["random_weights"]
    twin = "" if seed is None else f"-random{seed}"
    name = f"{model_name(spec)}{twin}-{corpus_name(config.corpus)}"
    run = create_run(ranks, parent, name, config.run_config())
    hashes = {"model": weights_checksum(spec), "corpus": open_source(config, model).checksum()}
    inputs = {what: checksum for what, checksum in hashes.items() if checksum is not None}
    return write_store(run, model, inputs=inputs, progress=progress, ranks=ranks)


def write_store(
    run: Run,
    model: LanguageModel | DiffusionModel,
    *,
    inputs: Mapping[str, str] | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> "ActivationStore":
    """Run the model over the corpus and keep its activations; goes on where a killed run stopped.

    Args:
        run: a folder made with a config's `run_config()`; a complete one is opened as it is.
        model: the model that the config names.
        inputs: hashes of what went in (weights, corpus), for the manifest.
        progress: show a bar on stderr.
        ranks: the processes that share the work; each calls this.

    Raises:
        UserError: a site is not in the model, the corpus is empty, or another process writes here.
        Failure: non-finite activations, or a disk too small or full.
    """
    config = read_store_config(run.config)
    source = open_source(config, model)
    with ranks.lock(run):
        if not ranks.first_says(run.complete):
            if ranks.is_first:
                _remove_leftovers(run.path)
            ranks.wait()
            written = _write_shards(run.path, source, ranks, progress=progress)
            n_shards = int(ranks.largest(torch.tensor(written)))
            if ranks.is_first:
                with _explaining_full_disk(run.path):
                    _finish(run, source, inputs or {}, n_shards)
            ranks.wait()
    return ActivationStore.open(run.path)


class _ShardBuffer:
    """The shard being filled: each site's rows in the store's dtype, their places, their sums."""

    def __init__(self, source: Source, widths: Mapping[str, int]) -> None:
        config = source.config
        sequences = min(config.n_sequences, config.shard_batches * config.batch_sequences)
        n_rows, dtype = sequences * config.kept_positions, DTYPES[config.dtype]
        self.values = {site: torch.empty(n_rows, widths[site], dtype=dtype) for site in widths}
        self.source = source
        self.clear()

    def clear(self) -> None:
        """Forget the rows; the memory is used again."""
        self.n_rows = 0
        self.batches: list[Batch] = []
        self.sums: dict[str, Sums] = {}
        self.pictures: list[Picture] = []

    def add(self, batch: Batch, rows: Mapping[Site, Tensor]) -> None:
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
            _save_tensors(acts_path(folder, site_folders[name], number), tensors)
        if self.pictures:
            write_pictures(pictures_path(folder, number), self.pictures)
        _save_tensors(rows_path(folder, number), self._places())

    def _places(self) -> dict[str, Tensor]:
        tokens = torch.cat([batch.tokens for batch in self.batches]).cpu()
        doc = torch.cat([batch.doc for batch in self.batches]).cpu()
        keep = torch.cat([batch.keep for batch in self.batches]).cpu()
        sequence, position = keep.nonzero(as_tuple=True)
        first = self.batches[0].first_sequence
        columns = [self.source.columns(batch) for batch in self.batches]
        return {name: torch.cat([one[name] for one in columns]) for name in columns[0]} | {
            "doc": doc[keep].int(),
            "sequence": (sequence + first).int(),
            "position": position.short(),
            "token": tokens[keep].int(),
            "tokens": tokens.int(),
            "sequence_doc": doc.int(),
            "first_sequence": torch.tensor(first),
        }


def _write_shards(folder: Path, source: Source, ranks: Ranks, *, progress: bool) -> int:
    """Write this rank's shards that are missing; gives how many shards there are up to its last."""
    config, model = source.config, source.model
    sites = [parse_site(name) for name in config.sites]
    widths = site_widths(model, sites)
    number, sequence = _whole_shards(folder, config, ranks)
    estimate = estimate_store(config, widths)
    if ranks.is_first:
        _check_disk(folder, estimate, done=sequence / estimate.sequences)
    buffer = _ShardBuffer(source, widths)
    dtype = DTYPES[config.dtype]
    limits: dict[Site, float] = {}
    if config.max_norm and (sequence or ranks.size > 1):
        first = next(source.batches(0))
        limits = norm_limits(capture_rows(model, first, sites, dtype), config.max_norm)
        limits = _limits_of_first(ranks, limits)
    with _progress_bar(source, sequence, show=progress) as bar:
        for batch in source.batches(sequence):
            assert batch.first_sequence == sequence, "batches must follow one another"
            if sequence // _shard_sequences(config) % ranks.size == ranks.rank:
                keeper = source.keeper(batch, buffer.pictures)
                rows = capture_rows(model, batch, sites, dtype, keeper)
                limits = limits or norm_limits(rows, config.max_norm)
                buffer.add(*without_outliers(batch, rows, limits))
            sequence += len(batch.tokens)
            bar.update(source.units(len(batch.tokens)))
            if len(buffer.batches) == config.shard_batches:
                number = _flush(buffer, folder, number, config, ranks)
        if buffer.batches:
            number = _flush(buffer, folder, number, config, ranks)
    return max(0, number - ranks.size + 1)


def _shard_sequences(config: AnyStoreConfig) -> int:
    """Sequences in a shard; the last one may have fewer."""
    return config.batch_sequences * config.shard_batches


def _limits_of_first(ranks: Ranks, limits: Mapping[Site, float]) -> dict[Site, float]:
    """The largest usual norms as the first rank found them."""
    found = torch.tensor(list(limits.values()), dtype=torch.float64)
    return dict(zip(limits, ranks.of_first(found).tolist(), strict=True))


def _flush(
    buffer: _ShardBuffer, folder: Path, number: int, config: AnyStoreConfig, ranks: Ranks
) -> int:
    with _explaining_full_disk(folder):
        buffer.write(folder, number, config.folders())
    buffer.clear()
    return number + ranks.size


def _progress_bar(source: Source, sequence: int, *, show: bool) -> tqdm:
    return tqdm(
        total=source.units(source.config.n_sequences),
        initial=source.units(sequence),
        desc="capture",
        unit=f" {source.unit}",
        unit_scale=True,
        disable=not show,
    )


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a writer that was killed."""
    for path in folder.rglob(".*.tmp"):
        path.unlink()


def _whole_shards(folder: Path, config: AnyStoreConfig, ranks: Ranks) -> tuple[int, int]:
    """A rank's first shard that is not whole, and the number of the sequence it begins with."""
    sequence = ranks.rank * _shard_sequences(config)
    for number in itertools.count(ranks.rank, ranks.size):
        path = rows_path(folder, number)
        if not path.exists():
            return number, sequence
        try:
            rows = open_tensors(path)
            lengths = {
                open_tensors(acts_path(folder, name, number)).get_slice("values").get_shape()[0]
                for name in config.folders().values()
            }
        except Failure as error:
            logger.warning("capturing again from shard %d on: %s", number, error)
            return number, sequence
        if lengths != {rows.get_slice("doc").get_shape()[0]}:
            logger.warning("capturing again from shard %d on: its files differ in length", number)
            return number, sequence
        sequence = int(rows.get_tensor("first_sequence")) + rows.get_slice("tokens").get_shape()[0]
        sequence += (ranks.size - 1) * _shard_sequences(config)
    raise AssertionError("unreachable")


def _check_disk(folder: Path, estimate: StoreEstimate, done: float) -> None:
    needed = round(estimate.disk_bytes * max(0.0, 1 - done))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise Failure(
            f"the capture needs up to {_size(needed)} and {folder} has {_size(free)} free; free "
            "some space, or ask for less, for fewer sites or for dtype bfloat16."
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


def _finish(run: Run, source: Source, inputs: Mapping[str, str], written: int) -> None:
    """Combine the shards' sums, name the documents, count what was dropped, write the manifest."""
    config = source.config
    n_shards, n_sequences = _whole_shards(run.path, config, ALONE)
    if n_shards != written:
        raise Failure(
            f"{run.path} has {n_shards} whole shards where {written} were written; give --root a "
            "folder that all machines share, and run the same command again."
        )
    summary = source.summary(run.path, n_shards)
    widths = _write_statistics(run.path, config, n_shards)
    documents = documents_table(source, summary["n_documents"])
    with atomic_path(run.path / "documents.parquet") as temporary:
        pyarrow.parquet.write_table(documents, temporary, compression="zstd")
    seed = config.model.get("random_weights")
    seeds = {"images": config.seed} if isinstance(config, ImageStoreConfig) else {}
    run.finish(
        summary=summary | {"n_sequences": n_sequences, "n_shards": n_shards, "widths": widths},
        inputs=inputs,
        seeds=seeds | ({} if seed is None else {"random_weights": seed}),
        device=str(source.model.device),
    )


def _write_statistics(folder: Path, config: AnyStoreConfig, n_shards: int) -> dict[str, int]:
    """Write `statistics.safetensors`; gives the sites' widths."""
    tensors: dict[str, Tensor] = {}
    widths: dict[str, int] = {}
    for site, name in config.folders().items():
        shards = [open_tensors(acts_path(folder, name, i)) for i in range(n_shards)]
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
