"""Random networks from R^d to R, thousands side by side.

    z = W x + b        x <- phi(beta z)        and, per option,
    layer norm    x <- phi(beta (z - mean z) / std z), over the channels, no parameters
    residual      x <- z + phi(beta z)
    gated         x <- phi(beta z) * sigmoid(W' x + b')

(Teney et al. 2024, arXiv 2403.02241, section 3). The output is linear. Weights are drawn from
`prior` with the standard deviation of U(-s, s), s = scale sqrt(6 / (fan in + fan out)); biases from
the same kind of law with that of U(-r, r), r = bias_scale.

The networks of a `Weights` are leading dimensions of its tensors, so that a layer of all of them is
one batched product. At every scale the weights of network i of a seed are multiples of the same
draws, and a deeper network's first layers are a shallower one's: maps compare like with like.

The model without a bias for simplicity (`fourier`) is an inverse Fourier transform: one layer of
sines of fixed frequencies, with random phases and amplitudes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from probe.errors import UserError

Activation = Literal["relu", "gelu", "swish", "selu", "tanh", "gaussian", "sine", "fourier"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
"""`fourier` is the model without a bias for simplicity; see above."""
Prior = Literal["uniform", "gaussian", "ball", "long-tailed"]
PRIORS: tuple[Prior, ...] = get_args(Prior)
N_WAVES, FASTEST = 1024, 48
"""Waves of the Fourier model, and the fastest one's half periods over the grid, a direction."""
TAILS = 3.0
"""Degrees of freedom of Student's t, the long-tailed prior."""
TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A kind of network, and the law its weights are drawn from."""

    activation: Activation = "relu"
    """phi. gaussian is exp(-z^2 / 2); swish is z sigmoid(z)."""
    depth: int = 3
    """Hidden layers; `fourier` has 1."""
    width: int = 64
    """Channels of each; `fourier` has 1,024."""
    inputs: int = 2
    """Dimensions of what goes in."""
    scale: float = 1.0
    """Size of the weights; 1 is Glorot's."""
    bias_scale: float = 1.0
    """Size of the biases."""
    prefactor: float = 1.0
    """beta."""
    layer_norm: bool = False
    """Normalise before each activation."""
    residual: bool = False
    """Add what went into each activation to what came out of it."""
    gated: bool = False
    """Multiply by a sigmoid of a second linear map."""
    prior: Prior = "uniform"
    """uniform, gaussian, ball (uniform in a ball, for each neuron), or long-tailed (Student's t
    with 3 degrees of freedom); all of the same standard deviation."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UserError(f"a depth of {self.depth} was asked for; give at least 1 hidden layer.")
        if self.width < 1 or self.inputs < 1:
            raise UserError(
                f"{self.width} channels and {self.inputs} inputs were asked for; both start at 1."
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"no activation is called {self.activation!r}; choose from "
                f"{', '.join(ACTIVATIONS)}."
            )
        if self.prior not in PRIORS:
            raise UserError(f"no prior is called {self.prior!r}; choose from {', '.join(PRIORS)}.")
        sizes = (self.scale, self.bias_scale, self.prefactor)
        if not all(math.isfinite(size) and size >= 0 for size in sizes):
            raise UserError(
                f"scales {', '.join(f'{s:g}' for s in sizes)} were asked for; give finite ones, 0 "
                "or more."
            )

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of each hidden layer."""
        if self.activation == "fourier":
            return ((self.inputs, N_WAVES),)
        return ((self.inputs, self.width), *((self.width, self.width),) * (self.depth - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A linear map of n networks."""

    weight: Float[Tensor, "n i o"]
    """W, transposed."""
    bias: Float[Tensor, "n 1 o"]
    """b."""

    def __call__(self, x: Float[Tensor, "n p i"]) -> Float[Tensor, "n p o"]:
        """W x + b of each point."""
        return torch.baddbmm(self.bias, x, self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weights of n networks."""

    hidden: tuple[Layer, ...]
    """Hidden layers."""
    gates: tuple[Layer, ...]
    """W' and b' of each; none where nothing is gated."""
    out: Layer
    """The output's."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Weights":
        """The same with every tensor changed."""

        def one(layer: Layer) -> Layer:
            return Layer(weight=change(layer.weight), bias=change(layer.bias))

        return Weights(
            hidden=tuple(map(one, self.hidden)), gates=tuple(map(one, self.gates)),
            out=one(self.out),
        )  # fmt: skip

    def part(self, which: slice) -> "Weights":
        """Some of the networks."""
        return self.mapped(lambda tensor: tensor[which])

    def tensors(self) -> list[Tensor]:
        """All of them."""
        layers = (*self.hidden, *self.gates, self.out)
        return [tensor for layer in layers for tensor in (layer.weight, layer.bias)]

    def check_finite(self) -> None:
        """Raise `UserError` where a weight is not finite."""
        if not all(torch.isfinite(tensor).all() for tensor in self.tensors()):
            raise UserError("a weight is not finite; draw or train with smaller scales.")


# -------------------------------------------------------------------------------------- drawing


def draw(
    architecture: Architecture, n: int, *, seed: int, dtype: torch.dtype = torch.float64
) -> Weights:
    """The first `n` networks of a seed."""
    sizes, depth = architecture.layers, len(architecture.layers)
    shapes = [*sizes, *(sizes if architecture.gated else ()), (sizes[-1][1], 1)]
    made = [_drawn(architecture, shape, n, [seed, number]) for number, shape in enumerate(shapes)]
    if architecture.activation == "fourier":
        made[0] = replace(made[0], weight=_waves(architecture.inputs).expand(n, -1, -1))
    made = [Layer(weight=one.weight.to(dtype), bias=one.bias.to(dtype)) for one in made]
    return Weights(hidden=tuple(made[:depth]), gates=tuple(made[depth:-1]), out=made[-1])


def _drawn(architecture: Architecture, shape: tuple[int, int], n: int, seed: list[int]) -> Layer:
    rng = np.random.default_rng(seed)
    fan_in, fan_out = shape
    weight = _law(architecture.prior, rng, (n, fan_out, fan_in)).swapaxes(1, 2)
    bias = _law(architecture.prior, rng, (n, fan_out, 1)).swapaxes(1, 2)
    if architecture.activation == "fourier" and fan_out == N_WAVES:
        bias = rng.uniform(-math.pi, math.pi, bias.shape)  # phases
    size = architecture.scale * math.sqrt(6 / (fan_in + fan_out))
    return Layer(
        weight=torch.from_numpy(weight * size),
        bias=torch.from_numpy(bias * architecture.bias_scale),
    )


def _law(prior: Prior, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draws of mean 0 whose standard deviation is that of U(-1, 1); a vector of the last dimension
    is a neuron's."""
    if prior == "uniform":
        return rng.uniform(-1, 1, shape)
    if prior == "gaussian":
        return rng.standard_normal(shape) / math.sqrt(3)
    if prior == "long-tailed":
        return rng.standard_t(TAILS, shape) / math.sqrt(3) / math.sqrt(TAILS / (TAILS - 2))
    directions = rng.standard_normal(shape)
    radii = rng.random((*shape[:-1], 1)) ** (1 / shape[-1])
    ball = directions / np.linalg.norm(directions, axis=-1, keepdims=True) * radii
    return ball * math.sqrt((shape[-1] + 2) / 3)  # in the unit ball a coordinate's is 1 / (d + 2)


def _waves(inputs: int) -> Float[Tensor, "1 i w"]:
    """Frequencies of the Fourier model: whole numbers of half periods over the grid, each
    direction's up to `FASTEST`; the same for all networks."""
    rng = np.random.default_rng(0)
    waves = rng.integers(-FASTEST, FASTEST, (1, inputs, N_WAVES), endpoint=True)
    return torch.from_numpy(waves * math.pi)


# --------------------------------------------------------------------------------------- reading


def outputs(
    architecture: Architecture, weights: Weights, points: Float[Tensor, "*n p i"]
) -> Float[Tensor, "n p"]:
    """What each network makes of each point."""
    x = points.to(weights.out.weight).expand(len(weights.out.weight), -1, -1)
    gates = weights.gates or (None,) * len(weights.hidden)
    for layer, gate in zip(weights.hidden, gates, strict=True):
        z = layer(x)
        inner = _normalised(z) if architecture.layer_norm else z
        if architecture.prefactor != 1:
            inner = architecture.prefactor * inner
        y = activated(architecture.activation, inner)
        if architecture.residual:
            y = y + z
        x = y if gate is None else y * gate(x).sigmoid()
    return weights.out(x)[..., 0]


def activated(activation: Activation, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """phi(z)."""
    match activation:
        case "relu":
            return z.relu()
        case "gelu":
            return functional.gelu(z)
        case "swish":
            return functional.silu(z)
        case "selu":
            return functional.selu(z)
        case "tanh":
            return z.tanh()
        case "gaussian":
            return (-z.square() / 2).exp()
        case "sine" | "fourier":
            return z.sin()


def _normalised(z: Float[Tensor, "n p o"]) -> Float[Tensor, "n p o"]:
    centred = z - z.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).sqrt().clamp(min=TINY)


def square(axis: Float[Tensor, " g"]) -> Float[Tensor, "p 2"]:
    """The points of a square grid, row by row."""
    return torch.cartesian_prod(axis, axis)
