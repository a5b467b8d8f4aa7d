"""The benchmark's options and what it measured, and how numbers are read out of that.

Every number is a `Measured`: its value on the test texts, and its values on resamples of them
(percentile bootstrap; the training texts, and with them the probes and the chosen latents, stay).
All numbers on one set of texts share their resamples, so that a difference of two has an interval
of its own.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from analyses.statistics import Estimate
from probe.corpora import BUILTIN
from probe.errors import UserError
from probe.runs import Run
from saes.metrics import interval, resampling_weights
from saes.models import SparseAutoencoder
from saes.tasks import Pool, TaskData

Suite = Literal["probing", "tpp", "scr", "absorption", "matching", "coherence"]
SUITES: tuple[Suite, ...] = ("probing", "tpp", "scr", "absorption", "matching", "coherence")
NAMES: dict[Suite, str] = {
    "tpp": "targeted_probe_perturbation",
    "scr": "spurious_correlation_removal",
}
"""Names of tables and figures where the suite's own says too little."""
TEXT_SUITES = {"probing", "tpp", "scr"}
"""Those that need labelled texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What can an SAE's latents tell and change, beyond reconstructing?

    probing: how well a few latents tell the class of a text.
    tpp: whether taking a class's latents out harms that class alone.
    scr: whether taking a property's latents out frees a biased probe of it.
    absorption: whether other latents carry a first letter where its own fall silent.
    matching: the latents of two SAEs paired by cosine.
    coherence: how alike a dictionary's directions are.

    Each beside its controls: residual channels, PCA, a random dictionary, the whole activation,
    shuffled labels, random latents and, where it is given, the SAE of the model's random-weight
    twin. The texts' activations are kept below the root: a stopped study does not run the model
    again.

    Example: lorgnette analyse benchmark --sae smollm2-resid_post.12-topk32-4608-1a2b3c4d
    """

    sae: str = ""
    """Folder of a trained SAE, or its name below <root>/saes; it has to be named."""
    compare: str | None = None
    """A second SAE to measure beside it and match it with: another seed, layer or variant."""
    twin: str | None = None
    """An SAE of the same recipe, trained on the random-weight twin of the model."""
    suites: tuple[Suite, ...] = SUITES
    """What to measure: any of probing, tpp, scr, absorption, matching, coherence."""
    dataset: str = BUILTIN
    """Labelled texts: builtin, or a .jsonl, .csv or .parquet file with a column `text`."""
    label: str | None = None
    """Column of the classes: form where none is named for builtin, label for a file."""
    attribute: str | None = None
    """A second column, for scr: topic where none is named for builtin; a file has none then."""
    pool: Pool = "mean"
    """A text's activation: the mean over its tokens, or that of the last token."""
    context: int = 128
    """Tokens read of each text, at most."""
    max_per_class: int | None = None
    """Texts of each class, at most; None for all."""
    words_per_letter: int = 300
    """Words of each first letter, at most, for absorption."""
    ks: tuple[int, ...] = (1, 2, 5)
    """Numbers of latents that a sparse probe sees."""
    ns: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Numbers of latents that scr and tpp take out; 20 is the headline where it is among them."""
    n_resamples: int = 1000
    """Bootstrap resamples of the test texts behind every interval."""
    device: str = "auto"
    """Where the model runs while texts are captured: auto, cpu, cuda, ..."""
    seed: int = 0
    """Decides split, balancing, random controls and resamples."""

    def __post_init__(self) -> None:
        unknown = set(self.suites) - set(SUITES)
        if unknown or not self.suites:
            raise UserError(
                f"suites must be one or more of {', '.join(SUITES)}, got {list(self.suites)}."
            )
        for name in ("ks", "ns"):
            values = getattr(self, name)
            if not values or min(values) < 1 or sorted(set(values)) != list(values):
                raise UserError(f"{name} must be growing numbers from 1 on, got {list(values)}.")
        if self.n_resamples < 1:
            raise UserError(f"n_resamples must be at least 1, got {self.n_resamples}.")

    @property
    def columns(self) -> tuple[str, str | None]:
        """The columns of the classes and of the second property."""
        if self.dataset != BUILTIN:
            return self.label or "label", self.attribute
        label = self.label or "form"
        return label, self.attribute or ("topic" if label == "form" else "form")

    @property
    def headline_n(self) -> int:
        """The number of latents taken out that the claims are about. SAEBench: 20."""
        return 20 if 20 in self.ns else self.ns[len(self.ns) // 2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An SAE and where it belongs."""

    name: str
    """`sae`, `compare` or `twin`."""
    label: str
    """Its name for people."""
    run: Run
    """Its folder; the config names its model and site."""
    sae: SparseAutoencoder
    """The SAE."""

    place: str = ""
    """Where it looks, to follow a name; empty where it looks where the benchmark's SAE does."""

    @property
    def repeats(self) -> bool:
        """Whether its activations are the benchmark's SAE's, of which everything is known."""
        return self.name != "sae" and not self.place


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A number with its resamples."""

    suite: str
    """What was measured."""
    subject: str
    """Name of the SAE whose activations it was measured on."""
    name: str
    """The dictionary or control."""
    label: str
    """The same for people."""
    setting: str
    """k, n or the rule."""
    n_texts: int
    """Test texts behind it."""
    draws: Float64[Tensor, " r"]
    """The value, then its resamples."""
    variant: str = ""
    """The target, for spurious-correlation removal."""

    @property
    def estimate(self) -> Estimate:
        """The value on the test texts, nan where it is not defined, with its interval."""
        return _estimate(self.draws, self.n_texts)

    def minus(self, other: "Measured") -> Estimate:
        """The difference, text by text where both have the same texts."""
        return _estimate(self.draws - other.draws, min(self.n_texts, other.n_texts))


def _estimate(draws: Float64[Tensor, " r"], n: int) -> Estimate:
    """The first of the draws with the interval that the others span, where they do."""
    low, high = (end if math.isfinite(end) else None for end in interval(draws[1:], n))
    return Estimate(value=float(draws[0]), low=low, high=high, n=n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything a benchmark found; filled suite by suite."""

    estimates: list[Measured] = field(default_factory=list)
    """All numbers with intervals."""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Tables beyond those of the estimates."""
    matched: dict[str, np.ndarray] = field(default_factory=dict)
    """Absolute cosines of matched latents, by what was matched: each pair of dictionaries, then its
    control."""
    nearest: dict[str, np.ndarray] = field(default_factory=dict)
    """Each latent's largest absolute cosine with another, by dictionary: the SAE's first, that of
    random directions last."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""
    counts: dict[str, int] = field(default_factory=dict)
    """Texts and words behind the numbers."""

    def of(self, suite: str, variant: str | None = None) -> list[Measured]:
        """The estimates of one suite."""
        found = [each for each in self.estimates if each.suite == suite]
        return [each for each in found if variant is None or each.variant == variant]

    @property
    def headline_target(self) -> str:
        """The target of which the bias costs the SAE's own activations most; "" without scr."""
        table = self.tables.get("spurious_probes")
        if table is None:
            return ""
        rows = table.to_dict("records")
        own = [row for row in rows if row["activations"] == rows[0]["activations"]]
        return max(own, key=lambda row: row["unbiased accuracy"] - row["biased accuracy"])["target"]

    def add_rows(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Add rows to a table, which is made where it is not there."""
        before = [self.tables[table]] if table in self.tables else []
        self.tables[table] = pd.concat([*before, pd.DataFrame(rows)], ignore_index=True)

    def find(
        self, suite: str, subject: str, name: str, setting: str, variant: str = ""
    ) -> Measured | None:
        """One estimate; None where it was not measured."""
        key = (suite, subject, name, setting, variant)
        for each in self.estimates:
            if (each.suite, each.subject, each.name, each.setting, each.variant) == key:
                return each
        return None


def resample_weights(data: TaskData, n_resamples: int, seed: int) -> Float64[Tensor, "r n"]:
    """A row of ones, then the resamples of the test texts."""
    n = int(data.test.sum())
    ones = torch.ones(1, n, dtype=torch.float64)
    return torch.cat([ones, resampling_weights(n, n_resamples, seed)])
