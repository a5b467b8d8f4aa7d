"""Prompt lab: type a text or a chat and see what fires on it, what it means, and what it causes."""

import streamlit as st

from app import components, dashboard, lab_causes, lab_input, lab_sections

VIEWS = {
    "features": "Features",
    "layers": "Layers",
    "lens": "Logit lens",
    "attribution": "Attribution",
    "patching": "Patching",
}
DRAWN = {
    "features": lab_sections.features,
    "layers": lab_sections.layers,
    "lens": lab_sections.lens,
    "attribution": lab_causes.attribution,
    "patching": lab_causes.patching,
}


def show() -> None:
    """Draw the page."""
    components.heading(
        "Prompt lab",
        "Your own text or chat: the features that fire on it, and what they do to the next token.",
    )
    record = components.choose_sae(indexed=False, of_images=False)
    if record is None:
        return
    if not record.run.complete:
        st.info("This SAE is not complete yet; its training has to finish first.")
        return
    typed = lab_input.typed()
    view = components.choice("View", VIEWS, key="lab_view")
    with components.one_sentence_errors():
        with st.spinner("Loading the model ..."):
            from app import lab

            prompt = lab.prompt_of(record, typed)
        if prompt.n_cut:
            st.warning(
                f"The text has {len(prompt) + prompt.n_cut:,} tokens and the first "
                f"{len(prompt):,} are read here: the last {prompt.n_cut:,} were left out.",
                icon=":material/content_cut:",
            )
        # An emptied place: the view before this one does not linger below while a model runs.
        with st.empty().container():
            DRAWN[view](record, prompt)


if __name__ == "__main__":
    dashboard.enter(show)
