"""Which features fire together: every pair counted, a block of features at a time.

With `A` the matrix [rows, features] that is one where a feature fires, the counts are `A^T A`. As
`A` has few ones a row, the product is an addition a pair of firings on a row, whatever the number
of features: sum over rows of L0^2.

1. The firings of some pieces of the pass at a time are grouped by feature and by row.
2. For every feature of a block, and every row it fires on, one is added to the counts of all that
   fire there. A feature's counts, 4 bytes for every feature, stay in the cache meanwhile; a block
   is as many features as half the memory limit allows, and all pieces are read for each.
3. The strongest of each feature are written as the block's part, renamed into place when whole:
   a killed build goes on with the next block. Neither the blocks nor the threads change the counts.

The measure is Jaccard's, `n_both / (n_a + n_b - n_both)`: the share of the rows of either that are
rows of both. It is one only for features that always fire together. The count alone would list the
features that fire nearly everywhere, and the pointwise mutual information those that fire once, on
the same row as this one. What is left of either is cut off: a pair needs `LEAST_TOGETHER` rows, and
more of them than two independent features of the same densities would share (pmi > 0), without
which two dense features would be near each other for their density alone.

Where the pairs are more than `IndexConfig.coactive_pairs`, sequences are drawn with the index's
seed, as many as are expected to hold so many pairs, and every number is of their rows only; the
manifest's `n_coactive_rows` says how many there are.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int
from tqdm import tqdm

from saes.feature_schema import COACTIVATIONS, LEAST_TOGETHER, IndexConfig
from saes.feature_tables import BuildLimits, write_tables
from saes.selection_cpu import compiled

BYTES_PER_FIRING = 64
"""Memory of a firing while its pieces are read and grouped."""
ALL_SEQUENCES = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Firings:
    """The firings of some pieces, as two compressed lists."""

    feature_starts: Int[np.ndarray, " s_plus_1"]
    """Where each feature's rows begin in `rows`."""
    rows: Int[np.ndarray, " n"]
    """Rows, by feature."""
    row_starts: Int[np.ndarray, " r_plus_1"]
    """Where each row's features begin in `features`."""
    features: Int[np.ndarray, " n"]
    """Features, by row."""


def count_pairs(pieces: Sequence[Path]) -> int:
    """Additions that exact counts would take: over all rows, the square of its firings."""
    total = 0
    for piece in pieces:
        _, rows, n_rows = _read([piece], None)
        total += int((np.bincount(rows, minlength=n_rows) ** 2).sum())
    return total


def drawn_sequences(
    n_sequences: int, n_pairs: int, config: IndexConfig
) -> Bool[np.ndarray, " n_sequences"] | None:
    """Which sequences to count; None for all, where there are not too many pairs."""
    if n_pairs <= config.coactive_pairs:
        return None
    drawn = np.random.default_rng(config.seed).random(n_sequences)
    return drawn < config.coactive_pairs / n_pairs


def write_coactivations(
    folder: Path,
    pieces: Sequence[Path],
    d_sae: int,
    n_rows: int,
    sequences: Bool[np.ndarray, " n_sequences"] | None,
    config: IndexConfig,
    limits: BuildLimits,
    *,
    progress: bool,
) -> list[Path]:
    """Compute the part files of every block of features that are not there yet; gives all.

    Args:
        folder: where the parts are kept.
        pieces: the files of the pass, of `CODES` rows.
        d_sae: number of features.
        n_rows: rows that are counted, with or without firings.
        sequences: which sequences are counted, by number; None for all.
        config: how many features to list for each.
        limits: memory and threads.
        progress: show a bar on stderr.
    """
    parts = []
    blocks = feature_blocks(d_sae, limits) if config.coactive else []
    n_threads = limits.threads or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(n_threads) as pool:
        for block in tqdm(blocks, desc="coactivations", unit=" blocks", disable=not progress):
            path = folder / f"coactivations-{block.start:08d}-{block.stop:08d}.parquet"
            if not path.exists():
                count = Count(block, d_sae, pool, n_threads)
                for firings in _chunks(pieces, d_sae, sequences, limits):
                    count.add(firings)
                table = count.strongest(n_rows, config.coactive)
                write_tables(path, iter([table]), COACTIVATIONS)
            parts.append(path)
    return parts


def feature_blocks(d_sae: int, limits: BuildLimits) -> list[range]:
    """Ranges of features whose counts fit in half the memory, or of one feature."""
    size = max(1, int(limits.memory_gb * 1e9 / 2) // (4 * d_sae))
    return [range(start, min(start + size, d_sae)) for start in range(0, d_sae, size)]


class Count:
    """On how many rows each feature of a block fires together with every feature."""

    def __init__(self, block: range, d_sae: int, pool: ThreadPoolExecutor, n_threads: int) -> None:
        self.block = block
        self.together = np.zeros((len(block), d_sae), np.uint32)
        self.n_active = np.zeros(d_sae, np.int64)
        self._pool = pool
        self._n_threads = n_threads

    def add(self, firings: Firings) -> None:
        """Count the firings of some pieces."""
        starts = firings.feature_starts
        self.n_active += np.diff(starts)
        # Slices of about as many firings each.
        first, last = starts[self.block.start], starts[self.block.stop]
        aims = np.linspace(first, last, self._n_threads + 1)
        cuts = np.searchsorted(starts[self.block.start : self.block.stop], aims)
        arrays = (starts, firings.rows, firings.row_starts, firings.features, self.together)
        self._share(cuts, lambda low, high: _add(*arrays, self.block.start, low, high))

    def strongest(self, n_rows: int, n: int) -> pa.Table:
        """Rows of coactivations.parquet for the block's features."""
        shape = (len(self.block), n)
        others, scores = np.zeros(shape, np.int32), np.zeros(shape)
        lengths = np.zeros(len(self.block), np.int64)
        arrays = (self.together, self.n_active, others, scores, lengths)
        cuts = np.linspace(0, len(self.block), self._n_threads + 1).astype(np.int64)
        self._share(
            cuts,
            lambda low, high: _strongest(
                *arrays, self.block.start, n_rows, LEAST_TOGETHER, low, high
            ),
        )
        place, rank = np.nonzero(np.arange(n) < lengths[:, None])
        feature, other = place + self.block.start, others[place, rank]
        n_both = self.together[place, other].astype(np.int64)
        expected = self.n_active[feature] / n_rows * self.n_active[other]
        columns = {
            "feature": feature,
            "rank": rank,
            "other": other,
            "n_both": n_both,
            "jaccard": scores[place, rank],
            "pmi": np.log2(n_both / expected),
        }
        return pa.table(columns).cast(COACTIVATIONS)

    def _share(self, cuts: np.ndarray, work: Callable[[int, int], None]) -> None:
        list(self._pool.map(work, cuts[:-1].tolist(), cuts[1:].tolist()))


def _chunks(
    pieces: Sequence[Path],
    d_sae: int,
    sequences: Bool[np.ndarray, " n_sequences"] | None,
    limits: BuildLimits,
) -> Iterator[Firings]:
    """The firings of as many pieces at a time as a quarter of the memory allows, at least one."""
    room = limits.memory_gb * 1e9 / 4 / BYTES_PER_FIRING
    chunk, total = [], 0
    for piece in pieces:
        n = pq.read_metadata(piece).num_rows
        if chunk and total + n > room:
            yield _grouped(chunk, d_sae, sequences)
            chunk, total = [], 0
        chunk.append(piece)
        total += n
    if chunk:
        yield _grouped(chunk, d_sae, sequences)


def _grouped(
    pieces: Sequence[Path], d_sae: int, sequences: Bool[np.ndarray, " n_sequences"] | None
) -> Firings:
    features, rows, n_rows = _read(pieces, sequences)
    feature_starts, by_feature = _by(features, rows, d_sae)
    row_starts, by_row = _by(rows, features, n_rows)
    return Firings(
        feature_starts=feature_starts, rows=by_feature, row_starts=row_starts, features=by_row
    )


def _read(
    pieces: Sequence[Path], sequences: Bool[np.ndarray, " n_sequences"] | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Each firing's feature and row, rows counted from 0, and a bound of the rows.

    A row is known by its sequence and position; there are numbers of rows that do not occur.
    """
    tables = [pq.read_table(p, columns=["feature", "sequence", "position"]) for p in pieces]
    table = pa.concat_tables(tables)
    feature, sequence, position = (column.to_numpy() for column in table.columns)
    if sequences is not None:
        kept = sequences[sequence]
        feature, sequence, position = feature[kept], sequence[kept], position[kept]
    if not len(feature):
        return np.zeros(0, np.int32), np.zeros(0, np.int32), 0
    width = int(position.max()) + 1
    first = int(sequence.min())
    n_rows = (int(sequence.max()) - first + 1) * width
    assert n_rows < 2**31, "rows of one chunk are numbered in 32 bits"
    row = (sequence - np.int32(first)) * np.int32(width) + position
    return feature.astype(np.int32), row.astype(np.int32), n_rows


def _by(keys: np.ndarray, values: np.ndarray, n_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Values grouped by key, in their order within one, and where each key's begin."""
    starts = np.zeros(n_keys + 1, np.int64)
    grouped = np.empty(len(values), np.int32)
    _group(keys, values, starts, grouped)
    return starts, grouped


@compiled
def _group(keys: np.ndarray, values: np.ndarray, starts: np.ndarray, grouped: np.ndarray) -> None:
    for key in keys:
        starts[key + 1] += 1
    for key in range(1, len(starts)):
        starts[key] += starts[key - 1]
    following = starts[:-1].copy()
    for i in range(len(keys)):
        grouped[following[keys[i]]] = values[i]
        following[keys[i]] += 1


@compiled
def _add(
    feature_starts: np.ndarray,
    rows: np.ndarray,
    row_starts: np.ndarray,
    features: np.ndarray,
    together: np.ndarray,
    first: int,
    low: int,
    high: int,
) -> None:
    """Features `first + low` to `first + high`: one for each that fires on a row of theirs."""
    for i in range(low, high):
        counts = together[i]
        for entry in range(feature_starts[first + i], feature_starts[first + i + 1]):
            row = rows[entry]
            for place in range(row_starts[row], row_starts[row + 1]):
                counts[features[place]] += np.uint32(1)


@compiled
def _strongest(
    together: np.ndarray,
    n_active: np.ndarray,
    others: np.ndarray,
    scores: np.ndarray,
    lengths: np.ndarray,
    first: int,
    n_rows: int,
    least: int,
    low: int,
    high: int,
) -> None:
    """The features of largest Jaccard measure, largest first, of equals the lower number first."""
    n = others.shape[1]
    for i in range(low, high):
        own = n_active[first + i]
        length = 0
        for other in range(together.shape[1]):
            both = np.int64(together[i, other])
            if both < least or other == first + i or both * n_rows <= own * n_active[other]:
                continue
            score = both / (own + n_active[other] - both)
            if length == n and score <= scores[i, n - 1]:
                continue
            length = min(length + 1, n)
            place = length - 1
            while place > 0 and scores[i, place - 1] < score:
                scores[i, place], others[i, place] = scores[i, place - 1], others[i, place - 1]
                place -= 1
            scores[i, place], others[i, place] = score, other
        lengths[i] = length
