"""Patching single features between two prompts of as many tokens.

At the SAE's site, `base` runs with one feature's code taken from `source` at every token that
counts, all else (the SAE's error included) as it is:

    x_base(t) + (a_source(t, f) - a_base(t, f)) W_dec[f]

Features are chosen by the linear estimate of what that does (attribution patching, Syed et al.
2023, 2310.10348), `sum over t of (a_source - a_base) W_dec[f] . dm/dx_base(t)`, and then measured.
Effects are shares of the way from one prompt's metric to the other's:

    effect = (m(patched) - m(base)) / (m(source) - m(base))     0 = base, 1 = source
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from probe.capture import capturing
from probe.errors import UserError
from probe.language import LanguageModel
from probe.patching import Into, Pair
from probe.readout import SiteGradient, site_gradient
from probe.sites import Site, parse_site
from probe.tokens import Prompt
from saes.attribution import (
    Agreement,
    compare,
    decoder_scale,
    effects_of_removing,
    random_direction,
)
from saes.models import SparseAutoencoder


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturePatching:
    """Features that were taken from the other prompt, one at a time."""

    pair: Pair
    """The prompts."""
    into: Into
    """The run that was patched: `base`."""
    table: pd.DataFrame
    """Columns: feature, n_tokens (at which its codes differ), difference (of the codes, where it is
    largest in size), position, token (there, in the base), estimate, effect, control (a random
    direction of the same length in its place). The last three are shares of the way from base to
    source, or logits where `pair.gap` is None."""

    def agreement(self) -> Agreement:
        """How well the estimates in the table predict its effects."""
        return compare(self.table["estimate"].to_numpy(), self.table["effect"].to_numpy())


def patch_features(
    model: LanguageModel,
    sae: SparseAutoencoder,
    site: str,
    pair: Pair,
    *,
    features: Sequence[int] | None = None,
    top: int = 20,
    into: Into = "corrupted",
    seed: int = 0,
) -> FeaturePatching:
    """Take features' codes from one prompt into the other, one feature at a time.

    Args:
        model: the model.
        sae: the SAE.
        site: where it reads.
        pair: the prompts (`probe.patching.make_pair`).
        features: which ones; None: those of the largest estimates whose codes differ.
        top: how many, where `features` is None.
        into: the run that is changed.
        seed: of the random directions.

    Raises:
        UserError: a feature that the SAE does not have.
    """
    d_sae, where = sae.config.d_sae, parse_site(site)
    if features is not None and not all(0 <= feature < d_sae for feature in features):
        raise UserError(
            f"features {list(features)} were asked for and this SAE has the features 0 to "
            f"{d_sae - 1}."
        )
    prompts = (pair.corrupted, pair.clean) if into == "corrupted" else (pair.clean, pair.corrupted)
    base = site_gradient(model, where, prompts[0], pair.metric)
    amounts = _amounts(model, sae, where, prompts, base)
    estimates = (amounts * (base.gradient.to(amounts) @ sae.W_dec.detach().T)).sum(0)
    numbers = _strongest(amounts, estimates, top) if features is None else list(features)
    parts = [(-amounts[:, f].cpu(), sae.W_dec[f].detach().cpu()) for f in numbers]
    generator = torch.Generator().manual_seed(seed)
    others = [random_direction(part, generator) for part in parts]
    removed = effects_of_removing(model, where, prompts[0], pair.metric, [*parts, *others])
    way = 1.0 if pair.gap is None else (pair.gap if into == "corrupted" else -pair.gap)
    measured, control = (-removed / way).split(len(numbers)) if numbers else (removed, removed)
    table = _table(prompts[0], amounts.cpu(), numbers).assign(
        estimate=(estimates[numbers].cpu() / way).numpy(),
        effect=measured.numpy(),
        control=control.numpy(),
    )
    return FeaturePatching(pair=pair, into=into, table=table)


def _amounts(
    model: LanguageModel,
    sae: SparseAutoencoder,
    site: Site,
    prompts: tuple[Prompt, Prompt],
    base: SiteGradient,
) -> Float[Tensor, "t s"]:
    """How much of each decoder row is added to the base at each token: nothing where a token does
    not count in one of the prompts."""
    with torch.no_grad(), capturing(model, [site]) as seen:
        model.run(prompts[1].tokens)
        rows = [x.to(sae.W_dec.device, torch.float32) for x in (base.x, seen[site][0])]
        ours, theirs = (sae.encode(x).dense(sae.config.d_sae) for x in rows)
        scale = decoder_scale(sae, rows[0])
    keep = torch.tensor(prompts[0].keep) & torch.tensor(prompts[1].keep)
    return (theirs - ours) * (scale * keep.to(scale))[:, None]


def _strongest(
    amounts: Float[Tensor, "t s"], estimates: Float[Tensor, " s"], top: int
) -> list[int]:
    order = estimates.abs().argsort(descending=True, stable=True)
    return order[amounts.any(0)[order]][:top].tolist()


def _table(prompt: Prompt, amounts: Float[Tensor, "t s"], numbers: list[int]) -> pd.DataFrame:
    chosen = amounts[:, numbers]
    position = chosen.abs().argmax(0)
    return pd.DataFrame(
        {
            "feature": numbers,
            "n_tokens": (chosen != 0).sum(0).numpy(),
            "difference": chosen.gather(0, position[None])[0].numpy(),
            "position": position.numpy(),
            "token": [prompt.texts[i] for i in position.tolist()],
        }
    )
