"""Collapse: does a model still tell n repetitions from n + 1, and which tokens reach its last?"""

import streamlit as st

from app import components, dashboard

STUDY = "collapse"


def show() -> None:
    """Draw the page."""
    components.heading(
        "Collapse",
        "Two prompts that differ in one more repetition of their last token: how far apart does "
        "the model keep them, and which tokens still reach the last one?",
    )
    if not components.link_report(STUDY):
        components.empty(
            "What is measured here is one prompt at a time. The study has phrasings, intervals, "
            "controls, number formats, features and remedies:",
            "lorgnette analyse collapse",
        )
    with components.one_sentence_errors():
        with st.spinner("Loading ..."):
            from app import collapse_sections
        collapse_sections.draw()


if __name__ == "__main__":
    dashboard.enter(show)
