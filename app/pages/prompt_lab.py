"""Prompt lab: type a text, see which features fire on all of it or on one of its tokens."""

import streamlit as st

from app import components, dashboard, data, views
from saes.prompts import Ranking

RANKINGS: dict[Ranking, str] = {"max": "Largest", "mean": "Mean", "frequency": "Frequency"}
EXPLAINED = "Over the chosen tokens: largest and mean activation, share on which it fires."
EXAMPLE = "The lighthouse keeper wrote a letter to his sister in Lisbon every winter."


def show() -> None:
    """Draw the page."""
    components.heading(
        "Prompt lab",
        "The features of one SAE that fire on your own text: on all of it, or on one token.",
    )
    record = components.choose_sae(indexed=False)
    if record is None:
        return
    if not record.run.complete:
        st.info("This SAE is not complete yet; its training has to finish first.")
        return
    with st.form("prompt", border=False):
        text = st.text_area("Text", EXAMPLE, height=90, key="prompt_text", persist_state="session")
        st.form_submit_button("Show its features", type="primary")
    _lab(record, text)


@components.panel
def _lab(record: data.SaeRecord, text: str) -> None:
    with st.spinner("Running the model ..."):
        from app import live

        codes = live.prompt_codes(record, text)
    if codes.n_cut:
        st.caption(f"The text is long: its last {codes.n_cut:,} tokens were left out.")
    options = st.columns([3, 3, 2], vertical_alignment="bottom")
    with options[0]:
        by = components.choice("Rank features by", RANKINGS, key="ranking", explained=EXPLAINED)
    skip = options[1].toggle(
        "Leave out position 0 and special tokens", value=True, key="skip_special",
        help="Their activations have outlier norms, and the SAE was not trained on them.",
    )  # fmt: skip
    top = options[2].select_slider("Features shown", [5, 10, 20, 40], value=10, key="n_ranked")
    token = st.pills(
        "Pick a token, or none for the whole text",
        range(len(codes.texts)),
        format_func=lambda place: views.pill(codes.texts[place]),
        key="picked_token",
    )
    ranked = live.ranked(codes, token=token, skip_special=skip, by=by, top=top)
    if not ranked:
        st.info("No feature fires on these tokens.", icon=":material/bedtime:")
        return
    of_what = (
        "the whole text" if token is None else f"token {token}, {views.spaced(codes.texts[token])}"
    )
    st.markdown(f"**{len(ranked)} features with the most activation on {views.markdown(of_what)}**")
    for place in ranked:
        _row(record, live.prompt_strip(codes, place.feature), place.feature, getattr(place, by), by)


def _row(
    record: data.SaeRecord, strip: views.Strip, feature: int, score: float, by: Ranking
) -> None:
    """A feature: a link to it, its score, what it usually fires on, the text in its colours."""
    with st.container(border=True, gap="xsmall"):
        head, value, label = st.columns([2, 2, 8], vertical_alignment="center")
        with head:
            if record.index:
                components.feature_link(record, feature)
            else:
                st.markdown(f"Feature {feature}")
        shown = views.percent(score) if by == "frequency" else views.number(score)
        value.html(f'<span class="lg-muted">{RANKINGS[by].lower()} {shown}</span>')
        scale = max(strip.activations)
        if record.index:
            usual = data.feature_index(record).feature(feature)
            scale = max(scale, usual["max"] or 0.0)
            text = views.escaped(views.token_list(usual["top_tokens"]))
            label.html(
                '<span class="lg-muted">usually on &nbsp;</span>'
                f'<span class="lg-tokens lg-muted">{text}</span>'
            )
        st.html(views.strip_html(strip, scale=scale))


if __name__ == "__main__":
    dashboard.enter(show)
