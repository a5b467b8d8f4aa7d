"""What a feature's weights alone say: near decoder directions, and the direct effect on the logits.

Decoder neighbours are by cosine between rows of `W_dec` (Bricken et al. 2023, "Towards
Monosemanticity", compare features so). The direct logit effect of feature `f` on token `v` is

    effect[f, v] = W_dec[f] . (U[:, v] - mean_u U[:, u])

with `U` the unembedding, the final norm's gain folded into it: what one unit of the code adds to
the logit of `v` above what it adds to the average token, all later layers and the final norm's
scale left out ("logit lens"). Centring over the vocabulary changes no probability, since a softmax
ignores a constant. Both are computed some hundreds of features at a time.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

CHUNK_BYTES = 2**26
"""Size of one block of cosines or logits, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """The nearest decoder directions of every feature, nearest first, itself left out."""

    features: Int[Tensor, "s n"]
    """Numbers of the neighbours."""
    cosines: Float[Tensor, "s n"]
    """Cosines between the decoder rows; 0 where one of them is zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitEffects:
    """The tokens at both ends of every feature's direct effect on the logits."""

    positive_tokens: Int[Tensor, "s n"]
    """Tokens it raises most, most first."""
    positive: Float[Tensor, "s n"]
    """Their effect, in logits per unit of the code."""
    negative_tokens: Int[Tensor, "s n"]
    """Tokens it lowers most, most first."""
    negative: Float[Tensor, "s n"]
    """Their effect, in logits per unit of the code."""


def decoder_neighbours(W_dec: Float[Tensor, "s d"], n: int, *, progress: bool = False) -> Nearest:
    """The `n` nearest decoder directions of each feature (fewer where there are not so many)."""
    rows = unit_rows(W_dec)
    n = min(n, len(rows) - 1)
    features, cosines = [], []
    for start in _chunks(len(rows), len(rows), "neighbours", progress):
        block = rows[start : start + _chunk_rows(len(rows))] @ rows.T
        itself = torch.arange(len(block), device=block.device)
        block[itself, itself + start] = -torch.inf
        nearest = block.topk(n, dim=1)
        features.append(nearest.indices.cpu())
        cosines.append(nearest.values.cpu())
    return Nearest(features=torch.cat(features), cosines=torch.cat(cosines))


def logit_effects(
    W_dec: Float[Tensor, "s d"],
    logit_matrix: Float[Tensor, "d v"],
    n: int,
    *,
    progress: bool = False,
) -> LogitEffects:
    """The `n` tokens that one unit of each feature raises and lowers most, centred over tokens."""
    directions = W_dec.detach().float()
    unembedding = logit_matrix.detach().to(directions)
    unembedding = unembedding - unembedding.mean(1, keepdim=True)
    n_tokens = unembedding.shape[1]
    n = min(n, n_tokens)
    high, low = [], []
    for start in _chunks(len(directions), n_tokens, "logits", progress):
        block = directions[start : start + _chunk_rows(n_tokens)] @ unembedding
        high.append(block.topk(n, dim=1))
        low.append(block.topk(n, dim=1, largest=False))
    return LogitEffects(
        positive_tokens=torch.cat([part.indices for part in high]).cpu(),
        positive=torch.cat([part.values for part in high]).cpu(),
        negative_tokens=torch.cat([part.indices for part in low]).cpu(),
        negative=torch.cat([part.values for part in low]).cpu(),
    )


def unit_rows(matrix: Float[Tensor, "s d"]) -> Float[Tensor, "s d"]:
    """Each row at length one, in fp32; zero rows stay zero."""
    rows = matrix.detach().float()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _chunk_rows(width: int) -> int:
    return max(1, CHUNK_BYTES // (4 * width))


def _chunks(n_rows: int, width: int, what: str, progress: bool) -> "tqdm[int]":
    return tqdm(range(0, n_rows, _chunk_rows(width)), desc=what, disable=not progress)
