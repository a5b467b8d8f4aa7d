"""What an SAE says about a text: codes of every token, and the features ranked over them.

The text is tokenised, preceded by the end-of-text token (as every document is in an activation
store), run through the model up to the SAE's site, and encoded. Rankings over the tokens `t` of a
choice of tokens `T`, with `a(t, f)` the code of feature `f`:

    max        max over T of a(t, f)
    mean       sum over T of a(t, f) / |T|
    frequency  share of T on which a(t, f) > 0; equal ones by their maximum
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probe.capture import capturing
from probe.language import LanguageModel
from probe.sites import parse_site
from probe.tokens import Prompt, read_text
from saes.models import SparseAutoencoder

Ranking = Literal["max", "mean", "frequency"]
MAX_TOKENS = 512
"""Tokens of a text that are encoded at most; fewer by a model of fewer positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCodes:
    """A text's tokens and the codes of each."""

    texts: tuple[str, ...]
    """Each token as it would be printed; before a plain text stands the end-of-text token."""
    keep: Bool[Tensor, " t"]
    """False at position 0 and at special tokens, whose activations have outlier norms."""
    values: Float[Tensor, "t k"]
    """Codes; 0 where fewer than k features fire."""
    indices: Int[Tensor, "t k"]
    """Features that the codes belong to."""
    n_cut: int
    """Tokens at the end of the text that were left out because it is too long."""

    def feature(self, feature: int) -> Float[Tensor, " t"]:
        """One feature's code on every token."""
        return (self.values * (self.indices == feature)).sum(dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedFeature:
    """A feature that fires somewhere on the chosen tokens."""

    feature: int
    """Its number."""
    max: float
    """Largest code on the chosen tokens."""
    mean: float
    """Mean code over all chosen tokens, those where it does not fire included."""
    frequency: float
    """Share of the chosen tokens on which it fires."""


def encode_prompt(
    model: LanguageModel, sae: SparseAutoencoder, site: str, text: str | Prompt
) -> PromptCodes:
    """Run a text through the model and encode the site's activations.

    A text (not a prompt) is cut where it is too long. Raises `UserError` where it has no token.
    """
    prompt = text
    if isinstance(prompt, str):
        prompt = read_text(model, prompt, at_most=MAX_TOKENS)
    place = parse_site(site)
    with torch.inference_mode(), capturing(model, [place]) as seen:
        model.run(prompt.tokens)
        codes = sae.encode(seen[place][0].to(sae.W_dec.device, torch.float32))
    return PromptCodes(
        texts=prompt.texts,
        keep=torch.tensor(prompt.keep),
        values=codes.values.float().cpu(),
        indices=codes.indices.long().cpu(),
        n_cut=prompt.n_cut,
    )


def strongest_by_token(codes: PromptCodes, top: int) -> list[list[tuple[int, float]]]:
    """The strongest features of each token with their codes: at most `top`, those that fire."""
    best = codes.values.topk(min(top, codes.values.shape[1]), dim=1)
    features = codes.indices.gather(1, best.indices)
    return [
        [(f, value) for f, value in zip(names, values, strict=True) if value > 0]
        for names, values in zip(features.tolist(), best.values.tolist(), strict=True)
    ]


def rank_features(
    codes: PromptCodes, chosen: Bool[Tensor, " t"], *, by: Ranking, top: int
) -> list[RankedFeature]:
    """The features that fire on the chosen tokens, strongest first; ties by feature number."""
    values, indices = codes.values[chosen], codes.indices[chosen]
    fires = values > 0
    features, place = torch.unique(indices[fires], return_inverse=True)
    active, n_chosen = values[fires], max(int(chosen.sum()), 1)
    zeros = torch.zeros(len(features))
    largest = zeros.scatter_reduce(0, place, active, "amax")
    mean = zeros.scatter_add(0, place, active) / n_chosen
    frequency = torch.bincount(place, minlength=len(features)) / n_chosen
    key = {"max": largest, "mean": mean, "frequency": frequency}[by]
    ranked = sorted(
        range(len(features)), key=lambda i: (-float(key[i]), -float(largest[i]), int(features[i]))
    )
    return [
        RankedFeature(
            feature=int(features[i]),
            max=float(largest[i]),
            mean=float(mean[i]),
            frequency=float(frequency[i]),
        )
        for i in ranked[:top]
    ]
