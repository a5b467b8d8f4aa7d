"""What an SAE says about activations, as small frozen records.

Axes: `b` rows of activations, `d` their width (`d_in`), `s` dictionary size (`d_sae`), `k` entries
kept for each row, `n` entries of all rows together. A code is sparse from the start: values and
latent numbers, never a `[b, s]` matrix that is zero almost everywhere.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """The active latents of each row, strongest first."""

    values: Float[Tensor, "*b k"]
    """Activations in the units of the SAE's input; 0 where a row has fewer than `k`. Only the 2013
    k-sparse autoencoder has negative ones."""
    indices: Int[Tensor, "*b k"]
    """Latent numbers; 0 where the value is 0, so a padded entry never counts as a firing."""

    def dense(self, d_sae: int) -> Float[Tensor, "*b s"]:
        """The same codes as a matrix over all `d_sae` latents."""
        shape = (*self.values.shape[:-1], d_sae)
        return self.values.new_zeros(shape).scatter_add(-1, self.indices.long(), self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Which latents of which rows are looked at, row after row: the shape of a sparse matrix."""

    latents: Int[Tensor, " n"]
    """Latent numbers, those of row 0 first."""
    starts: Int[Tensor, " b_1"]
    """Where each row begins, and the number of all entries at the end."""

    @staticmethod
    def of_rows(indices: Int[Tensor, "b k"]) -> "Entries":
        """As many entries in every row."""
        b, k = indices.shape
        starts = torch.arange(b + 1, device=indices.device) * k
        return Entries(latents=indices.reshape(-1), starts=starts)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    @property
    def lengths(self) -> Int[Tensor, " b"]:
        """Number of entries in each row."""
        return self.starts.diff()

    @property
    def rows(self) -> Int[Tensor, " n"]:
        """The row of each entry."""
        numbers = torch.arange(self.n_rows, device=self.starts.device)
        return numbers.repeat_interleave(self.lengths, output_size=len(self.latents))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Chosen entries of some rows with their pre-activations; nothing here has a gradient."""

    values: Float[Tensor, " n"]
    """Pre-activation of each entry."""
    latents: Int[Tensor, " n"]
    """Latent of each entry, row after row."""
    lengths: Int[Tensor, " b"]
    """Number of entries of each row."""

    @property
    def entries(self) -> Entries:
        """The places alone."""
        starts = torch.zeros(len(self.lengths) + 1, dtype=torch.long, device=self.lengths.device)
        starts[1:] = self.lengths.cumsum(0)
        return Entries(latents=self.latents, starts=starts)

    def positive(self) -> "Chosen":
        """The entries above 0."""
        keep = (self.values > 0).nonzero().squeeze(1)
        rows = self.entries.rows.index_select(0, keep)
        return Chosen(
            values=self.values.index_select(0, keep),
            latents=self.latents.index_select(0, keep),
            lengths=torch.bincount(rows, minlength=len(self.lengths)),
        )

    @staticmethod
    def of_codes(codes: Codes) -> "Chosen":
        """Codes as entries, as many in each row; padding stays."""
        b, k = codes.values.shape
        return Chosen(
            values=codes.values.reshape(-1),
            latents=codes.indices.reshape(-1),
            lengths=torch.full((b,), k, device=codes.values.device),
        )


def concatenated(parts: list[Chosen]) -> Chosen:
    """The entries of some parts as those of one."""
    return Chosen(
        values=torch.cat([part.values for part in parts]),
        latents=torch.cat([part.latents for part in parts]),
        lengths=torch.cat([part.lengths for part in parts]),
    )


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
    further: tuple[Float[Tensor, "b d"], ...]
    """Other reconstructions of `target` that the activation asks for: from more entries
    (multi-TopK), from prefixes of the dictionary (Matryoshka), from the gates (Gated)."""
    residual: Float[Tensor, "b d"] | None
    """What the dead latents make of `target - reconstruction`; None where no latent is dead."""
    penalty: Float[Tensor, ""]
    """The activation's own penalty, without its coefficient; 0 where it has none."""
    fired: Bool[Tensor, " s"]
    """Which latents are active anywhere in the batch."""
    l0: float
    """Mean number of active latents of a row."""
    smallest: float | None
    """The smallest activation in the batch; None where nothing is active."""
    values: Float[Tensor, " n"]
    """Activations of `entries`, without gradients; those of 0 are not active."""
    entries: Entries
    """The entries that `reconstruction` was decoded from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The named terms of a training loss; what is minimised is their sum."""

    errors: Float[Tensor, " b"]
    """Squared error of each row in the space of the loss, without gradients."""
    mse: Float[Tensor, ""]
    """Squared error over the source's variance (dimensionless; 1 = no better than the mean)."""
    further: Float[Tensor, ""]
    """The same of the further reconstructions, weights included; 0 where there are none."""
    penalty: Float[Tensor, ""]
    """The activation's own penalty, its coefficient included; 0 where it has none."""
    auxk: Float[Tensor, ""]
    """The AuxK term, its coefficient included; 0 where no latent is dead."""

    @property
    def total(self) -> Float[Tensor, ""]:
        """The sum of all terms."""
        return self.mse + self.further + self.penalty + self.auxk

    def metrics(self) -> dict[str, float]:
        """Every term and the total (`loss`) as plain numbers."""
        names = ("mse", "further", "penalty", "auxk")
        terms = {"loss": self.total} | {name: getattr(self, name) for name in names}
        return {name: float(term.detach()) for name, term in terms.items()}
