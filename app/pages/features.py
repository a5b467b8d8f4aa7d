"""Features: all features of one SAE as a table to sort, filter and search, and their densities."""

import numpy as np
import pandas as pd
import streamlit as st

from app import components, dashboard, data, views

PLACES: dict[data.SearchPlace, str] = {
    "named": "tokens named in the table",
    "all tokens": "all tokens it fires on",
}
STATES: dict[data.FeatureState, str] = {
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
}
TABLE = "feature_table"
DIRECTIONS = {False: "Smallest first", True: "Largest first"}
DENSITIES = [0.0] + [step * 10.0**power for power in range(-6, 0) for step in (1, 3)] + [1.0]


def show() -> None:
    """Draw the page."""
    components.heading(
        "Features",
        "All features of one SAE: how often each fires, how strongly, and on which tokens. "
        "Click a row to open the feature.",
    )
    record = components.choose_sae(indexed=True)
    if record is not None:
        _browse(record)


@components.panel
def _browse(record: data.SaeRecord) -> None:
    wanted = _filter()
    found = data.filtered_features(record, wanted)
    clicked = st.session_state.get(TABLE)
    if clicked and clicked["selection"]["cells"]:
        # Before anything is drawn again: the table is large, and is about to go away.
        row, _ = clicked["selection"]["cells"][0]
        components.open_feature(record, int(found.rows.iloc[row]["feature"]))
    density = data.feature_numbers(record)["density"].to_numpy()
    left, right = st.columns([2, 3], vertical_alignment="top")
    with left:
        _counts(density, found.total)
    with right:
        chosen = wanted.density if wanted.density != (0.0, 1.0) else None
        components.chart(
            views.density_figure(density, selected=chosen),
            key="densities",
            name="Histogram of feature densities",
        )
    if not found.total:
        st.info("No feature passes these filters; widen them.", icon=":material/filter_alt_off:")
        return
    if len(found.rows) < found.total:
        st.caption(f"The first {len(found.rows):,} of {found.total:,} are listed.")
    _table(found.rows)


def _filter() -> data.FeatureFilter:
    top = st.columns([3, 2, 3], vertical_alignment="top")
    text = top[0].text_input(
        "Search",
        key="q",
        placeholder="letters of a token",
        bind="query-params",
    )
    search_in = top[1].selectbox(
        "Search in",
        list(PLACES),
        format_func=PLACES.__getitem__,
        key="search_in",
        help="Beside each feature stand the five tokens it fires on most and ten that it promotes; "
        "the index knows up to 32 tokens of each feature.",
    )
    with top[2]:
        state = components.choice("Show", STATES, key="state")
    below = st.columns([3, 2, 3], vertical_alignment="bottom")
    low, high = below[0].select_slider(
        "Density (share of tokens)",
        DENSITIES,
        value=(0.0, 1.0),
        format_func=views.percent,
        key="density",
    )
    order = below[1].selectbox("Sort by", list(ORDERS), format_func=ORDERS.__getitem__, key="order")
    with below[2]:
        descending = components.choice("Order", DIRECTIONS, key="descending")
    return data.FeatureFilter(
        state=state,
        density=(low, high),
        text=text,
        search_in=search_in,
        order=order,
        descending=descending,
    )


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


def _table(shown: pd.DataFrame) -> None:
    columns = st.column_config
    st.dataframe(
        shown,
        hide_index=True,
        height=560,
        column_config={
            "feature": columns.NumberColumn("Feature", format="%d", width=75),
            "density_percent": columns.NumberColumn(
                "Density", format="%.3g %%", width=80, help="Share of tokens it fires on"
            ),
            "max": columns.NumberColumn(
                "Largest", format="%.2f", width=75, help="Largest activation"
            ),
            "mean": columns.NumberColumn(
                "Mean", format="%.2f", width=75, help="Mean activation, where it fires"
            ),
            "top_tokens": columns.TextColumn(
                "Tokens it fires on most", help="By summed activation; a dot is a space"
            ),
            "positive_tokens": columns.TextColumn(
                "Logits it promotes", help="Direct effect of its decoder direction"
            ),
            "nearest_cosine": columns.NumberColumn(
                "Nearest", format="%.2f", width=75, help="Cosine to the nearest other decoder row"
            ),
        },
        key=TABLE,
        on_select="rerun",
        selection_mode="single-cell",
    )  # fmt: skip


if __name__ == "__main__":
    dashboard.enter(show)
