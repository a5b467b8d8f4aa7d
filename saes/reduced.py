"""Choosing the strongest latents by scores in bfloat16, exactly.

The dense product is what a training step costs most, and in bfloat16 it takes half the time or
less. Its scores only nominate. With x_l and W_l the rounded inputs and weights, a score differs
from the true pre-activation x . w + b by at most

    e = |x - x_l| |w| + |x_l| |w - w_l| + |b - b_l|

(Cauchy and Schwarz; the norms of what rounding took away are known), besides the rounding of the
score itself and of the sum. Whatever is among a row's k largest pre-activations therefore has a
score of at least s_k - 2 e, s_k being the k-th largest score. The entries above that floor (about
twice k) are computed in float32 as far as they are needed (`saes.selection_cpu`), and the k largest
of them are the choice: what a float32 product would have chosen, but for ties within its own
rounding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from saes import kernels, selection, selection_cpu
from saes.types import Chosen, Codes

SUM_ROUNDING = 1e-4
"""Rounding of a sum of products, over |x| |w|: far above what float32 leaves of some thousand."""
SCORE_ROUNDING = 2.0**-8
"""Rounding of a score to bfloat16, over its size."""
NOMINATED_SHARE = 1 / 10
"""Above this share of latents wanted, a float32 product with all of them is faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReducedEncoder:
    """An encoder beside its rounded copy."""

    weights: Float[Tensor, "d s"]
    """In float32."""
    bias: Float[Tensor, " s"]
    """In float32."""
    low_weights: Float[Tensor, "e s"]
    """In bfloat16, the bias in a row under the weights, and zeros: one product does both."""
    errors: Float[Tensor, "3 s"]
    """What a score's error is at most: the norm of what rounding took from the row times the first,
    the norm of what it left times the second, and the third."""

    @staticmethod
    def of(weights: Float[Tensor, "d s"], bias: Float[Tensor, " s"]) -> "ReducedEncoder":
        """Round an encoder and measure what is lost."""
        in_one_pass = weights.device.type == "cpu"
        rounded = selection_cpu.rounded if in_one_pass else rounded_reference
        d = len(weights)
        low_weights, norms, lost = rounded(weights.T, padded_width(d))
        low_weights[:, d] = bias
        bias_lost = (bias - low_weights[:, d]).abs()
        return ReducedEncoder(
            weights=weights,
            bias=bias,
            low_weights=low_weights.T,
            errors=torch.stack([norms, lost + SUM_ROUNDING * norms, bias_lost]),
        )

    def scores(self, rows: Float[Tensor, "n d"], memory: Float[Tensor, "n s"]) -> "Scores":
        """The rounded pre-activations of centred inputs, in `memory`."""
        d = rows.shape[1]
        low_rows = memory.new_zeros(len(rows), padded_width(d))
        low_rows[:, :d] = rows
        low_rows[:, d] = 1
        pre = torch.mm(low_rows, self.low_weights, out=memory)
        return Scores(pre=pre, rows=rows, low_rows=low_rows, reduced=self)


def padded_width(d: int) -> int:
    """Room for `d` numbers and a bias, in whole tiles of the processor's matrix unit."""
    return (d // 32 + 1) * 32


def rounded_reference(
    weights: Float[Tensor, "s d"], width: int
) -> tuple[Float[Tensor, "s e"], Float[Tensor, " s"], Float[Tensor, " s"]]:
    """Rows in bfloat16, as wide as asked, their norms, and those of what rounding takes off."""
    low = weights.bfloat16()
    lost = torch.linalg.vector_norm(weights - low, dim=1)
    padded = functional.pad(low, (0, width - weights.shape[1]))
    return padded, torch.linalg.vector_norm(weights, dim=1), lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Pre-activations of some rows, exact or rounded."""

    pre: Float[Tensor, "n s"]
    """The scores of all latents."""
    rows: Float[Tensor, "n d"]
    """The centred inputs they are of."""
    low_rows: Float[Tensor, "n e"]
    """The inputs as the product read them, and what stands beside them."""
    reduced: ReducedEncoder | None
    """What made rounded scores; None where they are float32."""

    def top_k(self, k: int, latents: Int[Tensor, " m"] | None = None) -> Codes:
        """The `k` strongest of all latents, or of those numbered in `latents`, in float32."""
        pre = self.pre if latents is None else self.pre[:, latents]
        if self.reduced is None:
            codes = selection.top_k(pre, k)
            return codes if latents is None else numbered(codes, latents)
        if latents is None:
            latents = torch.arange(pre.shape[1], device=pre.device)
        if k > NOMINATED_SHARE * len(latents):
            weights = self.reduced.weights[:, latents]
            exact = torch.addmm(self.reduced.bias[latents], self.rows, weights)
            return numbered(selection.top_k(exact, k), latents)
        if pre.device.type == "cpu":
            return selection_cpu.nominated_top_k(
                pre, self.rows, self.low_rows, self.reduced.weights.T, self.reduced.bias,
                self.reduced.errors, latents, k, SCORE_ROUNDING,
            )  # fmt: skip
        return self.top_k_reference(k, latents)

    def top_k_reference(self, k: int, latents: Int[Tensor, " m"]) -> Codes:
        """`top_k` of rounded scores, the same error taken for all of a row."""
        assert self.reduced is not None, "exact scores nominate nothing"
        low = self.low_rows[:, : self.rows.shape[1]]
        lost = torch.linalg.vector_norm(self.rows - low, dim=1)
        left = torch.linalg.vector_norm(low, dim=1, dtype=torch.float32)
        worst = self.reduced.errors[:, latents].amax(1)
        errors = lost * worst[0] + left * worst[1] + worst[2]
        found = selection.nominees(self.pre[:, latents], k, errors, SCORE_ROUNDING)
        numbers = latents[found.latents]
        named = Chosen(values=found.values, latents=numbers, lengths=found.lengths)
        values = kernels.row_products(self.rows, self.reduced.weights.T, named.entries)
        exact = values + self.reduced.bias.index_select(0, numbers)
        return selection.strongest_of_rows(
            Chosen(values=exact, latents=numbers, lengths=found.lengths), k
        )


def numbered(codes: Codes, latents: Int[Tensor, " m"]) -> Codes:
    """Codes of some latents under the latents' own numbers."""
    return Codes(
        values=codes.values, indices=torch.where(codes.values > 0, latents[codes.indices], 0)
    )
