"""The theorems of Barbero et al. 2024, against hand-computed numbers and on random tensors."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analyses.collapse.theory import (
    B4,
    POSITIONS,
    alternating_distance,
    causal_uniform,
    delta,
    figure_8,
    figure_9,
    figure_10,
    last_weights,
    lemma_bound,
    path_count,
    residual_power,
    rotated,
    sinusoids,
)

BOUNDED = st.floats(-3, 3)


def test_the_distance_is_the_sum_of_differences_without_a_half():
    mu, nu = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    assert float(delta(mu, nu)) == 1.0


def test_b4_is_its_constant_at_every_even_length():
    assert pytest.approx(0.924234, abs=1e-6) == B4
    for n in (2, 4, 6, 50, 1000, 10_000):
        assert alternating_distance(n) == pytest.approx(B4, abs=1e-6)


def test_b8_takes_everything_to_the_first_token():
    row = residual_power(causal_uniform(20), 2000)
    assert float(row[0]) == pytest.approx(1, abs=1e-6)
    assert float(row[1:].abs().max()) < 1e-6
    # Attention that gives the last token all its own weight: (Lambda + I) / 2 = I on its row.
    own = torch.eye(4, dtype=torch.float64)
    assert residual_power(own, 50).tolist() == [0, 0, 0, 1]


def test_b8_of_one_layer_by_hand():
    # Row 2 of (Lambda + I) / 2 with uniform attention over three tokens: (1/3, 1/3, 1/3 + 1) / 2.
    row = residual_power(causal_uniform(3), 1)
    torch.testing.assert_close(row, torch.tensor([1 / 6, 1 / 6, 4 / 6], dtype=torch.float64))


@pytest.mark.parametrize("n, layers", [*itertools.product((1, 3, 5), (1, 2, 4))])
def test_path_counts_are_those_of_enumeration(n, layers):
    for i in range(1, n + 1):
        middle = itertools.product(range(i, n + 1), repeat=layers - 1)
        monotone = sum(all(a <= b for a, b in itertools.pairwise((i, *ks, n))) for ks in middle)
        assert path_count(n, i, layers) == monotone
    assert path_count(n, n, layers) == 1


@given(st.lists(BOUNDED, min_size=1, max_size=30), BOUNDED, BOUNDED)
@settings(max_examples=100, deadline=None)
def test_b1_one_more_token_takes_attention_from_the_last(a, b, c):
    short, long = last_weights(torch.tensor(a, dtype=torch.float64), b, c)
    assert long < short


def test_b1_the_gap_vanishes():
    gaps = []
    for n in (10, 100, 1000):
        a = torch.zeros(n, dtype=torch.float64)
        short, long = last_weights(a, 0.0, 1.0)
        gaps.append(short - long)
    assert gaps[0] > gaps[1] > gaps[2] > 0 and gaps[2] < 1e-5


@given(st.lists(st.tuples(BOUNDED, st.floats(-0.5, 0.5)), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_b2_bounds_the_distance(pairs):
    x, noise = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    distance = float(delta(x.softmax(0), (x + noise).softmax(0)))
    assert distance <= lemma_bound(x, x + noise) + 1e-12


def test_figure_9_falls_as_the_share_of_what_changed():
    values = figure_9((500, 1000, 2000, 5000, 10_000), 5).values.mean(0)
    # Read off the paper's plot, to about ten per cent.
    read = torch.tensor([0.0265, 0.017, 0.0095, 0.004, 0.002], dtype=torch.float64)
    torch.testing.assert_close(values, read, rtol=0.1, atol=0)


def test_figure_10_without_positions_falls_as_one_over_n():
    lengths = (5, 10, 100, 500, 1000)
    values = figure_10(lengths, 5, "none").values.mean(0)
    read = torch.tensor([1.0, 0.55, 0.065, 0.0135, 0.007], dtype=torch.float64)
    torch.testing.assert_close(values, read, rtol=0.15, atol=0)
    assert float(values[2] / values[4]) == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_kind_of_positions_collapses(positions):
    values = figure_10((10, 1000), 3, positions).values
    assert bool((values[:, 1] < values[:, 0] / 20).all())


def test_figure_8_crosses_the_resolution_of_bfloat16_between_100_and_2000():
    values = figure_8((100, 2000), 5).values.mean(0)
    assert float(values[0]) > 2**-7 > float(values[1])


def test_positions_by_hand():
    # Position 1 of width 4: angles 1 and 1 / 100.
    wanted = [math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)]
    assert sinusoids(2, 4)[1].tolist() == pytest.approx(wanted)
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert rotated(x)[1].tolist() == pytest.approx([math.cos(1), math.sin(1)])
