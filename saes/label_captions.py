"""What can be said of a part of an image: words of its caption, and where in the image it lies.

A rule about images (`saes.label_rules.Rule`) uses two of its parts: `context`, words or pairs of
neighbouring words of the caption, and `tokens`, whose `kinds` are names of `AREAS`. Both have to
hold where both are named. Forms of a word (`saes.label_words.stem`) count as one.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from saes.label_phrases import part_phrase
from saes.label_rules import Part, Rule
from saes.label_words import Words

WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)?")
AREAS: dict[str, tuple[float, float, float, float]] = {
    "at the top": (0, 0.5, 0, 1),
    "at the bottom": (0.5, 1, 0, 1),
    "at the left": (0, 1, 0, 0.5),
    "at the right": (0, 1, 0.5, 1),
    "at the top left": (0, 0.5, 0, 0.5),
    "at the top right": (0, 0.5, 0.5, 1),
    "at the bottom left": (0.5, 1, 0, 0.5),
    "at the bottom right": (0.5, 1, 0.5, 1),
    "in the middle": (0.25, 0.75, 0.25, 0.75),
    "at the top edge": (0, 0.25, 0, 1),
    "at the bottom edge": (0.75, 1, 0, 1),
    "at the left edge": (0, 1, 0, 0.25),
    "at the right edge": (0, 1, 0.75, 1),
}
"""Parts of an image: from and to in y, from and to in x, as shares of height and width."""


class Captions:
    """Captions and the terms in them: words with their forms, and pairs of neighbours."""

    def __init__(self, captions: Sequence[str]) -> None:
        """Read captions; caption number i is row i of all tables."""
        split = [WORD.findall(caption.lower()) for caption in captions]
        texts = sorted({word for words in split for word in words})
        # A space in front, as words have it among the tokens of texts.
        self.words = Words([f" {text}" for text in texts], np.zeros(len(texts), bool))
        number = {word: i for i, word in enumerate(texts)}
        rows = [np.array([number[word] for word in words], np.int64) for words in split]
        self.n = len(captions)
        n_stems = int(self.words.stems.max()) + 1
        self.stems = _table([self.words.stems[row] for row in rows], n_stems)
        """Which stems each caption has, [captions, stems]."""
        pairs = [self._pairs(row) for row in rows]
        self._pair_codes = np.unique(np.concatenate([*pairs, np.zeros(0, np.int64)]))
        self.pairs = _table(
            [np.searchsorted(self._pair_codes, pair) for pair in pairs], len(self._pair_codes)
        )
        """Which pairs of words, [captions, pairs]."""

    def _pairs(self, row: Int[np.ndarray, " w"]) -> Int[np.ndarray, " p"]:
        return row[:-1] * len(self.words.texts) + row[1:]

    def stem_part(self, stem: int, weight: float) -> Part:
        """The words of a stem as a condition."""
        words = np.flatnonzero(self.words.stems[: self.words.nothing] == stem)
        return Part(tokens=tuple((int(word), weight) for word in words))

    def pair_part(self, pair: int) -> Part:
        """A pair of words as a condition."""
        first, second = divmod(int(self._pair_codes[pair]), len(self.words.texts))
        return Part(phrases=((first, second),))

    def holds(self, part: Part, captions: Int[np.ndarray, " c"]) -> Bool[np.ndarray, " c"]:
        """Of which captions a condition is true."""
        found = np.zeros(len(captions), bool)
        stems = {int(self.words.stems[word]) for word, _ in part.tokens}
        for stem in stems:
            found |= self.stems[captions, stem].toarray().ravel()
        for first, second in part.phrases:
            code = first * len(self.words.texts) + second
            place = int(np.searchsorted(self._pair_codes, code))
            if place < len(self._pair_codes) and self._pair_codes[place] == code:
                found |= self.pairs[captions, place].toarray().ravel()
        return found

    def shares(self, captions: Int[np.ndarray, " c"]) -> Float[np.ndarray, " s"]:
        """The share of some captions that have each stem."""
        return np.asarray(self.stems[captions].sum(0)).ravel() / max(len(captions), 1)


def _table(rows: Sequence[np.ndarray], width: int) -> Any:
    """Which of `width` things are in each row, as a sparse table of booleans."""
    unique = [np.unique(row) for row in rows]
    columns = np.concatenate([*unique, np.zeros(0, np.int64)])
    starts = np.concatenate([[0], np.cumsum([len(row) for row in unique])])
    shape = (len(rows), width)
    return sparse.csr_array((np.ones(len(columns), bool), columns, starts), shape=shape)


# ----------------------------------------------------------------------------------------- areas


def in_area(name: str, cells: Int[np.ndarray, " c"], n: int) -> Bool[np.ndarray, " c"]:
    """Which cells of an image cut into `n` by `n` a named area means.

    Those whose middle lies in it; of cells that are larger than the area, those that hold its
    middle.
    """
    top, bottom, left, right = AREAS[name]
    y, x = (cells // n + 0.5) / n, (cells % n + 0.5) / n
    inside = (y > top) & (y < bottom) & (x > left) & (x < right)
    middle_y, middle_x = (top + bottom) / 2, (left + right) / 2
    return inside | (np.abs(y - middle_y) <= 0.5 / n) & (np.abs(x - middle_x) <= 0.5 / n)


def areas_of(n: int) -> list[str]:
    """The areas that tell cells of an image cut into `n` by `n` apart, each set of cells once."""
    cells, seen, names = np.arange(n * n), set(), []
    for name in AREAS:
        held = in_area(name, cells, n)
        if not held.all() and held.tobytes() not in seen:
            seen.add(held.tobytes())
            names.append(name)
    return names


# ----------------------------------------------------------------------------------------- rules


def image_phrase(rule: Rule, words: Words) -> str:
    """A rule about images in a few words."""
    said = [] if rule.context is None else [part_phrase(rule.context, words)]
    if rule.tokens is not None:
        said.append(" or ".join(rule.tokens.kinds))
    return " ".join(said) or "no rule found"
