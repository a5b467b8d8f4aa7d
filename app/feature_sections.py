"""The sections of a feature's page, from its numbers to its examples."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from app import components, data, feature_data, tile_data, tiles, views
from app.headlines import headlines_html

TOKENS_SHOWN = 12
HEADINGS = {"top": "Strongest", "interval": "By interval of activation", "random": "Random"}


def numbers(record: data.SaeRecord, row: dict) -> None:
    """Headline numbers beside the twin's, and the automatic label that one of them is about."""
    if not row["alive"]:
        st.warning(
            f"This feature is dead: it fires on none of the {record.unit} of the index.",
            icon=":material/bedtime:",
        )
    st.html(headlines_html(feature_data.feature_headlines(record, row), record.unit))
    made = feature_data.automatic_label(record, row["feature"])
    if made is None:
        st.caption(f"No automatic label yet; make them by `lorgnette label {record.run.path}`.")
    elif made["label"]:
        st.caption(f"Automatic label: **{views.markdown(made['label'])}**")
    else:
        st.caption("The automatic labels have none for this feature.")
    command = feature_data.twin_command(record)
    if command is not None:
        st.caption(f"To see a random-weight twin's numbers beside these, begin with `{command}`.")


def activations(record: data.SaeRecord, row: dict) -> None:
    """How strongly it fires, as a histogram; a person's own text is marked in it."""
    if not row["alive"]:
        return
    st.subheader("Activations", anchor=False)
    components.chart(
        views.activation_figure(
            row["histogram"],
            data.feature_index(record).histogram_edges,
            marker=_marker(record, row),
            unit=record.unit,
        ),
        key="activations",
        name="Histogram of the feature's activations",
    )


def _marker(record: data.SaeRecord, row: dict) -> float | None:
    marked = st.session_state.get("own_text_peak")
    if marked and marked[:2] == (record.name, row["feature"]):
        return marked[2]
    return None


def logits(row: dict) -> None:
    """What its decoder direction promotes and suppresses."""
    st.subheader("Effect on the logits", anchor=False)
    if not row["positive_tokens"]:
        st.caption("This site has no direct reading in logits.")
        return
    up, down = st.columns(2, gap="medium")
    with up:
        st.caption("Promoted")
        bars = views.bars_html(
            row["positive_tokens"], row["positive_logits"], colour=views.BLUE_RGB
        )
        st.html(bars)
    with down:
        st.caption("Suppressed")
        bars = views.bars_html(
            row["negative_tokens"], row["negative_logits"], colour=views.RUST_RGB
        )
        st.html(bars)


def tokens(record: data.SaeRecord, row: dict) -> None:
    """The tokens it fires on."""
    rows = data.feature_index(record).tokens_for_feature(row["feature"]).head(TOKENS_SHOWN)
    if len(rows):
        st.subheader("Tokens it fires on", anchor=False)
        st.html(views.tokens_table_html(rows))


def others(record: data.SaeRecord, row: dict) -> None:
    """Features that point the same way, and features that fire on the same tokens or places."""
    near = data.feature_index(record).neighbours(row["feature"])
    if len(near):
        st.subheader("Nearest decoder directions", anchor=False)
        _linked(record, near, "neighbour", "cosine")
    together = feature_data.coactive(record, row["feature"])
    unit = record.unit
    st.subheader(f"Fire on the same {unit}", anchor=False)
    if len(together):
        st.caption(f"Jaccard: {unit} on which both fire over {unit} on which either does.")
        _linked(record, together, "other", "jaccard")
    else:
        st.caption("There is none: no other feature fires where this one does.")


def _linked(record: data.SaeRecord, rows: pd.DataFrame, other: str, measure: str) -> None:
    """A line a feature: a link to it, how near it is, and what it fires on or is called."""
    named = feature_data.feature_labels(record, rows[other].tolist())
    shown = {}
    if record.of_images:
        shown = tile_data.strongest(data.feature_index(record), rows[other].tolist())
    for place, name in zip(rows.to_dict("records"), named, strict=True):
        link, value, label = st.columns([5, 2, 8], vertical_alignment="center", gap="small")
        with link:
            components.feature_link(record, place[other])
        value.html(f'<span class="lg-value">{views.number(place[measure])}</span>')
        if record.of_images:
            tile = shown.get(place[other])
            text = name or (tile.prompt if tile else "")
            label.html(tiles.thumbnail_html(tile, scale=place["max"] or 0.0, text=text))
        else:
            label.html(_called(name, place))


def _called(label: str, place: Mapping[Any, Any]) -> str:
    fires_on = views.escaped(views.token_list(place["top_tokens"]))
    if label:
        return f'<span class="lg-line" title="{fires_on}">{views.escaped(label)}</span>'
    return f'<span class="lg-tokens lg-muted lg-line">{fires_on}</span>'


def provenance(record: data.SaeRecord) -> None:
    """Where the SAE comes from."""
    st.subheader("Provenance", anchor=False)
    known = data.provenance(record)
    st.html(views.facts_html(views.provenance_facts(record.name, known, record.unit)))
    with st.expander("Everything recorded"):
        st.html(views.facts_html(known))


@components.panel
def own_text(record: data.SaeRecord, feature: int, row: dict) -> None:
    """A box for a text, and how the feature fires on it."""
    st.subheader("Test it on your own text", anchor=False)
    with st.form("own_text", border=False):
        box, button = st.columns([6, 1], vertical_alignment="bottom")
        text = box.text_input(
            "Your text", key="own_text_box", placeholder="Type a sentence and press Enter",
            label_visibility="collapsed", persist_state="session",
        )  # fmt: skip
        button.form_submit_button("Test", width="stretch")
    if not text:
        return
    with st.spinner("Running the model ..."):
        from app import live

        strip = live.prompt_strip(live.prompt_codes(record, text), feature)
    peak = max(strip.activations)
    with st.container(key="own_text_result"):
        st.html(views.strip_html(strip, scale=row["max"] or peak))
    if peak > 0:
        share = f" ({views.percent(peak / row['max'])} of its largest)" if row["max"] else ""
        st.caption(f"Largest activation here: {views.number(peak)}{share}.")
    else:
        st.caption("It does not fire on this text.")
    mark = (record.name, feature, peak)
    if st.session_state.get("own_text_peak") != mark:
        st.session_state["own_text_peak"] = mark
        st.rerun()


@components.panel
def examples(record: data.SaeRecord, feature: int, row: dict) -> None:
    """Sequences that it fires on: the strongest, some of each interval, some at random."""
    st.subheader("Examples", anchor=False)
    groups = data.examples(record, feature)
    if not groups:
        st.caption("There are none: the feature never fires on the indexed tokens.")
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        context = components.choice("Context", views.CONTEXT_LABELS, key="context")
        line_breaks = components.line_break_toggle("line_breaks")
    st.html(views.scale_html(row["max"]))
    for kind in ("top", "interval", "random"):
        chosen = [group for group in groups if group.kind == kind]
        if chosen:
            st.markdown(f"**{HEADINGS[kind]}**")
            st.html(
                views.groups_html(
                    chosen, scale=row["max"], context=context, line_breaks=line_breaks
                )
            )
