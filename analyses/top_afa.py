"""TopK, BatchTopK and top-AFA on one stream of activations (Lee et al. 2025, arXiv 2503.24277).

The paper lets the norm of an input choose how many latents reconstruct it, and reports that this
does as well as the best fixed k or better. Its own tables show that only where more latents are
active than the input has dimensions. Asked here of a model's neighbouring layers:

1. Does top-AFA reconstruct better than TopK where both have the same L0? Only above L0 = d?
2. At which L0 does it settle?
3. Does the result depend less on its lambda than TopK's on k?
4. Are the layers of worst FVU and worst epsilon-LBO different ones, and does training lower the
   epsilon-LBO at all, against an untrained dictionary whose latents the same rule chooses?

Controls: rows standardised and not, the mixed conventions of the authors' code, a random-weight
twin of the model, the untrained dictionary.
"""

from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from analyses.report import Report
from analyses.top_afa_cells import Place, capture, make_groups, make_place, measure_group
from analyses.top_afa_figures import figures
from analyses.top_afa_findings import numbers, tables, text, verdicts
from analyses.top_afa_measured import Config, Measured, Settings, settle
from probe.runs import Run

__all__ = ["Config", "estimate", "figures", "measure", "run"]

TWIN_SEED = 0
FLOPS_PER_SECOND = 3e11
"""Of training with everything counted, on two cores."""


def estimate(config: Config) -> dict[str, str]:
    """What the study would do."""
    settings = settle(config)
    cells = [cell for group in make_groups(settings) for cell in group]
    trained = [cell for cell in cells if cell.family != "untrained"]
    layers = ", ".join(map(str, settings.layers))
    return {
        "activations": f"{settings.model} reads {settings.tokens:,} tokens of {settings.corpus}, "
        f"{settings.site} of layers {layers}; its random-weight twin layer {settings.middle} alone",
        "disk": "2 bytes a number for the activations (for d = 768 and three layers 4.6 kB a "
        "token); SAEs in training 13 bytes a parameter and checkpoint, gone once measured",
        "SAEs": f"{len(trained)}: {settings.d_sae} latents, {settings.steps} steps of "
        f"{settings.batch_size} rows each, {settings.seeds} seed(s)",
        "kept in": "saes/top-afa below the root, a folder each; what is there is not done again",
        "time": f"about {_minutes(settings, len(trained))} min on two cores",
    }


def _minutes(settings: Settings, n_saes: int) -> int:
    """Minutes of training: ten dense products of a row with the dictionary, for 768 dimensions."""
    flops = n_saes * settings.steps * settings.batch_size * 20 * 768 * settings.d_sae
    return max(1, round(flops / FLOPS_PER_SECOND / 60))


def measure(config: Config, root: Path) -> Measured:
    """Capture, train and measure everything that is not there yet."""
    settings = settle(config)
    captured = {
        "trained": capture(settings, root, None, config.device),
        "random": capture(settings, root, TWIN_SEED, config.device),
    }
    places: dict[tuple[str, int], Place] = {}
    results, groups = [], make_groups(settings)
    with tqdm(groups, desc="top-afa", unit="group") as bar:
        for cells in bar:
            group = cells[0].group
            bar.set_postfix_str(group.name)
            key = (group.weights, group.layer)
            if key not in places:
                places[key] = make_place(settings, *captured[group.weights], group.layer)
            results += measure_group(cells, settings, places[key], root)
    d_in = captured["trained"][0].d(places["trained", settings.middle].site)
    return Measured(settings=settings, d_in=d_in, results=tuple(results))


def run(config: Config, root: Path) -> Run:
    """Measure and write the report, or find it; gives its run."""
    settings = settle(config)
    described = {"kind": "report", "schema": 1, "study": "top-afa", **asdict(settings)}
    folder = Run.create(root / "reports" / "top-afa", f"{Path(settings.model).name}", described)
    with folder.lock():
        if not folder.complete:
            make_report(measure(config, root)).write(
                folder, inputs={}, seeds={"cells": settings.seeds, "twin": TWIN_SEED}
            )
    return folder


def make_report(measured: Measured) -> Report:
    """What was found."""
    return Report(
        title=f"top-AFA beside TopK and BatchTopK on {measured.settings.model}",
        text=text(measured),
        verdicts=tuple(verdicts(measured)),
        numbers=numbers(measured),
        tables=tables(measured),
        figures=figures(measured),
    )
