"""Logit lens: what the model would predict if it stopped after each layer.

The residual stream after every layer goes through the model's own final norm and unembedding
(nostalgebraist 2020). At the last layer that is the model's prediction itself, and `logit_lens`
checks that it is. Early layers need not speak the last one's language: a token that shows up late
may have been there before in directions that this lens does not read (Belrose et al. 2023,
2303.08112).

Axes: `l` layers, `t` positions, `k` the most likely tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probe.capture import capturing
from probe.errors import Failure, UserError
from probe.language import LanguageModel
from probe.sites import Site
from probe.tokens import Prompt, as_prompt, token_texts

TOLERANCE = 0.02
"""How far the last layer's logits may be from the model's, over the model's largest one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lens:
    """Predictions after each layer and each token."""

    prompt: Prompt
    """The tokens."""
    target: Int[Tensor, " t"]
    """The token that is followed at each position: what the model itself predicts there, or the
    one that was asked for."""
    probability: Float[Tensor, "l t"]
    """Its probability after each layer."""
    rank: Int[Tensor, "l t"]
    """Its rank; 1 is the most likely token."""
    top: Int[Tensor, "l t k"]
    """The most likely tokens, the first one first."""
    top_probability: Float[Tensor, "l t k"]
    """Their probabilities."""
    texts: dict[int, str]
    """Texts of all tokens named here."""

    @property
    def n_layers(self) -> int:
        """Number of layers; the last one's row is the model's own prediction."""
        return len(self.probability)

    def top_texts(self, layer: int, position: int) -> tuple[str, ...]:
        """Texts of the most likely tokens at one place."""
        return tuple(self.texts[token] for token in self.top[layer, position].tolist())

    def table(self) -> pd.DataFrame:
        """A row for each layer and position.

        Columns: layer, position, token (read there), top (the most likely one), top_probability,
        target, probability, rank (of the target).
        """
        layer, position = torch.meshgrid(
            torch.arange(self.n_layers), torch.arange(len(self.prompt)), indexing="ij"
        )
        layers, positions = layer.flatten().tolist(), position.flatten().tolist()
        return pd.DataFrame(
            {
                "layer": layers,
                "position": positions,
                "token": [self.prompt.texts[i] for i in positions],
                "top": [self.texts[token] for token in self.top[:, :, 0].flatten().tolist()],
                "top_probability": self.top_probability[:, :, 0].flatten().numpy(),
                "target": [self.texts[int(self.target[i])] for i in positions],
                "probability": self.probability.flatten().numpy(),
                "rank": self.rank.flatten().numpy(),
            }
        )


@torch.no_grad()
def logit_lens(
    model: LanguageModel, text: str | Prompt, *, target: int | None = None, top: int = 5
) -> Lens:
    """Read the residual stream after every layer as the model reads it after the last.

    One pass for the activations; then norm and unembedding layer by layer, in the model's dtype,
    the softmax in float32.

    Args:
        model: the model.
        text: what it reads.
        target: the token to follow; None follows at each position what the model predicts there.
        top: most likely tokens kept.

    Raises:
        UserError: an empty or too long text, a model whose layers are not known by name.
        Failure: norm and unembedding do not give the model's own logits.
    """
    prompt = as_prompt(model, text)
    layers, final = _streams(model, prompt)
    own = final.argmax(-1) if target is None else torch.full_like(final[:, 0], target).long()
    if target is not None and not 0 <= target < final.shape[-1]:
        raise UserError(f"there is no token {target}: wanted 0 to {final.shape[-1] - 1}.")
    probability, rank, tops, top_probability = [], [], [], []
    for logits in layers_read(model, layers):
        shares = logits.softmax(-1)
        followed = logits.gather(-1, own[:, None])
        probability.append(shares.gather(-1, own[:, None])[:, 0])
        rank.append((logits > followed).sum(-1) + 1)
        best = shares.topk(min(top, shares.shape[-1]), dim=-1)
        tops.append(best.indices)
        top_probability.append(best.values)
    _check(model, logits, final)
    named = torch.cat([torch.stack(tops).flatten(), own]).unique().tolist()
    return Lens(
        prompt=prompt,
        target=own.cpu(),
        probability=torch.stack(probability).cpu(),
        rank=torch.stack(rank).cpu(),
        top=torch.stack(tops).cpu(),
        top_probability=torch.stack(top_probability).cpu(),
        texts=dict(zip(named, token_texts(model, named), strict=True)),
    )


def layers_read(
    model: LanguageModel, streams: list[Float[Tensor, "t d"]]
) -> Iterator[Float[Tensor, "t v"]]:
    """The logits that the model's final norm and unembedding make of each tensor, in float32.

    Raises `UserError` where the model's parts are not known by name.
    """
    head = model.model.get_output_embeddings()
    if model.names is None or head is None:
        raise UserError(
            f"{model.spec} is a {type(model.model).__name__}, whose final norm or unembedding is "
            "not known by name, so it cannot be read layer by layer."
        )
    norm = model.model.get_submodule(model.names.final_norm)
    cap = getattr(model.model.config.get_text_config(), "final_logit_softcapping", None)
    for stream in streams:
        logits: Any = head(norm(stream[None]))[0].float()
        yield logits if cap is None else cap * torch.tanh(logits / cap)


def _streams(model: LanguageModel, prompt: Prompt) -> tuple[list[Tensor], Tensor]:
    """The residual stream after each layer, and the model's own logits."""
    sites = [Site(kind="resid_post", layer=layer) for layer in range(model.n_layers)]
    if not sites:
        raise UserError(
            f"{model.spec} is a {type(model.model).__name__}, whose layers are not known by name, "
            "so it cannot be read layer by layer."
        )
    with capturing(model, sites, early_exit=False) as seen:
        logits = model.run(prompt.tokens)
    assert logits is not None, "without early exit the pass runs to its end"
    return [seen[site][0] for site in sites], logits[0].float()


def _check(model: LanguageModel, read: Tensor, final: Tensor) -> None:
    """Raise `Failure` where the last layer's reading is not the model's prediction."""
    if not (read - final).abs().max() <= TOLERANCE * final.abs().max():
        raise Failure(
            f"the final norm and unembedding of {model.spec} do not give its own logits from the "
            "last layer: it does something else in between, and the logit lens would mislead."
        )
