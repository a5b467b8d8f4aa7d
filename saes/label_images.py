"""Labels of image features: the words of the captions, and the part of the image, they stand for.

The steps, the split in halves, the score and its control are those of texts (`saes.labels`); what
differs is what a context is, and what can be said of one.

A *context* is a cell of one pass over one image: of the whole image, or of the image cut into 2 x 2
or 4 x 4 for features that are active somewhere in nearly every image (`CUTS`; the first in which
enough cells are silent). A feature is active in a cell where it fires on at least one of its
places. Half of all images, with all their passes, are held out. A pass that does not read the
prompt has an empty caption.

Rules speak of the caption's words and of the cell's place (`saes.label_captions`), and are grown as
those of texts are (`saes.label_making.cover`). Hard negatives are silent cells of images whose
caption has one of the `HARD_TOKENS` words that are most over-represented where it is active.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from probe.errors import UserError
from saes.feature_queries import FeatureIndex
from saes.label_captions import Captions, areas_of, image_phrase, in_area
from saes.label_contexts import (
    HARD_TOKENS,
    LEAST_SILENT,
    N_NEGATIVE,
    Contexts,
    Examples,
    Firing,
    choose_negatives,
    firing_of,
)
from saes.label_detection import score_answers
from saes.label_making import (
    CONTEXT_COST,
    COSTS,
    LEAST_SEQUENCES,
    SECOND_PART,
    Atom,
    Found,
    cover,
)
from saes.label_pool import Pool
from saes.label_rules import Part, Rule
from saes.label_schema import LabelConfig
from saes.labels import Judged, counted, label_table, scored

CUTS = (1, 2, 4)
"""Into how many parts an image is cut each way."""
MOST_TERMS = 40
"""Words and pairs of words that are looked at, by how much more of the active cells have them."""


class Images:
    """All passes of an index with their captions and their split; what `Texts` is for texts."""

    def __init__(
        self, index: FeatureIndex, seed: int, prompts: Sequence[str] | None = None
    ) -> None:
        """Read an index.

        Args:
            index: of images.
            seed: of the split in halves.
            prompts: the store's, by image; without them only images of examples have captions.

        Raises `UserError` where no pass read a prompt.
        """
        table = pq.read_table(index.path / "passes.parquet")
        self.numbers = table["sequence"].to_numpy()
        self.n, self.grid = len(self.numbers), index.images.grid
        self.stride = self.context = self.grid[0] * self.grid[1]
        conditional = table["conditional"].to_numpy()
        if not conditional.any():
            raise UserError(
                f"labels of images are made of captions, and no pass of {index.path} read one; "
                "index a store of conditional passes."
            )
        image = table["image"].to_numpy()
        self.captions = Captions(["", *self._prompts(index, image, prompts)])
        images, place = np.unique(image, return_inverse=True)
        self.caption = np.where(conditional, place + 1, 0)
        """Number of each pass's caption; 0 is the empty one."""
        order = np.random.default_rng(seed).permutation(len(images))
        held_out = np.zeros(len(images), bool)
        held_out[order[: len(images) // 2]] = True
        self.held_out = held_out[place]
        rank = np.empty(len(images), np.int64)
        rank[order] = np.arange(len(images))
        self.order = np.argsort(rank[place], kind="stable")
        """The shuffled passes, those of an image together: the held-out ones first."""
        self._kept = table["kept"].combine_chunks()
        self.cuts = [n for n in CUTS if n <= min(self.grid)]

    def _prompts(
        self, index: FeatureIndex, image: np.ndarray, prompts: Sequence[str] | None
    ) -> list[str]:
        numbers = np.unique(image).tolist()
        if prompts is not None:
            return [str(prompts[number]) for number in numbers]
        known = pq.read_table(index.path / "images.parquet", columns=["image", "prompt"])
        named = dict(zip(known["image"].to_pylist(), known["prompt"].to_pylist(), strict=True))
        return [str(named.get(number, "")) for number in numbers]

    def rows(self, sequences: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
        """Rows of sequences by their numbers."""
        return np.searchsorted(self.numbers, sequences)

    def flat(
        self, rows: Int[np.ndarray, " k"], positions: Int[np.ndarray, " k"]
    ) -> Int[np.ndarray, " k"]:
        """A number for each place of each pass."""
        return rows.astype(np.int64) * self.stride + positions

    def block_of(self, flat: Int[np.ndarray, " k"], n: int) -> Int[np.ndarray, " k"]:
        """The cell that each place lies in, images being cut into `n` by `n`."""
        row, place = np.divmod(flat, self.stride)
        return row * n * n + self.cells(n)[place]

    def cells(self, n: int) -> Int[np.ndarray, " t"]:
        """The cell of each place."""
        y, x = np.divmod(np.arange(self.stride), self.grid[1])
        return y * n // self.grid[0] * n + x * n // self.grid[1]

    def blocks_of_rows(self, rows: Int[np.ndarray, " r"], n: int) -> Int[np.ndarray, " b"]:
        """The cells of some passes of which anything is known."""
        every = (rows[:, None] * n * n + np.arange(n * n)).ravel()
        kept = self._kept.take(rows)
        if kept.null_count == len(kept):
            return every
        counts = kept.value_lengths().fill_null(0).to_numpy()
        places = np.repeat(rows, counts) * self.stride + kept.flatten().to_numpy()
        partly = np.unique(self.block_of(places, n))
        whole = rows[kept.is_null().to_numpy(zero_copy_only=False)]
        return every[np.isin(every, partly) | np.isin(every // (n * n), whole)]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedInImages(Judged):
    """The same of an image feature, with how finely its contexts are cut."""

    cut: int
    """Into how many parts images are cut each way."""


class ImageSubject:
    """What is labelled, with everything that is the same for all of its features."""

    def __init__(
        self, index: FeatureIndex, images: Images, config: LabelConfig, pool: Pool | None
    ) -> None:
        self.index, self.images, self.config, self.pool = index, images, config, pool
        self.examples = Examples(index, images)
        numbers = index.numbers()
        self.living: list[int] = numbers["feature"][numbers["alive"]].tolist()
        nothing = np.zeros(0, np.int64)
        self.pool_rows = pool.rows if pool else {"make": nothing, "test": nothing}
        self._pool_blocks: dict[tuple[str, int], np.ndarray] = {}

    def pool_blocks(self, side: str, n: int) -> Int[np.ndarray, " b"]:
        """The pool's cells on one side."""
        if (side, n) not in self._pool_blocks:
            found = self.images.blocks_of_rows(self.pool_rows[side], n)
            self._pool_blocks[side, n] = found
        return self._pool_blocks[side, n]

    def silent(self, firing: Firing, side: str, n: int) -> tuple[Int[np.ndarray, " b"], int]:
        """Cells known to be silent, and how many, the first, are drawn at random (the pool's).

        Without a pool there are only the images of the feature's examples to draw from.
        """
        active = np.unique(self.images.block_of(firing.flat, n))
        pool = self.pool_blocks(side, n)
        natural = pool[~np.isin(pool, active)]
        own = self.images.blocks_of_rows(firing.rows[side], n)
        own = np.setdiff1d(own, np.concatenate([active, pool]))
        known = np.concatenate([natural, own])
        return known, len(known) if self.pool is None else len(natural)

    def cut_for(self, firing: Firing) -> int:
        """The coarsest cut in which enough cells are silent on both sides, else the finest."""
        for n in self.images.cuts:
            if min(len(self.silent(firing, side, n)[0]) for side in firing.rows) >= LEAST_SILENT:
                return n
        return self.images.cuts[-1]

    def positive(self, feature: int, side: str, n: int) -> Int[np.ndarray, " b"]:
        """The cells of a feature's examples on one side; for testing without its top ones."""
        images, examples, part = self.images, self.examples, self.examples.slice(feature)
        chosen = ~images.held_out[examples.rows[part]]
        if side == "test":
            chosen = examples.tested[part]
        return np.unique(images.block_of(examples.focus[part][chosen], n))

    def captions_of(self, blocks: Int[np.ndarray, " b"], n: int) -> Int[np.ndarray, " b"]:
        """The caption of each cell's pass."""
        return self.images.caption[blocks // (n * n)]

    def contexts(self, firing: Firing, side: str, driving: Part, n: int) -> Contexts:
        """The feature's contexts for making or testing; `driving` words make a cell hard."""
        positive = self.positive(firing.feature, side, n)
        known, n_natural = self.silent(firing, side, n)
        held = self.images.captions.holds(driving, self.captions_of(known, n))
        rng = np.random.default_rng([self.config.seed, firing.feature, side == "test"])
        tests, n_hard = choose_negatives(rng, held, n_natural, N_NEGATIVE[side])
        return Contexts(
            width=self.images.stride // (n * n),
            positive=positive,
            negative=known[tests],
            n_hard=n_hard,
        )

    def driving(self, firing: Firing, n: int) -> Part:
        """The words that most over-represented in the captions where it is active, to make from."""
        captions = self.images.captions
        active = self.captions_of(self.positive(firing.feature, "make", n), n)
        silent = self.captions_of(self.silent(firing, "make", n)[0], n)
        lift = captions.shares(active) - captions.shares(silent)
        stems = np.argsort(-lift, kind="stable")[:HARD_TOKENS]
        parts = [captions.stem_part(int(s), float(lift[s])) for s in stems if lift[s] > 0]
        return Part(tokens=tuple(pair for part in parts for pair in part.tokens))

    def matches(self, rule: Rule, blocks: Int[np.ndarray, " b"], n: int) -> Bool[np.ndarray, " b"]:
        """In which cells a rule says that the feature is active."""
        found = np.full(len(blocks), not rule.empty)
        if rule.context is not None:
            found &= self.images.captions.holds(rule.context, self.captions_of(blocks, n))
        if rule.tokens is not None:
            areas = [in_area(name, blocks % (n * n), n) for name in rule.tokens.kinds]
            found &= np.any(areas, axis=0)
        return found


def judge(subject: ImageSubject, feature: int) -> JudgedInImages:
    """Make a feature's rule and choose the contexts that test it."""
    images = subject.images
    firing = firing_of(images, subject.examples, subject.pool, feature)
    n = subject.cut_for(firing)
    driving = subject.driving(firing, n)
    making, testing = (subject.contexts(firing, side, driving, n) for side in ("make", "test"))
    rule, value = Rule(), None
    if len(making.positive):
        rule = make_rule(subject, making, n)
        said = subject.matches(rule, making.blocks, n)
        score = score_answers(said, len(making.positive))
        value = score and score.value
    return JudgedInImages(feature=feature, cut=n, rule=rule, making=value, contexts=testing)


def make_rule(subject: ImageSubject, making: Contexts, n: int) -> Rule:
    """The best rule of words, of places, or of both; empty where nothing helps."""
    words, areas = caption_atoms(subject, making, n), area_atoms(making, n)
    found = {"context": cover(words), "tokens": cover(areas)}
    options = [(one.value, {name: one.part}) for name, one in found.items()]
    for first in (found["context"], cover(words, price=0.2)):
        held = _held(subject, first, making, n)
        inside = cover([_narrowed(atom, *held) for atom in areas])
        if not first.part.empty and not inside.part.empty:
            value = inside.value - first.cost - SECOND_PART
            options.append((value, {"context": first.part, "tokens": inside.part}))
    value, parts = max(options, key=lambda option: option[0])
    named: Mapping[str, Any] = {name: part for name, part in parts.items() if not part.empty}
    return replace(Rule(), **named) if value > 0.5 else Rule()


def _held(
    subject: ImageSubject, found: Found, making: Contexts, n: int
) -> tuple[Bool[np.ndarray, " p"], Bool[np.ndarray, " n"]]:
    """In which positive and negative contexts a condition on the caption holds."""
    captions = subject.images.captions
    positive, negative = (
        captions.holds(found.part, subject.captions_of(blocks, n))
        for blocks in (making.positive, making.negative)
    )
    return positive, negative


def _narrowed(
    atom: Atom, positive: Bool[np.ndarray, " p"], negative: Bool[np.ndarray, " n"]
) -> Atom:
    return replace(atom, positive=atom.positive & positive, negative=atom.negative & negative)


def caption_atoms(subject: ImageSubject, making: Contexts, n: int) -> list[Atom]:
    """Words and pairs of words that more of the active cells' captions have than of the others."""
    captions = subject.images.captions
    positive, negative = (
        subject.captions_of(blocks, n) for blocks in (making.positive, making.negative)
    )
    atoms = []
    for kind, table in (("tokens", captions.stems), ("phrases", captions.pairs)):
        hits, alarms = (table[rows].toarray() for rows in (positive, negative))
        different = np.asarray(table[np.unique(positive)].sum(0)).ravel()
        gain = hits.mean(0) - (alarms.mean(0) if len(alarms) else 0)
        gain[different < LEAST_SEQUENCES] = 0
        for term in np.argsort(-gain, kind="stable")[:MOST_TERMS].tolist():
            if gain[term] <= 0:
                break
            share = float(hits[:, term].mean())
            part = captions.stem_part(term, share) if kind == "tokens" else captions.pair_part(term)
            atom = Atom(
                part=part, cost=CONTEXT_COST, positive=hits[:, term], negative=alarms[:, term]
            )
            atoms.append(atom)
    return atoms


def area_atoms(making: Contexts, n: int) -> list[Atom]:
    """Parts of the image."""
    cells = (making.positive % (n * n), making.negative % (n * n))
    return [
        Atom(
            part=Part(kinds=(name,)),
            cost=COSTS["kinds"],
            positive=in_area(name, cells[0], n),
            negative=in_area(name, cells[1], n),
        )
        for name in areas_of(n)
    ]


def image_labels(subject: ImageSubject, *, progress: bool = True) -> pd.DataFrame:
    """A label for every living feature, with its score and control; columns are `LABELS`."""
    return label_table(
        subject.living,
        subject.config,
        partial(judge, subject),
        partial(_row, subject),
        progress=progress,
    )


def _row(subject: ImageSubject, judged: JudgedInImages, others: Sequence[Rule]) -> dict[str, Any]:
    """A row of labels.parquet."""
    words, contexts, n = subject.images.captions.words, judged.contexts, judged.cut
    blocks, n_positive = contexts.blocks, len(contexts.positive)
    score = score_answers(subject.matches(judged.rule, blocks, n), n_positive)
    row = {
        "feature": judged.feature,
        "label": image_phrase(judged.rule, words),
        "rule": judged.rule.to_text(words),
        "method": "offline",
        "making": judged.making,
    } | counted(contexts)
    if score is None:
        return row
    controls = [score_answers(subject.matches(rule, blocks, n), n_positive) for rule in others]
    return row | scored(score, [control.value for control in controls if control is not None])
