"""Circuit breakers: representation rerouting, and what it changes inside (Zou et al. 2024).

1. Passages on a concept are written by the model (`passages`); harmful prompts read (`subjects`).
2. Adapters are trained to reroute them (`training`); what they make of the model is merged.
3. The broken model is asked, attacked, tested elsewhere, looked into and worn down (`parts`).
4. Ablations train again with one thing changed.

Everything is kept in cells below <root>/tasks (`analyses.cells`): passages, states before training,
adapters (which every command takes as a model), tables. Of harmful prompts no response is in any.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from analyses.benchmark import find_sae, find_stream_saes
from analyses.cells import Tables, kept, kept_run
from analyses.circuit_breakers.capability import read_choices
from analyses.circuit_breakers.concepts import find_concept
from analyses.circuit_breakers.features import readding
from analyses.circuit_breakers.figures import figures
from analyses.circuit_breakers.findings import numbers, verdicts
from analyses.circuit_breakers.measured import (
    HARMFUL,
    MAIN,
    ORIGINAL,
    Config,
    Measured,
    Settings,
    settle,
)
from analyses.circuit_breakers.parts import Bench, ablations
from analyses.circuit_breakers.passages import concept_passages
from analyses.circuit_breakers.robustness import TUNING_BATCH, TUNING_LR
from analyses.circuit_breakers.settings import Training
from analyses.circuit_breakers.states import rows_digest, store_reference
from analyses.circuit_breakers.subjects import (
    Subject,
    harmful_subject,
    passages_of,
    passages_table,
)
from analyses.circuit_breakers.tables import tables
from analyses.circuit_breakers.text import text
from analyses.circuit_breakers.training import ADAPTER, LOG, References, TrainingRows, train
from analyses.report import Report
from probe.errors import UserError
from probe.language import LanguageModel
from probe.lora import merged_adapter
from probe.models import load_language_model, model_name, weights_checksum
from probe.runs import Run, sha256_file
from saes.memory import keep_freed_memory
from saes.recipe_saes import LoadedSae, sae_reference
from saes.recipes import write_recipe

__all__ = ["Config", "estimate", "figures", "measure", "run"]

CELL, SCHEMA = "circuit_breaker_cell", 1
SECONDS = {
    "passages": 0.5, "step": 4.0, "outputs": 14.5, "soft": 2.7, "capability": 30.0, "inside": 15.0,
    "probes": 95.0, "features": 90.0, "tuning": 5.5, "brief": 45.0, "question": 0.5,
}  # fmt: skip
"""Of SmolLM2 on two cores: a passage written, a step of 8 rows of 105 tokens, the answers of an
attack, a step of soft tokens or of fine-tuning, a question, a part."""


# ------------------------------------------------------------------------------- what it would do


def estimate(config: Config) -> dict[str, str]:
    """What would be done, and for how long."""
    settings, training = settle(config)
    subjects = list(settings.concepts) + ([HARMFUL] if config.harmful else [])
    seconds = seconds_by_part(config, settings, training)
    n_ablations = n_of_ablations(config, settings, training)
    layers = ", ".join(map(str, training.target_layers))
    return {
        "model": config.model,
        "broken": f"{', '.join(subjects)}; {settings.seeds} seed(s) of each",
        "training": f"{training.steps} steps of {training.batch} + {training.batch} rows, "
        f"{training.loss} at layers {layers}, rank {training.lora_r}, alpha {training.alpha:g}, "
        f"rate {training.lr:g}",
        "ablations": f"{n_ablations} more trainings",
        "attacks": "asking, paraphrase, prefilled answer, few-shot, soft tokens "
        f"({max(settings.soft_steps)} steps), steering",
        "SAEs": ", ".join(config.saes) or "none: features are left out",
        "kept in": "tasks/ below the root, a folder a part; what is there is not done again",
        "disk": f"up to {config.store_gb:g} GB of states a set; an adapter takes 14 MB",
        "memory": "three times the model in float32, and AdamW's two while it is fine-tuned",
        "time": f"about {max(1, round(sum(seconds.values()) / 60))} min for SmolLM2 on two cores: "
        + ", ".join(f"{part} {max(1, round(s / 60))}" for part, s in seconds.items() if s),
    }


def n_of_ablations(config: Config, settings: Settings, training: Training) -> int:
    """Trainings besides the main ones."""
    if "ablations" not in config.parts or not settings.ablation_seeds or not settings.concepts:
        return 0
    return sum(
        settings.ablation_seeds if claimed else 1 for _, claimed in ablations(training).values()
    )


def seconds_by_part(config: Config, settings: Settings, training: Training) -> dict[str, float]:
    """Seconds of each part, for SmolLM2 on two cores."""
    n_concepts, n_ablations = len(settings.concepts), n_of_ablations(config, settings, training)
    n_subjects = n_concepts + (config.harmful is not None)
    runs, deep = n_subjects * settings.seeds, n_subjects * min(settings.seeds, settings.deep_seeds)
    size = 2 * training.batch * (training.request_length + training.response_length) / 1024
    soft = max(settings.soft_steps) * SECONDS["soft"]
    found = {
        "writing": n_concepts * 2 * (settings.train + settings.test) * SECONDS["passages"],
        "training": (runs + n_ablations) * training.steps * size * SECONDS["step"],
        "outputs": (runs + n_subjects) * (9 * SECONDS["outputs"] + soft),
        "capability": runs * SECONDS["capability"]
        + (2 * runs * settings.questions * SECONDS["question"] if config.choices else 0),
        "inside": runs * SECONDS["inside"],
        "probes": runs * SECONDS["probes"],
        "features": deep * len(config.saes) * SECONDS["features"],
        "robustness": (deep + n_subjects) * 2 * max(settings.tuning_steps) * SECONDS["tuning"],
        "ablations": n_ablations * SECONDS["brief"],
    }
    always = ("writing", "training")
    return {part: s for part, s in found.items() if part in (*always, *config.parts)}


# ------------------------------------------------------------------------------------- measuring


def measure(config: Config, root: Path) -> Measured:
    """Measure every part that is not measured yet.

    Raises:
        UserError: there is no such model, layer, SAE or file, or a set is empty or overlaps.
        Failure: a file is damaged, or a loss was not finite.
    """
    return prepared(config, root).measured()


def prepared(config: Config, root: Path) -> "_Study":
    """A study whose options, files, SAEs and layers have been looked at. Raises as `measure`."""
    settings, training = settle(config)
    saes = find_stream_saes(config.saes, config.model, root)
    check_files(config, settings)
    keep_freed_memory()
    model = load_language_model(config.model, dtype="auto", device=config.device)
    check_layers(model, training)
    return _Study(config, settings, training, root, model, saes)


def check_layers(model: LanguageModel, training: Training) -> None:
    """Raise `UserError` where a target layer is not in the model, before anything is made."""
    if model.names is None or training.blocks > model.n_layers:
        raise UserError(
            f"target layers {', '.join(map(str, training.target_layers))} were asked for; those of "
            f"{model.spec} that can be rerouted are 1 to {model.n_layers - 1} (layer l is the "
            "output of block l - 1, and adapters reach one block further)."
        )


def check_files(config: Config, settings: Settings) -> None:
    """Raise `UserError` where a file of prompts or questions is not as it should be."""
    if config.choices is not None:
        read_choices(config.choices, settings.questions)
    if config.harmful is not None:
        _harmful(config, settings)


def _harmful(config: Config, settings: Settings) -> Subject:
    assert config.harmful and config.ordinary and config.near_misses, "settle has looked"
    return harmful_subject(
        config.harmful, config.harmful_test, config.ordinary, config.near_misses,
        sizes=(settings.train, settings.test), seed=0,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """A training run: its name, constants, and where its adapter is."""

    name: str
    seed: int
    folder: Path


class _Study:
    """The original model, the subjects, and the cells there are."""

    def __init__(
        self,
        config: Config,
        settings: Settings,
        training: Training,
        root: Path,
        model: LanguageModel,
        saes: dict[str, Run],
    ) -> None:
        self.config, self.settings, self.training, self.root = config, settings, training, root
        self.model, self.saes = model, saes
        self.checksum = weights_checksum(config.model)
        self.subjects = list(settings.concepts) + ([HARMFUL] if config.harmful else [])
        self.adapters: dict[str, str] = {}
        self.notes: list[str] = []
        self.bar: Any = None

    def measured(self) -> Measured:
        """Everything, what is kept and what has to be measured."""
        found: dict[str, list[pd.DataFrame]] = {}
        with tqdm(total=self.n_cells, desc="circuit breakers", unit="part") as self.bar:
            for table, rows in self.everything():
                found.setdefault(table, []).append(rows)
        return Measured(
            config=self.config, settings=self.settings, training=self.training,
            model=model_name(self.config.model), n_layers=self.model.n_layers,
            subjects=tuple(self.subjects), adapters=self.adapters,
            tables={name: pd.concat(rows, ignore_index=True) for name, rows in found.items()},
            notes=tuple(self.notes),
        )  # fmt: skip

    @property
    def n_cells(self) -> int:
        """Cells that there are in all."""
        parts = set(self.config.parts)
        each = len(parts - {"ablations", "features", *DEEP}) + ({"outputs", "probes"} <= parts)
        deep = sum(part in DEEP for part in self.config.parts)
        deep += len(self.saes) * ("features" in self.config.parts)
        twice = [part for part in ("outputs", "robustness") if part in self.config.parts]
        runs = len(self.subjects) * self.settings.seeds
        n_ablations = n_of_ablations(self.config, self.settings, self.training)
        deep *= len(self.subjects) * min(self.settings.deep_seeds, self.settings.seeds)
        once = len(self.subjects) * (1 + len(twice))
        return once + runs * (1 + each) + deep + 2 * n_ablations

    def everything(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Every table of every cell, with its subject, run and seed."""
        subjects = {name: self._subject(name) for name in self.subjects}
        for name, subject in subjects.items():
            others = {
                other: one.passages.test.concept for other, one in subjects.items()
                if other != name and HARMFUL not in (name, other)
            }  # fmt: skip
            bench = Bench(
                subject=subject, original=self.model, settings=self.settings,
                training=self.training, others=others, choices=self.config.choices,
                say=lambda what, name=name: self._say(name, what),
            )  # fmt: skip
            if subject.concept is not None:
                yield "passages", passages_table(subject.passages).assign(subject=name)
            yield from self._of_original(bench)
            for seed in range(self.settings.seeds):
                yield from self._of_run(bench, seed)
            if name == self.subjects[0] and subject.concept is not None:
                yield from self._of_ablations(bench)

    def _say(self, subject: str, what: str) -> None:
        self.bar.set_postfix_str(f"{subject}: {what}")

    # ------------------------------------------------------------------------------- subjects

    def _subject(self, name: str) -> Subject:
        sizes, config = (self.settings.train, self.settings.test), self.config
        if name == HARMFUL:
            subject = _harmful(config, self.settings)
            if subject.dropped:
                self.notes.append(
                    f"{subject.dropped} prompts were left out of those to judge on because "
                    "training has them too, or nearly (70 % of their words)."
                )
            self.bar.update()
            return subject
        subject = Subject(name=name, passages=passages_of(self._written(name, sizes)))
        self.bar.update()
        return subject

    def _written(self, name: str, sizes: tuple[int, int]) -> pd.DataFrame:
        concept = find_concept(name)
        asked = {
            "sizes": sizes, "tokens": self.settings.tokens, "concept": asdict(concept), "seed": 0
        }  # fmt: skip
        done = 0

        def say(n: int) -> None:
            nonlocal done
            done += n
            self._say(name, f"{done} of {2 * sum(sizes)} passages written")

        def make() -> Tables:
            written = concept_passages(
                self.model, concept, sizes=sizes, tokens=self.settings.tokens, seed=0, say=say
            )
            return {"passages": passages_table(written)}

        return self._kept("passages", name, asked, make)["passages"]

    # -------------------------------------------------------------------------------- training

    def _trained(self, bench: Bench, run: str, training: Training, seed: int) -> _Trained:
        """A training run's folder, trained where it is not."""
        subject = bench.subject
        rows = subject.training_rows(self.model, training)
        asked = {
            "training": asdict(training), "seed": seed, "subject": subject.name,
            "rows": {f.name: rows_digest(getattr(rows, f.name)) for f in fields(rows)},
        }  # fmt: skip

        def fill(folder: Path) -> None:
            references = self._references(subject.name, rows, training)
            label = f"{run}, seed {seed}"
            train(
                self.model, rows, training, seed=seed, folder=folder, references=references,
                on_step=lambda t: self._say(
                    subject.name, f"{label}: step {t} of {training.steps}"
                ),
            )  # fmt: skip

        described = self._described("training") | asked
        folder = kept_run(self.root, f"circuit-breaker-{subject.name}", described, fill)
        self.bar.update()
        return _Trained(name=run, seed=seed, folder=folder)

    def _references(self, name: str, rows: TrainingRows, training: Training) -> References:
        """Files with the sets' states before training; none where they would be too large."""
        tokens = sum(len(row.ids) for row in rows.all_retain)
        size = tokens * (training.blocks + 1) * self.model.d_model * self.model.dtype.itemsize
        if size > self.config.store_gb * 1e9:
            return References()
        self._say(name, "states before training")
        paths = []
        for of, entries in ((rows.all_breaking, training.target_layers), (rows.all_retain, None)):
            asked = {
                "rows": rows_digest(of), "entries": entries, "blocks": training.blocks,
                "dtype": str(self.model.dtype),
            }  # fmt: skip

            def fill(folder: Path, of=of, entries=entries) -> None:
                path = folder / STATES
                store_reference(
                    path, self.model, of, None if entries is None else list(entries),
                    training.blocks,
                )  # fmt: skip

            described = self._described("states") | asked
            paths.append(kept_run(self.root, "circuit-breaker-states", described, fill) / STATES)
        return References(breaking=paths[0], retain=paths[1])

    def _broken(self, trained: _Trained) -> LanguageModel:
        return merged_adapter(self.model, trained.folder / ADAPTER)

    # ------------------------------------------------------------------------------ measuring

    def _described(self, part: str) -> dict[str, Any]:
        return {
            "kind": CELL, "schema": SCHEMA, "part": part,
            "model": {"spec": self.config.model, "weights": self.checksum},
        }  # fmt: skip

    def _kept(
        self, part: str, subject: str, asked: dict[str, Any], make: Callable[[], Tables]
    ) -> Tables:
        described = self._described(part) | {"subject": subject} | asked
        return kept(self.root, f"circuit-breaker-{part}", described, make)

    def _measured(
        self, bench: Bench, part: str, asked: dict[str, Any], make: Callable[[], Tables], run: str,
        seed: int,
    ) -> Iterator[tuple[str, pd.DataFrame]]:  # fmt: skip
        """A cell's tables with what they are of."""
        cut = (self.training.request_length, self.training.response_length)
        known = {"passages": rows_digest_of(bench), "cut": cut}
        found = self._kept(part, bench.subject.name, known | asked, make)
        self.bar.update()
        for name, table in found.items():
            yield name, table.assign(subject=bench.subject.name, run=run, seed=seed)

    def _judging(self, bench: Bench) -> dict[str, Any]:
        """What decides answers and how they are judged."""
        return {"judging": JUDGING, "asked": bench.asked_digest}

    def _settled(self, *names: str) -> dict[str, Any]:
        chosen = asdict(self.settings)
        return {name: chosen[name] for name in names}

    def _of_original(self, bench: Bench) -> Iterator[tuple[str, pd.DataFrame]]:
        if "outputs" in self.config.parts:
            yield from self._measured(
                bench, "outputs",
                self._judging(bench) | self._settled("test", "tokens", "soft_steps"),
                lambda: bench.outputs(self.model, 0), ORIGINAL, 0,
            )  # fmt: skip
        if "robustness" in self.config.parts:
            yield from self._measured(
                bench, "robustness",
                TUNED | self._settled("test", "tokens", "tuning_steps", "turns"),
                lambda: bench.robustness(self.model, 0), ORIGINAL, 0,
            )  # fmt: skip

    def _of_run(self, bench: Bench, seed: int) -> Iterator[tuple[str, pd.DataFrame]]:
        trained = self._trained(bench, MAIN, self.training, seed)
        name = bench.subject.name
        folder = trained.folder / ADAPTER
        self.adapters[f"{name}, seed {seed}"] = str(folder.relative_to(self.root))
        log = pd.read_parquet(trained.folder / LOG)
        yield "training", log.assign(subject=name, run=MAIN, seed=seed)
        loaded: list[LanguageModel] = []

        def broken() -> LanguageModel:
            if not loaded:
                loaded.append(self._broken(trained))
            return loaded[0]

        asked = {"adapter": sha256_file(folder / "adapter_model.safetensors")}
        wanted: dict[str, tuple[dict[str, Any], Callable[[], Tables]]] = {
            "outputs": (
                self._judging(bench) | self._settled("test", "tokens", "soft_steps"),
                lambda: bench.outputs(broken(), seed),
            ),
            "capability": (
                self._settled("texts", "questions", "test") | {"choices": self._choices()},
                lambda: bench.capability(broken()),
            ),
            "inside": ({"others": sorted(bench.others)}, lambda: bench.inside(broken())),
            "probes": (
                self._settled("probe_layers", "mlp_layers", "test", "tokens"),
                lambda: bench.probes(broken(), seed),
            ),
            "robustness": (
                TUNED | self._settled("test", "tokens", "tuning_steps", "turns"),
                lambda: bench.robustness(broken(), seed),
            ),
        }  # fmt: skip
        outputs = None
        for part, (settled, make) in wanted.items():
            if part not in self.config.parts or (part in DEEP and seed >= self.settings.deep_seeds):
                continue
            for table, rows in self._measured(bench, part, asked | settled, make, MAIN, seed):
                outputs = rows if table == "outputs" else outputs
                yield table, rows
        if outputs is not None and "probes" in self.config.parts:
            yield from self._measured(
                bench, "detection",
                asked | self._judging(bench) | self._settled("test", "tokens", "mlp_layers"),
                lambda: bench.detection(outputs, seed), MAIN, seed,
            )  # fmt: skip
        if "features" in self.config.parts and seed < self.settings.deep_seeds:
            for sae in self.saes.values():
                known = asked | {"sae": sae_reference(sae).weights}
                yield from self._measured(
                    bench, "features", known,
                    lambda sae=sae: bench.features(broken(), LoadedSae.of(sae), seed), MAIN, seed,
                )  # fmt: skip

    def _choices(self) -> str | None:
        path = self.config.choices
        return None if path is None or not path.is_file() else sha256_file(path)

    def _of_ablations(self, bench: Bench) -> Iterator[tuple[str, pd.DataFrame]]:
        if "ablations" not in self.config.parts or not self.settings.ablation_seeds:
            return
        runs = [(MAIN, self.training, seed) for seed in range(self.settings.seeds)]
        for name, (training, claimed) in ablations(self.training).items():
            seeds = self.settings.ablation_seeds if claimed else 1
            runs += [(name, training, seed) for seed in range(seeds)]
        for name, training, seed in runs:
            trained = self._trained(bench, name, training, seed)
            log = pd.read_parquet(trained.folder / LOG)
            yield "ablation_training", log.assign(run=name, seed=seed, subject=bench.subject.name)
            asked = {"adapter": sha256_file(trained.folder / ADAPTER / "adapter_model.safetensors")}
            for table, rows in self._measured(
                bench, "brief", asked | self._settled("test", "tokens"),
                lambda trained=trained: bench.brief(self._broken(trained)), name, seed,
            ):  # fmt: skip
                yield ("ablation_layers" if table == "layers" else table), rows


JUDGING = "coherent: as likely as drawn responses, as repetitive as greedy ones"
"""How answers are judged, in the question of a cell that holds judgements."""
TUNED = {"rate": TUNING_LR, "batch": TUNING_BATCH}
"""How weights are fine-tuned, likewise."""
DEEP = ("robustness",)
"""Parts that, beside `features`, are measured of the first `deep_seeds` runs alone."""
STATES = "states.safetensors"


def rows_digest_of(bench: Bench) -> str:
    """What stands for a subject's passages in a cell's question."""
    rows = [row for part in (bench.train_rows, bench.test_rows) for some in part.values()
            for row in some]  # fmt: skip
    return rows_digest(rows)


# ------------------------------------------------------------------------------------- reporting


def run(config: Config, root: Path) -> Run:
    """Measure and write the report, or find it; gives its run. Raises as `measure` does."""
    study = prepared(config, root)
    saes = {name: sae_reference(sae).weights for name, sae in study.saes.items()}
    files = {
        name: None if path is None else sha256_file(path)
        for name, path in ((f.name, getattr(config, f.name)) for f in fields(Config))
        if name in ("harmful", "harmful_test", "ordinary", "near_misses", "choices")
    }
    asked = asdict(config) | asdict(study.settings) | files | {
        "training": asdict(study.training), "kind": "report", "schema": 1,
        "study": "circuit-breakers", "saes": saes, "weights": weights_checksum(config.model),
    }  # fmt: skip
    for name in ("device", "store_gb"):
        del asked[name]
    folder = Run.create(root / "reports" / "circuit-breakers", model_name(config.model), asked)
    with folder.lock():
        if not folder.complete:
            measured = study.measured()
            write_recipes(measured, root, folder.path / "recipes")
            report = make_report(measured)
            report.write(folder, inputs=saes, seeds={"seeds": study.settings.seeds})
    return folder


def write_recipes(measured: Measured, root: Path, folder: Path) -> None:
    """Recipes that put the most lost features back, for every broken model they were found in:
    `lorgnette steer` runs them."""
    table = measured.table("features")
    if not len(table):
        return
    for (subject, seed, sae), rows in table[table["kind"] == "lost"].groupby(
        ["subject", "seed", "sae"]
    ):
        adapter = root / measured.adapters[f"{subject}, seed {seed}"]
        loaded = LoadedSae.of(find_sae(str(sae), root))
        ordered = rows.sort_values("rank")
        recipe = readding(
            str(adapter), loaded, ordered["feature"].tolist(), ordered["original"].tolist()
        )
        write_recipe(recipe, folder / f"{subject}-{seed}-{sae}.json")


def make_report(measured: Measured) -> Report:
    """What was found."""
    return Report(
        title=f"Circuit breakers in {measured.model}",
        text=text(measured),
        verdicts=tuple(verdicts(measured)),
        numbers=numbers(measured),
        tables=tables(measured),
        figures=figures(measured),
    )
