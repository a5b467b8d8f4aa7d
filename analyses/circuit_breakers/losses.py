"""What a circuit breaker is trained on (Zou et al. 2024, arXiv 2406.04313, section 3 and C.1).

    L = c_s L_s + c_r L_r        c_s = alpha (1 - t / 2T)      c_r = alpha t / 2T

at step t of T. States are stacks [entries, b, t, d] of a network with adapters (`states`) and
of the same network without them (`reference`). `mask` [b, t] says which tokens count.

Rerouting losses L_s, over the target layers:

    rr      ReLU(cos(states, reference))                                   (equation 1)
    rmu     |states - a r|_2, r one random unit vector for good
    randc   |states / |states| - r|_2, r a random unit vector, a new one each step
    randp   the same, r with positive entries

Retain loss L_r: |states - reference|_2 a token, over every entry from the embeddings to the last
block that has adapters. `relative` divides by |reference|: the first token's norm is a hundred
times the others' and drowns them otherwise. `padded` is the published mean, in which padding counts
as zeros: the longer the rows are padded, the less the term weighs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

Rerouting = Literal["rr", "rmu", "randc", "randp"]
States = Float[Tensor, "e b t d"]
Mask = Bool[Tensor, "b t"]
TINY = 1e-8


def schedule(t: int, steps: int, alpha: float | int) -> tuple[float, float]:
    """The weights `c_s` and `c_r` of step t, from 1 to `steps` (algorithm 1)."""
    done = t / (2 * steps)
    return alpha * (1 - done), alpha * done


def masked_mean(values: Float[Tensor, "e b t"], mask: Mask) -> Float[Tensor, ""]:
    """Mean over all entries and the tokens that count; 0 where none does."""
    return (values * mask).sum() / (mask.sum() * len(values)).clamp(min=1)


def cosines(states: States, reference: States) -> Float[Tensor, "e b t"]:
    """Cosine of each state with what it was, in float32."""
    return cosine_similarity(states.float(), reference.float(), dim=-1, eps=TINY)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomTarget:
    """Where the alternatives to orthogonality send states."""

    direction: Float[Tensor, " d"]
    """A unit vector."""
    size: float = 1.0
    """How far along it `rmu` sends them."""


def random_target(
    loss: Rerouting, width: int, *, seed: int, step: int, size: float | int = 1.0
) -> RandomTarget:
    """The random target of a step: for `rmu` the same in every step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + (0 if loss == "rmu" else step))
    if loss == "randc":
        drawn = torch.randn(width, generator=generator)
    else:
        drawn = torch.rand(width, generator=generator)
    return RandomTarget(direction=drawn / drawn.norm(), size=float(size))


def rerouting_loss(
    loss: Rerouting, states: States, reference: States, mask: Mask, target: RandomTarget | None
) -> Float[Tensor, ""]:
    """L_s over the target layers; see above.

    Args:
        loss: which.
        states: of the network with adapters.
        reference: of the network without.
        mask: which tokens count.
        target: the random vector, for all but `rr`.
    """
    if loss == "rr":
        return masked_mean(cosines(states, reference).relu(), mask)
    assert target is not None, "the alternatives need a target"
    direction = target.direction.to(states.device)
    if loss == "rmu":
        away = states.float() - target.size * direction
    else:
        away = states.float() / states.float().norm(dim=-1, keepdim=True).clamp(min=TINY)
        away = away - direction
    return masked_mean(lengths(away), mask)


def retain_loss(
    states: States, reference: States, mask: Mask, *, relative: bool, padded: int | None = None
) -> Float[Tensor, ""]:
    """L_r over all entries.

    Args:
        states: of the network with adapters.
        reference: of the network without.
        mask: which tokens count.
        relative: divide each token's distance by its reference's norm.
        padded: tokens of a row, padding included, over which the mean is taken; None: over those
            that count.
    """
    distances = lengths(states.float() - reference.float())
    if relative:
        distances = distances / reference.float().norm(dim=-1).clamp(min=TINY)
    if padded is None:
        return masked_mean(distances, mask)
    return (distances * mask).sum() / (len(states) * len(mask) * padded)


def lengths(vectors: States) -> Float[Tensor, "e b t"]:
    """Euclidean norms, with a gradient of 0 at 0."""
    squares = vectors.square().sum(-1)
    zero = squares == 0
    return torch.where(zero, 0.0, squares.where(~zero, 1.0).sqrt())
