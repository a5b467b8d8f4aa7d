"""Random networks and Boolean functions: side by side, against one at a time, and against a floor.

The floor is the products alone, at the rate of the largest product of square matrices.
"""

import itertools

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from analyses.simplicity.boolean import BITS, HIDDEN, INPUTS, count_tables, merged, truth_points
from analyses.simplicity.measures import grid, nodes, quantised
from analyses.simplicity.networks import Architecture, activated, draw, square
from analyses.simplicity.populations import Places, population, straight_lines
from tests.bench.timing import side_by_side

KIND = Architecture(activation="tanh", depth=3, scale=2.0)
NETWORKS, TABLES = 48, 40_000
PLAIN_NETWORKS, PLAIN_TABLES = 4, 200


def plain_phrases(symbols: np.ndarray) -> int:
    """The textbook's dictionary of phrases."""
    known: set[tuple[int, ...]] = set()
    phrase: tuple[int, ...] = ()
    for symbol in symbols.tolist():
        phrase += (symbol,)
        if phrase not in known:
            known.add(phrase)
            phrase = ()
    return len(known) + bool(phrase)


def plain_words(text: str) -> int:
    """The textbook's exhaustive history."""
    at = words = 0
    while at < len(text):
        size = 1
        while at + size <= len(text) and text[at : at + size] in text[: at + size - 1]:
            size += 1
        words, at = words + 1, at + size
    return words


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


@torch.no_grad()
def one_at_a_time() -> None:
    """Some networks with every measure, each by itself."""
    places = Places()
    lines = straight_lines(2, places.lines, places.steps).flatten(0, 1)
    points = torch.cat(
        [square(grid(places.side)), square(nodes(places.order, places.basis)), lines]
    )
    for number in range(PLAIN_NETWORKS):
        values = Mlp(number)(points)
        places.measured(values[None])
        symbols = quantised(values[: places.side**2].reshape(1, places.side, places.side))[0]
        for way in (symbols, symbols.T):
            plain_phrases(way.flatten().numpy())


def together() -> None:
    """Many networks with every measure, side by side."""
    population(KIND, NETWORKS, Places(), seed=0)


def products() -> None:
    """Their products, as one product of square matrices with as many operations."""
    points = Places().points().shape[0]
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
        plain_words(text)
        plain_words(text[::-1])


def tables_together() -> None:
    """Boolean networks side by side, and the complexity of those that differ."""
    merged([count_tables(TABLES, seed=0)])


def table_products() -> None:
    """Their products, as one product of square matrices with as many operations."""
    layers = sum(a * b for a, b in itertools.pairwise((INPUTS, *HIDDEN, 1)))
    _square_product(TABLES * BITS * layers, torch.float32)


def measure() -> pd.DataFrame:
    """Networks a second at the size of the maps, and Boolean networks a second."""
    shown = []
    for plain, n_plain, many, n_many, floor, unit in (
        (one_at_a_time, PLAIN_NETWORKS, together, NETWORKS, products, "networks"),
        (tables_one_at_a_time, PLAIN_TABLES, tables_together, TABLES, table_products, "tables"),
    ):
        ways = {"one at a time": plain, "together": many, "the products alone": floor}
        shown.append(side_by_side(ways, [n_plain, n_many, n_many], unit, rounds=3))
    return pd.concat(shown, ignore_index=True)
