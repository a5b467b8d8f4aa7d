"""Approximate feature activation: what the norm of an input says of the norm of its code.

Lee, Davies, Canby and Hockenmaier 2025 (2503.24277). Where z = sum_i f_i w_i with unit w_i whose
inner products are at most eps in size, ||z||^2 - ||f||^2 = sum_{i != j} f_i f_j w_i . w_j, so that

    ||z||^2 / (1 + eps m) <= ||f||^2 <= ||z||^2 / (1 - eps m)        (the right side for eps m < 1)

with m = h - 1 for h features, with m = L0 - 1, and with m = |f|_1^2 / |f|_2^2 - 1; each m is at
most the one before it (Cauchy and Schwarz on the support; the triangle inequality). Hence ||z||
approximates ||f||, and

    epsilon-LBO = | ||z||^2 - ||f||^2 | / (m ||f||^2)

is the least coherence that the two norms allow. Three readings: the authors', m = h - 1; over the
support, m = L0 - 1, h being so large that any number of latents passes; and over the support with
the reconstruction in z's place, where the identity is exact, so that the number truly bounds the
coherence of the active decoder rows and does not count the reconstruction error as coherence.

One function each gives the two norms, and everything uses them: the code's, scaled by the decoder
rows' norms (`code_norms`), and the input's, centred on the decoder's bias (`approximate_norms`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saes.models import SparseAutoencoder
from saes.types import Entries

TINY = 1e-12
"""Under the square root, so that the gradient of a row without active latents is 0."""

DEFINITIONS: dict[str, str] = {
    "code_over_input": "median over rows of ||f|| / ||x - b_dec||, f scaled by the decoder rows' "
    "norms; 1 where the dictionary's active rows are orthogonal and nothing is missed",
    "over_share": "share of rows with ||f|| > ||x - b_dec||: over-activated",
    "under_share": "share of rows with ||f|| < ||x - b_dec||: under-activated",
    "elbo": "median epsilon-LBO as published, | ||x - b_dec||^2 - ||f||^2 | / ((d_sae - 1) "
    "||f||^2); rows without active latents are left out of all three",
    "elbo_support": "the same with L0 - 1 in place of d_sae - 1, over rows of at least 2 latents",
    "elbo_reconstruction": "elbo_support with ||xhat - b_dec|| in place of ||x - b_dec||: a true "
    "lower bound on the coherence of the active decoder rows",
    "welch": "the least coherence that d_sae unit vectors in d_in dimensions can have, sqrt((d_sae "
    "- d_in) / (d_in (d_sae - 1))) (Welch 1974); an epsilon-LBO far below it certifies nothing",
}


def code_norms(
    values: Float[Tensor, " n"], entries: Entries, norms: Float[Tensor, " s"]
) -> Float[Tensor, " b"]:
    """||f|| of each row, each value scaled by its decoder row's norm; differentiable."""
    scaled = (values * norms.index_select(0, entries.latents)).square()
    squares = scaled.new_zeros(entries.n_rows).index_add(0, entries.rows, scaled)
    return (squares + TINY).sqrt()


def approximate_norms(x: Float[Tensor, "b d"], b_dec: Float[Tensor, " d"]) -> Float[Tensor, " b"]:
    """||x - b_dec|| of each row: what ||f|| should be for a dictionary of near-orthogonal rows."""
    return torch.linalg.vector_norm(x - b_dec, dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormRows:
    """The norms of some rows, in the space that the SAE reads (normalised where it normalises)."""

    input_norm: Float[Tensor, " n"]
    """||x - b_dec||."""
    code_norm: Float[Tensor, " n"]
    """||f||, scaled by the decoder rows' norms."""
    reconstruction_norm: Float[Tensor, " n"]
    """||xhat - b_dec||."""
    l0: Int[Tensor, " n"]
    """Number of active latents."""

    def frame(self) -> pd.DataFrame:
        """The same as a table, a row a row: the points of a ZF plot."""
        return pd.DataFrame({field.name: getattr(self, field.name) for field in fields(self)})


@torch.no_grad()
def norm_rows(sae: SparseAutoencoder, x: Float[Tensor, "n d"]) -> NormRows:
    """The norms of an SAE's inputs, codes and reconstructions; raises as `encode` does."""
    rows = sae.training_input(x)
    codes = sae.encode(x)
    entries = Entries.of_rows(codes.indices)
    values = codes.values.reshape(-1)
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    active = codes.values != 0
    decoded = sae.decoded_rows(values, entries)
    return NormRows(
        input_norm=approximate_norms(rows, sae.b_dec).cpu(),
        code_norm=torch.where(active.any(1), code_norms(values, entries, norms), 0).cpu(),
        reconstruction_norm=approximate_norms(decoded, sae.b_dec).cpu(),
        l0=active.sum(1).cpu(),
    )


def joined(parts: Iterable[NormRows]) -> NormRows:
    """The rows of several parts."""
    listed = list(parts)
    names = [field.name for field in fields(NormRows)]
    return NormRows(**{name: torch.cat([getattr(p, name) for p in listed]) for name in names})


def epsilon_lbo(
    squared: Float[Tensor, " n"], code_squared: Float[Tensor, " n"], m: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The least coherence that ||z||^2 and ||f||^2 allow over `m`; nan where f or m is 0."""
    return torch.where(
        (code_squared > 0) & (m > 0), (squared - code_squared).abs() / (m * code_squared), torch.nan
    )


def summary(rows: NormRows, *, d_sae: int, d_in: int) -> dict[str, float]:
    """The numbers of `DEFINITIONS`; nan where no row has one."""
    z, f = rows.input_norm.double(), rows.code_norm.double()
    whole, support = torch.full_like(f, d_sae - 1), (rows.l0 - 1).double()
    xhat = rows.reconstruction_norm.double()
    readings = {
        "code_over_input": torch.where(z > 0, f / z, torch.nan),
        "over_share": (f > z).double(),
        "under_share": (f < z).double(),
        "elbo": epsilon_lbo(z.square(), f.square(), whole),
        "elbo_support": epsilon_lbo(z.square(), f.square(), support),
        "elbo_reconstruction": epsilon_lbo(xhat.square(), f.square(), support),
    }
    shares = ("over_share", "under_share")
    found = {
        name: float(values.mean() if name in shares else values.nanmedian())
        for name, values in readings.items()
    }
    return found | {"welch": welch(d_sae, d_in)}


def welch(n: int, d: int) -> float:
    """The least coherence of `n` unit vectors in `d` dimensions (Welch 1974); 0 for n <= d."""
    return ((n - d) / (d * (n - 1))) ** 0.5 if n > d else 0.0


def norm_bounds(
    squared: Float[Tensor, " n"], epsilon: float, m: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Least and largest ||f||^2 for ||z||^2 = `squared` and coherence `epsilon`.

    Source: Lee et al. 2025, the theorem above; the largest is infinite where epsilon m >= 1.
    """
    spread = epsilon * m
    largest = torch.where(spread < 1, squared / (1 - spread).clamp_min(TINY), torch.inf)
    return squared / (1 + spread), largest
