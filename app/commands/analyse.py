"""`lorgnette analyse`: run a study of `analyses.catalog` and write its report."""

from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from tyro.conf import Positional, arg

from analyses.catalog import STUDIES, find_study, load_study
from analyses.report import METRICS, Verdict
from app.commands.options import Common, plan, say, show
from probe.runs import Run, read_json

LINES = "\n".join(f"{study.name}: {study.line}." for study in STUDIES)
Name = Annotated[Positional[str], arg(help=LINES, metavar="STUDY")]


@dataclass(frozen=True, kw_only=True)
class Command:
    """Run a study and write its report: verdicts with intervals, tables, figures.

    Without a study: list those there are. What a study trains or measures is kept below --root, so
    a stopped one goes on where it was, and the same question finds its report again; the
    dashboard's page Reports shows it. `lorgnette analyse STUDY --help` explains a study's options.

    Example: lorgnette analyse ksparse --dry-run
    """

    study: Name = ""
    common: Common = field(default_factory=Common)


def command_type(arguments: Sequence[str]) -> type[Any]:
    """`Command` with the options of the study that the arguments name.

    Only that study's module is imported; where none is named, none is. Raises `UserError` where the
    first argument is neither a study nor an option.
    """
    names = {study.name for study in STUDIES}
    named = next((word for word in arguments if word in names), None)
    if named is None:
        if arguments and not arguments[0].startswith("-"):
            find_study(arguments[0])
        return Command
    options = load_study(named).Config
    fields = [
        ("study", Name),
        ("config", Annotated[options, arg(help=f"Options of {named}.")]),
        ("common", Common, field(default_factory=Common)),
    ]
    about = {"__doc__": options.__doc__}
    return make_dataclass("Command", fields, namespace=about, frozen=True, kw_only=True)


def run(command: Any) -> Path | None:
    """Run the study, or say what it would do; gives the report's folder. Without one, list them.

    `command` is of the type that `command_type` gives.
    """
    if not command.study:
        show(study_table())
        return None
    study = load_study(command.study)
    if command.common.dry_run:
        rows = study.estimate(command.config)
        say(plan(f"lorgnette analyse {command.study} would do", rows))
        return None
    report = study.run(command.config, command.common.root)
    say(verdict_table(report))
    return report.path


def study_table() -> Table:
    """The studies there are."""
    table = Table("study", "what it asks")
    for study in STUDIES:
        table.add_row(study.name, study.line)
    return table


def verdict_table(report: Run) -> Table:
    """A report's verdicts for a person."""
    table = Table("claim", "verdict", "statistic", title=report.summary["title"], show_lines=True)
    for row in read_json(report.path / METRICS)["verdicts"]:
        verdict = Verdict(**row)
        table.add_row(verdict.claim, verdict.word, verdict.measured)
    return table
