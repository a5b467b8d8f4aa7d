"""Random networks and Boolean functions: side by side, against one at a time, and against a floor.

The floor is the products alone, at the rate of the largest product of square matrices.
"""

import itertools

import numpy as np
import pandas as pd
import torch
from numpy.polynomial import chebyshev
from scipy import fft
from torch import Tensor, nn

from analyses.simplicity.boolean import BITS, HIDDEN, INPUTS, count_tables, merged, truth_points
from analyses.simplicity.measures import nodes, quantised
from analyses.simplicity.networks import Architecture, activated, draw
from analyses.simplicity.populations import Places, population
from tests.bench.timing import side_by_side
from tests.textbook_parsers import phrases_78, words_76

KIND = Architecture(activation="tanh", depth=3, scale=2.0)
PLACES = Places()
NETWORKS, TABLES = 48, 40_000
PLAIN_NETWORKS, PLAIN_TABLES = 4, 200


class Mlp(nn.Module):
    """A network as one would write it down."""

    def __init__(self, number: int) -> None:
        super().__init__()
        weights = draw(KIND, 1, seed=number)
        self.layers = nn.ModuleList()
        for one in (*weights.hidden, weights.out):
            layer = nn.Linear(one.weight.shape[1], one.weight.shape[2], dtype=torch.float64)
            layer.weight.data, layer.bias.data = one.weight[0].T, one.bias[0, 0]
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Values at points."""
        for layer in self.layers[:-1]:
            x = activated(KIND.activation, layer(x))
        return self.layers[-1](x)[:, 0]


def plain_measures(values: np.ndarray) -> dict[str, float]:
    """Every measure of one function sampled at `Places().points()`, with scipy and textbooks."""
    side, order, lines = PLACES.side, PLACES.order, (PLACES.lines, PLACES.steps)
    on_grid, on_nodes, on_lines = np.split(values, [side**2, side**2 + order**2])
    on_grid, on_nodes = on_grid.reshape(side, side), on_nodes.reshape(order, order)
    half, whole = np.arange(side) / 2, np.abs(np.fft.fftfreq(side, 1 / side))
    orders = np.arange(order)
    fitted = chebyshev.chebvander(nodes(order, "chebyshev").numpy(), order - 1)
    coefficients = np.linalg.solve(fitted, np.linalg.solve(fitted, on_nodes).T).T
    symbols = quantised(torch.from_numpy(on_grid)[None])[0].numpy()
    texts = ["".join(map(str, way.flatten())) for way in (symbols, symbols.T)]
    moved = np.abs(np.diff(on_lines.reshape(lines))).sum(1).mean()
    cosines = np.asarray(fft.dctn(on_grid, norm="ortho"))
    return {
        "fourier": _mean(cosines, np.hypot(half[:, None], half)),
        "plain_fourier": _mean(np.fft.fftn(on_grid), np.hypot(whole[:, None], whole)),
        "polynomial": _mean(coefficients, orders[:, None] + orders),
        "lz": sum(map(phrases_78, texts)) / 2,
        "variation": moved / on_lines.std(),
    }  # fmt: skip


def _mean(coefficients: np.ndarray, of: np.ndarray) -> float:
    weights = np.abs(coefficients).flatten()[1:]
    return float(weights @ of.flatten()[1:] / weights.sum())


@torch.no_grad()
def one_at_a_time() -> None:
    """Some networks with every measure, each by itself."""
    points = PLACES.points()
    for number in range(PLAIN_NETWORKS):
        plain_measures(Mlp(number)(points).numpy())


def values_one_at_a_time(values: Tensor) -> None:
    """The measures of functions that are there, each by itself."""
    for row in values.numpy():
        plain_measures(row)


def together() -> None:
    """Many networks with every measure, side by side."""
    population(KIND, NETWORKS, PLACES, seed=0)


def products() -> None:
    """Their products, as one product of square matrices with as many operations."""
    points = PLACES.points().shape[0]
    operations = NETWORKS * points * (2 * KIND.width + (KIND.depth - 1) * KIND.width**2)
    _square_product(operations, torch.float64)


def _square_product(operations: float, dtype: torch.dtype) -> None:
    side = max(1, round(operations ** (1 / 3)))
    a = torch.ones(side, side, dtype=dtype)
    torch.mm(a, a)


@torch.no_grad()
def tables_one_at_a_time() -> None:
    """Some Boolean networks, each by itself, with its complexity."""
    points = truth_points(INPUTS)
    for _ in range(PLAIN_TABLES):
        sizes = list(itertools.pairwise((INPUTS, *HIDDEN, 1)))
        x = points
        for number, (fan_in, fan_out) in enumerate(sizes):
            x = x @ (torch.randn(fan_in, fan_out) / fan_in**0.5) + torch.randn(fan_out)
            x = x.relu() if number < len(sizes) - 1 else x
        text = "".join("1" if one else "0" for one in (x[:, 0] > 0).tolist())
        words_76(text)
        words_76(text[::-1])


def tables_together() -> None:
    """Boolean networks side by side, and the complexity of those that differ."""
    merged([count_tables(TABLES, seed=0)])


def table_products() -> None:
    """Their products, as one product of square matrices with as many operations."""
    layers = sum(a * b for a, b in itertools.pairwise((INPUTS, *HIDDEN, 1)))
    _square_product(TABLES * BITS * layers, torch.float32)


def measure() -> pd.DataFrame:
    """Networks a second at the size of the maps, their measures alone, and Boolean networks."""
    values = torch.cat([Mlp(number)(PLACES.points())[None] for number in range(NETWORKS)]).detach()
    shown = []
    for ways, works, unit in (
        ({"one at a time": one_at_a_time, "together": together, "the products alone": products},
         [PLAIN_NETWORKS, NETWORKS, NETWORKS], "networks"),
        ({"one at a time": lambda: values_one_at_a_time(values[:PLAIN_NETWORKS]),
          "together": lambda: PLACES.measured(values)}, [PLAIN_NETWORKS, NETWORKS], "measured"),
        ({"one at a time": tables_one_at_a_time, "together": tables_together,
          "the products alone": table_products}, [PLAIN_TABLES, TABLES, TABLES], "tables"),
    ):  # fmt: skip
        shown.append(side_by_side(ways, works, unit, rounds=3))
    return pd.concat(shown, ignore_index=True)
