"""Simplicity: what functions networks have before they have learned anything."""

import streamlit as st

from app import components, dashboard

STUDY = "simplicity-bias"


def show() -> None:
    """Draw the page."""
    components.heading(
        "Simplicity",
        "A network with random weights is a function already. Choose its components: what does it "
        "draw, and how complex is that beside others of its kind?",
    )
    if not components.link_report(STUDY):
        components.empty(
            "What is drawn here is one network at a time. The study has thousands, what they "
            "learn, untrained transformers, and SAEs of random weights:",
            f"lorgnette analyse {STUDY}",
        )
    with components.one_sentence_errors():
        with st.spinner("Loading ..."):
            from app import simplicity_sections
        simplicity_sections.draw()


if __name__ == "__main__":
    dashboard.enter(show)
