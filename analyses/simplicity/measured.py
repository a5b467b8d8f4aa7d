"""The simplicity-bias study's options, presets and results."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import pandas as pd

from analyses.benchmark_measured import SUITES, Suite
from analyses.cells import Frame, Tables
from analyses.simplicity.measures import LEAST, Basis
from analyses.simplicity.networks import ACTIVATIONS, Activation
from probe.errors import UserError

Part = Literal[
    "maps", "components", "laws", "boolean", "perceptron", "modulo", "shortcut", "sequences",
    "twins",
]  # fmt: skip
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Do networks prefer simple functions before they have learned anything?

    Random weights already make some functions likely and others not (Neural Redshift, Teney et al.
    2024, arXiv 2403.02241; Valle-Perez et al. 2018, arXiv 1805.08522). Measured: the complexity of
    random networks by activation, depth and weight scale, and by layer norm, residual connections,
    gates, width, biases and priors; the probability of Boolean functions; what networks of a given
    complexity learn; sequences of untrained transformers; and, with --sae and --twin, which scores
    of a sparse autoencoder tell a trained model from the same with random weights. What has been
    measured is kept, so a stopped study goes on where it was.

    Example: lorgnette analyse simplicity-bias

    With an SAE and that of the random-weight twin:
    lorgnette analyse simplicity-bias --sae NAME --twin NAME

    Options left at None take the preset's value.
    """

    preset: Literal["quick", "full"] = "quick"
    """quick: within five minutes on two cores. full: 7 depths x 7 scales x 8 activations, 50 draws
    of each, 10 million Boolean functions; an hour or two."""
    parts: tuple[Part, ...] = PARTS
    """What is measured; `twins` is left out without --sae and --twin."""
    activations: tuple[Activation, ...] = ACTIVATIONS
    """relu, gelu, swish, selu, tanh, gaussian, sine, and fourier, the model without a bias."""
    depths: tuple[int, ...] | None = None
    """Hidden layers."""
    scales: tuple[float, ...] | None = None
    """Sizes of the weights; 1 is Glorot's."""
    draws: int | None = None
    """Networks of each kind."""
    width: int = 64
    """Channels of a hidden layer."""
    grid: int = 64
    """Points a side of the square on which functions are looked at."""
    basis: Basis = "chebyshev"
    """Polynomials of the second measure: chebyshev or legendre."""
    boolean_draws: int | None = None
    """Networks whose truth tables are counted."""
    model: str = "smollm2"
    """Whose architecture writes sequences with random weights: a name, or a folder with its
    config.json."""
    sae: str = ""
    """An SAE of the residual stream, a folder or a name below <root>/saes."""
    twin: str = ""
    """That of the same recipe on the model with random weights."""
    seed: int = 0
    """Decides every draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a preset decides."""

    depths: tuple[int, ...]
    """Hidden layers in the maps."""
    scales: tuple[float, ...]
    """Sizes of the weights in the maps."""
    draws: int
    """Networks of each kind."""
    component_depths: tuple[int, ...]
    """Hidden layers where layer norm, residual connections and gates are tried."""
    component_activations: tuple[Activation, ...]
    """Activations there."""
    widths: tuple[int, ...]
    """Channels, ascending."""
    bias_scales: tuple[float, ...]
    """Sizes of the biases, ascending."""
    boolean_draws: int
    """Networks whose truth tables are counted."""
    perceptron_inputs: tuple[int, ...]
    """Inputs of the perceptrons."""
    perceptron_draws: int
    """Perceptrons that are drawn for the figure."""
    moduli: tuple[int, ...]
    """M of the modulo task, from the simplest task to the most complex."""
    prefactors: tuple[float, ...]
    """Prefactors of the activations in the tasks, ascending."""
    seeds: int
    """Networks trained of each kind."""
    steps: int
    """Steps of their training."""
    sequences: int
    """Sequences of each kind of transformer."""
    transformer_depths: tuple[int, ...]
    """Its blocks; the last is what activations and norms are compared at."""
    norm_scales: tuple[float, ...]
    """What the gains of its norms are multiplied with."""
    architecture_sequences: int
    """Sequences of SmolLM2's own architecture; 0 for none."""
    suites: tuple[Suite, ...]
    """The benchmark's suites that SAE and twin are compared on."""
    paths: int
    """Lines between texts along which features are looked at."""


PRESETS = {
    "quick": Settings(
        depths=(1, 2, 4, 6), scales=(0.5, 1.0, 2.0, 4.0, 8.0), draws=10, component_depths=(3,),
        component_activations=("relu", "tanh", "sine"), widths=(16, 64, 128),
        bias_scales=(0.25, 1.0, 2.0), boolean_draws=100_000,
        perceptron_inputs=tuple(range(3, 9)), perceptron_draws=50_000, moduli=(10, 7, 4),
        prefactors=(0.25, 1.0, 2.0, 4.0, 8.0), seeds=3, steps=300, sequences=20,
        transformer_depths=(2, 6), norm_scales=(0.5, 1.0, 2.0), architecture_sequences=2, paths=8,
        suites=("probing", "coherence"),
    ),
    "full": Settings(
        depths=(1, 2, 3, 4, 5, 6, 8), scales=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0), draws=50,
        component_depths=(1, 3, 6),
        component_activations=("relu", "gelu", "tanh", "gaussian", "sine"),
        widths=(16, 32, 64, 128, 256), bias_scales=(0.125, 0.25, 0.5, 1.0, 2.0),
        boolean_draws=10_000_000, perceptron_inputs=tuple(range(3, 11)), perceptron_draws=500_000,
        moduli=(10, 7, 4), prefactors=tuple(2.0**n for n in range(-3, 6)), seeds=10, steps=1000,
        sequences=100, transformer_depths=(1, 3, 6, 12), norm_scales=(0.25, 0.5, 1.0, 2.0, 4.0),
        architecture_sequences=20, paths=64, suites=SUITES,
    ),
}  # fmt: skip


def settle(config: Config) -> Settings:
    """The preset with what was asked otherwise.

    Raises `UserError` where options make no sense.
    """
    preset = PRESETS[config.preset]
    asked: dict[str, Any] = {
        f.name: getattr(config, f.name) for f in fields(preset) if hasattr(config, f.name)
    }
    settings = replace(preset, **{name: v for name, v in asked.items() if v is not None})
    counts = (settings.draws, settings.boolean_draws, *settings.depths, config.width)
    if not settings.depths or not settings.scales or not config.activations or min(counts) < 1:
        raise UserError(
            "draws, boolean draws, depths and width start at 1, and there has to be a depth, a "
            "scale and an activation."
        )
    if not all(math.isfinite(scale) and scale >= 0 for scale in settings.scales):
        raise UserError(
            f"weight scales {', '.join(f'{s:g}' for s in settings.scales)} were asked for; give "
            "finite ones, 0 or more."
        )
    if config.seed < 0:
        raise UserError(f"a seed of {config.seed} was asked for; 0 is the least.")
    if config.grid < LEAST:
        raise UserError(
            f"a grid of {config.grid} points a side is too small for a spectrum; use at least "
            f"{LEAST}."
        )
    if not config.parts:
        raise UserError(f"no part is named; choose from {', '.join(PARTS)}.")
    if bool(config.sae) != bool(config.twin):
        raise UserError("--sae and --twin go together: an SAE, and that of the random-weight twin.")
    return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a simplicity-bias study measured."""

    config: Config
    """What was asked."""
    settings: Settings
    """With the preset's values."""
    tables: Tables
    """Outcomes, by name."""
    notes: tuple[str, ...]
    """What a reader has to know of this run."""

    def table(self, name: str) -> Frame:
        """A table; empty where that was not measured."""
        return self.tables.get(name, pd.DataFrame())
