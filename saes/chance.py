"""Directions of chance, to hold a dictionary's own against.

Two kinds, both of unit length. `isotropic` directions know nothing of the dictionary. `shaped` ones
share its mean and its covariance: what a dictionary owes only to the few dimensions that its data
fill is in them too, so they are the harder control.

They are drawn with NumPy's generator, not with PyTorch's: an SAE's training starts from PyTorch's
draws, so a control drawn there with the same seed would be the dictionary's own beginning, which
its latents still remember.
"""

import numpy as np
from jaxtyping import Float


def isotropic(n: int, d: int, seed: int) -> Float[np.ndarray, "n d"]:
    """`n` random unit vectors of width `d`, float32."""
    return unit(np.random.default_rng([seed, 0]).standard_normal((n, d)))


def shaped(rows: Float[np.ndarray, "n d"], seed: int) -> Float[np.ndarray, "n d"]:
    """As many random unit vectors as there are rows, Gaussian with their mean and covariance."""
    mean = rows.mean(0, dtype=np.float64)
    centred = rows - mean
    variances, axes = np.linalg.eigh(centred.T @ centred / len(rows))
    drawn = np.random.default_rng([seed, 1]).standard_normal(rows.shape)
    return unit(mean + (drawn * np.sqrt(variances.clip(0))) @ axes.T)


def unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows at unit length, float32; a row of zeros stays one."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
