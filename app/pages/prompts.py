"""Compare prompts: what differs between two images, and what makes one into the other."""

import streamlit as st

from app import components, dashboard, data, pair_input


def show() -> None:
    """Draw the page."""
    components.heading(
        "Compare prompts",
        "Two prompts drawn from the same noise: the features that differ most, and what the second "
        "image becomes when those of the first are added and its own removed.",
    )
    left, right = st.columns([4, 5])
    with left:
        first = components.choose_sae(indexed=False, of_images=True)
    if first is None:
        return
    if not first.run.complete:
        st.info("This SAE is not complete yet; its training has to finish first.")
        return
    with right:
        records = _blocks(first)
    asked = pair_input.asked(first)
    if asked is None:
        st.info("Press Draw to see both images.", icon=":material/brush:")
        return
    with components.one_sentence_errors():
        with st.spinner("Drawing ..."):
            from app import live_images, pair_sections

            for prompt in (asked.target, asked.source_image):
                live_images.seen(first, prompt)
        pair_sections.pair(records, asked)


def _blocks(first: data.SaeRecord) -> tuple[data.SaeRecord, ...]:
    """The SAEs whose features are compared: the chosen one, and one of each other block."""
    same = {record.name: record for record in data.saes_of_model(first)}
    by_block = {record.run.config["site"]: name for name, record in reversed(same.items())}
    del by_block[first.run.config["site"]]
    others = st.multiselect(
        "Together with", [name for name in same if name != first.name],
        default=[by_block[site] for site in sorted(by_block)], key=f"pair_saes_{first.name}",
        help="One SAE of each block: features are chosen from all of them together.",
    )  # fmt: skip
    return (first, *(same[name] for name in others))


if __name__ == "__main__":
    dashboard.enter(show)
