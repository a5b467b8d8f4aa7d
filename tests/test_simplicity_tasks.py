"""Boolean functions, perceptrons, and what small networks learn."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from analyses.simplicity.boolean import (
    INPUTS,
    LN_FUNCTIONS,
    by_complexity,
    by_rank,
    count_tables,
    decade_slopes,
    drawn_counts,
    merged,
    rank_slope,
    signed_counts,
    truth_points,
    unpacked,
    upper_bound,
)
from analyses.simplicity.learning import (
    BAND,
    digits,
    lattice,
    modulo,
    modulo_labels,
    shortcut,
    squared_correlation,
    trained,
)
from analyses.simplicity.measures import boolean_lz
from analyses.simplicity.networks import Architecture, draw, outputs

# --------------------------------------------------------------------------------------- Boolean


def test_inputs_are_in_the_order_of_the_binary_numbers():
    assert truth_points(3).tolist()[:4] == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert truth_points(2, centred=True).tolist() == [[-1, -1], [-1, 1], [1, -1], [1, 1]]


def test_tables_are_counted_and_come_back():
    counts = count_tables(3000, seed=0)
    assert counts["count"].sum() == 3000
    every = merged([counts, counts])
    assert every["count"].sum() == 6000 and every["count"].is_monotonic_decreasing
    bits = unpacked(every[["high", "low"]].to_numpy())
    assert bits.shape[1] == 128
    assert (bits.sum(1) == every["ones"]).all()
    assert {0, 128} == set(every["ones"].head(2)), "the constants come first"
    assert np.allclose(boolean_lz(bits[:50]), every["complexity"].head(50))
    assert 0.3 < every["count"].iloc[0] / 6000 < 0.45, "an earlier trial found 36 %"


def test_the_same_seed_draws_the_same_tables():
    one, two = (count_tables(700, seed=5).sort_values(["high", "low"]) for _ in range(2))
    pd.testing.assert_frame_equal(one, two)
    assert len(count_tables(700, seed=6).merge(one, on=["high", "low", "count"])) < len(one)


def test_a_table_is_what_a_plain_network_says():
    """The same draws through torch.nn, one network at a time."""
    generator, shapes = torch.Generator().manual_seed(3), [(7, 40), (40, 40), (40, 1)]
    drawn = []
    for fan_in, fan_out in shapes:
        weight = torch.randn(4, fan_in, fan_out, generator=generator) / fan_in**0.5
        drawn.append((weight, torch.randn(4, 1, fan_out, generator=generator)))
    expected = set()
    for number in range(4):
        layers: list[nn.Module] = []
        for weight, bias in drawn:
            layer = nn.Linear(*weight.shape[1:])
            layer.weight.data, layer.bias.data = weight[number].T.clone(), bias[number, 0].clone()
            layers += [layer, nn.ReLU()]
        bits = (nn.Sequential(*layers[:-1])(truth_points(INPUTS))[:, 0] > 0).numpy()
        expected.add(tuple(bits.tolist()))
    found = unpacked(count_tables(4, seed=3)[["high", "low"]].to_numpy())
    assert {tuple(row) for row in found.tolist()} == expected


def test_bound_rank_and_zipf_by_hand():
    grouped = pd.DataFrame(
        {"complexity": [10.0, 20.0, 30.0], "highest": [2.0**-3, 2.0**-9, 2.0**-11],
         "seen_twice": [1, 3, 1]}
    )  # fmt: skip
    slope, offset = upper_bound(grouped)
    assert slope.value == pytest.approx(0.4)
    bound = 2.0 ** (-slope.value * grouped["complexity"] - offset)
    assert np.all(bound >= grouped["highest"] * (1 - 1e-9)) and offset == pytest.approx(-1)
    counts = pd.DataFrame({"count": [500, 300, 200], "complexity": [7.0, 7.0, 21.0]})
    ranks = by_rank(counts)
    assert ranks["rank"].tolist() == [1, 2, 3]
    assert ranks["probability"].tolist() == [0.5, 0.3, 0.2]
    assert ranks["zipf"].iloc[1] == pytest.approx(1 / (2 * 88.72), rel=1e-3)
    assert pytest.approx(128 * math.log(2)) == LN_FUNCTIONS
    table = by_complexity(counts)
    assert table["probability"].tolist() == [0.8, 0.2] and table["highest"].tolist() == [0.5, 0.2]


def test_a_power_law_has_its_slope():
    ranks = np.arange(1, 2001)
    counts = pd.DataFrame({"count": (1e6 / ranks).astype(int)})
    assert rank_slope(counts) == pytest.approx(-1, abs=0.01)
    assert math.isnan(rank_slope(pd.DataFrame({"count": [3, 2, 1]}))), "too rare to tell"
    decades = decade_slopes(counts)
    assert decades["from_rank"].tolist() == [3, 10, 100, 1000]
    assert decades["to_rank"].tolist() == [10, 100, 1000, 2000]
    assert decades["slope"].tolist() == pytest.approx([-1] * 4, abs=0.01)
    assert not len(decade_slopes(pd.DataFrame({"count": [30, 20, 1]})))


@pytest.mark.parametrize("n", range(3, 11))
def test_the_signs_of_a_perceptron_are_a_bijection_onto_its_counts(n):
    sizes = np.abs(np.random.default_rng(n).standard_normal(n))
    assert sorted(signed_counts(sizes).tolist()) == list(range(2**n))
    assert set(signed_counts(sizes, centred=True).tolist()) == {2 ** (n - 1)}


def test_drawn_perceptrons_map_every_number_of_points_alike():
    table = drawn_counts(4, 64_000, seed=0)
    assert table["ones"].tolist() == list(range(16))
    assert np.abs(table["count"] / 4000 - 1).max() < 0.08
    skewed = drawn_counts(4, 64_000, seed=0, bias=1.0)
    assert skewed["ones"].max() == 16 and skewed["count"].max() > 8000, "constants gain"


# -------------------------------------------------------------------------------------- learning


def test_labels_of_modulo_addition_by_hand():
    labels = modulo_labels(10).reshape(16, 16)
    assert labels[0, :12].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert labels[7, 4] == 1 and labels[7, 15] == 1 and labels[15, 4] == 0  # 11, 22, 19
    assert modulo_labels(4).mean() == pytest.approx(0.75, abs=0.02)
    assert lattice()[17].tolist() == pytest.approx([-1 + 2 / 15, -1 + 2 / 15])


def test_networks_trained_side_by_side_are_trained_as_alone():
    kind = Architecture(depth=2, width=8, activation="tanh")
    weights = draw(kind, 3, seed=0)
    points = lattice()[torch.randperm(256, generator=torch.Generator().manual_seed(0))[:60]]
    targets = torch.stack([modulo_labels(m)[:60] for m in (10, 7, 4)])
    every = points.expand(3, -1, -1)
    options = {"loss": binary_cross_entropy_with_logits, "steps": 20}
    together = trained(kind, weights, every, targets, **options)
    for number in range(3):
        one = slice(number, number + 1)
        alone = trained(kind, weights.part(one), every[one], targets[one], **options)
        torch.testing.assert_close(together.hidden[1].weight[one], alone.hidden[1].weight)
        torch.testing.assert_close(together.out.bias[one], alone.out.bias)
    assert not together.hidden[0].weight.requires_grad


def test_training_is_that_of_torch():
    kind = Architecture(depth=1, width=5)
    weights, points = draw(kind, 1, seed=1), lattice()[:30]
    targets = points.sum(1)[None]
    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1))
    for layer, own in ((model[0], weights.hidden[0]), (model[2], weights.out)):
        assert isinstance(layer, nn.Linear)
        layer.weight.data = own.weight[0].T.float().clone()
        layer.bias.data = own.bias[0, 0].float().clone()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(15):
        optimiser.zero_grad()
        mse_loss(model(points.float())[:, 0], targets[0].float()).backward()
        optimiser.step()
    moved = trained(kind, weights, points[None], targets, loss=mse_loss, steps=15)
    given = outputs(kind, moved, points)[0]
    torch.testing.assert_close(given, model(points.float())[:, 0].detach())


def test_a_network_that_fits_learns_the_task():
    kind = Architecture(activation="tanh", depth=2, width=64, prefactor=2.0)
    found = modulo(kind, (10, 4), seeds=2, steps=400)
    assert found["modulus"].tolist() == [10, 10, 4, 4]
    assert found["target"].nunique() == 2 and found["target"].iloc[3] > found["target"].iloc[0]
    assert found["train"].iloc[0] > 0.95 and found["test"].iloc[0] > 0.75
    assert found["initial"].iloc[0] == pytest.approx(found["initial"].iloc[2]), "same beginning"


def test_digits_stand_beside_a_colour_that_tells_them_in_training_alone():
    data = digits(200)
    assert data.train.shape == (200, 64 + BAND) and data.train.abs().max() <= 1
    torch.testing.assert_close(data.train[:, -1], data.train_targets)
    torch.testing.assert_close(data.test[:, -1], data.test_colours)
    told = squared_correlation(data.test_colours[None], data.test_digits)
    assert told.item() < 0.01
    assert data.train_targets.min() == -1 and data.train_targets.max() == 1


def test_a_smooth_network_goes_by_the_colour():
    kind = Architecture(activation="gelu", depth=2, width=32, prefactor=0.5)
    found = shortcut(kind, digits(200), seeds=2, steps=150)
    assert (found["colour"] > 0.9).all() and (found["digit"] < 0.1).all()
    assert (found["train"] > 0.9).all()


def test_squared_correlation_by_hand():
    wanted = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    given = torch.stack(
        [5 - 2 * wanted, torch.tensor([1.0, -2.0, 1.0]).double(), torch.ones(3).double()]
    )
    assert squared_correlation(given, wanted).tolist() == pytest.approx([1, 0, 0])
