"""The only reader of artifacts for the pages; every read is cached by path and time of change.

Modules that import the model libraries, which takes seconds, are imported where they are needed, so
that the first page of a new server does not wait for them.

An SAE is known by the name of its folder, which ends in a hash of its config. Its index and its
evaluation are runs inside that folder; of several complete ones the newest counts.
"""

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from analyses.report import METRICS, Report, read_report
from app.views import ExampleGroup, Strip, Unit
from probe.errors import Failure, UserError
from probe.runs import Run, find_runs, read_json
from probe.sites import parse_site
from saes.feature_queries import FeatureIndex
from saes.feature_reference import Reference, Told, told_apart, twin_statistics
from saes.feature_schema import SCHEMA
from saes.label_schema import LABELS, read_labels
from saes.notes import Notes

ROOT_VARIABLE = "LORGNETTE_ROOT"
NOTES_FILE = "notes.sqlite"
LOOK_EVERY = 2
"""Seconds after which runs are looked for again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeRecord:
    """An SAE's folder with the newest complete index and evaluation in it."""

    run: Run
    """The SAE's own run, complete or not."""
    index: Run | None
    """Its feature index; None where there is none that is complete."""
    evaluation: Run | None
    """Its evaluation; None where there is none that is complete."""

    @property
    def name(self) -> str:
        """The folder's name: what `sae=` in an address means."""
        return self.run.path.name

    @property
    def of_images(self) -> bool:
        """Whether it reads an image model."""
        return parse_site(self.run.config["site"]).of_images

    @property
    def unit(self) -> Unit:
        """What its features fire on."""
        return "places" if self.of_images else "tokens"

    @property
    def is_control(self) -> bool:
        """Whether its model has random weights: it is then what other SAEs are compared with."""
        return self.run.config["model"].get("random_weights") is not None


def image_saes() -> list[SaeRecord]:
    """The SAEs of image models whose training is complete, sorted as `sae_records`."""
    return [record for record in sae_records() if record.run.complete and record.of_images]


def saes_of_model(record: SaeRecord) -> list[SaeRecord]:
    """The complete SAEs of the same model with the same weights, this one among them."""
    model = record.run.config["model"]
    return [one for one in sae_records() if one.run.complete and one.run.config["model"] == model]


def has_images() -> bool:
    """Whether there is anything of an image model: activations or an SAE."""
    stores = (run.config for run in runs_of("activations"))
    return any(config.get("modality") == "images" for config in stores) or any(
        r.of_images for r in sae_records()
    )


def artifact_root() -> Path:
    """The folder that holds all runs: the variable LORGNETTE_ROOT, else `artifacts`."""
    return Path(os.environ.get(ROOT_VARIABLE, "artifacts"))


def stamp(path: Path) -> float:
    """When a file last changed; 0 where it is not there. Part of the key of every cached read."""
    return path.stat().st_mtime if path.exists() else 0.0


# ------------------------------------------------------------------------------------------- runs


def all_runs(root: Path) -> list[Run]:
    """Every run below the root, looked for again every two seconds."""
    return found_runs(root, int(time.monotonic() / LOOK_EVERY))


@st.cache_resource(max_entries=4, show_spinner=False)
def found_runs(root: Path, period: int) -> list[Run]:
    """The runs that there were in a period of time.

    The period is part of the key: an entry with a time to live may expire in Streamlit's hands,
    between being looked for and being read, and then raises KeyError.
    """
    return find_runs(root)


def runs_of(kind: str) -> list[Run]:
    """Runs of one kind, complete or not, sorted by path."""
    return [run for run in all_runs(artifact_root()) if run.kind == kind]


def sae_records() -> list[SaeRecord]:
    """Every SAE with what belongs to it: those that can be browsed first, then by name."""
    records = [
        SaeRecord(run=run, index=_newest(run, "index"), evaluation=_newest(run, "evaluation"))
        for run in runs_of("sae")
    ]
    return sorted(
        records,
        key=lambda record: (record.index is None, record.is_control, record.evaluation is None),
    )


def _newest(sae: Run, kind: str) -> Run | None:
    nested = [run for run in runs_of(kind) if run.path.parent == sae.path and run.complete]
    return max(
        nested,
        key=lambda run: (kind == "index" and _readable(run), stamp(run.path / "manifest.json")),
        default=None,
    )


def _readable(index: Run) -> bool:
    """Whether this version reads the index; one that it does not is told of where it is opened."""
    return index.config.get("schema") == SCHEMA


def sae_record(name: str) -> SaeRecord:
    """The SAE of that name. Raises `UserError` where there is none."""
    for record in sae_records():
        if record.name == name:
            return record
    raise UserError(
        f"there is no SAE named {name!r} below {artifact_root()}; `lorgnette runs` lists those "
        "there are."
    )


def evaluation_rows(record: SaeRecord) -> list[dict[str, Any]]:
    """Rows of the SAE's evaluation, the SAE first and its controls after it; empty without one."""
    return _evaluation(record).get("rows", [])


def metric_definitions(record: SaeRecord) -> dict[str, str]:
    """Formula of each metric, as the evaluation states it; empty without one."""
    return _evaluation(record).get("definitions", {})


def norm_diagnostics(
    record: SaeRecord,
) -> tuple[dict[str, float | None], dict[str, list[float]]]:
    """What `saes.afa` found in the evaluation, and the points of the ZF plot; empty without one."""
    found = _evaluation(record)
    return found.get("afa", {}), found.get("zf", {})


def _evaluation(record: SaeRecord) -> dict[str, Any]:
    if record.evaluation is None:
        return {}
    path = record.evaluation.path / "metrics.json"
    return _json(path, stamp(path))


def finished_reports() -> dict[str, Run]:
    """Every report that is complete, the newest first, by `<study>/<folder>`."""
    complete = [run for run in runs_of("report") if run.complete]
    newest = sorted(complete, key=lambda run: run.manifest["created"], reverse=True)
    return {f"{run.path.parent.name}/{run.path.name}": run for run in newest}


# --------------------------------------------------------------------------------- broken models


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenModel:
    """An adapter that a circuit-breaker study has trained."""

    run: Run
    """Its run."""

    @property
    def subject(self) -> str:
        """What was broken."""
        return self.run.config["subject"]

    @property
    def base(self) -> str:
        """The model that it was made of."""
        return self.run.config["model"]["spec"]

    @property
    def adapter(self) -> Path:
        """The folder that is a model to every command."""
        return self.run.path / "adapter"

    @property
    def label(self) -> str:
        """What it is, in a few words."""
        training = self.run.config["training"]
        layers = " and ".join(map(str, training["target_layers"]))
        return (
            f"{self.subject}, seed {self.run.config['seed']}: {training['loss']} at {layers}, "
            f"alpha {training['alpha']:g}, {training['retain']} retain term "
            f"({self.run.path.name.rpartition('-')[2]})"
        )


def broken_models() -> list[BrokenModel]:
    """Every adapter that is complete, the newest first."""
    runs = [run for run in runs_of("circuit_breaker_cell") if run.config["part"] == "training"]
    complete = [run for run in runs if run.complete]
    newest = sorted(complete, key=lambda run: run.manifest["created"], reverse=True)
    return [BrokenModel(run=run) for run in newest]


def breaker_log(model: BrokenModel) -> pd.DataFrame:
    """An adapter's training log. Raises `Failure` where it is damaged."""
    return _parquet(model.run.path / "log.parquet", stamp(model.run.path / "log.parquet"))


def breaker_attacks(reports: list[str]) -> pd.DataFrame:
    """The table of attacks of the newest report that has one; empty where none has."""
    for name in reports:
        path = finished_reports()[name].path / "tables" / "attacks.parquet"
        if path.is_file():
            return _parquet(path, stamp(path))
    return pd.DataFrame()


@st.cache_data(show_spinner=False, max_entries=32)
def _parquet(path: Path, changed: float) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise Failure(f"{path} is damaged ({error}); delete its folder and run again.") from error


def report_content(run: Run) -> Report:
    """What a complete report says. Raises `Failure` where a file of it is damaged."""
    return _report(run.path, stamp(run.path / METRICS))


@st.cache_resource(show_spinner=False, max_entries=8)
def _report(path: Path, changed: float) -> Report:
    return read_report(path)


@st.cache_data(show_spinner=False, max_entries=64)
def _json(path: Path, changed: float) -> Any:
    return read_json(path)


def training_metrics(run: Run) -> pd.DataFrame:
    """The run's `metrics.jsonl`, as far as it is written; empty where there is none."""
    path = run.path / "metrics.jsonl"
    return _json_lines(path, stamp(path), path.stat().st_size if path.exists() else 0)


@st.cache_data(show_spinner=False, max_entries=32)
def _json_lines(path: Path, changed: float, size: int) -> pd.DataFrame:
    """Rows of `metrics.jsonl`; a last line that is half written is left for the next look."""
    from saes.training import read_metrics

    try:
        return pd.DataFrame(read_metrics(path))
    except ValueError as error:
        raise Failure(
            f"{path} has a line that is not valid JSON; delete {path.parent} and train again."
        ) from error


def source_name(sae: Run) -> str:
    """Name of the activation store that an SAE was trained on; empty for a stream."""
    source = sae.config.get("source")
    return str(source.get("store") or "") if isinstance(source, dict) else ""


# ---------------------------------------------------------------------------------------- recipes


def recipe_folder() -> Path:
    """Where recipes are kept."""
    return artifact_root() / "recipes"


def saved_recipes(*, of_images: bool | None = None) -> list[Path]:
    """The files of all saved recipes, by name; only those of images, or of texts, where asked."""
    found = sorted(recipe_folder().rglob("*.json"), key=lambda path: path.stem)
    return [path for path in found if of_images is None or _draws(path) == of_images]


def _draws(path: Path) -> bool:
    """Whether a recipe's file is of images; one that cannot be read is told of when it is used."""
    try:
        return "draw" in json.loads(path.read_text())
    except (OSError, ValueError):
        return False


def recipe_path(name: str) -> Path:
    """The saved recipe of that name. Raises `UserError` where there is none."""
    for path in saved_recipes():
        if path.stem == name:
            return path
    names = ", ".join(path.stem for path in saved_recipes()) or "none yet"
    raise UserError(f"there is no recipe {name!r} in {recipe_folder()}; there are: {names}.")


def file_name(name: str) -> str:
    """The name of a recipe's file, from what a person calls it."""
    return (re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "recipe") + ".json"


# ------------------------------------------------------------------------------------------ index


@st.cache_resource(show_spinner="Opening the feature index ...", max_entries=4)
def _index(path: Path, changed: float) -> FeatureIndex:
    return FeatureIndex.open(path)


def feature_index(record: SaeRecord) -> FeatureIndex:
    """The SAE's index, opened once for all sessions. Raises `UserError` where there is none."""
    if record.index is None:
        raise UserError(
            f"{record.name} has no feature index; run `lorgnette index {record.run.path}`."
        )
    path = record.index.path
    return _index(path, stamp(path / "manifest.json"))


@st.cache_resource(show_spinner=False, max_entries=4)
def _numbers(_index: FeatureIndex, path: Path, changed: float) -> pd.DataFrame:
    return _index.numbers()


def feature_numbers(record: SaeRecord) -> pd.DataFrame:
    """The numbers of all features, a row a feature; shared, not to be written to."""
    index = feature_index(record)
    return _numbers(index, index.path, stamp(index.path / "manifest.json"))


def dense_from() -> float:
    """The density from which on a feature is called dense, as the evaluation counts them."""
    from saes.metrics import DENSE

    return DENSE


# ------------------------------------------------------------------------------------------- twin


def twin_record(record: SaeRecord) -> SaeRecord | None:
    """The SAE trained in the same way, of the same corpus, on the model with random weights.

    Site, model, training options, corpus and length of context are the same. Of several an indexed
    one comes first, then the lower seed. None where there is none, and for such a control itself.
    """
    if record.is_control:
        return None
    wanted = _described(record)
    found = [
        r for r in sae_records() if r.is_control and r.run.complete and _described(r) == wanted
    ]
    return min(
        found,
        key=lambda twin: (_index_path(twin) is None, twin.run.config["model"]["random_weights"]),
        default=None,
    )


def _described(record: SaeRecord) -> dict[str, Any]:
    """What an SAE and its twin have in common; the corpus is as `cfg.json` names it."""
    config, known = record.run.config, _sae_config(record)
    metadata = known.get("metadata") or {}
    return {
        "model": config["model"] | {"random_weights": None},
        "site": config["site"],
        "train": config.get("train"),
        "d_sae": known.get("d_sae"),
        "corpus": metadata.get("dataset_path"),
        "context": metadata.get("context_size"),
    }


def _sae_config(record: SaeRecord) -> dict[str, Any]:
    path = record.run.path / "cfg.json"
    return _json(path, stamp(path)) if path.exists() else {}


def builtin_prompts(record: SaeRecord) -> bool:
    """Whether an SAE was trained on captions of toy-turbo's world."""
    metadata = _sae_config(record).get("metadata") or {}
    spec = record.run.config["model"]["spec"]
    return spec == "toy-turbo" or (record.of_images and metadata.get("dataset_path") == "builtin")


def twin_references(record: SaeRecord) -> dict[str, Reference]:
    """How the headline numbers are spread over the twin's living features, in this SAE's units.

    Empty where the SAE has no twin, or either of them no index that this version reads.
    """
    twin = twin_record(record)
    path, twin_path = _index_path(record), _index_path(twin) if twin else None
    if path is None or twin_path is None:
        return {}
    changed = (stamp(path / "manifest.json"), stamp(twin_path / "manifest.json"))
    return _references(record, path, twin_path, changed)


def told_from_twin(record: SaeRecord) -> dict[str, Told]:
    """How well each headline number tells the SAE's features from its twin's; empty without one."""
    twin = twin_record(record)
    path, twin_path = _index_path(record), _index_path(twin) if twin else None
    if path is None or twin_path is None:
        return {}
    changed = (stamp(path / "manifest.json"), stamp(twin_path / "manifest.json"))
    return _told(record, path, twin_path, changed)


@st.cache_resource(show_spinner=False, max_entries=8)
def _told(
    _record: SaeRecord, path: Path, twin_path: Path, changed: tuple[float, float]
) -> dict[str, Told]:
    return told_apart(feature_index(_record), FeatureIndex.open(twin_path))


def _index_path(record: SaeRecord) -> Path | None:
    """Where the SAE's index is; None where there is none that this version reads."""
    return record.index.path if record.index and _readable(record.index) else None


@st.cache_resource(show_spinner=False, max_entries=8)
def _references(
    _record: SaeRecord, path: Path, twin_path: Path, changed: tuple[float, float]
) -> dict[str, Reference]:
    # The twin's index is closed again: it takes as much memory as the SAE's own.
    return twin_statistics(FeatureIndex.open(twin_path), like=feature_index(_record))


# ------------------------------------------------------------------------- what people write


def notes() -> Notes:
    """Labels, notes and lists that were written in this root."""
    return Notes(artifact_root() / NOTES_FILE)


def notes_revision() -> int:
    """A number that grows with every change of the notes; -1 where they cannot be read."""
    try:
        return notes().revision()
    except Failure:
        return -1


def labels(record: SaeRecord) -> dict[int, str]:
    """The label of every feature that has one: the person's, else the automatic one.

    A person's are left out where the notes cannot be read; what writes notes says so.
    """
    made = auto_labels(record)
    pairs = zip(made["feature"].tolist(), made["label"].tolist(), strict=True)
    own = notes().labels(record.name) if notes_revision() >= 0 else {}
    return {feature: label for feature, label in pairs if label} | own


def lists(record: SaeRecord | None = None) -> dict[str, int]:
    """Every list and its number of features; only lists with features of an SAE where given."""
    return notes().lists(record.name if record else None)


def list_features(record: SaeRecord, name: str) -> list[int]:
    """An SAE's features in a list, in the order in which they came; empty where it has none."""
    members = notes().members(name) if name in lists(record) else []
    return [member.feature for member in members if member.sae == record.name]


@st.cache_resource(show_spinner=False, max_entries=8)
def _labels(_run: Run, path: Path, changed: float) -> pd.DataFrame:
    return read_labels(_run)


def auto_labels(record: SaeRecord) -> pd.DataFrame:
    """The labels of the SAE's newest complete labelling, a row a labelled feature, by feature.

    Empty, with the same columns, where nothing is labelled; shared, not to be written to. Columns
    are `saes.label_schema.LABELS`.
    """
    run = _newest(record.run, "labels")
    if run is None:
        return LABELS.empty_table().to_pandas()
    return _labels(run, run.path, stamp(run.path / "manifest.json"))


@st.cache_resource(show_spinner=False, max_entries=256)
def _examples(
    _index: FeatureIndex, path: Path, changed: float, feature: int
) -> tuple[ExampleGroup, ...]:
    rows = _index.examples(feature)
    if _index.of_images:
        from app.tile_data import tiles

        rows = rows.assign(example=tiles(_index, rows))
    else:
        rows = rows.assign(example=[_strip(row) for row in rows.to_dict("records")])
    groups = [group for _, group in rows.groupby(["kind", "interval"], sort=False)]
    return tuple(map(_group, groups))


def _group(rows: pd.DataFrame) -> ExampleGroup:
    first = rows.iloc[0]
    interval = first["kind"] == "interval"
    return ExampleGroup(
        kind=first["kind"],
        low=float(first["interval_low"]) if interval else 0.0,
        high=float(first["interval_high"]) if interval else 0.0,
        share=float(first["interval_share"]) if interval else 1.0,
        examples=tuple(rows["example"]),
    )


def _strip(row: Mapping[Any, Any]) -> Strip:
    fired = dict(zip(row["positions"], row["activations"], strict=True))
    return Strip(
        tokens=tuple(row["texts"]),
        activations=tuple(float(fired.get(place, 0.0)) for place in range(len(row["texts"]))),
        focus=int(row["position"]),
        document=row["document"] or "",
    )


def examples(record: SaeRecord, feature: int) -> tuple[ExampleGroup, ...]:
    """A feature's examples: the intervals from strong to weak, then random ones, then top ones.

    Each is a `Strip` or, of images, a `Tile`.
    """
    index = feature_index(record)
    groups = _examples(index, index.path, stamp(index.path / "manifest.json"), feature)
    return tuple(sorted(groups, key=lambda group: (group.kind, -group.high)))


def provenance(record: SaeRecord) -> dict[str, Any]:
    """Where an SAE comes from and how good it is: its config, its evaluation, its manifest."""
    run, rows = record.run, evaluation_rows(record)
    manifest = run.manifest if run.complete else {}
    names = ("created", "device", "machine", "git_commit", "versions")
    return {
        **{name: run.config.get(name) for name in ("model", "site", "source", "train")},
        "evaluation": next((row for row in rows if row["name"] == "sae"), {}),
        "index": {"rows": record.index.summary.get("n_rows")} if record.index else {},
        "made": {name: manifest.get(name) for name in names},
    }
