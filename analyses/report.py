"""Reports: what was found, with the statistic behind each claim.

report.md            the report as a person reads it
metrics.json         its numbers: verdicts and key figures
tables/NAME.parquet  its tables
figures/NAME.json    its figures (plotly), and NAME.png where a Chromium can draw them
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from probe.runs import Run, atomic_path, machine, write_json

logger = logging.getLogger(__name__)

CHROMIUM = Path("/usr/bin/chromium")
METRICS, TEXT = "metrics.json", "report.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A claim and whether it shows."""

    claim: str
    """The claim, in one sentence."""
    statistic: str
    """What was measured for it, in words."""
    value: float
    """Its value."""
    low: float | None
    """Lower end of its 95 % interval; None where it has none."""
    high: float | None
    """Upper end of its 95 % interval; None where it has none."""
    holds: bool
    """Whether the claim shows in these data."""

    @property
    def word(self) -> str:
        """The verdict in words."""
        return "holds" if self.holds else "does not show"

    @property
    def measured(self) -> str:
        """The statistic with its value and interval."""
        interval = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.statistic} {self.value:.4g}{interval}"

    def line(self) -> str:
        """The verdict as a line of Markdown."""
        return f"- {self.claim} **{self.word}**: {self.measured}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a study concludes."""

    title: str
    """Its title."""
    text: str
    """What was done and what to read out of it, in Markdown."""
    verdicts: tuple[Verdict, ...] = ()
    """Its claims."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Key figures, for metrics.json."""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Tables by name."""
    figures: dict[str, go.Figure] = field(default_factory=dict)
    """Figures by name."""

    def write(self, run: Run, *, inputs: dict[str, str], seeds: dict[str, int]) -> None:
        """Write the report into its run folder and finish the run."""
        for name, table in self.tables.items():
            with atomic_path(run.path / "tables" / f"{name}.parquet") as temporary:
                table.to_parquet(temporary, index=False)
        drawn = [name for name in self.figures if self._write_figure(run.path, name)]
        verdicts = [asdict(verdict) for verdict in self.verdicts]
        write_json(run.path / METRICS, {"numbers": self.numbers, "verdicts": verdicts})
        with atomic_path(run.path / TEXT) as temporary:
            temporary.write_text(self.markdown(drawn))
        run.finish(
            summary={"title": self.title} | self.numbers, inputs=inputs, seeds=seeds, device="cpu"
        )

    def _write_figure(self, folder: Path, name: str) -> bool:
        """Write one figure; gives whether it could be drawn as a picture too."""
        figure = self.figures[name]
        with atomic_path(folder / "figures" / f"{name}.json") as temporary:
            temporary.write_text(str(figure.to_json()))
        if not CHROMIUM.exists():
            logger.info("no picture of figure %s: %s is not there", name, CHROMIUM)
            return False
        with atomic_path(folder / "figures" / f"{name}.png") as temporary:
            temporary.write_bytes(figure.to_image(format="png", width=900, height=480, scale=2))
        return True

    def markdown(self, drawn: list[str]) -> str:
        """The report as a person reads it; `drawn` are the figures that have a picture."""
        parts = [f"# {self.title}", self.text.strip()]
        if self.verdicts:
            parts += ["## Verdicts", "\n".join(verdict.line() for verdict in self.verdicts)]
        for name, table in self.tables.items():
            parts += [f"## {name.replace('_', ' ').capitalize()}", as_markdown(table)]
        parts += [f"![{name.replace('_', ' ')}](figures/{name}.png)" for name in drawn]
        parts.append(f"Measured on: {machine()}.")
        return "\n\n".join(parts) + "\n"


def as_markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, numbers to four digits, missing ones as `-`."""
    rows = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    rows += [[cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(value: Any) -> str:
    """One cell of a Markdown table."""
    if value is None or value != value:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
