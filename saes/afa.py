"""Approximate feature activation: what the norm of an input says of the norm of its code.

Lee, Davies, Canby and Hockenmaier 2025 (2503.24277). Where z = W f with unit columns whose inner
products are at most eps in size, ||z||^2 = ||f||^2 + sum_{i != j} f_i f_j w_i . w_j, so

    ||z||^2 / (1 + eps m) <= ||f||^2 <= ||z||^2 / (1 - eps m)        (the right side for eps m < 1)

with m = h - 1 for h features; the same with m = L0 - 1, and with m = |f|_1^2 / |f|_2^2 - 1, both
tighter and just as free (Cauchy and Schwarz on the support; the triangle inequality). Hence ||z||
approximates ||f||.

One function each gives the two norms, and everything uses them: the code's, scaled by the decoder
rows' norms (`code_norms`), and the input's, centred on the decoder's bias (`approximate_norms`).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saes.types import Entries

TINY = 1e-12
"""Under the square root, so that the gradient of a row without active latents is 0."""


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
