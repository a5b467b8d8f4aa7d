"""The circuit-breaker study's options, presets and results."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from analyses.cells import Frame, Tables
from analyses.circuit_breakers.concepts import ConceptName
from analyses.circuit_breakers.losses import Rerouting
from analyses.circuit_breakers.rows import Masking
from analyses.circuit_breakers.settings import RECIPES, RecipeName, Retain, Training
from probe.errors import UserError

Part = Literal["outputs", "capability", "inside", "probes", "features", "robustness", "ablations"]
PARTS: tuple[Part, ...] = get_args(Part)
MAIN, ORIGINAL = "rerouting", "original"
"""Runs that are no ablation: the broken model, and the model as it was."""
SETS = ("concept", "near", "ordinary")
"""What every subject has passages of."""
KEPT = ("near", "ordinary")
"""Sets that are not to change."""
HARMFUL = "harmful"
"""The subject that comes out of files of prompts."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Can a model be made unable to talk about something, and what does that change inside?

    Circuit breakers (Zou et al. 2024, arXiv 2406.04313): adapters are trained until the states on
    a concept are orthogonal to what they were, and the others stay. What is broken here is
    harmless, recipes, French, or a town that does not exist, so that everything can be shown; of
    harmful prompts (--harmful) only the user's words are read, and no response is kept. Measured:
    attacks, capability, states layer by layer, probes, features, how long the break lasts, and
    what each choice of the training is for. Broken models stay as adapters, which every command
    takes as a model. What has been measured is kept, so a stopped study goes on where it was.

    Example: lorgnette analyse circuit-breakers

    With features, three concepts and ablations:
    lorgnette analyse circuit-breakers --preset full --saes artifacts/saes/smollm2-resid_post.*

    Options left at None take the value of the recipe or the preset.
    """

    preset: Literal["quick", "full"] = "quick"
    """quick: one concept, one seed, within fifteen minutes on two cores. full: three concepts,
    three seeds, ablations, some hours."""
    recipe: RecipeName = "smollm2"
    """Constants of the training: smollm2 (for two cores), or those published for mistral-7b and
    llama-3-8b (for a GPU)."""
    model: str = "smollm2"
    """The model, as `lorgnette capture` takes it."""
    concepts: tuple[ConceptName, ...] | None = None
    """What is broken."""
    harmful: Path | None = None
    """A file of harmful prompts (.txt, or .jsonl or .csv with a field `prompt`), to be broken too;
    only the prompts are read. Needs --ordinary and --near-misses."""
    harmful_test: Path | None = None
    """Harmful prompts to judge on; repeats of --harmful are reported and left out. None divides
    --harmful."""
    ordinary: Path | None = None
    """A file of ordinary prompts."""
    near_misses: Path | None = None
    """A file of prompts that look harmful and are not; rows labelled unsafe are passed over."""
    choices: Path | None = None
    """Multiple-choice questions (.jsonl with question, choices, labels, answer); none: left out."""
    saes: tuple[str, ...] = ()
    """SAEs of the model's residual stream, folders or names below <root>/saes; none: the part
    `features` is left out."""
    parts: tuple[Part, ...] = PARTS
    """What is measured."""
    seeds: int | None = None
    """Runs of each concept, seeds 0 and up."""
    target_layers: tuple[int, ...] | None = None
    """States that are rerouted: 1 is the first block's output."""
    loss: Rerouting | None = None
    """rr: orthogonal to what they were. rmu, randc, randp: towards a random vector."""
    alpha: float | None = None
    """Weight of both terms."""
    lr: float | None = None
    """AdamW's rate."""
    steps: int | None = None
    """Steps of the training."""
    batch: int | None = None
    """Rows of each set a step."""
    lora_r: int | None = None
    """Rank of the adapters."""
    retain: Retain | None = None
    """Whether the retain term is absolute, as published, or relative to the states' lengths."""
    retain_weight: float | None = None
    """What the retain term is multiplied with; 1 as published."""
    masking: Masking | None = None
    """Tokens left out of both terms: padding, as published; the first one; or all that every
    prompt begins with (shared)."""
    b_std: float | None = None
    """Standard deviation of the adapters' B at the beginning; 0 as published."""
    blank: float | None = None
    """Share of the circuit-breaker rows whose request is left out."""
    borderline: float | None = None
    """Share of the retain rows that are near misses."""
    store_gb: float = 4.0
    """States before training are kept on disk where a set's take no more than this, else computed
    at every step."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a preset decides beside the training."""

    concepts: tuple[ConceptName, ...]
    """What is broken."""
    seeds: int
    """Runs of each subject."""
    train: int
    """Passages of each set for training."""
    test: int
    """Passages of each set for judging."""
    tokens: int
    """Tokens of a response that the model writes for training, and of a continuation."""
    soft_steps: tuple[int, ...]
    """Budgets of the soft-token attack, in steps."""
    tuning_steps: tuple[int, ...]
    """Steps of fine-tuning after which is looked."""
    turns: tuple[int, ...]
    """Turns of talk in front of a request."""
    texts: int
    """Held-out documents that perplexity is taken on."""
    questions: int
    """Multiple-choice questions."""
    probe_layers: tuple[int, ...]
    """States that linear probes read."""
    mlp_layers: tuple[int, ...]
    """States that MLP probes read."""
    deep_seeds: int
    """Runs of each subject that are worn down and whose features are looked at."""
    ablation_seeds: int
    """Runs of each ablation that concerns a claim of the paper; the others get one."""


PRESETS = {
    "quick": Settings(
        concepts=("recipes",), seeds=1, train=48, test=10, tokens=48, soft_steps=(0, 8, 16),
        tuning_steps=(0, 2, 5), turns=(0, 2), texts=12, questions=40,
        probe_layers=(10, 15, 20, 30), mlp_layers=(15,), deep_seeds=1,
        ablation_seeds=0,
    ),
    "full": Settings(
        concepts=("recipes", "french", "place"), seeds=3, train=80, test=12, tokens=48,
        soft_steps=(0, 10, 40), tuning_steps=(0, 2, 5, 10), turns=(0, 1, 2, 4), texts=24,
        questions=60, probe_layers=(5, 10, 15, 20, 25, 30), mlp_layers=(15, 30), deep_seeds=1,
        ablation_seeds=3,
    ),
}  # fmt: skip


def settle(config: Config) -> tuple[Settings, Training]:
    """The preset and the recipe with what was asked otherwise.

    Raises `UserError` where options make no sense together.
    """
    settings = _changed(PRESETS[config.preset], config)
    training = _changed(RECIPES[config.recipe], config)
    files = (config.ordinary, config.near_misses)
    if config.harmful is not None and None in files:
        raise UserError(
            "--harmful needs prompts to be kept as well: give files of prompts as --ordinary and "
            "--near-misses."
        )
    if config.harmful is None and (config.harmful_test or any(files)):
        raise UserError(
            "--harmful-test, --ordinary and --near-misses go with --harmful; give that too."
        )
    if not config.parts or (not settings.concepts and config.harmful is None):
        raise UserError("nothing is left to break or to measure; name a concept and a part.")
    if settings.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {settings.seeds}.")
    return settings, training


def _changed(preset: Any, config: Config) -> Any:
    asked = {f.name: getattr(config, f.name) for f in fields(preset) if hasattr(config, f.name)}
    return replace(preset, **{name: v for name, v in asked.items() if v is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a circuit-breaker study measured."""

    config: Config
    """What was asked."""
    settings: Settings
    """With the preset's values."""
    training: Training
    """With the recipe's values."""
    model: str
    """The model's name."""
    n_layers: int
    """Its layers."""
    subjects: tuple[str, ...]
    """What was broken."""
    adapters: dict[str, str]
    """Folders of the broken models below the root, by subject and seed, as in `french, seed 0`."""
    tables: Tables
    """Everything else, by name."""
    notes: tuple[str, ...]
    """What a reader has to know of this run."""

    def table(self, name: str) -> Frame:
        """A table; empty where that was not measured."""
        return self.tables.get(name, pd.DataFrame())
