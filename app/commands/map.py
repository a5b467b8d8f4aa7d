"""`lorgnette map`: an SAE's features in two dimensions."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from rich.table import Table
from tyro.conf import Positional, arg

from app.commands.options import Common, duration, find_run, plan, say
from app.resolve import manifest_hash, weights_hash
from probe.runs import Run, newest_run
from saes.feature_queries import FeatureIndex
from saes.folder import load_sae
from saes.maps import CONTROLS, MapConfig, build_map

SECONDS_PER_STEP = 5e-7
"""Time of a step of t-SNE over n log2 n, on one core."""
SECONDS_PER_PRODUCT = 1e-10
"""Time of finding neighbours over n^2 d, on one core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Draw an SAE's features in two dimensions, by PCA and by t-SNE, and look for clusters.

    The decoder's directions decide the places. The same steps on random directions tell which
    clusters say more than chance.

    Example: lorgnette map artifacts/saes/smollm2-resid_post.12-topk32-4608-1a2b3c4d
    """

    sae: Annotated[Positional[Path], arg(metavar="SAE")]
    """Folder of a trained SAE; its feature index, where it has one, says which features are dead
    and names the clusters."""
    twin: Path | None = None
    """Folder of an SAE of the same recipe, trained on the random-weight twin of the model."""
    map: MapConfig = field(default_factory=MapConfig)
    common: Common = field(default_factory=Common)


def run(command: Command) -> Path | None:
    """Draw the map, or say what it would take; gives its folder."""
    root = command.common.root
    sae_run = find_run(command.sae, "sae", root)
    weights = weights_hash(sae_run)
    twin_run = None if command.twin is None else find_run(command.twin, "sae", root)
    index = newest_run(sae_run.path, "index")
    config = command.map.run_config(
        sae=weights,
        index=None if index is None else manifest_hash(index),
        twin=None if twin_run is None else weights_hash(twin_run),
    )
    if command.common.dry_run:
        say(dry_run_plan(command, sae_run, index))
        return None
    folder = Run.create(sae_run.path, "map", config)
    if not folder.complete:
        draw(folder, command.map, sae_run, twin_run, index)
    say(results_table(folder))
    return folder.path


def draw(
    folder: Run, config: MapConfig, sae_run: Run, twin_run: Run | None, index: Run | None
) -> None:
    """Fill the map's folder."""
    alive, tokens = None, None
    if index is not None:
        opened = FeatureIndex.open(index.path)
        rows = opened.table(limit=opened.n_features).rows
        alive = rows["alive"].to_numpy(dtype=bool)
        # Places of images name no cluster.
        tokens = None if opened.of_images else [list(own) for own in rows["top_tokens"]]
    build_map(
        folder,
        decoder_of(sae_run),
        config,
        alive=alive,
        tokens=tokens,
        twin=None if twin_run is None else decoder_of(twin_run),
    )


def decoder_of(sae_run: Run) -> np.ndarray:
    """Rows of `W_dec`, float32 [d_sae, d_in]."""
    return load_sae(sae_run.path).W_dec.detach().numpy()


def seconds(n: int, d: int, steps: int) -> float:
    """Time of placing `n` directions of width `d`, roughly."""
    return SECONDS_PER_STEP * steps * n * math.log2(n + 1) + SECONDS_PER_PRODUCT * n * n * d


def dry_run_plan(command: Command, sae_run: Run, index: Run | None) -> Table:
    """Features, controls and time."""
    n, d = load_sae(sae_run.path).W_dec.shape
    n_subjects = 1 + len(CONTROLS) + (command.twin is not None)
    return plan(
        "lorgnette map would place",
        {
            "features": f"{n}, {'all' if index is None else 'but the dead ones'}",
            "names of clusters": "none: there is no feature index" if index is None else "yes",
            "controls": ", ".join([*CONTROLS.values(), *(["the twin"] if command.twin else [])]),
            "disk": f"{n_subjects * n * 24 / 1e6:.1f} MB",
            "time": f"about {duration(n_subjects * seconds(n, d, command.map.steps))}, one core",
        },
    )


LABELS = {"sae": "the SAE", **CONTROLS, "twin": "the SAE of the random-weight twin"}
NUMBERS = ("n_clusters", "noise_share", "silhouette", "cohesion_median", "cohesion_max")


def results_table(folder: Run) -> Table:
    """The clusters beside those of the controls, as a table for a person."""
    found = folder.summary
    table = Table(
        "", *NUMBERS,
        title=f"{found['n_standing_out']} clusters are more cohesive than any neighbourhood of "
        "their size among random directions",
    )  # fmt: skip
    for name, row in found["clusters"].items():
        cells = ("-" if row[number] is None else f"{row[number]:.4g}" for number in NUMBERS)
        table.add_row(LABELS[name], *cells)
    return table
