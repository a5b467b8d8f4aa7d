"""Explore: draw an image, see which features say what of it, and where."""

import streamlit as st

from app import components, dashboard, image_input


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
    image_input.follow_features()
    if asked is None:
        st.info("Press Draw to see an image and its features.", icon=":material/brush:")
        return
    with components.one_sentence_errors():
        with st.spinner("Drawing ..."):
            from app import explore_sections, live_images

            live_images.codes(record, asked)
        explore_sections.image_and_features(record, asked)


if __name__ == "__main__":
    dashboard.enter(show)
