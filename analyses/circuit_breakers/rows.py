"""Passages as token rows: what a circuit breaker is trained and judged on.

A passage is a request and the response to it, written through the model's chat template, the
request cut from the left and the response from the right (as published: 512 + 512 tokens). Without
a response the row ends with the user's last word: nothing is put into the assistant's mouth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probe.errors import UserError
from probe.language import LanguageModel
from probe.prompt_sets import PROBES, Row, common_beginning, instruction_ending, write_rows

Masking = Literal["padding", "first", "shared"]
ROWS_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A request and its response."""

    request: str
    """What the user asks."""
    response: str
    """What is answered; empty where only the request is to be read."""
    topic: str = ""
    """What it is about: passages of one topic are never both trained on and tested on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """A passage's tokens."""

    ids: Row
    """Token numbers."""
    shared: int
    """Tokens at the beginning that all prompts share: the template's, with its system prompt."""
    answer: int
    """Where the response begins; the row's length where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows padded on the right."""

    tokens: Int[Tensor, "b t"]
    """Token numbers, 0 where padded."""
    attended: Bool[Tensor, "b t"]
    """Which are real."""
    counted: Bool[Tensor, "b t"]
    """Which count in losses and means."""


def shared_tokens(model: LanguageModel) -> int:
    """Tokens that all prompts begin with."""
    return common_beginning(*write_rows(model, PROBES))


def token_rows(
    model: LanguageModel,
    passages: Sequence[Passage],
    *,
    request_length: int,
    response_length: int,
    blank: bool = False,
) -> list[TokenRow]:
    """Passages as rows.

    Args:
        model: whose template and tokenizer.
        passages: what is written.
        request_length: the template's and the request's last tokens that are kept.
        response_length: the response's first tokens that are kept.
        blank: leave the requests out, as if the user had said nothing.

    Raises `UserError` where there is no passage, or nothing of one is left.
    """
    if not passages:
        raise UserError("a set of passages is empty; give at least one passage.")
    shared, ending = shared_tokens(model), len(instruction_ending(model))
    # A template writes an empty turn as it writes a full one: take the user's words out again.
    empty = write_rows(model, [PROBES[0]])[0]
    empty = empty[:shared] + empty[len(empty) - ending :]
    found = []
    for passage in passages:
        asked = empty if blank else write_rows(model, [passage.request])[0]
        answer = model.tokenizer(passage.response, add_special_tokens=False)["input_ids"]
        if not answer:
            asked = asked[: len(asked) - ending]
        cut = max(0, len(asked) - request_length)
        request = asked[cut:]
        ids = (*request, *answer[:response_length])
        if not ids:
            raise UserError(f"nothing is left of the passage {passage.request!r}; write it longer.")
        found.append(TokenRow(ids=ids, shared=max(0, shared - cut), answer=len(request)))
    return found


def batch_of(rows: Sequence[TokenRow], masking: Masking, *, length: int = 0) -> Batch:
    """Rows side by side, padded to the longest, or to `length` where that is longer.

    `masking` is what is left out of losses: only the padding, also the first token (whose norm is
    far above the others'), or all tokens that every prompt begins with, which the retain set asks
    to keep and the circuit-breaker set to change.
    """
    longest = max(length, *(len(row.ids) for row in rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    attended = torch.zeros(len(rows), longest, dtype=torch.bool)
    counted = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        n = len(row.ids)
        tokens[number, :n] = torch.tensor(row.ids)
        attended[number, :n] = True
        start = {"padding": 0, "first": 1, "shared": max(1, row.shared)}[masking]
        counted[number, start:n] = True
    return Batch(tokens=tokens, attended=attended, counted=counted)


def row_batches(rows: Sequence[TokenRow]) -> Iterator[tuple[Sequence[TokenRow], Batch]]:
    """A few rows at a time, in order, with all their tokens counted."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        yield some, batch_of(some, "padding")
