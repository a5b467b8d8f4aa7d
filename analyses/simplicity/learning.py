"""Training many small networks side by side, and two tasks that say what they learn.

Modulo addition (Teney et al. 2024, section 4.1): x in {0..15}^2, label 1 where (x1 + x2) mod M is
at most M / 2. The smaller M, the more complex the function; half of the 256 points are trained on.

Shortcut (section 4.2): an 8 x 8 digit beside a band of one colour, target in proportion to the
digit. In training the colour is in proportion to it too, so that either would do; the test pairs
digits with colours of others and asks which of the two the network went by.

What varies is the prefactor of the activations, which moves a network's complexity from outside:
what is compared is the complexity at initialisation and how the trained network generalises.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from analyses.cells import Frame
from analyses.simplicity.measures import fourier, total_variation
from analyses.simplicity.networks import Architecture, Weights, draw, outputs
from analyses.simplicity.populations import straight_lines

SIDE = 16
"""Numbers in the modulo task."""
BAND = 8
"""Values of the colour band, all the same."""
LR = 1e-3
"""Of Adam."""

Loss = Callable[[Float[Tensor, "n p"], Float[Tensor, "n p"]], Float[Tensor, ""]]


def trained(
    architecture: Architecture,
    weights: Weights,
    points: Float[Tensor, "n p i"],
    targets: Float[Tensor, "n p"],
    *,
    loss: Loss,
    steps: int,
) -> Weights:
    """Networks after `steps` of Adam on all of their own points.

    The loss is summed over networks: each one's gradient is its own. In float32.
    """
    moved = weights.mapped(lambda tensor: tensor.float().clone().requires_grad_())
    points, targets = points.float(), targets.float()
    optimiser = torch.optim.Adam(moved.tensors(), lr=LR)
    for _ in range(steps):
        optimiser.zero_grad()
        (loss(outputs(architecture, moved, points), targets) * len(targets)).backward()
        optimiser.step()
    moved.check_finite()
    return moved.mapped(Tensor.detach)


# ------------------------------------------------------------------------------ modulo addition


def lattice() -> Float[Tensor, "p 2"]:
    """All pairs of numbers 0 to 15, in [-1, 1]."""
    axis = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


def modulo_labels(modulus: int) -> Float[Tensor, " p"]:
    """1 where (x1 + x2) mod M <= M / 2, else 0, for each point of the lattice."""
    numbers = torch.arange(SIDE)
    total = (numbers[:, None] + numbers).flatten()
    return (total % modulus <= modulus / 2).double()


def modulo(architecture: Architecture, moduli: tuple[int, ...], *, seeds: int, steps: int) -> Frame:
    """A row a modulus and seed: complexity of the task (`target`), of the network at initialisation
    and after training, balanced accuracy in training and test.

    Half of the points, other ones for each seed, are trained on. The networks of a seed begin
    alike, whatever the modulus.
    """
    kinds = [(modulus, seed) for modulus in moduli for seed in range(seeds)]
    points = lattice()
    labels = torch.stack([modulo_labels(modulus) for modulus, _ in kinds])
    drawn = draw(architecture, seeds, seed=0)
    weights = drawn.mapped(lambda tensor: tensor.repeat(len(moduli), 1, 1))
    order = torch.stack([_shuffled(len(points), seed) for _, seed in kinds])
    train, test = order.split(len(points) // 2, dim=1)
    moved = trained(
        architecture, weights, points[train], labels.gather(1, train),
        loss=binary_cross_entropy_with_logits, steps=steps,
    )  # fmt: skip
    before, after = (outputs(architecture, one, points).double() for one in (weights, moved))
    right = ((after > 0) == (labels > 0.5)).double()
    square = (len(kinds), SIDE, SIDE)
    return pd.DataFrame(
        {
            "modulus": [modulus for modulus, _ in kinds], "seed": [seed for _, seed in kinds],
            "target": fourier(labels.reshape(square)), "initial": fourier(before.reshape(square)),
            "final": fourier(after.reshape(square)), "train": _balanced(right, labels, train),
            "test": _balanced(right, labels, test),
        }
    )  # fmt: skip


def _balanced(
    right: Float[Tensor, "n p"], labels: Float[Tensor, "n p"], where: Int[Tensor, "n q"]
) -> Float[Tensor, " n"]:
    """Mean of the two classes' accuracies: .5 is chance, whichever class is the larger."""
    hits, ones = right.gather(1, where), labels.gather(1, where)
    of_ones, of_zeros = ((hits * one).sum(1) / one.sum(1) for one in (ones, 1 - ones))
    return (of_ones + of_zeros) / 2


def _shuffled(n: int, seed: int) -> Int[Tensor, " n"]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------- shortcut


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Digits beside a colour."""

    train: Float[Tensor, "p i"]
    """Pixels and band, the colour telling the digit."""
    train_targets: Float[Tensor, " p"]
    """The digit, -1 for 0 to 1 for 9."""
    test: Float[Tensor, "q i"]
    """Other digits, with colours that tell nothing."""
    test_digits: Float[Tensor, " q"]
    """Their digits, likewise."""
    test_colours: Float[Tensor, " q"]
    """Their colours, likewise."""


def digits(n_train: int, *, seed: int = 0) -> Digits:
    """scikit-learn's digits beside a band, divided; pixels and colours in [-1, 1]."""
    bunch: Any = load_digits()
    images = torch.from_numpy(np.asarray(bunch.data)) / 8 - 1
    labels = torch.from_numpy(np.asarray(bunch.target)).double() / 4.5 - 1
    order = _shuffled(len(images), seed)
    train, test = order[:n_train], order[n_train:]
    colours = labels[test][_shuffled(len(test), seed)]
    return Digits(
        train=torch.cat([images[train], labels[train, None].expand(-1, BAND)], 1),
        train_targets=labels[train],
        test=torch.cat([images[test], colours[:, None].expand(-1, BAND)], 1),
        test_digits=labels[test], test_colours=colours,
    )  # fmt: skip


def shortcut(architecture: Architecture, data: Digits, *, seeds: int, steps: int) -> Frame:
    """A row a seed: total variation at initialisation and after training, the training error, and
    what predictions of the test go by: the share of their variance that is the digit's (`digit`),
    and the colour's (`colour`), squared correlations."""
    own = replace(architecture, inputs=data.train.shape[1])
    weights = draw(own, seeds, seed=0)
    targets = data.train_targets.expand(seeds, -1)
    moved = trained(
        own, weights, data.train.expand(seeds, -1, -1), targets, loss=mse_loss, steps=steps
    )
    lines = straight_lines(own.inputs, 16, 64)

    def varied(one: Weights) -> Float[Tensor, " n"]:
        return total_variation(
            outputs(own, one, lines.flatten(0, 1)).reshape(seeds, 16, 64).double()
        )

    given = outputs(own, moved, data.test).double()
    missed = (outputs(own, moved, data.train).double() - targets).square().mean(1)
    return pd.DataFrame(
        {
            "seed": range(seeds), "initial": varied(weights), "final": varied(moved),
            "train": 1 - missed / data.train_targets.var(correction=0),
            "digit": squared_correlation(given, data.test_digits),
            "colour": squared_correlation(given, data.test_colours),
        }
    )  # fmt: skip


def squared_correlation(
    given: Float[Tensor, "n q"], wanted: Float[Tensor, " q"]
) -> Float[Tensor, " n"]:
    """Squared correlation of each row with `wanted`; 0 of a row that does not vary."""
    a = given - given.mean(1, keepdim=True)
    b = wanted - wanted.mean()
    norms = a.norm(dim=1) * b.norm()
    return ((a @ b) / norms.clamp(min=1e-300)).square()
