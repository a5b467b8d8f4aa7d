"""`lorgnette runs`: list what there is."""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from app.commands.options import Common, say, show, size
from probe.runs import Run, find_runs, own_files


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """List every run folder below the root: what it is, whether it is complete, its numbers.

    Example: lorgnette runs --kind sae
    """

    kind: str | None = None
    """Only this kind: activations, sae, evaluation, index, report or corpus."""
    json: bool = False
    """Write JSON lines instead of a table."""
    common: Common = field(default_factory=Common)


def run(command: Command) -> None:
    """Write the list to stdout."""
    runs = find_runs(command.common.root, command.kind)
    if command.json:
        for each in runs:
            sys.stdout.write(json.dumps(row(each)) + "\n")
    elif not runs:
        say(f"nothing is in {command.common.root} yet; `lorgnette demo` makes something to look at")
    else:
        show(as_table(runs))


def row(each: Run) -> dict[str, Any]:
    """One run's line: path, kind, state, size, summary."""
    return {
        "path": str(each.path),
        "kind": each.kind,
        "complete": each.complete,
        "created": each.manifest["created"] if each.complete else None,
        "bytes": sum(path.stat().st_size for path in own_files(each.path).values()),
        "summary": each.summary,
    }


def as_table(runs: list[Run]) -> Table:
    """The list as a table for a person."""
    table = Table("kind", "folder", "state", "size", "summary")
    for each in map(row, runs):
        numbers = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in each["summary"].items()
            if isinstance(value, int | float | str)
        )
        state = "complete" if each["complete"] else "not complete: run its command again"
        table.add_row(each["kind"], each["path"], state, size(each["bytes"]), numbers)
    return table
