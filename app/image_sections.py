"""The sections of a feature's page that only image features have, and features as pictures."""

import urllib.parse

import pandas as pd
import streamlit as st

from app import components, data, feature_icon, place_views, tile_data, tiles, views
from app.feature_sections import HEADINGS

CARDS = 48
"""Features that are shown as pictures at once."""
OPACITY = 0.65


def places(record: data.SaeRecord, row: dict) -> None:
    """Where in the images it fires, and at which steps."""
    if not row["alive"]:
        return
    tables, feature = data.feature_index(record).images, row["feature"]
    st.subheader("Where it fires", anchor=False)
    st.caption("Mean activation at each place, over all images of the index.")
    height, width = tables.image_size
    components.chart(
        place_views.place_figure(
            tables.mean_map(feature), tables.firings_map(feature), aspect=height / width
        ),
        key="places",
        name="Mean activation at each place",
    )
    guided_rows = len(tables.passes_of_step) > 1
    if tables.n_steps > 1 or guided_rows:
        st.subheader("When it fires", anchor=False)
        frame = place_views.steps_frame(tables.steps(feature), guided_rows=guided_rows)
        st.html(views.table_html(frame, words=("pass",)))


@components.panel
def icon(record: data.SaeRecord, feature: int, row: dict) -> None:
    """What the block draws of this feature alone, where that can be drawn."""
    if not row["alive"] or not feature_icon.possible(record):
        return
    st.subheader("Icon", anchor=False)
    st.caption(
        "Nothing is asked for, and at every place the block says this feature alone, as strongly "
        "as its active features are together (times 1), or half as strongly, or half more."
    )
    if not st.toggle(
        "Draw icons", key="icons", help="Takes the model into memory, and draws for each feature."
    ):
        return
    with st.spinner("Drawing ..."):
        drawn = feature_icon.icons(record, feature)
    shown = "".join(
        f'<figure class="lg-tile"><span class="lg-picture" style="aspect-ratio:{w}/{h}">'
        f'<img class="lg-small" src="{url}" alt="icon of feature {feature}, times {gamma:g}">'
        f"</span><figcaption>times {gamma:g}</figcaption></figure>"
        for gamma, (url, h, w) in drawn.items()
    )
    st.html(f'<div class="lg-few">{shown}</div>')


@components.panel
def examples(record: data.SaeRecord, feature: int, row: dict) -> None:
    """Images that it fires on: the strongest, some of each interval, some at random."""
    st.subheader("Examples", anchor=False)
    groups = data.examples(record, feature)
    if not groups:
        st.caption("There are none: the feature never fires on the indexed images.")
        return
    heat_controls()
    tables = data.feature_index(record).images
    st.html(tiles.heat_scale_html(row["max"]))
    if not all(tile.known.all() for group in groups for tile in group.examples):
        st.caption("Of darkened places the store has kept nothing: nobody knows what is there.")
    st.caption(
        f"One square a place of the {tables.grid[0]} x {tables.grid[1]} feature map. The seed "
        "leads to the page Explore, which draws the image again."
    )
    address = {"sae": record.name, "f": str(feature)}
    for kind in ("top", "interval", "random"):
        chosen = [group for group in groups if group.kind == kind]
        if chosen:
            st.markdown(f"**{HEADINGS[kind]}**")
            st.html(tiles.tile_groups_html(chosen, scale=row["max"], explore=address))


def heat_controls() -> float:
    """Whether heat maps are shown, and how opaque; gives the opacity, 0 where they are not."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        shown = st.toggle("Heat map", value=True, key="heat", help="Where the feature fires.")
        opacity = st.slider(
            "Opacity of the heat map", 0.0, 1.0, OPACITY, 0.05, key="heat_opacity", width=240,
            disabled=not shown,
        )  # fmt: skip
    opacity = opacity if shown else 0.0
    st.html(tiles.heat_style(opacity))
    return opacity


def gallery(record: data.SaeRecord, rows: pd.DataFrame) -> None:
    """The first features of a table as the images they fire on most."""
    some = rows.head(CARDS)
    heat_controls()
    strongest = tile_data.strongest(data.feature_index(record), some["feature"].tolist())
    st.caption(
        f"The image on which each feature fires most, of the first {len(some):,} features; the "
        "brightest colour is the feature's largest activation."
    )
    cards = []
    for row in some.to_dict("records"):
        feature = int(row["feature"])
        if feature in strongest:
            query = urllib.parse.urlencode(components.feature_address(record, feature))
            cards.append(
                tiles.card_html(
                    feature, row.get("label") or "", strongest[feature], scale=row["max"],
                    address=f"feature?{query}",
                )
            )  # fmt: skip
    st.html(f'<div class="lg-tiles">{"".join(cards)}</div>')
