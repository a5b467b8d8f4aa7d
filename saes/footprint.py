"""What training takes on paper: memory and time of a step, from the sizes alone.

With b rows in a batch of width d, m latents of which k are active, and R ranks that divide the rows
(b / R of them each) or the latents (m / R each); b', m' are a rank's share. Bytes and operations of
one rank:

1. state: 2 d m' + m' + d parameters in float32, as many gradients and twice as many moments of
   Adam's: 16 bytes for each parameter; with `encoder_dtype` bfloat16 a copy of the encoder (2 d
   m');
2. activations: the rows, their reconstruction, its error and gradients, about 6 float32 arrays
   [b', d] (b' = b where latents are divided), and 48 bytes for each chosen entry;
3. the dense encoder product: 2 b' d m' operations;
4. the sparse products: each of the n = b k / R entries reads rows of d float32 four times (decode,
   gradients of the codes, of `W_dec`, of `W_enc`) and once and a half more where bfloat16 scores
   nominate;
5. the update: 45 bytes a parameter (gradient written, projected, Adam reads four arrays and writes
   three, decoder rows normalised, encoder rounded);
6. what is exchanged: 8 (R - 1) / R bytes a parameter where rows are divided, of touched latents (at
   most b k of them); 4 b (k (R - 1) + 2 d (R - 1) / R) bytes where latents are.

Time is the sum of 3 to 6, one after the other, at `Rates`: a guess within a factor of 2, since no
rate is reached exactly and some of this overlaps. `python -m saes.footprint` writes the README's
table.
"""

import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a device does in a second; the defaults are about what an H100 (SXM) sustains."""

    flops: float = 400e12
    """Operations of a bfloat16 matrix product; 990e12 at most."""
    memory: float = 2.5e12
    """Bytes to and from the device's memory; 3.35e12 at most."""
    exchange: float = 300e9
    """Bytes between the devices of one node (NVLink, 450e9 at most); between nodes, with one
    400 Gb/s card for each device, 40e9."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What one rank holds and moves in a step."""

    parameters: int
    """Parameters held by one rank."""
    state_bytes: int
    """Parameters, gradients, Adam's moments, and the encoder's rounded copy if there is one."""
    activation_bytes: int
    """Rows, reconstructions, gradients and entries of one step."""
    flops: int
    """Operations of the dense encoder product."""
    moved_bytes: int
    """To and from memory by the sparse products and the update."""
    exchanged_bytes: int
    """To and from other ranks."""

    @property
    def memory_bytes(self) -> int:
        """All that a device must hold."""
        return self.state_bytes + self.activation_bytes

    def seconds(self, rates: Rates) -> float:
        """Time of one step."""
        work = self.flops / rates.flops + self.moved_bytes / rates.memory
        return work + self.exchanged_bytes / rates.exchange


def footprint(
    *, d: int, m: int, k: int, b: int, ranks: int = 1, sharded: bool = False, reduced: bool = True
) -> Footprint:
    """What a step of TopK takes of one of `ranks` ranks, by the formulas above.

    `sharded`: latents are divided, not rows. `reduced`: bfloat16 scores nominate latents.
    """
    latents = -(-m // ranks) if sharded else m
    rows = b if sharded else -(-b // ranks)
    entries = -(-b * k // ranks)
    parameters = 2 * d * latents + latents + d
    others = ranks - 1
    touched = min(m, b * k)
    return Footprint(
        parameters=parameters,
        state_bytes=16 * parameters + (2 * d * latents if reduced else 0),
        activation_bytes=6 * 4 * rows * d + 48 * entries,
        flops=2 * rows * d * latents,
        moved_bytes=round((5.5 if reduced else 4) * 4 * d * entries) + 45 * parameters,
        exchanged_bytes=4 * b * (k * others + 2 * d * others // ranks)
        if sharded
        else 8 * (2 * d + 1) * touched * others // ranks,
    )


def table(b: int = 8192, k: int = 32, ranks: int = 8) -> str:
    """The README's table, in Markdown: memory of a device and time of a step, three ways."""
    lines = [
        f"| d | latents | parameters | 1 GPU | {ranks} GPUs, rows divided | {ranks} GPUs, latents "
        "divided |",
        "|---|---|---|---|---|---|",
    ]
    for d in (576, 4096):
        for m in (2**17, 2**20):
            one = footprint(d=d, m=m, k=k, b=b)
            ways = [one] + [
                footprint(d=d, m=m, k=k, b=b, ranks=ranks, sharded=sharded)
                for sharded in (False, True)
            ]
            cells = [
                f"{way.memory_bytes / 1e9:,.1f} GB, {1e3 * way.seconds(Rates()):,.0f} ms"
                for way in ways
            ]
            shape = f"| {d} | {m:,} | {one.parameters / 1e9:.3g} G "
            lines.append(shape + "".join(f"| {cell} " for cell in cells) + "|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
