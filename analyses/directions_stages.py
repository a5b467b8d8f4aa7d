"""The stages of the directions study, each a run folder below `<root>/directions/`.

readings    projections of held-out prompts on directions at every layer and position, and the
            directions; of the model and of its random-weight twin
selection   what every candidate does on validation prompts, a line each in `results.jsonl`
effects     what the chosen direction and its controls do on test prompts, a line each

A stage's config names the stage before it, so a changed question starts again where it differs, and
a stopped one goes on with the line it lacks.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from analyses.contrasts import Contrast, Split
from analyses.directions_measured import Chosen, Effects, Readings, Target
from analyses.journal import Journal
from probe.ablation import ablated_copy, ablating, adding
from probe.direction_selection import (
    Candidate,
    Criteria,
    Validation,
    make_validation,
    measure_candidate,
    select,
    target_ids,
    target_scores,
)
from probe.directions import contrast_weights, read_rows, unit, weighted_sums
from probe.errors import UserError
from probe.language import LanguageModel
from probe.prompt_sets import Row, last_logits, write_rows
from probe.runs import Run, atomic_path
from probe.sites import Site

SCHEMA = 1
TENSORS, RESULTS = "readings.safetensors", "results.jsonl"
N_DIRECTIONS = 50
"""Random directions whose AUROC is measured at every place."""
N_SHUFFLES = 10
"""Shufflings of the labels whose AUROC is measured at every place."""
N_SHUFFLED_EFFECTS = 5
"""Of those, how many have their effects measured."""
N_TARGETS = 10
"""Target tokens, where the training prompts choose them."""
N_TARGET_PROMPTS = 32
"""Training prompts of each set that choose them."""
ROUNDING = 1e-5
"""A difference of means below this share of an activation's length is none."""
N_EQUALITY = 8
"""Test prompts on which hooks and weight edit are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Prompts of one purpose as tokens."""

    positive: list[Row]
    """The positive set."""
    negative: list[Row]
    """The negative set."""

    @property
    def all(self) -> list[Row]:
        """Both, the positive ones first."""
        return [*self.positive, *self.negative]

    @property
    def labels(self) -> torch.Tensor:
        """True for the positive ones."""
        return torch.tensor([True] * len(self.positive) + [False] * len(self.negative))


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What all stages share."""

    model: LanguageModel
    """The model, or its twin."""
    contrast: Contrast
    """The prompts."""
    sites: tuple[Site, ...]
    """Where activations are read; all layers."""
    positions: tuple[int, ...]
    """At which positions."""
    seed: int
    """Of shuffles and random directions."""
    root: Path
    """Where results are kept."""

    def rows(self, split: Split) -> Rows:
        """Prompts as the model's tokens."""
        return Rows(
            positive=write_rows(self.model, split.positive),
            negative=write_rows(self.model, split.negative),
        )

    def stage(self, name: str, config: dict[str, Any]) -> Run:
        """A stage's folder; `config` is what it asks of its own."""
        model = self.model
        known = {
            "kind": f"directions_{name}",
            "schema": SCHEMA,
            "model": {
                "spec": model.spec,
                "random_weights": model.random_weights,
                "dtype": str(model.dtype).removeprefix("torch."),
            },
            "prompts": self.contrast.checksum,
            "seed": self.seed,
        }
        return Run.create(self.root / "directions", f"{self.contrast.name}-{name}", known | config)

    def finish(self, run: Run, summary: dict[str, Any]) -> None:
        """Mark a stage as complete."""
        run.finish(
            summary=summary,
            inputs={"prompts": self.contrast.checksum},
            seeds={"study": self.seed},
            device=str(self.model.device),
        )


# ------------------------------------------------------------------------------------ readings


def measure_readings(study: Study) -> Run:
    """Directions and projections at every place, made now or found."""
    run = study.stage(
        "readings",
        {
            "sites": [str(site) for site in study.sites],
            "positions": list(study.positions),
            "n_directions": N_DIRECTIONS,
            "n_shuffles": N_SHUFFLES,
        },
    )
    with run.lock():
        if not run.complete:
            with atomic_path(run.path / TENSORS) as temporary:
                save_file(_readings(study), temporary)
            study.finish(run, {"sites": len(study.sites), "positions": len(study.positions)})
    return run


def _readings(study: Study) -> dict[str, Tensor]:
    """The tensors of a readings stage; names as in `Readings`, and `vectors` [1 + r, s, p, d]."""
    generator = torch.Generator().manual_seed(study.seed)
    train, test = study.rows(study.contrast.train), study.rows(study.contrast.test)
    held = study.rows(study.contrast.validation)
    shuffled = [_shuffle(train.labels, generator) for _ in range(N_SHUFFLES)]
    weights = torch.stack([contrast_weights(labels) for labels in (train.labels, *shuffled)])
    vectors = weighted_sums(study.model, train.all, weights, study.sites, study.positions)
    x = read_rows(study.model, test.all, study.sites, study.positions).double()
    z = read_rows(study.model, held.all, study.sites, study.positions).double()
    units = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    drawn = random_units(N_DIRECTIONS, vectors.shape[-1], generator).double()
    turned = torch.einsum("qd,spd->spq", drawn, vectors[0]).sign()
    tensors = {
        "own": torch.einsum("nspd,spd->nsp", x, units[0]),
        "random": torch.einsum("nspd,qd->nspq", x, drawn) * turned,
        "shuffled": torch.einsum("nspd,rspd->nspr", x, units[1:]),
        "labels": test.labels.double(),
        "shuffled_labels": torch.stack(
            [_shuffle(test.labels, generator).double() for _ in range(N_SHUFFLES)]
        ),
        "validation": torch.einsum("nspd,spd->nsp", z, units[0]),
        "validation_labels": held.labels.double(),
        "vectors": vectors.float(),
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _shuffle(labels: Tensor, generator: torch.Generator) -> Tensor:
    return labels[torch.randperm(len(labels), generator=generator)]


def random_units(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Random directions of length 1."""
    drawn = torch.randn(n, d, generator=generator)
    return drawn / drawn.norm(dim=1, keepdim=True)


def load_readings(run: Run) -> tuple[Readings, Float[Tensor, "r s p d"]]:
    """A readings stage's projections, and its directions: the true one first, then shuffled."""
    tensors = load_file(run.path / TENSORS)
    vectors = tensors.pop("vectors")
    return Readings(**{name: tensor.numpy() for name, tensor in tensors.items()}), vectors


def differing(
    readings: Readings, vectors: Float[Tensor, "s p d"], places: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """The places at which the sets differ by more than rounding.

    At the first block's input the template's tokens are the same for all prompts. Random directions
    tell how long activations are: `d` times the mean square of `x . r^`.

    Raises `UserError` where the sets differ nowhere.
    """
    square = vectors.shape[-1] * (readings.random**2).mean(axis=(0, -1))
    norms = vectors.double().norm(dim=-1).numpy()
    found = tuple(place for place in places if norms[place] > ROUNDING * square[place] ** 0.5)
    if not found:
        raise UserError(
            "the two sets do not differ at any layer and position that was asked for; ask for "
            "later layers."
        )
    return found


# ----------------------------------------------------------------------------------- selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Selecting:
    """What the selection is asked."""

    places: tuple[tuple[int, int], ...]
    """Candidates: numbers of site and position."""
    targets: tuple[str, ...] | None
    """Target tokens; None for those that the training prompts choose."""
    kl: float
    """As in `Criteria`."""
    added: float | None
    """As in `Criteria`; None for half way between the two sets' scores."""
    depth: float
    """As in `Criteria`."""


def measure_selection(
    study: Study, asked: Selecting, vectors: Float[Tensor, "s p d"], readings: Run
) -> tuple[dict[str, Any], list[Candidate]]:
    """What every candidate does; with the targets and the untouched model's scores.

    Raises `UserError` where a target is not one token.
    """
    run = study.stage(
        "selection",
        {
            "readings": readings.path.name,
            "places": [list(place) for place in asked.places],
            "targets": None if asked.targets is None else list(asked.targets),
        },
    )
    with run.lock():
        journal = Journal(run.path / RESULTS)
        held = study.rows(study.contrast.validation)
        if "targets" not in journal:
            journal.add("targets", _choose_targets(study, asked.targets))
        ids = [row["id"] for row in journal.rows["targets"]]
        validation: Validation | None = None
        for site, position in tqdm(asked.places, desc="candidates", unit="candidate"):
            key = f"{study.sites[site]} {study.positions[position]}"
            if key in journal:
                continue
            validation = validation or make_validation(
                study.model, held.positive, held.negative, ids
            )
            found = measure_candidate(
                study.model, vectors[site, position], study.sites[site],
                study.positions[position], validation,
            )  # fmt: skip
            journal.add(key, _numbers(found))
        if "plain" not in journal:
            scores = [
                plain_scores(study.model, rows, ids) for rows in (held.positive, held.negative)
            ]
            journal.add("plain", [float(np.mean(values)) for values in scores])
        if not run.complete:
            study.finish(run, {"candidates": len(asked.places)})
    rows = [_candidate(study, site, position, journal.rows) for site, position in asked.places]
    return {name: journal.rows[name] for name in ("targets", "plain")}, rows


def _numbers(candidate: Candidate) -> dict[str, float | None]:
    names = ("norm", "ablated", "added", "kl")
    found = {name: float(getattr(candidate, name)) for name in names}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _candidate(study: Study, site: int, position: int, rows: dict[str, Any]) -> Candidate:
    place, at = study.sites[site], study.positions[position]
    numbers = rows[f"{place} {at}"]
    known = {name: math.nan if value is None else value for name, value in numbers.items()}
    return Candidate(site=place, position=at, **known)


def _choose_targets(study: Study, texts: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """The target tokens with their mean probability after training prompts of each set."""
    asked = None if texts is None else target_ids(study.model, texts)
    train = study.rows(study.contrast.train)
    means = [
        last_logits(study.model, rows[:N_TARGET_PROMPTS]).double().softmax(dim=-1).mean(dim=0)
        for rows in (train.positive, train.negative)
    ]
    chosen = asked or (means[0] - means[1]).topk(N_TARGETS).indices.tolist()
    return [
        {
            "id": int(i),
            "text": study.model.tokenizer.decode([int(i)]),
            "positive": float(means[0][i]),
            "negative": float(means[1][i]),
        }
        for i in chosen
    ]


def plain_scores(model: LanguageModel, rows: Sequence[Row], targets: Sequence[int]) -> list[float]:
    """Every prompt's score as the model stands, hooks included."""
    return target_scores(last_logits(model, rows), targets).tolist()


# ------------------------------------------------------------------------------------- effects


def measure_effects(
    study: Study,
    targets: Sequence[int],
    place: tuple[int, int],
    vectors: Float[Tensor, "r s p d"],
    n_random: int,
    selected: str,
) -> Effects:
    """What the chosen direction and its controls do on test prompts."""
    site, position = place
    run = study.stage(
        "effects",
        {
            "site": str(study.sites[site]),
            "position": study.positions[position],
            "targets": list(targets),
            "readings": selected,
            "n_random": n_random,
        },
    )
    with run.lock():
        journal, test = Journal(run.path / RESULTS), study.rows(study.contrast.test)
        controls = _controls(study, vectors[:, site, position], n_random)
        if "plain" not in journal:
            journal.add("plain", _scores(study, test, targets, None, study.sites[site]))
        for name, vector in tqdm(controls.items(), desc="effects", unit="direction"):
            if name not in journal:
                journal.add(name, _scores(study, test, targets, vector, study.sites[site]))
        if "equality" not in journal:
            journal.add("equality", _equality(study.model, test, controls["chosen"]))
        if not run.complete:
            study.finish(run, {"directions": len(controls)})
    return _effects(journal.rows, n_random)


def _controls(
    study: Study, vectors: Float[Tensor, "r d"], n_random: int
) -> dict[str, Float[Tensor, " d"]]:
    """The chosen direction and its controls, all of its length."""
    norm = vectors[0].norm()
    # Not the generator of the readings: these are other directions, whatever their number.
    generator = torch.Generator().manual_seed(study.seed + 1)
    drawn = random_units(n_random, vectors.shape[-1], generator) * norm
    found = {"chosen": vectors[0]} | {f"random {n}": vector for n, vector in enumerate(drawn)}
    shuffled = vectors[1 : 1 + N_SHUFFLED_EFFECTS]
    return found | {f"shuffled {n}": unit(v) * norm for n, v in enumerate(shuffled)}


def _scores(
    study: Study,
    test: Rows,
    targets: Sequence[int],
    vector: Tensor | None,
    site: Site,
) -> dict[str, list[float]]:
    """Positive prompts' scores with a direction ablated, negative ones' with it added."""
    model = study.model
    edits: tuple[Callable[[], Any], Callable[[], Any]] = (
        (contextlib.nullcontext, contextlib.nullcontext)
        if vector is None
        else (lambda: ablating(model, vector), lambda: adding(model, vector, site))
    )
    found = {}
    for name, edit, rows in zip(
        ("ablated", "added"), edits, (test.positive, test.negative), strict=True
    ):
        with edit():
            found[name] = plain_scores(model, rows, targets)
    return found


def _equality(model: LanguageModel, test: Rows, vector: Tensor) -> dict[str, float | None]:
    """Largest differences of a logit: between hooks and weight edit, and made by ablating."""
    rows = test.all[:: max(1, len(test.all) // N_EQUALITY)][:N_EQUALITY]
    plain = last_logits(model, rows)
    with ablating(model, vector):
        hooked = last_logits(model, rows)
    changes = float((hooked - plain).abs().max())
    try:
        edited = ablated_copy(model, vector)
    except UserError:
        return {"hook_minus_edit": None, "ablation_changes": changes}
    difference = float((last_logits(edited, rows) - hooked).abs().max())
    return {"hook_minus_edit": difference, "ablation_changes": changes}


def _effects(rows: dict[str, Any], n_random: int) -> Effects:
    def stacked(name: str, n: int, edit: str) -> np.ndarray:
        return np.array([rows[f"{name} {i}"][edit] for i in range(n)])

    equality = rows["equality"]
    return Effects(
        plain_positive=np.array(rows["plain"]["ablated"]),
        plain_negative=np.array(rows["plain"]["added"]),
        ablated=np.array(rows["chosen"]["ablated"]),
        added=np.array(rows["chosen"]["added"]),
        random_ablated=stacked("random", n_random, "ablated"),
        random_added=stacked("random", n_random, "added"),
        shuffled_ablated=stacked("shuffled", N_SHUFFLED_EFFECTS, "ablated"),
        shuffled_added=stacked("shuffled", N_SHUFFLED_EFFECTS, "added"),
        hook_minus_edit=math.nan
        if equality["hook_minus_edit"] is None
        else equality["hook_minus_edit"],
        ablation_changes=equality["ablation_changes"],
    )


def choose(
    study: Study,
    asked: Selecting,
    vectors: Float[Tensor, "r s p d"],
    readings: Run,
    n_random: int,
) -> tuple[tuple[int, int], Chosen]:
    """Measure the candidates, choose one, measure its effects; gives its place too."""
    facts, candidates = measure_selection(study, asked, vectors[0], readings)
    high, low = facts["plain"]
    added = (high + low) / 2 if asked.added is None else asked.added
    criteria = Criteria(kl=asked.kl, added=added, depth=asked.depth)
    n_layers = study.model.n_layers
    selection = select(candidates, criteria, n_layers)
    published = Criteria()
    place = asked.places[selection.chosen]
    ids = [row["id"] for row in facts["targets"]]
    effects = measure_effects(study, ids, place, vectors, n_random, readings.path.name)
    return place, Chosen(
        targets=tuple(
            Target(**{name: row[name] for name in ("text", "positive", "negative")})
            for row in facts["targets"]
        ),
        plain=(high, low),
        criteria=criteria,
        candidates=tuple(candidates),
        selection=selection,
        published=sum(not c.misses(published, n_layers) for c in candidates),
        effects=effects,
    )
