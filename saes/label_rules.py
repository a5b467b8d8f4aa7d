"""What a label claims, so that a machine can check it.

A `Rule` says at which places a feature should fire: on certain tokens, and (where named) after
certain tokens, before certain tokens, in text that holds certain words. All parts that are named
must hold at once; within a part any of its members is enough. A block of text matches a rule where
some place in it does. Where a rule names context only, the block has to hold one of the words.

As JSON (the column `rule` of labels.parquet), parts that are not named left out:

    {"tokens": {"tokens": [{"id": 4012, "text": " river", "weight": 0.81}, ...],
                "kinds": ["digits"], "endings": ["ing"], "beginnings": ["un"], "phrases": []},
     "after": {...}, "before": {...}, "context": {...}, "promotes": [" bank"]}

`weight` is the token's share of the activation (of `tokens`) or of the firings (of the others)
that the rule was made from. `promotes` is what the feature raises in the logits; it claims nothing
about where the feature fires unless the same tokens stand in `before`.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from saes.label_words import KIND_NAMES, Words


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The tokens of some blocks and their neighbours; `Words.nothing` where there is none."""

    tokens: Int[np.ndarray, "n w"]
    """Token at each place."""
    previous: Int[np.ndarray, "n w"]
    """The token before it, which may lie outside the block."""
    earlier: Int[np.ndarray, "n w"]
    """The token before that."""
    following: Int[np.ndarray, "n w"]
    """The token after it."""
    keep: Bool[np.ndarray, "n w"]
    """Places where a feature can fire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A condition on one token: it is one of these, or of one of these kinds."""

    tokens: tuple[tuple[int, float], ...] = ()
    """Token ids with their weights, heaviest first."""
    kinds: tuple[str, ...] = ()
    """Names of `KIND_NAMES`."""
    endings: tuple[str, ...] = ()
    """Last letters of a word."""
    beginnings: tuple[str, ...] = ()
    """First letters of a word."""
    phrases: tuple[tuple[int, int], ...] = ()
    """Pairs of tokens, the one before and this one; only asked of the tokens before a place."""

    @property
    def empty(self) -> bool:
        """Whether it names nothing, and so no token fits."""
        return not (self.tokens or self.kinds or self.endings or self.beginnings or self.phrases)

    def table(self, words: Words) -> Bool[np.ndarray, " v_and_1"]:
        """Which tokens fit, phrases left out."""
        fits = np.zeros(words.nothing + 1, bool)
        fits[[token for token, _ in self.tokens]] = True
        for kind in self.kinds:
            fits |= words.kinds[:, KIND_NAMES.index(kind)]
        for parts, first in ((self.endings, False), (self.beginnings, True)):
            for part in parts:
                fits |= words.part(part, first=first)
        return fits

    def holds(
        self,
        words: Words,
        tokens: Int[np.ndarray, "n w"],
        before: Int[np.ndarray, "n w"] | None = None,
    ) -> Bool[np.ndarray, "n w"]:
        """At which places it holds of `tokens`, each having `before` in front of it."""
        found = self.table(words)[tokens]
        if before is not None:
            for first, second in self.phrases:
                found |= (before == first) & (tokens == second)
        return found

    def as_json(self, words: Words) -> dict[str, Any]:
        """As a JSON object, empty members left out."""
        members = {
            "tokens": [
                {"id": token, "text": words.texts[token], "weight": round(weight, 4)}
                for token, weight in self.tokens
            ],
            "kinds": list(self.kinds),
            "endings": list(self.endings),
            "beginnings": list(self.beginnings),
            "phrases": [
                {"ids": list(pair), "text": "".join(words.texts[token] for token in pair)}
                for pair in self.phrases
            ],
        }
        return {name: value for name, value in members.items() if value}

    @staticmethod
    def from_json(document: dict[str, Any]) -> "Part":
        """Read back what `as_json` gave."""
        return Part(
            tokens=tuple((row["id"], row["weight"]) for row in document.get("tokens", [])),
            kinds=tuple(document.get("kinds", [])),
            endings=tuple(document.get("endings", [])),
            beginnings=tuple(document.get("beginnings", [])),
            phrases=tuple((row["ids"][0], row["ids"][1]) for row in document.get("phrases", [])),
        )


def in_row(places: Bool[np.ndarray, "n w"]) -> Bool[np.ndarray, " n"]:
    """Which rows hold a true place."""
    return np.logical_or.reduce(places, axis=1)


PARTS = ("tokens", "after", "before", "context")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Where a feature should fire; a part that is None asks nothing."""

    tokens: Part | None = None
    """Of the token it fires on."""
    after: Part | None = None
    """Of the token before."""
    before: Part | None = None
    """Of the token after."""
    context: Part | None = None
    """Of some token of the block."""
    promotes: tuple[str, ...] = ()
    """Tokens that the feature raises most in the logits."""

    @property
    def empty(self) -> bool:
        """Whether it asks nothing at all, and so matches nothing."""
        return all(getattr(self, name) is None for name in PARTS)

    def places(self, words: Words, blocks: Blocks) -> Bool[np.ndarray, "n w"]:
        """At which places everything but the context holds."""
        found = blocks.keep.copy()
        if self.tokens is not None:
            found &= self.tokens.holds(words, blocks.tokens)
        if self.after is not None:
            found &= self.after.holds(words, blocks.previous, blocks.earlier)
        if self.before is not None:
            found &= self.before.holds(words, blocks.following)
        return found

    def matches(self, words: Words, blocks: Blocks) -> Bool[np.ndarray, " n"]:
        """Which blocks the rule says the feature fires in."""
        if self.empty:
            return np.zeros(len(blocks.tokens), bool)
        found = in_row(self.places(words, blocks))
        if self.context is not None:
            found &= in_row(self.context.holds(words, blocks.tokens) & blocks.keep)
        return found

    def to_text(self, words: Words) -> str:
        """As JSON."""
        parts = {name: getattr(self, name) for name in PARTS}
        named = {name: part.as_json(words) for name, part in parts.items() if part is not None}
        promoted = {"promotes": list(self.promotes)} if self.promotes else {}
        return json.dumps(named | promoted, ensure_ascii=False)

    @staticmethod
    def from_text(text: str) -> "Rule":
        """Read back what `to_text` gave."""
        document = json.loads(text)
        parts = {name: Part.from_json(document[name]) for name in PARTS if name in document}
        return Rule(promotes=tuple(document.get("promotes", [])), **parts)
