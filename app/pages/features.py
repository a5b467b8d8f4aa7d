"""Features: all features of one SAE as a table to sort, filter and search, and their densities."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import streamlit as st

from app import (
    components,
    dashboard,
    data,
    feature_data,
    image_sections,
    note_panels,
    tile_data,
    views,
)
from app.feature_table import MATCH, RANKED, FeatureFilter, FeatureState, SearchPlace

IMAGE_PLACES: dict[SearchPlace, str] = {
    "prompts": "prompts of its strongest images",
    "label": "labels",
}
PLACES: dict[SearchPlace, str] = {
    "named": "tokens shown below",
    "all tokens": "all its tokens",
    "label": "labels",
    "text": "a text, by running it",
}
TYPED: Mapping[SearchPlace, str] = {
    "named": "letters of a token",
    "all tokens": "letters of a token",
    "prompts": "letters of a prompt",
    "label": "letters of a label",
    "text": "any text",
}
STATES: dict[FeatureState, str] = {
    "alive": "Alive",
    "dense": "Dense",
    "dead": "Dead",
    "all": "All",
}
ORDERS = {
    "feature": "Number",
    "density": "Density",
    "max": "Largest activation",
    "mean": "Mean activation",
    "nearest_cosine": "Nearest cosine",
    "decoder_norm": "Decoder norm",
    "label": "Label",
    "score": "Score of the label",
    MATCH: "Best match",
}
TABLE = "feature_table"
LOOKS = {"table": "Table", "pictures": "Pictures"}
HELP: Mapping[views.Unit, str] = {
    "tokens": "Beside each feature stand the five tokens it fires on most and ten that it "
    "promotes; the index knows up to 32 tokens of each feature. A text of yours is run "
    "through the model, and the features that fire on it are found.",
    "places": f"The prompts of the {tile_data.NAMED} images on which each feature fires most; "
    "features with the largest share of such images come first.",
}
SUMMED: Mapping[views.Unit, str] = {
    "tokens": "By summed activation; a dot is a space",
    "places": "By summed activation: y and x on the feature map",
}
DIRECTIONS = {False: "Smallest first", True: "Largest first"}
DENSITIES = [0.0] + [step * 10.0**power for power in range(-6, 0) for step in (1, 3)] + [1.0]


def show() -> None:
    """Draw the page."""
    components.heading(
        "Features",
        "All features of one SAE: how often each fires, how strongly, on what. "
        "Click a row to open it; tick rows for a list or a file.",
    )
    record = components.choose_sae(indexed=True)
    if record is not None:
        _browse(record)
        note_panels.carry_over(record)


@components.panel
def _browse(record: data.SaeRecord) -> None:
    wanted = _filter(record)
    found = feature_data.filtered_features(record, wanted, _on_text(record, wanted))
    table = _table_key(record, wanted)
    clicked = st.session_state.get(table, {}).get("selection", {"cells": [], "rows": []})
    if clicked["cells"]:
        # Before anything is drawn again: the table is large, and is about to go away.
        row, _ = clicked["cells"][0]
        components.open_feature(record, int(found.rows.iloc[row]["feature"]))
    density = data.feature_numbers(record)["density"].to_numpy()
    left, right = st.columns([2, 3], vertical_alignment="top")
    with left:
        _counts(density, found.total)
    with right:
        chosen = wanted.density if wanted.density != (0.0, 1.0) else None
        components.chart(
            views.density_figure(density, selected=chosen, unit=record.unit),
            key="densities",
            name="Histogram of feature densities",
        )
    if not found.total:
        st.info("No feature passes these filters; widen them.", icon=":material/filter_alt_off:")
        return
    note_panels.bulk(record, found.rows, clicked["rows"])
    if len(found.rows) < found.total:
        st.caption(f"The first {len(found.rows):,} of {found.total:,} are listed.")
    if record.of_images and components.choice("Show as", LOOKS, key="look") == "pictures":
        image_sections.gallery(record, found.rows)
    else:
        _table(found.rows, table, record.unit)


def _filter(record: data.SaeRecord) -> FeatureFilter:
    top = st.columns([3, 2, 2, 3], vertical_alignment="top")
    places = IMAGE_PLACES if record.of_images else PLACES
    if st.session_state.get("search_in") not in places:
        st.session_state["search_in"] = next(iter(places))
        _order_by_match()
    with top[1]:
        search_in = st.selectbox(
            "Search in",
            list(places),
            format_func=places.__getitem__,
            key="search_in",
            on_change=_order_by_match,
            help=HELP[record.unit],
        )
    text = top[0].text_input(
        "Search",
        key="q",
        placeholder=TYPED[search_in],
        bind="query-params",
    )
    with top[2]:
        members_of = note_panels.choose_list(record)
    with top[3]:
        state = components.choice("Show", STATES, key="state")
    below = st.columns([3, 2, 5], vertical_alignment="bottom")
    low, high = below[0].select_slider(
        f"Density (share of {record.unit})",
        DENSITIES,
        value=(0.0, 1.0),
        format_func=views.percent,
        key="density",
    )
    order = below[1].selectbox("Sort by", list(ORDERS), format_func=ORDERS.__getitem__, key="order")
    with below[2]:
        descending = components.choice("Order", DIRECTIONS, key="descending")
    return FeatureFilter(
        state=state,
        density=(low, high),
        text=text.strip() if search_in == "text" else text,
        search_in=search_in,
        members_of=members_of,
        order=order,
        descending=descending,
    )


def _order_by_match() -> None:
    """A search that ranks what it finds shows the best first, until another order is chosen."""
    if st.session_state["search_in"] in RANKED:
        st.session_state["order"] = MATCH
    elif st.session_state.get("order") == MATCH:
        st.session_state["order"] = "feature"


def _on_text(record: data.SaeRecord, wanted: FeatureFilter) -> Mapping[int, float] | None:
    """The features that fire on the text of the filter, where it searches in one."""
    if wanted.search_in != "text" or not wanted.text:
        return None
    with st.spinner("Running the model ..."):
        from app import live

        return live.features_on(record, wanted.text)


def _table_key(record: data.SaeRecord, wanted: FeatureFilter) -> str:
    """A key that is another one where the rows are: ticks stay with the features they were for."""
    shown = (record.name, wanted, data.notes_revision())
    if st.session_state.get("shown_features") != shown:
        st.session_state["shown_features"] = shown
        st.session_state["table_number"] = st.session_state.get("table_number", 0) + 1
    return f"{TABLE}_{st.session_state['table_number']}"


def _counts(density: np.ndarray, n_found: int) -> None:
    total, dead, dense = len(density), int((density == 0).sum()), data.dense_from()
    st.metric("Features listed", f"{n_found:,}", help="Those that pass the filters.")
    alive = density[density > 0]
    facts = {
        "of": total,
        "alive": f"{len(alive):,} ({views.percent(len(alive) / total)})",
        "dead": f"{dead:,} ({views.percent(dead / total)})",
        f"dense (above {views.percent(dense)})": f"{int((density > dense).sum()):,}",
        "median density": views.percent(float(np.median(alive)) if len(alive) else None),
    }
    st.html(views.facts_html(facts))


def _table(shown: pd.DataFrame, key: str, unit: views.Unit) -> None:
    columns = st.column_config
    narrow = 200 if "label" in shown else None
    st.dataframe(
        shown,
        hide_index=True,
        height=560,
        column_config={
            "feature": columns.NumberColumn("Feature", format="%d", width=75),
            "label": columns.TextColumn("Label", width=170, help="Yours, else the automatic one"),
            "score": columns.NumberColumn(
                "Score", format="%.2f", width=65,
                help="Balanced accuracy with which the automatic label tells where the feature "
                "fires: 0.5 is chance. A label of your own has none.",
            ),
            "match": columns.NumberColumn(
                "Match", format="%.3g", width=70,
                help="In a text: its largest activation there. In all tokens: its activation on "
                "the tokens found, times their share of its activation. In prompts: the share of "
                "its strongest images whose prompt has the letters.",
            ),
            "density_percent": columns.NumberColumn(
                "Density", format="%.3g %%", width=80, help=f"Share of {unit} it fires on"
            ),
            "max": columns.NumberColumn(
                "Largest", format="%.2f", width=75, help="Largest activation"
            ),
            "mean": columns.NumberColumn(
                "Mean", format="%.2f", width=75, help="Mean activation, where it fires"
            ),
            "top_tokens": columns.TextColumn(
                f"{unit.capitalize()} it fires on most", width=narrow,
                help=SUMMED[unit],
            ),
            "positive_tokens": columns.TextColumn(
                "Logits it promotes", width=narrow, help="Direct effect of its decoder direction"
            ),
            "nearest_cosine": columns.NumberColumn(
                "Nearest", format="%.2f", width=75, help="Cosine to the nearest other decoder row"
            ),
        },
        key=key,
        on_select="rerun",
        selection_mode=["multi-row", "single-cell"],
    )  # fmt: skip


if __name__ == "__main__":
    dashboard.enter(show)
