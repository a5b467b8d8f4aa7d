"""Options that several commands share, and how they speak."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from probe.errors import UserError
from probe.runs import Run, find_runs

logger = logging.getLogger(__name__)

ROOT = Path("artifacts")
WIDTH = 150
"""Columns of a table that goes to a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What every command takes."""

    root: Path = ROOT
    """Folder that results are kept in."""
    dry_run: bool = False
    """Say what would be done (sizes, memory, time) and do nothing."""


def say(table: Table | str) -> None:
    """Show a table or a line to the person, on stderr: stdout is for the folder alone."""
    make_console(stderr=True).print(table, highlight=False, soft_wrap=isinstance(table, str))


def show(table: Table) -> None:
    """Write a table to stdout, for the commands whose answer it is."""
    make_console(stderr=False).print(table)


def make_console(*, stderr: bool) -> Console:
    """A console that is as wide as the terminal, or wide enough for a table where there is none."""
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if is_terminal else WIDTH)


def plan(title: str, rows: dict[str, str]) -> Table:
    """The table that `--dry-run` shows."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def size(n_bytes: int | float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def duration(seconds: int | float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def find_run(path: Path, kind: str, root: Path) -> Run:
    """The run that a person names by its path, or by its folder's name below `root`.

    Raises `UserError` where there is none of that kind; the sentence lists those there are.
    """
    if path.is_dir():
        run = Run.open(path)
        if run.kind != kind:
            raise UserError(f"{path} is a run of kind {run.kind!r} where {kind!r} was wanted.")
        return sound(run)
    there = find_runs(root, kind)
    matching = [run for run in there if run.path.name == path.name]
    if len(matching) == 1:
        return sound(matching[0])
    names = ", ".join(str(run.path) for run in there) or "none yet"
    raise UserError(f"{path} is no folder of kind {kind!r}; below {root} there are: {names}.")


def sound(run: Run) -> Run:
    """The run, once its manifest, where it has one, is known to be readable."""
    if run.complete:
        _ = run.manifest
    return run
