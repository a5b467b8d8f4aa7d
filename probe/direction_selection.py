"""Choosing one direction among candidates by what the model does with it.

Arditi et al. 2024 (arXiv 2406.11717, section 2.3 and appendix C), for any behaviour that shows in
which token comes next instead of refusal alone. `T` is the set of target tokens and `p(T)` their
probability at the last position:

    score      log(p(T) + eps) - log(1 - p(T) + eps)

A candidate is a direction at a site and position. It is measured on validation prompts by

    ablated    mean score of positive prompts with the direction ablated: chosen is the lowest
    added      mean score of negative prompts with it added once at its site, at least `added`
    kl         mean KL(plain || ablated) of negative prompts at the last position, at most `kl`
    layer      below `depth` times the number of layers

and one that misses any of the last three is out. Where all are, the one that misses fewest, and of
those the lowest, is named, with what it misses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Float64
from torch import Tensor

from probe.ablation import ablating, adding
from probe.errors import UserError
from probe.language import LanguageModel
from probe.prompt_sets import Row, last_logits
from probe.sites import Site

EPSILON = 1e-8
"""Keeps the logarithms finite, as in the authors' code."""
KL, ADDED, LAYER, NOT_FINITE = "kl", "added", "layer", "not finite"


@dataclass(frozen=True, slots=True, kw_only=True)
class Criteria:
    """What a candidate has to meet."""

    kl: float | int = 0.1
    """KL of negative prompts under ablation, at most, in nats; as published."""
    added: float | int = 0.0
    """Mean score of negative prompts under addition, at least; 0 as published."""
    depth: float | int = 0.8
    """Share of the layers, from the first, that candidates come from; as published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A direction among which to choose, and what it does."""

    site: Site
    """Where it is from."""
    position: int
    """Position it is from, counted from the end."""
    norm: float
    """Its length."""
    ablated: float
    """Mean score of the positive prompts with it ablated."""
    added: float
    """Mean score of the negative prompts with it added."""
    kl: float
    """Mean KL of the negative prompts under ablation, nats."""

    def misses(self, criteria: Criteria, n_layers: int) -> tuple[str, ...]:
        """The criteria that it does not meet, by name."""
        if not all(math.isfinite(x) for x in (self.ablated, self.added, self.kl)):
            return (NOT_FINITE,)
        layer = -1 if self.site.layer is None else self.site.layer
        met = {
            KL: self.kl <= criteria.kl,
            ADDED: self.added >= criteria.added,
            LAYER: layer < criteria.depth * n_layers,
        }
        return tuple(name for name, holds in met.items() if not holds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The choice."""

    chosen: int
    """Number of the chosen candidate."""
    misses: tuple[tuple[str, ...], ...]
    """What each candidate misses."""

    @property
    def passed(self) -> bool:
        """Whether the chosen candidate meets every criterion."""
        return not self.misses[self.chosen]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What candidates are measured on."""

    positive: Sequence[Row]
    """Prompts that show the behaviour."""
    negative: Sequence[Row]
    """Prompts that do not."""
    targets: Sequence[int]
    """Ids of the target tokens."""
    plain: Float[Tensor, "n v"]
    """Logits of the untouched model at the last token of the negative prompts."""


def make_validation(
    model: LanguageModel,
    positive: Sequence[Row],
    negative: Sequence[Row],
    targets: Sequence[int],
) -> Validation:
    """What candidates are measured on, the untouched model's answers included.

    Raises `UserError` where a set is empty.
    """
    if not positive or not negative:
        raise UserError("selection takes at least one positive and one negative prompt; give more.")
    return Validation(
        positive=positive, negative=negative, targets=targets, plain=last_logits(model, negative)
    )


def target_ids(model: LanguageModel, tokens: Sequence[str]) -> tuple[int, ...]:
    """Ids of target tokens, each given as its text, leading space included.

    Raises `UserError` where none is given or a text is not one token.
    """
    if not tokens:
        raise UserError("no target token was given; name at least one.")
    return tuple(dict.fromkeys(_target_id(model, token) for token in tokens))


def _target_id(model: LanguageModel, token: str) -> int:
    ids: list[int] = model.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) == 1:
        return ids[0]
    pieces = ", ".join(repr(model.tokenizer.decode([i])) for i in ids) or "none"
    raise UserError(
        f"target token {token!r} is not one token of {model.spec} but {len(ids)} ({pieces}); "
        "give one of its own tokens."
    )


def target_scores(logits: Float[Tensor, "n v"], targets: Sequence[int]) -> Float64[Tensor, " n"]:
    """`log(p(T) + eps) - log(1 - p(T) + eps)` of each row of logits."""
    p = logits.double().softmax(dim=-1)[:, list(targets)].sum(dim=-1).clamp(max=1.0)
    return (p + EPSILON).log() - (1 - p + EPSILON).log()


def divergence(plain: Float[Tensor, "n v"], other: Float[Tensor, "n v"]) -> Float64[Tensor, " n"]:
    """KL(plain || other) of each row's distribution, nats."""
    p, q = (logits.double().log_softmax(dim=-1) for logits in (plain, other))
    return (p.exp() * (p - q)).sum(dim=-1)


def measure_candidate(
    model: LanguageModel,
    vector: Float[Tensor, " d"],
    site: Site,
    position: int,
    validation: Validation,
) -> Candidate:
    """Ablate and add a direction, and say what that does. Raises `UserError` as `ablating` does."""
    with ablating(model, vector):
        ablated = last_logits(model, validation.positive)
        quiet = last_logits(model, validation.negative)
    with adding(model, vector, site):
        added = last_logits(model, validation.negative)
    return Candidate(
        site=site,
        position=position,
        norm=float(vector.double().norm()),
        ablated=float(target_scores(ablated, validation.targets).mean()),
        added=float(target_scores(added, validation.targets).mean()),
        kl=float(divergence(validation.plain, quiet).mean()),
    )


def select(candidates: Sequence[Candidate], criteria: Criteria, n_layers: int) -> Selection:
    """The candidate of the lowest score under ablation among those that miss the fewest criteria.

    Raises `UserError` where there is no candidate whose numbers are finite.
    """
    misses = tuple(candidate.misses(criteria, n_layers) for candidate in candidates)
    known = [n for n, missed in enumerate(misses) if missed != (NOT_FINITE,)]
    if not known:
        raise UserError(
            "there is no candidate whose numbers are finite; ask for other sites or positions."
        )
    chosen = min(known, key=lambda n: (len(misses[n]), candidates[n].ablated, n))
    return Selection(chosen=chosen, misses=misses)
