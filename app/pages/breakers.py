"""Circuit breakers: what a broken model still says, and what became of its states and features."""

import streamlit as st

from app import components, dashboard, data

STUDY = "circuit-breakers"


def show() -> None:
    """Draw the page."""
    components.heading(
        "Circuit breakers",
        "Models that were trained to be unable to talk about something: what they say now, where "
        "their states have gone, and which features went with them.",
    )
    reports = components.link_report(STUDY)
    models = data.broken_models()
    if not models:
        components.empty(
            "No model is broken yet. The study trains some and keeps them; the quick preset takes "
            "a quarter of an hour on two cores:",
            "lorgnette analyse circuit-breakers",
        )
        return
    with components.one_sentence_errors():
        with st.spinner("Loading ..."):
            from app import breaker_sections
        breaker_sections.draw(models, reports)


if __name__ == "__main__":
    dashboard.enter(show)
