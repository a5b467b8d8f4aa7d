"""Attacks that are made for the model under attack: soft tokens and steering vectors.

- Soft tokens (Schwinn et al. 2024, arXiv 2402.09063; the paper's Input Embedding attack): `k`
  embeddings in front of the request, begun at the embedding of "x", moved by AdamW so that the
  training passages' responses become likelier. Kept at several budgets: a curve.
- Steering (the paper's RepE attack): the difference of mean states at the last token of requests on
  the concept and of ordinary ones, added to the stream in the upper half of the blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.circuit_breakers.asking import (
    Ask,
    Asked,
    answer_loss,
    soft_tokens,
    with_soft_tokens,
)
from probe.directions import mean_differences
from probe.language import LanguageModel
from probe.prompt_sets import Row
from probe.sites import Site, parse_site

SOFT_TOKENS, SOFT_LR, SOFT_BATCH = 20, 3e-3, 4
COEFFICIENTS = (0.65, 1.0)
"""Of the published steering attack (Mistral, Llama-3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftPrompts:
    """Soft tokens at growing budgets."""

    by_budget: dict[int, Float[Tensor, "k d"]] = field(default_factory=dict)
    """Soft tokens after so many steps."""
    losses: tuple[float, ...] = ()
    """Mean loss a token at each step."""


def optimise_soft_prompt(
    model: LanguageModel,
    asked: Sequence[Asked],
    answers: Sequence[Row],
    budgets: Sequence[int],
    *,
    seed: int,
    say: Callable[[int], None] = lambda _: None,
) -> SoftPrompts:
    """Move soft tokens until answers are likely, on prompts that are not judged on.

    Args:
        model: the model under attack; its weights do not move.
        asked: prompts.
        answers: what is to be made likely, one for each.
        budgets: steps after which the soft tokens are kept, ascending; 0 keeps where they began.
        seed: decides the draws.
        say: called with 1 after each step.
    """
    prompts = with_soft_tokens(model, asked, SOFT_TOKENS)
    embedding = model.model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding), "a word has a vector"
    start = model.tokenizer("x", add_special_tokens=False)["input_ids"][0]
    soft = embedding.weight.detach()[start].float().repeat(SOFT_TOKENS, 1).requires_grad_()
    optimiser = torch.optim.AdamW([soft], lr=SOFT_LR, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    kept, losses = {0: soft.detach().clone()} if 0 in budgets else {}, []
    trainable = [w for w in model.model.parameters() if w.requires_grad]
    model.model.requires_grad_(False)
    try:
        with soft_tokens(model, soft):
            for step in range(1, max(budgets, default=0) + 1):
                chosen = torch.randint(len(prompts), (SOFT_BATCH,), generator=generator).tolist()
                pairs = [(prompts[n].ids, answers[n]) for n in chosen]
                loss = answer_loss(model, pairs)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
                if step in budgets:
                    kept[step] = soft.detach().clone()
                say(1)
    finally:
        for weight in trainable:
            weight.requires_grad_(True)
    return SoftPrompts(by_budget=kept, losses=tuple(losses))


def steering_vectors(
    model: LanguageModel, concept: Sequence[Row], ordinary: Sequence[Row]
) -> dict[Site, Float[Tensor, " d"]]:
    """What is added where: the published blocks, -11 to -20 of 32, as a share of the depth."""
    n = model.n_layers
    first, last = round(n * 12 / 32), max(round(n * 21 / 32), round(n * 12 / 32) + 1)
    sites = [parse_site(f"resid_post.{layer}") for layer in range(first, min(last, n - 1) + 1)]
    found = mean_differences(model, concept, ordinary, sites, [-1])[:, 0].float()
    return dict(zip(sites, found, strict=True))


def steered(
    model: LanguageModel, vectors: dict[Site, Float[Tensor, " d"]], coefficient: float
) -> Ask:
    """A model with the vectors added, each layer's share of the whole step.

    What one block's output gets, every later one has too: each adds the part that its predecessor
    has not added yet, so that every layer's state is moved by its own difference of means.
    """
    added, before = {}, None
    for site, vector in vectors.items():
        added[site] = coefficient * (vector if before is None else vector - before)
        before = vector
    return Ask(model=model, added=added)
