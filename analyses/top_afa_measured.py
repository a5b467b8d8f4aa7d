"""The top-AFA study's options, presets and results, and how numbers are read out of those."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from analyses.statistics import Estimate, mean_interval
from probe.errors import UserError

Family = Literal["topk", "batch_topk", "top_afa", "top_afa_paper", "untrained"]
Rows = Literal["layer_norm", "scale"]
Weights = Literal["trained", "random"]

LABELS: dict[Family, str] = {
    "topk": "TopK",
    "batch_topk": "BatchTopK",
    "top_afa": "top-AFA",
    "top_afa_paper": "top-AFA, authors' code",
    "untrained": "top-AFA, untrained",
}
BITS_OF_A_VALUE = 7
"""Bits that a code's value costs in the description length (the authors' notebook)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """TopK, BatchTopK and top-AFA at neighbouring layers of a model, on one stream of activations.

    Asks whether choosing the number of active latents by the norm of the input (Lee et al. 2025,
    arXiv 2503.24277) beats a fixed number at the same L0, where it settles, whether its lambda is
    easier to choose than k, and what the epsilon-LBO says that the FVU does not. What is trained is
    kept below the root: a stopped study goes on where it was.

    Example: lorgnette analyse top-afa --seeds 1 --steps 100

    Options left at None take the preset's value.
    """

    preset: Literal["smollm2", "gpt2"] = "smollm2"
    """smollm2: sized for two cores. gpt2: as published, GPT-2 on OpenWebText, for a GPU; see what
    it takes with --dry-run."""
    model: str | None = None
    """The model, as `lorgnette capture` takes it."""
    corpus: str | None = None
    """The text, as `lorgnette capture` takes it."""
    site: str | None = None
    """Kind of site, such as resid_post."""
    layers: tuple[int, ...] | None = None
    """Layers; the middle one also gets the variants and controls."""
    tokens: int | None = None
    """Tokens to capture; fewer where the corpus ends first."""
    d_sae: int | None = None
    """Latents."""
    ks: tuple[int, ...] | None = None
    """Values of k for TopK and BatchTopK, growing."""
    afas: tuple[float, ...] | None = None
    """Values of top-AFA's lambda, growing."""
    steps: int | None = None
    """Batches to train on."""
    batch_size: int | None = None
    """Rows in a batch."""
    lr: float | None = None
    """Adam's peak learning rate."""
    seeds: int | None = None
    """Repetitions with other initial weights and another order of the rows."""
    products: Literal["float32", "bfloat16"] | None = None
    """Precision of the matrix products in training; measurements are float32 in any case."""
    n_rows: int | None = None
    """Held-out rows to measure on."""
    n_ce_tokens: int | None = None
    """Held-out tokens to run through the model for each SAE."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`Config` with nothing left open; fields as there."""

    model: str
    corpus: str
    site: str
    layers: tuple[int, ...]
    tokens: int
    d_sae: int
    ks: tuple[int, ...]
    afas: tuple[float, ...]
    steps: int
    batch_size: int
    lr: float
    seeds: int
    products: Literal["float32", "bfloat16"]
    n_rows: int
    n_ce_tokens: int

    def __post_init__(self) -> None:
        for name in ("ks", "afas", "layers"):
            values = getattr(self, name)
            if not values or sorted(set(values)) != list(values):
                raise UserError(f"{name} must be growing numbers, got {list(values)}.")
        for name in ("tokens", "steps", "batch_size", "seeds", "n_rows", "n_ce_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.layers[0] < 0 or self.ks[0] < 1 or self.ks[-1] > self.d_sae or self.afas[0] <= 0:
            raise UserError(
                f"layers count from 0, k lies between 1 and d_sae {self.d_sae}, and lambda is "
                f"above 0; got {list(self.layers)}, {list(self.ks)} and {list(self.afas)}."
            )

    @property
    def middle(self) -> int:
        """The layer that gets the variants and controls."""
        return self.layers[len(self.layers) // 2]

    @property
    def middle_afa(self) -> float:
        """The lambda that the variants and controls are trained with."""
        return self.afas[len(self.afas) // 2]


PRESETS = {
    "smollm2": Settings(
        model="smollm2", corpus="builtin", site="resid_post", layers=(11, 12, 13),
        tokens=1_000_000, d_sae=4608, ks=(64, 256, 1024), afas=(1 / 128, 1 / 32, 1 / 8),
        steps=400, batch_size=512, lr=2e-3, seeds=3, products="bfloat16", n_rows=8192,
        n_ce_tokens=2048,
    ),
    "gpt2": Settings(
        model="gpt2", corpus="Skylion007/openwebtext", site="resid_pre", layers=(6, 7, 8),
        tokens=82_000_000, d_sae=12_288, ks=(32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
        afas=(1 / 128, 1 / 64, 1 / 32, 1 / 24, 1 / 16), steps=20_001, batch_size=4096, lr=3e-4,
        seeds=3, products="float32", n_rows=65_536, n_ce_tokens=32_768,
    ),
}  # fmt: skip
"""What a preset's name stands for. gpt2: section 5 of the paper, and its code."""


def settle(config: Config) -> Settings:
    """The preset with what was asked otherwise. Raises `UserError` where a value makes no sense."""
    asked = {field.name: getattr(config, field.name) for field in fields(Settings)}
    known = {name: value for name, value in asked.items() if value is not None}
    return replace(PRESETS[config.preset], **known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """SAEs that are trained side by side on one stream of rows."""

    layer: int
    """Where in the model."""
    seed: int
    """Decides initial weights and the order of the rows."""
    rows: Rows = "layer_norm"
    """Every row standardised, or all rows scaled by one number."""
    weights: Weights = "trained"
    """The model's own weights, or its random-weight twin's."""

    @property
    def name(self) -> str:
        """Its name in folders and progress bars."""
        twin = "" if self.weights == "trained" else "-random"
        return f"layer{self.layer}{twin}-{self.rows}-seed{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One SAE of the study."""

    group: Group
    """Where it belongs."""
    family: Family
    """What chooses its active latents."""
    setting: float
    """Its k or its lambda."""

    @property
    def name(self) -> str:
        """Its name in folders and tables."""
        return f"{self.group.name}-{self.family}-{self.setting:.4g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was measured of a cell on held-out rows."""

    cell: Cell
    """The cell."""
    facts: dict[str, float | None]
    """`fvu`, `l0`, `dead_share`, `ce_recovered`, `kl` (`saes.metrics`); `code_over_input`,
    `over_share`, `under_share`, `elbo`, `elbo_support`, `elbo_reconstruction` (`saes.afa`); `bits`,
    the description length; None where one is not defined."""
    course: list[tuple[int, float]]
    """L0 in training: step and mean over its batch."""
    zf: dict[str, list[float]]
    """Some rows' `input_norm` and `code_norm`."""

    def fact(self, name: str) -> float:
        """A fact; nan where it is not defined."""
        value = self.facts[name]
        return math.nan if value is None else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the study measured."""

    settings: Settings
    """What was asked."""
    d_in: int
    """Width of a row."""
    results: tuple[Result, ...]
    """Every cell's result."""

    def pick(
        self,
        *families: Family,
        layer: int | None = None,
        rows: Rows = "layer_norm",
        weights: Weights = "trained",
        setting: float | None = None,
        seed: int | None = None,
    ) -> list[Result]:
        """The results of some cells; None takes every layer, setting or seed."""
        return [
            r for r in self.results
            if r.cell.family in families
            and (r.cell.group.rows, r.cell.group.weights) == (rows, weights)
            and layer in (None, r.cell.group.layer)
            and setting in (None, r.cell.setting)
            and seed in (None, r.cell.group.seed)
        ]  # fmt: skip


def description_bits(l0: float, d_sae: int) -> float:
    """Bits that name a row's active latents and their values.

    Lee et al. 2025, their notebook on description length: L0 (7 + log2 d_sae).
    """
    return l0 * (BITS_OF_A_VALUE + math.log2(d_sae))


def over_seeds(results: Iterable[Result], value: Callable[[Result], float]) -> Estimate | None:
    """A value's mean over all results of a seed, then over seeds with its interval.

    Seeds are the units that were drawn; layers and settings are not. None without a finite value.
    """
    by_seed: dict[int, list[float]] = {}
    for result in results:
        found = value(result)
        if math.isfinite(found):
            by_seed.setdefault(result.cell.group.seed, []).append(found)
    if not by_seed:
        return None
    return mean_interval(np.array([np.mean(values) for values in by_seed.values()]))


def matched(measured: Measured, results: Iterable[Result]) -> Iterator[tuple[Result, float]]:
    """Each result with what TopK's FVU would be at its L0, in its own group.

    log FVU is interpolated linearly in log L0 between the neighbouring values of k. Results whose
    L0 lies outside TopK's are left out: nothing is extrapolated.
    """
    for result in results:
        group = result.cell.group
        curve = sorted(
            (r.fact("l0"), r.fact("fvu")) for r in measured.pick(
                "topk", layer=group.layer, rows=group.rows, weights=group.weights, seed=group.seed
            )
        )  # fmt: skip
        l0 = result.fact("l0")
        if curve and curve[0][0] <= l0 <= curve[-1][0]:
            x, y = np.log(np.array(curve)).T
            yield result, float(np.exp(np.interp(np.log(l0), x, y)))


def advantage(measured: Measured, results: Iterable[Result]) -> Estimate | None:
    """How much less FVU than TopK at the same L0: the share saved, negative where it is more.

    Mean over seeds of log (FVU of TopK / FVU), as 1 - exp of minus it.
    """
    gains = {id(r): math.log(at_l0 / r.fact("fvu")) for r, at_l0 in matched(measured, results)}
    compared = [r for r, _ in matched(measured, results)]
    found = over_seeds(compared, lambda r: gains[id(r)])
    if found is None:
        return None
    return Estimate(
        value=_saved(found.value),
        low=None if found.low is None else _saved(found.low),
        high=None if found.high is None else _saved(found.high),
        n=found.n,
    )


def _saved(log_gain: float) -> float:
    return 1 - math.exp(-log_gain)
