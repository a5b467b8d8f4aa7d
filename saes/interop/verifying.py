"""Whether an SAE says what a formula says: made rows through both.

The rows lie around `b_dec`, at scales from a hundredth to a hundred times its own, half of them
noise and half of them sums of a few decoder rows: whatever the units, biases and thresholds of an
SAE are, some of its latents fire on some of them and others do not.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probe.errors import Failure
from saes.interop.records import Said
from saes.models import SparseAutoencoder

ROWS = 64
SUMMED = 3
"""Decoder rows in one made row."""
TOLERANCE = 1e-4
"""Largest difference, relative to the row's largest number: another order of summation."""
AGREEING = 0.9
"""Share of rows that must agree: near a threshold or a tie a row may fall to the other side."""


def probe_rows(sae: SparseAutoencoder) -> Float[Tensor, "n d"]:
    """Made rows, always the same ones for the same SAE."""
    generator = torch.Generator().manual_seed(0)
    b_dec, W_dec = sae.b_dec.detach().cpu(), sae.W_dec.detach().cpu()
    unit = max(float(b_dec.square().mean().sqrt()), 1.0)
    scales = unit * torch.logspace(-2, 2, ROWS)[:, None]
    noise = torch.randn(ROWS, sae.config.d_in, generator=generator)
    picked = torch.randint(sae.config.d_sae, (ROWS, SUMMED), generator=generator)
    weights = torch.rand(ROWS, SUMMED, 1, generator=generator)
    summed = (weights * W_dec[picked]).sum(1)
    rows = torch.where(torch.arange(ROWS)[:, None] % 2 == 0, noise, summed + 0.1 * noise)
    return b_dec + scales * rows


def says_of(sae: SparseAutoencoder, x: Float[Tensor, "n d"]) -> Said:
    """What an SAE says of some rows, densely."""
    with torch.no_grad():
        output = sae(x)
    codes = output.codes.dense(sae.config.d_sae)
    return Said(codes=codes, reconstruction=output.reconstruction)


def agreeing_rows(found: Said, wanted: Said) -> Bool[Tensor, " n"]:
    """Which rows have the same codes and the same reconstruction."""
    return _close(found.codes, wanted.codes) & _close(found.reconstruction, wanted.reconstruction)


def verify(found: Said, wanted: Said, what: str) -> None:
    """Raises `Failure` where two readings of one SAE differ, or one of them is not finite."""
    numbers = (found.codes, found.reconstruction, wanted.codes, wanted.reconstruction)
    if not all(bool(torch.isfinite(part).all()) for part in numbers):
        raise Failure(
            f"{what} gives NaN or infinite numbers on ordinary rows; its weights are too large: "
            "take another checkpoint."
        )
    share = float(agreeing_rows(found, wanted).float().mean())
    if share < AGREEING:
        raise Failure(
            f"{what} says the same as its format's formula on {share:.0%} of the rows tried only; "
            "it was not converted: please report this with its description file."
        )


def _close(found: Float[Tensor, "n m"], wanted: Float[Tensor, "n m"]) -> Bool[Tensor, " n"]:
    largest = wanted.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    return (found - wanted).abs().amax(1) <= TOLERANCE * largest
