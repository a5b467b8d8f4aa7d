"""How complex the functions of random networks are: a row a network, a column a measure."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.cells import Frame
from analyses.simplicity.measures import (
    Basis,
    fourier,
    grid,
    lz,
    nodes,
    plain_fourier,
    polynomial,
    total_variation,
)
from analyses.simplicity.networks import Architecture, Weights, draw, outputs, square

NETWORKS_AT_ONCE, NUMBERS_AT_ONCE = 4, 2**17
"""Networks whose values are worked out side by side, and the numbers that are between two of their
layers then (1 MB): they stay in a processor's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where functions of two inputs are sampled for the measures."""

    side: int = 64
    """Points a side of the regular grid."""
    order: int = 32
    """Polynomials a side, and the points a side that they are sampled on."""
    basis: Basis = "chebyshev"
    """Which polynomials."""
    lines: int = 16
    """Straight lines for the total variation."""
    steps: int = 64
    """Points on each."""

    def points(self) -> Float[Tensor, "p 2"]:
        """All of them: the grid, the polynomials' nodes, the lines."""
        lines = straight_lines(2, self.lines, self.steps)
        parts = [
            square(grid(self.side)),
            square(nodes(self.order, self.basis)),
            lines.flatten(0, 1),
        ]
        return torch.cat(parts)

    def measured(self, values: Float[Tensor, "n p"]) -> Frame:
        """Every measure of functions sampled at `points`, a row each; nan of constants."""
        n = len(values)
        sizes = [self.side**2, self.order**2, self.lines * self.steps]
        on_grid, on_nodes, on_lines = values.split(sizes, dim=1)
        on_grid = on_grid.reshape(n, self.side, self.side)
        on_nodes = on_nodes.reshape(n, self.order, self.order)
        found = {
            "fourier": fourier(on_grid), "plain_fourier": plain_fourier(on_grid),
            "polynomial": polynomial(on_nodes, self.basis), "lz": lz(on_grid),
            "variation": total_variation(on_lines.reshape(n, self.lines, self.steps)),
        }  # fmt: skip
        return pd.DataFrame({name: column.numpy() for name, column in found.items()})


def population(architecture: Architecture, n: int, places: Places, *, seed: int) -> Frame:
    """The functions of `n` networks of two inputs: `draw` and a column a measure."""
    weights = draw(architecture, n, seed=seed)
    weights.check_finite()
    values = _values(architecture, weights, places.points())
    return places.measured(values).assign(draw=np.arange(n))


def _values(
    architecture: Architecture, weights: Weights, points: Float[Tensor, "p 2"]
) -> Float[Tensor, "n p"]:
    """`outputs`, a few networks and points at a time.

    In float64: rounding to float32 is noise of all frequencies, which makes smooth functions, whose
    own high frequencies are next to nothing, look more complex, by a fifth at small weight scales.
    """
    widest = max(channels for _, channels in architecture.layers)
    some = max(1, NUMBERS_AT_ONCE // (NETWORKS_AT_ONCE * widest))
    rows = []
    for start in range(0, len(weights.out.weight), NETWORKS_AT_ONCE):
        part = weights.part(slice(start, start + NETWORKS_AT_ONCE))
        rows.append(torch.cat([outputs(architecture, part, one) for one in points.split(some)], 1))
    return torch.cat(rows)


def straight_lines(inputs: int, n: int, steps: int, *, seed: int = 0) -> Float[Tensor, "n s i"]:
    """Points at equal steps on straight lines between random points of [-1, 1]^inputs."""
    rng = np.random.default_rng(seed)
    ends = torch.from_numpy(rng.uniform(-1, 1, (2, n, 1, inputs)))
    way = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    return ends[0] + way * (ends[1] - ends[0])
