"""Whatever writes an activation as a few numbers times fixed directions: the SAE and its rivals.

    x ~ offset + sum_i f_i(x) d_i

Probing, absorption and perturbation ask only for the codes f and the directions d, so they treat
alike

- the SAE, f being its codes (times each row's deviation where it normalises rows: f_i d_i is then
  what latent i adds to the reconstruction in the input's own units),
- the residual channels, d the unit vectors: no dictionary at all,
- PCA, d the principal axes of the training texts' rows,
- a random dictionary of the SAE's size and L0 (`saes.baselines`),
- linear probes, d their normals: what a label itself finds, given to nobody else.

All but the SAE code for what a row has beyond the mean row of the training texts, so that to take
one of their latents out is to set it to its mean.

A text's codes are the means of its rows' codes. Decoding is linear, so taking latents S out of
every row's code and adding back what the SAE misses changes the text's mean row by exactly
-sum_{i in S} mean(f_i) d_i: pooled codes are all that an ablation needs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

from probe.errors import Failure, UserError
from saes.baselines import fit_principal_axes, random_dictionary_candidate
from saes.matching import random_directions
from saes.models import SparseAutoencoder
from saes.tasks import TaskData
from saes.types import Codes

ROWS_AT_ONCE = 8192
"""Rows that are encoded together, about."""
N_SAMPLE_ROWS = 4096
"""Rows that the random dictionary's scale is fitted on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dictionary:
    """Directions, and the codes of activations in them."""

    name: str
    """Its name in results."""
    label: str
    """Its name for people."""
    directions: Float[Tensor, "s d"]
    """What one unit of each latent adds to the reconstruction."""
    encode: Callable[[Float[Tensor, "b d"]], Codes]
    """Codes of float32 rows; they may be negative."""
    linear: bool = False
    """Whether the code of a mean row is the mean of the rows' codes."""


def sae_dictionary(
    sae: SparseAutoencoder, name: str = "sae", label: str = "SAE latents"
) -> Dictionary:
    """An SAE's latents."""

    def encode(x: Float[Tensor, "b d"]) -> Codes:
        codes = sae.encode(x)
        if sae.config.normalize == "none":
            return codes
        return Codes(values=codes.values * x.std(-1, keepdim=True), indices=codes.indices)

    return Dictionary(name=name, label=label, directions=sae.W_dec.detach(), encode=encode)


def axes_dictionary(
    name: str, label: str, directions: Float[Tensor, "s d"], centre: Float[Tensor, " d"]
) -> Dictionary:
    """Unit directions, all of them active in every row: `f = (x - centre) D^T`."""

    def encode(x: Float[Tensor, "b d"]) -> Codes:
        indices = torch.arange(len(directions), device=x.device).expand(len(x), -1)
        return Codes(values=(x - centre) @ directions.T, indices=indices)

    return Dictionary(name=name, label=label, directions=directions, encode=encode, linear=True)


def channel_dictionary(data: TaskData) -> Dictionary:
    """The residual channels themselves."""
    d = data.rows.shape[1]
    return axes_dictionary("channels", "residual channels", torch.eye(d), mean_row(data))


def pca_dictionary(data: TaskData) -> Dictionary:
    """All principal axes of the training texts' rows, that of the largest variance first."""
    fitted = fit_principal_axes(training_rows(data).split(ROWS_AT_ONCE), mean_row(data))
    axes = fitted.axes.T.float().contiguous()
    return axes_dictionary("pca", "PCA components", axes, fitted.mean.float())


def probe_dictionary(data: TaskData, weights: Float[np.ndarray, "c d"]) -> Dictionary:
    """The unit normals of linear probes of these weights."""
    normals = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    directions = torch.from_numpy(normals).float()
    return axes_dictionary("probe", "the probe's own direction", directions, mean_row(data))


def random_dictionary(data: TaskData, d_sae: int, k: int, seed: int) -> Dictionary:
    """`d_sae` random directions, the `k` best aligned of which code for a row.

    The codes are those of `saes.baselines.random_dictionary_candidate`, whose one scale is fitted
    by least squares on training rows.
    """
    training = training_rows(data)
    sample = training[:: max(1, len(training) // N_SAMPLE_ROWS)].float()
    candidate = random_dictionary_candidate(sample, mean_row(data), d_sae, k, seed)
    return Dictionary(
        name=candidate.name,
        label=candidate.label,
        directions=random_directions(d_sae, sample.shape[1], seed),
        encode=lambda x: candidate.reconstruct(x).codes,
    )


def training_rows(data: TaskData) -> Float[Tensor, "n d"]:
    """The rows of the training texts."""
    return data.rows[~data.test[data.text]]


def mean_row(data: TaskData) -> Float[Tensor, " d"]:
    """The mean of the training texts' rows."""
    training = training_rows(data)
    total = torch.zeros(training.shape[1], dtype=torch.float64)
    for part in training.split(ROWS_AT_ONCE):
        total += part.double().sum(0)
    return (total / len(training)).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledCodes:
    """Each text's codes in a dictionary, averaged over its rows."""

    dictionary: Dictionary
    """The dictionary."""
    codes: sparse.csr_array
    """Codes [m, s]."""
    l0: float
    """Mean number of active latents of a row."""

    def columns(self, latents: list[int]) -> Float[np.ndarray, "m k"]:
        """The codes of some latents, dense."""
        return self.codes[:, latents].toarray().astype(np.float64)


@torch.no_grad()
def pool_codes(dictionary: Dictionary, data: TaskData) -> PooledCodes:
    """Encode every row and average over each text.

    Raises:
        UserError: the rows have another width than the directions.
        Failure: a code is not finite.
    """
    s, d = dictionary.directions.shape
    if data.rows.shape[1] != d:
        raise UserError(
            f"{dictionary.label} has directions of width {d} and the activations have width "
            f"{data.rows.shape[1]}; give an SAE that was trained at the same site."
        )
    if dictionary.linear:
        values = dictionary.encode(data.pooled()).values.numpy()
        l0 = float((values != 0).sum(1).mean())
        return PooledCodes(dictionary=dictionary, codes=sparse.csr_array(values), l0=l0)
    counts = torch.bincount(data.text, minlength=data.n_texts)
    ends = counts.cumsum(0)
    parts, n_active, first = [], 0, 0
    while first < data.n_texts:
        done = int(ends[first - 1]) if first else 0
        after = int(torch.searchsorted(ends, done + ROWS_AT_ONCE, right=True))
        after = max(after, first + 1)
        rows = slice(done, int(ends[after - 1]))
        x = data.rows[rows].float().to(dictionary.directions.device)
        codes = dictionary.encode(x)
        weights = codes.values.cpu() / counts[data.text[rows]][:, None]
        if not bool(weights.isfinite().all()):
            raise Failure(f"{dictionary.label} gives NaN or infinity; train it again.")
        n_active += int((weights != 0).sum())
        text = (data.text[rows] - first)[:, None].expand_as(weights)
        parts.append(_summed(weights, text, codes.indices.cpu(), (after - first, s)))
        first = after
    codes = sparse.csr_array(sparse.vstack(parts, "csr"))
    return PooledCodes(dictionary=dictionary, codes=codes, l0=n_active / len(data.rows))


def _summed(
    values: Float[Tensor, "b k"], text: Tensor, latents: Tensor, shape: tuple[int, int]
) -> sparse.csr_array:
    """A sparse matrix of the values, those at one place added up; zeros left out."""
    active = values != 0
    places = (text[active].numpy(), latents[active].numpy())
    return sparse.coo_array((values[active].numpy(), places), shape=shape).tocsr()
