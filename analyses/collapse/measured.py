"""The collapse study's options, presets and results."""

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import pandas as pd

from analyses.cells import Frame, Tables
from analyses.collapse.behaviour import PAIRS
from analyses.collapse.families import COUNTING, FAMILIES, Form, find_family
from analyses.collapse.prompts import Merged
from analyses.collapse.theory import SyntheticLine
from probe.errors import UserError
from probe.rounding import Format

Weights = Literal["trained", "twin"]
Part = Literal[
    "theory", "curves", "precision", "paths", "behaviour", "features", "remedies", "geometry"
]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Does a model still tell n repetitions from n + 1, and which tokens reach its last one?

    Representational collapse and over-squashing (Barbero et al. 2024, arXiv 2406.04267): what the
    theorems say exactly; last-token distances by prompt, length and layer, with the controls that
    the paper lacks; number formats; the path-sum bound beside measured gradients; copying and
    counting; which features stop telling; remedies compared. What has been measured is kept, so a
    stopped study goes on where it was.

    Example: lorgnette analyse collapse

    With SAEs, features too: lorgnette analyse collapse --saes artifacts/saes/smollm2-resid_post.*

    Options left at None take the preset's value.
    """

    preset: Literal["quick", "full"] = "quick"
    """quick: up to 501 repetitions, within three minutes on two cores. full: up to 2,001, all
    phrasings and controls, within an hour."""
    model: str = "smollm2"
    """The model, as `lorgnette capture` takes it: any causal transformer."""
    saes: tuple[str, ...] = ()
    """SAEs of its residual stream, folders or names below <root>/saes; none: the study looks at
    MLP units alone, and leaves the separator feature out."""
    parts: tuple[Part, ...] = PARTS
    """What is measured."""
    families: tuple[str, ...] = tuple(family.name for family in FAMILIES)
    """What is repeated, in curves, number formats and features: ones, digits (random ones, the
    control), copying, commas, sum, words."""
    longest: int | None = None
    """The longest prompt, in repetitions; of `sum`, whose repetitions are several tokens, fewer."""
    merged: Merged = "correct"
    """Where the tokenizer merges digits: feed single digits all the same, and say so, or refuse."""
    twin: int = 0
    """Seed of the random-weight twin."""
    seed: int = 0
    """Decides random directions and projections."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`Config` with the preset's values in it."""

    longest: int
    """Repetitions of the longest prompt."""
    units: int
    """Phrasings of each question."""
    forms: tuple[Form, ...]
    """Forms of prompt beside `raw`."""
    windows: tuple[int, ...]
    """Windows of attention, in tokens."""
    formats: tuple[Format, ...]
    """Number formats."""
    format_longest: int
    """Repetitions of the longest prompt in a number format."""
    format_units: int
    """Phrasings in a number format."""
    path_length: int
    """Repetitions of the prompts whose gradients are measured."""
    path_units: int
    """Phrasings of them."""
    probes: int
    """Random projections of a Jacobian."""
    pairs: int
    """Pairs of digits that are copied."""
    copy_lengths: tuple[int, ...]
    """Digits of the sequences that are copied."""
    count_lengths: tuple[int, ...]
    """Elements of the sequences that are counted."""
    feature_units: int
    """Phrasings that features are looked at in."""
    remedy_lengths: tuple[int, ...]
    """Digits of the sequences that remedies are tried on: every phase of a group of three."""
    clamp_lengths: tuple[int, ...]
    """Of these, where features are clamped."""
    controls: int
    """Random directions, and as many random features."""
    synthetic_seeds: int
    """Seeds of the synthetic experiments."""


PRESETS = {
    "quick": Settings(
        longest=501, units=2, forms=("chat", "shuffled"), windows=(64,),
        formats=("float64", "bfloat16", "int8"), format_longest=200, format_units=1,
        path_length=128, path_units=2, probes=4, pairs=2, copy_lengths=(5, 50, 200),
        count_lengths=(5, 95), feature_units=2, remedy_lengths=(100, 101, 102),
        clamp_lengths=(101,), controls=2, synthetic_seeds=5,
    ),
    "full": Settings(
        longest=2001, units=5, forms=("bare", "question last", "chat", "shuffled"),
        windows=(64, 256), formats=("float64", "float32", "bfloat16", "float16", "float8", "int8"),
        format_longest=1001, format_units=3, path_length=400, path_units=5, probes=16,
        pairs=len(PAIRS), copy_lengths=(5, 20, 50, 100, 200, 400),
        count_lengths=tuple(range(5, 200, 10)), feature_units=5,
        remedy_lengths=(99, 100, 101, 300, 301, 302), clamp_lengths=(101, 301), controls=4,
        synthetic_seeds=5,
    ),
}  # fmt: skip


def settle(config: Config) -> Settings:
    """The preset with what was asked otherwise. Raises `UserError` where options make no sense."""
    for name in config.families:
        find_family(name)
    if not config.families or not config.parts:
        raise UserError("no prompt family or part is left to measure; name one or more.")
    preset = PRESETS[config.preset]
    asked = {f.name: getattr(config, f.name) for f in fields(Settings) if hasattr(config, f.name)}
    settings = replace(preset, **{name: v for name, v in asked.items() if v is not None})
    if settings.longest < 12:
        raise UserError(
            f"--longest must be 12 or more, for a curve to have a slope; got {settings.longest}."
        )
    assert settings.units <= len(COUNTING), "as many units as phrasings"
    return replace(settings, format_longest=min(settings.format_longest, settings.longest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a collapse study measured."""

    config: Config
    """What was asked."""
    settings: Settings
    """With the preset's values."""
    model: str
    """The model's name."""
    n_layers: int
    """Its layers."""
    parameters: int
    """Its parameters."""
    synthetic: tuple[SyntheticLine, ...]
    """The synthetic experiments."""
    tables: Tables
    """Everything else, by name."""
    notes: tuple[str, ...]
    """What a reader has to know of this run."""

    def table(self, name: str) -> Frame:
        """A table; empty where that was not measured."""
        return self.tables.get(name, pd.DataFrame())
