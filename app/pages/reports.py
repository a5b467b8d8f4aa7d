"""Reports: what each study concludes, with the statistic behind every claim."""

import streamlit as st

from analyses.catalog import STUDIES
from analyses.report import Report, Verdict, words
from app import components, dashboard, data, views
from probe.runs import Run

FIGURE_WIDTH = 960  # pixels that a figure of a report is laid out for, about
LONG = 40  # rows from which on a table is one to scroll in


def show() -> None:
    """Draw the page."""
    components.heading(
        "Reports",
        "What each study concludes: claims with the statistic behind them, figures, tables.",
    )
    reports = data.finished_reports()
    if not reports:
        _empty()
        return
    name = _choose(reports)
    _report(name, reports[name])


def _empty() -> None:
    components.empty(
        f"There is no finished report in `{data.artifact_root()}` yet. The demo writes one, and so "
        "does every study:",
        "lorgnette demo        # or: make demo",
        *(f"lorgnette analyse {study.name}        # {study.line}" for study in STUDIES),
    )


def _choose(reports: dict[str, Run]) -> str:
    """The report to show; the address (`?report=`) decides where to start."""
    asked = st.query_params.get("report")
    if asked in reports:
        st.session_state["report_choice"] = asked
    elif asked is not None:
        st.warning(
            f"There is no finished report {asked!r} here; this is the newest.",
            icon=":material/info:",
        )
    return st.selectbox(
        "Report",
        list(reports),
        format_func=lambda name: f"{reports[name].summary.get('title', name)}  ({name})",
        key="report_choice",
        on_change=_remember,
    )


def _remember() -> None:
    st.query_params["report"] = st.session_state["report_choice"]


def _report(name: str, run: Run) -> None:
    report = data.report_content(run)
    st.subheader(report.title, anchor=False)
    st.caption(f"{name}, made {run.manifest['created']}, on {run.manifest['machine']}")
    for verdict in report.verdicts:
        _verdict(verdict)
    with st.expander("What was done, and how to read it", expanded=not report.verdicts):
        st.markdown(report.text)
    _figures(name, report)
    _tables(report)


def _verdict(verdict: Verdict) -> None:
    """A claim, whether it shows, and its statistic."""
    badge, sentence = st.columns([1, 8], vertical_alignment="top")
    with badge:
        if verdict.holds:
            st.badge(verdict.word, icon=":material/check:", color="green")
        else:
            st.badge(verdict.word, icon=":material/close:", color="orange")
    sentence.html(
        f"<div>{views.escaped(verdict.claim)}</div>"
        f'<div class="lg-muted">{views.escaped(verdict.measured)}</div>'
    )


def _figures(name: str, report: Report) -> None:
    with st.container(width=FIGURE_WIDTH):
        for title, figure in report.figures.items():
            components.chart(figure, key=f"{name}/{title}", name=words(title), own_colours=True)


def _tables(report: Report) -> None:
    for title, table in report.tables.items():
        with st.expander(f"Table: {words(title)}"):
            if len(table) < LONG:
                st.html(views.numbers_html(table))
            else:
                st.dataframe(table, hide_index=True)


if __name__ == "__main__":
    dashboard.enter(show)
