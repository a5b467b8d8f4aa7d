"""What the theorems say, computed: no trained model, seconds.

Barbero et al. 2024 (arXiv 2406.04267). `delta` is their total variation, the L1 distance of two
distributions without the usual factor 1/2.

- Lemma B.1: one more token before the last leaves the last less attention, and less to lose.
- Lemma B.2: softmaxes of two bounded sequences that grow alike towards their end come together.
- Proposition B.4: (1, 0, 1, 0, ...) and (0, 1, 0, 1, ...) stay 2 (e - 1) / (e + 1) apart, for every
  even length: why positions have to fade.
- Proposition B.8: [(Lambda + I) / 2]^L takes everything to the first token.
- Theorem B.5's sum over paths, with all weights 1, counts C(n - i + L - 1, L - 1) monotone paths.
- Figures 8, 9 and 10: a decoder block with its last token copied, under sinusoidal positions; two
  softmaxes that differ in their first entries; one attention layer under four kinds of positions.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Positions = Literal["none", "sinusoidal", "rotary", "alibi"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)
B4 = 2 * (math.e - 1) / (math.e + 1)
"""Proposition B.4: 0.924234..."""
ROTARY_BASE, SINUSOIDAL_BASE = 10_000.0, 10_000.0
ALIBI_SLOPE = 2.0**-8
"""Of a single head, as Press et al. 2021 (arXiv 2108.12409) choose it; scaled as scores are."""
EPSILON = 1e-5
"""In the divisor of a norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticLine:
    """A curve of a synthetic experiment, a row a seed."""

    name: str
    """What it shows."""
    lengths: tuple[int, ...]
    """Numbers of tokens."""
    values: Float[Tensor, "seeds n"]
    """L1 distances."""


# ------------------------------------------------------------------------------------ exact


def delta(mu: Float[Tensor, "*b n"], nu: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """The L1 distance of two distributions (section 4.1; no factor 1/2)."""
    return (mu - nu).abs().sum(-1)


def alternating_distance(n: int) -> float:
    """Delta of the softmaxes of (1, 0, 1, 0, ...) and (0, 1, 0, 1, ...), n even (B.4)."""
    x = (torch.arange(n, dtype=torch.float64) + 1) % 2
    return float(delta(x.softmax(0), (1 - x).softmax(0)))


def last_weights(a: Float[Tensor, " m"], b: float, c: float) -> tuple[float, float]:
    """Softmax weight of the last entry c of [a, c] and of [a, b, c] (B.1)."""
    short = torch.cat([a, a.new_tensor([c])]).softmax(0)[-1]
    return float(short), float(torch.cat([a, a.new_tensor([b, c])]).softmax(0)[-1])


def lemma_bound(x: Float[Tensor, " n"], other: Float[Tensor, " n"]) -> float:
    """What the proof of B.2 holds delta under: twice the relative change of the exponentials.

    delta(softmax x, softmax x*) <= 2 sum_i |e^x_i - e^x*_i| / max(Z, Z*), Z the sums of e^x.
    """
    before, after = x.double().exp(), other.double().exp()
    return float(2 * (before - after).abs().sum() / torch.maximum(before.sum(), after.sum()))


def causal_uniform(n: int) -> Float[Tensor, "n n"]:
    """Attention that looks at all earlier tokens alike: row i holds 1 / (i + 1)."""
    weights = torch.ones(n, n, dtype=torch.float64).tril()
    return weights / weights.sum(-1, keepdim=True)


def residual_power(attention: Float[Tensor, "n n"], layers: int) -> Float[Tensor, " n"]:
    """Last row of [(Lambda + I) / 2]^layers (B.8)."""
    row = torch.zeros(len(attention), dtype=torch.float64)
    row[-1] = 1
    for _ in range(layers):
        row = (row @ attention.double() + row) / 2
    return row


def path_count(n: int, i: int, layers: int) -> int:
    """Monotone paths from token i to token n in so many layers: C(n - i + L - 1, L - 1)."""
    return math.comb(n - i + layers - 1, layers - 1)


# -------------------------------------------------------------------------------- synthetic


def figure_9(
    lengths: tuple[int, ...], seeds: int, changed: int = 200, noise: float = 0.1
) -> SyntheticLine:
    """Delta of the softmaxes of n uniform numbers and of the same with noise on the first 200."""
    values = torch.zeros(seeds, len(lengths), dtype=torch.float64)
    for seed in range(seeds):
        for place, n in enumerate(lengths):
            generator = torch.Generator().manual_seed(seed)
            x = torch.rand(n, generator=generator, dtype=torch.float64)
            other = x.clone()
            k = min(changed, n)
            other[:k] += noise * torch.rand(k, generator=generator, dtype=torch.float64)
            values[seed, place] = delta(x.softmax(0), other.softmax(0))
    return SyntheticLine(name="noise on 200 entries", lengths=lengths, values=values)


def figure_10(
    lengths: tuple[int, ...], seeds: int, positions: Positions, d: int = 64
) -> SyntheticLine:
    """L1 distance of the last outputs of one attention head at n and n + 1 tokens.

    Queries, keys and values are standard normal, normalised to length 1 (queries and keys with
    their sinusoidal positions, where they have those); the token at n is repeated at n + 1.
    """
    values = torch.zeros(seeds, len(lengths), dtype=torch.float64)
    for seed in range(seeds):
        for place, n in enumerate(lengths):
            generator = torch.Generator().manual_seed(seed)
            qkv = torch.randn(3, n, d, generator=generator).double()
            short = last_output(qkv[0], qkv[1], qkv[2], positions)
            qkv = torch.cat([qkv, qkv[:, -1:]], dim=1)
            long = last_output(qkv[0], qkv[1], qkv[2], positions)
            values[seed, place] = (short - long).abs().sum()
    return SyntheticLine(name=positions, lengths=lengths, values=values)


def figure_8(lengths: tuple[int, ...], seeds: int, d: int = 64) -> SyntheticLine:
    """L1 distance of the last outputs of a decoder block at n and n + 1 tokens, d = 64.

    Tokens are drawn from N(0, 1/d), as are the entries of query, key and value maps; positions are
    sinusoidal; the block is attention and an MLP of width 4 d (ReLU), each behind a norm and beside
    a residual branch, and a norm at the end.
    """
    values = torch.zeros(seeds, len(lengths), dtype=torch.float64)
    for seed in range(seeds):
        block = Block(d, torch.Generator().manual_seed(seed))
        for place, n in enumerate(lengths):
            generator = torch.Generator().manual_seed(1000 + seed)
            x = torch.randn(n, d, generator=generator).double() / math.sqrt(d)
            longer = torch.cat([x, x[-1:]])
            values[seed, place] = (block.last(x) - block.last(longer)).abs().sum()
    return SyntheticLine(name="decoder block", lengths=lengths, values=values)


class Block:
    """A decoder block of one head with random weights, for its last token alone."""

    def __init__(self, d: int, generator: torch.Generator) -> None:
        def draw(rows: int, columns: int) -> Tensor:
            weights = torch.randn(rows, columns, generator=generator).double()
            return weights / math.sqrt(rows)

        self.d = d
        self.query, self.key, self.value = (draw(d, d) for _ in range(3))
        self.up, self.down = draw(d, 4 * d), draw(4 * d, d)

    def last(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
        """What the block makes of the last of n tokens."""
        normed = normalised(x + sinusoids(len(x), self.d))
        scores = (normed[-1] @ self.query) @ (normed @ self.key).T / math.sqrt(self.d)
        z = scores.softmax(-1) @ (normed @ self.value) + x[-1]
        out = functional.relu(normalised(z) @ self.up) @ self.down + z
        return normalised(out)


def last_output(
    q: Float[Tensor, "n d"], k: Float[Tensor, "n d"], v: Float[Tensor, "n d"], positions: Positions
) -> Float[Tensor, " d"]:
    """One head's attention output at the last token, beside its residual branch."""
    n, d = q.shape
    if positions == "sinusoidal":
        q, k = q + sinusoids(n, d), k + sinusoids(n, d)
    q, k, v = unit(q), unit(k), unit(v)
    if positions == "rotary":
        q, k = rotated(q), rotated(k)
    scores = k @ q[-1]
    if positions == "alibi":
        scores = scores - ALIBI_SLOPE * torch.arange(n - 1, -1, -1, dtype=torch.float64)
    return (scores / math.sqrt(d)).softmax(0) @ v + v[-1]


def unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows of length 1."""
    return functional.normalize(x, dim=-1)


def normalised(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Rows of mean 0 and length 1: a norm without gain, scaled as the proofs have it."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.norm(dim=-1, keepdim=True) + EPSILON)


def sinusoids(n: int, d: int) -> Float[Tensor, "n d"]:
    """Sinusoidal positions (Vaswani et al. 2017, arXiv 1706.03762, section 3.5)."""
    angles = _angles(n, d, SINUSOIDAL_BASE)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def rotated(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864, equation 15): pairs turned by angles."""
    angles = _angles(x.shape[0], x.shape[1], ROTARY_BASE)
    even, odd = x[:, ::2], x[:, 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, dim=-1).flatten(1)


def _angles(n: int, d: int, base: float) -> Float[Tensor, "n half"]:
    rates = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    return torch.arange(n, dtype=torch.float64)[:, None] * rates
