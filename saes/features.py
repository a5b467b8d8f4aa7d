"""The feature index: what every feature of an SAE fires on, from one pass over a store.

    store --encode, sort by feature--> pieces --DuckDB, a range of features at a time--> tables
    weights --decoder cosines, direct logit effects---------------------------------------^

1. `saes.feature_codes`: the store's rows are encoded once, in bounded memory; firings go to disk.
2. `saes.feature_tables`: exact statistics, examples and token pairs of each range of features.
3. `saes.feature_coactivation`: which features fire together, counted for a block of them at a time.
4. `saes.feature_weights`: what the weights alone say.
5. Of images, `saes.feature_images`: places, steps and pictures.
6. The parts are joined to the files that `saes.feature_schema` defines, the temporary ones removed,
   the manifest written. `FeatureIndex` (`saes.feature_queries`) answers from them.

Steps 1 to 3 go on where a killed build stopped, and give the same bytes of every answer.
"""

import contextlib
import errno
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from torch import Tensor

from probe.errors import Failure, UserError
from probe.runs import Run
from probe.store import ActivationStore
from saes.feature_coactivation import count_pairs, drawn_sequences, write_coactivations
from saes.feature_codes import rows_used, write_codes, write_sequences
from saes.feature_images import (
    image_config,
    image_summary,
    join_image_parts,
    prepare_engine,
    write_image_parts,
    write_images,
    write_passes,
)
from saes.feature_queries import FeatureIndex
from saes.feature_schema import (
    COACTIVATIONS,
    DOCUMENTS,
    EXAMPLE_ROW_GROUP,
    EXAMPLES,
    FEATURE_ROW_GROUP,
    FEATURES,
    NEIGHBOURS,
    ROW_GROUP,
    VOCABULARY,
    IndexConfig,
)
from saes.feature_tables import (
    BuildLimits,
    FurtherParts,
    feature_ranges,
    histogram_edges,
    join_parts,
    open_engine,
    survey,
    write_parts,
    write_tables,
    write_tokens,
)
from saes.feature_weights import Nearest, decoder_neighbours, logit_effects, unit_rows
from saes.models import SparseAutoencoder

__all__ = ["BuildLimits", "FeatureIndex", "IndexConfig", "build_index"]

WORK_DIR = "work"
"""Folder of temporary files inside the run, removed before the manifest is written."""


def build_index(
    run: Run,
    sae: SparseAutoencoder,
    store: ActivationStore,
    site: str,
    config: IndexConfig,
    *,
    logit_matrix: Float[Tensor, "d v"] | None,
    vocabulary: Sequence[str],
    special_ids: Collection[int],
    limits: BuildLimits | None = None,
    progress: bool = True,
) -> FeatureIndex:
    """Index what every feature of `sae` does on a store's rows; a killed build goes on.

    Args:
        run: a folder made with `config.run_config(...)`; a complete one is opened as it is.
        sae: encodes the rows, on the device its weights are on.
        store: the activations, and `site` the site of them that the SAE reads.
        config: what the index holds.
        logit_matrix: unembedding with the final norm's gain folded in, [d_in, vocabulary]; None
            where the site has no reading in logits.
        vocabulary: the text of every token, by id; of images, the names of the places
            (`saes.feature_images.place_names`).
        special_ids: tokens marked as special in vocabulary.parquet.
        limits: memory, threads and size of the ranges; changes nothing in the result.
        progress: show bars on stderr.

    Raises:
        UserError: the widths of SAE, site and logits differ, or another process writes here.
        Failure: a code is not finite, the vocabulary is not the store's, the disk is full.
    """
    _check_widths(sae, store, site, logit_matrix)
    limits = limits or BuildLimits()
    with run.lock():
        if not run.complete:
            assert run.config | asdict(config) == run.config, "the run is of another config"
            with _explaining(run.path, limits):
                _remove_leftovers(run.path)
                summary, statistics = _measure(
                    run, sae, store, site, config, len(vocabulary), limits, progress=progress
                )
                _read_weights(run, sae, config, statistics, logit_matrix, vocabulary, progress)
                _write_names(run, store, vocabulary, special_ids)
                shutil.rmtree(run.path / WORK_DIR)
                run.finish(
                    summary=summary,
                    inputs={name: str(run.config[name]) for name in ("sae", "store")},
                    seeds={"examples": config.seed},
                    device=str(sae.W_enc.device),
                )
    return FeatureIndex.open(run.path)


def _measure(
    run: Run,
    sae: SparseAutoencoder,
    store: ActivationStore,
    site: str,
    config: IndexConfig,
    n_tokens: int,
    limits: BuildLimits,
    *,
    progress: bool,
) -> tuple[dict[str, Any], pa.Table]:
    """Write examples, sequences and tokens; gives the summary and the statistics by feature."""
    work, d_sae = run.path / WORK_DIR, sae.config.d_sae
    used = rows_used(store, site, config.max_rows)
    n_sequences, occurrences = write_sequences(
        run.path / "sequences.parquet", store, site, used, n_tokens
    )
    images = image_config(store)
    if images is not None:
        write_passes(run.path / "passes.parquet", store, site, used)
    pieces = write_codes(work, sae, store, site, used, config, progress=progress)
    with open_engine(work / "spill", limits) as engine:
        found = survey(engine, pieces, d_sae)
        edges = histogram_edges(found.smallest, found.largest, config.histogram_bins)
        ranges = feature_ranges(found.n_active, limits.firings)
        more: FurtherParts | None = None
        if images is not None:
            passes = run.path / "passes.parquet"
            prepare_engine(engine, passes, store, site, used, occurrences)
            more = FurtherParts(tables=("places", "steps"), write=write_image_parts)
        parts = write_parts(
            work, engine, pieces, ranges, config, edges, more=more, progress=progress
        )
        write_tokens(run.path / "tokens.parquet", engine, parts["tokens"], occurrences)
    n_coactive_rows = _write_coactivations(
        run, store, site, used, pieces, n_sequences, d_sae, config, limits, progress=progress
    )
    examples_path = run.path / "examples.parquet"
    join_parts(examples_path, parts["examples"], EXAMPLES, row_group=EXAMPLE_ROW_GROUP)
    n_firings = int(found.n_active.sum())
    summary = {
        "n_features": d_sae,
        "n_alive": int((found.n_active > 0).sum()),
        "n_rows": sum(used),
        "n_sequences": n_sequences,
        "n_firings": n_firings,
        "l0": n_firings / sum(used),
        "n_coactive_rows": n_coactive_rows,
        "histogram_edges": edges,
    }
    if images is not None:
        join_image_parts(run.path, parts)
        summary |= image_summary(images) | {"n_pictures": write_images(run.path, store)}
    statistics = pa.concat_tables([pq.read_table(part) for part in parts["statistics"]])
    return summary, _with_dead(statistics, found.n_active, sum(used), config.histogram_bins)


def _write_coactivations(
    run: Run,
    store: ActivationStore,
    site: str,
    used: Sequence[int],
    pieces: Sequence[Path],
    n_sequences: int,
    d_sae: int,
    config: IndexConfig,
    limits: BuildLimits,
    *,
    progress: bool,
) -> int:
    """Write coactivations.parquet; gives the number of rows that were counted for it."""
    n_pairs = count_pairs(pieces) if config.coactive else 0
    drawn = drawn_sequences(n_sequences, n_pairs, config)
    n_rows = sum(used)
    if drawn is not None:
        shards = (store.shard(number, site) for number in range(len(used)))
        n_rows = sum(
            int(drawn[shard.sequence[:length].numpy()].sum())
            for shard, length in zip(shards, used, strict=False)
        )
    parts = write_coactivations(
        run.path / WORK_DIR, pieces, d_sae, n_rows, drawn, config, limits, progress=progress
    )
    path = run.path / "coactivations.parquet"
    join_parts(path, parts, COACTIVATIONS, row_group=ROW_GROUP)
    return n_rows


def _with_dead(living: pa.Table, n_active: np.ndarray, n_rows: int, bins: int) -> pa.Table:
    """A row for every feature: of a dead one mean, sd and max are null and nothing is counted."""
    alive = n_active > 0
    place = pa.array(np.cumsum(alive) - 1, mask=~alive)
    histogram = np.zeros((len(n_active), bins), np.int64)
    histogram[alive] = living["histogram"].combine_chunks().flatten().to_numpy().reshape(-1, bins)
    columns = {
        "feature": pa.array(np.arange(len(n_active), dtype=np.int32)),
        "alive": pa.array(alive),
        "n_active": pa.array(n_active),
        "density": pa.array(n_active / n_rows),
        "histogram": _lists(histogram),
    }
    for name in ("mean", "sd", "max"):
        columns[name] = living[name].combine_chunks().take(place)
    for name in ("top_tokens", "top_token_shares"):
        lists = living[name].combine_chunks()
        lengths = np.zeros(len(n_active), np.int32)
        lengths[alive] = lists.value_lengths().to_numpy()
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        columns[name] = pa.ListArray.from_arrays(offsets, lists.flatten())
    return pa.table(columns)


def _read_weights(
    run: Run,
    sae: SparseAutoencoder,
    config: IndexConfig,
    statistics: pa.Table,
    logit_matrix: Float[Tensor, "d v"] | None,
    vocabulary: Sequence[str],
    progress: bool,
) -> None:
    """Write neighbours, and features: the statistics with what the weights say beside them."""
    nearest = decoder_neighbours(sae.W_dec, config.neighbours, progress=progress)
    _write_neighbours(run.path / "neighbours.parquet", nearest)
    texts = pa.array(vocabulary, pa.string())
    columns = {name: statistics[name] for name in statistics.column_names}
    columns["top_tokens"] = _named(statistics["top_tokens"].combine_chunks(), texts)
    columns["decoder_norm"] = pa.array(sae.W_dec.detach().norm(dim=1).cpu().numpy())
    cosines = (unit_rows(sae.W_enc.T) * unit_rows(sae.W_dec)).sum(1)
    columns["encoder_decoder_cosine"] = pa.array(cosines.cpu().numpy())
    n_features = sae.config.d_sae
    columns["nearest_cosine"] = (
        pa.array(nearest.cosines[:, 0].numpy())
        if nearest.cosines.shape[1]
        else pa.nulls(n_features, pa.float32())
    )
    for end in ("positive", "negative"):
        columns[f"{end}_tokens"] = pa.nulls(n_features, pa.list_(pa.string()))
        columns[f"{end}_logits"] = pa.nulls(n_features, pa.list_(pa.float32()))
    if logit_matrix is not None:
        matrix = logit_matrix[:, : len(vocabulary)]
        effects = logit_effects(sae.W_dec, matrix, config.logits, progress=progress)
        for end, tokens, logits in (
            ("positive", effects.positive_tokens, effects.positive),
            ("negative", effects.negative_tokens, effects.negative),
        ):
            columns[f"{end}_tokens"] = _named(_lists(tokens.numpy()), texts)
            columns[f"{end}_logits"] = _lists(logits.numpy())
    table = pa.table({name: columns[name] for name in FEATURES.names})
    features_path = run.path / "features.parquet"
    write_tables(features_path, iter([table]), FEATURES, row_group=FEATURE_ROW_GROUP)


def _write_neighbours(path: Path, nearest: Nearest) -> None:
    n_features, n = nearest.features.shape
    table = pa.table(
        {
            "feature": np.repeat(np.arange(n_features, dtype=np.int32), n),
            "rank": np.tile(np.arange(n, dtype=np.int16), n_features),
            "neighbour": nearest.features.flatten().numpy(),
            "cosine": nearest.cosines.flatten().numpy(),
        }
    )
    write_tables(path, iter([table]), NEIGHBOURS)


def _write_names(
    run: Run, store: ActivationStore, vocabulary: Sequence[str], special_ids: Collection[int]
) -> None:
    """Write vocabulary and documents."""
    special = np.zeros(len(vocabulary), bool)
    special[[i for i in special_ids if i < len(vocabulary)]] = True
    numbers = np.arange(len(vocabulary), dtype=np.int32)
    tokens = pa.table({"token": numbers, "text": pa.array(vocabulary), "special": special})
    write_tables(run.path / "vocabulary.parquet", iter([tokens]), VOCABULARY)
    ids = store.document_ids()
    documents = pa.table(
        {"doc": np.arange(len(ids), dtype=np.int32), "id": pa.array(ids, pa.string())}
    )
    write_tables(run.path / "documents.parquet", iter([documents]), DOCUMENTS)


def _lists(matrix: np.ndarray) -> pa.ListArray:
    """A list of each row of a matrix."""
    n_rows, n = matrix.shape
    offsets = pa.array(np.arange(0, (n_rows + 1) * n, n or 1, dtype=np.int32)[: n_rows + 1])
    if not n:
        offsets = pa.array(np.zeros(n_rows + 1, np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(matrix.flatten()))


def _named(tokens: pa.ListArray, texts: pa.Array) -> pa.ListArray:
    """Lists of token ids as lists of their texts."""
    return pa.ListArray.from_arrays(tokens.offsets, texts.take(tokens.flatten()))


def _check_widths(
    sae: SparseAutoencoder, store: ActivationStore, site: str, logit_matrix: Tensor | None
) -> None:
    d_in = sae.config.d_in
    if store.d(site) != d_in:
        raise UserError(
            f"the SAE reads activations of width {d_in} and site {site} of {store.run.path} has "
            f"width {store.d(site)}; give the site that the SAE was trained on."
        )
    if logit_matrix is not None and len(logit_matrix) != d_in:
        raise UserError(
            f"the unembedding has {len(logit_matrix)} rows where the SAE has width {d_in}; "
            "a site whose width is not the model's has no reading in logits: pass None."
        )


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a build that was killed; whole pieces and parts stay."""
    for path in folder.rglob(".*.tmp"):
        path.unlink()
    shutil.rmtree(folder / WORK_DIR / "spill", ignore_errors=True)


@contextlib.contextmanager
def _explaining(folder: Path, limits: BuildLimits) -> Iterator[None]:
    """Turn a full disk, too little memory or a damaged piece into a sentence."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise Failure(
            f"the statistics of {folder} need more than {limits.memory_gb} GB "
            f"({_first_line(error)}); allow more memory, or fewer firings at a time."
        ) from error
    except (OSError, duckdb.IOException) as error:
        full = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) in full or "No space left" in str(error):
            raise Failure(
                f"the disk that holds {folder} is full; free some space and run the same command "
                "again: it goes on where it stopped."
            ) from error
        raise
    except (duckdb.InvalidInputException, pa.ArrowInvalid) as error:
        raise Failure(
            f"a temporary file in {folder / WORK_DIR} is damaged ({_first_line(error)}); delete "
            "that folder and run the same command again."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
