"""The SAEs of the top-AFA study: trained a group at a time on one stream, measured once, kept.

A cell is a run folder below `<root>/saes/top-afa/` whose `result.json` holds what was measured; its
config says everything that decides the numbers. SAEs in training are runs inside the cells'
folders, with checkpoints; once measured they go. All SAEs of a group see the same rows in the same
order, and are measured on the same held-out rows and the same text.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from analyses.top_afa_measured import (
    Cell,
    Family,
    Group,
    Result,
    Settings,
    description_bits,
)
from probe.corpora import read_documents
from probe.language import LanguageModel
from probe.loader import StoreReader
from probe.models import load_language_model
from probe.runs import MANIFEST, Run, read_json, sha256_file, write_json
from probe.sites import Site, parse_site
from probe.store import ActivationStore, StoreConfig
from probe.store_writing import capture_store
from saes.activations import Activation, BatchTopK, TopAfa, TopK
from saes.afa import summary
from saes.baselines import Candidate, constant_candidate, sae_candidate
from saes.downstream import CLEAN, measure_downstream
from saes.evaluation import Subject, measure_fidelity, measure_norms, zf_points
from saes.metrics import Anchors, downstream_metrics
from saes.models import SparseAutoencoder
from saes.split import Span, read_tokens, sequence_spans, split_store, spread, spread_rows
from saes.training import METRICS, Job, TrainConfig, fit, fresh_state

CELL, TRAINING, SCHEMA = "top_afa_cell", "top_afa_training", 1
RESULT = "result.json"
HELD_OUT = 0.05
"""Share of the store's sequences that judge."""
BATCH_SEQUENCES = 4
COURSE_POINTS = 25
"""Points of the course of L0 in training."""
PRECISIONS = {"float32": "highest", "bfloat16": "medium"}
"""PyTorch's names for the precision of float32 matrix products."""
MEASURING = ("batch_size", "products", "n_rows", "n_ce_tokens")
"""Settings that decide a cell's numbers beside its training config."""
FACTS = ("fvu", "l0", "dead_share", "cosine", "relative_norm")
"""Metrics of `saes.metrics` that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A group's activations, the model they are from, and what of them judges."""

    store: ActivationStore
    """The activations of all layers."""
    site: Site
    """The group's."""
    model: LanguageModel
    """The model."""
    training_rows: int
    """Training reads the rows before this one."""
    spans: Sequence[Span]
    """Held-out sequences to reconstruct."""
    ce_spans: Sequence[Span]
    """Held-out sequences to run through the model."""


def make_groups(settings: Settings) -> list[list[Cell]]:
    """Every cell, by group; all layers of a seed before the next seed."""
    groups = []
    for seed in range(settings.seeds):
        groups += [_main_cells(settings, layer, seed) for layer in settings.layers]
        groups += [_raw_cells(settings, seed), _twin_cells(settings, seed)]
    return groups


def _main_cells(settings: Settings, layer: int, seed: int) -> list[Cell]:
    """The three families at one layer; at the middle one the authors' conventions too."""
    group = Group(layer=layer, seed=seed)
    cells = [
        Cell(group=group, family=family, setting=float(k))
        for family in ("topk", "batch_topk")
        for k in settings.ks
    ]
    cells += [Cell(group=group, family="top_afa", setting=afa) for afa in settings.afas]
    if layer == settings.middle:
        cells.append(Cell(group=group, family="top_afa_paper", setting=settings.middle_afa))
    return [*cells, Cell(group=group, family="untrained", setting=settings.middle_afa)]


def _raw_cells(settings: Settings, seed: int) -> list[Cell]:
    """The same rows without standardising each."""
    group = Group(layer=settings.middle, seed=seed, rows="scale")
    return _compared(settings, group)


def _twin_cells(settings: Settings, seed: int) -> list[Cell]:
    """The same architecture with random weights."""
    return _compared(settings, Group(layer=settings.middle, seed=seed, weights="random"))


def _compared(settings: Settings, group: Group) -> list[Cell]:
    """What a comparison at matched L0 needs: TopK's curve and one top-AFA SAE."""
    cells = [Cell(group=group, family="topk", setting=float(k)) for k in settings.ks]
    return [*cells, Cell(group=group, family="top_afa", setting=settings.middle_afa)]


def store_config(settings: Settings, model: LanguageModel, seed: int | None) -> StoreConfig:
    """The store of all layers, as `lorgnette capture` would ask for it."""
    return StoreConfig(
        model={
            "spec": settings.model,
            "random_weights": seed,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        corpus=settings.corpus,
        sites=tuple(site_name(settings, layer) for layer in _layers(settings, seed)),
        tokens=settings.tokens,
    )


def _layers(settings: Settings, random_weights: int | None) -> tuple[int, ...]:
    return settings.layers if random_weights is None else (settings.middle,)


def site_name(settings: Settings, layer: int) -> str:
    """The site of a layer."""
    return f"{settings.site}.{layer}"


def capture(
    settings: Settings, root: Path, random_weights: int | None, device: str
) -> tuple[ActivationStore, LanguageModel]:
    """The store of the model or of its twin, made now or found, and the model."""
    read_documents(settings.corpus)
    model = load_language_model(settings.model, device=device, random_weights=random_weights)
    config = store_config(settings, model, random_weights)
    return capture_store(root / "activations", config, model), model


def make_place(
    settings: Settings, store: ActivationStore, model: LanguageModel, layer: int
) -> Place:
    """What a group reads, trains on and is judged by."""
    split = split_store(store, HELD_OUT)
    held_out = sequence_spans(store, range(split.evaluation_start, store.n_rows))
    return Place(
        store=store,
        site=parse_site(site_name(settings, layer)),
        model=model,
        training_rows=split.training_rows,
        spans=spread_rows(held_out, settings.n_rows),
        ce_spans=spread(held_out, max(1, settings.n_ce_tokens // store.config.context)),
    )


def measure_group(
    cells: Sequence[Cell], settings: Settings, place: Place, root: Path
) -> list[Result]:
    """The results of a group's cells, those that are not there yet measured now.

    Raises as training does.
    """
    store_hash = sha256_file(place.store.run.path / MANIFEST)
    with contextlib.ExitStack() as held:
        runs = {}
        for cell in cells:
            run = cell_run(cell, settings, store_hash, root)
            held.enter_context(run.lock())
            runs[cell] = run
        waiting = {cell: run for cell, run in runs.items() if not run.complete}
        if waiting:
            saes = train_cells(waiting, settings, place)
            for cell, result in measure_cells(saes, settings, place).items():
                keep(result, waiting[cell], {"store": store_hash}, str(place.model.device))
    return [read_result(cell, run) for cell, run in runs.items()]


def cell_run(cell: Cell, settings: Settings, store_hash: str, root: Path) -> Run:
    """A cell's folder."""
    config = {
        "kind": CELL,
        "schema": SCHEMA,
        "store": store_hash,
        "site": site_name(settings, cell.group.layer),
        "family": cell.family,
        "train": asdict(train_config(cell, settings)),
        **{name: getattr(settings, name) for name in MEASURING},
    }
    return Run.create(root / "saes" / "top-afa", cell.name, config)


def train_config(cell: Cell, settings: Settings) -> TrainConfig:
    """How a cell's SAE is trained."""
    return TrainConfig(
        d_sae=settings.d_sae,
        activation=activation(cell.family, cell.setting),
        steps=settings.steps,
        normalize=cell.group.rows,
        lr=settings.lr,
        warmup_steps=max(1, settings.steps // 10),
        seed=cell.group.seed,
        log_every=max(1, settings.steps // COURSE_POINTS),
        checkpoint_every=100,
    )


def activation(family: Family, setting: float) -> Activation:
    """What chooses a cell's active latents."""
    match family:
        case "topk":
            return TopK(k=round(setting))
        case "batch_topk":
            return BatchTopK(k=round(setting))
        case "top_afa" | "untrained":
            return TopAfa(afa=setting)
        case "top_afa_paper":
            return TopAfa(afa=setting, paper_code=True)


def train_cells(
    runs: Mapping[Cell, Run], settings: Settings, place: Place
) -> dict[Cell, SparseAutoencoder]:
    """The SAEs of some cells of one group, trained side by side or found."""
    device = str(place.model.device)
    seed = next(iter(runs)).group.seed
    source = StoreReader(
        place.store, place.site, settings.batch_size, seed=seed, stop_row=place.training_rows
    )
    jobs = {
        cell: Job(
            run=Run.create(run.path, "training", {"kind": TRAINING, **run.config}),
            config=train_config(cell, settings),
        )
        for cell, run in runs.items()
        if cell.family != "untrained"
    }
    with products_in(settings.products):
        trained = fit(list(jobs.values()), source, device=device)
    saes = dict(zip(jobs, trained, strict=True))
    untrained = [cell for cell in runs if cell.family == "untrained"]
    rows = source.sample(TrainConfig().init_rows) if untrained else None
    for cell in untrained:
        assert rows is not None
        saes[cell] = fresh_state(train_config(cell, settings), rows, device).sae
    return {cell: sae.to(device) for cell, sae in saes.items()}


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Matrix products of float32 tensors in this precision, with float32 sums."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISIONS[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def measure_cells(
    saes: Mapping[Cell, SparseAutoencoder], settings: Settings, place: Place
) -> dict[Cell, dict[str, Any]]:
    """The contents of `result.json` for SAEs of one group, all on the same rows and text."""
    candidates = [replace(sae_candidate(sae), name=cell.name) for cell, sae in saes.items()]
    recovered = measure_text(candidates, place)
    return {
        cell: measure_sae(sae, candidate, settings, place, recovered[cell.name])
        for (cell, sae), candidate in zip(saes.items(), candidates, strict=True)
    }


def measure_sae(
    sae: SparseAutoencoder,
    candidate: Candidate,
    settings: Settings,
    place: Place,
    recovered: dict[str, float],
) -> dict[str, Any]:
    """What is kept of one SAE but for its course in training."""
    subject = Subject(sae=sae, store=place.store, site=place.site, model=None)
    fidelity = measure_fidelity(candidate, subject, place.spans, float("inf")).rows.metrics()
    norms = measure_norms(subject, place.spans)
    found = {name: fidelity[name] for name in FACTS} | recovered
    found |= summary(norms, d_sae=sae.config.d_sae, d_in=sae.config.d_in)
    found["bits"] = description_bits(fidelity["l0"], settings.d_sae)
    facts = {name: value if value == value else None for name, value in found.items()}
    return {"facts": facts, "zf": zf_points(norms)}


def measure_text(candidates: Sequence[Candidate], place: Place) -> dict[str, dict[str, float]]:
    """Share of the cross-entropy recovered, and KL, of each candidate in the running model."""
    mean = place.store.statistics(place.site).mean
    anchors = [
        constant_candidate("mean", "mean row", mean),
        constant_candidate("zero", "zero", torch.zeros_like(mean, dtype=torch.float32)),
    ]
    starts = range(0, len(place.ce_spans), BATCH_SEQUENCES)
    batches = (read_tokens(place.store, place.ce_spans[i : i + BATCH_SEQUENCES]) for i in starts)
    found = measure_downstream(place.model, place.site, [*candidates, *anchors], batches)
    clean, zero, of_mean = (found[name].cross_entropy for name in (CLEAN, "zero", "mean"))
    everything = torch.ones(1, len(clean), dtype=torch.float64)
    between = Anchors(clean=clean, zero=zero, mean=of_mean)
    metrics = {c.name: downstream_metrics(found[c.name], between, everything) for c in candidates}
    return {
        name: {key: float(values[key]) for key in ("ce_recovered", "ce_recovered_mean", "kl")}
        for name, values in metrics.items()
    }


def keep(result: dict[str, Any], run: Run, inputs: dict[str, str], device: str) -> None:
    """Finish a cell: write its result, then let go of the SAE."""
    trainings = list(run.path.glob("training-*"))
    course = [
        (row["step"], row["l0"])
        for folder in trainings
        for row in map(json.loads, (folder / METRICS).read_text().splitlines())
    ]
    write_json(run.path / RESULT, result | {"course": course})
    run.finish(
        summary=result["facts"],
        inputs=inputs,
        seeds={"train": run.config["train"]["seed"]},
        device=device,
    )
    for folder in trainings:
        shutil.rmtree(folder)


def read_result(cell: Cell, run: Run) -> Result:
    """What a finished cell's folder says."""
    found = read_json(run.path / RESULT)
    course = [(int(step), float(l0)) for step, l0 in found["course"]]
    return Result(cell=cell, facts=found["facts"], course=course, zf=found["zf"])
