"""The cells of the block-roles study: `analyses.cells`, by part, model and SAEs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from analyses import cells
from analyses.block_roles_measured import Subject
from analyses.cells import Tables
from probe.models import weights_checksum
from saes.recipe_saes import LoadedSae, sae_reference

CELL, SCHEMA = "block_roles_cell", 1

Say = Callable[[str], None]
"""Told what is being done."""


def described(part: str, subject: Subject, block: str | None = None) -> dict[str, Any]:
    """What decides the numbers of a part, but for its settings.

    `block` is the one whose SAE matters; None where all do.
    """
    model = next(iter(subject.saes.values())).run.config["model"]
    return {
        "kind": CELL,
        "schema": SCHEMA,
        "part": part,
        "model": dict(model) | {"weights": weights_checksum(model["spec"])},
        "saes": checksums({k: v for k, v in subject.saes.items() if block in (None, k)}),
    }


def checksums(saes: Mapping[str, LoadedSae]) -> dict[str, str]:
    """The SHA-256 of the weights of some SAEs."""
    return {key: sae_reference(one.run).weights for key, one in saes.items()}


def kept(root: Path, asked: Mapping[str, Any], make: Callable[[], Tables]) -> Tables:
    """A part's tables, from below `root` where they are there already."""
    return cells.kept(root, f"roles-{asked['part']}", asked, make)


def kept_run(root: Path, asked: Mapping[str, Any], fill: Callable[[Path], None]) -> Path:
    """A part's folder, filled where it is not complete."""
    return cells.kept_run(root, f"roles-{asked['part']}", asked, fill)
