"""The nearest TopK SAE of one that a format cannot hold, and the error that this makes.

Top-AFA chooses its own number of latents for every input; no other project's format says that. The
same holds where a format knows TopK alone. What can be exported is a TopK SAE with the same tensors
and one fixed k: the mean number of active latents over some rows of real activations, rounded. On
other rows of the same sample it is then measured how much that costs:

    fvu, fvu_frozen     of the SAE and of its TopK approximation (`saes.metrics.DEFINITIONS`)
    difference          sum |xhat - xhat_frozen|^2 / sum |x - mean|^2
    kept, added         shares of the active latents that stay active, and of the approximation's
                        that were not active before

TopK orders latents by f_i, top-AFA by f_i |W_dec,i|. So that both are one order, decoder rows are
first given unit norm (`saes.interop.transforms`).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe.errors import UserError
from saes.activations import Gated, KSparse, TopAfa, TopK
from saes.interop.transforms import normalise_rows, untied
from saes.metrics import FidelityMeter, Moments
from saes.models import SparseAutoencoder

ROWS_AT_ONCE = 256
LEAST_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezingError:
    """What a fixed k costs, on rows that did not choose it."""

    k: int
    """Latents kept for each row: the mean of the rows that chose it."""
    chosen_on: int
    """Rows that chose k."""
    measured_on: int
    """Rows the rest was measured on."""
    l0: float
    """Mean number of active latents of the SAE itself."""
    l0_sd: float
    """Standard deviation of that number over rows."""
    fvu: float
    """Fraction of variance unexplained of the SAE itself."""
    fvu_frozen: float
    """The same of the approximation."""
    difference: float
    """Squared distance of the two reconstructions, over the rows' variance."""
    kept: float
    """Share of the SAE's active latents that are active in the approximation."""
    added: float
    """Share of the approximation's active latents that are not active in the SAE."""

    def sentence(self, name: str) -> str:
        """What is said to the person and written beside the weights."""
        return (
            f"{name} has no place in this format: written as TopK with k = {self.k}, its mean "
            f"number of active latents ({self.l0:.1f}, sd {self.l0_sd:.1f} over rows); FVU "
            f"{self.fvu:.4g} becomes {self.fvu_frozen:.4g}, {self.kept:.1%} of the active latents "
            f"stay active and {self.added:.1%} of the new ones were not (on {self.measured_on} "
            "rows)."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """A TopK SAE in another's place."""

    sae: SparseAutoencoder
    """The approximation."""
    error: FreezingError
    """What it costs."""
    notes: tuple[str, ...]
    """What is said of it, a sentence each."""

    def described(self) -> dict[str, Any]:
        """The error as plain numbers, for metadata."""
        return asdict(self.error)


def freeze(sae: SparseAutoencoder, rows: Float[Tensor, "n d"] | None) -> Frozen:
    """The TopK SAE that is nearest to `sae`, and its error on `rows` of real activations.

    The first half of the rows chooses k, the second measures the error. Raises `UserError` without
    rows, and for a gated SAE, whose choice is not a matter of size.
    """
    activation = sae.config.activation
    name = type(activation).__name__
    if isinstance(activation, Gated):
        raise UserError(
            "a gated SAE chooses latents by a gate of their own and cannot be written as TopK; "
            "this format has no place for it (SAELens has)."
        )
    if rows is None or len(rows) < LEAST_ROWS:
        raise UserError(
            f"{name} has no place in this format; to write the nearest TopK SAE its number of "
            f"latents is taken from real activations: name a store with --store (at least "
            f"{LEAST_ROWS} rows)."
        )
    notes: tuple[str, ...] = ()
    scaled = sae
    if isinstance(activation, TopAfa):
        scaled, notes = normalise_rows(sae)
    half = len(rows) // 2
    counts = torch.cat([(sae.encode(x).values != 0).sum(1) for x in _batches(rows[:half])])
    k = min(max(1, round(float(counts.double().mean()))), sae.config.d_sae)
    frozen = _as_top_k(scaled, k)
    error = measure(sae, frozen, rows[half:], chosen_on=half)
    notes += (error.sentence(name),)
    if isinstance(activation, KSparse):
        notes += ("its tied encoder is written out, and its negative codes become zero.",)
    return Frozen(sae=frozen, error=error, notes=notes)


@torch.no_grad()
def measure(
    sae: SparseAutoencoder, frozen: SparseAutoencoder, rows: Float[Tensor, "n d"], chosen_on: int
) -> FreezingError:
    """The error of `frozen`, a TopK SAE, in the place of `sae`."""
    meters = [FidelityMeter(n_latents=sae.config.d_sae) for _ in range(2)]
    both = active = active_frozen = 0
    difference, counts = 0.0, []
    for x in _batches(rows):
        output, other = sae(x), frozen(x)
        for meter, found in zip(meters, (output, other), strict=True):
            meter.update(x, found)
        fires = output.codes.dense(sae.config.d_sae) != 0
        fires_frozen = other.codes.dense(sae.config.d_sae) != 0
        both += int((fires & fires_frozen).sum())
        active, active_frozen = active + int(fires.sum()), active_frozen + int(fires_frozen.sum())
        counts.append(fires.sum(1))
        apart = output.reconstruction - other.reconstruction
        difference += float(apart.double().square().sum())
    l0 = torch.cat(counts).double()
    variance = float(Moments.of(rows).deviation.sum())
    k = frozen.config.activation
    assert isinstance(k, TopK), "the approximation is a TopK SAE"
    return FreezingError(
        k=k.k,
        chosen_on=chosen_on,
        measured_on=len(rows),
        l0=float(l0.mean()),
        l0_sd=float(l0.std(correction=0)),
        fvu=meters[0].metrics()["fvu"],
        fvu_frozen=meters[1].metrics()["fvu"],
        difference=difference / max(variance, 1e-300),
        kept=both / max(active, 1),
        added=1 - both / max(active_frozen, 1),
    )


def _as_top_k(sae: SparseAutoencoder, k: int) -> SparseAutoencoder:
    tensors = {name: t for name, t in untied(sae.tensors()).items() if name != "threshold"}
    config = replace(sae.config, activation=TopK(k=k), tied=False)
    return SparseAutoencoder.from_tensors(config, tensors).requires_grad_(False).eval()


def _batches(rows: Float[Tensor, "n d"]) -> Iterator[Float[Tensor, "b d"]]:
    return iter(rows.split(ROWS_AT_ONCE))
