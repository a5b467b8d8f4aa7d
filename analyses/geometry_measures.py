"""The shape of a cloud of activations, as a few numbers.

With rows x_i, centred to c_i, and s_j the singular values of the centred matrix:

- effective rank: exp of the entropy of s_j / sum s (Roy and Vetterli 2007), 1 up to the width;
- participation ratio: (sum s^2)^2 / sum s^4, the same for a spectrum of variances;
- anisotropy: mean cosine of two different rows, 0 for directions drawn evenly (Ethayarajh 2019,
  arXiv 1909.00512), once as the rows are and once centred;
- collisions: the share of rows whose nearest other row is equal bit for bit in a number format, and
  the median distance to the nearest other row, over the median distance of two rows;
- CKA of two sets of readings of the same rows (Kornblith et al. 2019, arXiv 1905.00414), linear
  kernel, with the unbiased estimate of HSIC (Song et al. 2012), which does not grow with the width
  over the number of rows: 1 for the same up to rotation and scale, about 0 for unrelated ones.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ROWS_AT_ONCE = 1024
"""Rows whose distances to all others are held in memory together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The numbers of one cloud of n rows."""

    rows: int
    """Rows looked at."""
    effective_rank: float
    """exp of the entropy of the singular values."""
    participation_ratio: float
    """Of the variances."""
    anisotropy: float
    """Mean cosine of two rows."""
    anisotropy_centred: float
    """The same about the mean row."""
    collisions: float
    """Share of rows that another is equal to in bfloat16."""
    nearest: float
    """Median distance to the nearest other row, over that of two rows."""


def geometry(x: Float[Tensor, "n d"]) -> Geometry:
    """The geometry of rows. Raises `ValueError` where there are fewer than three or none differ."""
    x = x.double()
    if len(x) < 3:
        raise ValueError(f"three rows or more were wanted, got {len(x)}.")
    centred = x - x.mean(0)
    singular = torch.linalg.svdvals(centred)
    if not float(singular.sum()) > 0:
        raise ValueError("all rows are the same, so they have no shape.")
    share = singular / singular.sum()
    variances = singular.square()
    nearest, median = nearest_distances(x)
    return Geometry(
        rows=len(x),
        effective_rank=float(torch.special.entr(share).sum().exp()),
        participation_ratio=float(variances.sum().square() / variances.square().sum()),
        anisotropy=mean_cosine(x),
        anisotropy_centred=mean_cosine(centred),
        collisions=collision_share(x),
        nearest=float(nearest.median() / median) if median > 0 else 0.0,
    )


def mean_cosine(x: Float[Tensor, "n d"]) -> float:
    """Mean cosine of two different rows; rows of length 0 are left out."""
    lengths = x.norm(dim=-1, keepdim=True)
    unit = (x / lengths)[lengths[:, 0] > 0]
    n = len(unit)
    return float((unit.sum(0).square().sum() - n) / (n * (n - 1)))


def collision_share(x: Float[Tensor, "n d"], dtype: torch.dtype = torch.bfloat16) -> float:
    """Share of rows that another row is equal to, bit for bit, in a number format."""
    _, counts = torch.unique(x.to(dtype).float(), dim=0, return_counts=True)
    return float(counts[counts > 1].sum()) / len(x)


def nearest_distances(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], float]:
    """Each row's distance to its nearest other row, and the median distance of two rows."""
    nearest, sample = torch.empty(len(x), dtype=x.dtype), []
    for start in range(0, len(x), ROWS_AT_ONCE):
        part = torch.cdist(x[start : start + ROWS_AT_ONCE], x)
        others = torch.arange(len(part)), torch.arange(start, start + len(part))
        part[others] = torch.inf
        nearest[start : start + len(part)] = part.amin(1)
        sample.append(part[torch.isfinite(part)])
    return nearest, float(torch.cat(sample).median())


def cka(x: Float[Tensor, "n d"], y: Float[Tensor, "n e"]) -> float:
    """Linear CKA of two readings of the same n rows, unbiased.

    Raises `ValueError` where there are fewer than four.
    """
    if len(x) < 4:
        raise ValueError(f"four rows or more were wanted, got {len(x)}.")
    k, m = (_gram(part) for part in (x, y))
    both, own, other = _hsic(k, m), _hsic(k, k), _hsic(m, m)
    return both / (own * other) ** 0.5 if own > 0 and other > 0 else 0.0


def _gram(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Products of all pairs of centred rows, the diagonal left out."""
    centred = x.double() - x.double().mean(0)
    return (centred @ centred.T).fill_diagonal_(0.0)


def _hsic(k: Float[Tensor, "n n"], m: Float[Tensor, "n n"]) -> float:
    """The unbiased estimate of HSIC, up to a factor that CKA loses (Song et al. 2012, eq. 5)."""
    n = len(k)
    trace = (k * m).sum()
    sums = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return float(trace + sums - 2 * (k.sum(0) @ m.sum(0)) / (n - 2))
