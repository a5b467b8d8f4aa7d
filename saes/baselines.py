"""What an SAE's numbers are held against: reconstructions that learned less, or nothing.

- PCA with as many components as the SAE has active latents: the best linear code of that many
  numbers (Pearson 1901), though its components are the same for every row.
- A random dictionary of the SAE's size and L0: random unit decoder rows, their transpose as
  encoder, one scale for all codes fitted by least squares, so that it is no straw man.
- The mean row and zero: no code at all.

Everything that reconstructs is a `Candidate`, the SAE too, and goes through the same measurements.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from saes import kernels
from saes.models import SparseAutoencoder
from saes.selection import top_k
from saes.types import Codes, Entries, SaeOutput

Reconstruct = Callable[[Float[Tensor, "b d"]], SaeOutput]
"""Codes and reconstruction of float32 rows. Codes may be negative here; non-zero ones count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Something that reconstructs activations."""

    name: str
    """Its name in `metrics.json`."""
    label: str
    """Its name for people."""
    n_latents: int
    """Size of its dictionary; 0 where it has none."""
    reconstruct: Reconstruct
    """How it does it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrincipalAxes:
    """Mean and principal axes of some rows."""

    mean: Float64[Tensor, " d"]
    """Mean row."""
    axes: Float64[Tensor, "d d"]
    """Orthonormal axes as columns, that of the largest variance first."""
    variances: Float64[Tensor, " d"]
    """Variance along each axis (over n)."""


def sae_candidate(sae: SparseAutoencoder) -> Candidate:
    """The SAE itself."""
    return Candidate(name="sae", label="SAE", n_latents=sae.config.d_sae, reconstruct=sae)


def constant_candidate(name: str, label: str, row: Float[Tensor, " d"]) -> Candidate:
    """The same row for every input: the mean, or zero."""

    def reconstruct(x: Float[Tensor, "b d"]) -> SaeOutput:
        nothing = Codes(
            values=x.new_zeros(len(x), 0),
            indices=torch.zeros(len(x), 0, dtype=torch.long, device=x.device),
        )
        return SaeOutput(reconstruction=row.to(x).expand_as(x), codes=nothing)

    return Candidate(name=name, label=label, n_latents=0, reconstruct=reconstruct)


def fit_principal_axes(
    parts: Iterable[Float[Tensor, "_ d"]], shift: Float[Tensor, " d"]
) -> PrincipalAxes:
    """Principal axes of the rows of all parts, their covariance accumulated in float64.

    `shift` is a row near the mean: subtracted first, so that nothing is lost to cancellation.
    """
    near = shift.double().cpu()
    d, count = len(near), 0
    total = torch.zeros(d, dtype=torch.float64)
    products = torch.zeros(d, d, dtype=torch.float64)
    for part in parts:
        centred = part.double().cpu() - near
        count += len(centred)
        total += centred.sum(0)
        products += centred.T @ centred
    offset = total / count
    variances, axes = torch.linalg.eigh(products / count - torch.outer(offset, offset))
    return PrincipalAxes(
        mean=near + offset, axes=axes.flip(1), variances=variances.flip(0).clamp(min=0)
    )


def pca_candidate(fitted: PrincipalAxes, k: int) -> Candidate:
    """The first `k` principal components (at most d; 0 gives the mean)."""
    k = min(k, len(fitted.mean))
    mean, axes = fitted.mean.float(), fitted.axes[:, :k].float()

    def reconstruct(x: Float[Tensor, "b d"]) -> SaeOutput:
        here, there = mean.to(x), axes.to(x)
        scores = (x - here) @ there
        indices = torch.arange(k, device=x.device).expand(len(x), k)
        codes = Codes(values=scores, indices=indices)
        return SaeOutput(reconstruction=scores @ there.T + here, codes=codes)

    label = f"PCA, {k} component{'' if k == 1 else 's'}"
    return Candidate(name="pca", label=label, n_latents=k, reconstruct=reconstruct)


def random_dictionary_candidate(
    sample: Float[Tensor, "n d"], mean: Float[Tensor, " d"], d_sae: int, k: int, seed: int
) -> Candidate:
    """A dictionary of `d_sae` random directions, the `k` best aligned of which code for a row.

    `xhat = mean + scale * z D` with rows of D random unit vectors, `z = TopK((x - mean) D^T)`, and
    the one number `scale` fitted by least squares on `sample`.
    """
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(d_sae, len(mean), generator=generator)
    directions = (random / random.norm(dim=1, keepdim=True)).to(sample)
    centre = mean.to(sample)

    def reconstruct(x: Float[Tensor, "b d"], scale: float) -> SaeOutput:
        codes = top_k((x - centre) @ directions.T, min(k, d_sae))
        codes = Codes(values=codes.values * scale, indices=codes.indices)
        entries = Entries.of_rows(codes.indices)
        decoded = kernels.decode(codes.values.reshape(-1), entries, directions)
        return SaeOutput(reconstruction=decoded + centre, codes=codes)

    unscaled = reconstruct(sample, 1.0).reconstruction - centre
    power = float(unscaled.square().sum())
    scale = float((unscaled * (sample - centre)).sum()) / power if power > 0 else 0.0
    return Candidate(
        name="random_dictionary",
        label="random dictionary",
        n_latents=d_sae,
        reconstruct=lambda x: reconstruct(x, scale),
    )
