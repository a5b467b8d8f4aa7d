"""What can be said of a token from its text alone: kinds, endings, beginnings, forms of a word.

A label may only speak of these and of single tokens. Every statement about one token is a truth
value for each token of the vocabulary, so it is a table of booleans, and asking it of a million
positions is one look-up. Tables have a last row more than the vocabulary: the place where there is
no token (before a sequence, after it), of which nothing is true.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int

WORD_LISTS = {
    "pronouns": "i me my mine myself you your yours yourself he him his himself she her hers "
    "herself it its itself we us our ours ourselves they them their theirs themselves",
    "articles": "a an the",
    "demonstratives": "this that these those",
    "prepositions": "of in to for with on at from by about into through during before after above "
    "below between under over against among across around behind beyond within without upon toward "
    "towards along",
    "conjunctions": "and or but nor so yet because although though while whereas unless if",
    "forms of to be": "be is are am was were been being",
    "forms of to have": "have has had having",
    "modal verbs": "can could may might must shall should will would",
    "negations": "no not never none nothing nor n't cannot without",
    "question words": "who whom whose what which when where why how",
    "number words": "one two three four five six seven eight nine ten eleven twelve twenty thirty "
    "hundred thousand million billion first second third",
    "days and months": "monday tuesday wednesday thursday friday saturday sunday january february "
    "march april may june july august september october november december",
}  # fmt: skip
"""Closed classes of English words, by what a label calls them."""
QUOTES = set("\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb")
BRACKETS = set("()[]{}<>")
KIND_NAMES = (
    "digits", "line breaks", "punctuation", "ends of sentences", "quotation marks", "brackets",
    "capitalised words", "words in capitals", "single letters", "lower-case words",
    "pieces inside a word", "spaces", "text outside ASCII", *WORD_LISTS,
)  # fmt: skip
"""Kinds of token, as a label names them; each a column of `Words.kinds`."""
ENDING_LETTERS, BEGINNING_LETTERS = (2, 3, 4), (1, 2, 3)


class Words:
    """The vocabulary of an index: its texts and what is true of each of them."""

    def __init__(self, texts: Sequence[str], special: Bool[np.ndarray, " v"]) -> None:
        self.texts = list(texts)
        self.special = np.append(special, True)
        """Tokens on which nothing is encoded, and the place without a token."""
        self.spaced = any(text.startswith(" ") and text.strip() for text in texts)
        """Whether a word's first piece is told by the space before it."""
        self.bare = [text.strip().lower() for text in texts]
        self.kinds = self._kinds()
        self.stems = _codes([stem(word) for word in self.bare])
        self.endings = {n: self._parts(n, first=False) for n in ENDING_LETTERS}
        self.beginnings = {n: self._parts(n, first=True) for n in BEGINNING_LETTERS}
        self._by_text: dict[str, list[int]] = {}
        for token, text in enumerate(self.texts):
            self._by_text.setdefault(text, []).append(token)

    @property
    def nothing(self) -> int:
        """The row of the place without a token."""
        return len(self.texts)

    def ids(self, texts: Iterable[str]) -> list[int]:
        """The tokens that have these texts; texts without a token give none."""
        return [token for text in texts for token in self._by_text.get(text, [])]

    def part(self, text: str, *, first: bool) -> Bool[np.ndarray, " v_and_1"]:
        """Which tokens are words that begin, or end, with a text."""
        codes, names = (self.beginnings if first else self.endings)[len(text)]
        return codes == names.get(text, -2)

    def _kinds(self) -> Bool[np.ndarray, "v_and_1 kinds"]:
        lists = [set(words.split()) for words in WORD_LISTS.values()]
        table = np.zeros((len(self.texts) + 1, len(KIND_NAMES)), bool)
        for token, (text, bare) in enumerate(zip(self.texts, self.bare, strict=True)):
            if text:
                table[token] = [*self._spelling(text), *(bare in words for words in lists)]
        table[self.special] = False
        return table

    def _spelling(self, text: str) -> tuple[bool, ...]:
        shown = text.strip()
        alpha, marks = shown.isalpha(), bool(shown) and not any(map(str.isalnum, shown))
        starts = text[0] == " " or not self.spaced
        return (
            shown.isdigit(),
            "\n" in text,
            marks,
            marks and any(mark in ".!?" for mark in shown),
            marks and any(mark in QUOTES for mark in shown),
            marks and any(mark in BRACKETS for mark in shown),
            alpha and len(shown) > 1 and shown[0].isupper() and shown[1:].islower(),
            alpha and len(shown) > 1 and shown.isupper(),
            alpha and len(shown) == 1,
            alpha and shown.islower() and starts,
            alpha and shown.islower() and not starts,
            not shown and "\n" not in text,
            not text.isascii(),
        )

    def _parts(self, letters: int, *, first: bool) -> tuple[Int[np.ndarray, " v_and_1"], dict]:
        """A code for each token's first or last letters, -1 where it is no such word."""
        names: dict[str, int] = {}
        codes = np.full(len(self.texts) + 1, -1, np.int32)
        for token, (text, word) in enumerate(zip(self.texts, self.bare, strict=True)):
            begins = not self.spaced or text.startswith(" ") or text[:1].isupper()
            if len(word) >= letters + 2 and word.isalpha() and (begins or not first):
                part = word[:letters] if first else word[-letters:]
                codes[token] = names.setdefault(part, len(names))
        codes[self.special] = -1
        return codes, names


def stem(word: str) -> str:
    """A word without the endings of its forms: river, rivers; bake, bakes, baked, baking.

    Crude on purpose: it only joins words that drive the same feature.
    """
    word = re.sub(r"['\u2019]s$", "", word)
    if not word.isalpha() or len(word) < 4:
        return word
    for ending, kept, least in (
        ("ies", "y", 5), ("ing", "", 6), ("ed", "", 5), ("es", "", 5), ("s", "", 4),
    ):  # fmt: skip
        if word.endswith(ending) and len(word) >= least and not word.endswith(("ss", "us", "is")):
            word = word[: -len(ending)] + kept
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiousl":
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word[-1] == "e" else word


def _codes(names: Sequence[str]) -> Int[np.ndarray, " v_and_1"]:
    """A number for each name, equal names equal, and one more for the place without a token."""
    _, codes = np.unique(np.array([*names, "\0nothing"], dtype=object), return_inverse=True)
    return codes.astype(np.int32)
