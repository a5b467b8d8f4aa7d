"""The parts of a study: run folders of tables, each measured once and kept.

<root>/tasks/<name>-<hash8>/
    config.json         what was asked: everything that decides the numbers
    <table>.parquet     outcomes, a row each
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probe.runs import Run, atomic_path

Tables = dict[str, pd.DataFrame]
"""Tables by name."""
Frame = Any
"""A `pd.DataFrame`, or a `pd.Series` of one: pandas' annotations let a column be almost anything,
so that nothing that is read out of one would type-check."""


def kept(root: Path, name: str, asked: Mapping[str, Any], make: Callable[[], Tables]) -> Tables:
    """A part's tables, from below `root` where they are there already.

    Args:
        root: the folder of all results.
        name: what the part's folder is called.
        asked: everything that decides the numbers, with its `kind` and `part`.
        make: measures them.
    """
    fill = kept_run(root, name, asked, lambda folder: write_tables(folder, make()))
    return read_tables(fill)


def kept_run(root: Path, name: str, asked: Mapping[str, Any], fill: Callable[[Path], None]) -> Path:
    """A part's folder, filled where it is not complete."""
    run = Run.create(root / "tasks", name, json.loads(json.dumps(asked)))
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


def select(table: Frame, wanted: Mapping[str, object]) -> Frame:
    """The rows that have these values; none of a table without rows."""
    if not len(table):
        return table
    chosen = np.ones(len(table), dtype=bool)
    for name, value in wanted.items():
        chosen &= (table[name] == value).to_numpy()
    return table[chosen]
