"""Complexity measures on functions whose complexity is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev, legendre
from textbook_parsers import phrases_78, words_76

from analyses.simplicity.measures import (
    boolean_lz,
    fourier,
    grid,
    lz,
    lz76,
    lz78,
    nodes,
    plain_fourier,
    polynomial,
    quantised,
    total_variation,
    undefined,
)
from probe.errors import UserError


def bits(text: str) -> np.ndarray:
    return np.array([[int(c) for c in text]], dtype=bool)


# -------------------------------------------------------------------------------- Lempel and Ziv


@pytest.mark.parametrize(
    ("text", "complexity"),
    [
        ("0" * 128, 7.0),
        ("1" * 128, 7.0),
        ("01" * 64, 21.0),
        ("0" * 64 + "1" * 64, 21.0),
        ("0" * 127 + "1", 17.5),
        ("".join(str(i.bit_count() % 2) for i in range(128)), 91.0),
        ("".join(str(int(i.bit_count() > 3)) for i in range(128)), 70.0),
        ("0001101001000101", 24.0),
    ],
)
def test_truth_tables_have_the_complexity_of_the_reference_routine(text, complexity):
    assert boolean_lz(bits(text))[0] == complexity


def test_random_tables_are_as_complex_as_the_reference_finds_them():
    drawn = np.random.default_rng(0).random((300, 128)) < 0.5
    found = boolean_lz(drawn)
    assert found.mean() == pytest.approx(148.8, abs=1) and 130 < found.min() < found.max() < 170


@pytest.mark.parametrize("length", range(1, 13))
def test_parsings_equal_the_textbooks_on_all_strings(length):
    texts = ["".join(text) for text in itertools.product("01", repeat=length)]
    symbols = np.array([[int(c) for c in text] for text in texts])
    assert lz76(symbols).tolist() == [words_76(text) for text in texts]
    assert lz78(symbols, 2).tolist() == [phrases_78(text) for text in texts]


def test_more_symbols_and_no_strings():
    rng = np.random.default_rng(0)
    symbols = rng.integers(0, 10, (20, 60))
    texts = ["".join(map(str, row)) for row in symbols]
    assert lz78(symbols, 10).tolist() == [phrases_78(text) for text in texts]
    assert lz76(symbols).tolist() == [words_76(text) for text in texts]
    assert lz78(np.zeros((0, 4), np.int64), 2).tolist() == []


def test_values_become_symbols_by_equal_steps_and_both_scan_orders_count():
    values = torch.tensor([[0.0, 0.1, 0.55, 1.0]], dtype=torch.float64)
    assert quantised(values, 2).tolist() == [[0, 0, 1, 1]]
    stripes = torch.tensor([[0.0, 1.0, 0.0, 1.0]] * 4, dtype=torch.float64)[None]
    rows, columns = "0101" * 4, "0000111100001111"
    assert lz(stripes, 2).item() == (phrases_78(rows) + phrases_78(columns)) / 2
    assert lz(stripes.swapaxes(1, 2), 2) == lz(stripes, 2)


# -------------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("cycles", [0.5, 1, 3.5, 7])
def test_fourier_of_a_pure_cosine_is_its_frequency(cycles):
    line = torch.cos(math.pi * cycles * (grid(32) + 1))[None]
    assert fourier(line).item() == pytest.approx(cycles, abs=1e-9)
    along = line.expand(32, -1)[None]
    assert fourier(along).item() == pytest.approx(cycles, abs=1e-9), "one axis of two"
    assert fourier(along.swapaxes(1, 2)).item() == pytest.approx(cycles, abs=1e-9)


def test_fourier_of_two_axes_is_the_length_and_of_a_sum_the_weighted_mean():
    a, b = (torch.cos(math.pi * k * (grid(32) + 1)) for k in (3, 4))
    assert fourier((a[:, None] * b)[None]).item() == pytest.approx(5, abs=1e-9)
    assert fourier((3 * a + b + 7)[None]).item() == pytest.approx((3 * 3 + 4) / 4, abs=1e-9)


def test_a_plain_transform_takes_the_edges_for_a_step():
    slope, hills = grid(64)[None], torch.cos(math.pi * 6 * (grid(64) + 1))[None]
    assert plain_fourier(hills).item() == pytest.approx(6, abs=1e-9)
    assert plain_fourier(slope).item() > 6 > 2 > fourier(slope).item()


@pytest.mark.parametrize(
    ("basis", "made"), [("chebyshev", chebyshev.chebval), ("legendre", legendre.legval)]
)
def test_polynomials_have_their_own_order(basis, made):
    places = nodes(16, basis).numpy()
    for order in (1, 4, 9):
        values = torch.from_numpy(made(places, np.eye(order + 1)[order]))[None]
        assert polynomial(values, basis).item() == pytest.approx(order, abs=1e-8)
    mixed = torch.from_numpy(made(places, [5, 3, 0, 1]))[None]
    assert polynomial(mixed, basis).item() == pytest.approx((3 * 1 + 1 * 3) / 4, abs=1e-8)
    first = torch.from_numpy(made(places, [0, 0, 1]))
    product = (first[:, None] * first)[None]
    assert polynomial(product, basis).item() == pytest.approx(4, abs=1e-8), "orders add up"


def test_total_variation_by_hand():
    values = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    deviation = values.std(correction=0).item()
    assert total_variation(values).item() == pytest.approx((2 + 1) / 2 / deviation)
    slope = torch.linspace(0, 5, 1001, dtype=torch.float64)[None, None]
    assert total_variation(slope).item() == pytest.approx(math.sqrt(12), rel=1e-2)


# ----------------------------------------------------------------------------------- no complexity


def test_constants_have_no_complexity():
    nearly = torch.full((1, 8, 8), 3.0, dtype=torch.float64)
    nearly[0, 0, 0] += 1e-9
    values = torch.cat([nearly, torch.rand(1, 8, 8, dtype=torch.float64)])
    assert undefined(values).tolist() == [True, False]
    for measured in (fourier(values), plain_fourier(values), polynomial(values, "chebyshev"),
                     lz(values), total_variation(values)):  # fmt: skip
        assert torch.isnan(measured).tolist() == [True, False]
    assert undefined(torch.zeros(1, 4)).item(), "zero everywhere"


def test_what_cannot_be_measured_is_said():
    with pytest.raises(UserError, match="too small for a spectrum; use at least 4"):
        fourier(torch.rand(2, 3, 3))
    with pytest.raises(UserError, match="not finite"):
        polynomial(torch.full((1, 8), math.inf), "legendre")
