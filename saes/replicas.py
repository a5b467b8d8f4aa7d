"""Rows divided over ranks: every rank holds the whole SAE and looks at its part of every batch.

A rank takes a contiguous stretch of the batch's rows, so that the ranks' rows one after the other
are the batch. Forward and backward pass run on them alone; what depends on the whole batch is
exchanged, so that parameters, checkpoints and metrics are those of one process but for the order of
summation (`saes.sharded` divides the latents instead):

1. each rank's loss is its part of the whole one: means over rows count by its share of the rows,
   and AuxK's denominator is that of the whole batch;
2. `BatchTopK` and `Matryoshka` choose from the whole batch: the ranks exchange the values of their
   strongest entries, at most 4 k b bytes from each (`strongest_of_all`);
3. gradients are added up. A latent that no rank touched has a gradient of zero, so where fewer than
   half of the m latents were touched, their t rows alone travel, after a mask of m bytes. For both
   matrices a ring sends 16 t d (R - 1) / R bytes from each of R ranks (t = m where all travel).
   Entries and rows in place of gradients would take about 8 b d bytes, fewer where b < 2 t, but
   every rank would then compute the gradients of the whole batch, and each activation would need
   its own exchange. Where that matters, dividing the latents sends less still (`saes.sharded`).

Every rank then takes the same step with the same bits.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probe.errors import UserError
from probe.loader import ActivationSource, Divisible
from probe.ranks import ALONE, Ranks
from saes import selection
from saes.activations import Activation
from saes.losses import training_loss
from saes.models import SparseAutoencoder
from saes.training_forward import training_forward
from saes.types import Chosen, Loss, TrainingOutput

TOUCHED_SHARE = 1 / 2
"""Below this share of touched latents only their rows of the gradients are exchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """The ranks that divide each batch's rows; a single one sees them all and exchanges nothing."""

    ranks: Ranks = ALONE
    """The processes."""

    @property
    def holders(self) -> Ranks:
        """The ranks that hold different parts of the state: none but one."""
        return ALONE

    @property
    def writes(self) -> bool:
        """Whether this rank writes checkpoints."""
        return self.ranks.is_first

    def latents(self, d_sae: int) -> range:
        """The latents held here: all."""
        return range(d_sae)

    def check(self, d_sae: int, activation: Activation) -> None:
        """Every SAE can be trained so."""

    def begin(self, sae: SparseAutoencoder, generator: torch.Generator) -> None:
        """Take the first rank's parameters and buffers, should they differ by a rounding."""
        for tensor in sae.state_dict().values() if self.ranks.size > 1 else ():
            tensor.copy_(self.ranks.of_first(tensor.contiguous()))

    def batches(self, source: ActivationSource, start: int) -> Iterator[Float[Tensor, "n d"]]:
        """This rank's rows of every batch.

        Raises `UserError` where a batch has fewer rows than there are ranks.
        """
        if self.ranks.size > 1 and isinstance(source, Divisible):
            batches = source.own_batches(start, self.ranks)
        else:
            parts = ((x, self.ranks.part(len(x))) for x in source.batches(start))
            batches = (x[part.start : part.stop] for x, part in parts)
        for x in batches:
            if not len(x):
                raise UserError(
                    f"a batch has fewer rows than the {self.ranks.size} ranks it is divided over; "
                    "choose a larger --batch-size or fewer processes."
                )
            yield x

    def n_rows(self, x: Float[Tensor, "n d"]) -> int:
        """Rows of the batch that `x` is this rank's part of."""
        return int(self.ranks.summed(torch.tensor(len(x))))

    def forward(
        self,
        sae: SparseAutoencoder,
        x: Float[Tensor, "n d"],
        *,
        dead: Tensor,
        k_aux: int,
        encoder_dtype: torch.dtype,
        progress: float,
    ) -> TrainingOutput:
        """`training_forward` of own rows; what fired and what is `smallest` are the batch's."""
        output = training_forward(
            sae,
            x,
            dead=dead,
            k_aux=k_aux,
            encoder_dtype=encoder_dtype,
            progress=progress,
            make_pool=self.pool,
        )
        if self.ranks.size == 1:
            return output
        fired = self.ranks.largest(output.fired.to(torch.uint8)).bool()
        least = math.inf if output.smallest is None else output.smallest
        least = -float(self.ranks.largest(torch.tensor(-least, dtype=torch.float64)))
        return replace(output, fired=fired, smallest=None if least == math.inf else least)

    def pool(self, n: int) -> selection.Pool:
        """What collects the strongest entries of a batch, of which own rows get `n` on average."""
        if self.ranks.size == 1:
            return selection.Pool(n)
        total = int(self.ranks.summed(torch.tensor(n)))
        return selection.Pool(total, functools.partial(strongest_of_all, ranks=self.ranks))

    def loss(
        self,
        output: TrainingOutput,
        activation: Activation,
        *,
        variance: float,
        auxk_alpha: float,
        n_rows: int,
    ) -> Loss:
        """This rank's part of the loss of a batch of `n_rows`: those of all ranks add up to it."""
        if self.ranks.size == 1:
            return training_loss(output, activation, variance=variance, auxk_alpha=auxk_alpha)
        spread = self._spread(output, n_rows)
        loss = training_loss(
            output, activation, variance=variance, auxk_alpha=auxk_alpha, spread=spread
        )
        share = len(output.target) / n_rows
        names = ("mse", "further", "penalty")
        return replace(loss, **{name: getattr(loss, name) * share for name in names})

    @torch.no_grad()
    def _spread(self, output: TrainingOutput, n_rows: int) -> Float[Tensor, ""] | None:
        """Squared deviation of the batch's errors from their mean; None where AuxK has no part."""
        if output.residual is None:
            return None
        error = output.target - output.reconstruction
        mean = self.ranks.summed(error.sum(0)) / n_rows
        return self.ranks.summed((error - mean).square().sum())

    def totals(self, terms: Mapping[str, float]) -> dict[str, float]:
        """The terms of the batch's loss, from those of this rank's part."""
        return self._summed(terms)

    def averaged(self, means: Mapping[str, float], share: float) -> dict[str, float]:
        """Means over the batch, from means over own rows, which are this share of it."""
        return self._summed({name: value * share for name, value in means.items()})

    def code_norms(self, norms: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Norms of whole codes: all latents are here."""
        return norms

    def dead_share(self, is_dead: Bool[Tensor, " s"]) -> float:
        """Share of all latents that are dead."""
        return float(is_dead.float().mean())

    @torch.no_grad()
    def exchange_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Add up the ranks' gradients, in place."""
        if self.ranks.size == 1:
            return
        for parameter in parameters.values():
            gradient = parameter.grad
            assert gradient is not None, "no gradient to exchange: call backward first"
            if gradient.ndim == 1:
                self.ranks.summed(gradient)
            else:
                self._add_rows(gradient)

    def _add_rows(self, gradient: Float[Tensor, "s d"]) -> None:
        touched = self.ranks.largest((gradient != 0).any(1).to(torch.uint8))
        rows = touched.nonzero().squeeze(1)
        if len(rows) < TOUCHED_SHARE * len(gradient):
            gradient[rows] = self.ranks.summed(gradient[rows])
        else:
            self.ranks.summed(gradient)

    def _summed(self, numbers: Mapping[str, float]) -> dict[str, float]:
        if self.ranks.size == 1:
            return dict(numbers)
        values = torch.tensor(list(numbers.values()), dtype=torch.float64)
        return dict(zip(numbers, self.ranks.summed(values).tolist(), strict=True))


def strongest_of_all(own: Chosen, n: int, ranks: Ranks) -> Chosen:
    """This rank's entries among the `n` strongest of all ranks', one rank's rows after the other's.

    Whatever is among the `n` strongest of all is among the `n` strongest of its own rank.
    """
    parts = ranks.joined_rows(own.values)
    lengths = torch.tensor([len(part) for part in parts], device=own.values.device)
    values = torch.cat(parts)
    numbers = torch.arange(len(values), device=values.device)
    best = selection.strongest(Chosen(values=values, latents=numbers, lengths=lengths), n)
    before = int(lengths[: ranks.rank].sum())
    ours = best.latents[(best.latents >= before) & (best.latents < before + len(own.values))]
    keep = torch.zeros_like(own.latents, dtype=torch.bool)
    keep[ours - before] = True
    return Chosen(
        values=own.values[keep],
        latents=own.latents[keep],
        lengths=torch.bincount(own.entries.rows[keep], minlength=len(own.lengths)),
    )
