"""Random-weight networks and their bias for simplicity (Teney et al. 2024, arXiv 2403.02241).

1. Functions of random networks are drawn and their complexity measured: by activation, depth and
   weight scale (`maps`), with layer norm, residual connections and gates (`components`), by width,
   biases and prior (`laws`).
2. Boolean functions are counted (`boolean`), and the perceptron's exact law is checked.
3. Networks are trained at many prefactors: what complexity generalises (`modulo`, `shortcut`).
4. Untrained transformers write (`sequences`).
5. SAEs of a trained model beside those of its random-weight twin (`twins`).

Everything measured is kept in cells below <root>/tasks (`analyses.cells`).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from analyses import benchmark
from analyses.cells import Tables, kept
from analyses.report import Report
from analyses.simplicity.boolean import (
    BITS,
    INPUTS,
    by_complexity,
    by_rank,
    count_tables,
    decade_slopes,
    drawn_counts,
    merged,
    rank_slope,
    signed_counts,
    upper_bound,
)
from analyses.simplicity.figures import figures
from analyses.simplicity.findings import numbers, verdicts
from analyses.simplicity.learning import digits, modulo, shortcut
from analyses.simplicity.measured import Config, Measured, Settings, settle
from analyses.simplicity.networks import PRIORS, Activation, Architecture
from analyses.simplicity.populations import Places, population
from analyses.simplicity.sequences import (
    RANDOM,
    SEQUENCE_ACTIVATIONS,
    VARIED_ACTIVATIONS,
    VOCABULARY,
    Variant,
    complexity,
    random_tokens,
    sequences,
    tiny_gpt2,
)
from analyses.simplicity.tables import tables
from analyses.simplicity.text import text
from analyses.simplicity.twins import benchmark_scores, find_twins, headline_scores, line_scores
from probe.models import load_architecture
from probe.runs import Run
from saes.recipe_saes import newest_index, sae_reference

__all__ = ["Config", "estimate", "figures", "measure", "run"]

CELL, SCHEMA = "simplicity_cell", 1
BATCHES = 10
"""Cells that the Boolean networks are drawn in: intervals are over them."""
COMPONENTS: dict[str, dict[str, Any]] = {
    "plain": {}, "layer norm": {"layer_norm": True}, "residual": {"residual": True},
    "gated": {"gated": True},
}  # fmt: skip
LAW_ACTIVATIONS: tuple[Activation, ...] = ("relu", "tanh", "sine")
LAW_DEPTH, LAW_SCALE = 3, 2.0
"""Where width, biases and priors are varied: deep and large enough for activations to differ."""
TASK_ACTIVATIONS: tuple[Activation, ...] = ("relu", "gelu", "swish", "tanh", "gaussian", "sine")
MODULO_NETWORK = Architecture(depth=3, width=64)
SHORTCUT_NETWORK = Architecture(depth=2, width=64)
TRAIN_DIGITS = 1000

SECONDS = {
    "layer": 0.0035, "table": 4e-5, "perceptron": 1e-5, "modulo": 4e-4, "shortcut": 2e-3,
    "block": 0.02, "sequence": 9.0, "report": 45.0,
}  # fmt: skip
"""On two cores: a layer of a network on the grid with its measures, a truth table, a perceptron, a
step of a network in a task, a block of a small transformer that writes 100 tokens, SmolLM2's
architecture that does, and the figures."""

Make = Callable[[], Tables]
Cell = tuple[str, dict[str, Any], Make]
"""A cell's name, what decides its numbers, and what measures it."""


# ------------------------------------------------------------------------------- what it would do


def estimate(config: Config) -> dict[str, str]:
    """What would be done, and for how long."""
    settings = settle(config)
    seconds = seconds_by_part(config, settings)
    kinds = len(config.activations) * len(settings.depths) * len(settings.scales)
    return {
        "functions": f"{kinds} kinds of network, {settings.draws} draws of each, on "
        f"{config.grid} x {config.grid} points",
        "Boolean functions": f"{settings.boolean_draws:,} networks of 7 inputs",
        "trained": f"{settings.seeds} networks of each activation and prefactor, {settings.steps} "
        "steps, two tasks",
        "sequences": f"{settings.sequences} of each kind of transformer",
        "SAEs": f"{config.sae} and {config.twin}" if config.sae else "none: --sae and --twin",
        "kept in": "tasks/ below the root, a folder a part; what is there is not done again",
        "time": f"about {max(1, round(sum(seconds.values()) / 60))} min on two cores: "
        + ", ".join(f"{part} {max(1, round(s / 60))}" for part, s in seconds.items() if s),
    }


def seconds_by_part(config: Config, settings: Settings) -> dict[str, float]:
    """Seconds of each part on two cores."""
    points = (config.grid**2 + Places().order ** 2 + 1024) * (config.width / 64) ** 1.5 / 6144
    a_layer = SECONDS["layer"] * points * settings.draws * len(settings.scales)
    tasks = len(TASK_ACTIVATIONS) * len(settings.prefactors) * settings.seeds * settings.steps
    blocks = sum(settings.transformer_depths) * len(
        VARIED_ACTIVATIONS
    ) + settings.transformer_depths[-1] * (
        len(SEQUENCE_ACTIVATIONS) + len(VARIED_ACTIVATIONS) * len(settings.norm_scales)
    )
    found = {
        "maps": a_layer * len(config.activations) * sum(settings.depths),
        "components": a_layer * 4 * len(settings.component_activations)
        * sum(settings.component_depths),
        "laws": a_layer * len(LAW_ACTIVATIONS) * LAW_DEPTH * 3,
        "boolean": settings.boolean_draws * SECONDS["table"],
        "perceptron": settings.perceptron_draws * SECONDS["perceptron"],
        "modulo": tasks * len(settings.moduli) * SECONDS["modulo"],
        "shortcut": tasks * SECONDS["shortcut"],
        "sequences": settings.sequences * blocks * SECONDS["block"]
        + settings.architecture_sequences * SECONDS["sequence"],
        "twins": 60 * (1 + 3 * len(settings.suites)) if config.sae else 0,
    }  # fmt: skip
    return {part: s for part, s in found.items() if part in config.parts} | {
        "report": SECONDS["report"]
    }


# ------------------------------------------------------------------------------------- measuring


def measure(config: Config, root: Path) -> Measured:
    """Measure every part that is not measured yet.

    Raises:
        UserError: an option makes no sense, or an SAE is not there or not a twin.
        Failure: a file is damaged.
    """
    return prepared(config, root).measured()


def prepared(config: Config, root: Path) -> "_Study":
    """A study whose options and SAEs have been looked at. Raises as `measure` does."""
    settings = settle(config)
    twins = find_twins(config.sae, config.twin, root) if config.sae else None
    return _Study(config, settings, root, twins)


def boolean_tables(counts: pd.DataFrame) -> Tables:
    """All batches' truth tables together: by complexity, with the bound fitted, by rank, and by
    decade of ranks."""
    every = merged([counts])
    grouped = by_complexity(every)
    bound, offset = upper_bound(grouped)
    grouped["bound"] = 2.0 ** (-bound.value * grouped["complexity"] - offset)
    return {"boolean": grouped, "ranks": by_rank(every), "rank_slopes": decade_slopes(every)}


def _counted(counts: pd.DataFrame) -> Tables:
    """A batch's truth tables and what is fitted to them: batches are what intervals are over."""
    every = merged([counts])
    bound, _ = upper_bound(by_complexity(every))
    constant = every[every["ones"].isin((0, BITS))]["count"].sum() / every["count"].sum()
    row = {"bound": bound.value, "zipf": rank_slope(every), "constant": constant}
    return {"boolean_counts": counts, "boolean_fits": pd.DataFrame([row])}


class _Study:
    """The cells there are."""

    def __init__(
        self, config: Config, settings: Settings, root: Path, twins: tuple[Run, Run] | None
    ) -> None:
        self.config, self.settings, self.root, self.twins = config, settings, root, twins
        self.places = Places(side=config.grid, basis=config.basis)

    def measured(self) -> Measured:
        """Everything, what is kept and what has to be measured."""
        found: dict[str, list[pd.DataFrame]] = {}
        with tqdm(list(self.cells()), desc="simplicity bias", unit="part") as bar:
            for name, asked, make in bar:
                bar.set_postfix_str(name)
                for table, rows in self.kept(name, asked, make).items():
                    found.setdefault(table, []).append(rows)
        together = {name: pd.concat(rows, ignore_index=True) for name, rows in found.items()}
        if "boolean_counts" in together:
            together |= boolean_tables(together.pop("boolean_counts"))
        return Measured(
            config=self.config, settings=self.settings, tables=together, notes=self._notes()
        )

    def _notes(self) -> tuple[str, ...]:
        if "twins" not in self.config.parts:
            return ()
        if self.twins is None:
            return (
                "Scores of SAEs were not compared with those of a random-weight twin: name both "
                "with --sae and --twin.",
            )
        if not all(newest_index(run) for run in self.twins):
            return (
                "Headline numbers of features were not compared: `lorgnette index` makes an index "
                "of an SAE, and both need one.",
            )
        return ()

    def kept(self, name: str, asked: dict[str, Any], make: Make) -> Tables:
        """A cell's tables, measured where they are not there yet."""
        described = {"kind": CELL, "schema": SCHEMA, "part": name, "seed": self.config.seed}
        return kept(self.root, f"simplicity-{name.split(':')[0]}", described | asked, make)

    def cells(self) -> Iterator[Cell]:
        """Every cell of the parts that are wanted."""
        wanted = {
            "maps": self._maps, "components": self._components, "laws": self._laws,
            "boolean": self._boolean, "perceptron": self._perceptron, "modulo": self._modulo,
            "shortcut": self._shortcut, "sequences": self._sequences, "twins": self._twins,
        }  # fmt: skip
        for part, cells in wanted.items():
            if part in self.config.parts:
                yield from cells()

    # ----------------------------------------------------------------------------- functions

    def _functions(
        self, name: str, kinds: dict[str, Architecture], component: str = "plain"
    ) -> Cell:
        """Populations, a cell of several: table `functions`, a row a network."""
        asked = {
            "places": asdict(self.places), "draws": self.settings.draws,
            "kinds": {kind: asdict(one) for kind, one in kinds.items()},
        }  # fmt: skip

        def make() -> Tables:
            found = [
                population(one, self.settings.draws, self.places, seed=self.config.seed).assign(
                    part=name.split(":")[0], component=component, **asdict(one)
                )
                for kind, one in kinds.items()
            ]
            return {"functions": pd.concat(found)}

        return name, asked, make

    def _maps(self) -> Iterator[Cell]:
        for activation, depth in itertools.product(self.config.activations, self.settings.depths):
            kinds = {
                f"scale {scale:g}": Architecture(
                    activation=activation, depth=depth, scale=scale, width=self.config.width
                )
                for scale in self.settings.scales
            }
            yield self._functions(f"maps: {activation}, {depth} layers", kinds)

    def _components(self) -> Iterator[Cell]:
        for activation, (name, added) in itertools.product(
            self.settings.component_activations, COMPONENTS.items()
        ):
            kinds = {
                f"{depth} layers, scale {scale:g}": Architecture(
                    activation=activation, depth=depth, scale=scale, width=self.config.width,
                    **added,
                )
                for depth in self.settings.component_depths
                for scale in self.settings.scales
            }  # fmt: skip
            yield self._functions(f"components: {activation}, {name}", kinds, component=name)

    def _laws(self) -> Iterator[Cell]:
        for activation in LAW_ACTIVATIONS:
            plain = Architecture(
                activation=activation, depth=LAW_DEPTH, scale=LAW_SCALE, width=self.config.width
            )
            settings = self.settings
            kinds = {f"width {n}": replace(plain, width=n) for n in settings.widths}
            kinds |= {f"biases {s:g}": replace(plain, bias_scale=s) for s in settings.bias_scales}
            kinds |= {f"prior {prior}": replace(plain, prior=prior) for prior in PRIORS}
            yield self._functions(f"laws: {activation}", kinds)

    # -------------------------------------------------------------------------------- Boolean

    def _boolean(self) -> Iterator[Cell]:
        n = -(-self.settings.boolean_draws // BATCHES)
        for number in range(BATCHES):
            seed = self.config.seed * 100_003 + number
            yield (
                f"boolean: {n:,} networks, {number + 1} of {BATCHES}",
                {"draws": n, "table_seed": seed},
                lambda seed=seed: _counted(count_tables(n, seed=seed)),
            )  # fmt: skip

    def _perceptron(self) -> Iterator[Cell]:
        asked = {
            "inputs": self.settings.perceptron_inputs, "draws": self.settings.perceptron_draws
        }  # fmt: skip
        yield "perceptron", asked, self._perceptron_tables

    def _perceptron_tables(self) -> Tables:
        rng, rows = np.random.default_rng(self.config.seed), []
        for n in self.settings.perceptron_inputs:
            sizes = np.abs(rng.standard_normal(n))
            counts, centred = signed_counts(sizes), signed_counts(sizes, centred=True)
            rows.append(
                {"inputs": n, "signs": 2**n, "different": len(set(counts)),
                 "least": counts.min(), "most": counts.max(),
                 "centred_half": bool((centred == 2 ** (n - 1)).all())}
            )  # fmt: skip
        drawn = [
            drawn_counts(INPUTS, self.settings.perceptron_draws, seed=self.config.seed, bias=bias)
            .assign(bias=bias)
            for bias in (0.0, 0.5, 1.0)
        ]  # fmt: skip
        return {"signs": pd.DataFrame(rows), "perceptrons": pd.concat(drawn)}

    # --------------------------------------------------------------------------------- tasks

    def _modulo(self) -> Iterator[Cell]:
        settings = self.settings
        asked = {
            "network": asdict(MODULO_NETWORK), "moduli": settings.moduli,
            "prefactors": settings.prefactors, "seeds": settings.seeds, "steps": settings.steps,
        }  # fmt: skip
        for activation in TASK_ACTIVATIONS:
            yield f"modulo: {activation}", asked, lambda a=activation: self._modulo_tables(a)

    def _modulo_tables(self, activation: Activation) -> Tables:
        settings = self.settings
        found = [
            modulo(
                replace(MODULO_NETWORK, activation=activation, prefactor=beta), settings.moduli,
                seeds=settings.seeds, steps=settings.steps,
            ).assign(activation=activation, prefactor=beta)
            for beta in settings.prefactors
        ]  # fmt: skip
        return {"modulo": pd.concat(found)}

    def _shortcut(self) -> Iterator[Cell]:
        settings = self.settings
        asked = {
            "network": asdict(SHORTCUT_NETWORK), "digits": TRAIN_DIGITS,
            "prefactors": settings.prefactors, "seeds": settings.seeds, "steps": settings.steps,
        }  # fmt: skip
        for activation in TASK_ACTIVATIONS:
            yield f"shortcut: {activation}", asked, lambda a=activation: self._shortcut_tables(a)

    def _shortcut_tables(self, activation: Activation) -> Tables:
        settings, data = self.settings, digits(TRAIN_DIGITS)
        found = [
            shortcut(
                replace(SHORTCUT_NETWORK, activation=activation, prefactor=beta), data,
                seeds=settings.seeds, steps=settings.steps,
            ).assign(activation=activation, prefactor=beta)
            for beta in settings.prefactors
        ]  # fmt: skip
        return {"shortcut": pd.concat(found)}

    # ----------------------------------------------------------------------------- sequences

    def _sequences(self) -> Iterator[Cell]:
        settings = self.settings
        deepest = settings.transformer_depths[-1]
        kinds: dict[tuple[int, Activation, float], None] = dict.fromkeys(
            [
                *((deepest, activation, 1.0) for activation in SEQUENCE_ACTIVATIONS),
                *itertools.product(settings.transformer_depths, VARIED_ACTIVATIONS, (1.0,)),
                *itertools.product((deepest,), VARIED_ACTIVATIONS, settings.norm_scales),
            ]
        )
        for depth, activation, scale in kinds:
            variant = Variant(
                config=tiny_gpt2(depth), activation=activation, norm_scale=float(scale)
            )
            asked = {"depth": depth, "activation": activation, "norm_scale": float(scale)}
            yield self._written(
                f"sequences: {activation}, {depth} blocks, norms x {scale:g}", variant,
                settings.sequences, asked,
            )  # fmt: skip
        if n := settings.architecture_sequences:
            spec = self.config.model
            variant = Variant(config=load_architecture(spec))
            yield self._written(f"sequences: {spec}", variant, n, {"model": spec})
        yield "sequences: random tokens", {"sequences": settings.sequences}, self._random_tokens

    def _written(self, name: str, variant: Variant, n: int, asked: dict[str, Any]) -> Cell:
        def make() -> Tables:
            return {"sequences": sequences(variant, n, seed=self.config.seed).assign(**asked)}

        return name, asked | {"sequences": n}, make

    def _random_tokens(self) -> Tables:
        tokens = random_tokens(self.settings.sequences, VOCABULARY, seed=self.config.seed)
        found = pd.DataFrame(
            {"draw": range(len(tokens)), "lz": complexity(tokens), "model": RANDOM}
        )
        return {"sequences": found}

    # ---------------------------------------------------------------------------------- twins

    def _twins(self) -> Iterator[Cell]:
        if self.twins is None:
            return
        sae, twin = self.twins
        asked = {"sae": sae_reference(sae).weights, "twin": sae_reference(twin).weights}
        config = benchmark.Config(
            sae=str(sae.path), twin=str(twin.path), suites=self.settings.suites,
            seed=self.config.seed,
        )  # fmt: skip
        yield (
            "twins: benchmark", asked | {"suites": self.settings.suites},
            lambda: benchmark_scores(config, self.root),
        )  # fmt: skip
        first, second = newest_index(sae), newest_index(twin)
        if first is not None and second is not None:
            yield (
                "twins: headline numbers",
                asked | {"indexes": [first.path.name, second.path.name]},
                lambda: headline_scores(first, second, self.config.seed),
            )  # fmt: skip
        yield (
            "twins: lines between texts", asked | {"lines": self.settings.paths},
            lambda: line_scores(sae, twin, self.settings.paths, seed=self.config.seed),
        )  # fmt: skip


# ------------------------------------------------------------------------------------- reporting


def run(config: Config, root: Path) -> Run:
    """Measure and write the report, or find it; gives its run. Raises as `measure` does."""
    study = prepared(config, root)
    saes = {run.path.name: sae_reference(run).weights for run in study.twins or ()}
    asked = asdict(config) | asdict(study.settings) | {
        "kind": "report", "schema": 1, "study": "simplicity-bias", "saes": saes,
    }  # fmt: skip
    folder = Run.create(root / "reports" / "simplicity-bias", config.preset, asked)
    with folder.lock():
        if not folder.complete:
            make_report(study.measured()).write(folder, inputs=saes, seeds={"seed": config.seed})
    return folder


def make_report(measured: Measured) -> Report:
    """What was found."""
    return Report(
        title="Random-weight networks and their bias for simplicity",
        text=text(measured),
        verdicts=tuple(verdicts(measured)),
        numbers=numbers(measured),
        tables=tables(measured),
        figures=figures(measured),
    )
