"""Sets of prompts: read from files, written as tokens, run through a model without padding.

A prompt is written through the tokenizer's chat template where it has one (as the user's turn, with
the header of the model's answer behind it), else as plain text. The tokens after the instruction
are then the same for all prompts, and positions count from the end: -1 is the last token, where the
model is about to answer.

`last_token_passes` runs prompts of equal length together, so nothing is ever padded, and computes
what all prompts begin with (a system prompt, say) only once. Both change results by rounding alone.
"""

import copy
import csv
import inspect
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe.errors import UserError
from probe.language import LanguageModel

Row = tuple[int, ...]
"""A prompt's tokens."""
TOKENS_AT_ONCE = 1024
"""Tokens in one forward pass, about."""
LEAST_PREFIX = 4
"""Fewer tokens in common than this are not worth a pass of their own."""
FIELDS = ("prompt", "text")
PROBES = ("a", "Zebra 9")
"""Two instructions that begin and end differently: what follows both is the template's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one forward pass over prompts of equal length gave."""

    members: list[int]
    """Numbers of the prompts in it."""
    logits: Float[Tensor, "b v"]
    """Logits at the last token of each."""


def read_prompts(path: Path, *, leave_out: Collection[str] = ()) -> list[str]:
    """Prompts of a file, one a line or row: `.txt`, `.jsonl` of objects or `.csv` with a field
    `prompt` or `text`.

    Args:
        path: the file. Empty lines are passed over.
        leave_out: rows whose field `label` is one of these are passed over too.

    Raises `UserError` where the file is missing, holds no prompt, or a line is not as it should be.
    """
    if path.suffix not in (".txt", ".jsonl", ".csv"):
        raise UserError(f"{path} is no file of prompts: wanted .txt, .jsonl or .csv.")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as prompts ({error}); give a text file.") from error
    if path.suffix == ".txt":
        prompts = [line.strip() for line in content.splitlines() if line.strip()]
    else:
        rows = _csv_rows(content) if path.suffix == ".csv" else _json_rows(path, content)
        prompts = [_prompt_of(path, n, row) for n, row in rows if _label(row) not in leave_out]
    if not prompts:
        besides = f" whose label is none of {', '.join(leave_out)}" if leave_out else ""
        raise UserError(f"{path} holds no prompt{besides}; wanted one a line.")
    return prompts


def _json_rows(path: Path, content: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number} is not JSON ({error}); mend the line."
                ) from error


def _csv_rows(content: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(content.splitlines(keepends=True))
    for row in reader:
        yield reader.line_num, row


def _label(row: Any) -> str:
    return str(row.get("label") or "") if isinstance(row, dict) else ""


def _prompt_of(path: Path, number: int, row: Any) -> str:
    found = [row[name] for name in FIELDS if name in row] if isinstance(row, dict) else []
    if not found or not isinstance(found[0], str) or not found[0].strip():
        raise UserError(
            f'{path}, line {number} has no prompt: wanted a field "prompt" or "text" with words.'
        )
    return found[0]


def has_template(model: LanguageModel) -> bool:
    """Whether the tokenizer writes chats."""
    return bool(getattr(model.tokenizer, "chat_template", None))


def write_rows(
    model: LanguageModel, prompts: Sequence[str], *, chat: bool | None = None
) -> list[Row]:
    """Each prompt as tokens.

    Args:
        model: whose tokenizer writes them.
        prompts: the instructions.
        chat: through the chat template; None does so where there is one.

    Raises:
        UserError: there is no prompt, one is empty or longer than the model's context, or a chat
            was asked of a tokenizer that writes none.
    """
    if not prompts:
        raise UserError("no prompt was given; give at least one.")
    if chat and not has_template(model):
        raise UserError(f"the tokenizer of {model.spec} has no chat template; write plain text.")
    chatting = has_template(model) if chat is None else chat
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise UserError(f"prompt {number} of {len(prompts)} is empty; write one or leave it.")
    rows = [_row(model, prompt, chatting) for prompt in prompts]
    limit = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    for number, row in enumerate(rows, start=1):
        if limit is not None and len(row) > limit:
            raise UserError(
                f"prompt {number} of {len(rows)} has {len(row)} tokens where {model.spec} takes "
                f"{limit}; shorten it."
            )
    return rows


def _row(model: LanguageModel, prompt: str, chatting: bool) -> Row:
    if not chatting:
        return tuple(model.tokenizer(prompt)["input_ids"])
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    assert isinstance(text, str)
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def instruction_ending(model: LanguageModel, *, chat: bool | None = None) -> Row:
    """The template's tokens after the instruction; none where prompts are plain text."""
    first, second = write_rows(model, PROBES, chat=chat)
    return first[len(first) - common_beginning(first[::-1], second[::-1]) :]


def ending_positions(model: LanguageModel, *, chat: bool | None = None) -> tuple[int, ...]:
    """Positions of the tokens after the instruction, from -1 back; -1 alone in plain text."""
    return tuple(range(-1, -max(1, len(instruction_ending(model, chat=chat))) - 1, -1))


def last_token_passes(
    model: LanguageModel,
    rows: Sequence[Row],
    *,
    keep: int = 1,
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> Iterator[Pass]:
    """Run all prompts, those of equal length together, what all begin with only once.

    A hook sees `[b, t, d]` of the prompts' own tokens in each pass, and once those of the common
    beginning: what it does must not depend on where in the prompt a token is, but for the last
    `keep`.

    Args:
        model: the model.
        rows: the prompts.
        keep: last tokens of each prompt that are in its own pass for certain.
        tokens_at_once: about as many tokens go into a pass.

    Raises:
        UserError: a prompt has fewer than `keep` tokens.
    """
    for number, row in enumerate(rows, start=1):
        if len(row) < keep:
            raise UserError(
                f"prompt {number} of {len(rows)} has {len(row)} tokens where position -{keep} was "
                "asked for; leave the prompt or the position out."
            )
    begins = _shared_beginning(rows, keep)
    past = _run(model, torch.tensor([rows[0][:begins]]), None)[1] if begins else None
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(number)
    for length, numbers in sorted(by_length.items()):
        size = max(1, tokens_at_once // (length - begins))
        for start in range(0, len(numbers), size):
            members = numbers[start : start + size]
            tokens = torch.tensor([rows[number][begins:] for number in members])
            yield Pass(members=members, logits=_run(model, tokens, past)[0])


@torch.inference_mode()
def last_logits(model: LanguageModel, rows: Sequence[Row]) -> Float[Tensor, "n v"]:
    """Logits at the last token of every prompt, float32 on the CPU."""
    found: dict[int, Tensor] = {}
    for done in last_token_passes(model, rows):
        logits = done.logits.float().cpu()
        found |= {number: logits[place] for place, number in enumerate(done.members)}
    return torch.stack([found[number] for number in range(len(rows))])


def _run(model: LanguageModel, tokens: Tensor, past: Any) -> tuple[Tensor, Any]:
    """Logits at the last token, and the keys and values of what was run."""
    options: dict[str, Any] = {"use_cache": True}
    if past is not None:
        options["past_key_values"] = copy.deepcopy(past)  # a pass writes its own tokens into it
        options["past_key_values"].batch_repeat_interleave(len(tokens))
    if "logits_to_keep" in inspect.signature(model.model.forward).parameters:
        options["logits_to_keep"] = 1
    given = model.model(input_ids=tokens.to(model.device), **options)
    return given.logits[:, -1], given.past_key_values


def _shared_beginning(rows: Sequence[Row], keep: int) -> int:
    """How many tokens all prompts begin with, their last `keep` left out; 0 where it is too few."""
    if len(rows) < 2:
        return 0
    shared = min(common_beginning(rows[0], row) for row in rows[1:])
    shared = min(shared, min(map(len, rows)) - keep)
    return shared if shared >= LEAST_PREFIX else 0


def common_beginning(first: Row, second: Row) -> int:
    """How many tokens two rows begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
