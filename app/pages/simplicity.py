"""Simplicity: what functions networks have before they have learned anything."""

import streamlit as st

from app import components, dashboard, data

STUDY = "simplicity-bias"


def show() -> None:
    """Draw the page."""
    components.heading(
        "Simplicity",
        "A network with random weights is a function already. Choose its components: what does it "
        "draw, and how complex is that beside others of its kind?",
    )
    _report()
    with components.one_sentence_errors():
        with st.spinner("Loading ..."):
            from app import simplicity_sections
        simplicity_sections.draw()


def _report() -> None:
    """Where the study's report is, or what makes one."""
    reports = [name for name in data.finished_reports() if name.startswith(f"{STUDY}/")]
    if reports:
        st.page_link(
            "pages/reports.py", label=":primary[What the study found, with intervals and controls]",
            icon="", query_params={"report": reports[0]},
        )  # fmt: skip
        return
    components.empty(
        "What is drawn here is one network at a time. The study has thousands, what they learn, "
        "untrained transformers, and SAEs of random weights:",
        f"lorgnette analyse {STUDY}",
    )


if __name__ == "__main__":
    dashboard.enter(show)
