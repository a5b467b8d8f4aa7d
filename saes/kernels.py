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

The sparse forms go through compressed sparse rows (MKL on the CPU, cuSPARSE on CUDA); no `[b, k,
d]` array ever exists. Beside each stands a reference that says the same densely and obviously;
tests hold the two equal, and where `k` is no small part of `s` the dense form is faster and is
used.

The encoder is stored as `[s, d]` and seen as its transpose `[d, s]`: the gradients of (2) and (4)
come out as `[s, d]`, which is then the layout of both parameters.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

DENSE_SHARE = 1 / 12
"""Above this share of active latents the dense form is used: there it overtakes (CPU, d = 576)."""

with warnings.catch_warnings(action="ignore"):
    # torch says once in a process that compressed sparse rows are in beta; let it be here.
    torch.zeros(1, 1).to_sparse_csr()


def decode(
    values: Float[Tensor, "b k"], indices: Int[Tensor, "b k"], W_dec: Float[Tensor, "s d"]
) -> Float[Tensor, "b d"]:
    """`A @ W_dec` for the sparse codes A; differentiable in `values` and `W_dec`."""
    if indices.shape[1] > DENSE_SHARE * len(W_dec):
        return decode_reference(values, indices, W_dec)
    return _SparseDecode.apply(values, indices, W_dec)


def pre_activations_at(
    x: Float[Tensor, "b d"],
    b_dec: Float[Tensor, " d"],
    W_enc: Float[Tensor, "d s"],
    b_enc: Float[Tensor, " s"],
    indices: Int[Tensor, "b k"],
    known: Float[Tensor, "b k"] | None = None,
) -> Float[Tensor, "b k"]:
    """The entries of `(x - b_dec) @ W_enc + b_enc` at `indices`; differentiable in the first four.

    `known` are these same numbers where the dense forward pass has them already.
    """
    if indices.shape[1] > DENSE_SHARE * len(b_enc):
        return pre_activations_at_reference(x, b_dec, W_enc, b_enc, indices)
    return _SparsePreActivations.apply(x, b_dec, W_enc, b_enc, indices, known)


def decode_reference(
    values: Float[Tensor, "b k"], indices: Int[Tensor, "b k"], W_dec: Float[Tensor, "s d"]
) -> Float[Tensor, "b d"]:
    """`decode` through a dense code matrix."""
    codes = values.new_zeros(len(values), len(W_dec)).scatter_add(1, indices, values)
    return codes @ W_dec


def pre_activations_at_reference(
    x: Float[Tensor, "b d"],
    b_dec: Float[Tensor, " d"],
    W_enc: Float[Tensor, "d s"],
    b_enc: Float[Tensor, " s"],
    indices: Int[Tensor, "b k"],
) -> Float[Tensor, "b k"]:
    """`pre_activations_at` through all pre-activations."""
    return ((x - b_dec) @ W_enc + b_enc).gather(1, indices)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        return weighted_rows(values, indices, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, indices, W_dec = ctx.saved_tensors
        gradient = gradient.contiguous()
        need_values, _, need_W_dec = ctx.needs_input_grad
        return (
            row_products(gradient, W_dec, indices) if need_values else None,
            None,
            transposed_product(values, indices, gradient, len(W_dec)) if need_W_dec else None,
        )


class _SparsePreActivations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        b_dec: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        indices: Tensor,
        known: Tensor | None,
    ) -> Tensor:
        centred = x - b_dec
        ctx.save_for_backward(centred, W_enc, indices)
        if known is not None:
            return known.clone()
        return row_products(centred, W_enc.T, indices) + b_enc[indices]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc, indices = ctx.saved_tensors
        need_x, need_b_dec, need_W_enc, _, _, _ = ctx.needs_input_grad
        by_latent = gradient.new_zeros(W_enc.shape[1])
        by_latent.index_add_(0, indices.flatten(), gradient.flatten())
        return (
            weighted_rows(gradient, indices, W_enc.T) if need_x else None,
            -(W_enc @ by_latent) if need_b_dec else None,
            transposed_product(gradient, indices, centred, len(by_latent)).T
            if need_W_enc
            else None,
            by_latent,
            None,
            None,
        )


def weighted_rows(
    weights: Float[Tensor, "b k"], indices: Int[Tensor, "b k"], W: Float[Tensor, "s d"]
) -> Float[Tensor, "b d"]:
    """`out[i] = sum_j weights[i, j] * W[indices[i, j]]`."""
    if not indices.numel():
        return W.new_zeros(len(indices), W.shape[1])
    return functional.embedding_bag(indices, W, per_sample_weights=weights, mode="sum")


def row_products(
    rows: Float[Tensor, "b d"], W: Float[Tensor, "s d"], indices: Int[Tensor, "b k"]
) -> Float[Tensor, "b k"]:
    """`out[i, j] = rows[i] . W[indices[i, j]]`."""
    b, k = indices.shape
    if not indices.numel():
        return rows.new_zeros(b, k)
    starts = torch.arange(0, b * k + 1, k, dtype=torch.int32, device=rows.device)
    zeros = rows.new_zeros(b * k)
    columns = indices.flatten().int()
    wanted = torch.sparse_csr_tensor(starts, columns, zeros, (b, len(W)), check_invariants=False)
    return torch.sparse.sampled_addmm(wanted, rows, W.T, beta=0.0).values().view(b, k)


def transposed_product(
    weights: Float[Tensor, "b k"],
    indices: Int[Tensor, "b k"],
    rows: Float[Tensor, "b d"],
    n_latents: int,
) -> Float[Tensor, "s d"]:
    """`out[l] = sum of weights[i, j] * rows[i]` over the entries where `indices[i, j] == l`."""
    b, k = indices.shape
    if not indices.numel():
        return rows.new_zeros(n_latents, rows.shape[1])
    latents = indices.flatten().int()
    order = torch.sort(latents, stable=True).indices
    starts = torch.zeros(n_latents + 1, dtype=torch.int32, device=rows.device)
    starts[1:] = torch.bincount(latents, minlength=n_latents).cumsum(0)
    owners = torch.div(order, k, rounding_mode="floor").int()
    weights = weights.flatten()[order]
    matrix = torch.sparse_csr_tensor(
        starts, owners, weights, (n_latents, b), check_invariants=False
    )
    # With beta = 0 the empty memory is written, never read; `matrix @ rows` would fill and copy it.
    return rows.new_empty(n_latents, rows.shape[1]).addmm_(matrix, rows, beta=0.0)
