"""What a recipe consists of; `saes.recipes` says what each part means."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from probe.diffusion import DrawConfig
from probe.interventions import Rows

Op = Literal[
    "add", "set", "scale", "clamp", "zero", "mean_ablate", "patch", "project_out", "transport",
    "reconstruct",
]  # fmt: skip
Unit = Literal["raw", "mean", "max", "sd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Sizes of a target's activations, that strengths are measured in."""

    mean: float
    """Mean; of a feature, over the tokens it fires on."""
    max: float
    """Largest."""
    sd: float
    """Standard deviation, over the same tokens as the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """A latent of an SAE."""

    feature: int
    """Its number."""
    sae: str
    """Key of its SAE in the recipe's `saes`."""
    statistics: Statistics | None = None
    """Its activations; None to look in the SAE's index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Several latents of an SAE."""

    features: tuple[int, ...]
    """Their numbers."""
    sae: str
    """Key of their SAE in the recipe's `saes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """All that an SAE says of an activation."""

    sae: str
    """Key of the SAE in the recipe's `saes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDirection:
    """A direction that `probe.directions` wrote."""

    direction: str
    """The file, relative to the recipe's folder."""
    statistics: Statistics | None = None
    """Projections on it; None to take those in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neuron:
    """One channel of the site."""

    neuron: int
    """Its number."""
    statistics: Statistics | None = None
    """Its activations; None to measure them on reference text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neurons:
    """Several channels of the site."""

    neurons: tuple[int, ...]
    """Their numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """An attention head's output."""

    head: int
    """Its number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeSite:
    """All of the site's activation."""


Target = Feature | Features | Reconstruction | FileDirection | Neuron | Neurons | Head | WholeSite
OfSae = Feature | Features | Reconstruction
"""The targets that need an SAE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strength:
    """How much."""

    value: float
    """In the unit."""
    unit: Unit = "raw"
    """`raw`, or times the target's mean, max or sd."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Which tokens, or which places of a feature map."""

    named: str | None = "all"
    """`all`, `prompt`, `generated` or `last`; None where one of the others says it."""
    range: tuple[int, int | None] | None = None
    """First position of the prompt, and one past the last."""
    text: str | None = None
    """Text of the prompt whose tokens are meant."""
    mask: tuple[Any, ...] | None = None
    """A truth value for each token; for an image rows of weights, at the site's own grid."""
    canvas: tuple[tuple[float, ...], ...] | None = None
    """Rows of weights for an image at any size of its aspect: averaged over areas to the grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeEdit:
    """One change."""

    site: str
    """Where in the model."""
    op: Op
    """What is done."""
    target: Target
    """To what."""
    strength: Strength | None = None
    """How much; None for operations that take none."""
    positions: Positions = field(default_factory=Positions)
    """At which tokens or places."""
    steps: tuple[int, int | None] | None = None
    """At which steps; None for all."""
    source: str | None = None
    """The prompt to patch or transport from."""
    rows: Rows = "conditional"
    """In which rows of a guided image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReference:
    """The model a recipe is for."""

    spec: str
    """As `lorgnette capture` takes it."""
    random_weights: int | None = None
    """Seed, for a random-weight twin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeReference:
    """An SAE a recipe uses: it is known by its weights; its name says where to look first."""

    name: str
    """Name of its folder."""
    weights: str
    """SHA-256 of its weights' file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to change in a model. Made by `read_recipe`, or in Python and checked by `checked`."""

    name: str
    """A few words."""
    model: ModelReference
    """What it is for."""
    edits: tuple[RecipeEdit, ...]
    """What it changes; all of one site are read from the unedited activation."""
    saes: Mapping[str, SaeReference] = field(default_factory=dict)
    """The SAEs that its features belong to, by key."""
    note: str = ""
    """What a person should know about it."""
    special_tokens: bool = False
    """Edit position 0 and special tokens as well."""
    prompts: tuple[str, ...] = ()
    """Prompts to try it on."""
    effect: tuple[str, ...] = ()
    """Tokens it is meant to make likelier."""
    draw: DrawConfig | None = None
    """How images are drawn; None for a recipe of texts."""
    seeds: tuple[int, ...] = ()
    """Seeds of images to try it on."""
    folder: Path | None = None
    """The folder of its file, which directions are looked for in; not part of the file."""
