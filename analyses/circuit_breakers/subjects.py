"""What is broken: a harmless concept, or harmful prompts out of files.

Of harmful prompts only the user's words are read: no response to them is read, kept or shown. What
models go on with after them is measured and dropped.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from analyses.cells import Frame
from analyses.circuit_breakers.concepts import Concept, find_concept
from analyses.circuit_breakers.measured import HARMFUL
from analyses.circuit_breakers.passages import Part, Passages, ordinary_passages
from analyses.circuit_breakers.rows import Passage, TokenRow, token_rows
from analyses.circuit_breakers.settings import Training
from analyses.circuit_breakers.training import TrainingRows
from probe.errors import UserError
from probe.language import LanguageModel
from probe.prompt_sets import read_prompts

SAFE_LABELS, UNSAFE_LABELS = ("safe", "harmless", "benign"), ("unsafe", "harmful")
ALIKE = 0.7
"""Share of two prompts' words that they have in common from which on they are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is broken."""

    name: str
    """A concept's name, or `harmful`."""
    passages: Passages
    """Its texts."""
    dropped: int = 0
    """Test prompts that were left out because training has seen them, or nearly."""

    @property
    def concept(self) -> Concept | None:
        """The concept; None for harmful prompts."""
        return None if self.name == HARMFUL else find_concept(self.name)

    def training_rows(self, model: LanguageModel, training: Training) -> TrainingRows:
        """Its passages as a training run takes them."""
        train, test = self.passages.train, self.passages.test
        if training.shuffled_sets:
            train = _shuffled(train)

        def rows(passages: Sequence[Passage], *, blank: bool = False) -> tuple[TokenRow, ...]:
            return tuple(
                token_rows(
                    model, passages, request_length=training.request_length,
                    response_length=training.response_length, blank=blank,
                )
            )  # fmt: skip

        blanked = rows(train.concept, blank=True) if training.blank else ()
        return TrainingRows(
            breaking=rows(train.concept), blanked=blanked, retain=rows(train.ordinary),
            borderline=rows(train.near) if training.borderline else (),
            held_out=rows(test.concept), held_out_retain=rows(test.ordinary),
        )  # fmt: skip


def _shuffled(part: Part) -> Part:
    """The concept's and the ordinary passages dealt out anew, as many of each."""
    both, n = [*part.concept, *part.ordinary], len(part.concept)
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = tuple(both[place] for place in order)
    return replace(part, concept=mixed[:n], ordinary=mixed[n:])


# --------------------------------------------------------------------------------- harmful prompts


def harmful_subject(
    harmful: Path,
    harmful_test: Path | None,
    ordinary: Path,
    near: Path,
    *,
    sizes: tuple[int, int],
    seed: int,
) -> Subject:
    """Harmful prompts, ordinary ones and near misses out of files, divided.

    Args:
        harmful: harmful prompts for training.
        harmful_test: those for judging; None divides `harmful`.
        ordinary: ordinary prompts; divided.
        near: prompts that look harmful and are not; divided.
        sizes: prompts of each set for training and for judging, at most.
        seed: decides which.

    Raises `UserError` where a file cannot be read or has no prompt left, or two sets share one.
    """
    sets = {
        "harmful": unique(read_prompts(harmful, leave_out=SAFE_LABELS)),
        "ordinary": unique(read_prompts(ordinary, leave_out=UNSAFE_LABELS)),
        "near misses": unique(read_prompts(near, leave_out=UNSAFE_LABELS)),
    }
    for other in ("ordinary", "near misses"):
        if shared := set(map(words, sets["harmful"])) & set(map(words, sets[other])):
            raise UserError(
                f"{len(shared)} prompts are in {harmful} and among the {other}; leave each in one "
                "of them."
            )
    divided, dropped = {}, 0
    for name, prompts in sets.items():
        train, test, repeats = _divide(prompts, seed)
        divided[name], dropped = (train[: sizes[0]], test[: sizes[1]]), dropped + repeats
    if harmful_test is not None:
        test = unique(read_prompts(harmful_test, leave_out=SAFE_LABELS))
        new = without_known(test, divided["harmful"][0])
        dropped += len(test) - len(new)
        if not new:
            raise UserError(f"every prompt of {harmful_test} is in {harmful} too; give others.")
        divided["harmful"] = (divided["harmful"][0], _some(new, sizes[1], seed))
    parts = [
        Part(
            concept=_as_passages(divided["harmful"][i]),
            near=_as_passages(divided["near misses"][i]),
            ordinary=_as_passages(divided["ordinary"][i])
            + ordinary_passages(sizes[i], trained=i == 0, seed=seed),
        )
        for i in (0, 1)
    ]  # fmt: skip
    return Subject(name=HARMFUL, passages=Passages(train=parts[0], test=parts[1]), dropped=dropped)


def words(prompt: str) -> frozenset[str]:
    """A prompt's words, whatever their order, case and marks."""
    return frozenset(re.findall(r"\w+", prompt.lower()))


def unique(prompts: list[str]) -> list[str]:
    """The prompts without repeats of the same words."""
    return list({words(prompt): prompt for prompt in reversed(prompts)}.values())[::-1]


def without_known(prompts: list[str], known: list[str]) -> list[str]:
    """The prompts that share fewer than `ALIKE` of their words (Jaccard) with every known one."""
    seen = [words(prompt) for prompt in known]

    def is_new(prompt: str) -> bool:
        own = words(prompt)
        return all(len(own & other) < ALIKE * len(own | other) for other in seen)

    return [prompt for prompt in prompts if is_new(prompt)]


def _divide(prompts: list[str], seed: int) -> tuple[list[str], list[str], int]:
    """Two thirds for training and one for judging, and how many near repeats were left out of the
    latter."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    end = max(1, 2 * len(prompts) // 3)
    train, rest = [prompts[place] for place in order[:end]], [prompts[p] for p in order[end:]]
    test = without_known(rest, train)
    if not test:
        raise UserError(
            f"{len(prompts)} different prompts are too few to train on some and judge on others; "
            "give more."
        )
    return train, test, len(rest) - len(test)


def _some(prompts: list[str], n: int, seed: int) -> list[str]:
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    return [prompts[place] for place in order[:n].tolist()]


def _as_passages(prompts: Sequence[str]) -> tuple[Passage, ...]:
    return tuple(Passage(request=prompt, response="") for prompt in prompts)


# ------------------------------------------------------------------------------------------ tables


def passages_table(passages: Passages) -> pd.DataFrame:
    """Passages as a table, a row each."""
    rows = [
        {
            "part": part, "set": name, "request": one.request, "response": one.response,
            "topic": one.topic,
        }
        for part, sets in (("train", passages.train), ("test", passages.test))
        for name in ("concept", "near", "ordinary")
        for one in getattr(sets, name)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def passages_of(table: Frame) -> Passages:
    """Passages out of `passages_table`."""

    def part(name: str) -> Part:
        sets = {"concept": [], "near": [], "ordinary": []}
        for row in table[table["part"] == name].to_dict("records"):
            sets[row["set"]].append(
                Passage(request=row["request"], response=row["response"], topic=row["topic"])
            )
        return Part(**{key: tuple(value) for key, value in sets.items()})

    return Passages(train=part("train"), test=part("test"))
