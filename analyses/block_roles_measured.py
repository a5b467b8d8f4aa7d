"""The block-roles study's options, what it takes the paper to claim, and what it holds in memory.

The parts of the study are cells (`analyses.block_roles_cells`): tables of outcomes, one row a
thing that happened, that are measured once and kept. Numbers, intervals and verdicts are read out
of the tables afterwards, so that nothing has to be drawn again to look at them otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import pandas as pd

from analyses.cells import Frame, Tables
from probe.corpora import BUILTIN
from probe.diffusion import DiffusionModel, DrawConfig
from probe.errors import UserError
from probe.sites import Site, parse_site
from probe.toyturbo.reader import AttributeReader
from probe.toyturbo.world import FACTORS
from saes.recipe_saes import LoadedSae

Weights = Literal["trained", "twin"]
Role = Literal["composition", "detail", "style"]
Method = Literal["features", "whole updates", "neurons"]

ONE_STEP = DrawConfig()
OUTCOMES = (*FACTORS, "other thing")
"""What a drawing is read for: the factors of the thing that a pair is about, and whether the other
thing, where there is one, is as it was."""
ROLES: Mapping[Role, tuple[str, ...]] = {
    "composition": ("position", "size"),
    "detail": ("shape",),
    "style": ("colour", "texture", "background", "light"),
}
"""Factors of toy-turbo's world by the words that the paper has for its blocks: composition; local
detail; colour, illumination, texture and style. The division is ours."""
CLAIMED: Mapping[str, Role] = {
    "down.2.1": "composition",
    "up.0.0": "detail",
    "up.0.1": "style",
}
"""What the paper says its blocks are for (Surkov et al. 2024, arXiv 2410.22366)."""
OPENED: Mapping[str, tuple[str, ...]] = {
    "position": ("down.2.1", "mid.0"),
    "colour": ("down.2.1", "mid.0"),
    "size": ("down.2.1", "mid.0"),
    "shape": ("up.0.0",),
    "texture": ("up.0.1",),
}
"""The blocks that toy-turbo's training opened in the phase that first showed a factor
(`probe.toyturbo.unet_training.PHASES`); background and light were there from the first phase too,
but they can also be written by what is no attention block."""
CARRYING = ("down.2.1", "mid.0", "up.0.0", "up.0.1")
ALL_BLOCKS = "all"
"""Stands for all the study's blocks together."""
DECIDES = 0.5
"""Share of the pairs of a role's factors that a block must move to be said to decide the role."""
OWN = 0.8
"""F1 on held-out images from which a value of a factor has a feature of its own."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What does each block of an image model do? Measured where the truth is known.

    Takes an SAE of the updates of each block (down.2.1, mid.0, up.0.0, up.0.1) and asks, block by
    block: what do its features predict, what changes in the image when its update is swapped or
    taken away, do its features act where they fire, which true factors have a feature of their own,
    what do k and width trade, do one-step SAEs serve more steps, and is transporting features
    better than steering. On toy-turbo all factors are known; on another model what needs them is
    left out.

    Example: lorgnette analyse block-roles --saes toy-turbo-down.2.1-... toy-turbo-mid.0-...

    Options left at None take the preset's value.
    """

    saes: tuple[str, ...] = ()
    """SAEs of the updates of different blocks of one model, folders or names below <root>/saes."""
    twins: tuple[str, ...] = ()
    """SAEs of the same blocks of the model's random-weight twin; none: that control is left out."""
    sweep: tuple[str, ...] = ()
    """Further SAEs of the same blocks, of other k and widths: names, or folders that hold them."""
    preset: Literal["quick", "full"] = "quick"
    """quick: a few minutes on two cores for toy-turbo. full: three quarters of an hour."""
    images: int | None = None
    """Images that probes and scores look at, half of them held out."""
    pairs: int | None = None
    """Captions whose factors are changed one at a time."""
    features: int | None = None
    """Features of each block whose locality is measured."""
    transports: int | None = None
    """Pairs of each factor between which features are transported; 0 leaves transport out, which
    takes longest."""
    prompts: str = BUILTIN
    """Prompts for a model that is not toy-turbo, by the names that `lorgnette capture` takes."""
    clip: str = ""
    """A CLIPModel's folder or hub id, for the scores that need an image-text model; none: they are
    left out."""
    seed: int = 0
    """Decides captions, noise and controls."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`Config` with the preset's values in it."""

    images: int
    pairs: int
    features: int
    transports: int
    per_feature: int
    """Images in which a feature is changed."""
    scored: int
    """Features of each block whose top images are scored."""
    top: int
    """Top images of each of them."""
    doses: tuple[float, ...]
    """What is added, in units of a feature's mean activation."""
    factors: tuple[float, ...]
    """What a feature's activation is multiplied by."""
    counts: tuple[int, ...]
    """Features transported, of all blocks together (k_t)."""
    neuron_counts: tuple[int, ...]
    """Neurons transported."""
    strengths: tuple[float, ...]
    """Multiples of what is transported (m)."""
    steering: tuple[float, ...]
    """Multiples of whole updates."""


PRESETS = {
    "quick": Settings(
        images=400, pairs=16, features=4, transports=2, per_feature=3, scored=16, top=8,
        doses=(4.0, 16.0), factors=(0.0, 4.0), counts=(10, 40), neuron_counts=(40, 160),
        strengths=(1.0, 2.0), steering=(0.5, 1.0),
    ),
    "full": Settings(
        images=2000, pairs=128, features=16, transports=16, per_feature=6, scored=64, top=12,
        doses=(4.0, 8.0, 16.0, 32.0), factors=(0.0, 2.0, 4.0), counts=(5, 10, 20, 40, 80),
        neuron_counts=(20, 80, 320, 640), strengths=(1.0, 2.0), steering=(0.25, 0.5, 1.0, 2.0),
    ),
}  # fmt: skip
LEAST = {"images": 20, "pairs": 2, "features": 1}


def settle(config: Config) -> Settings:
    """The preset with what was asked otherwise. Raises `UserError` where options make no sense."""
    names = {f.name for f in fields(Settings)} & {f.name for f in fields(Config)}
    asked = {name: getattr(config, name) for name in names}
    settings = replace(
        PRESETS[config.preset], **{name: v for name, v in asked.items() if v is not None}
    )
    for name, least in LEAST.items():
        if getattr(settings, name) < least:
            raise UserError(f"{name} must be at least {least}, got {getattr(settings, name)}.")
    if settings.transports == 1 or settings.transports < 0:
        raise UserError(
            f"transports must be 0 (none) or at least 2, half to choose on, got "
            f"{settings.transports}."
        )
    return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model and the SAEs of its blocks' updates."""

    weights: Weights
    """The model as it is, or its twin of random weights."""
    model: DiffusionModel
    """The model."""
    saes: Mapping[str, LoadedSae]
    """SAEs by block, in the order in which a pass comes by the blocks."""
    reader: AttributeReader | None
    """What reads the factors off an image; None where the factors are not known."""

    @property
    def blocks(self) -> list[str]:
        """The blocks."""
        return list(self.saes)

    @property
    def sites(self) -> list[Site]:
        """Their sites."""
        return [parse_site(block) for block in self.saes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Everything the study found: its cells' tables, those of one kind under each other."""

    config: Config
    """What was asked."""
    settings: Settings
    """How much of it."""
    model: str
    """The model's name."""
    blocks: tuple[str, ...]
    """Blocks with an SAE, in the order in which a pass comes by them."""
    twins: tuple[str, ...]
    """Those of them with an SAE of the twin."""
    known: bool
    """Whether the factors of what the model draws are known."""
    fidelity: Mapping[str, float]
    """Share of each factor's values that are drawn as said, where factors are known."""
    tables: Tables
    """By name: see the module that makes each."""
    notes: Sequence[str] = field(default_factory=tuple)
    """What was left out, and why."""

    def table(self, name: str) -> Frame:
        """A table; one without rows where nothing of it was measured."""
        return self.tables.get(name, pd.DataFrame())

    def has(self, name: str) -> bool:
        """Whether anything was measured for a table."""
        return len(self.table(name)) > 0
