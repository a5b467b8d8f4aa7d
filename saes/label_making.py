"""A feature's rule: the few readable statements that best tell its contexts apart.

Every statement that the making contexts suggest is an *atom*: one word with its forms, a kind of
token, an ending, a beginning; the same of the token before or after, a pair of tokens before, a
word of the surrounding text. Each atom is true in some positive and in some negative blocks. Rules
are grown greedily, atom by atom, by what each adds to the balanced accuracy on the making contexts
less its cost (`COSTS`: a long rule must earn its length); a second part ("after ...", "in text
with ...") is joined to the best first part where that earns `SECOND_PART`.

What keeps a list of memorised tokens from winning:

- in a positive block an atom counts only at the places where the feature fires;
- a word counts in a block only where it drives the feature in another sequence too (its firings
  less those in this sequence are above zero): no sequence vouches for itself;
- atoms of context, of the token before and of the token after must be seen with firings in
  `LEAST_SEQUENCES` sequences.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from saes.label_contexts import Contexts, Evidence
from saes.label_rules import Blocks, Part, Rule, in_row
from saes.label_texts import Texts
from saes.label_words import BEGINNING_LETTERS, ENDING_LETTERS, KIND_NAMES, Words

COSTS = {"tokens": 0.008, "kinds": 0.01, "endings": 0.02, "beginnings": 0.02, "phrases": 0.01}
"""Balanced accuracy that an atom must add to be taken."""
CONTEXT_COST = 0.03
"""The same for a word of the surrounding text: there are many to choose from."""
SECOND_PART = 0.02
"""Balanced accuracy that a second part must add."""
LEAST_SEQUENCES = 3
"""Sequences in which an atom of the neighbours or the context must be seen."""
LEAST_TOKENS = 3
"""Different tokens that an ending or a beginning must stand for."""
LEAST_LIFT = 2.0
"""A word must be at least so many times likelier to fire than a token is on average."""
MOST_ATOMS = 12
"""Atoms of one part."""
MOST_WORDS = 40
"""Words that are looked at, by summed activation."""
COMMON = 0.2
"""Share of blocks above which a word says nothing about a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Atom:
    """A statement about one token, and in which blocks it is true."""

    part: Part
    """The statement."""
    cost: float
    """What it must add."""
    positive: Bool[np.ndarray, " p"]
    """Positive blocks that it finds."""
    negative: Bool[np.ndarray, " n"]
    """Negative blocks that it takes for positive ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A part with its balanced accuracy, costs taken off."""

    part: Part
    """What was chosen."""
    value: float
    """Balanced accuracy on the making contexts, less the atoms' costs."""
    cost: float
    """These costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """All that a feature's rule is made from."""

    words: Words
    """The vocabulary."""
    evidence: Evidence
    """The tokens that drive it."""
    density: float
    """Share of tokens on which it fires."""
    positive: Blocks
    """Blocks in which it fires."""
    fires: Bool[np.ndarray, "p w"]
    """Where in them."""
    sequence: Int[np.ndarray, " p"]
    """The sequence of each."""
    sequence_tokens: dict[int, np.ndarray]
    """Tokens on which it fires in each of these sequences."""
    negative: Blocks
    """Blocks in which it does not."""
    base: Float[np.ndarray, " v_and_1"]
    """Share of all blocks that hold each token."""
    promoted: tuple[str, ...]
    """What it raises most in the logits."""


def gather(
    texts: Texts,
    contexts: Contexts,
    evidence: Evidence,
    fired: Int[np.ndarray, " k"],
    density: float,
    base: Float[np.ndarray, " v_and_1"],
    promoted: Iterable[str],
) -> Making:
    """Read what a rule is made from; `fired` are the places where the feature fires."""
    places = texts.places(contexts.positive, contexts.width)
    sequence = places[:, 0] // texts.stride
    rows = fired // texts.stride
    return Making(
        words=texts.words,
        evidence=evidence,
        density=density,
        positive=texts.read(contexts.positive, contexts.width),
        fires=np.isin(places, fired),
        sequence=sequence,
        sequence_tokens={
            row: texts.tokens[fired[rows == row]] for row in np.unique(sequence).tolist()
        },
        negative=texts.read(contexts.negative, contexts.width),
        base=base,
        promoted=tuple(promoted),
    )


def make_rule(making: Making) -> Rule:
    """The rule of a feature with at least one positive block; empty where nothing helps."""
    everywhere = Scope(
        positive=making.fires, negative=making.negative.keep, promoted=making.promoted
    )
    atoms = token_atoms(making, everywhere)
    finders = {
        "after": after_atoms,
        "before": before_atoms,
        "context": context_atoms,
    }
    found = {name: cover(finder(making, everywhere)) for name, finder in finders.items()}
    found["tokens"] = cover(atoms)
    best = max(found, key=lambda name: (found[name].value, name == "tokens"))
    rules = [(found[best].value, _rule({best: found[best].part}, making))]
    loose = cover(atoms, price=0.2)
    for first in {
        tuple(sorted(each.part.tokens)): each for each in (loose, found["tokens"])
    }.values():
        if not first.part.empty:
            rules.append(_joined(making, first, finders))
    value, rule = max(rules, key=lambda pair: pair[0])
    return rule if value > 0.5 else _rule({}, making)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """The places at which atoms count: everywhere, or where a first part holds."""

    positive: Bool[np.ndarray, "p w"]
    """Firings."""
    negative: Bool[np.ndarray, "n w"]
    """Places of silent blocks."""
    promoted: tuple[str, ...] = ()
    """Tokens that may stand as one atom among those that follow."""
    narrowed: bool = False
    """Whether a first part has been chosen already."""


def _joined(
    making: Making, first: Found, finders: dict[str, Callable[[Making, Scope], list[Atom]]]
) -> tuple[float, Rule]:
    """The best second part beside a first one, and what both are worth together."""
    table = first.part.table(making.words)
    scope = Scope(
        positive=making.fires & table[making.positive.tokens],
        negative=making.negative.keep & table[making.negative.tokens],
        promoted=making.promoted,
        narrowed=True,
    )
    best, rule = 0.0, _rule({}, making)
    for name in ("after", "before", "context"):
        found = cover(finders[name](making, scope))
        if not found.part.empty and found.value > best:
            best, rule = found.value, _rule({"tokens": first.part, name: found.part}, making)
    return best - first.cost - SECOND_PART, rule


def _rule(parts: dict[str, Part], making: Making) -> Rule:
    named = {name: part for name, part in parts.items() if not part.empty}
    return replace(Rule(promotes=making.promoted[:5]), **named)


# ------------------------------------------------------------------------------ choosing atoms


def cover(atoms: list[Atom], price: float = 1.0) -> Found:
    """Join the atoms, one after another, that add most to the balanced accuracy.

    `price` below 1 makes false alarms cheaper: a looser rule, for a second part to narrow.
    """
    chosen: list[Part] = []
    value, paid = 0.5, 0.0
    if atoms:
        hits = np.stack([atom.positive for atom in atoms]).astype(np.float32)
        alarms = np.stack([atom.negative for atom in atoms]).astype(np.float32)
        cost = np.array([atom.cost for atom in atoms])
        missed = np.ones(hits.shape[1], np.float32)
        quiet = np.ones(alarms.shape[1], np.float32)
        n_hits, n_alarms = max(len(missed), 1), max(len(quiet), 1)
        while len(chosen) < MOST_ATOMS:
            gain = (hits @ missed / n_hits - price * (alarms @ quiet) / n_alarms) / 2 - cost
            best = int(gain.argmax())
            if gain[best] <= 0:
                break
            value += float(gain[best])
            paid += atoms[best].cost
            chosen.append(atoms[best].part)
            missed *= 1 - hits[best]
            quiet *= 1 - alarms[best]
    return Found(part=joined(chosen), value=value, cost=paid)


def joined(parts: list[Part]) -> Part:
    """One part that holds where any of these does."""
    tokens = sorted({pair for part in parts for pair in part.tokens}, key=lambda pair: -pair[1])
    return Part(
        tokens=tuple(tokens),
        kinds=tuple(kind for part in parts for kind in part.kinds),
        endings=tuple(ending for part in parts for ending in part.endings),
        beginnings=tuple(beginning for part in parts for beginning in part.beginnings),
        phrases=tuple(phrase for part in parts for phrase in part.phrases),
    )


# -------------------------------------------------------------------------------- finding atoms


def token_atoms(making: Making, scope: Scope) -> list[Atom]:
    """Words with their forms, kinds, endings and beginnings of the tokens that it fires on."""
    return [
        *_word_atoms(making, scope),
        *_kind_atoms(making, scope, making.positive.tokens, making.negative.tokens),
        *_spelling_atoms(making, scope),
    ]


def _word_atoms(making: Making, scope: Scope) -> list[Atom]:
    """Words that drive it, by summed activation; each with the forms that drive it too."""
    evidence, words = making.evidence, making.words
    lifted = evidence.share >= min(LEAST_LIFT * making.density, 0.5)
    tokens, counts = evidence.tokens[lifted], evidence.counts[lifted]
    mass = evidence.mass[lifted] / max(evidence.mass.sum(), 1e-30)
    stems, group = np.unique(words.stems[tokens], return_inverse=True)
    weight = np.bincount(group, mass, minlength=len(stems))
    kept = np.argsort(-weight, kind="stable")[:MOST_WORDS]
    if not len(kept):
        return []
    number = np.full(words.nothing + 1, -1)
    rank = np.full(len(stems), -1)
    rank[kept] = np.arange(len(kept))
    number[tokens] = rank[group]
    total = np.bincount(group, counts, minlength=len(stems))[kept]
    positive = _incidence(number[making.positive.tokens], scope.positive, len(kept))
    positive &= total[:, None] - _own_counts(making, number, len(kept)) > 0
    negative = _incidence(number[making.negative.tokens], scope.negative, len(kept))
    return [
        Atom(
            part=Part(
                tokens=tuple(
                    (int(tokens[i]), float(mass[i])) for i in np.flatnonzero(group == kept[place])
                )
            ),
            cost=COSTS["tokens"],
            positive=positive[place],
            negative=negative[place],
        )
        for place in range(len(kept))
    ]


def _own_counts(making: Making, number: Int[np.ndarray, " v_and_1"], n: int) -> np.ndarray:
    """Firings on each word in the sequence that each positive block is of, [n, p]."""
    counts = np.zeros((n, len(making.sequence)), np.int64)
    for block, row in enumerate(making.sequence.tolist()):
        found = number[making.sequence_tokens[row]]
        counts[:, block] = np.bincount(found[found >= 0], minlength=n)
    return counts


def _incidence(
    numbers: Int[np.ndarray, "b w"], scope: Bool[np.ndarray, "b w"], n: int
) -> Bool[np.ndarray, "n b"]:
    """Which of `n` numbered things stand in which block, within the scope; -1 is none of them."""
    found = np.zeros((n, len(numbers)), bool)
    block, place = np.nonzero(scope & (numbers >= 0))
    found[numbers[block, place], block] = True
    return found


def _kind_atoms(
    making: Making,
    scope: Scope,
    positive: Int[np.ndarray, "p w"],
    negative: Int[np.ndarray, "n w"],
) -> list[Atom]:
    """Kinds of token that stand at a quarter of the firings."""
    at_firings = making.words.kinds[positive[scope.positive]]
    often = np.flatnonzero(at_firings.mean(0) >= 0.25) if len(at_firings) else []
    atoms = []
    for kind in often:
        table = making.words.kinds[:, kind]
        atoms.append(
            Atom(
                part=Part(kinds=(KIND_NAMES[kind],)),
                cost=COSTS["kinds"],
                positive=in_row(scope.positive & table[positive]),
                negative=in_row(scope.negative & table[negative]),
            )
        )
    return atoms


def _spelling_atoms(making: Making, scope: Scope) -> list[Atom]:
    """Endings and beginnings that several of its tokens share."""
    words, atoms = making.words, []
    tokens, counts = np.unique(making.positive.tokens[scope.positive], return_counts=True)
    for letters, first in [
        *((n, False) for n in ENDING_LETTERS), *((n, True) for n in BEGINNING_LETTERS),
    ]:  # fmt: skip
        codes, names = (words.beginnings if first else words.endings)[letters]
        there = codes[tokens]
        n_tokens = np.bincount(there[there >= 0], minlength=1)
        n_firings = np.bincount(there[there >= 0], counts[there >= 0], minlength=1)
        often = np.flatnonzero((n_tokens >= LEAST_TOKENS) & (n_firings >= 0.15 * counts.sum()))
        texts = list(names) if len(often) else []
        for code in often:
            atoms.append(
                Atom(
                    part=Part(beginnings=(texts[code],)) if first else Part(endings=(texts[code],)),
                    cost=COSTS["beginnings" if first else "endings"],
                    positive=in_row(scope.positive & (codes[making.positive.tokens] == code)),
                    negative=in_row(scope.negative & (codes[making.negative.tokens] == code)),
                )
            )
    return atoms


def after_atoms(making: Making, scope: Scope) -> list[Atom]:
    """Tokens, pairs of tokens and kinds that stand before its firings."""
    before = (making.positive.previous, making.negative.previous)
    return [
        *_neighbour_atoms(making, scope, *before),
        *_phrase_atoms(making, scope),
        *_kind_atoms(making, scope, *before),
    ]


def before_atoms(making: Making, scope: Scope) -> list[Atom]:
    """Tokens and kinds that stand after its firings, and what it promotes, if that comes true."""
    after = (making.positive.following, making.negative.following)
    atoms = [*_neighbour_atoms(making, scope, *after), *_kind_atoms(making, scope, *after)]
    promoted = making.words.ids(scope.promoted)
    if promoted:
        part = Part(tokens=tuple((token, 0.0) for token in promoted))
        table = part.table(making.words)
        atoms.append(
            Atom(
                part=part,
                cost=COSTS["kinds"],
                positive=in_row(scope.positive & table[after[0]]),
                negative=in_row(scope.negative & table[after[1]]),
            )
        )
    return atoms


def _neighbour_atoms(
    making: Making,
    scope: Scope,
    positive: Int[np.ndarray, "p w"],
    negative: Int[np.ndarray, "n w"],
) -> list[Atom]:
    """Single tokens beside its firings; upper and lower case, with and without space, are one."""
    words = making.words
    found = positive[scope.positive]
    found = found[found != words.nothing]
    tokens, counts = np.unique(found, return_counts=True)
    stems, group = np.unique(words.stems[tokens], return_inverse=True)
    weight = np.bincount(group, counts, minlength=len(stems))
    kept = np.argsort(-weight, kind="stable")[:20]
    rank = np.full(len(stems), -1)
    rank[kept] = np.arange(len(kept))
    number = np.full(words.nothing + 1, -1)
    number[tokens] = rank[group]
    hits = _incidence(number[positive], scope.positive, len(kept))
    alarms = _incidence(number[negative], scope.negative, len(kept))
    return [
        Atom(
            part=Part(
                tokens=tuple(
                    (int(tokens[i]), float(counts[i] / counts.sum()))
                    for i in np.flatnonzero(group == kept[place])
                )
            ),
            cost=COSTS["tokens"],
            positive=hits[place],
            negative=alarms[place],
        )
        for place in range(len(kept))
        if n_sequences(making, hits[place]) >= LEAST_SEQUENCES
    ]


def _phrase_atoms(making: Making, scope: Scope) -> list[Atom]:
    """Pairs of tokens before its firings."""
    base = making.words.nothing + 1
    pairs = making.positive.earlier.astype(np.int64) * base + making.positive.previous
    others = making.negative.earlier.astype(np.int64) * base + making.negative.previous
    found, counts = np.unique(pairs[scope.positive], return_counts=True)
    atoms = []
    for place in np.argsort(-counts, kind="stable")[:6]:
        first, second = divmod(int(found[place]), base)
        if counts[place] < LEAST_SEQUENCES or base - 1 in (first, second):
            continue
        hits = in_row(scope.positive & (pairs == found[place]))
        if n_sequences(making, hits) >= LEAST_SEQUENCES:
            atoms.append(
                Atom(
                    part=Part(phrases=((first, second),)),
                    cost=COSTS["phrases"],
                    positive=hits,
                    negative=in_row(scope.negative & (others == found[place])),
                )
            )
    return atoms


def context_atoms(making: Making, scope: Scope) -> list[Atom]:
    """Words that stand in its positive blocks much more often than in the corpus."""
    words = making.words
    inside = in_row(scope.positive)
    if not inside.any():
        return []
    # The tokens that a first part names do not count as their own surroundings.
    elsewhere = making.positive.keep & inside[:, None]
    if scope.narrowed:
        elsewhere &= ~scope.positive
    block, place = np.nonzero(elsewhere)
    base = words.nothing + 1
    pairs = np.unique(block * base + making.positive.tokens[block, place])
    tokens, df = np.unique(pairs % base, return_counts=True)
    rate = df / len(inside)
    lift = rate / np.maximum(making.base[tokens], 1e-4)
    fits = (df >= LEAST_SEQUENCES) & (making.base[tokens] < COMMON) & (lift >= 3)
    tokens, gain = tokens[fits], (rate - making.base[tokens])[fits]
    tokens = tokens[np.argsort(-gain, kind="stable")[:30]]
    number = np.full(words.nothing + 1, -1)
    number[tokens] = np.arange(len(tokens))
    hits = _incidence(number[making.positive.tokens], elsewhere, len(tokens))
    reachable = making.negative.keep & in_row(scope.negative)[:, None]
    alarms = _incidence(number[making.negative.tokens], reachable, len(tokens))
    return [
        Atom(
            part=Part(tokens=((int(token), float(hits[i].mean())),)),
            cost=CONTEXT_COST,
            positive=hits[i],
            negative=alarms[i],
        )
        for i, token in enumerate(tokens)
        if n_sequences(making, hits[i]) >= LEAST_SEQUENCES
    ]


def n_sequences(making: Making, blocks: Bool[np.ndarray, " p"]) -> int:
    """How many sequences some of the positive blocks are of."""
    return len(set(making.sequence[blocks].tolist()))
