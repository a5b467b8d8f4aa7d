"""Reports: written, read back, and damaged."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from analyses import report
from analyses.plots import Axis, bars
from analyses.report import METRICS, TEXT, Report, Verdict, as_markdown, read_report
from analyses.statistics import Estimate
from probe.errors import Failure
from probe.runs import Run

HOLDS = Verdict(claim="It rains.", statistic="mm", value=3.14159, low=2.0, high=4.0, holds=True)
NOT = Verdict(claim="It snows.", statistic="cm", value=0.0, low=None, high=None, holds=False)


def example() -> Report:
    """A report whose tables and figures are not in the order of the alphabet."""
    one = Estimate(value=1.0, low=0.5, high=2.0, n=3)
    figures = {
        name: bars({"a|b": one}, title=name, x=Axis(title="")) for name in ("second_b", "first")
    }
    return Report(
        title="Weather # 1",
        text="First paragraph.\n\n## Own heading\n\n- a list\n\nThe last one.",
        verdicts=(HOLDS, NOT),
        numbers={"days": 7, "rain": 0.25, "town": "X"},
        tables={
            "z_last": pd.DataFrame({"day": ["Mo", "a|b"], "mm": [1.23456, None]}),
            "a_first": pd.DataFrame({"n": [1, 2]}),
        },
        figures=figures,
    )


@pytest.fixture
def written(tmp_path, monkeypatch) -> Run:
    """The example, written where there is no Chromium."""
    monkeypatch.setattr(report, "CHROMIUM", tmp_path / "no-browser")
    run = Run.create(tmp_path, "weather", {"kind": "report"})
    example().write(run, inputs={"sky": "abc"}, seeds={"a": 0})
    return run


def test_a_report_comes_back_as_it_was_written(written):
    found, wanted = read_report(written.path), example()
    assert (found.title, found.text, found.numbers) == (wanted.title, wanted.text, wanted.numbers)
    assert found.verdicts == (HOLDS, NOT)
    assert list(found.tables) == ["z_last", "a_first"]
    for name, table in wanted.tables.items():
        pd.testing.assert_frame_equal(found.tables[name], table)
    for name, figure in wanted.figures.items():
        assert json.loads(str(found.figures[name].to_json())) == json.loads(str(figure.to_json()))


def test_figures_come_in_the_order_of_the_text(written):
    # Without pictures the text names no figure: the alphabet decides.
    assert list(read_report(written.path).figures) == ["first", "second_b"]
    text = (written.path / TEXT).read_text()
    pictures = "\n\n".join(map(report.picture, example().figures))
    (written.path / TEXT).write_text(text.replace("Measured on:", f"{pictures}\n\nMeasured on:"))
    assert list(read_report(written.path).figures) == ["second_b", "first"]
    assert read_report(written.path).text == example().text


def test_a_person_reads_verdicts_and_tables(written):
    text = (written.path / TEXT).read_text()
    assert "- It rains. **holds**: mm 3.142 [2, 4]." in text
    assert "- It snows. **does not show**: cm 0." in text
    assert "## Z last\n\n| day | mm |\n| --- | --- |\n| Mo | 1.235 |\n| a\\|b | - |" in text
    assert written.manifest["inputs"] == {"sky": "abc"}


def test_tables_in_markdown_by_hand():
    frame = pd.DataFrame({"x": [12345.678, math.nan], "n": [10_000, 3], "w": ["a", None]})
    assert as_markdown(frame).splitlines() == [
        "| x | n | w |", "| --- | --- | --- |", "| 1.235e+04 | 10000 | a |", "| - | 3 | - |",
    ]  # fmt: skip
    token = pd.DataFrame({"token": ["\n\n", " a"]})
    assert as_markdown(token).splitlines()[2:] == ["| \u21b5\u21b5 |", "|  a |"], "a row a line"


@pytest.mark.parametrize("name", [METRICS, TEXT, "tables/z_last.parquet", "figures/first.json"])
def test_damage_is_told_in_a_sentence(written, name):
    path: Path = written.path / name
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(Failure, match=f"{path.name}.* again"):
        read_report(written.path)


def test_a_missing_file_is_told_in_a_sentence(written):
    (written.path / TEXT).unlink()
    with pytest.raises(Failure, match=r"report\.md cannot be read"):
        read_report(written.path)


def test_metrics_of_another_kind_are_told_in_a_sentence(written):
    (written.path / METRICS).write_text('{"rows": []}')
    with pytest.raises(Failure, match=r"metrics\.json"):
        read_report(written.path)
