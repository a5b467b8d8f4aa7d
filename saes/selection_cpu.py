"""Compiled loops for the selections that tensor operations do slowly on a CPU.

Rows are shared out to a pool of threads, as many as torch uses; the loops hold no lock. What they
compute is said, slowly and plainly, by the references in `saes.selection` and `saes.reduced`. All
loops are in this one file: the compiler's cache notices a change of it, not of files it imports.
"""

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saes.types import Chosen, Codes, Entries

T = TypeVar("T")

SHIFT = 21
"""Bits of a positive float32 that its bucket's number leaves out: exponent and two bits stay."""
N_BUCKETS = 1 << (31 - SHIFT)
CLASS_SIZE = 16
"""Entries that share a maximum, but where many are wanted."""
FEW = 64
"""So many numbers are sorted fastest by insertion."""
LARGEST = 0x7FFF_FFFF
"""Latents are numbered below this."""

Loop = Callable[[int, int, np.ndarray, np.ndarray, np.ndarray], int]
"""Looks at rows `start` to `stop`; writes their entries' latents and values, one row after the
other, and each row's number of entries; gives the number of all."""


def compiled(function: Callable) -> Callable:
    """`function` as machine code, compiled on its first call and kept on disk."""
    return numba.njit(nogil=True, cache=True)(inspect.unwrap(function))


def compiled_sum(function: Callable) -> Callable:
    """As `compiled`; sums may be taken in any order, and so in vector registers."""
    reordered = {"reassoc", "contract", "nsz"}
    return numba.njit(nogil=True, cache=True, fastmath=reordered)(inspect.unwrap(function))


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
    codes = Codes(values=torch.zeros(len(pre), k), indices=torch.zeros(len(pre), k).long())
    if k:
        arrays = (bits, codes.values.numpy().view(np.int32), codes.indices.numpy())
        share_rows(len(pre), lambda start, stop: _top_k(*arrays, start, stop))
    return codes


@compiled
def _top_k(
    bits: np.ndarray, values: np.ndarray, indices: np.ndarray, start: int, stop: int
) -> None:
    """The k largest positive numbers of each row, as integers: positive floats sort as their bits.

    As many classes as entries are wanted have maxima of at least the k-th largest maximum, so that
    number is a floor under the k-th largest entry, and few entries lie above it.
    """
    s, k = bits.shape[1], values.shape[1]
    maxima = np.empty(number_of_classes(s, k), np.int32)
    found = np.empty(s, np.int64)
    for row in range(start, stop):
        class_maxima(bits[row], maxima)
        floor = max(np.int32(1), kth_largest(maxima, k, 31))
        n = 0
        for first in range(len(maxima)):
            if maxima[first] >= floor:
                for i in range(first, s, len(maxima)):
                    found[n] = in_order(bits[row, i], i)
                    n += bits[row, i] >= floor
        write_strongest(found[:n], values[row], indices[row])


@compiled
def number_of_classes(s: int, k: int) -> int:
    """Into how many classes `s` entries are divided, by their number's remainder.

    More make the floor tighter, fewer make it sooner found.
    """
    return max((s + CLASS_SIZE - 1) // CLASS_SIZE, min(s, 4 * k))


@compiled
def class_maxima(numbers: np.ndarray, maxima: np.ndarray) -> None:
    """The largest number of each class: those that lie `len(maxima)` places apart.

    (Classes of neighbours would need a maximum inside a vector register.)
    """
    n = len(maxima)
    maxima[:] = numbers[:n]
    for first in range(n, len(numbers), n):
        others = numbers[first : first + n]
        for j in range(len(others)):
            # Not max(), which numba does not turn into a vector instruction.
            maxima[j] = others[j] if others[j] > maxima[j] else maxima[j]


@compiled
def kth_largest(numbers: np.ndarray, k: int, n_bits: int) -> Any:
    """The k-th largest of integers of so many bits; 0 where it is negative.

    Found bit by bit, each by a count of the numbers that are at least as large.
    """
    least = 0
    for bit in range(n_bits - 1, -1, -1):
        trial = numbers.dtype.type(least | (1 << bit))
        count = np.int32(0)
        for i in range(len(numbers)):
            count += np.int32(numbers[i] >= trial)
        if count >= k:
            least |= 1 << bit
    return numbers.dtype.type(least)


@compiled
def in_order(bits: int, latent: int) -> Any:
    """A positive float's bits and its latent as one number: the lowest latent wins among equals."""
    return (np.int64(bits) << 32) | (LARGEST - latent)


@compiled
def write_strongest(found: np.ndarray, values: np.ndarray, indices: np.ndarray) -> None:
    """The strongest of some entries `in_order`, the bits of their values and their latents."""
    if len(found) > FEW:
        found[:] = np.sort(found)[::-1]
    else:
        _sort_few(found)
    for place in range(min(len(values), len(found))):
        values[place] = found[place] >> 32
        indices[place] = LARGEST - (found[place] & LARGEST)


@compiled
def _sort_few(numbers: np.ndarray) -> None:
    """Put the largest first, by insertion."""
    for end in range(1, len(numbers)):
        number, place = numbers[end], end
        while place > 0 and numbers[place - 1] < number:
            numbers[place] = numbers[place - 1]
            place -= 1
        numbers[place] = number


def nominated_top_k(
    scores: Float[Tensor, "b m"],
    rows: Float[Tensor, "b d"],
    low_rows: Float[Tensor, "b e"],
    weights: Float[Tensor, "s d"],
    bias: Float[Tensor, " s"],
    errors: Float[Tensor, "3 s"],
    latents: Int[Tensor, " m"],
    k: int,
    rounding: float,
) -> Codes:
    """See `saes.reduced.Scores.top_k`; on the CPU.

    1. A floor under the row's k-th largest score, as in `top_k`.
    2. Nominees: all scores above that floor less twice the largest error in the row.
    3. The k best of them are computed in float32. The smallest of these values is a floor under the
       row's k-th largest pre-activation.
    4. The other nominees are computed where their score and their own error together reach that
       floor: a latent's error goes by the norm of its own weights.
    5. The k largest values are the choice.
    """
    codes = Codes(values=torch.zeros(len(rows), k), indices=torch.zeros(len(rows), k).long())
    if not (k and len(rows)):
        return codes
    worst = errors[:, latents].amax(1)
    arrays = tuple(
        part.detach().contiguous().numpy()
        for part in (
            scores.view(torch.int16), rows, low_rows.view(torch.int16), weights, bias, errors,
            worst, latents,
        )
    )  # fmt: skip
    found = (codes.values.numpy().view(np.int32), codes.indices.numpy())
    share_rows(
        len(rows),
        lambda start, stop: _nominated_top_k(*arrays, np.float32(rounding), *found, start, stop),
    )
    return codes


@compiled
def _nominated_top_k(
    scores: np.ndarray,
    rows: np.ndarray,
    low_rows: np.ndarray,
    weights: np.ndarray,
    bias: np.ndarray,
    errors: np.ndarray,
    worst: np.ndarray,
    latents: np.ndarray,
    rounding: float,
    values: np.ndarray,
    indices: np.ndarray,
    start: int,
    stop: int,
) -> None:
    m, k = scores.shape[1], values.shape[1]
    keys, maxima = np.empty(m, np.int16), np.empty(number_of_classes(m, k), np.int16)
    places, found, entries = np.empty(m, np.int32), np.empty(m, np.int16), np.empty(m, np.int64)
    low, word = np.empty(rows.shape[1], np.int32), np.empty(1, np.int32)
    number = word.view(np.float32)
    for row in range(start, stop):
        for i in range(len(low)):
            low[i] = np.int32(low_rows[row, i]) << 16
        lost = _distance(rows[row], low.view(np.float32))
        left = np.sqrt(_product(low.view(np.float32), low.view(np.float32)))
        for i in range(m):
            keys[i] = _key(scores[row, i])
        error = lost * worst[0] + left * worst[1] + worst[2]
        n = _nominate(keys, maxima, k, error, rounding, word, places, found)
        best = np.int16(-0x8000) if n <= k else kth_largest(found[:n], k, 15)
        n_entries, n_best, least = 0, 0, np.float32(np.inf)
        for nominee in range(n):
            if found[nominee] >= best:
                latent = latents[places[nominee]]
                number[0] = _product(rows[row], weights[latent]) + bias[latent]
                least = min(least, number[0])
                entries[n_entries] = in_order(word[0], latent)
                n_entries += number[0] > 0
                n_best += 1
        least = np.float32(0.0) if n_best < k or least < 0 else least
        for nominee in range(n):
            if found[nominee] < best:
                latent = latents[places[nominee]]
                word[0] = np.int32(_key(found[nominee])) << 16
                error = lost * errors[0, latent] + left * errors[1, latent] + errors[2, latent]
                if number[0] + error + rounding * abs(number[0]) >= least:
                    number[0] = _product(rows[row], weights[latent]) + bias[latent]
                    entries[n_entries] = in_order(word[0], latent)
                    n_entries += number[0] > 0
        write_strongest(entries[:n_entries], values[row], indices[row])


@compiled
def _nominate(
    keys: np.ndarray,
    maxima: np.ndarray,
    k: int,
    error: float,
    rounding: float,
    word: np.ndarray,
    places: np.ndarray,
    found: np.ndarray,
) -> int:
    """Steps 1 and 2 for a row: the places and keys of its nominees; gives their number."""
    class_maxima(keys, maxima)
    number = word.view(np.float32)
    word[0] = np.int32(kth_largest(maxima, k, 15)) << 16
    number[0] -= np.float32(2.0) * (error + rounding * number[0])
    floor = _floor_key(word[0])
    n = 0
    for first in range(len(maxima)):
        if maxima[first] >= floor:
            for i in range(first, len(keys), len(maxima)):
                places[n] = i
                found[n] = keys[i]
                n += keys[i] >= floor
    return n


@compiled
def _key(bits: int) -> Any:
    """The bits of a bfloat16 as an integer that sorts as the numbers do, and back."""
    return np.int16(bits ^ ((bits >> 15) & 0x7FFF))


@compiled
def _floor_key(bits: int) -> Any:
    """The key of the largest bfloat16 that is no larger than a float32, from its bits."""
    # Cutting rounds towards zero: that is downwards but for negative numbers, which lose one more.
    high = np.int16(bits >> 16)
    return np.int16(_key(high) - (high < 0))


@compiled_sum
def _distance(a: np.ndarray, b: np.ndarray) -> Any:
    total = np.float32(0.0)
    for i in range(len(a)):
        total += (a[i] - b[i]) * (a[i] - b[i])
    return np.sqrt(total)


@compiled_sum
def _product(a: np.ndarray, b: np.ndarray) -> Any:
    total = np.float32(0.0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


def rounded(
    weights: Float[Tensor, "s d"], width: int
) -> tuple[Float[Tensor, "s e"], Float[Tensor, " s"], Float[Tensor, " s"]]:
    """See `saes.reduced.rounded_reference`; on the CPU, in one pass."""
    matrix = weights.detach().contiguous().numpy()
    low = torch.empty(len(matrix), width, dtype=torch.bfloat16)
    norms, lost = torch.empty(len(matrix)), torch.empty(len(matrix))
    arrays = (matrix, low.view(torch.int16).numpy(), norms.numpy(), lost.numpy())
    share_rows(len(matrix), lambda start, stop: _rounded(*arrays, start, stop))
    return low, norms, lost


@compiled
def _rounded(
    weights: np.ndarray,
    low: np.ndarray,
    norms: np.ndarray,
    lost: np.ndarray,
    start: int,
    stop: int,
) -> None:
    """To the nearest bfloat16, of two as near to the one with an even last bit."""
    bits = weights.view(np.int32)
    kept = np.empty(weights.shape[1], np.int32)
    for row in range(start, stop):
        for i in range(len(kept)):
            kept[i] = (bits[row, i] + 0x7FFF + ((bits[row, i] >> 16) & 1)) & -0x10000
            low[row, i] = kept[i] >> 16
        low[row, len(kept) :] = 0
        norms[row] = np.sqrt(_product(weights[row], weights[row]))
        lost[row] = _distance(weights[row], kept.view(np.float32))


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
