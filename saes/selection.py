"""Which latents are looked at: from dense pre-activations to the entries of sparse codes.

Pre-activations come some rows at a time; every function here takes such a part `[b, s]`. Equal
numbers are told apart by the latent's number, the lowest first, whatever the device or the batch.

Top-AFA (Lee et al. 2025, 2503.24277): with f_i = ReLU(pre_i), n_i = |W_dec,i|, c_i = (f_i n_i)^2
sorted downwards and C_j the sum of the first j, the first j* entries are kept where
| sqrt(C_j) - target | is smallest (the first such j). `nearest_norm_reference` says so with a full
sort; on a CPU the same entries are found with a histogram over the leading bits of c: buckets are
added up from the top until the target is reached, and only that one is sorted. Both sum in
float64. Where the sum of all stays below the target, every positive entry is kept.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from saes import kernels, selection_cpu
from saes.types import Chosen, Codes, concatenated


def top_k(pre: Float[Tensor, "b s"], k: int) -> Codes:
    """ReLU of the `k` largest entries of each row, strongest first."""
    assert k <= pre.shape[1], f"k = {k} of {pre.shape[1]} latents"
    if pre.device.type == "cpu":
        return selection_cpu.top_k(pre, k)
    return top_k_reference(pre, k)


def top_k_reference(pre: Float[Tensor, "b s"], k: int) -> Codes:
    """`top_k` through `torch.topk`."""
    values, indices = _largest(pre, k, above=0.0)
    values = values.relu()
    return Codes(values=values, indices=torch.where(values > 0, indices, 0))


def nominees(
    scores: Float[Tensor, "b s"], k: int, errors: Float[Tensor, " b"], rounding: float
) -> Chosen:
    """Every entry that may be among its row's `k` largest positive ones, were scores not rounded.

    These are the entries of at least `max(s_k, 0) - 2 (error + rounding |s_k|)`, with s_k the k-th
    largest score of the row. Scores are bfloat16; the values given are theirs.
    """
    assert 0 < k <= scores.shape[1], f"k = {k} of {scores.shape[1]} latents"
    least = scores.float().topk(k, dim=1).values[:, -1].relu()
    floor = least - 2 * (errors + rounding * least)
    return _where(scores, scores.float() >= floor[:, None])


def strongest_of_rows(chosen: Chosen, k: int) -> Codes:
    """ReLU of the `k` largest entries of each row, strongest first, padded where there are fewer.

    Entries of a row must come by growing latent number: the lowest wins among equal values.
    """
    codes = padded(chosen.values.relu(), chosen)
    missing = max(0, k - codes.values.shape[1])
    values = functional.pad(codes.values, (0, missing))[:, :k]
    return Codes(values=values, indices=functional.pad(codes.indices, (0, missing))[:, :k])


def signed_top_k(pre: Float[Tensor, "b s"], k: int) -> Codes:
    """The `k` largest entries of each row with their sign, strongest first."""
    assert k <= pre.shape[1], f"k = {k} of {pre.shape[1]} latents"
    values, indices = _largest(pre, k, above=-torch.inf)
    return Codes(values=values, indices=indices)


def _largest(pre: Tensor, k: int, above: float) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row; ties between entries `above` fall to the lowest number."""
    # One more than asked for shows whether the last one kept is tied with the first one dropped.
    values, indices = torch.topk(pre, min(k + 1, pre.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > above)
    rows = tied.any(1).nonzero().squeeze(1)
    if len(rows):
        order = torch.sort(pre[rows], dim=1, descending=True, stable=True).indices
        indices[rows] = order[:, : indices.shape[1]]
    return values[:, :k], indices[:, :k]


def strongest(chosen: Chosen, n: int) -> Chosen:
    """The `n` entries of the largest values; of equal values the first in reading order win."""
    if len(chosen.values) <= n:
        return chosen
    smallest = chosen.values.kthvalue(len(chosen.values) - n + 1).values
    keep = chosen.values > smallest
    level = (chosen.values == smallest).nonzero().squeeze(1)
    keep[level[: n - int(keep.sum())]] = True
    rows = chosen.entries.rows[keep]
    return Chosen(
        values=chosen.values[keep],
        latents=chosen.latents[keep],
        lengths=torch.bincount(rows, minlength=len(chosen.lengths)),
    )


class Pool:
    """The `n` strongest positive entries of parts of a batch that come one after the other."""

    def __init__(self, n: int, agree: Callable[[Chosen, int], Chosen] | None = None) -> None:
        """Look for `n`; `agree` says in the end which of them stay, where others look too."""
        self.n = n
        self._agree = agree
        self._chosen: list[Chosen] = []
        self._floor = 0.0

    def add(self, pre: Float[Tensor, "b s"]) -> None:
        """Look at some rows; what cannot be among the strongest any more is forgotten."""
        floors = pre.new_full((pre.shape[1],), self._floor)
        pool = strongest(concatenated([*self._chosen, above(pre, floors)]), self.n)
        self._chosen = [pool]
        if len(pool.values) == self.n:
            self._floor = float(pool.values.min())

    @property
    def chosen(self) -> Chosen:
        """The entries found."""
        (pool,) = self._chosen
        return pool if self._agree is None else self._agree(pool, self.n)


def padded(values: Float[Tensor, " n"], chosen: Chosen) -> Codes:
    """Values at chosen entries as codes, the strongest first, as wide as the longest row."""
    b, entries = len(chosen.lengths), chosen.entries
    k = int(chosen.lengths.max()) if b else 0
    rows = entries.rows
    columns = torch.arange(len(rows), device=rows.device) - entries.starts[rows]
    table = values.new_zeros(b, k).index_put((rows, columns), values)
    indices = chosen.latents.new_zeros(b, k).index_put((rows, columns), chosen.latents)
    ordered, order = torch.sort(table, dim=1, descending=True, stable=True)
    return Codes(values=ordered, indices=torch.where(ordered > 0, indices.gather(1, order), 0))


def above(pre: Float[Tensor, "b s"], thresholds: Float[Tensor, " s"]) -> Chosen:
    """All entries that exceed their latent's threshold."""
    if pre.device.type == "cpu":
        return selection_cpu.above(pre, thresholds)
    return above_reference(pre, thresholds)


def above_reference(pre: Float[Tensor, "b s"], thresholds: Float[Tensor, " s"]) -> Chosen:
    """`above` through a dense mask."""
    return _where(pre, pre > thresholds)


def nearest_norm(
    pre: Float[Tensor, "b s"], norms: Float[Tensor, " s"], target: Float[Tensor, " b"]
) -> Chosen:
    """Top-AFA's entries: the strongest, so many that their scaled norm is nearest to `target`."""
    if pre.device.type == "cpu":
        return selection_cpu.nearest_norm(pre, norms, target)
    if (triton := kernels.triton_for(pre)) is not None:
        return _where(pre, triton.nearest_norm_mask(pre, norms, target))
    return nearest_norm_reference(pre, norms, target)


def nearest_norm_reference(
    pre: Float[Tensor, "b s"], norms: Float[Tensor, " s"], target: Float[Tensor, " b"]
) -> Chosen:
    """`nearest_norm` by its definition: sort all entries, add up, look for the nearest sum."""
    scaled = (pre.relu() * norms).square()
    ordered, order = torch.sort(scaled, dim=1, descending=True, stable=True)
    sums = ordered.double().cumsum(1)
    goal = target.double()[:, None]
    last = (sums.sqrt() - goal).abs().argmin(1, keepdim=True)
    unreached = sums[:, -1:] < goal.square()
    kept = (torch.arange(pre.shape[1], device=pre.device) <= last) | unreached
    return _where(pre, torch.zeros_like(kept).scatter(1, order, kept & (ordered > 0)))


def _where(pre: Float[Tensor, "b s"], mask: Bool[Tensor, "b s"]) -> Chosen:
    rows, latents = mask.nonzero(as_tuple=True)
    lengths = torch.bincount(rows, minlength=len(pre))
    return Chosen(values=pre[rows, latents].float(), latents=latents, lengths=lengths)
