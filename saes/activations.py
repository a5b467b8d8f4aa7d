"""Activation functions: from dense pre-activations `[b, s]` to sparse `Codes`.

A variant of the SAE is one frozen config and one function here; the model, the kernels and the
training loop stay as they are.

TopK (Gao et al. 2024, arXiv 2406.04093, section 2.3; Makhzani and Frey 2013, arXiv 1312.5663): keep
the `k` largest pre-activations of a row, then ReLU. A row with fewer than `k` positive
pre-activations has fewer than `k` active latents; the rest of its entries are padding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from probe.errors import UserError
from saes.types import Codes


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """Keep the `k` largest pre-activations of each row."""

    k: int = 32
    """Latents kept for each row (L0 is at most this). Gao et al. 2024 use 32 for GPT-2 small."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"k must be at least 1, got {self.k}; 32 is the usual choice.")


Activation = TopK
"""Every activation config there is: a union once there are several."""


def activate(pre: Float[Tensor, "b s"], activation: Activation) -> Codes:
    """The codes that `activation` makes of a batch of pre-activations."""
    return top_k(pre, activation.k)


def top_k(pre: Float[Tensor, "b s"], k: int) -> Codes:
    """ReLU of the `k` largest entries of each row, strongest first.

    Of equal entries the lowest latent number wins, whatever the device or the batch (in reduced
    precision, where ties are common and only choose candidates, `torch.topk` decides).
    """
    assert k <= pre.shape[1], f"k = {k} of {pre.shape[1]} latents"
    # One more than asked for shows whether the last one kept is tied with the first one dropped.
    values, indices = torch.topk(pre, min(k + 1, pre.shape[1]), dim=1)
    if pre.dtype == torch.float32:
        tied = ((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > 0)).any(1).nonzero().squeeze(1)
        if len(tied):
            order = torch.sort(pre[tied], dim=1, descending=True, stable=True).indices
            indices[tied] = order[:, : indices.shape[1]]
    values, indices = values[:, :k].relu(), indices[:, :k]
    return Codes(values=values, indices=torch.where(values > 0, indices, 0))
