"""Two dictionaries side by side, and one with itself.

**Matching**: each latent of the smaller dictionary gets one of its own in the other so that the sum
of |cos| between decoder rows is largest (Hungarian method; Paulo and Belrose 2025, 2501.16615,
compare seeds so). Absolute cosines, so that a direction found with the other sign counts; the share
of such pairs is given. Beyond `HUNGARIAN_LIMIT` latents, where the method's cubic time is too long,
mutual nearest neighbours stand in: pairs that are each other's nearest, fewer pairs and a higher
mean cosine, so the two methods' numbers must not be compared.

**Coherence**: the largest |cos| between different rows of one dictionary, and each row's largest,
averaged. The Welch bound sqrt((s - d) / (d (s - 1))) is the least that the largest can be for s
unit vectors in d dimensions (0 where s <= d).

Products are made in blocks; coherence never holds a matrix [s, s]. The control of both is random
unit vectors of the same number: in d dimensions chance cosines are of the order of 1 / sqrt(d), and
the best of thousands several times that.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from probe.errors import UserError
from saes.feature_weights import unit_rows

Method = Literal["hungarian", "mutual nearest neighbours"]

HUNGARIAN_LIMIT = 16_384
"""Latents of the larger dictionary up to which pairs are assigned optimally."""
BLOCK_BYTES = 2**26
"""Size of one block of cosines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """Pairs of latents, and how alike they are."""

    method: Method
    """How they were found."""
    first: Int[Tensor, " n"]
    """Latents of the first dictionary."""
    second: Int[Tensor, " n"]
    """Their partners in the second."""
    cosines: Float[Tensor, " n"]
    """Cosine of each pair, with its sign."""
    n_first: int
    """Latents of the first dictionary, with zero decoder rows left out."""
    n_second: int
    """Latents of the second, likewise."""
    nearest: Float[Tensor, " s"]
    """Largest |cos| of each latent of the first with any of the second."""

    def summary(self) -> dict[str, Any]:
        """The numbers of a report; shares are of the smaller dictionary's latents."""
        size = self.cosines.abs()
        smaller = min(self.n_first, self.n_second)
        return {
            "method": self.method,
            "n_pairs": len(size),
            "mean_cosine": float(size.mean()) if len(size) else float("nan"),
            "median_cosine": float(size.median()) if len(size) else float("nan"),
            "share_above_0.7": int((size > 0.7).sum()) / smaller,
            "share_above_0.9": int((size > 0.9).sum()) / smaller,
            "share_opposite": int((self.cosines < 0).sum()) / max(len(size), 1),
            "mean_nearest": float(self.nearest.mean()),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Coherence:
    """How alike a dictionary's own directions are."""

    max_cosine: float
    """Largest |cos| of two different latents: the dictionary's mutual coherence."""
    nearest: Float[Tensor, " s"]
    """Each latent's largest |cos| with another."""
    welch_bound: float
    """The least that `max_cosine` can be."""

    @property
    def mean_nearest(self) -> float:
        """Mean of `nearest`."""
        return float(self.nearest.mean())


def match_decoders(
    first: Float[Tensor, "s1 d1"], second: Float[Tensor, "s2 d2"], *, limit: int = HUNGARIAN_LIMIT
) -> Matching:
    """Pair the decoder rows of two dictionaries; rows of zeros are left out.

    Raises `UserError` where the widths differ or a dictionary has no row that is not zero.
    """
    if first.shape[1] != second.shape[1]:
        raise UserError(
            f"the two dictionaries have directions of width {first.shape[1]} and "
            f"{second.shape[1]}; only dictionaries of one site, or of layers of one width, can be "
            "matched."
        )
    rows = [unit_rows(matrix).cpu() for matrix in (first, second)]
    kept = [matrix.norm(dim=1).nonzero().squeeze(1) for matrix in rows]
    if not all(len(numbers) for numbers in kept):
        raise UserError("a dictionary's decoder is all zeros; train it before matching it.")
    a, b = (matrix[numbers] for matrix, numbers in zip(rows, kept, strict=True))
    small = max(len(a), len(b)) <= limit
    i, j, nearest = (_assigned if small else _mutual)(a, b)
    return Matching(
        method="hungarian" if small else "mutual nearest neighbours",
        first=kept[0][i],
        second=kept[1][j],
        cosines=(a[i] * b[j]).sum(1),
        n_first=len(a),
        n_second=len(b),
        nearest=nearest,
    )


def _assigned(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]
) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"], Float[Tensor, " n"]]:
    """The pairs of the largest sum of |cos|, and each row's largest."""
    size = np.empty((len(a), len(b)), np.float32)
    for start, block in _blocks(a, b):
        size[start : start + len(block)] = block.numpy()
    nearest = torch.from_numpy(size.max(1))
    i, j = linear_sum_assignment(size, maximize=True)
    return torch.from_numpy(i), torch.from_numpy(j), nearest


def _mutual(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]
) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"], Float[Tensor, " n"]]:
    """The pairs that are each other's nearest, and each row's largest |cos|."""
    values, there, back_values = [], [], torch.full((len(b),), -1.0)
    back = torch.zeros(len(b), dtype=torch.long)
    for start, block in _blocks(a, b):
        best = block.max(1)
        values.append(best.values)
        there.append(best.indices)
        column = block.max(0)
        better = column.values > back_values
        back_values = torch.where(better, column.values, back_values)
        back = torch.where(better, column.indices + start, back)
    forward = torch.cat(there)
    i = torch.arange(len(a))
    mutual = back[forward] == i
    return i[mutual], forward[mutual], torch.cat(values)


def _blocks(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]
) -> Iterator[tuple[int, Float[Tensor, "r m"]]]:
    """|cos| of some rows of `a` with all of `b`, and the number of the first of them."""
    size = max(1, BLOCK_BYTES // (4 * len(b)))
    for start in range(0, len(a), size):
        yield start, (a[start : start + size] @ b.T).abs().clamp_(max=1)


def coherence(directions: Float[Tensor, "s d"]) -> Coherence:
    """Mutual coherence of a dictionary; rows of zeros are left out.

    Raises `UserError` for fewer than two rows that are not zero.
    """
    rows = unit_rows(directions).cpu()
    rows = rows[rows.norm(dim=1) > 0]
    s, d = rows.shape
    if s < 2:
        raise UserError("coherence compares two latents or more; give a larger dictionary.")
    nearest = []
    for start, block in _blocks(rows, rows):
        itself = torch.arange(len(block))
        block[itself, itself + start] = 0
        nearest.append(block.max(1).values)
    found = torch.cat(nearest)
    bound = math.sqrt((s - d) / (d * (s - 1))) if s > d else 0.0
    return Coherence(max_cosine=float(found.max()), nearest=found, welch_bound=bound)


def random_directions(s: int, d: int, seed: int) -> Float[Tensor, "s d"]:
    """Random unit vectors: the control."""
    drawn = torch.randn(s, d, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=1, keepdim=True)
