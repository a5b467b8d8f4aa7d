"""`lorgnette compare`: which features two SAEs share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.table import Table
from tyro.conf import Positional, arg

from app.commands.map import decoder_of
from app.commands.options import Common, duration, find_run, plan, say
from app.resolve import manifest_hash, weights_hash
from probe.runs import Run, newest_run
from saes.comparison import CompareConfig, Dictionary, check_widths, compare
from saes.feature_queries import FeatureIndex

SECONDS_PER_CUBE = 3e-11
"""Time of the optimal assignment over n^3, on one core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Match the features of two SAEs by their decoder directions, beside what chance matches.

    Both must read activations of one width: two seeds, two activations, two layers, or an SAE and
    that of the random-weight twin. The result is kept with the first one.

    Example: lorgnette compare artifacts/saes/first-1a2b3c4d artifacts/saes/second-5e6f7a8b
    """

    first: Annotated[Positional[Path], arg(metavar="FIRST")]
    """Folder of a trained SAE."""
    second: Annotated[Positional[Path], arg(metavar="SECOND")]
    """Folder of another."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    common: Common = field(default_factory=Common)


def run(command: Command) -> Path | None:
    """Match, or say what it would take; gives the comparison's folder."""
    root = command.common.root
    runs = [find_run(path, "sae", root) for path in (command.first, command.second)]
    hashes = [weights_hash(sae_run) for sae_run in runs]
    decoders = [decoder_of(sae_run) for sae_run in runs]
    check_widths(decoders[0].shape[1], decoders[1].shape[1])
    if command.common.dry_run:
        say(dry_run_plan(command.compare, [len(decoder) for decoder in decoders]))
        return None
    indexes = [newest_run(sae_run.path, "index") for sae_run in runs]
    hashed = [None if index is None else manifest_hash(index) for index in indexes]
    config = command.compare.run_config(
        first=hashes[0], second=hashes[1], indexes=(hashed[0], hashed[1])
    )
    folder = Run.create(runs[0].path, "match", config)
    if not folder.complete:
        sides = [
            Dictionary(decoder=decoder, alive=None if index is None else living(index))
            for decoder, index in zip(decoders, indexes, strict=True)
        ]
        compare(folder, sides[0], sides[1], command.compare)
    say(results_table(folder))
    return folder.path


def living(index: Run):
    """Whether each feature of an index fires at all, bool [d_sae]."""
    return FeatureIndex.open(index.path).numbers()["alive"].to_numpy(dtype=bool)


def dry_run_plan(config: CompareConfig, sizes: list[int]) -> Table:
    """Method, memory and time."""
    optimal = max(sizes) <= config.limit
    took = SECONDS_PER_CUBE * min(sizes) ** 2 * max(sizes) if optimal else 0
    return plan(
        "lorgnette compare would match",
        {
            "features": f"{sizes[0]} with {sizes[1]}, and with directions of chance twice",
            "method": "optimal assignment" if optimal else "mutual nearest neighbours",
            "memory": f"{(12 if optimal else 0) * sizes[0] * sizes[1] / 1e9:.2g} GB",
            "time": f"about {duration(3 * took + 2)}",
        },
    )


NUMBERS = ("n_pairs", "mean_cosine", "median_cosine", "share_above_0.7", "mean_nearest")
LABELS = {"random": "random directions", "shaped": "random directions of the same covariance"}


def results_table(folder: Run) -> Table:
    """The matching beside those of chance, as a table for a person."""
    found = folder.summary
    table = Table("first SAE with", *NUMBERS, title=f"|cos| of pairs, {found['method']}")
    rows = {"the second": found} | {LABELS[name]: row for name, row in found["chance"].items()}
    for label, row in rows.items():
        table.add_row(label, *(f"{row[number]:.4g}" for number in NUMBERS))
    return table
