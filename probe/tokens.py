"""A text or a chat as the tokens a model reads.

A plain text is preceded by the tokenizer's end of text, as every document is in an activation
store. A chat is written out by the tokenizer's chat template, which brings its own beginning, and
nothing is put in front of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from probe.errors import UserError
from probe.language import LanguageModel

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of a chat."""

    role: Role
    """Whose turn it is."""
    content: str
    """What is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The tokens of a text; equal prompts are equal keys of a dictionary."""

    ids: tuple[int, ...]
    """Token numbers."""
    texts: tuple[str, ...]
    """Each token as it would be printed."""
    keep: tuple[bool, ...]
    """False at position 0 and at special tokens, whose activations have outlier norms."""
    n_cut: int = 0
    """Tokens at the end that were left out because the text is too long."""

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def tokens(self) -> Int[Tensor, "1 t"]:
        """The token numbers as a batch of one row."""
        return torch.tensor([self.ids])

    def up_to(self, position: int | None) -> "Prompt":
        """The tokens up to and including a position (negative: from the end; None: all of them).

        What a model predicts after that token depends on no later one. Raises `UserError` where the
        prompt has no such position.
        """
        n = len(self)
        if position is None:
            return self
        if not -n <= position < n:
            raise UserError(
                f"there is no position {position}: the prompt has the positions 0 to {n - 1}."
            )
        end = position % n + 1
        return replace(self, ids=self.ids[:end], texts=self.texts[:end], keep=self.keep[:end])


def context_size(model: LanguageModel) -> int | None:
    """Tokens the model can read at most; None where its config does not say."""
    return getattr(model.model.config.get_text_config(), "max_position_embeddings", None)


def read_text(model: LanguageModel, text: str, *, at_most: int | None = None) -> Prompt:
    """The tokens of a text behind the end-of-text token.

    Args:
        model: whose tokenizer.
        text: what is read.
        at_most: cut the text to that many tokens and to what the model can read; where it is None,
            a text that the model cannot read is an error instead.

    Raises:
        UserError: the text is empty, or longer than the model can read.
    """
    ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("there is no text to encode: type a word or more.")
    return _prompt(model, [model.separator_id, *ids], None if at_most is None else at_most + 1)


def read_chat(model: LanguageModel, turns: Sequence[Turn], *, at_most: int | None = None) -> Prompt:
    """The tokens of a chat as the tokenizer's template writes it, up to where the model goes on.

    Where the last turn is the assistant's it is left open, for the model to continue it. Empty
    turns are left out. Options and errors are those of `read_text`; besides, `UserError` where the
    tokenizer has no chat template or the template does not take these turns.
    """
    said = [turn for turn in turns if turn.content.strip()]
    if not said:
        raise UserError("there is no turn with text in it: type a word or more.")
    if not model.tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {model.spec} has no chat template; type a text instead, written as "
            "the model should read it."
        )
    from jinja2 import TemplateError

    answering = said[-1].role == "assistant"
    try:
        text = model.tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in said],
            tokenize=False,
            add_generation_prompt=not answering,
            continue_final_message=answering,
        )
    except TemplateError as error:
        raise UserError(
            f"the chat template of {model.spec} does not take these turns ({error}); change their "
            "roles or their order."
        ) from error
    ids: list[int] = model.tokenizer(str(text), add_special_tokens=False)["input_ids"]
    return _prompt(model, ids, at_most)


def as_prompt(model: LanguageModel, text: str | Prompt) -> Prompt:
    """The prompt itself, or the tokens of a text; raises as `read_text` does."""
    return text if isinstance(text, Prompt) else read_text(model, text)


def token_texts(model: LanguageModel, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token as it would be printed."""
    return tuple(model.tokenizer.batch_decode([[int(token)] for token in ids]))


def one_token(model: LanguageModel, text: str) -> int:
    """The number of the one token that a text is; a space in front is part of it.

    Raises `UserError` where the text is not exactly one token.
    """
    ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1:
        return ids[0]
    parts = ", ".join(repr(part) for part in token_texts(model, ids))
    made_of = f"is {len(ids)} tokens of {model.spec} ({parts})" if ids else "is empty"
    raise UserError(
        f"{text!r} {made_of} where one token was wanted; a word inside a sentence begins with a "
        "space, as in ' Mary'."
    )


def _prompt(model: LanguageModel, ids: list[int], at_most: int | None) -> Prompt:
    size = context_size(model)
    if at_most is None and size is not None and len(ids) > size:
        raise UserError(
            f"the prompt has {len(ids):,} tokens and {model.spec} reads at most {size:,}: shorten "
            "it."
        )
    limit = min(at_most or len(ids), size or len(ids))
    kept = ids[:limit]
    return Prompt(
        ids=tuple(kept),
        texts=token_texts(model, kept),
        keep=tuple(i > 0 and token not in model.special_ids for i, token in enumerate(kept)),
        n_cut=len(ids) - len(kept),
    )
