"""The texts of a concept: responses written by the model itself, and ordinary passages.

Ordinary passages are the built-in corpus, whose documents know what was asked for; those about a
concept's kindred topics are left out, and topics are divided between training and judging.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from analyses.circuit_breakers.concepts import Concept
from analyses.circuit_breakers.rows import Passage
from probe.corpora import read_documents
from probe.errors import UserError
from probe.language import LanguageModel
from probe.writing import FORMS, WritingConfig, answer

ROWS_AT_ONCE = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Passages of one use: training or judging."""

    concept: tuple[Passage, ...]
    """On the concept."""
    near: tuple[Passage, ...]
    """Near misses."""
    ordinary: tuple[Passage, ...]
    """Anything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passages:
    """A concept's passages, those for training and those for judging."""

    train: Part
    """What adapters, probes and judges are trained on."""
    test: Part
    """Unseen topics."""


@torch.inference_mode()
def respond(
    model: LanguageModel,
    requests: Sequence[Passage],
    *,
    tokens: int,
    seed: int,
    say: Callable[[int], None] = lambda _: None,
) -> tuple[Passage, ...]:
    """Requests with responses that the model writes (temperature 0.7), empty ones left out.

    Args:
        model: who writes.
        requests: passages whose response is to be written.
        tokens: the longest response.
        seed: decides what is written.
        say: called with the number of requests answered.
    """
    config = WritingConfig(max_new_tokens=tokens, temperature=0.7)
    found = []
    for start in range(0, len(requests), ROWS_AT_ONCE):
        some = requests[start : start + ROWS_AT_ONCE]
        generator = torch.Generator(device=model.device).manual_seed(seed * 100_003 + start)
        texts = answer(model, [passage.request for passage in some], config, generator)
        found += [
            replace(passage, response=text.strip())
            for passage, text in zip(some, texts, strict=True)
            if text.strip()
        ]
        say(len(some))
    return tuple(found)


def ordinary_passages(
    n: int, *, trained: bool, without: Sequence[str] = (), seed: int = 0
) -> tuple[Passage, ...]:
    """Passages of the built-in corpus with what was asked for, whole documents, shuffled.

    Args:
        n: how many.
        trained: of the topics that training sees (two thirds), or of the others.
        without: topics left out.
        seed: decides which.

    Raises `UserError` where there are not so many.
    """
    found = []
    for document in read_documents("builtin"):
        form, topic, _ = document.id.split("/")
        for_training = zlib.crc32(topic.encode()) % 3 != 0
        if for_training == trained and topic not in without:
            asked = FORMS[form].format(topic)
            found.append(Passage(request=asked, response=document.text, topic=topic))
    if len(found) < n:
        raise UserError(
            f"{n} ordinary passages were wanted and the built-in corpus has {len(found)}; ask for "
            "fewer."
        )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return tuple(found[place] for place in order[:n].tolist())


def some(passages: Sequence[Passage], n: int, seed: int) -> list[Passage]:
    """At most `n` of the passages, spread over their topics by the seed."""
    order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(seed))
    return [passages[place] for place in sorted(order[:n].tolist())]


def concept_passages(
    model: LanguageModel,
    concept: Concept,
    *,
    sizes: tuple[int, int],
    tokens: int,
    seed: int,
    say: Callable[[int], None] = lambda _: None,
) -> Passages:
    """A concept's passages, written by the model.

    Args:
        model: who writes.
        concept: about what.
        sizes: passages on the concept for training and for judging, at most; as many near misses
            and ordinary ones.
        tokens: the longest response.
        seed: decides what is asked and written.
        say: called with the number of requests answered.
    """

    def part(n: int, *, trained: bool) -> Part:
        asked = [concept.requests(trained=trained), concept.near_misses(trained=trained)]
        written = [
            respond(model, some(requests, n, seed), tokens=tokens, seed=2 * seed + trained, say=say)
            for requests in asked
        ]
        return Part(
            concept=written[0], near=written[1],
            ordinary=ordinary_passages(n, trained=trained, without=concept.kindred, seed=seed),
        )  # fmt: skip

    return Passages(train=part(sizes[0], trained=True), test=part(sizes[1], trained=False))
