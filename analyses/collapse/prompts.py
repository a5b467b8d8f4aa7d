"""The prompts of the collapse study: a question, then something repeated n times.

In a family (`analyses.collapse.families`), the prompt with n + 1 repetitions is the one with n and
the repeated piece once more, so the theorem's two conditions on the text hold: the same beginning,
and a last token that is repeated. A chat template that writes something behind the sequence breaks
the second.

Pieces are tokens, put one after another: where a tokenizer would merge digits (`111` one token), a
text of n ones has fewer than n tokens and the theorem's n is another. Then either the tokens of
single digits are fed all the same, which is said in the report, or the model is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from analyses.collapse.families import Family, Form
from probe.errors import UserError
from probe.growing import Reading
from probe.language import LanguageModel
from probe.tokens import one_token, token_texts

Merged = Literal["correct", "refuse"]
MARK = "\u2503"
"""Stands for the sequence while a chat template is written out."""
ANSWER = 'Give the answer as "The answer to your question is: <ANSWER>".\n'
"""How to answer, in the form `question last` (the paper's Type 2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growing:
    """A prompt by its number of repetitions: a trunk of tokens, and where prompts end in it."""

    trunk: Int[Tensor, " t"]
    """The longest prompt's tokens, but for what comes after the sequence."""
    ends: tuple[int, ...]
    """Tokens of the trunk up to repetition n, for n = 0, 1, ..."""
    suffix: tuple[int, ...] = ()
    """Tokens behind the sequence; where there are any, the theorem does not speak of the prompt."""
    last: tuple[int, ...] = ()
    """Of random digits: the piece that the sequence ends in, once or twice."""

    def reading(self, n: int, more: int = 0) -> Reading:
        """The prompt with n repetitions, or with `more` repetitions of its last piece besides."""
        if self.last:
            return Reading(n_trunk=self.ends[n - 1], suffix=self.last * (1 + more) + self.suffix)
        return Reading(n_trunk=self.ends[n + more], suffix=self.suffix)

    def pairs(self, lengths: Sequence[int], more: int = 1) -> list[Reading]:
        """For each length the prompt and its partner, one after the other."""
        return [self.reading(n, extra) for n in lengths for extra in (0, more)]


def grow(
    model: LanguageModel,
    family: Family,
    n: int,
    *,
    form: Form = "raw",
    phrasing: int = 0,
    seed: int = 0,
    merged: Merged = "correct",
) -> Growing:
    """A family's prompts of up to n repetitions.

    Args:
        model: whose tokenizer and chat template.
        family: what is repeated.
        n: the longest.
        form: what stands around the sequence.
        phrasing: number of the question.
        seed: of random digits, and of the shuffled question.
        merged: what to do where the tokenizer merges digits.

    Raises `UserError` where a piece is not one token or a few that stay apart, where digits merge
    and are refused, or the tokenizer has no chat template and one is wanted.
    """
    before, suffix = _frame(model, family.questions[phrasing], form, seed)
    pieces = sequence_pieces(model, family, n, seed=seed, merged=merged)
    ends = [len(before)]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    tokens = [*before, *(token for piece in pieces for token in piece)]
    return Growing(
        trunk=torch.tensor(tokens),
        ends=tuple(ends),
        suffix=tuple(suffix),
        last=(one_token(model, family.pieces[0]),) if family.random else (),
    )


def sequence_pieces(
    model: LanguageModel, family: Family, n: int, *, seed: int, merged: Merged
) -> list[list[int]]:
    """The tokens of each of n repetitions. Raises as `grow` does."""
    check_digits(model, family, merged)
    if family.random:
        digits = torch.tensor([one_token(model, digit) for digit in "0123456789"])
        generator = torch.Generator().manual_seed(seed)
        return [[int(d)] for d in digits[torch.randint(10, (n,), generator=generator)]]
    cycle = [piece_tokens(model, piece) for piece in family.pieces]
    pieces = [cycle[i % len(cycle)] for i in range(n)]
    if family.first:
        pieces[:1] = [piece_tokens(model, family.first)]
    return pieces


def piece_tokens(model: LanguageModel, piece: str) -> list[int]:
    """The tokens of a piece, each character class apart: `,1` is a comma and a one."""
    if piece[-1:].isdigit() and len(piece) > 1:
        return [*_ids(model, piece[:-1]), one_token(model, piece[-1])]
    return _ids(model, piece)


def check_digits(model: LanguageModel, family: Family, merged: Merged) -> None:
    """Raise `UserError` where the tokenizer merges digits and that is to be refused."""
    if merged == "refuse" and family.pieces[-1].endswith("1") and merges_digits(model):
        raise UserError(
            f"the tokenizer of {model.spec} merges digits ({_example(model)}), so n ones are not n "
            "tokens; choose a model that splits them, the family words, or --merged correct, which "
            "feeds single digits."
        )


def merges_digits(model: LanguageModel) -> bool:
    """Whether twelve ones are fewer than twelve tokens."""
    return len(_ids(model, "1" * 12)) < 12


def merging_sentence(model: LanguageModel) -> str:
    """What a report says of a tokenizer that merges digits; empty where it does not."""
    if not merges_digits(model):
        return ""
    return (
        f"The tokenizer of {model.spec} merges digits ({_example(model)}); single digits are fed "
        "here all the same, which the model has seldom read."
    )


def _example(model: LanguageModel) -> str:
    parts = token_texts(model, _ids(model, "1" * 12))
    return f"'{'1' * 12}' becomes {' '.join(map(repr, parts))}"


def _frame(
    model: LanguageModel, question: str, form: Form, seed: int
) -> tuple[list[int], list[int]]:
    """Tokens before and behind the sequence."""
    if form == "chat":
        before, after = chat_frame(model, question)
        return _ids(model, before), _ids(model, after)
    asked = _ids(model, ANSWER + question if form == "question last" else question)
    if form == "shuffled":
        generator = torch.Generator().manual_seed(seed)
        asked = [asked[i] for i in torch.randperm(len(asked), generator=generator).tolist()]
    return (asked if form == "bare" else [model.separator_id, *asked]), []


def chat_frame(
    model: LanguageModel, before: str, behind: str = "", answer: str = ""
) -> tuple[str, str]:
    """What a chat template writes before and behind a sequence in the user's turn.

    Args:
        model: whose template.
        before: what the turn says before the sequence.
        behind: what it says behind it.
        answer: what the assistant's turn begins with.

    Raises `UserError` where the tokenizer has no
    chat template, or it does not write the turn as it is.
    """
    if not model.tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {model.spec} has no chat template; leave the form `chat` out."
        )
    turns = [{"role": "user", "content": before + MARK + behind}]
    written = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    start, mark, end = str(written).partition(MARK)
    if not mark:
        raise UserError(
            f"the chat template of {model.spec} changes what the user writes; leave the form "
            "`chat` out."
        )
    return start, end + answer


def _ids(model: LanguageModel, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]
