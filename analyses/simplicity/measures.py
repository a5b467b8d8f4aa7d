"""How complex functions are, many at a time.

A function is given by its values on a grid, along a path, or as a string of symbols:

    fourier           sum |c_k| f_k / sum |c_k| over the cosines c of a DCT-II, f in cycles
    plain_fourier     the same of a plain Fourier transform: the wrong way, kept to show why
    polynomial        the same with the order of Chebyshev or Legendre polynomials in place of f
    lz78              phrases of Lempel and Ziv's parsing of 1978: the dictionary it builds
    lz76              phrases of their parsing of 1976, which looks back at the whole text
    total_variation   length of the way that the values go along a path

Neural Redshift (Teney et al. 2024, arXiv 2403.02241) takes the first, the polynomials, and a
dictionary's size; total variation is from Teney et al. 2025 (arXiv 2503.10065); `boolean_lz` is the
measure of Dingle, Camargo and Louis 2018. The papers leave some things open. Here they are so:

- A Fourier transform takes what it is given for one period, and the values at two opposite edges
  of a grid differ: the step between them is all that it sees of a smooth function. A cosine
  transform (DCT-II) is the Fourier transform of the mirrored function, which has no step.
- In two dimensions a coefficient's frequency is the length of its two, a polynomial's order the sum
  of its two. The mean (frequency or order 0) is left out.
- Values become symbols by `quantised`: equal steps between the least and the greatest. A grid is
  read in rows and in columns, and the two counts averaged.

A constant has no complexity: `undefined` says where that is so, and every measure gives nan there.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.polynomial import legendre
from torch import Tensor

from probe.errors import UserError
from saes.selection_cpu import compiled, share_rows

Basis = Literal["chebyshev", "legendre"]
LEVELS = 10
"""Symbols that values are cut into."""
FLAT = 1e-6
"""Values that vary by less than this share of the largest are constant but for rounding."""
LEAST = 4
"""Points a side that a spectrum needs."""


def undefined(values: Float[Tensor, "n *grid"]) -> Bool[Tensor, " n"]:
    """Which functions are constant (but for rounding), so that their complexity means nothing."""
    flat = values.flatten(1)
    return flat.std(1, correction=0) <= FLAT * flat.abs().amax(1)


def check_values(values: Float[Tensor, "n *grid"]) -> None:
    """Raise `UserError` where values cannot be measured: not finite, or on too small a grid."""
    if min(values.shape[1:]) < LEAST:
        raise UserError(
            f"a grid of {' x '.join(map(str, values.shape[1:]))} points is too small for a "
            f"spectrum; use at least {LEAST} a side."
        )
    if not torch.isfinite(values).all():
        raise UserError("a function's values are not finite; use smaller weights.")


# -------------------------------------------------------------------------------------- spectra


def fourier(values: Float[Tensor, "n *grid"]) -> Float[Tensor, " n"]:
    """Mean frequency in cycles over the grid, weighted by the cosines' amplitudes.

    Args:
        values: at the middles of equal cells (`grid`), in one or two dimensions.

    Raises `UserError` where the grid is too small or a value is not finite.
    """
    check_values(values)
    sizes = values.shape[1:]
    amplitudes = transformed(values, [_cosines(size) for size in sizes]).abs()
    frequencies = [torch.arange(size, dtype=values.dtype) / 2 for size in sizes]
    return _weighted(values, amplitudes, _length(frequencies))


def plain_fourier(values: Float[Tensor, "n *grid"]) -> Float[Tensor, " n"]:
    """The same of a plain Fourier transform, which takes the edges' difference for a step."""
    check_values(values)
    amplitudes = torch.fft.fftn(values, dim=tuple(range(1, values.ndim))).abs()
    frequencies = [torch.fft.fftfreq(size, 1 / size).abs() for size in values.shape[1:]]
    return _weighted(values, amplitudes, _length([f.to(values.dtype) for f in frequencies]))


def polynomial(values: Float[Tensor, "n *grid"], basis: Basis) -> Float[Tensor, " n"]:
    """Mean order of polynomials, weighted by the sizes of their coefficients.

    Args:
        values: at the basis' own nodes (`nodes`), in one or two dimensions.
        basis: Chebyshev (of the first kind) or Legendre polynomials.

    Raises `UserError` where the grid is too small or a value is not finite.
    """
    check_values(values)
    maps = [_projection(size, basis) for size in values.shape[1:]]
    coefficients = transformed(values, maps).abs()
    orders = [torch.arange(size, dtype=values.dtype) for size in values.shape[1:]]
    total = orders[0] if len(orders) == 1 else orders[0][:, None] + orders[1]
    return _weighted(values, coefficients, total)


def grid(size: int) -> Float[Tensor, " g"]:
    """The middles of `size` equal cells of [-1, 1]."""
    return (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1


def nodes(size: int, basis: Basis) -> Float[Tensor, " g"]:
    """Where a basis of `size` polynomials is sampled so that sums over it are exact."""
    if basis == "legendre":
        return torch.from_numpy(legendre.leggauss(size)[0])
    return torch.cos(math.pi * (torch.arange(size, dtype=torch.float64) + 0.5) / size).flip(0)


def transformed(
    values: Float[Tensor, "n *grid"], maps: list[Float[Tensor, "g g"]]
) -> Float[Tensor, "n *grid"]:
    """A linear map along each axis of the grid."""
    found = values @ maps[-1].to(values).T
    if len(maps) == 1:
        return found
    return maps[0].to(values) @ found


def _cosines(size: int) -> Float[Tensor, "g g"]:
    """The orthonormal DCT-II: a row a cosine."""
    k, i = torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi * k[:, None] * (2 * i + 1) / (2 * size)) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


def _projection(size: int, basis: Basis) -> Float[Tensor, "g g"]:
    """Values at the nodes to coefficients: a row an order."""
    order = torch.arange(size, dtype=torch.float64)
    if basis == "chebyshev":
        angles = torch.arccos(nodes(size, basis))
        rows = torch.cos(order[:, None] * angles) * 2 / size
        rows[0] /= 2
        return rows
    places, weights = legendre.leggauss(size)
    sampled = torch.from_numpy(legendre.legvander(places, size - 1).T)
    return sampled * torch.from_numpy(weights) * (2 * order[:, None] + 1) / 2


def _length(parts: list[Float[Tensor, " g"]]) -> Float[Tensor, "*grid"]:
    return parts[0] if len(parts) == 1 else torch.hypot(parts[0][:, None], parts[1])


def _weighted(
    values: Float[Tensor, "n *grid"], sizes: Float[Tensor, "n *grid"], of: Float[Tensor, "*grid"]
) -> Float[Tensor, " n"]:
    """Mean of `of` weighted by sizes, the constant term left out; nan of constants."""
    weights = sizes.flatten(1)[:, 1:]
    mean = (weights * of.flatten()[1:]).sum(1) / weights.sum(1)
    return mean.masked_fill(undefined(values), math.nan)


# --------------------------------------------------------------------------------- paths


def total_variation(values: Float[Tensor, "n l t"]) -> Float[Tensor, " n"]:
    """How far values go, up and down, along a straight line, in standard deviations of the values.

    Mean over each function's `l` lines, of values at equal steps, `t` on each. A straight slope's
    is the square root of 12, about 3.5, where the line spans all there is.
    """
    deviation = values.flatten(1).std(1, correction=0)
    moved = values.diff(dim=2).abs().sum(2).mean(1) / deviation
    return moved.masked_fill(undefined(values), math.nan)


# --------------------------------------------------------------------------- Lempel and Ziv


def quantised(values: Float[Tensor, "n *grid"], levels: int = LEVELS) -> Int[Tensor, "n *grid"]:
    """Symbols 0 to `levels` - 1: equal steps between each function's least and greatest value."""
    flat = values.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    steps = ((flat - low) / (high - low).clamp(min=1e-300) * levels).long().clamp(0, levels - 1)
    return steps.reshape(values.shape)


def lz(values: Float[Tensor, "n *grid"], levels: int = LEVELS) -> Float[Tensor, " n"]:
    """`lz78` of quantised values: of a grid the mean of reading it in rows and in columns."""
    symbols = quantised(values, levels).numpy().astype(np.int64)
    ways = [symbols.reshape(len(symbols), -1)]
    if symbols.ndim == 3:
        ways.append(symbols.swapaxes(1, 2).reshape(len(symbols), -1))
    counts = np.mean([lz78(way, levels) for way in ways], axis=0)
    return torch.from_numpy(counts).masked_fill(undefined(values), math.nan)


def lz78(symbols: Int[np.ndarray, "n t"], levels: int) -> Int[np.ndarray, " n"]:
    """Phrases of the parsing of 1978: each is the longest phrase so far and one more symbol. A last
    phrase that is not new counts."""
    return _counted(_phrases_78, symbols, levels)


def lz76(symbols: Int[np.ndarray, "n t"]) -> Int[np.ndarray, " n"]:
    """Words of the exhaustive parsing of 1976: each is the shortest beginning of the rest that does
    not occur in the text up to the word's last symbol but one; the occurrence may overlap the word.
    A last unfinished word counts."""
    return _counted(_words_76, symbols, 0)


def _counted(loop: Callable, symbols: Int[np.ndarray, "n t"], levels: int) -> Int[np.ndarray, " n"]:
    counts = np.zeros(len(symbols), np.int64)
    if symbols.size:
        given = np.ascontiguousarray(symbols, np.int32)
        share_rows(len(counts), lambda start, stop: loop(given, levels, counts, start, stop))
    return counts


@compiled
def _phrases_78(symbols, levels, counts, start, stop):
    length = symbols.shape[1]
    tree = np.empty((length + 1, levels), np.int32)  # the phrase that a phrase and a symbol make
    for row in range(start, stop):
        made, at = 0, 0
        tree[0] = 0
        for place in range(length):
            following = tree[at, symbols[row, place]]
            if following == 0:
                made += 1
                tree[at, symbols[row, place]] = made
                tree[made] = 0
            at = following
        counts[row] = made + (at > 0)


@compiled
def _words_76(symbols, _, counts, start, stop):
    length = symbols.shape[1]
    for row in range(start, stop):
        text = symbols[row]
        words, at = 0, 0
        while at < length:
            longest = 0
            for earlier in range(at):
                size = 0
                while at + size < length and text[earlier + size] == text[at + size]:
                    size += 1
                longest = max(longest, size)
            words += 1
            at += longest + 1
        counts[row] = words


def boolean_lz(tables: Bool[np.ndarray, "n t"]) -> Float[np.ndarray, " n"]:
    """Complexity of truth tables: log2 t times the words, mean of reading forwards and backwards;
    log2 t of a constant (Dingle, Camargo and Louis 2018)."""
    symbols = tables.astype(np.int8)
    words = (lz76(symbols) + lz76(symbols[:, ::-1])) / 2
    constant = symbols.min(1) == symbols.max(1)
    return np.log2(symbols.shape[1]) * np.where(constant, 1, words)
