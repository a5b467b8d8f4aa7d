"""The sparse products and top-AFA's selection as Triton kernels, for CUDA.

`saes.kernels` and `saes.selection` say what each computes; these are their form on a GPU, one
program a row (and a stretch of columns), nothing in memory but inputs and outputs. The gradient of
a decoder row is the same sum as a decoded row, over entries sorted by latent: one kernel is both.

Top-AFA without a sort: with c the squared scaled codes of a row, S(t) the sum of all c >= t is a
falling staircase, and bit patterns of positive floats are ordered as the floats are. Thirty-one
halvings find the largest t with S(t) >= target^2: the code with which the target is reached. The
nearest norm is then that with some number of the codes equal to t added to those above it.

Triton is part of torch's CUDA builds. With TRITON_INTERPRET=1 the same kernels run on a CPU, if
slowly, so that they can be tested without a GPU.
"""
# Triton is no dependency: without a CUDA build of torch this module is never imported.
# pyright: reportMissingImports=false

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

COLUMNS = 256
"""Columns that one program sums; a power of two."""


@functools.cache
def kernel(program: Callable[..., None]) -> Any:
    """A function of this module as a Triton kernel, freed of what checks its arguments in tests."""
    return triton.jit(inspect.unwrap(program))


def weighted_rows(
    weights: Float[Tensor, " n"],
    latents: Int[Tensor, " n"],
    starts: Int[Tensor, " b_1"],
    W: Float[Tensor, "s d"],
) -> Float[Tensor, "b d"]:
    """`out[i] = sum of weights * W[latent]` over the entries `starts[i]` to `starts[i + 1]`."""
    b, d = len(starts) - 1, W.shape[1]
    out = W.new_empty(b, d)
    if b:
        grid = (b, triton.cdiv(d, COLUMNS))
        kernel(_weighted_rows)[grid](weights, latents, starts, W.contiguous(), out, d, COLUMNS)
    return out


def _weighted_rows(weights, latents, starts, W, out, d, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    total = tl.zeros([COLUMNS], tl.float32)
    for entry in range(tl.load(starts + row), tl.load(starts + row + 1)):
        latent = tl.load(latents + entry).to(tl.int64)
        total += tl.load(weights + entry) * tl.load(W + latent * d + columns, inside, 0.0)
    tl.store(out + row * d + columns, total, inside)


def row_products(
    rows: Float[Tensor, "b d"],
    W: Float[Tensor, "s d"],
    latents: Int[Tensor, " n"],
    starts: Int[Tensor, " b_1"],
) -> Float[Tensor, " n"]:
    """`rows[i] . W[latent]` at every entry of row i."""
    out = rows.new_empty(len(latents))
    if len(latents):
        d = rows.shape[1]
        width = triton.next_power_of_2(d)
        kernel(_row_products)[(len(rows),)](
            rows.contiguous(), W.contiguous(), latents, starts, out, d, width
        )
    return out


def _row_products(rows, W, latents, starts, out, d, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < d
    x = tl.load(rows + row * d + columns, inside, 0.0)
    for entry in range(tl.load(starts + row), tl.load(starts + row + 1)):
        latent = tl.load(latents + entry).to(tl.int64)
        w = tl.load(W + latent * d + columns, inside, 0.0)
        tl.store(out + entry, tl.sum(x * w))


def nearest_norm_mask(
    pre: Float[Tensor, "b s"], norms: Float[Tensor, " s"], target: Float[Tensor, " b"]
) -> Bool[Tensor, "b s"]:
    """Where top-AFA's entries are: see `saes.selection.nearest_norm`."""
    b, s = pre.shape
    kept = torch.zeros(b, s, dtype=torch.int8, device=pre.device)
    if b:
        width = triton.next_power_of_2(s)
        kernel(_nearest_norm)[(b,)](
            pre.contiguous(), norms.contiguous(), target.double().contiguous(), kept, s, width
        )
    return kept.bool()


def _nearest_norm(pre, norms, target, kept, s, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    latents = tl.arange(0, WIDTH)
    inside = latents < s
    codes = tl.maximum(tl.load(pre + row * s + latents, inside, 0.0), 0.0)
    scaled = codes * tl.load(norms + latents, inside, 0.0)
    squares = scaled * scaled
    patterns = squares.to(tl.int32, bitcast=True)
    exact = squares.to(tl.float64)
    goal = tl.load(target + row)

    # The largest pattern whose codes and all above them reach the target; 0 where none does.
    reached = tl.zeros([], tl.int32)
    for i in range(31):
        tried = reached + (1 << (30 - i))
        total = tl.sum(tl.where(patterns >= tried, exact, 0.0))
        if (total > 0.0) & (total >= goal * goal):
            reached = tried
    above = tl.sum(tl.where(patterns > reached, exact, 0.0))
    level = tl.where(patterns == reached, exact, 0.0)
    value = tl.max(level)

    # How many of the codes equal to it: the first number whose norm is nearest to the target.
    tied = (patterns == reached) & (reached > 0)
    number = tl.cumsum(tied.to(tl.int32), 0)
    gaps = tl.abs(tl.sqrt(above + number.to(tl.float64) * value) - goal)
    least = tl.min(tl.where(tied, gaps, float("inf")))
    gap_before = tl.abs(tl.sqrt(above) - goal)
    first = tl.min(tl.where(tied & (gaps == least), number, WIDTH + 1))
    taken = tl.where((gap_before <= least) & (above > 0.0), 0, first)
    chosen = (patterns > reached) | (tied & (number <= taken))
    tl.store(kept + row * s + latents, chosen.to(tl.int8), inside)
