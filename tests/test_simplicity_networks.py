"""Random networks side by side, against one at a time and by hand."""

import dataclasses
import math

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

from analyses.simplicity.measures import grid
from analyses.simplicity.networks import (
    ACTIVATIONS,
    PRIORS,
    Activation,
    Architecture,
    Weights,
    activated,
    draw,
    outputs,
    square,
)
from analyses.simplicity.populations import Places, population, straight_lines
from probe.errors import UserError

POINTS = square(grid(5))


def one_by_one(kind: Architecture, weights: Weights, number: int) -> torch.Tensor:
    """The formulas for one network and one point at a time."""
    found = []
    for point in POINTS:
        x = point
        for i, layer in enumerate(weights.hidden):
            z = layer.weight[number].T @ x + layer.bias[number, 0]
            inner = (z - z.mean()) / z.std(correction=0) if kind.layer_norm else z
            y = activated(kind.activation, kind.prefactor * inner)
            y = y + z if kind.residual else y
            if kind.gated:
                gate = weights.gates[i]
                y = y * torch.sigmoid(gate.weight[number].T @ x + gate.bias[number, 0])
            x = y
        found.append(weights.out.weight[number].T @ x + weights.out.bias[number, 0])
    return torch.cat(found)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("added", ["", "layer_norm", "residual", "gated"])
def test_many_at_once_equal_one_at_a_time(activation, added):
    kind = Architecture(activation=activation, depth=2, width=6, scale=2.0, prefactor=0.5)
    if added:
        kind = dataclasses.replace(kind, **{added: True})
    weights = draw(kind, 3, seed=1)
    values = outputs(kind, weights, POINTS)
    for number in range(3):
        torch.testing.assert_close(values[number], one_by_one(kind, weights, number))


@pytest.mark.parametrize(
    ("activation", "module"),
    [("relu", nn.ReLU()), ("gelu", nn.GELU()), ("swish", nn.SiLU()), ("selu", nn.SELU()),
     ("tanh", nn.Tanh())],
)  # fmt: skip
def test_activations_are_torchs(activation, module):
    z = torch.linspace(-3, 3, 25)
    torch.testing.assert_close(activated(activation, z), module(z))


def test_gaussian_and_sine():
    z = torch.tensor([0.0, 1.0])
    assert activated("gaussian", z).tolist() == pytest.approx([1, math.exp(-0.5)])
    assert activated("sine", z).tolist() == pytest.approx([0, math.sin(1)])


@pytest.mark.parametrize("prior", PRIORS)
def test_priors_have_the_same_spread(prior):
    kind = Architecture(prior=prior, width=100, depth=2, scale=3.0, bias_scale=0.5)
    weights = draw(kind, 40, seed=0)
    size = 3 * math.sqrt(6 / 200) / math.sqrt(3)
    assert weights.hidden[1].weight.std().item() == pytest.approx(size, rel=0.03)
    rough = 0.3 if prior == "long-tailed" else 0.05  # the few largest make most of it
    assert weights.hidden[1].bias.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=rough)
    assert weights.hidden[1].weight.mean().abs() < 0.01
    if prior == "uniform":
        assert weights.hidden[1].weight.abs().max() <= 3 * math.sqrt(6 / 200)


def test_a_seed_repeats_and_scales_are_multiples_of_the_same_draws():
    kind = Architecture(depth=2, width=8)
    a, b = draw(kind, 4, seed=3), draw(kind, 4, seed=3)
    assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    other = draw(kind, 4, seed=4)
    assert not torch.equal(a.hidden[0].weight, other.hidden[0].weight)
    larger = draw(dataclasses.replace(kind, scale=5.0), 4, seed=3)
    torch.testing.assert_close(larger.hidden[1].weight, 5 * a.hidden[1].weight)
    torch.testing.assert_close(larger.hidden[1].bias, a.hidden[1].bias)
    deeper = draw(dataclasses.replace(kind, depth=3), 4, seed=3)
    torch.testing.assert_close(deeper.hidden[1].weight, a.hidden[1].weight)
    fewer = draw(kind, 2, seed=3)
    torch.testing.assert_close(fewer.hidden[0].weight, a.hidden[0].weight[:2])


def test_layer_norm_makes_the_scale_of_one_layer_without_biases_irrelevant():
    kind = Architecture(depth=1, layer_norm=True, bias_scale=0.0, activation="tanh")
    small, large = (
        outputs(k, draw(k, 2, seed=0), POINTS)
        for k in (kind, dataclasses.replace(kind, scale=64.0))
    )
    torch.testing.assert_close(large, 64 * small, msg="but for the output's own scale")


def test_the_fourier_model_is_as_complex_as_noise_at_every_scale():
    places = Places(side=64)
    kinds = [Architecture(activation="fourier", scale=scale) for scale in (0.25, 4.0)]
    found = [population(kind, 4, places, seed=0)["fourier"].mean() for kind in kinds]
    assert found[0] == pytest.approx(found[1]) and found[0] > 24, "white noise has 24.4"


def test_a_population_has_every_measure_of_every_draw():
    places = Places(side=16, order=8, lines=4, steps=16)
    table = population(Architecture(activation="tanh", depth=2, scale=3.0), 5, places, seed=0)
    assert table["draw"].tolist() == [0, 1, 2, 3, 4]
    assert np.isfinite(table.to_numpy()).all()
    constant = population(Architecture(scale=0.0), 2, places, seed=0)
    assert constant["fourier"].isna().all() and constant["lz"].isna().all()


def test_trial_values_of_the_maps():
    """Values of an earlier trial of the same measure, ten draws: relu 2.8, tanh 1.2, sine 4.3."""
    places = Places()
    trial: tuple[tuple[Activation, float, float], ...] = (
        ("relu", 1.0, 2.8), ("tanh", 1.0, 1.2), ("sine", 4.0, 4.3)
    )  # fmt: skip
    for name, scale, wanted in trial:
        kind = Architecture(activation=name, depth=3, scale=scale)
        found = population(kind, 10, places, seed=0)["fourier"].mean()
        assert found == pytest.approx(wanted, rel=0.35), name


def test_lines_begin_and_end_in_the_cube():
    lines = straight_lines(5, 7, 9)
    assert lines.shape == (7, 9, 5) and lines.abs().max() <= 1
    steps = lines.diff(dim=1)
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 0}, "at least 1 hidden layer"),
        ({"width": 0}, "both start at 1"),
        ({"activation": "cubic"}, "no activation is called 'cubic'; choose from relu, gelu"),
        ({"prior": "cauchy"}, "no prior is called 'cauchy'"),
        ({"scale": math.nan}, "give finite ones"),
        ({"prefactor": -1.0}, "0 or more"),
    ],
)
def test_what_makes_no_network_is_said(options, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    with pytest.raises(UserError, match=words):
        Architecture(**options)


def test_weights_that_are_not_finite_are_said():
    weights = draw(Architecture(width=4), 2, seed=0)
    weights.out.bias[0] = math.inf
    with pytest.raises(UserError, match="a weight is not finite"):
        weights.check_finite()
