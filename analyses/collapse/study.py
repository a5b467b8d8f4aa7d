"""Representational collapse and over-squashing (Barbero et al. 2024, arXiv 2406.04267).

For two prompts that differ in one more repetition of their last token, the paper proves that the
last token's representations come together as the prompts grow, and that how much an early token can
change the last one is bounded by a sum over paths of attention. Asked here of a real model:

1. what the theorems say exactly, and the synthetic experiments (`theory`);
2. how far apart n and n + 1 repetitions are, at every layer, beside the controls that the paper
   lacks: random digits, the same phase of a group, a random-weight twin, a shuffled question, the
   first token hidden, a chat template (`curves`);
3. what number formats make equal (`precision`);
4. whether the path sums predict measured gradients, and which tokens are sensitive (`paths`);
5. what the model still copies and counts (`behaviour`);
6. which features tell n from n + 1, and which keep a count (`features`);
7. the shape of the representations by layer (`parts.shapes`);
8. what helps, separators, hint, precision, windows, a separator feature (`remedies`).

Everything measured is kept in cells below <root>/tasks (`analyses.cells`).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from analyses.benchmark import find_stream_saes
from analyses.cells import Tables, kept
from analyses.collapse import parts
from analyses.collapse.families import find_family
from analyses.collapse.figures import figures
from analyses.collapse.findings import numbers, verdicts
from analyses.collapse.measured import Config, Measured, Settings, Weights, settle
from analyses.collapse.prompts import grow, merging_sentence
from analyses.collapse.tables import tables
from analyses.collapse.text import text
from analyses.report import Report
from probe.attention import AS_IT_IS, Visible
from probe.growing import check_readings
from probe.language import LanguageModel
from probe.models import load_language_model, model_name, weights_checksum
from probe.runs import Run
from saes.recipe_saes import LoadedSae, sae_reference

__all__ = ["Config", "estimate", "figures", "measure", "run"]

CELL, SCHEMA = "collapse_cell", 1
TOKENS_A_SECOND = 600
"""Of SmolLM2 on two cores, everything counted."""


# ------------------------------------------------------------------------------- what it would do


def estimate(config: Config) -> dict[str, str]:
    """What would be done, and for how long."""
    settings = settle(config)
    counts = tokens_by_part(config, settings)
    total = sum(counts.values())
    rows = {
        "model": config.model,
        "SAEs": ", ".join(config.saes) or "none: MLP units alone, no separator feature",
        "prompts": f"{', '.join(config.families)}, up to {settings.longest:,} repetitions",
        "tokens read": f"{total:,}: " + ", ".join(f"{n:,} {part}" for part, n in counts.items()),
        "kept in": "tasks/ below the root, a folder a part; what is there is not done again",
        "time": f"about {max(1, round(total / TOKENS_A_SECOND / 60))} min for SmolLM2 on two cores",
    }
    if {"precision", "remedies"} & set(config.parts):
        rows["memory"] = "the model, its twin and a copy in float64 (8 bytes a parameter)"
    return rows


def tokens_by_part(config: Config, settings: Settings) -> dict[str, int]:
    """Tokens that each part reads, gradients counted by what they cost."""
    curves = len(parts.curves_of(config, settings)) * settings.units * settings.longest
    formats = 3 * len(settings.formats) * settings.format_units * settings.format_longest * 2
    gradient = 4 * settings.probes * settings.path_length
    asked, behind = len(parts.asked_of(settings)), 60
    copied = 5 * max(settings.copy_lengths) + 2 * asked * behind * len(settings.copy_lengths)
    clamped = (1 + 2 * settings.controls) * len(settings.clamp_lengths) * 2 * 300
    found = {
        "curves": curves,
        "precision": formats,
        "paths": (4 + len(settings.windows)) * settings.path_units * gradient,
        "behaviour": settings.pairs * copied + 4 * sum(settings.count_lengths) * 3,
        "features": 4 * settings.feature_units * settings.longest,
        "remedies": settings.pairs * (4000 + (clamped if config.saes else 0)),
        "geometry": 6 * settings.path_length,
    }
    return {part: n for part, n in found.items() if part in config.parts}


# ------------------------------------------------------------------------------------- measuring


def measure(config: Config, root: Path) -> Measured:
    """Measure every part that is not measured yet.

    Raises:
        UserError: there is no such model, SAE or prompt family; a length is beyond the context; the
            model gives no attention weights, or its tokenizer merges digits and that is refused.
        Failure: a file is damaged.
    """
    settings = settle(config)
    saes = {
        name: LoadedSae.of(run)
        for name, run in find_stream_saes(config.saes, config.model, root).items()
    }
    model = load_language_model(config.model, dtype="float32", device=config.device)
    check_lengths(model, config, settings)
    study = _Study(config, settings, root, model, saes)
    found: dict[str, list[pd.DataFrame]] = {}
    cells = list(study.cells())
    with tqdm(cells, desc="collapse", unit="part") as bar:
        for name, asked, make in bar:
            bar.set_postfix_str(name)
            study.say = _counter(bar, name)
            for table, rows in study.kept(name, asked, make).items():
                found.setdefault(table, []).append(rows)
    sentence = merging_sentence(model)
    return Measured(
        config=config,
        settings=settings,
        model=model_name(config.model),
        n_layers=model.n_layers,
        parameters=sum(weight.numel() for weight in model.model.parameters()),
        synthetic=parts.synthetic(settings.synthetic_seeds) if "theory" in config.parts else (),
        tables={name: pd.concat(rows, ignore_index=True) for name, rows in found.items()},
        notes=(sentence,) if sentence else (),
    )


def _counter(bar: Any, name: str) -> Callable[[int], None]:
    done = 0

    def say(n: int) -> None:
        nonlocal done
        done += n
        bar.set_postfix_str(f"{name}: {done:,} tokens")

    return say


def check_lengths(model: LanguageModel, config: Config, settings: Settings) -> None:
    """Raise `UserError` where a prompt is longer than the model's context, before anything runs."""
    for name in config.families:
        family = find_family(name)
        longest = family.longest(settings.longest)
        growing = grow(model, family, longest + parts.PHASE, merged=config.merged)
        check_readings(model, len(growing.trunk), [growing.reading(longest, 1)])


Make = Callable[[], Tables]
Cell = tuple[str, dict[str, Any], Make]
"""A cell's name, what decides its numbers, and what measures it."""


class _Study:
    """The models and SAEs, and the cells there are."""

    def __init__(
        self,
        config: Config,
        settings: Settings,
        root: Path,
        model: LanguageModel,
        saes: dict[str, LoadedSae],
    ) -> None:
        self.config, self.settings, self.root, self.saes = config, settings, root, saes
        self.models: dict[Weights, LanguageModel] = {"trained": model}
        self.checksum = weights_checksum(config.model)
        self.say: Callable[[int], None] = lambda _: None

    def model(self, weights: Weights) -> LanguageModel:
        """The model or its random-weight twin, loaded when it is first asked for."""
        if weights not in self.models:
            self.models[weights] = load_language_model(
                self.config.model, dtype="float32", device=self.config.device,
                random_weights=self.config.twin,
            )  # fmt: skip
        return self.models[weights]

    def kept(self, name: str, asked: dict[str, Any], make: Make) -> Tables:
        """A cell's tables, measured where they are not there yet."""
        described = {
            "kind": CELL, "schema": SCHEMA, "part": name, "merged": self.config.merged,
            "model": {"spec": self.config.model, "weights": self.checksum},
        }  # fmt: skip
        return kept(self.root, f"collapse-{name.split(':')[0]}", described | asked, make)

    def cells(self) -> Iterator[Cell]:
        """Every cell of the parts that are wanted."""
        wanted = {
            "curves": self._curves, "precision": self._precision, "paths": self._paths,
            "behaviour": self._behaviour, "features": self._features, "remedies": self._remedies,
            "geometry": self._geometry,
        }  # fmt: skip
        for part, cells in wanted.items():
            if part in self.config.parts:
                yield from cells()

    def _asked(self, *names: str) -> dict[str, Any]:
        """Some of the settings, as a cell's config has them."""
        chosen = asdict(self.settings) | asdict(self.config)
        return {name: chosen[name] for name in names}

    def _curves(self) -> Iterator[Cell]:
        for one in parts.curves_of(self.config, self.settings):
            asked = self._asked("longest", "units")
            if one.weights == "twin":
                asked |= self._asked("twin")
            yield (
                f"curves: {one.name}", asked | {"more": list(one.condition.more)},
                lambda one=one: parts.curves(
                    self.model(one.weights), one, self.config, self.settings, self.say
                ),
            )  # fmt: skip

    def _precision(self) -> Iterator[Cell]:
        asked = self._asked("formats", "format_longest", "format_units")
        for name in ("ones", "digits", "commas"):
            if name in self.config.families:
                yield (
                    f"precision: {name}", asked,
                    lambda name=name: parts.precision(
                        self.model("trained"), name, self.config, self.settings, self.say
                    ),
                )  # fmt: skip

    def _paths(self) -> Iterator[Cell]:
        asked = self._asked("path_length", "path_units", "probes", "seed")
        windows = [Visible(window=window) for window in self.settings.windows]
        wanted: list[tuple[Weights, str, Visible]] = [
            *(("trained", name, AS_IT_IS) for name in ("ones", "digits", parts.TEXT)),
            *(("trained", "ones", window) for window in windows),
            ("twin", "ones", AS_IT_IS), ("twin", parts.TEXT, AS_IT_IS),
        ]  # fmt: skip
        for weights, name, visible in wanted:
            named = f"paths: {name}, {weights}, window {visible.window}"
            yield (
                named, asked | (self._asked("twin") if weights == "twin" else {}),
                lambda weights=weights, name=name, visible=visible: {
                    table: rows.assign(weights=weights)
                    for table, rows in parts.paths(
                        self.model(weights), name, visible, self.config, self.settings, self.say
                    ).items()
                },
            )  # fmt: skip

    def _behaviour(self) -> Iterator[Cell]:
        for pair in parts.pairs_of(self.settings):
            yield (
                f"copying: {pair[0]} and {pair[1]}", self._asked("copy_lengths"),
                lambda pair=pair: parts.copying(
                    self.model("trained"), pair, self.settings, self.say
                ),
            )  # fmt: skip
        for what in parts.COUNTS:
            yield (
                f"counting: {what}", self._asked("count_lengths", "seed"),
                lambda what=what: parts.counts(
                    self.model("trained"), what, self.config, self.settings
                ),
            )  # fmt: skip

    def _features(self) -> Iterator[Cell]:
        asked = self._asked("longest", "feature_units")
        families = [name for name in ("ones", "words", "digits") if name in self.config.families]
        both: tuple[Weights, ...] = ("trained", "twin")
        for weights, name in itertools.product(both, families):
            saes = self.saes if weights == "trained" else {}
            known = {"saes": self._checksums(saes)}
            known |= self._asked("twin") if weights == "twin" else {}
            yield (
                f"features: {name}, {weights}", asked | known,
                lambda weights=weights, name=name, saes=saes: {
                    table: rows.assign(weights=weights)
                    for table, rows in parts.features(
                        self.model(weights), name, saes, self.config, self.settings, self.say
                    ).items()
                },
            )  # fmt: skip

    def _checksums(self, saes: dict[str, LoadedSae]) -> dict[str, str]:
        return {name: sae_reference(one.run).weights for name, one in saes.items()}

    def _remedies(self) -> Iterator[Cell]:
        asked = self._asked("remedy_lengths")
        for pair in parts.pairs_of(self.settings):
            named = f"{pair[0]} and {pair[1]}"
            yield (
                f"remedies: {named}", asked | self._asked("windows"),
                lambda pair=pair: parts.asked_remedies(self.model("trained"), pair, self.settings),
            )  # fmt: skip
            if self.saes:
                known = self._asked("clamp_lengths", "controls", "seed")
                yield (
                    f"clamped: {named}", known | {"saes": self._checksums(self.saes)},
                    lambda pair=pair: parts.clamp_remedies(
                        self.model("trained"), pair, self.saes, self.config, self.settings
                    ),
                )  # fmt: skip
        for format in self.settings.formats:
            yield (
                f"in {format}", asked | self._asked("pairs"),
                lambda format=format: parts.format_remedies(
                    self.model("trained"), format, self.settings, self.say
                ),
            )  # fmt: skip

    def _geometry(self) -> Iterator[Cell]:
        for weights in ("trained", "twin"):
            asked = self._asked("path_length")
            yield (
                f"shapes: {weights}", asked | (self._asked("twin") if weights == "twin" else {}),
                lambda weights=weights: parts.shapes(
                    self.model(weights), weights, self.config, self.settings
                ),
            )  # fmt: skip


# ------------------------------------------------------------------------------------- reporting


def run(config: Config, root: Path) -> Run:
    """Measure and write the report, or find it; gives its run. Raises as `measure` does."""
    settings = settle(config)
    named = find_stream_saes(config.saes, config.model, root)
    saes = {name: sae_reference(sae).weights for name, sae in named.items()}
    asked = asdict(config) | asdict(settings) | {
        "kind": "report", "schema": 1, "study": "collapse", "saes": saes,
        "weights": weights_checksum(config.model),
    }  # fmt: skip
    del asked["device"]
    folder = Run.create(root / "reports" / "collapse", model_name(config.model), asked)
    with folder.lock():
        if not folder.complete:
            report = make_report(measure(config, root))
            report.write(folder, inputs=saes, seeds={"seed": config.seed, "twin": config.twin})
    return folder


def make_report(measured: Measured) -> Report:
    """What was found."""
    return Report(
        title=f"Representational collapse and over-squashing in {measured.model}",
        text=text(measured),
        verdicts=tuple(verdicts(measured)),
        numbers=numbers(measured),
        tables=tables(measured),
        figures=figures(measured),
    )
