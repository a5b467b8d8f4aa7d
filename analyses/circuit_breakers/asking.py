"""Prompts with ways around a circuit breaker in them, and what a model makes of them.

A prompt is a row of token ids in which `-1 - i` stands for soft token i: an embedding that no word
has. The functions at the end make prompts; `Ask` runs them: continuations, and how unlikely a given
continuation is. Soft tokens and steering vectors are in force inside `Ask.forces()`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from analyses.circuit_breakers.concepts import Concept
from analyses.circuit_breakers.rows import Passage, TokenRow, batch_of, shared_tokens
from probe.generation import GenerateConfig, generate_many
from probe.interventions import editing
from probe.language import LanguageModel
from probe.prompt_sets import Row, has_template, write_rows
from probe.sites import Site
from probe.tokens import Turn, read_chat

TOKENS_AT_ONCE = 4096
"""Tokens in one pass, padding counted; rows of like length go together."""
SHOTS = 2
"""Requests with responses in front of the one that is asked, in a few-shot prompt."""
MAX_CONTEXT = 60
"""Tokens of each response that stands in front of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A model under an attack: what is in force while it reads."""

    model: LanguageModel
    """The model."""
    soft: Float[Tensor, "k d"] | None = None
    """Soft tokens."""
    added: Mapping[Site, Float[Tensor, " d"]] = field(default_factory=dict)
    """What is added to the stream at every token."""

    @contextlib.contextmanager
    def forces(self) -> Iterator[None]:
        """Soft tokens and additions in force."""
        with contextlib.ExitStack() as stack:
            if self.soft is not None:
                stack.enter_context(soft_tokens(self.model, self.soft))
            for site, vector in self.added.items():
                stack.enter_context(editing(self.model, site, lambda x, v=vector: x + v.to(x)))
            yield

    def continuations(self, prompts: Sequence[Row], tokens: int) -> list[Row]:
        """What the model goes on with, greedily, in at most so many tokens."""
        found: dict[int, Row] = {}
        config = GenerateConfig(max_new_tokens=tokens)
        with self.forces():
            for numbers in packed([len(prompt) + tokens for prompt in prompts]):
                done = generate_many(self.model, [prompts[n] for n in numbers], config=config)
                found |= {
                    n: tuple(one.tokens.tolist()) for n, one in zip(numbers, done, strict=True)
                }
        return [found[n] for n in range(len(prompts))]

    def reading(
        self, prompts: Sequence[Row], continuations: Sequence[Row]
    ) -> list[Float[Tensor, "_ v"]]:
        """Log-probabilities over the vocabulary at each token of each continuation, float32 on the
        CPU; rows of no token for an empty continuation."""
        found: dict[int, Tensor] = {}
        pairs = list(zip(prompts, continuations, strict=True))
        with torch.no_grad(), self.forces():
            for numbers in packed([len(prompt) + len(answer) for prompt, answer in pairs]):
                logits = answer_logits(self.model, [pairs[n] for n in numbers])
                found |= {
                    n: rows.float().log_softmax(-1).cpu()
                    for n, rows in zip(numbers, logits, strict=True)
                }
        return [found[n] for n in range(len(pairs))]

    def nll(self, prompts: Sequence[Row], continuations: Sequence[Row]) -> list[float]:
        """Mean negative log-likelihood a token of each continuation, nats."""
        read = self.reading(prompts, continuations)
        return [mean_nll(rows, tokens) for rows, tokens in zip(read, continuations, strict=True)]


def mean_nll(logprobs: Float[Tensor, "n v"], tokens: Row) -> float:
    """Mean negative log-likelihood of tokens, nats; infinite where there is none."""
    if not tokens:
        return math.inf
    return float(-logprobs[range(len(tokens)), list(tokens)].mean())


def packed(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of rows in batches of like length, each of at most `TOKENS_AT_ONCE` tokens."""
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    while order:
        size = max(1, TOKENS_AT_ONCE // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def answer_logits(
    model: LanguageModel, pairs: Sequence[tuple[Row, Row]]
) -> list[Float[Tensor, "_ v"]]:
    """Logits for each token of each continuation given its prompt and what came before it."""
    rows = [TokenRow(ids=p + c, shared=0, answer=len(p)) for p, c in pairs]
    batch = batch_of(rows, "padding")
    base = model.model.base_model(
        input_ids=batch.tokens.to(model.device),
        attention_mask=batch.attended.long().to(model.device),
        use_cache=False,
    ).last_hidden_state
    head = model.model.get_output_embeddings()
    assert head is not None, "a causal language model has an unembedding"
    return [head(base[i, row.answer - 1 : len(row.ids) - 1]) for i, row in enumerate(rows)]


def answer_loss(model: LanguageModel, pairs: Sequence[tuple[Row, Row]]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the continuations' tokens, all prompts' together, with gradients."""
    logits = torch.cat([rows.float() for rows in answer_logits(model, pairs)])
    wanted = torch.tensor([token for _, answer in pairs for token in answer])
    return cross_entropy(logits, wanted.to(logits.device))


@contextlib.contextmanager
def soft_tokens(model: LanguageModel, soft: Float[Tensor, "k d"]) -> Iterator[None]:
    """Let id -1 - i stand for the embedding `soft[i]`."""
    asked: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        asked.append(args[0])
        return (args[0].clamp(min=0), *args[1:])

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids = asked.pop()
        if not (ids < 0).any():
            return output
        chosen = soft.to(output)[(-1 - ids).clamp(min=0)]
        return torch.where((ids < 0)[..., None], chosen, output)

    embedding = model.model.get_input_embeddings()
    handles = [
        embedding.register_forward_pre_hook(before), embedding.register_forward_hook(after)
    ]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------- kinds of prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A prompt and what it is about."""

    ids: Row
    """Its tokens."""
    topic: str
    """Its topic."""
    request: str
    """The last request in it."""


def prompt_ids(model: LanguageModel, turns: Sequence[Turn]) -> Row:
    """A chat as tokens; without a chat template the turns one after another."""
    if has_template(model):
        return read_chat(model, turns).ids
    return write_rows(model, ["\n".join(turn.content for turn in turns)])[0]


def plain(model: LanguageModel, passages: Sequence[Passage]) -> list[Asked]:
    """Just the requests."""
    return [_asked(model, passage, [Turn(role="user", content=passage.request)])
            for passage in passages]  # fmt: skip


def prefilled(
    model: LanguageModel, passages: Sequence[Passage], opening: Callable[[str], str]
) -> list[Asked]:
    """Requests whose answer is begun: `opening` of the topic."""
    return [
        _asked(
            model, passage,
            [Turn(role="user", content=passage.request),
             Turn(role="assistant", content=opening(passage.topic))],
        )
        for passage in passages
    ]  # fmt: skip


def after_turns(
    model: LanguageModel,
    passages: Sequence[Passage],
    before: Sequence[Passage],
    n: int,
) -> list[Asked]:
    """Requests after `n` other requests with their responses, a different choice for each."""
    found = []
    for number, passage in enumerate(passages):
        earlier = [before[(number * n + i) % len(before)] for i in range(n)]
        turns = [
            turn
            for other in earlier
            for turn in (
                Turn(role="user", content=other.request),
                Turn(role="assistant", content=_cut(model, other.response)),
            )
        ]
        found.append(_asked(model, passage, [*turns, Turn(role="user", content=passage.request)]))
    return found


def with_soft_tokens(model: LanguageModel, asked: Sequence[Asked], n: int) -> list[Asked]:
    """Prompts with `n` soft tokens where the user begins to speak."""
    start = shared_tokens(model)
    soft = tuple(-1 - i for i in range(n))
    return [
        Asked(ids=one.ids[:start] + soft + one.ids[start:], topic=one.topic, request=one.request)
        for one in asked
    ]


def concept_attacks(
    model: LanguageModel,
    concept: Concept,
    test: Sequence[Passage],
    train: Sequence[Passage],
    n: int,
) -> dict[str, list[Asked]]:
    """The prompts of every attack that is made of words, at most `n` of each, on unseen topics."""
    others = concept.requests(trained=False, frames=concept.paraphrases)
    step = max(1, len(others) // n)
    test = test[:n]
    return {
        "none": plain(model, test),
        "paraphrase": plain(model, others[::step][:n]),
        "prefill": prefilled(model, test, concept.opening),
        "few-shot": after_turns(model, test, train, SHOTS),
    }


def _asked(model: LanguageModel, passage: Passage, turns: Sequence[Turn]) -> Asked:
    return Asked(ids=prompt_ids(model, turns), topic=passage.topic, request=passage.request)


def _cut(model: LanguageModel, text: str) -> str:
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_CONTEXT]
    return str(model.tokenizer.decode(ids))
