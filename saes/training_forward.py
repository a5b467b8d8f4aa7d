"""The forward pass as training sees it: codes, what else must reconstruct, penalty, dead latents.

1. Entries are chosen (`SparseAutoencoder.choose`), the strongest of the dead latents beside them.
2. Their pre-activations are taken with gradients, in one sparse product for both.
3. The activation makes codes of them, the decoder a reconstruction.
4. Further reconstructions of the same input: multi-TopK from 4 k entries; Matryoshka from every
   inner prefix of the dictionary; Gated from the gates' positive parts through a decoder that this
   term does not change.
5. The penalty: Relu sum_i f_i, Gated sum_i ReLU(gate_i), JumpRelu the number of active latents
   (their decoder rows have unit norm), TopAfa (|f| - |x|)^2 by `saes.afa`; each averaged over rows.
6. AuxK: what the strongest dead latents make of the same input.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saes import afa, kernels, selection
from saes.activations import Gated, JumpRelu, Matryoshka, Relu, TopAfa, TopK
from saes.models import SparseAutoencoder
from saes.types import Chosen, Entries, TrainingOutput


def training_forward(
    sae: SparseAutoencoder,
    x: Float[Tensor, "b d"],
    *,
    dead: Int[Tensor, " m"],
    k_aux: int,
    encoder_dtype: torch.dtype = torch.float32,
    progress: float = 1.0,
    make_pool: Callable[[int], selection.Pool] = selection.Pool,
) -> TrainingOutput:
    """One forward pass over a batch; raises as `SparseAutoencoder.encode` does.

    Args:
        sae: the SAE.
        x: inputs.
        dead: numbers of the dead latents; the `k_aux` strongest of them make `residual`.
        k_aux: how many of them a row uses at most.
        encoder_dtype: precision of the dense product that chooses latents.
        progress: share of the training that is done.
        make_pool: see `SparseAutoencoder.choose`.
    """
    rows = sae.training_input(x)
    chosen, chosen_dead = sae.choose(
        rows,
        training=True,
        progress=progress,
        dead=dead,
        k_dead=min(k_aux, len(dead)),
        dtype=encoder_dtype,
        make_pool=make_pool,
    )
    chosen_dead = chosen_dead.positive()
    pre, pre_dead = _pre_activations(sae, rows, chosen, chosen_dead)
    values = sae.activated(pre, chosen)
    cost = penalty(sae, rows, values, pre, chosen.entries)
    further: tuple[Tensor, ...] = ()
    match sae.config.activation:
        case TopK(k=k, multi=True):
            further = (sae.decoded_rows(values, chosen.entries),)
            values, chosen = _strongest(values, chosen, k)
        case Matryoshka(prefixes=prefixes):
            further = prefix_reconstructions(sae, values, chosen.entries, prefixes)
        case Gated():
            further = (_by_gates(sae, pre.relu(), chosen.entries),)
    active = values.detach() != 0
    fired = torch.zeros(sae.config.d_sae, dtype=torch.bool, device=rows.device)
    fired[chosen.latents[active]] = True
    return TrainingOutput(
        target=rows,
        reconstruction=sae.decoded_rows(values, chosen.entries),
        further=further,
        residual=kernels.decode(pre_dead, chosen_dead.entries, sae.W_dec) if len(dead) else None,
        penalty=cost,
        fired=fired,
        l0=float(active.sum()) / max(1, len(rows)),
        smallest=float(values.detach()[active].min()) if bool(active.any()) else None,
        values=values.detach(),
        entries=chosen.entries,
    )


def prefix_reconstructions(
    sae: SparseAutoencoder,
    values: Float[Tensor, " n"],
    entries: Entries,
    prefixes: tuple[int, ...],
) -> tuple[Float[Tensor, "b d"], ...]:
    """The reconstructions from the first `prefixes[0]` latents, from the first `prefixes[1]`, ...

    Each entry is decoded once: a prefix adds its own latents to the one before it.
    """
    rows, found = entries.rows, []
    total = sae.b_dec.expand(entries.n_rows, -1)
    for first, last in zip((0, *prefixes[:-1]), prefixes, strict=True):
        inside = ((entries.latents >= first) & (entries.latents < last)).nonzero().squeeze(1)
        lengths = torch.bincount(rows[inside], minlength=entries.n_rows)
        part = Chosen(
            values=values.detach()[inside], latents=entries.latents[inside], lengths=lengths
        )
        total = total + kernels.decode(values.index_select(0, inside), part.entries, sae.W_dec)
        found.append(total)
    return tuple(found)


def penalty(
    sae: SparseAutoencoder,
    rows: Float[Tensor, "b d"],
    values: Float[Tensor, " n"],
    pre: Float[Tensor, " n"],
    entries: Entries,
) -> Float[Tensor, ""]:
    """The activation's own penalty, a mean over rows."""
    n = max(1, entries.n_rows)
    match sae.config.activation:
        case Relu():
            return values.sum() / n
        case Gated():
            return pre.relu().sum() / n
        case JumpRelu(bandwidth=bandwidth):
            thresholds = sae.log_threshold.exp().index_select(0, entries.latents)
            return kernels.step(pre.detach(), thresholds, bandwidth).sum() / n
        case TopAfa(paper_code=False):
            norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
            code = afa.code_norms(values, entries, norms)
            return (code - afa.approximate_norms(rows, sae.b_dec)).square().sum() / n
        case TopAfa():
            code = afa.code_norms(values, entries, torch.ones_like(sae.b_enc))
            return (code - torch.linalg.vector_norm(rows, dim=1)).square().sum() / n
        case _:
            return rows.new_zeros(())


def _pre_activations(
    sae: SparseAutoencoder, rows: Tensor, chosen: Chosen, dead: Chosen
) -> tuple[Tensor, Tensor]:
    """Pre-activations of both kinds of entries: one sparse encoder gradient serves both."""
    if not len(dead.values):
        return sae.pre_activations_at(rows, chosen), dead.values
    after = chosen.entries.starts[1:].repeat_interleave(dead.lengths)
    before = dead.entries.starts[:-1].repeat_interleave(chosen.lengths)
    places = torch.arange(len(chosen.values), device=rows.device) + before
    places_dead = torch.arange(len(dead.values), device=rows.device) + after
    merged = torch.empty(len(places) + len(places_dead), dtype=torch.long, device=rows.device)
    known = rows.new_empty(len(merged))
    for where, part in ((places, chosen), (places_dead, dead)):
        merged[where], known[where] = part.latents, part.values
    both = Chosen(values=known, latents=merged, lengths=chosen.lengths + dead.lengths)
    pre = sae.pre_activations_at(rows, both)
    return pre.index_select(0, places), pre.index_select(0, places_dead)


def _strongest(values: Tensor, chosen: Chosen, k: int) -> tuple[Tensor, Chosen]:
    """The first `k` entries of each row, rows being of equal length and sorted."""
    b = len(chosen.lengths)
    first = Chosen(
        values=chosen.values.view(b, -1)[:, :k].reshape(-1),
        latents=chosen.latents.view(b, -1)[:, :k].reshape(-1),
        lengths=chosen.lengths.clamp(max=k),
    )
    return values.view(b, -1)[:, :k].reshape(-1), first


def _by_gates(sae: SparseAutoencoder, gates: Tensor, entries: Entries) -> Tensor:
    """What the gates' positive parts decode to, by a decoder that is held as it is."""
    return kernels.decode(gates, entries, sae.W_dec.detach()) + sae.b_dec.detach()
