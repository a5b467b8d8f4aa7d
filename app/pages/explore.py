"""Explore: draw an image, see which features say what of it, and where."""

import streamlit as st

from app import components, dashboard, image_input
from probe.errors import UserError

WANTED, ADDRESS = "explore_wanted", "explore_address"
"""Features to show that a person has just asked for; what `f` in the address last was."""


def show() -> None:
    """Draw the page."""
    components.heading(
        "Explore",
        "An image, the features of one block that say the most of it, and where they fire. Tick "
        "several rows to see several maps.",
    )
    record = components.choose_sae(indexed=False, of_images=True)
    if record is None:
        return
    if not record.run.complete:
        st.info("This SAE is not complete yet; its training has to finish first.")
        return
    asked = image_input.asked(record)
    _follow_address()
    if asked is None:
        st.info("Press Draw to see an image and its features.", icon=":material/brush:")
        return
    with components.one_sentence_errors():
        with st.spinner("Drawing ..."):
            from app import explore_sections, live_images

            live_images.codes(record, asked)
        explore_sections.image_and_features(record, asked)


def _follow_address() -> None:
    """Take over the features that the address names (`?f=3,5`), once each time it changes."""
    text = st.query_params.get("f")
    if not text or text == st.session_state.get(ADDRESS):
        return
    st.session_state[ADDRESS] = text
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"f must be numbers of features as 3,5; the address has {text[:40]!r}.")
    st.session_state[WANTED] = tuple(dict.fromkeys(map(int, parts)))


if __name__ == "__main__":
    dashboard.enter(show)
