"""The sequences of an index in memory: their split in two halves, cut into blocks of any width.

All sequences lie in one flat array, each with a margin on both sides, so that a block's neighbours
are reached by adding to its places.
"""

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from saes.feature_queries import FeatureIndex
from saes.label_rules import Blocks
from saes.label_words import Words

WIDTHS = (32, 8, 1)
"""Tokens in a block; a feature takes the first with enough silent blocks."""
LEAD = 2
"""Tokens before a block that a rule may look at."""


class Texts:
    """All sequences of an index with their split, cut into blocks of any width."""

    def __init__(self, index: FeatureIndex, seed: int) -> None:
        table = pq.read_table(index.path / "sequences.parquet", columns=["sequence", "tokens"])
        vocabulary = pq.read_table(index.path / "vocabulary.parquet")
        special = vocabulary["special"].to_numpy()
        self.words = Words(vocabulary["text"].to_pylist(), special)
        self.numbers = table["sequence"].to_numpy()
        lists = table["tokens"].combine_chunks()
        self.n, lengths = len(self.numbers), lists.value_lengths().to_numpy()
        self.context = int(lengths.max()) if self.n else 0
        self.stride = LEAD + self.context + WIDTHS[0]
        """Places of a sequence in the flat arrays, the margins with it."""
        self.tokens = np.full(self.n * self.stride, self.words.nothing, np.int32)
        row = np.repeat(np.arange(self.n), lengths)
        place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        self.tokens[row * self.stride + LEAD + place] = lists.flatten().to_numpy()
        self.keep = ~self.words.special[self.tokens]
        self.keep[np.arange(self.n) * self.stride + LEAD] = False
        self.kept = np.where(self.keep, self.tokens, self.words.nothing).astype(np.int32)
        """Tokens at places where a feature can fire, `nothing` elsewhere."""
        order = np.random.default_rng(seed).permutation(self.n)
        self.held_out = np.zeros(self.n, bool)
        self.held_out[order[: self.n // 2]] = True
        self.order = order
        """The shuffled rows: the held-out ones first."""

    def rows(self, sequences: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
        """Rows of sequences by their numbers."""
        return np.searchsorted(self.numbers, sequences)

    def flat(
        self, rows: Int[np.ndarray, " k"], positions: Int[np.ndarray, " k"]
    ) -> Int[np.ndarray, " k"]:
        """Places in `tokens` of positions in sequences."""
        return rows.astype(np.int64) * self.stride + LEAD + positions

    def n_blocks(self, width: int) -> int:
        """Blocks of a sequence."""
        return -(-self.context // width)

    def block_of(self, flat: Int[np.ndarray, " k"], width: int) -> Int[np.ndarray, " k"]:
        """The block that each place lies in: row times blocks of a sequence, plus its number."""
        row, offset = np.divmod(flat, self.stride)
        return row * self.n_blocks(width) + (offset - LEAD) // width

    def blocks_of_rows(self, rows: Int[np.ndarray, " k"], width: int) -> Int[np.ndarray, " b"]:
        """All blocks of some sequences."""
        n = self.n_blocks(width)
        return (rows[:, None] * n + np.arange(n)).ravel()

    def block_shares(self, width: int) -> Float[np.ndarray, " v_and_1"]:
        """Share of the making half's blocks that hold each token."""
        rows = np.flatnonzero(~self.held_out)
        blocks = self.blocks_of_rows(rows, width)
        places = self.places(blocks, width)
        block, place = np.nonzero(self.keep[places])
        n_tokens = self.words.nothing + 1
        pairs = np.unique(block * n_tokens + self.tokens[places[block, place]])
        return np.bincount(pairs % n_tokens, minlength=n_tokens) / max(len(blocks), 1)

    def places(self, blocks: Int[np.ndarray, " b"], width: int) -> Int[np.ndarray, "b w"]:
        """Places of the blocks' tokens."""
        row, number = np.divmod(blocks, self.n_blocks(width))
        return (row * self.stride + LEAD + number * width)[:, None] + np.arange(width)

    def read(self, blocks: Int[np.ndarray, " b"], width: int) -> Blocks:
        """The blocks' tokens and their neighbours."""
        places = self.places(blocks, width)
        at_start = places % self.stride == LEAD
        following = np.minimum(places + 1, len(self.tokens) - 1)
        return Blocks(
            tokens=self.tokens[places],
            previous=self.tokens[places - 1],
            earlier=np.where(at_start, self.words.nothing, self.tokens[places - 2]),
            following=self.tokens[following],
            keep=self.keep[places],
        )
