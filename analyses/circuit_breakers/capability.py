"""What breaking a concept costs elsewhere, each measure paired between original and broken model.

- perplexity on documents of the built-in corpus, of topics that training has not seen;
- KL(original || broken) of the next token, over responses to near misses and ordinary requests;
- multiple choice: the choice whose text is likeliest a token, after the question.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from analyses.circuit_breakers.asking import Ask, mean_nll
from analyses.circuit_breakers.rows import TokenRow
from probe.errors import UserError
from probe.language import LanguageModel
from probe.prompt_sets import Row

CONTEXT, QUESTIONS_AT_ONCE = 256, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A question with its choices."""

    question: str
    """What is asked."""
    choices: tuple[str, ...]
    """The answers to choose from."""
    answer: int
    """Number of the right one."""


def read_choices(path: Path, n: int) -> list[Choice]:
    """The first `n` questions of a JSON-lines file: question, choices, labels and answer.

    Raises `UserError` where the file is missing or a line is not as it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as questions ({error}).") from error
    found = []
    for number, line in enumerate((line for line in lines if line.strip()), start=1):
        try:
            row = json.loads(line)
            labels = list(map(str, row["labels"]))
            found.append(
                Choice(
                    question=str(row["question"]), choices=tuple(map(str, row["choices"])),
                    answer=labels.index(str(row["answer"])),
                )
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number} is no question: wanted an object with question, choices, "
                f"labels and the right one's label as answer ({type(error).__name__}: {error})."
            ) from error
        if len(found) == n:
            break
    if not found:
        raise UserError(f"{path} holds no question; wanted one a line.")
    return found


def text_nll(model: LanguageModel, texts: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Mean negative log-likelihood a token of texts, cut to `CONTEXT` tokens, nats."""
    found = []
    for start in range(0, len(texts), 4):
        rows = [_text_ids(model, text)[: CONTEXT - 1] for text in texts[start : start + 4]]
        found += Ask(model=model).nll([(model.separator_id,)] * len(rows), rows)
    return np.array(found)


def response_pairs(rows: Sequence[TokenRow]) -> tuple[list[Row], list[Row]]:
    """Prompts and responses of the rows that have one."""
    chosen = [row for row in rows if row.answer < len(row.ids)]
    return [row.ids[: row.answer] for row in chosen], [row.ids[row.answer :] for row in chosen]


def response_change(
    before: Sequence[Float[Tensor, "_ v"]],
    after: Sequence[Float[Tensor, "_ v"]],
    responses: Sequence[Row],
) -> pd.DataFrame:
    """Of each response: `nll_original`, `nll_broken` and `kl`, nats a token.

    Args:
        before: the original model's log-probabilities at each of its tokens.
        after: the broken model's.
        responses: their tokens.
    """
    return pd.DataFrame(
        [
            {
                "kl": kl(old, new),
                "nll_original": mean_nll(old, tokens),
                "nll_broken": mean_nll(new, tokens),
            }
            for old, new, tokens in zip(before, after, responses, strict=True)
        ]
    )


def kl(old: Float[Tensor, "n v"], new: Float[Tensor, "n v"]) -> float:
    """Mean KL(old || new) of rows of log-probabilities, nats."""
    return float((old.exp() * (old - new)).sum(-1).mean())


def multiple_choice(
    model: LanguageModel, choices: Sequence[Choice], say: Callable[[int], None] = lambda _: None
) -> Float[np.ndarray, " n"]:
    """1 where the model's likeliest choice a token is the right one, else 0."""
    found: list[float] = []
    for start in range(0, len(choices), QUESTIONS_AT_ONCE):
        some = choices[start : start + QUESTIONS_AT_ONCE]
        prompts, answers = [], []
        for one in some:
            prompt = _text_ids(model, f"Question: {one.question}\nAnswer:")
            prompts += [(model.separator_id, *prompt)] * len(one.choices)
            answers += [_text_ids(model, f" {choice}") for choice in one.choices]
        costs = iter(Ask(model=model).nll(prompts, answers))
        for one in some:
            own = list(itertools.islice(costs, len(one.choices)))
            found.append(float(int(np.argmin(own)) == one.answer))
        say(len(some))
    return np.array(found)


def _text_ids(model: LanguageModel, text: str) -> Row:
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])
