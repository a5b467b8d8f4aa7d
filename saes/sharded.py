"""Latents divided over ranks, for dictionaries that outgrow one device.

Of m latents rank r of R holds m r / R to m (r + 1) / R: their columns of `W_enc`, rows of `W_dec`,
biases, silent counts and Adam's moments. Every rank sees every batch as a whole. With b rows, d
their width and k latents kept, a step is

1. each rank scores its own latents and keeps the k largest of every row;
2. their values are gathered (4 b k bytes from each rank), and the k largest of each row found, the
   lowest latent first among equal ones; a rank goes on with those that are its own. AuxK's dead
   latents are chosen in the same way;
3. each rank decodes what it has; the parts are added up over the ranks (4 b d bytes, and as many
   for AuxK), and the first rank's part includes `b_dec`;
4. every rank takes the loss of the whole reconstruction. Its gradient is the same for every part of
   the sum, so that the backward pass goes on with no exchange at all, into parameters that belong
   to one rank each; only `b_dec`'s gradient is added up over the ranks (4 d bytes).

The dense product, the sparse products, Adam and the memory are all divided by R, and no gradient
travels: what does is independent of m. Parameters begin as in one process and stay equal to it but
for the order of summation. TopK alone: its choice needs k values of each row from each rank.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from probe.errors import UserError
from probe.loader import ActivationSource
from probe.ranks import Ranks
from saes import kernels
from saes.activations import Activation, TopK, activation_name
from saes.losses import training_loss
from saes.models import SparseAutoencoder
from saes.types import Chosen, Loss, TrainingOutput

ROWS_AT_ONCE = 512
"""Directions drawn at a time. The numbers are those of one large draw, since torch draws normal
numbers in groups of 16 and this is a multiple of them whatever the width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """The ranks that divide the latents; the SAE at hand is one rank's part."""

    ranks: Ranks
    """The processes."""

    @property
    def holders(self) -> Ranks:
        """The ranks that hold different parts of the state: all."""
        return self.ranks

    @property
    def writes(self) -> bool:
        """Whether this rank writes checkpoints: each writes its part."""
        return True

    def latents(self, d_sae: int) -> range:
        """The latents held here."""
        return self.ranks.part(d_sae)

    def check(self, d_sae: int, activation: Activation) -> None:
        """Raises `UserError` for what cannot be trained so."""
        if not isinstance(activation, TopK) or activation.multi:
            raise UserError(
                "latents can be spread over ranks for topk without its multi loss, got "
                f"{activation_name(activation)}; train it without --shard-latents."
            )
        if d_sae // self.ranks.size < activation.k:
            raise UserError(
                f"each of {self.ranks.size} ranks must hold at least k = {activation.k} latents; "
                f"{d_sae} are too few for that: use fewer ranks or train without --shard-latents."
            )

    @torch.no_grad()
    def begin(self, sae: SparseAutoencoder, generator: torch.Generator) -> None:
        """Give the weights the values that one process gives to these latents."""
        n_latents = int(self.ranks.summed(torch.tensor(sae.config.d_sae)))
        own = self.latents(n_latents)
        generator.manual_seed(generator.initial_seed())
        for first, rows in _directions(n_latents, sae.config.d_in, generator):
            start, stop = max(first, own.start), min(first + len(rows), own.stop)
            if start < stop:
                unit = functional.normalize(rows[start - first : stop - first], dim=1)
                sae.W_dec[start - own.start : stop - own.start] = unit.to(sae.W_dec.device)
        sae.W_enc.copy_(sae.W_dec.T)
        self.ranks.of_first(sae.b_dec)

    def batches(self, source: ActivationSource, start: int) -> Iterator[Float[Tensor, "b d"]]:
        """Every batch, as a whole."""
        return source.batches(start)

    def n_rows(self, x: Float[Tensor, "b d"]) -> int:
        """Rows of the batch: all are here."""
        return len(x)

    def forward(
        self,
        sae: SparseAutoencoder,
        x: Float[Tensor, "b d"],
        *,
        dead: Tensor,
        k_aux: int,
        encoder_dtype: torch.dtype,
        progress: float,
    ) -> TrainingOutput:
        """One forward pass; reconstructions and `l0` are the whole SAE's, codes those held here."""
        activation = sae.config.activation
        assert isinstance(activation, TopK), activation
        rows = sae.training_input(x)
        chosen, chosen_dead = sae.choose(
            rows,
            training=True,
            progress=progress,
            dead=dead,
            k_dead=min(k_aux, len(dead)),
            dtype=encoder_dtype,
        )
        chosen = self.winners(chosen, activation.k)
        values = sae.activated(sae.pre_activations_at(rows, chosen), chosen)
        part = kernels.decode(values, chosen.entries, sae.W_dec)
        if self.ranks.is_first:
            part = part + sae.b_dec
        anyone_dead = not self.ranks.all_say(len(dead) == 0)
        active = values.detach() != 0
        fired = torch.zeros(sae.config.d_sae, dtype=torch.bool, device=rows.device)
        fired[chosen.latents[active]] = True
        return TrainingOutput(
            target=rows,
            reconstruction=_Summed.apply(part, self.ranks),
            further=(),
            residual=self._residual(sae, rows, chosen_dead, k_aux) if anyone_dead else None,
            penalty=rows.new_zeros(()),
            fired=fired,
            l0=float(self.ranks.summed(active.sum().cpu())) / max(1, len(rows)),
            smallest=None,
            values=values.detach(),
            entries=chosen.entries,
        )

    def winners(self, chosen: Chosen, k: int) -> Chosen:
        """Of the strongest of each rank, as many in each row, those among the `k` of all ranks.

        Only positive ones are kept: the others stand for nothing.
        """
        b = len(chosen.lengths)
        values = chosen.values.view(b, len(chosen.values) // max(1, b))
        padded = functional.pad(values, (0, k - values.shape[1]))
        everyone = self.ranks.gathered(padded).transpose(0, 1).reshape(b, -1)
        places = torch.sort(everyone, dim=1, descending=True, stable=True).indices[:, :k]
        won = torch.zeros_like(everyone, dtype=torch.bool).scatter_(1, places, True)
        first = self.ranks.rank * k
        keep = won[:, first : first + values.shape[1]] & (values > 0)
        return Chosen(
            values=values[keep],
            latents=chosen.latents.view(values.shape)[keep],
            lengths=keep.sum(1),
        )

    def _residual(self, sae: SparseAutoencoder, rows: Tensor, dead: Chosen, k: int) -> Tensor:
        """What the dead latents of all ranks make of the rows, without the bias."""
        chosen = self.winners(dead, k)
        values = sae.activated(sae.pre_activations_at(rows, chosen), chosen)
        return _Summed.apply(kernels.decode(values, chosen.entries, sae.W_dec), self.ranks)

    def loss(
        self,
        output: TrainingOutput,
        activation: Activation,
        *,
        variance: float,
        auxk_alpha: float,
        n_rows: int,
    ) -> Loss:
        """The batch's loss, the same on every rank."""
        return training_loss(output, activation, variance=variance, auxk_alpha=auxk_alpha)

    def totals(self, terms: Mapping[str, float]) -> dict[str, float]:
        """The terms of the batch's loss: every rank has them."""
        return dict(terms)

    def averaged(self, means: Mapping[str, float], share: float) -> dict[str, float]:
        """Means over the batch: every rank has them."""
        return dict(means)

    def code_norms(self, norms: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Norms of whole codes, from those of the parts held here."""
        return self.ranks.summed(norms.square()).sqrt()

    def dead_share(self, is_dead: Bool[Tensor, " s"]) -> float:
        """Share of all ranks' latents that are dead."""
        n_dead, n_all = self.ranks.summed(torch.tensor([int(is_dead.sum()), len(is_dead)])).tolist()
        return n_dead / n_all

    def exchange_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Add up the gradients of `b_dec`, in place: all other parameters belong to one rank."""
        gradient = parameters["b_dec"].grad
        assert gradient is not None, "no gradient to exchange: call backward first"
        self.ranks.summed(gradient)


class _Summed(torch.autograd.Function):
    """The sum over ranks of what each holds, where every rank takes the same loss of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.summed(part.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _directions(n: int, d: int, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """`torch.randn(n, d)` in stretches of at least `ROWS_AT_ONCE` rows, each with its first row."""
    edges = [*range(0, max(1, n - ROWS_AT_ONCE + 1), ROWS_AT_ONCE), n]
    for first, last in itertools.pairwise(edges):
        yield first, torch.randn(last - first, d, generator=generator)
