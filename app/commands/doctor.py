"""`lorgnette doctor`: is everything in order?"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from rich.table import Table
from tqdm import tqdm

from app.commands.options import Common, show, size
from probe.errors import Failure, UserError
from probe.models import CHECKSUM, cache_dir
from probe.runs import Run, find_runs, git_commit, machine, read_json, sha256_file, verify, versions
from saes.folder import load_sae

CHROMIUM = Path("/usr/bin/chromium")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Check the installation, the machine, and every file below the root.

    Versions, devices, memory and disk are listed; manifests, checksums and the SAEs' golden
    batches are checked. Exit status 1 where something is damaged.

    Example: lorgnette doctor
    """

    common: Common = field(default_factory=Common)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's report."""

    subject: str
    """What was looked at."""
    state: str
    """`ok`, `note` or `damaged`."""
    text: str
    """What was found."""


def run(command: Command) -> None:
    """Write the report to stdout. Raises `Failure` where something is damaged."""
    if command.common.dry_run:
        runs = find_runs(command.common.root)
        show(as_table([*installation(), *(note(run, "would be checked") for run in runs)]))
        return
    findings = [*installation(), *resources(command.common.root), *models()]
    findings += artifacts(command.common.root)
    show(as_table(findings))
    damaged = [finding for finding in findings if finding.state == "damaged"]
    if damaged:
        raise Failure(
            f"{len(damaged)} of {len(findings)} checks found damage; delete what is named above "
            "and make it again."
        )


def installation() -> Iterator[Finding]:
    """Versions of what decides a result, and what is there for the optional parts."""
    for name, version in versions().items():
        yield Finding(subject=name, state="ok", text=version)
    yield Finding(subject="commit", state="ok", text=git_commit() or "not run from a git checkout")
    found = str(CHROMIUM) if CHROMIUM.exists() else "not there: browser tests are skipped"
    yield Finding(subject="chromium", state="ok" if CHROMIUM.exists() else "note", text=found)


def resources(root: Path) -> Iterator[Finding]:
    """Processor, accelerators, memory and disk."""
    yield Finding(subject="machine", state="ok", text=machine())
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    bfloat16 = (
        "bfloat16 matrix units" if torch.cpu._is_amx_tile_supported() else "no bfloat16 units"
    )
    devices = ", ".join(names) or f"cpu only ({bfloat16}, {torch.get_num_threads()} threads)"
    yield Finding(subject="devices", state="ok", text=devices)
    memory = psutil.virtual_memory()
    yield Finding(
        subject="memory", state="ok", text=f"{size(memory.available)} free of {size(memory.total)}"
    )
    where = root if root.is_dir() else Path()
    disk = shutil.disk_usage(where)
    state = "ok" if disk.free > 2e9 else "note"
    yield Finding(
        subject="disk", state=state, text=f"{size(disk.free)} free of {size(disk.total)} at {where}"
    )
    yield Finding(
        subject="root", state="ok" if os.access(where, os.W_OK) else "damaged", text=str(root)
    )


def models() -> Iterator[Finding]:
    """The converted models in the user's cache, against their checksums."""
    records = sorted((cache_dir() / "models").glob(f"*/{CHECKSUM}"))
    if not records:
        yield Finding(
            subject="smollm2", state="note", text="not fetched yet; its first use fetches it"
        )
    for record in records:
        weights = record.parent / "model.safetensors"
        sound = weights.is_file() and sha256_file(weights) == read_json(record)["sha256"]
        text = "checksum holds" if sound else f"{weights} is not as written; delete {record.parent}"
        yield Finding(subject=record.parent.name, state="ok" if sound else "damaged", text=text)


def artifacts(root: Path) -> Iterator[Finding]:
    """Every run below the root: manifest, checksums, and what its kind can check of itself."""
    runs = find_runs(root)
    if not runs:
        yield Finding(subject=str(root), state="note", text="empty; `lorgnette demo` fills it")
    for each in tqdm(runs, desc="checking", unit=" folders", disable=len(runs) < 2):
        yield check_run(each)


def check_run(each: Run) -> Finding:
    """One run's state."""
    if not each.complete:
        return note(each, "not complete: the command that makes it goes on where it stopped")
    try:
        problems = verify(each)
        if not problems and each.kind in OWN_CHECKS:
            OWN_CHECKS[each.kind](each.path)
    except (Failure, UserError) as error:
        problems = [str(error)]
    if problems:
        return Finding(subject=str(each.path), state="damaged", text=" ".join(problems))
    return Finding(subject=str(each.path), state="ok", text=f"{each.kind}, checksums hold")


OWN_CHECKS: dict[str, Callable[[Path], object]] = {"sae": load_sae}
"""Checks beyond checksums: loading an SAE computes its golden batch again."""


def note(each: Run, text: str) -> Finding:
    """Something about a run that is no damage."""
    return Finding(subject=str(each.path), state="note", text=text)


def as_table(findings: list[Finding]) -> Table:
    """The report as a table for a person."""
    colours = {"ok": "green", "note": "yellow", "damaged": "red"}
    table = Table("what", "state", "found")
    for finding in findings:
        colour = colours[finding.state]
        table.add_row(finding.subject, f"[{colour}]{finding.state}[/{colour}]", finding.text)
    return table
