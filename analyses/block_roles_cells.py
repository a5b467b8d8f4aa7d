"""The parts of the block-roles study: run folders of tables, each measured once and kept.

<root>/tasks/roles-<part>-<hash8>/
    config.json         the part, the model, the SAEs (by the checksums of their weights), and
                        every setting that decides its numbers
    <table>.parquet     outcomes, a row each
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analyses.block_roles_measured import Subject, Tables
from probe.models import weights_checksum
from probe.runs import Run, atomic_path
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
    return read_tables(kept_run(root, asked, lambda folder: write_tables(folder, make())))


def kept_run(root: Path, asked: Mapping[str, Any], fill: Callable[[Path], None]) -> Path:
    """A part's folder, filled where it is not complete."""
    run = Run.create(root / "tasks", f"roles-{asked['part']}", json.loads(json.dumps(asked)))
    with run.lock():
        if not run.complete:
            fill(run.path)
            run.finish(summary={"part": asked["part"]}, inputs={}, seeds={}, device="cpu")
    return run.path


def write_tables(folder: Path, tables: Tables) -> None:
    """Write tables into a folder."""
    for name, table in tables.items():
        with atomic_path(folder / f"{name}.parquet") as temporary:
            table.to_parquet(temporary, index=False)


def read_tables(folder: Path) -> Tables:
    """The tables of a folder by name."""
    return {path.stem: pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}
