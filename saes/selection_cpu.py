"""Compiled loops for the selections that tensor operations do slowly on a CPU.

Rows are shared out to a pool of threads, as many as torch uses; the loops hold no lock. What they
compute is said, slowly and plainly, by the references in `saes.selection`.
"""

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saes.types import Chosen, Codes, Entries

T = TypeVar("T")

SHIFT = 21
"""Bits of a positive float32 that its bucket's number leaves out: exponent and two bits stay."""
N_BUCKETS = 1 << (31 - SHIFT)
BLOCK = 32
"""Entries that share a maximum."""

Loop = Callable[[int, int, np.ndarray, np.ndarray, np.ndarray], int]
"""Looks at rows `start` to `stop`; writes their entries' latents and values, one row after the
other, and each row's number of entries; gives the number of all."""


def compiled(function: Callable) -> Callable:
    """`function` as machine code, compiled on its first call and kept on disk."""
    return numba.njit(nogil=True, cache=True)(inspect.unwrap(function))


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="selection")


def share_rows(n_rows: int, work: Callable[[int, int], T]) -> list[T]:
    """The results of `work(start, stop)` for slices that make up all rows, found side by side."""
    n_threads = max(1, min(torch.get_num_threads(), n_rows))
    cuts = [n_rows * i // n_threads for i in range(n_threads + 1)]
    run = map if n_threads == 1 else _pool(n_threads).map
    return list(run(work, cuts[:-1], cuts[1:]))


def chosen_by(loop: Loop, b: int, room: int) -> Chosen:
    """The entries that a loop chooses of `b` rows, at most `room` of each."""

    def share(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # Memory is only asked for: what is not written never exists.
        latents = np.empty((stop - start) * room, np.int64)
        values = np.empty((stop - start) * room, np.float32)
        lengths = np.empty(stop - start, np.int64)
        n = loop(start, stop, latents, values, lengths)
        return latents[:n], values[:n], lengths

    latents, values, lengths = (
        torch.from_numpy(np.concatenate(parts)) for parts in zip(*share_rows(b, share), strict=True)
    )
    return Chosen(values=values, latents=latents, lengths=lengths)


def above(pre: Float[Tensor, "b s"], thresholds: Float[Tensor, " s"]) -> Chosen:
    """See `saes.selection.above`; float32 on the CPU."""
    matrix, floors = pre.detach().contiguous().numpy(), thresholds.detach().contiguous().numpy()
    return chosen_by(lambda *place: _above(matrix, floors, *place), *pre.shape)


def nearest_norm(
    pre: Float[Tensor, "b s"], norms: Float[Tensor, " s"], target: Float[Tensor, " b"]
) -> Chosen:
    """See `saes.selection.nearest_norm`; float32 on the CPU."""
    matrix, lengths = pre.detach().contiguous().numpy(), norms.detach().contiguous().numpy()
    goals = target.detach().double().contiguous().numpy()
    return chosen_by(lambda *place: _nearest_norm(matrix, lengths, goals, *place), *pre.shape)


@compiled
def _above(
    pre: np.ndarray,
    thresholds: np.ndarray,
    start: int,
    stop: int,
    latents: np.ndarray,
    values: np.ndarray,
    lengths: np.ndarray,
) -> int:
    n = 0
    for row in range(start, stop):
        before = n
        for i in range(pre.shape[1]):
            if pre[row, i] > thresholds[i]:
                latents[n] = i
                values[n] = pre[row, i]
                n += 1
        lengths[row - start] = n - before
    return n


@compiled
def _nearest_norm(
    pre: np.ndarray,
    norms: np.ndarray,
    target: np.ndarray,
    start: int,
    stop: int,
    latents: np.ndarray,
    values: np.ndarray,
    lengths: np.ndarray,
) -> int:
    s = pre.shape[1]
    scaled = np.empty(s + 1, np.float32)
    places = np.empty(s + 1, np.int64)
    bits = scaled.view(np.int32)
    sums = np.empty(N_BUCKETS)
    n = 0
    for row in range(start, stop):
        # Without a branch, which would be guessed wrong for every other entry: write, then count.
        positive = 0
        for i in range(s):
            product = pre[row, i] * norms[i]
            scaled[positive] = product * product
            places[positive] = i
            positive += product > 0
        sums[:] = 0.0
        for i in range(positive):
            sums[bits[i] >> SHIFT] += scaled[i]
        bucket, above = _crossed(sums, target[row] * target[row])
        least, last = _cut(scaled[:positive], bits[:positive], bucket, above, target[row])
        before = n
        for i in range(positive):
            if scaled[i] > least or (scaled[i] == least and i <= last):
                latents[n] = places[i]
                values[n] = pre[row, places[i]]
                n += 1
        lengths[row - start] = n - before
    return n


@compiled
def _crossed(sums: np.ndarray, goal: float) -> tuple[int, float]:
    """The bucket where the sum from the top reaches `goal` (0 for none), and the sum above it."""
    above = 0.0
    bucket = N_BUCKETS - 1
    while bucket > 0 and (sums[bucket] == 0 or above + sums[bucket] < goal):
        above += sums[bucket]
        bucket -= 1
    return bucket, above


@compiled
def _cut(
    scaled: np.ndarray, bits: np.ndarray, bucket: int, above: float, target: float
) -> tuple[Any, int]:
    """Value and number of the last entry that is kept, all larger ones and earlier equals with it.

    The entries of the bucket are added up, the largest first, until the target is reached; the
    sum before that or the sum after it is the nearest.
    """
    inside = np.nonzero((bits >> SHIFT) == bucket)[0]
    # Stable: of equal entries the one of the lower number comes first.
    inside = inside[np.argsort(-scaled[inside], kind="mergesort")]
    total = above
    for place in range(len(inside)):
        before = total
        total += scaled[inside[place]]
        if total < target * target:
            continue
        if before > 0 and target - np.sqrt(before) <= np.sqrt(total) - target:
            if place == 0:
                return scaled[inside[0]], -1
            place -= 1
        return scaled[inside[place]], inside[place]
    return np.float32(0.0), -1


def top_k(pre: Float[Tensor, "b s"], k: int) -> Codes:
    """See `saes.selection.top_k`; float32 on the CPU."""
    bits = pre.detach().contiguous().numpy().view(np.int32)
    values = torch.zeros(len(pre), k)
    if not k:
        return Codes(values=values, indices=values.long())
    indices = torch.zeros(len(pre), k, dtype=torch.long)
    arrays = (bits, values.numpy().view(np.int32), indices.numpy())
    share_rows(len(pre), lambda start, stop: _top_k(*arrays, start, stop))
    return Codes(values=values, indices=indices)


@compiled
def _block_maxima(numbers: np.ndarray, maxima: np.ndarray) -> None:
    """The largest number of each block."""
    for block in range(len(maxima)):
        largest = numbers[block * BLOCK]
        for i in range(block * BLOCK + 1, min(len(numbers), (block + 1) * BLOCK)):
            largest = max(largest, numbers[i])
        maxima[block] = largest


@compiled
def _top_k(
    bits: np.ndarray, values: np.ndarray, indices: np.ndarray, start: int, stop: int
) -> None:
    """The k largest positive numbers of each row, as integers: positive floats sort as their bits.

    As many blocks as entries are wanted have maxima of at least the k-th largest maximum, so that
    number is a floor under the k-th largest entry, and few entries lie above it.
    """
    s, k = bits.shape[1], values.shape[1]
    n_blocks = (s + BLOCK - 1) // BLOCK
    maxima = np.empty(n_blocks, bits.dtype)
    found = np.empty(s, np.int64)
    for row in range(start, stop):
        _block_maxima(bits[row], maxima)
        floor = np.int32(1)
        if n_blocks > k:
            floor = max(floor, np.partition(maxima, n_blocks - k)[n_blocks - k])
        n = 0
        for block in range(n_blocks):
            if maxima[block] >= floor:
                for i in range(block * BLOCK, min(s, (block + 1) * BLOCK)):
                    found[n] = i
                    n += bits[row, i] >= floor
        order = np.argsort(-bits[row][found[:n]], kind="mergesort")
        for place in range(min(k, n)):
            indices[row, place] = found[order[place]]
            values[row, place] = bits[row, indices[row, place]]


def nominees(
    scores: Float[Tensor, "b s"], k: int, errors: Float[Tensor, " b"], rounding: float
) -> Chosen:
    """See `saes.selection.nominees`; bfloat16 on the CPU."""
    bits = scores.detach().contiguous().view(torch.int16).numpy()
    margins = errors.detach().float().contiguous().numpy()
    return chosen_by(lambda *place: _nominees(bits, k, margins, rounding, *place), *scores.shape)


@compiled
def _nominees(
    bits: np.ndarray,
    k: int,
    errors: np.ndarray,
    rounding: float,
    start: int,
    stop: int,
    latents: np.ndarray,
    values: np.ndarray,
    lengths: np.ndarray,
) -> int:
    """As `_top_k`, with the bits of bfloat16 made integers that sort as the numbers do."""
    s = bits.shape[1]
    n_blocks = (s + BLOCK - 1) // BLOCK
    maxima = np.empty(n_blocks, np.int16)
    keys = np.empty(s, np.int16)
    found = np.empty(s, np.int16)
    word = np.empty(1, np.int32)
    number = word.view(np.float32)
    n = 0
    for row in range(start, stop):
        for i in range(s):
            keys[i] = bits[row, i] ^ ((bits[row, i] >> 15) & 0x7FFF)
        _block_maxima(keys, maxima)
        floor = np.int16(0)
        if n_blocks > k:
            floor = max(floor, np.partition(maxima, n_blocks - k)[n_blocks - k])
        above = 0
        for block in range(n_blocks):
            if maxima[block] >= floor:
                for i in range(block * BLOCK, min(s, (block + 1) * BLOCK)):
                    found[above] = keys[i]
                    above += keys[i] >= floor
        least = np.int16(0)
        if above >= k:
            least = np.partition(found[:above], above - k)[above - k]
        word[0] = np.int32(least) << 16
        strength = max(number[0], np.float32(0.0))
        number[0] = strength - np.float32(2.0) * (errors[row] + rounding * strength)
        # Cut to bfloat16 towards zero: that is downwards but for negative numbers, which lose one.
        floor = np.int16(word[0] >> 16)
        floor = np.int16((floor ^ ((floor >> 15) & 0x7FFF)) - (floor < 0))
        before = n
        for block in range(n_blocks):
            if maxima[block] >= floor:
                for i in range(block * BLOCK, min(s, (block + 1) * BLOCK)):
                    latents[n] = i
                    word[0] = np.int32(bits[row, i]) << 16
                    values[n] = number[0]
                    n += keys[i] >= floor
        lengths[row - start] = n - before
    return n


def strongest_of_rows(chosen: Chosen, k: int) -> Codes:
    """See `saes.selection.strongest_of_rows`; on the CPU."""
    values = torch.zeros(len(chosen.lengths), k)
    indices = torch.zeros(len(chosen.lengths), k, dtype=torch.long)
    arrays = (
        chosen.values.detach().numpy(), chosen.latents.numpy(), chosen.entries.starts.numpy(),
        values.numpy(), indices.numpy(),
    )  # fmt: skip
    share_rows(len(values), lambda start, stop: _strongest_of_rows(*arrays, start, stop))
    return Codes(values=values, indices=indices)


@compiled
def _strongest_of_rows(
    entries: np.ndarray,
    latents: np.ndarray,
    starts: np.ndarray,
    values: np.ndarray,
    indices: np.ndarray,
    start: int,
    stop: int,
) -> None:
    for row in range(start, stop):
        first = starts[row]
        order = np.argsort(-entries[first : starts[row + 1]], kind="mergesort")
        for place in range(min(values.shape[1], len(order))):
            entry = first + order[place]
            if entries[entry] <= 0:
                break
            values[row, place] = entries[entry]
            indices[row, place] = latents[entry]


def by_latent(entries: Entries, n_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `saes.kernels.by_latent`; on the CPU, by counting."""
    n = len(entries.latents)
    starts = torch.zeros(n_latents + 1, dtype=torch.int32)
    owners, order = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.long)
    arrays = (entries.latents, entries.starts, starts, owners, order)
    _by_latent(*(array.contiguous().numpy() for array in arrays))
    return starts, owners, order


@compiled
def _by_latent(
    latents: np.ndarray,
    row_starts: np.ndarray,
    starts: np.ndarray,
    owners: np.ndarray,
    order: np.ndarray,
) -> None:
    for entry in range(len(latents)):
        starts[latents[entry] + 1] += 1
    for latent in range(1, len(starts)):
        starts[latent] += starts[latent - 1]
    following = starts[:-1].copy()
    for row in range(len(row_starts) - 1):
        for entry in range(row_starts[row], row_starts[row + 1]):
            place = following[latents[entry]]
            following[latents[entry]] += 1
            owners[place] = row
            order[place] = entry
