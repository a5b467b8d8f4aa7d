"""The directions study's options, presets and results."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from analyses.contrasts import Builtin, Contrast, builtin_contrast, contrast_of_files
from probe.direction_selection import Candidate, Criteria, Selection
from probe.errors import UserError
from probe.models import Dtype
from probe.sites import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One direction for one difference between prompts: is it there, and does the model use it?

    Takes the difference of the mean activations of two sets of prompts at every layer and position
    after the instruction, says how well it separates held-out prompts beside controls, chooses one
    by what ablating and adding it do to the next token (Arditi et al. 2024, arXiv 2406.11717), and
    measures the chosen one on test prompts beside random directions of the same length. Writes it
    as direction.safetensors into the report's folder, for recipes. A stopped study goes on where it
    was.

    Example: lorgnette analyse directions --contrast sentiment

    Options left at None take the preset's value.
    """

    preset: Literal["quick", "full"] = "quick"
    """quick: a few minutes on two cores. full: all prompts, and every layer and position as a
    candidate, as published; half an hour and more on two cores for SmolLM2."""
    model: str = "smollm2"
    """The model, as `lorgnette capture` takes it."""
    contrast: Builtin = "french"
    """A built-in pair of prompt sets: French against English, questions against statements, praise
    against complaint."""
    positive: Path | None = None
    """A file of prompts instead (.txt, one a line, or .jsonl with `prompt` or `text`): the set
    that has what the direction is to stand for."""
    negative: Path | None = None
    """The file of prompts that have it not."""
    target_tokens: tuple[str, ...] | None = None
    """First tokens of an answer that show the behaviour, each as the tokenizer writes it. None: for
    a built-in contrast the ten that positive training prompts raise most; for files no effect on
    answers is measured, only how the prompts are represented."""
    site: Literal["resid_pre", "resid_post", "attn_out", "mlp_out"] = "resid_pre"
    """Kind of site."""
    layers: tuple[int, ...] | None = None
    """Layers that candidates come from; AUROC is measured at all. None: the preset's number of
    layers, spread evenly over those that --depth allows."""
    positions: tuple[int, ...] | None = None
    """Positions that candidates come from, -1 the last token; None: the preset's choice among the
    tokens that the chat template puts after the instruction."""
    n_train: int | None = None
    """Prompts of each set that directions are made of."""
    n_validation: int | None = None
    """Prompts of each set that choose one."""
    n_test: int | None = None
    """Prompts of each set that judge it."""
    n_random: int | None = None
    """Random directions that the chosen one's effects are compared with."""
    kl: float = 0.1
    """Largest KL of negative prompts under ablation, nats."""
    added: float | None = None
    """Least mean score of negative prompts under addition; 0 as published. None: half way between
    the untouched model's scores of the two sets, for models that are less sure of a token."""
    depth: float = 0.8
    """Share of the layers, from the first, that may be chosen."""
    seed: int = 0
    """Decides the prompts taken, the shuffles and the random directions."""
    dtype: Dtype = "float32"
    """The model's number format."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`Config` with the preset's values in it; fields as there."""

    n_train: int
    n_validation: int
    n_test: int
    n_random: int
    n_layers: int | None
    """Candidates' layers, where not listed; None for all that may be chosen."""
    n_positions: int | None
    """Candidates' positions, where not listed; None for all after the instruction."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Prompts of each set: training, validation, test."""
        return self.n_train, self.n_validation, self.n_test


PRESETS = {
    "quick": Settings(
        n_train=96, n_validation=12, n_test=24, n_random=10, n_layers=8, n_positions=2
    ),
    "full": Settings(
        n_train=128, n_validation=32, n_test=32, n_random=20, n_layers=None, n_positions=None
    ),
}
"""full: sizes of the paper's section 2.3."""
LEAST = {"n_train": 2, "n_validation": 2, "n_test": 2, "n_random": 2}


def settle(config: Config) -> Settings:
    """The preset with what was asked otherwise. Raises `UserError` where options make no sense."""
    preset = PRESETS[config.preset]
    asked = {f.name: getattr(config, f.name) for f in fields(Settings) if hasattr(config, f.name)}
    settings = replace(preset, **{name: v for name, v in asked.items() if v is not None})
    for name, least in LEAST.items():
        if getattr(settings, name) < least:
            raise UserError(f"{name} must be at least {least}, got {getattr(settings, name)}.")
    if (config.positive is None) != (config.negative is None):
        raise UserError("a contrast of files takes both --positive and --negative; give the other.")
    if not 0 < config.depth <= 1 or config.kl < 0:
        raise UserError(
            f"depth must lie in (0, 1] and kl be at least 0, got {config.depth} and {config.kl}."
        )
    if config.positions is not None and (not config.positions or max(config.positions) >= 0):
        raise UserError(
            f"positions count back from the end, -1 the last token; got {list(config.positions)}."
        )
    if config.target_tokens == () or config.layers == ():
        raise UserError("a list of target tokens or layers was given empty; name one, or leave it.")
    return settings


def load_contrast(config: Config, settings: Settings) -> Contrast:
    """The prompts. Raises `UserError` as `contrast_of_files`."""
    if config.positive is None or config.negative is None:
        return builtin_contrast(config.contrast, settings.sizes, config.seed)
    return contrast_of_files(config.positive, config.negative, settings.sizes, config.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """Projections of held-out prompts on directions, at every layer `s` and position `p`.

    The first half of the prompts is positive, unless `shuffled_labels` says otherwise.
    """

    own: Float[np.ndarray, "n s p"]
    """Test prompts on the difference of means."""
    random: Float[np.ndarray, "n s p q"]
    """Test prompts on random directions, each turned so that positive training prompts are
    higher."""
    shuffled: Float[np.ndarray, "n s p r"]
    """Test prompts on differences of means of shuffled training labels."""
    labels: Float[np.ndarray, " n"]
    """1 for positive test prompts, else 0."""
    shuffled_labels: Float[np.ndarray, "r n"]
    """The same test labels, shuffled for each of those."""
    validation: Float[np.ndarray, "m s p"]
    """Validation prompts on the difference of means."""
    validation_labels: Float[np.ndarray, " m"]
    """1 for positive validation prompts, else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A token whose probability says whether the behaviour shows."""

    text: str
    """As it would be printed."""
    positive: float
    """Its mean probability after positive training prompts."""
    negative: float
    """Its mean probability after negative ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """Scores of single test prompts, with nothing done and with a direction ablated or added."""

    plain_positive: Float[np.ndarray, " n"]
    """Positive prompts, untouched model."""
    plain_negative: Float[np.ndarray, " m"]
    """Negative prompts, untouched model."""
    ablated: Float[np.ndarray, " n"]
    """Positive prompts, chosen direction ablated."""
    added: Float[np.ndarray, " m"]
    """Negative prompts, chosen direction added."""
    random_ablated: Float[np.ndarray, "q n"]
    """The same for random directions of the same length."""
    random_added: Float[np.ndarray, "q m"]
    """The same for random directions of the same length."""
    shuffled_ablated: Float[np.ndarray, "r n"]
    """The same for differences of means of shuffled labels, at the same place and length."""
    shuffled_added: Float[np.ndarray, "r m"]
    """The same for differences of means of shuffled labels, at the same place and length."""
    hook_minus_edit: float
    """Largest difference of a logit between ablating by hooks and in the weights; nan where the
    weights cannot be edited."""
    ablation_changes: float
    """Largest change of a logit that the ablation makes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """How one direction was chosen by its effects."""

    targets: tuple[Target, ...]
    """The target tokens."""
    plain: tuple[float, float]
    """Mean scores of positive and negative validation prompts, untouched model."""
    criteria: Criteria
    """What a candidate had to meet."""
    candidates: tuple[Candidate, ...]
    """All that were measured."""
    selection: Selection
    """The choice."""
    published: int
    """How many meet the published criteria, whose least score under addition is 0."""
    effects: Effects
    """What the chosen one does on test prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the study measured."""

    config: Config
    """What was asked."""
    settings: Settings
    """With nothing left open."""
    contrast: Contrast
    """The prompts."""
    sites: tuple[Site, ...]
    """Where activations were read."""
    positions: tuple[int, ...]
    """At which positions."""
    position_texts: tuple[str, ...]
    """The tokens there, where all prompts have the same; else empty."""
    trained: Readings
    """The model's."""
    twin: Readings
    """Its random-weight twin's."""
    place: tuple[int, int]
    """Numbers of the chosen site and position."""
    vector: Float[Tensor, " d"]
    """The chosen direction."""
    statistics: tuple[float, float, float]
    """Mean, standard deviation and maximum of reference text's projection on it."""
    chosen: Chosen | None
    """Its choice by effects; None where only representations were measured."""

    @property
    def site(self) -> Site:
        """The chosen direction's site."""
        return self.sites[self.place[0]]

    @property
    def norm(self) -> float:
        """Length of the chosen direction."""
        return float(self.vector.double().norm())

    @property
    def position(self) -> int:
        """The chosen direction's position."""
        return self.positions[self.place[1]]
