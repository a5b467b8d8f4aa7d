"""Sparse arithmetic: what an SAE computes when only `k` of `s` latents of a row are active.

Written densely, a training step costs six matrix products of size `b x d x s`: encoder and decoder,
each forward and twice backward. Only the encoder's forward pass needs all latents (one must see
them to choose the largest). The other five touch `b x k` entries (Gao et al. 2024, arXiv
2406.04093, appendix D). With A the sparse `[b, s]` code matrix and G a gradient `[b, d]`:

1. decode: `A @ W_dec`, a weighted sum of `k` rows of `W_dec` for each row;
2. gradient of `W_dec`: `A^T @ G`, entries sorted by latent so that each decoder row is written
   once;
3. gradient of the codes' values: `G[i] . W_dec[j]` at the active entries `(i, j)` only;
4. gradient of `W_enc`: `P^T @ (x - b_dec)`, where P holds the gradients of the chosen
   pre-activations (TopK and AuxK entries together);
5. gradients of the biases: `b_enc` gets the column sums of P; `b_dec`, through the encoder, gets
   `-W_enc` times those column sums: one matrix-vector product.

Rows may hold different numbers of entries (`saes.types.Entries`): TopK is the case where all hold
`k`. On the CPU the sparse forms go through compressed sparse rows (MKL), on CUDA through Triton
(`saes.kernels_triton`), or cuSPARSE where that is missing; no `[n, d]` array ever exists. Beside
each stands a reference that says the same densely and obviously; tests hold the two equal. Where
the entries are no small part of all `b x s` dense products are faster, and each of the three sparse
products turns into one.

The encoder is stored as `[s, d]` and seen as its transpose `[d, s]`: the gradients of (2) and (4)
come out as `[s, d]`, which is then the layout of both parameters.
"""

import importlib
import importlib.util
import warnings
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from saes import selection_cpu
from saes.types import Entries

DENSE_SHARE = 1 / 12
"""Above this share of active latents the dense form is used: there it overtakes (CPU, d = 576)."""

with warnings.catch_warnings(action="ignore"):
    # torch says once in a process that compressed sparse rows are in beta; let it be here.
    torch.zeros(1, 1).to_sparse_csr()


def decode(
    values: Float[Tensor, " n"], entries: Entries, W_dec: Float[Tensor, "s d"]
) -> Float[Tensor, "b d"]:
    """`A @ W_dec` for the sparse codes A; differentiable in `values` and `W_dec`."""
    return _SparseDecode.apply(values, entries, W_dec)


def pre_activations_at(
    x: Float[Tensor, "b d"],
    centre: Float[Tensor, " d"],
    W_enc: Float[Tensor, "d s"],
    b_enc: Float[Tensor, " s"],
    entries: Entries,
    known: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """The entries of `(x - centre) @ W_enc + b_enc`; differentiable in the first four.

    `known` are these same numbers where the dense forward pass has them already.
    """
    return _SparsePreActivations.apply(x, centre, W_enc, b_enc, entries, known)


def decode_reference(
    values: Float[Tensor, " n"], entries: Entries, W_dec: Float[Tensor, "s d"]
) -> Float[Tensor, "b d"]:
    """`decode` through a dense code matrix."""
    return scattered(values, entries, len(W_dec)) @ W_dec


def pre_activations_at_reference(
    x: Float[Tensor, "b d"],
    centre: Float[Tensor, " d"],
    W_enc: Float[Tensor, "d s"],
    b_enc: Float[Tensor, " s"],
    entries: Entries,
) -> Float[Tensor, " n"]:
    """`pre_activations_at` through all pre-activations."""
    return ((x - centre) @ W_enc + b_enc)[entries.rows, entries.latents]


def scattered(
    values: Float[Tensor, " n"], entries: Entries, n_latents: int
) -> Float[Tensor, "b s"]:
    """The entries as a dense matrix; those in the same place add up."""
    places = entries.rows * n_latents + entries.latents
    flat = values.new_zeros(entries.n_rows * n_latents).index_add(0, places, values)
    return flat.view(entries.n_rows, n_latents)


def triton_for(tensor: Tensor) -> ModuleType | None:
    """`saes.kernels_triton` where the tensor is on a CUDA device and triton is installed."""
    if not tensor.is_cuda or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("saes.kernels_triton")


def is_dense(entries: Entries, n_latents: int) -> bool:
    """Whether so many entries are there that dense products are faster."""
    return len(entries.latents) > DENSE_SHARE * entries.n_rows * n_latents


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, entries: Entries, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.entries = entries
        return weighted_rows(values, entries, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, W_dec = ctx.saved_tensors
        gradient = gradient.contiguous()
        need_values, _, need_W_dec = ctx.needs_input_grad
        return (
            row_products(gradient, W_dec, ctx.entries) if need_values else None,
            None,
            transposed_product(values, ctx.entries, gradient, len(W_dec)) if need_W_dec else None,
        )


class _SparsePreActivations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        centre: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        entries: Entries,
        known: Tensor | None,
    ) -> Tensor:
        centred = x - centre
        ctx.save_for_backward(centred, W_enc)
        ctx.entries = entries
        if known is not None:
            return known.clone()
        return row_products(centred, W_enc.T, entries) + b_enc[entries.latents]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc = ctx.saved_tensors
        entries = ctx.entries
        need_x, need_centre, need_W_enc, _, _, _ = ctx.needs_input_grad
        by_latent = gradient.new_zeros(W_enc.shape[1])
        by_latent.index_add_(0, entries.latents, gradient)
        return (
            weighted_rows(gradient, entries, W_enc.T) if need_x else None,
            -(W_enc @ by_latent) if need_centre else None,
            transposed_product(gradient, entries, centred, len(by_latent)).T
            if need_W_enc
            else None,
            by_latent,
            None,
            None,
        )


def jump(
    pre: Float[Tensor, " n"], thresholds: Float[Tensor, " n"], bandwidth: float
) -> Float[Tensor, " n"]:
    """JumpReLU, `pre` where it exceeds its threshold and 0 elsewhere, with its pseudo-derivative.

    With K the window of width `bandwidth` around a threshold: the gradient to `pre` is that of the
    active entries, the one to a threshold is -threshold / bandwidth inside K (Rajamanoharan et al.
    2024, 2407.14435, section 3).
    """
    return _Jump.apply(pre, thresholds, bandwidth)


def step(
    pre: Float[Tensor, " n"], thresholds: Float[Tensor, " n"], bandwidth: float
) -> Float[Tensor, " n"]:
    """1 where `pre` exceeds its threshold; the gradient to a threshold is -1 / bandwidth inside K.

    Source: as `jump`. `pre` gets no gradient.
    """
    return _Step.apply(pre, thresholds, bandwidth)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, thresholds: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, thresholds)
        ctx.bandwidth = bandwidth
        return torch.where(pre > thresholds, pre, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, thresholds = ctx.saved_tensors
        inside = (pre - thresholds).abs() < ctx.bandwidth / 2
        by_threshold = torch.where(inside, -thresholds / ctx.bandwidth * gradient, 0)
        return torch.where(pre > thresholds, gradient, 0), by_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, thresholds: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, thresholds)
        ctx.bandwidth = bandwidth
        return (pre > thresholds).to(pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        pre, thresholds = ctx.saved_tensors
        inside = (pre - thresholds).abs() < ctx.bandwidth / 2
        return None, torch.where(inside, -gradient / ctx.bandwidth, 0), None


def weighted_rows(
    weights: Float[Tensor, " n"], entries: Entries, W: Float[Tensor, "s d"]
) -> Float[Tensor, "b d"]:
    """`out[i] = sum of weights * W[latent]` over the entries of row i."""
    if not len(entries.latents):
        return W.new_zeros(entries.n_rows, W.shape[1])
    if is_dense(entries, len(W)):
        return scattered(weights, entries, len(W)) @ W
    if (triton := triton_for(W)) is not None:
        return triton.weighted_rows(weights, entries.latents, entries.starts, W)
    return functional.embedding_bag(
        entries.latents, W, entries.starts,
        per_sample_weights=weights, mode="sum", include_last_offset=True,
    )  # fmt: skip


def row_products(
    rows: Float[Tensor, "b d"], W: Float[Tensor, "s d"], entries: Entries
) -> Float[Tensor, " n"]:
    """`rows[i] . W[latent]` at every entry of row i."""
    n = len(entries.latents)
    if not n:
        return rows.new_zeros(0)
    if is_dense(entries, len(W)):
        return (rows @ W.T).view(-1).index_select(0, entries.rows * len(W) + entries.latents)
    if (triton := triton_for(W)) is not None:
        return triton.row_products(rows, W, entries.latents, entries.starts)
    wanted = torch.sparse_csr_tensor(
        entries.starts.int(), entries.latents.int(), rows.new_zeros(n), (len(rows), len(W)),
        check_invariants=False,
    )  # fmt: skip
    return torch.sparse.sampled_addmm(wanted, rows, W.T, beta=0.0).values()


def transposed_product(
    weights: Float[Tensor, " n"],
    entries: Entries,
    rows: Float[Tensor, "b d"],
    n_latents: int,
) -> Float[Tensor, "s d"]:
    """`out[l] = sum of weights * rows[i]` over the entries of latent l, i being their row."""
    if not len(entries.latents):
        return rows.new_zeros(n_latents, rows.shape[1])
    if is_dense(entries, n_latents):
        return scattered(weights, entries, n_latents).T @ rows
    starts, owners, order = by_latent(entries, n_latents)
    if (triton := triton_for(rows)) is not None:
        return triton.weighted_rows(weights.index_select(0, order), owners, starts, rows)
    matrix = torch.sparse_csr_tensor(
        starts, owners, weights.index_select(0, order), (n_latents, len(rows)),
        check_invariants=False,
    )  # fmt: skip
    # With beta = 0 the empty memory is written, never read; `matrix @ rows` would fill and copy it.
    return rows.new_empty(n_latents, rows.shape[1]).addmm_(matrix, rows, beta=0.0)


def by_latent(
    entries: Entries, n_latents: int
) -> tuple[Int[Tensor, " s_1"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The entries latent by latent: where each latent begins, the rows, the entries' numbers."""
    if entries.latents.device.type == "cpu":
        return selection_cpu.by_latent(entries, n_latents)
    return by_latent_reference(entries, n_latents)


def by_latent_reference(
    entries: Entries, n_latents: int
) -> tuple[Int[Tensor, " s_1"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """`by_latent` with a stable sort."""
    order = torch.sort(entries.latents, stable=True).indices
    starts = torch.zeros(n_latents + 1, dtype=torch.int32, device=order.device)
    starts[1:] = torch.bincount(entries.latents, minlength=n_latents).cumsum(0)
    return starts, entries.rows[order].int(), order
