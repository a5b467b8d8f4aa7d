"""One direction for one difference between prompts (Arditi et al. 2024, arXiv 2406.11717).

The difference of the mean activations of two sets of prompts is a direction at every layer and
position. Asked of it:

1. Does it separate held-out prompts, better than random directions do, and in the trained model
   only? (AUROC, with shuffled labels and a random-weight twin as controls.)
2. Is it necessary: does taking it out of the model lower the score of the positive prompts more
   than taking out random directions does?
3. Is it sufficient: does adding it raise the score of negative prompts more than adding a random
   direction of its length does?
4. Is taking it out by hooks the same as taking it out of the weights?

The paper asks this of refusal. The score here is of any set of target tokens, so the method can be
tried where there is no refusal: SmolLM2-135M-Instruct refuses next to nothing, and the paper's own
claim cannot be tested on it. With a person's own files and no target tokens only representations
are measured. No completion is ever generated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from analyses.contrasts import Contrast
from analyses.directions_figures import figures
from analyses.directions_findings import numbers, tables, text, verdicts
from analyses.directions_measured import Config, Measured, Readings, Settings, load_contrast, settle
from analyses.directions_stages import (
    Selecting,
    Study,
    choose,
    differing,
    load_readings,
    measure_readings,
)
from analyses.report import Report
from probe.corpora import BUILTIN, TokenBatch, token_batches
from probe.directions import Direction, projection_statistics, save_direction
from probe.errors import UserError
from probe.language import LanguageModel
from probe.models import load_language_model, model_name
from probe.prompt_sets import ending_positions, instruction_ending
from probe.runs import Run
from probe.separation import auroc
from probe.sites import Site

__all__ = ["Config", "estimate", "figures", "measure", "run"]

TWIN_SEED = 0
DIRECTION = "direction.safetensors"
MOST_POSITIONS = 8
"""Positions that are read at most, from the end."""
REFERENCE_TOKENS, REFERENCE_CONTEXT = 2048, 128
SECONDS_PER_PROMPT = 0.1
"""Of one forward pass of SmolLM2 on two cores, for the part of a prompt that is its own."""
OF_SMOLLM2 = (24, 6)
"""Layers and positions that may be chosen there."""


def estimate(config: Config) -> dict[str, str]:
    """What the study would do."""
    settings = settle(config)
    contrast = load_contrast(config, settings)
    sizes = [len(split.positive) for split in (contrast.train, contrast.validation, contrast.test)]
    layers = len(config.layers or ()) or settings.n_layers or OF_SMOLLM2[0]
    positions = len(config.positions or ()) or settings.n_positions or OF_SMOLLM2[1]
    effects = has_effects(config)
    passes = 4 * sum(sizes)
    if effects:
        passes += layers * positions * 3 * sizes[1] + (settings.n_random + 7) * 2 * sizes[2]
    return {
        "prompts": f"{contrast.positive} against {contrast.negative}: {sizes[0]} + {sizes[1]} + "
        f"{sizes[2]} of each to make, choose and test directions",
        "candidates": f"{layers * positions} directions ablated and added, the chosen one beside "
        f"{settings.n_random} random ones"
        if effects
        else "none: without target tokens only representations are measured",
        "kept in": "directions below the root, a folder a stage; what is there is not done again",
        "time": f"about {max(1, round(passes * SECONDS_PER_PROMPT / 60))} min for SmolLM2 on two "
        "cores",
    }


def has_effects(config: Config) -> bool:
    """Whether effects on answers are measured."""
    return config.positive is None or config.target_tokens is not None


def measure(config: Config, root: Path) -> Measured:
    """Read, choose and measure everything that is not there yet.

    Raises `UserError` where prompts, model and options do not fit.
    """
    settings = settle(config)
    contrast = load_contrast(config, settings)
    model = load_language_model(config.model, dtype=config.dtype, device=config.device)
    study = make_study(config, contrast, model, root)
    places = candidate_places(config, settings, study)
    trained, vectors = load_readings(readings := measure_readings(study))
    places = differing(trained, vectors[0], places)
    if has_effects(config):
        asked = Selecting(
            places=places, targets=config.target_tokens, kl=config.kl, added=config.added,
            depth=config.depth,
        )  # fmt: skip
        place, chosen = choose(study, asked, vectors, readings, settings.n_random)
    else:
        place, chosen = best_separating(trained, places), None
    twin = measure_twin(config, contrast, study)
    vector = vectors[0][place]
    return Measured(
        config=config,
        settings=settings,
        contrast=contrast,
        sites=study.sites,
        positions=study.positions,
        position_texts=tuple(
            str(model.tokenizer.decode([i])) for i in instruction_ending(model)[::-1]
        ),
        trained=trained,
        twin=twin,
        place=place,
        vector=vector,
        statistics=projection_statistics(model, vector, study.sites[place[0]], reference(model)),
        chosen=chosen,
    )


def make_study(config: Config, contrast: Contrast, model: LanguageModel, root: Path) -> Study:
    """What all stages share. Raises `UserError` where the model's layers are not known."""
    if model.n_layers == 0:
        raise UserError(
            f"the layers of {model.spec} are not known by name; give a model of a known family."
        )
    positions = ending_positions(model)[:MOST_POSITIONS]
    positions += tuple(p for p in config.positions or () if p not in positions)
    sites = tuple(Site(kind=config.site, layer=layer) for layer in range(model.n_layers))
    return Study(
        model=model, contrast=contrast, sites=sites, positions=positions, seed=config.seed,
        root=root,
    )  # fmt: skip


def candidate_places(
    config: Config, settings: Settings, study: Study
) -> tuple[tuple[int, int], ...]:
    """Numbers of the sites and positions that candidates come from.

    Raises `UserError` where a layer that was asked for is not in the model.
    """
    n_layers = study.model.n_layers
    allowed = [layer for layer in range(n_layers) if layer < config.depth * n_layers]
    layers = list(config.layers or _spread(allowed, settings.n_layers))
    wrong = [layer for layer in layers if not 0 <= layer < n_layers]
    if wrong:
        raise UserError(
            f"layers {wrong} are not in {study.model.spec}, whose layers are 0 to {n_layers - 1}."
        )
    chosen = config.positions or _spread(study.positions[::-1], settings.n_positions)[::-1]
    return tuple(
        (layer, study.positions.index(position)) for layer in layers for position in chosen
    )


def _spread(values: Sequence[int], n: int | None) -> list[int]:
    """`n` of the values, spread evenly, the last among them; all where there are no more."""
    if n is None or n >= len(values):
        return list(values)
    return [values[round((place + 1) * len(values) / n) - 1] for place in range(n)]


def best_separating(readings: Readings, places: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The place of the largest AUROC on validation prompts; of equal ones the clearest gap.

    The gap is the difference of the means over the pooled standard deviation.
    """
    positive = readings.validation[readings.validation_labels == 1]
    negative = readings.validation[readings.validation_labels == 0]
    gap = (positive.mean(0) - negative.mean(0)) / (
        ((positive.var(0) + negative.var(0)) / 2) ** 0.5 + 1e-12
    )

    def merit(place: tuple[int, int]) -> tuple[float, float]:
        at = (slice(None), *place)
        return float(auroc(positive[at][:, None], negative[at][:, None])[0]), float(gap[place])

    return max(places, key=merit)


def measure_twin(config: Config, contrast: Contrast, study: Study) -> Readings:
    """The readings of the random-weight twin at the same places."""
    twin = load_language_model(
        config.model, dtype=config.dtype, device=config.device, random_weights=TWIN_SEED
    )
    made = make_study(config, contrast, twin, study.root)
    return load_readings(measure_readings(made))[0]


def reference(model: LanguageModel) -> Iterator[TokenBatch]:
    """The reference text that projections are measured on."""
    return token_batches(
        BUILTIN, model, context=REFERENCE_CONTEXT, batch_sequences=4, max_tokens=REFERENCE_TOKENS
    )


def run(config: Config, root: Path) -> Run:
    """Measure and write the report and the direction's file, or find them; gives its run.

    Raises `UserError` where options and prompts do not fit, before anything is written.
    """
    contrast = load_contrast(config, settle(config))
    asked = {k: v for k, v in asdict(config).items() if k not in ("positive", "negative", "device")}
    folder = Run.create(
        root / "reports" / "directions",
        f"{model_name(config.model)}-{contrast.name}",
        {"kind": "report", "schema": 1, "study": "directions", "prompts": contrast.checksum}
        | asked,
    )
    with folder.lock():
        if not folder.complete:
            measured = measure(config, root)
            save_direction(folder.path / DIRECTION, make_direction(measured))
            make_report(measured).write(
                folder,
                inputs={"prompts": contrast.checksum},
                seeds={"study": config.seed, "twin": TWIN_SEED},
            )
    return folder


def make_direction(measured: Measured) -> Direction:
    """The chosen direction, as its file has it."""
    mean, sd, largest = measured.statistics
    contrast = measured.contrast
    return Direction(
        vector=torch.as_tensor(measured.vector), site=measured.site, model=measured.config.model,
        name=f"{contrast.positive} against {contrast.negative}", position=measured.position,
        mean=mean, sd=sd, max=largest,
    )  # fmt: skip


def make_report(measured: Measured) -> Report:
    """What was found."""
    contrast = measured.contrast
    return Report(
        title=f"A direction for {contrast.positive} against {contrast.negative} in "
        f"{model_name(measured.config.model)}",
        text=text(measured),
        verdicts=tuple(verdicts(measured)),
        numbers=numbers(measured),
        tables=tables(measured),
        figures=figures(measured),
    )
