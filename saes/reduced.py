"""Choosing the strongest latents by scores in bfloat16, exactly.

The dense product is what a training step costs most, and in bfloat16 it takes half the time or
less. Its scores only nominate. With x_l and W_l the rounded inputs and weights, a score differs
from the true pre-activation x . w + b by at most

    e = |x - x_l| |w| + |x_l| |w - w_l| + |b - b_l|

(Cauchy and Schwarz; the norms of what rounding took away are known), besides the rounding of the
score itself and of the sum. Whatever is among a row's k largest pre-activations therefore has a
score of at least s_k - 2 e, s_k being the k-th largest score. All entries above that floor (about
half as many again as k) are computed in float32, and the k largest of them are the choice: what a
float32 product would have chosen, but for ties within its own rounding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saes import kernels, selection
from saes.types import Chosen, Codes

SUM_ROUNDING = 1e-4
"""Rounding of a sum of products, over |x| |w|: far above what float32 leaves of some thousand."""
SCORE_ROUNDING = 2.0**-8
"""Rounding of a score to bfloat16, over its size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReducedEncoder:
    """An encoder beside its rounded copy."""

    weights: Float[Tensor, "d s"]
    """In float32."""
    bias: Float[Tensor, " s"]
    """In float32."""
    low_weights: Float[Tensor, "d s"]
    """In bfloat16."""
    low_bias: Float[Tensor, " s"]
    """In bfloat16."""
    norm: Float[Tensor, ""]
    """The largest |w|."""
    rounding: Float[Tensor, ""]
    """The largest |w - w_l|."""
    bias_rounding: Float[Tensor, ""]
    """The largest |b - b_l|."""

    @staticmethod
    def of(weights: Float[Tensor, "d s"], bias: Float[Tensor, " s"]) -> "ReducedEncoder":
        """Round an encoder and measure what is lost."""
        low_weights, low_bias = weights.bfloat16(), bias.bfloat16()
        lost = weights - low_weights
        return ReducedEncoder(
            weights=weights,
            bias=bias,
            low_weights=low_weights,
            low_bias=low_bias,
            norm=torch.linalg.vector_norm(weights, dim=0).max(),
            rounding=torch.linalg.vector_norm(lost, dim=0).max(),
            bias_rounding=(bias - low_bias).abs().max(),
        )

    def errors(
        self, rows: Float[Tensor, "n d"], low_rows: Float[Tensor, "n d"]
    ) -> Float[Tensor, " n"]:
        """What every score of a row differs by at most, but for its own rounding."""
        low = torch.linalg.vector_norm(low_rows, dim=1, dtype=torch.float32)
        lost = torch.linalg.vector_norm(rows - low_rows, dim=1)
        by_rounding = lost * self.norm + low * self.rounding + self.bias_rounding
        return by_rounding + SUM_ROUNDING * low * self.norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Pre-activations of some rows, exact or rounded."""

    pre: Float[Tensor, "n s"]
    """The scores of all latents."""
    rows: Float[Tensor, "n d"]
    """The centred inputs they are of."""
    reduced: ReducedEncoder | None
    """What made rounded scores; None where they are float32."""

    def top_k(self, k: int, latents: Int[Tensor, " m"] | None = None) -> Codes:
        """The `k` strongest of all latents, or of those numbered in `latents`, in float32."""
        pre = self.pre if latents is None else self.pre[:, latents]
        if self.reduced is not None:
            return self._nominated(pre, k, latents)
        codes = selection.top_k(pre, k)
        if latents is None:
            return codes
        indices = torch.where(codes.values > 0, latents[codes.indices], 0)
        return Codes(values=codes.values, indices=indices)

    def _nominated(self, pre: Tensor, k: int, latents: Tensor | None) -> Codes:
        assert self.reduced is not None, "exact scores nominate nothing"
        errors = self.reduced.errors(self.rows, self.rows.bfloat16())
        found = selection.nominees(pre, k, errors, SCORE_ROUNDING)
        numbers = found.latents if latents is None else latents[found.latents]
        named = Chosen(values=found.values, latents=numbers, lengths=found.lengths)
        values = kernels.row_products(self.rows, self.reduced.weights.T, named.entries)
        exact = values + self.reduced.bias.index_select(0, numbers)
        return selection.strongest_of_rows(
            Chosen(values=exact, latents=numbers, lengths=found.lengths), k
        )
