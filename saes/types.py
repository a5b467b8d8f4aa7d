"""What an SAE says about activations, as small frozen records.

Axes: `b` rows of activations, `d` their width (`d_in`), `s` dictionary size (`d_sae`), `k` entries
kept for each row. A code is sparse from the start: `k` values and `k` latent numbers a row, never a
`[b, s]` matrix that is zero almost everywhere.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """The active latents of each row, strongest first."""

    values: Float[Tensor, "*b k"]
    """Activations, all >= 0, in the units of the SAE's input; 0 where a row has fewer than `k`."""
    indices: Int[Tensor, "*b k"]
    """Latent numbers; 0 where the value is 0, so a padded entry never counts as a firing."""

    def dense(self, d_sae: int) -> Float[Tensor, "*b s"]:
        """The same codes as a matrix over all `d_sae` latents."""
        shape = (*self.values.shape[:-1], d_sae)
        return self.values.new_zeros(shape).scatter_add(-1, self.indices.long(), self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeOutput:
    """One forward pass."""

    reconstruction: Float[Tensor, "*b d"]
    """What the codes say the input was, in the input's units."""
    codes: Codes
    """The codes it was decoded from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOutput:
    """One forward pass as training sees it, in the space that the loss is taken in."""

    target: Float[Tensor, "b d"]
    """The normalised input."""
    reconstruction: Float[Tensor, "b d"]
    """The reconstruction of `target`."""
    codes: Codes
    """The codes `reconstruction` was decoded from."""
    residual: Float[Tensor, "b d"] | None
    """What the dead latents make of `target - reconstruction`; None where no latent is dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The named terms of a training loss; what is minimised is their sum."""

    mse: Float[Tensor, ""]
    """Squared error over the source's variance (dimensionless; 1 = no better than the mean)."""
    auxk: Float[Tensor, ""]
    """The AuxK term, its coefficient included; 0 where no latent is dead."""

    @property
    def total(self) -> Float[Tensor, ""]:
        """The sum of all terms."""
        return self.mse + self.auxk

    def metrics(self) -> dict[str, float]:
        """Every term and the total (`loss`) as plain numbers."""
        terms = {"loss": self.total, "mse": self.mse, "auxk": self.auxk}
        return {name: float(term.detach()) for name, term in terms.items()}

    def is_finite(self) -> bool:
        """Whether the total is an ordinary number."""
        return bool(torch.isfinite(self.total.detach()))
