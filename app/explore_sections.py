"""The sections of the page Explore. Imports the model libraries: used once an image is drawn."""

from collections.abc import Collection, Sequence

import pandas as pd
import streamlit as st
from jaxtyping import Float, UInt8
from torch import Tensor

from app import (
    components,
    data,
    dose_strip,
    image_input,
    image_sections,
    image_views,
    live_images,
    tiles,
    views,
)
from app.data import SaeRecord
from app.drawings import png, slug
from app.image_input import FEATURES, WANTED, Asked
from probe.errors import UserError
from saes.place_codes import PlaceCodes

LISTED, MOST_MAPS, MOST_BLOCKS, NAMED = 20, 6, 6, 5
ALL_STEPS = 0
THUMBNAIL = 64
"""Pixels of the maps in the table."""
STATE = "explore_state"


@components.panel
def image_and_features(record: SaeRecord, asked: Asked) -> None:
    """The image with maps over it, and the table of features beside it."""
    codes = live_images.codes(record, asked)
    image_input.show_address(asked)
    if live_images.seen(record, asked).truncated:
        st.warning(
            "The prompt is longer than the model reads: its end says nothing.",
            icon=":material/content_cut:",
        )
    left, right = st.columns([5, 6], gap="large")
    with right:
        st.subheader(f"What {record.run.config['site']} says", anchor=False)
        step = _step(asked)
        chosen = _table(record, asked, codes, step)
    with left:
        _maps(record, asked, codes, chosen, step)
        opacity = image_sections.heat_controls()
        _downloads(record, asked, codes, chosen, step, opacity)
    if chosen:
        fires = (codes.heat_map(chosen[0]).amax(0) > 0).float()
        dose_strip.of_feature(record, chosen[0], asked, fires)
    _blocks(record, asked, step)


def _step(asked: Asked) -> int | None:
    """Which denoising step is shown, counted from 0; None for the mean over all."""
    if asked.steps == 1:
        return None
    if asked.steps <= 8:
        numbers = {number: str(number) for number in range(1, asked.steps + 1)}
        chosen = components.choice(
            "Step", {ALL_STEPS: "All steps"} | numbers, key=f"explore_step_{asked.steps}",
            explained="Denoising steps. All of them: their mean.",
        )  # fmt: skip
    else:
        chosen = st.slider(
            "Step", ALL_STEPS, asked.steps, ALL_STEPS, key=f"explore_step_{asked.steps}",
            help=f"Denoising steps; {ALL_STEPS} is the mean of all.",
        )  # fmt: skip
    return None if chosen == ALL_STEPS else int(chosen) - 1


def heat(codes: PlaceCodes, feature: int, step: int | None) -> Float[Tensor, "h w"]:
    """A feature's map at one step, or the mean of all."""
    maps = codes.heat_map(feature)
    return maps.mean(0) if step is None else maps[step]


# -------------------------------------------------------------------------------------- the table


def _table(record: SaeRecord, asked: Asked, codes: PlaceCodes, step: int | None) -> list[int]:
    """The features that say the most, and which of them are ticked."""
    turn, begin = _begin(record, asked, step)
    shown = feature_rows(record, codes, step, begin)
    if shown.empty:
        st.info("No feature fires on this image.", icon=":material/info:")
        return []
    features = shown["feature"].tolist()
    ticked = [features.index(feature) for feature in begin] or [0]
    column = st.column_config
    rows = st.dataframe(
        shown,
        hide_index=True,
        height=min(440, 38 + 46 * len(shown)),
        row_height=46,
        column_config={
            "map": column.ImageColumn("Where", width=60),
            "feature": column.NumberColumn("Feature", format="%d", width=75),
            "label": column.TextColumn("Label", width=170, help="Yours, else the automatic one"),
            "mean": column.NumberColumn(
                "Mean", format="%.3g", width=75, help="Mean activation over all places"
            ),
            "max": column.NumberColumn("Largest", format="%.3g", width=75),
            "share": column.NumberColumn(
                "Places", format="%.0f %%", width=75, help="Share of the places where it fires"
            ),
        },
        key=f"explore_table_{turn}",
        on_select="rerun",
        selection_mode="multi-row",
        selection_default={"selection": {"rows": ticked}},
        alt="Features of the image",
    )["selection"]["rows"]  # fmt: skip
    with st.popover("A feature by its number", icon=":material/search:"):
        st.number_input("Feature", 0, None, 0, key="explore_number")
        st.button("Show its map", on_click=_also, type="primary")
    chosen = [features[row] for row in rows if row < len(features)][:MOST_MAPS]
    st.session_state[STATE]["now"] = tuple(chosen)
    st.query_params["f"] = st.session_state[FEATURES] = ",".join(map(str, chosen))
    return chosen


def _begin(record: SaeRecord, asked: Asked, step: int | None) -> tuple[int, tuple[int, ...]]:
    """A number of the table, another one where its rows are others, and what is ticked at first.

    What was ticked is ticked again where only prompt or step changed.
    """
    shown, wanted = (record.name, asked, step), st.session_state.pop(WANTED, None)
    state = st.session_state.setdefault(STATE, {"shown": None, "turn": 0, "begin": (), "now": ()})
    if wanted is not None or state["shown"] != shown:
        same = state["shown"] is not None and state["shown"][0] == record.name
        state["begin"] = wanted if wanted is not None else state["now"] if same else ()
        state["shown"], state["turn"] = shown, state["turn"] + 1
    n_features = live_images.sae_of(record).config.d_sae
    too_large = [feature for feature in state["begin"] if feature >= n_features]
    if too_large:
        state["begin"] = state["now"] = ()
        raise UserError(f"{record.name} has no feature {too_large[0]}, only 0 to {n_features - 1}.")
    return state["turn"], state["begin"]


def _also() -> None:
    """Add the feature whose number was typed to those that are shown."""
    now = st.session_state[STATE]["now"]
    wanted = (int(st.session_state["explore_number"]), *now)
    st.session_state[WANTED] = tuple(dict.fromkeys(wanted))[:MOST_MAPS]


def feature_rows(
    record: SaeRecord, codes: PlaceCodes, step: int | None, also: Collection[int]
) -> pd.DataFrame:
    """The rows of the table: the strongest features, and those asked for wherever they stand.

    Columns `map` (a picture), `feature`, `label` (where there are labels), `mean`, `max`, `share`
    (per cent of the places).
    """
    assert codes.image is not None, "codes on a page come with their image"
    every = codes.strongest(codes.indices.numel(), step)
    rest, silent = every.iloc[LISTED:], [f for f in also if f not in set(every["feature"])]
    nothing = pd.DataFrame({"feature": silent, "mean": 0.0, "max": 0.0, "share": 0.0})
    parts = [every.head(LISTED), rest[rest["feature"].isin(also)], nothing]
    found = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    found["share"] *= 100
    names = data.labels(record)
    if names:
        found.insert(1, "label", [names.get(feature, "") for feature in found["feature"]])
    small = image_views.shrunk(codes.image, THUMBNAIL)
    maps = (
        image_views.overlay(small, heat(codes, feature, step), opacity=0.75, pixels=THUMBNAIL)
        for feature in found["feature"]
    )
    found.insert(0, "map", [image_views.data_url(one) for one in maps])
    return found


# --------------------------------------------------------------------------------------- the maps


def _maps(
    record: SaeRecord, asked: Asked, codes: PlaceCodes, chosen: Sequence[int], step: int | None
) -> None:
    """The image under the map of each chosen feature; alone where none is chosen."""
    assert codes.image is not None, "codes on a page come with their image"
    if not chosen:
        st.html(_layers(codes.image, None, asked.prompt))
        st.caption("Tick a row of the table to see where the feature fires.")
        return
    across = 1 if len(chosen) == 1 else 2
    columns = st.columns(across)
    for place, feature in enumerate(chosen):
        with columns[place % across]:
            values = heat(codes, feature, step)
            st.html(_layers(codes.image, values, asked.prompt))
            whose = f"feature {feature} on this image"
            st.html(tiles.heat_scale_html(float(values.max()), whose=whose))
            with st.container(horizontal=True):
                components.feature_link(record, feature)
                paint_link(record, feature, asked)


def _layers(image: UInt8[Tensor, "h w 3"], values: Float[Tensor, "gh gw"] | None, alt: str) -> str:
    """An image and a map over it, as HTML."""
    height, width, _ = image.shape
    pixels = None
    if values is not None:
        pixels = tiles.heat_pixels(values.numpy(), float(values.max()))
    return tiles.layered_html(image_views.data_url(image), pixels, size=(height, width), alt=alt)


def paint_link(record: SaeRecord, feature: int, asked: Asked) -> None:
    """A link to painting with a feature on this image."""
    query = components.feature_address(record, feature) | asked.address
    st.page_link(
        "pages/paint.py", label=":primary[Paint with it]", icon="", query_params=query
    )  # fmt: skip


def _downloads(
    record: SaeRecord,
    asked: Asked,
    codes: PlaceCodes,
    chosen: Sequence[int],
    step: int | None,
    opacity: float,
) -> None:
    assert codes.image is not None, "codes on a page come with their image"
    image, name = codes.image, f"{slug(asked.prompt) or 'nothing'}-seed{asked.seed}"
    with st.container(horizontal=True):
        st.download_button(
            "Image", png(image), f"{name}.png", "image/png", on_click="ignore",
            icon=":material/download:",
        )  # fmt: skip
        if chosen:
            st.download_button(
                "With map",
                lambda: png(
                    image_views.overlay(image, heat(codes, chosen[0], step), opacity=opacity)
                ),
                f"{name}-feature{chosen[0]}.png", "image/png", on_click="ignore",
                icon=":material/download:",
            )  # fmt: skip
        st.download_button(
            "Codes", lambda: codes.table().to_csv(index=False).encode(),
            f"{name}-{slug(record.run.config['site'])}.csv", "text/csv", on_click="ignore",
            icon=":material/download:", help="Every code that is not 0, as CSV.",
        )  # fmt: skip


# ------------------------------------------------------------------------------------- all blocks


def _blocks(record: SaeRecord, asked: Asked, step: int | None) -> None:
    """One SAE of each block side by side: where its strongest feature fires, and which follow."""
    same = data.saes_of_model(record)
    if len({one.run.config["site"] for one in same}) < 2:
        return
    if not st.toggle("All blocks side by side", key="explore_blocks"):
        return
    names = {one.name: one for one in same}
    first = {one.run.config["site"]: one.name for one in reversed(same)}
    first[record.run.config["site"]] = record.name
    chosen = st.multiselect(
        "SAEs", list(names), default=[first[site] for site in sorted(first)][:MOST_BLOCKS],
        max_selections=MOST_BLOCKS, key="explore_block_saes",
    )  # fmt: skip
    if not chosen:
        return
    for column, name in zip(st.columns(len(chosen)), chosen, strict=True):
        with column, components.one_sentence_errors():
            _block(names[name], asked, step)


def _block(record: SaeRecord, asked: Asked, step: int | None) -> None:
    codes = live_images.codes(record, asked)
    strongest = codes.strongest(NAMED, step)
    st.markdown(f"**{record.run.config['site']}**")
    if codes.image is None or strongest.empty:
        st.caption("No feature fires on this image.")
        return
    first = int(strongest["feature"].iloc[0])
    st.html(_layers(codes.image, heat(codes, first, step), f"Where feature {first} fires"))
    st.caption(record.name)
    names = data.labels(record)
    for row in strongest.to_dict("records"):
        feature = int(row["feature"])
        label = names.get(feature, "")
        said = f" {views.markdown(label)}" if label else ""
        st.page_link(
            "pages/explore.py",
            label=f":primary[{feature}]{said} :small[{views.number(row['mean'])}]",
            icon="",
            query_params={"sae": record.name, "f": str(feature)} | asked.address,
        )
