"""The sections of the page Paint. Imports the model libraries: used once an image is drawn."""

import copy
from typing import Any

import pandas as pd
import streamlit as st

from app import (
    components,
    data,
    dose_strip,
    feature_icon,
    image_views,
    live_images,
    live_steering,
    paint_layers,
    paint_state,
    recipe_shelf,
    tiles,
    views,
)
from app.data import SaeRecord
from app.drawings import png
from app.image_input import Asked
from app.mask_canvas import Rows, mask_canvas, rectangle
from app.paint_layers import MOST, Document
from app.paint_state import FOLDER, LAYER, RECIPE, ROUND
from app.recipe_editor import UNITS
from probe.errors import UserError
from saes.recipe_saes import feature_size

RESULT, VERSION = "paint_result", "paint_version"
ROWS = {
    "opposed": "added where the prompt is read, taken off where nothing is",
    "conditional": "added where the prompt is read",
    "both": "added to both",
}
UNIT_HELP = (
    "x mean, x max, x sd: times the feature's mean, largest or standard deviation where it fires; "
    "raw: the activation itself."
)


@components.panel
def painting(record: SaeRecord, asked: Asked) -> None:
    """The layers, the image that they are painted on, and what comes of it."""
    document = paint_layers.drawn_as(st.session_state[RECIPE], asked)
    records = data.saes_of_model(record)
    left, right = st.columns([5, 6], gap="large")
    with right:
        number = _choose_layer(document, record, asked)
        edit = document["edits"][number]
        brush = _layer(document, number, records, asked)
    with left:
        if brush is not None:
            edit["positions"] = paint_layers.positions_of(_mask(document, number, brush, asked))
    document = paint_layers.drawn_as(document, asked)
    st.session_state[RECIPE] = document
    with right:
        st.html(views.table_html(layer_table(document), words=("changes", "places")))
        pressed = st.button("Apply", type="primary", icon=":material/brush:", key="paint_apply")
    with components.one_sentence_errors():
        if pressed:
            st.session_state[RESULT] = _applied(document, asked)
        if RESULT in st.session_state:
            _before_and_after(document, asked)
            dose_strip.of_recipe(document, st.session_state[FOLDER], asked)
    _keep(document)


# -------------------------------------------------------------------------------------- the layers


def _choose_layer(document: Document, record: SaeRecord, asked: Asked) -> int:
    """Which layer is painted on."""
    turn, edits = st.session_state[ROUND], document["edits"]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        chosen = st.segmented_control(
            "Layer", range(len(edits)), format_func=lambda number: str(number + 1),
            default=min(st.session_state[LAYER], len(edits) - 1), required=True,
            key=f"paint_layer_{turn}",
        )  # fmt: skip
        st.session_state[LAYER] = chosen
        last = next((e for e in reversed(edits) if paint_layers.is_painted(e)), None)
        feature = 0 if last is None else last["target"]["feature"]
        st.button(
            "Add", on_click=paint_state.add_layer, args=(record, feature, asked),
            icon=":material/add:", type="tertiary", help="One more feature on the same image.",
        )  # fmt: skip
        st.button(
            "Remove", on_click=paint_state.remove_layer, args=(chosen,), type="tertiary",
            icon=":material/delete:", disabled=len(edits) < 2,
        )  # fmt: skip
    return chosen


def _layer(
    document: Document, number: int, records: list[SaeRecord], asked: Asked
) -> SaeRecord | None:
    """The form of a layer, which changes its edit; gives its SAE, None where it is not painted."""
    edit, key = document["edits"][number], f"paint_{st.session_state[ROUND]}_{number}"
    if not paint_layers.is_painted(edit):
        st.markdown(
            f"This layer is no painting: op `{edit['op']}` of "
            f"{views.markdown(paint_layers.target_words(edit))}. It is run as it is."
        )
        return None
    brush = paint_layers.record_of(document, edit, records)
    if brush is None:
        name = document["saes"][edit["target"]["sae"]]["name"]
        st.warning(f"The SAE of this layer, {name}, is not in {data.artifact_root()}.")
        return None
    names = {one.name: one for one in records}
    first = st.columns([5, 2], vertical_alignment="bottom")
    chosen = first[0].selectbox(
        "SAE (its block is where it paints)", list(names), index=list(names).index(brush.name),
        key=f"{key}_sae",
    )  # fmt: skip
    brush = names[chosen]
    feature = int(
        first[1].number_input("Feature", 0, None, edit["target"]["feature"], key=f"{key}_feature")
    )
    if (chosen, feature) != _brush_of(document, edit, records):
        edit["site"] = brush.run.config["site"]
        edit["target"] = {"feature": feature, "sae": paint_layers.sae_key(document, brush)}
    words, picture = st.columns([5, 2])
    with words:
        _strength(edit, brush, key)
        _when(edit, asked, key)
    with picture:
        _icon(brush, feature, asked)
    return brush


def _brush_of(
    document: Document, edit: Document, records: list[SaeRecord]
) -> tuple[str, int] | None:
    found = paint_layers.record_of(document, edit, records)
    return None if found is None else (found.name, edit["target"]["feature"])


def _strength(edit: Document, brush: SaeRecord, key: str) -> None:
    known, feature = edit["strength"], edit["target"]["feature"]
    unknown = "statistics" not in edit["target"] and _no_size(brush, feature)
    units = ["raw"] if unknown else list(UNITS)
    unit = known["unit"] if known["unit"] in units else "raw"
    value_at, unit_at = st.columns([3, 2], vertical_alignment="bottom")
    unit = unit_at.selectbox(
        "Unit", units, index=units.index(unit), format_func=UNITS.__getitem__,
        key=f"{key}_unit_{len(units)}", help=UNIT_HELP,
    )  # fmt: skip
    value = float(known["value"])
    if unit == "mean" and abs(value) <= MOST:
        value = value_at.slider("Strength", -MOST, MOST, value, 0.5, key=f"{key}_value")
    else:
        value = value_at.number_input(
            "Strength", value=value, step=1.0, format="%g", key=f"{key}_number"
        )
    edit["strength"] = {"value": value, "unit": unit}
    if unknown and brush.index is None:
        st.caption("Strengths in the feature's mean, and its icon, need an index of this SAE:")
        st.code(components.index_command(brush), language="bash")
    elif unknown:
        st.caption("This feature never fires, so it has no mean to give a strength in.")


def _no_size(brush: SaeRecord, feature: int) -> bool:
    """Whether a feature has no size to measure strengths in."""
    if feature >= live_images.sae_of(brush).config.d_sae:
        return False  # the recipe's own sentence says it when it is run
    try:
        feature_size(brush.run, feature, "mean")
    except UserError:
        return True
    return False


def _when(edit: Document, asked: Asked, key: str) -> None:
    """At which steps, and in which rows of a guided image."""
    if asked.steps > 1:
        first, end = edit["steps"] or (0, None)
        last = asked.steps if end is None else min(end, asked.steps)
        begin, stop = st.slider(
            "Steps", 1, asked.steps, (min(first + 1, last), last), key=f"{key}_steps_{asked.steps}",
            help="The first and the last denoising step at which it paints.",
        )  # fmt: skip
        edit["steps"] = None if (begin, stop) == (1, asked.steps) else [begin - 1, stop]
    else:
        edit["steps"] = None
    if asked.guided:
        edit["rows"] = st.selectbox(
            "With guidance", list(ROWS), format_func=ROWS.__getitem__, key=f"{key}_rows",
            index=list(ROWS).index(edit.get("rows", "conditional")),
        )  # fmt: skip
    else:
        edit.pop("rows", None)


def _icon(brush: SaeRecord, feature: int, asked: Asked) -> None:
    """What the feature stands for: nothing asked for, and the block says the feature alone."""
    if not st.toggle("Icon", value=True, key="paint_icon", help=(
        "The empty prompt, with the block's update replaced by the feature: its mean times the "
        "number of features that are active at a place."
    )):  # fmt: skip
        return
    if _no_size(brush, feature):
        return
    try:
        url, height, width = feature_icon.icon(brush, feature, asked.draw)
    except UserError as error:
        st.caption(views.markdown(str(error)))
        return
    shown = tiles.layered_html(url, None, size=(height, width), alt=f"icon of feature {feature}")
    st.html(f'<div style="max-width:7rem">{shown}</div>')
    if label := data.labels(brush).get(feature):
        st.caption(views.markdown(label))


def layer_table(document: Document) -> pd.DataFrame:
    """The layers in words, a row each."""
    rows = []
    for number, edit in enumerate(document["edits"], 1):
        rows.append(
            {
                "layer": str(number),
                "block": edit["site"],
                "changes": paint_layers.target_words(edit),
                "strength": paint_layers.strength_words(edit),
                "places": _places(edit),
            }
        )
    return pd.DataFrame(rows)


def _places(edit: Document) -> str:
    if not isinstance(edit["positions"], dict):
        return "all"
    weights = [weight for row in next(iter(edit["positions"].values())) for weight in row]
    painted = sum(weight > 0 for weight in weights)
    return f"{painted} of {len(weights)}" if painted else "none painted yet"


# ---------------------------------------------------------------------------------------- the mask


def _mask(document: Document, number: int, brush: SaeRecord, asked: Asked) -> Rows:
    """The image with the layer's mask to paint on, and another way to paint by numbers."""
    found = live_images.seen(brush, asked)
    grid = found.grids[live_images.site_of(brush)]
    edit, turn = document["edits"][number], st.session_state[ROUND]
    mask = paint_layers.mask_of(edit, grid)
    shape, place = (len(mask), len(mask[0])), st.container()
    version = st.session_state.get(VERSION, 0)
    by_numbers = _by_numbers(mask, f"paint_{turn}_{number}_{shape}")
    if by_numbers is not None:
        mask, version = by_numbers, version + 1
        st.session_state[VERSION] = version
    others = [
        paint_layers.mask_of(other, shape)
        for i, other in enumerate(document["edits"])
        if i != number and paint_layers.is_painted(other)
    ]
    with place:
        return mask_canvas(
            image_views.data_url(found.image),
            mask,
            size=(found.image.shape[0], found.image.shape[1]),
            key=f"paint_mask_{turn}_{number}_{shape[0]}_{shape[1]}",
            label=f"Mask of layer {number + 1} on the image; arrow keys move, space paints",
            version=version,
            others=paint_layers.union([o for o in others if (len(o), len(o[0])) == shape]),
        )


def _by_numbers(mask: Rows, key: str) -> Rows | None:
    """A rectangle of places painted or erased by its numbers; None where nobody asked for one."""
    height, width = len(mask), len(mask[0])
    with st.popover("By numbers", icon=":material/grid_on:"):
        st.caption("Rows from the top and columns from the left, counted from 0, both included.")
        row, column = st.columns(2)
        top = row.number_input("First row", 0, height - 1, 0, key=f"{key}_top")
        bottom = row.number_input("Last row", 0, height - 1, height - 1, key=f"{key}_bottom")
        left = column.number_input("First column", 0, width - 1, 0, key=f"{key}_left")
        right = column.number_input("Last column", 0, width - 1, width - 1, key=f"{key}_right")
        paint, erase = st.columns(2)
        painted = paint.button("Paint it", key=f"{key}_paint", type="primary")
        erased = erase.button("Erase it", key=f"{key}_erase")
    if not painted and not erased:
        return None
    chosen = rectangle((height, width), (int(top), int(bottom)), (int(left), int(right)))
    weight = 1.0 if painted else 0.0
    return tuple(
        tuple(weight if inside else old for inside, old in zip(*rows, strict=True))
        for rows in zip(chosen, mask, strict=True)
    )


# -------------------------------------------------------------------------------------- the result


def _applied(document: Document, asked: Asked) -> dict[str, Any]:
    """What the page shows of the image before and after."""
    empty = paint_layers.unpainted(document)
    if empty:
        which = f"layer {empty[0] + 1}" if len(document["edits"]) > 1 else "the image"
        raise UserError(f"nothing is painted on {which} yet; paint some places, or press All.")
    with st.spinner("Drawing ..."):
        drawn = live_steering.drawn(document, st.session_state[FOLDER], asked.prompt, asked.seed)
    moved, (row,) = (
        image_views.change(drawn.before[0], drawn.after[0]),
        drawn.moved().to_dict("records"),
    )
    pictures = (drawn.before[0], drawn.after[0], moved[0])
    return {
        "document": copy.deepcopy(document),
        "pictures": [png(image_views.enlarged(picture)) for picture in pictures],
        "files": [png(picture) for picture in pictures[:2]],
        "moved": row,
        "largest": moved[1],
    }


def _before_and_after(document: Document, asked: Asked) -> None:
    """Both images, where they differ, and by how much inside and outside the mask."""
    result = st.session_state[RESULT]
    if result["document"] != document:
        st.caption("Below is an earlier painting; press Apply for this one.")
    row = result["moved"]
    with st.container(key="paint_result_images"):
        titles = ("Before", "After", "Change")
        captions = (
            "The model as it is",
            f"With {len(result['document']['edits'])} layer"
            f"{'' if len(result['document']['edits']) == 1 else 's'}",
            f"Brightest: {views.number(result['largest'])} levels of 255",
        )
        for column, title, said, picture in zip(
            st.columns(3, gap="medium"), titles, captions, result["pictures"], strict=True
        ):
            with column:
                st.subheader(title, anchor=False)
                st.image(picture, width="stretch", alt=title)
                st.caption(said)
    with st.container(horizontal=True):
        for name, value in (
            ("Moved inside the mask", row["inside"]),
            ("outside", row["outside"]),
            ("everywhere", row["whole"]),
        ):
            st.metric(name, views.number(value), border=True, help=(
                "The mean of |after \N{MINUS SIGN} before| over pixels and channels, in levels of "
                "0 to 255."
            ))  # fmt: skip
        for name, file in zip(("before", "after"), result["files"], strict=True):
            st.download_button(
                f"{name.capitalize()} (PNG)", file, f"{name}.png", "image/png", on_click="ignore",
                icon=":material/download:",
            )  # fmt: skip


def _keep(document: Document) -> None:
    """Name and save the recipe."""
    turn = st.session_state[ROUND]
    with st.container(border=True), st.container(horizontal=True, vertical_alignment="bottom"):
        document["name"] = st.text_input("Recipe", document["name"], key=f"paint_name_{turn}")
        document["note"] = st.text_input("Note", document["note"], key=f"paint_note_{turn}")
        with components.one_sentence_errors():
            recipe_shelf.keep(document, key="paint")
