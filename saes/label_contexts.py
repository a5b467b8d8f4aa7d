"""The contexts that labels are made from and tested on: blocks of the index's sequences.

A *context* is one of the blocks of `width` neighbouring tokens (32) that a sequence is cut into. A
feature is *active* in a block where it fires on at least one of its tokens: detection is of blocks,
as in delphi's detection score (Paulo et al. 2024, 2410.13928), not of single tokens.

**Held out.** A seeded shuffle gives half of all sequences to testing, the same half for every
feature, and labels are made without them:

    made from    the feature's examples of every kind (top, intervals, random) in the first half
    tested on    its random and interval examples in the other half; its top ones are left out,
                 since they would make the strongest firings count twice

Both take the block that holds the example's strongest firing. Token counts, which the index keeps
over all sequences, are used after what the tested sequences contributed has been taken off.

**Negatives** must be known to be silent, so they come from sequences of which every firing is
known: those of the feature's examples, and a *pool* of sequences, drawn at random from each half,
that the SAE encodes again. `HARD_SHARE` of the negatives are *hard*: they hold one of the
`HARD_TOKENS` tokens that drive the feature most, and yet it is silent. The rest are silent blocks
of the pool, whatever they hold (without a pool: of the examples' sequences). Where there are too
few of one sort the other fills up.

A feature so dense that hardly any block of 32 tokens is silent gets shorter ones: `WIDTHS`.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from saes.feature_queries import FeatureIndex
from saes.label_pool import Pool
from saes.label_rules import in_row
from saes.label_sequences import Sequences
from saes.label_texts import WIDTHS, Texts

LEAST_SILENT = 12
"""Silent blocks on each side below which a feature takes a shorter width."""
HARD_SHARE = 0.5
"""Share of the negatives that hold a token of the feature's."""
HARD_TOKENS = 8
"""How many of a feature's tokens, by summed activation, make a block hard."""
N_NEGATIVE = {"test": 40, "make": 60}
"""Negatives wanted for a feature."""
TESTED_KINDS = ("random", "interval")


class Examples:
    """The examples of all features, as places in `Texts` or images."""

    def __init__(self, index: FeatureIndex, texts: Sequences) -> None:
        names = [
            "feature",
            "kind",
            "sequence",
            "position",
            "activation",
            "positions",
            "activations",
        ]
        table = pq.read_table(index.path / "examples.parquet", columns=names)
        feature = table["feature"].to_numpy()
        self.rows = texts.rows(table["sequence"].to_numpy())
        self.starts = np.searchsorted(feature, np.arange(index.n_features + 1))
        self.focus = texts.flat(self.rows, table["position"].to_numpy())
        self.activation = table["activation"].to_numpy()
        kinds = table["kind"].to_numpy(zero_copy_only=False)
        self.tested = np.isin(kinds.astype(str), TESTED_KINDS) & texts.held_out[self.rows]
        lists = table["positions"].combine_chunks()
        lengths = lists.value_lengths().to_numpy()
        self._ends = np.concatenate([[0], np.cumsum(lengths)])
        self._values = table["activations"].combine_chunks().flatten().to_numpy()
        self._fired = texts.flat(np.repeat(self.rows, lengths), lists.flatten().to_numpy())

    def slice(self, feature: int) -> slice:
        """A feature's rows."""
        return slice(int(self.starts[feature]), int(self.starts[feature + 1]))

    def fired(self, feature: int) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """Places where a feature fires in its examples' sequences, and how strongly.

        A sequence that is several examples gives its places several times.
        """
        part = self.slice(feature)
        inside = slice(int(self._ends[part.start]), int(self._ends[part.stop]))
        return self._fired[inside], self._values[inside]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """A feature's contexts on one side: blocks with it and blocks without it."""

    width: int
    """Tokens in a block."""
    positive: Int[np.ndarray, " p"]
    """Blocks in which it fires."""
    negative: Int[np.ndarray, " n"]
    """Blocks in which it does not: hard ones first."""
    n_hard: int
    """How many of these were chosen because they hold a token of the feature's."""

    @property
    def blocks(self) -> Int[np.ndarray, " b"]:
        """Positive blocks, then negative ones."""
        return np.concatenate([self.positive, self.negative])


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The tokens that drive a feature, counted without the sequences that it is tested on."""

    tokens: Int[np.ndarray, " k"]
    """Token ids, by summed activation."""
    counts: Int[np.ndarray, " k"]
    """Firings on each."""
    mass: Float[np.ndarray, " k"]
    """Summed activation."""
    share: Float[np.ndarray, " k"]
    """Share of the token's occurrences on which the feature fires."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """Where a feature is known to fire, and of which sequences everything is known."""

    feature: int
    """The feature."""
    flat: Int[np.ndarray, " k"]
    """Places where it fires, sorted."""
    values: Float[np.ndarray, " k"]
    """How strongly."""
    rows: dict[str, Int[np.ndarray, " r"]]
    """Sequences of its examples for making (`make`) and for testing (`test`)."""


def firing_of(texts: Sequences, examples: Examples, pool: Pool | None, feature: int) -> Firing:
    """Where a feature is known to fire: in its examples' sequences and in the pool."""
    flat, values = examples.fired(feature)
    if pool is not None:
        more, theirs = pool.firings.of(feature)
        flat, values = np.concatenate([flat, more]), np.concatenate([values, theirs])
    flat, first = np.unique(flat, return_index=True)
    rows = np.unique(examples.rows[examples.slice(feature)])
    tested = texts.held_out[rows]
    sides = {"make": rows[~tested], "test": rows[tested]}
    return Firing(feature=feature, flat=flat, values=values[first], rows=sides)


def choose_negatives(
    rng: np.random.Generator, hard: Bool[np.ndarray, " k"], n_natural: int, wanted: int
) -> tuple[Int[np.ndarray, " n"], int]:
    """Which of `k` silent contexts test a label: hard ones first, then others at random.

    Args:
        rng: draws them.
        hard: which ones hold a token that drives the feature.
        n_natural: how many, the first, stand for contexts at random.
        wanted: of both together; `HARD_SHARE` of them hard, or more where others are too few.

    Returns the chosen places, and how many of them, the first, were chosen as hard.
    """
    held = rng.permutation(np.flatnonzero(hard))
    natural = rng.permutation(n_natural)
    n_hard = min(len(held), max(round(wanted * HARD_SHARE), wanted - n_natural))
    free = np.ones(len(hard), bool)
    free[held[:n_hard]] = False
    easy = natural[free[natural]][: wanted - n_hard]
    return np.concatenate([held[:n_hard], easy]), n_hard


class Cut:
    """All sequences cut into blocks of one width, with what every feature asks of them."""

    def __init__(self, texts: Texts, width: int, pool_rows: dict[str, np.ndarray]) -> None:
        self.width = width
        self.texts = texts
        every = texts.blocks_of_rows(np.arange(texts.n), width)
        self.able = in_row(texts.keep[texts.places(every, width)])
        """Blocks in which anything could fire."""
        self.pool = {side: self.within(rows) for side, rows in pool_rows.items()}
        """The pool's blocks."""
        self.pool_tokens = {side: self.tokens(blocks) for side, blocks in self.pool.items()}
        """And their tokens."""

    def within(self, rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, " b"]:
        """Blocks of some sequences in which anything could fire."""
        blocks = self.texts.blocks_of_rows(rows, self.width)
        return blocks[self.able[blocks]]

    def tokens(self, blocks: Int[np.ndarray, " b"]) -> Int[np.ndarray, "b w"]:
        """The blocks' tokens; `nothing` where nothing can fire."""
        return self.texts.kept[self.texts.places(blocks, self.width)]

    def active(self, flat: Int[np.ndarray, " k"]) -> Bool[np.ndarray, " blocks"]:
        """In which of all blocks some of the places lie."""
        found = np.zeros(len(self.able), bool)
        found[self.texts.block_of(flat, self.width)] = True
        return found


class Sampler:
    """Chooses each feature's contexts; the same ones each time."""

    def __init__(self, index: FeatureIndex, texts: Texts, pool: Pool | None, seed: int) -> None:
        self.texts, self.examples, self.pool, self.seed = texts, Examples(index, texts), pool, seed
        nothing = np.zeros(0, np.int64)
        self.pool_rows = pool.rows if pool else {"make": nothing, "test": nothing}
        self.widths = sorted({min(width, texts.context) for width in WIDTHS}, reverse=True)
        self.pairs = TokenPairs(index)
        self._in_test_pool = np.zeros(texts.n, bool)
        self._in_test_pool[self.pool_rows["test"]] = True
        self._occurrences = self._count(np.flatnonzero(~self._in_test_pool))
        self._cuts: dict[int, Cut] = {}

    def cut(self, width: int) -> Cut:
        """The blocks of one width."""
        if width not in self._cuts:
            self._cuts[width] = Cut(self.texts, width, self.pool_rows)
        return self._cuts[width]

    def firing(self, feature: int) -> Firing:
        """Where a feature is known to fire."""
        return firing_of(self.texts, self.examples, self.pool, feature)

    def evidence(self, firing: Firing) -> Evidence:
        """The feature's tokens of tokens.parquet, less what its tested sequences contributed."""
        texts = self.texts
        tokens, counts, mean = self.pairs.of(firing.feature)
        tested = texts.held_out[firing.flat // texts.stride]
        tokens_tested, values_tested = texts.tokens[firing.flat[tested]], firing.values[tested]
        order = np.argsort(tokens)
        left = counts - count_of(tokens_tested, tokens, order)
        own = firing.rows["test"]
        own = own[~self._in_test_pool[own]]
        gone = texts.kept[texts.places(own, texts.context)].ravel() if len(own) else own
        there = self._occurrences[tokens] - count_of(gone, tokens, order)
        mass = counts * mean.astype(np.float64)
        mass = (mass - sum_of(tokens_tested, values_tested, tokens, order)).clip(0)
        by_mass = np.argsort(-mass, kind="stable")
        by_mass = by_mass[left[by_mass] > 0]
        share = left / np.maximum(there, left).clip(1)
        return Evidence(
            tokens=tokens[by_mass], counts=left[by_mass], mass=mass[by_mass], share=share[by_mass]
        )

    def width_for(self, firing: Firing) -> int:
        """The widest blocks of which enough are silent on both sides, else the narrowest."""
        for width in self.widths:
            cut = self.cut(width)
            active = cut.active(firing.flat)
            sides = (len(self._silent(cut, firing, side, active)[0]) for side in firing.rows)
            if min(sides) >= LEAST_SILENT:
                return width
        return self.widths[-1]

    def contexts(
        self, firing: Firing, side: str, driving: Int[np.ndarray, " t"], width: int
    ) -> Contexts:
        """The feature's contexts for making or testing; `driving` tokens make a block hard."""
        texts, examples, cut = self.texts, self.examples, self.cut(width)
        part = examples.slice(firing.feature)
        chosen = examples.tested[part] if side == "test" else ~texts.held_out[examples.rows[part]]
        positive = np.unique(texts.block_of(examples.focus[part][chosen], width))
        known, tokens, n_natural = self._silent(cut, firing, side, cut.active(firing.flat))
        mark = np.zeros(texts.words.nothing + 1, bool)
        mark[driving] = True
        rng = np.random.default_rng([self.seed, firing.feature, side == "test"])
        tests, n_hard = choose_negatives(rng, in_row(mark[tokens]), n_natural, N_NEGATIVE[side])
        negative = known[tests]
        return Contexts(width=width, positive=positive, negative=negative, n_hard=n_hard)

    def strongest(self, feature: int, width: int) -> Int[np.ndarray, " b"]:
        """The making half's blocks in which a feature fires, the strongest first."""
        part = self.examples.slice(feature)
        kept = ~self.texts.held_out[self.examples.rows[part]]
        order = np.argsort(-self.examples.activation[part][kept], kind="stable")
        blocks = self.texts.block_of(self.examples.focus[part][kept][order], width)
        _, first = np.unique(blocks, return_index=True)
        return blocks[np.sort(first)]

    def _silent(
        self, cut: Cut, firing: Firing, side: str, active: Bool[np.ndarray, " blocks"]
    ) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, "b w"], int]:
        """Blocks known to be silent, their tokens, and how many, the first, are natural text.

        Those are the pool's; without a pool there are only the examples' sequences to draw from.
        """
        quiet = ~active[cut.pool[side]]
        natural = cut.pool[side][quiet]
        own = firing.rows[side]
        if side == "test":
            own = own[~self._in_test_pool[own]]
        blocks = cut.within(own)
        if side == "make" and self.pool is not None:
            blocks = np.setdiff1d(blocks, cut.pool[side], assume_unique=True)
        blocks = blocks[~active[blocks]]
        known = np.concatenate([natural, blocks])
        tokens = np.concatenate([cut.pool_tokens[side][quiet], cut.tokens(blocks)])
        return known, tokens, len(known) if self.pool is None else len(natural)

    def _count(self, rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, " v_and_1"]:
        """Occurrences of each token in some sequences, where a feature can fire."""
        kept = self.texts.kept.reshape(self.texts.n, self.texts.stride)[rows]
        return np.bincount(kept.ravel(), minlength=self.texts.words.nothing + 1)


class TokenPairs:
    """tokens.parquet by feature: which tokens each feature fires on."""

    def __init__(self, index: FeatureIndex) -> None:
        names = ["feature", "token", "n", "mean"]
        table = pq.read_table(index.path / "tokens.parquet", columns=names)
        feature = table["feature"].to_numpy()
        order = np.argsort(feature, kind="stable")
        self._columns = [table[name].to_numpy()[order] for name in names[1:]]
        self._starts = np.searchsorted(feature[order], np.arange(index.n_features + 1))

    def of(
        self, feature: int
    ) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """Token ids, firings on each, and their mean activation."""
        part = slice(int(self._starts[feature]), int(self._starts[feature + 1]))
        token, n, mean = (column[part] for column in self._columns)
        return token, n, mean


def count_of(
    values: Int[np.ndarray, " n"], keys: Int[np.ndarray, " k"], order: Int[np.ndarray, " k"]
) -> Int[np.ndarray, " k"]:
    """How often each key (unique; `order` sorts them) stands among the values."""
    return sum_of(values, np.ones(len(values)), keys, order).astype(np.int64)


def sum_of(
    values: Int[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    keys: Int[np.ndarray, " k"],
    order: Int[np.ndarray, " k"],
) -> Float[np.ndarray, " k"]:
    """The weights of the values that are a key, summed by key."""
    if not len(keys):
        return np.zeros(0)
    found = order[np.searchsorted(keys, values, sorter=order).clip(max=len(keys) - 1)]
    hits = keys[found] == values
    return np.bincount(found[hits], weights[hits], minlength=len(keys)).astype(np.float64)
