"""The one pass over a store: every firing of every feature, sorted by feature, on disk.

Each piece of a shard (a fixed number of rows) is encoded batch by batch, its positive codes are
sorted by feature and written as one Parquet file of `CODES` rows. Nothing of size [rows, d_sae] is
ever held beyond one batch. A piece's file is renamed into place when it is whole, so a killed pass
goes on with the first piece that is missing, in the same batches as before. A range of features is
later read from all pieces by their row groups' minima and maxima, without reading the rest.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from probe.errors import Failure
from probe.runs import atomic_path
from probe.store import ActivationStore, Shard
from saes.feature_schema import CODES, SEQUENCE_TOKENS_IN_ROW_GROUP, SEQUENCES, IndexConfig
from saes.models import SparseAutoencoder

PIECE_BATCHES = 16
"""Batches in one piece: what is sorted in memory, and the most that a killed pass does again."""
CODES_ROW_GROUP = 65536
"""Firings that are read together: of few features, since they are sorted."""
MOST_SEQUENCE_ROW_GROUPS = 4096
"""Bounds the footer of sequences.parquet where there are very many sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of rows of one shard that is encoded and written at once."""

    shard: int
    """Number of the shard."""
    start: int
    """First row, counted in the shard."""
    end: int
    """Row after the last."""

    @property
    def name(self) -> str:
        """Name of the piece's file."""
        return f"codes-{self.shard:05d}-{self.start:09d}.parquet"


def rows_used(store: ActivationStore, site: str, max_rows: int | None) -> list[int]:
    """How many rows of each shard an index uses: all, or `max_rows` and the rest of a sequence."""
    lengths = [after - first for first, after in itertools.pairwise(store.first_rows)]
    if max_rows is None or max_rows >= store.n_rows:
        return lengths
    last = next(i for i, first in enumerate(store.first_rows[1:]) if first >= max_rows)
    sequence = store.shard(last, site).sequence
    wanted = sequence[max_rows - store.first_rows[last] - 1]
    return [*lengths[:last], int(torch.searchsorted(sequence, wanted, right=True))]


def write_codes(
    folder: Path,
    sae: SparseAutoencoder,
    store: ActivationStore,
    site: str,
    used: Sequence[int],
    config: IndexConfig,
    *,
    progress: bool,
) -> list[Path]:
    """Encode the used rows into `folder`, piece by piece; pieces that are there are left alone.

    Raises `Failure` where a code is not finite.
    """
    paths = []
    bar = tqdm(total=sum(used), desc="encode", unit=" rows", unit_scale=True, disable=not progress)
    with bar:
        for number, length in enumerate(used):
            shard: Shard | None = None
            for piece in _pieces(number, length, config.batch_rows * PIECE_BATCHES):
                path = folder / piece.name
                if not path.exists():
                    shard = shard or store.shard(number, site)
                    table = encode_piece(sae, shard, piece, config.batch_rows)
                    with atomic_path(path) as temporary:
                        pq.write_table(
                            table,
                            temporary,
                            row_group_size=CODES_ROW_GROUP,
                            compression="zstd",
                            compression_level=1,
                        )
                paths.append(path)
                bar.update(piece.end - piece.start)
    return paths


def _pieces(shard: int, n_rows: int, size: int) -> Iterator[Piece]:
    for start in range(0, n_rows, size):
        yield Piece(shard=shard, start=start, end=min(start + size, n_rows))


def encode_piece(sae: SparseAutoencoder, shard: Shard, piece: Piece, batch_rows: int) -> pa.Table:
    """All firings of a piece, as `CODES` sorted by feature and, within one, by row."""
    rows, features, values = [], [], []
    for start in range(piece.start, piece.end, batch_rows):
        x = shard.values[start : min(start + batch_rows, piece.end)]
        with torch.inference_mode():
            codes = sae.encode(x.to(sae.W_enc.device, torch.float32))
        # numpy from here on: on so few numbers torch's threads wait longer than they work.
        value = codes.values.float().cpu().numpy()
        if not np.isfinite(value).all():
            row = shard.first_row + start + int((~np.isfinite(value)).any(1).argmax())
            raise Failure(
                f"the SAE gives NaN or infinity on row {row} of the store; train it again, or "
                "check that the store and the site are those it was trained on."
            )
        fires = np.flatnonzero(value > 0)
        rows.append(fires // value.shape[1] + start)
        features.append(codes.indices.cpu().numpy().ravel()[fires])
        values.append(value.ravel()[fires])
    row, feature = np.concatenate(rows), np.concatenate(features)
    # numpy sorts 16-bit integers by radix: in linear time.
    narrow = feature.astype(np.uint16) if sae.W_enc.shape[1] <= 2**16 else feature
    order = np.argsort(narrow, kind="stable")
    row = row[order]
    columns = {
        "feature": feature[order],
        "sequence": shard.sequence.numpy()[row],
        "position": shard.position.numpy()[row],
        "doc": shard.doc.numpy()[row],
        "token": shard.token.numpy()[row],
        "value": np.concatenate(values)[order],
    }
    return pa.table(
        {name: pa.array(column, CODES.field(name).type) for name, column in columns.items()}
    )


def write_sequences(
    path: Path, store: ActivationStore, site: str, used: Sequence[int], n_tokens: int
) -> tuple[int, np.ndarray]:
    """Write sequences.parquet; gives the number of sequences and each token's count of used rows.

    Raises `Failure` where the store holds a token that the vocabulary of `n_tokens` lacks.
    """
    counts = np.zeros(n_tokens, np.int64)
    n_sequences = 0
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, SEQUENCES, compression="zstd") as writer,
    ):
        for number, length in enumerate(used):
            shard = store.shard(number, site)
            if int(shard.tokens.max()) >= n_tokens:
                raise Failure(
                    f"the store holds token {int(shard.tokens.max())} and the vocabulary has "
                    f"{n_tokens} pieces; give the tokenizer of the model that made the store."
                )
            counts += np.bincount(shard.token[:length].numpy(), minlength=n_tokens)
            table = _sequence_rows(shard, length)
            n_sequences += len(table)
            context = shard.tokens.shape[1]
            bound = sum(used) // context // MOST_SEQUENCE_ROW_GROUPS
            group = max(1, SEQUENCE_TOKENS_IN_ROW_GROUP // context, bound)
            writer.write_table(table, row_group_size=group)
    return n_sequences, counts


def _sequence_rows(shard: Shard, n_rows: int) -> pa.Table:
    """The shard's sequences, up to that of the last used row where the shard is not used whole."""
    n = len(shard.tokens)
    if n_rows < len(shard.sequence):
        n = int(shard.sequence[n_rows - 1]) - shard.first_sequence + 1
    context = shard.tokens.shape[1]
    offsets = pa.array(np.arange(0, (n + 1) * context, context, dtype=np.int32))

    def lists(matrix: torch.Tensor) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(matrix[:n].flatten().numpy(), pa.int32()))

    numbers = np.arange(shard.first_sequence, shard.first_sequence + n, dtype=np.int32)
    columns = [pa.array(numbers), lists(shard.tokens), lists(shard.sequence_doc)]
    return pa.Table.from_arrays(columns, schema=SEQUENCES)
