"""Reports: what was found, with the statistic behind each claim.

report.md            the report as a person reads it
metrics.json         its numbers: verdicts and key figures
tables/NAME.parquet  its tables
figures/NAME.json    its figures (plotly), and NAME.png where a Chromium can draw them
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import kaleido
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pyarrow as pa

from analyses.statistics import Estimate
from probe.errors import Failure
from probe.runs import Run, atomic_path, machine, read_json, write_json

logger = logging.getLogger(__name__)

CHROMIUM = Path("/usr/bin/chromium")
WIDTH, HEIGHT = 900, 480
"""Pixels of a figure's picture, where it asks for no height of its own."""
METRICS, TEXT = "metrics.json", "report.md"
VERDICTS, MEASURED_ON = "## Verdicts", "Measured on:"


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

    @staticmethod
    def of(
        claim: str,
        statistic: str,
        estimate: Estimate,
        *,
        above: float | int | None = None,
        below: float | int | None = None,
    ) -> "Verdict":
        """A claim that holds where the whole interval lies on one side of a bound: give one."""
        assert (above is None) != (below is None), "one bound"
        holds = estimate.above(above) if above is not None else estimate.below(below or 0.0)
        return Verdict(
            claim=claim, statistic=statistic, value=estimate.value, low=estimate.low,
            high=estimate.high, holds=holds,
        )  # fmt: skip

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
        with one_chromium():
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
            height = figure.layout.height or HEIGHT
            image = figure.to_image(format="png", width=WIDTH, height=height, scale=2)
            temporary.write_bytes(image)
        return True

    def markdown(self, drawn: list[str]) -> str:
        """The report as a person reads it; `drawn` are the figures that have a picture."""
        parts = [f"# {self.title}", self.text.strip()]
        if self.verdicts:
            parts += [VERDICTS, "\n".join(verdict.line() for verdict in self.verdicts)]
        for name, table in self.tables.items():
            parts += [heading(name), as_markdown(table)]
        parts += [picture(name) for name in drawn]
        parts.append(f"{MEASURED_ON} {machine()}.")
        return "\n\n".join(parts) + "\n"


@contextlib.contextmanager
def one_chromium() -> Iterator[None]:
    """Draw all pictures inside the block with one Chromium, which takes longer to start than to
    draw."""
    if not CHROMIUM.exists():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The kopts argument is ignored", UserWarning)
        kaleido.start_sync_server(
            plotlyjs=plotly.io.defaults.plotlyjs, mathjax=False, silence_warnings=True
        )
        try:
            yield
        finally:
            kaleido.stop_sync_server(silence_warnings=True)


def heading(table: str) -> str:
    """The line above a table in `report.md`."""
    return f"## {words(table).capitalize()}"


def picture(figure: str) -> str:
    """The line that shows a figure in `report.md`."""
    return f"![{words(figure)}](figures/{figure}.png)"


def words(name: str) -> str:
    """The name of a table or figure as words."""
    return name.replace("_", " ")


def read_report(folder: Path) -> Report:
    """The report in a folder, tables and figures in the order in which `report.md` has them.

    Raises `Failure` where a file is missing or damaged.
    """
    verdicts, numbers = _read_metrics(folder / METRICS)
    text = _read_text(folder / TEXT)
    tables = _in_order(folder / "tables", ".parquet", heading, text)
    figures = _in_order(folder / "figures", ".json", picture, text)
    title, _, rest = text.partition("\n")
    return Report(
        title=title.removeprefix("# "),
        text=_prose(rest, [heading(path.stem) for path in tables]),
        verdicts=verdicts,
        numbers=numbers,
        tables={path.stem: _read_table(path) for path in tables},
        figures={path.stem: _read_figure(path) for path in figures},
    )


def _read_metrics(path: Path) -> tuple[tuple[Verdict, ...], dict[str, Any]]:
    measured = read_json(path)
    try:
        return tuple(Verdict(**row) for row in measured["verdicts"]), measured["numbers"]
    except (KeyError, TypeError) as error:
        raise Failure(f"{path} holds no verdicts ({error}); make the report again.") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise Failure(f"{path} cannot be read ({error}); make the report again.") from error


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, pa.ArrowException) as error:
        raise Failure(f"{path} is damaged ({error}); make the report again.") from error


def _read_figure(path: Path) -> go.Figure:
    try:
        return plotly.io.from_json(_read_text(path))
    except ValueError as error:
        raise Failure(f"{path} is no figure ({error}); make the report again.") from error


def _in_order(folder: Path, suffix: str, line: Callable[[str], str], text: str) -> list[Path]:
    """Files of a folder in the order of their lines in `text`, those without a line at the end."""
    places = {path: text.find(line(path.stem)) for path in sorted(folder.glob(f"*{suffix}"))}
    return sorted(places, key=lambda path: places[path] if places[path] >= 0 else len(text))


def _prose(text: str, headings: Sequence[str]) -> str:
    """What a report says before its verdicts, tables and figures."""
    ends = [VERDICTS, *headings, "![", MEASURED_ON]
    return re.split("|".join(f"^{re.escape(end)}" for end in ends), text, flags=re.M)[0].strip()


def as_markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, numbers to four digits, missing ones as `-`."""
    rows = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    rows += [[cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(value: Any) -> str:
    """One cell of a Markdown table."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\r", "").replace("\n", "\u21b5")
