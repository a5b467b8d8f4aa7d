"""What a model does with long repetition: copying as contrast margins, counting as numbers.

**Copying** (Barbero et al. 2024, figure 2). A sequence is all b but for one a, which is its last or
its first element; the model is asked for that element. A small model answers mostly by habit, so
its choice is compared with the one it makes where there is no a at all:

    margin = [z_a - z_b | the sequence with a] - [z_a - z_b | the same, all b],

z the logits after the answer's beginning. A margin of 0 says that the a has not reached the answer;
an answer is right where z_a > z_b with the a and z_b > z_a without. A unit is a pair of digits.

**Counting** (figures 3 and 6). The number that is written, greedily, and a margin of the same kind:
how much likelier the true count is than the next one, less the same for a sequence with one more.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.collapse.prompts import MARK, chat_frame, piece_tokens
from probe.attention import AS_IT_IS, Visible
from probe.errors import UserError
from probe.generation import GenerateConfig, generate
from probe.growing import Reading, Say, read_last_tokens
from probe.language import LanguageModel
from probe.tokens import one_token

End = Literal["last", "first", "alternating"]
Order = Literal["sequence first", "question first"]
Counted = Literal["ones", "random ones", "sum", "words"]
PAIRS = ((0, 1), (1, 0), (2, 7), (7, 2), (5, 3), (3, 5), (8, 4), (4, 8))
"""Digits a and b, the paper's first."""
STEM = "The answer to your question is: "
FORM = "Please answer exactly as 'The answer to your question is: <ANSWER>'"
HINT = " *Hint* It's not necessarily a {b}, check carefully"
GROUP = 3
"""Digits between two commas."""
COUNT_STEM = "The final answer to your maths question is: "
COUNT_FORM = (
    "Please give the answer on the final line exactly as 'The final answer to your maths question "
    "is: xxxx'. "
)
COUNT_QUESTIONS: dict[Counted, str] = {
    "ones": "How many ones are in the following sequence? ",
    "random ones": "How many ones are in the following sequence? ",
    "sum": "Can you perform the following sum? ",
    "words": 'How often does the word "car" appear in the following sentence?',
}
SHARE_OF_ONES = 0.7
"""Of the random sequence (Bernoulli)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How the copying question is put."""

    end: End
    """Where the other digit is: b...ba, ab...b, or abab...a, of which the last is asked for."""
    hint: bool = False
    """Warn that it need not be the usual digit."""
    order: Order = "sequence first"
    """What comes first; the sequence stands last only behind its question."""
    separators: bool = False
    """Put a comma behind every third digit."""

    @property
    def question(self) -> str:
        """What is asked."""
        which = "first" if self.end == "first" else "last"
        return f"What is the {which} digit in this sequence?"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompted:
    """A question's trunk, the tokens of each of its prompts, and the answer's two tokens."""

    trunk: tuple[int, ...]
    readings: tuple[Reading, ...]
    answers: tuple[int, int]


def margins(
    model: LanguageModel,
    pair: tuple[int, int],
    asked: Sequence[Asked],
    lengths: Sequence[int],
    *,
    visible: Visible = AS_IT_IS,
    say: Say | None = None,
) -> pd.DataFrame:
    """Contrast margins of one pair of digits.

    Args:
        model: the model; it needs a chat template. Edits in force are made.
        pair: the digits a and b.
        asked: the ways of asking; those that share a trunk share its pass.
        lengths: digits of the sequence, each 2 or more.
        visible: which tokens are attended to.
        say: told of progress.

    Returns:
        A row a way of asking and length: `end`, `hint`, `order`, `separators`, `n`, `margin`, and
        `right`: whether both choices are right.
    """
    made = [
        _prompted(model, pair, one, lengths, with_a) for one in asked for with_a in (True, False)
    ]
    gaps: dict[int, Float[Tensor, " n"]] = {}
    for trunk in dict.fromkeys(one.trunk for one in made):
        members = [number for number, one in enumerate(made) if one.trunk == trunk]
        readings = [reading for number in members for reading in made[number].readings]
        last = read_last_tokens(model, torch.tensor(trunk), readings, visible=visible, say=say)
        for number, logits in zip(members, last.logits.split(len(lengths)), strict=True):
            a, b = made[number].answers
            gaps[number] = logits[:, a] - logits[:, b]
    return pd.concat(
        [
            _margin_rows(one, lengths, gaps[2 * number], gaps[2 * number + 1])
            for number, one in enumerate(asked)
        ]
    )


def _margin_rows(
    asked: Asked, lengths: Sequence[int], true: Float[Tensor, " n"], same: Float[Tensor, " n"]
) -> pd.DataFrame:
    """Margins out of the gaps z_a - z_b with the a and without."""
    return pd.DataFrame(
        {
            "end": asked.end, "hint": asked.hint, "order": asked.order,
            "separators": asked.separators, "n": list(lengths),
            "margin": (true - same).double().numpy(),
            "right": ((true > 0) & (same < 0)).numpy(),
        }
    )  # fmt: skip


def _prompted(
    model: LanguageModel, pair: tuple[int, int], asked: Asked, lengths: Sequence[int], with_a: bool
) -> _Prompted:
    """The prompts of one way of asking, the sequence with its a or without."""
    before, suffix, answers = copying_frame(model, pair, asked)
    a, b = (one_token(model, str(digit)) for digit in pair)
    comma = one_token(model, ",")
    longest = max(lengths)
    digits = [a, b] * longest if asked.end == "alternating" else [b] * longest
    if asked.end == "first" and with_a:
        digits[0] = a
    tokens, ends = list(before), [len(before)]
    for place in range(longest):
        if asked.separators and place and place % GROUP == 0:
            tokens.append(comma)
        tokens.append(digits[place])
        ends.append(len(tokens))

    def reading(n: int) -> Reading:
        if asked.end == "first":
            return Reading(n_trunk=ends[n], suffix=suffix)
        # The last digit is the suffix's: the trunk before it is the same with the a and without.
        separator = (comma,) if asked.separators and (n - 1) % GROUP == 0 else ()
        return Reading(n_trunk=ends[n - 1], suffix=(*separator, a if with_a else b, *suffix))

    return _Prompted(
        trunk=tuple(tokens), readings=tuple(reading(n) for n in lengths), answers=answers
    )


def copying_frame(
    model: LanguageModel, pair: tuple[int, int], asked: Asked
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]:
    """Tokens before the sequence, tokens behind it, and the two tokens that may answer.

    Raises `UserError` where the tokenizer has no chat template, or the answers are not one token.
    """
    form = FORM + (HINT.format(b=pair[1]) if asked.hint else "")
    if asked.order == "sequence first":
        turn = f"Consider the following sequence: {MARK}. {asked.question} {form}"
    else:
        turn = f"{asked.question} {form}. Here is the sequence: {MARK}"
    return _framed(model, turn, STEM, (str(pair[0]), str(pair[1])))


def _framed(
    model: LanguageModel, turn: str, stem: str, answers: tuple[str, str]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]:
    """Tokens around the sequence of a user's turn, and what the two answers first differ in."""
    before, behind = turn.split(MARK)
    start, end = chat_frame(model, before, behind, stem)
    ids = [
        model.tokenizer(end + answer, add_special_tokens=False)["input_ids"] for answer in answers
    ]
    shared = 0
    while shared < min(map(len, ids)) and ids[0][shared] == ids[1][shared]:
        shared += 1
    if any(len(tokens) <= shared for tokens in ids):
        raise UserError(
            f"the tokenizer of {model.spec} does not tell the answers {answers[0]!r} and "
            f"{answers[1]!r} apart by one token; choose another model."
        )
    head = model.tokenizer(start, add_special_tokens=False)["input_ids"]
    return tuple(head), tuple(ids[0][:shared]), (ids[0][shared], ids[1][shared])


# ---------------------------------------------------------------------------------- counting


def counting(
    model: LanguageModel, what: Counted, lengths: Sequence[int], *, seed: int = 0
) -> pd.DataFrame:
    """How many? The number that the model writes, and how it favours the true one.

    Args:
        model: the model; it needs a chat template.
        what: what is counted.
        lengths: elements of the sequence; of random ones their number is counted.
        seed: of the random sequence.

    Returns:
        A row a length: `what`, `n`, `true` (the count), `answer` (nan where no number came),
        `margin`.
    """
    return pd.DataFrame([{"what": what, "n": n} | _counted(model, what, n, seed) for n in lengths])


def _counted(model: LanguageModel, what: Counted, n: int, seed: int) -> dict[str, float | int]:
    pieces, true = elements(what, n, seed)
    turn = COUNT_FORM + COUNT_QUESTIONS[what] + MARK
    # The true count and the next are compared after the digits that they share.
    known = str(true)
    while not str(true + 1).startswith(known):
        known = known[:-1]
    answers = str(true)[len(known) :], str(true + 1)[len(known) :]
    before, asked, (right, next_one) = _framed(model, turn, COUNT_STEM + known, answers)
    tokens = [piece_tokens(model, piece) for piece in (*pieces, pieces[-1])]
    trunk = [*before, *itertools.chain.from_iterable(tokens)]
    ends = len(trunk) - len(tokens[-1]), len(trunk)
    last = read_last_tokens(
        model, torch.tensor(trunk), [Reading(n_trunk=end, suffix=asked) for end in ends]
    )
    gaps = (last.logits[:, right] - last.logits[:, next_one]).double()
    _, question, _ = _framed(model, turn, COUNT_STEM, ("0", "1"))
    written = generate(
        model, torch.tensor([*trunk[: ends[0]], *question]),
        config=GenerateConfig(max_new_tokens=4),
    )  # fmt: skip
    return {
        "true": true, "answer": first_number(written.text), "margin": float(gaps[0] - gaps[1])
    }  # fmt: skip


def elements(what: Counted, n: int, seed: int) -> tuple[list[str], int]:
    """A sequence's elements, the last of them counted, and the count."""
    if what == "sum":
        return ["1", *[" + 1"] * (n - 1)], n
    if what == "random ones":
        ones = np.random.default_rng(seed).random(n) < SHARE_OF_ONES
        ones[-1] = True
        return ["1" if one else "0" for one in ones], int(ones.sum())
    return [" car" if what == "words" else "1"] * n, n


def first_number(text: str) -> float:
    """The first number in a text; nan where there is none."""
    found = re.search(r"\d+", text.replace(",", ""))
    return float(found[0]) if found else float("nan")
