"""The painting of a session: a recipe's document, and which layer of it is painted on."""

from pathlib import Path

import streamlit as st

from app.data import SaeRecord
from app.image_input import Asked, ask_next
from app.paint_layers import Document, asked_of, new_layer, new_painting, unpainted
from probe.errors import UserError

RECIPE, FOLDER, ROUND, LAYER = "paint_recipe", "paint_folder", "paint_round", "paint_layer"
"""Where it is: the document, its folder, a number that another document changes, the layer."""


def put(document: Document, folder: Path | None, layer: int | None = None) -> None:
    """Make a document the painting; widgets forget what they showed.

    Raises `UserError` where it is a recipe of texts.
    """
    if "draw" not in document:
        raise UserError(f"the recipe {document['name']!r} is of texts; open it on the page Steer.")
    st.session_state[RECIPE], st.session_state[FOLDER] = document, folder
    st.session_state[ROUND] = st.session_state.get(ROUND, 0) + 1
    st.session_state[LAYER] = len(document["edits"]) - 1 if layer is None else layer


def take(document: Document, folder: Path | None) -> None:
    """Go on with a recipe from a file, on the image that it was made on. Raises as `put`."""
    put(document, folder)
    if (image := asked_of(document)) is not None:
        ask_next(image)


def paint_with(record: SaeRecord, feature: int, image: Asked) -> None:
    """A new layer where something is painted with an SAE of this model, else a new painting."""
    document = st.session_state.get(RECIPE)
    begun = new_painting(record, feature, image)
    if document is None or document["model"] != begun["model"]:
        put(begun, None)
        return
    empty = unpainted(document)
    edits = [edit for number, edit in enumerate(document["edits"]) if number not in empty]
    if not edits:
        put(begun, None)
        return
    document["edits"] = [*edits, new_layer(document, record, feature, image)]
    put(document, st.session_state[FOLDER])


def add_layer(record: SaeRecord, feature: int, image: Asked) -> None:
    """One more layer, on top of the others."""
    document = st.session_state[RECIPE]
    document["edits"].append(new_layer(document, record, feature, image))
    put(document, st.session_state[FOLDER])


def remove_layer(number: int) -> None:
    """The same without a layer."""
    document = st.session_state[RECIPE]
    del document["edits"][number]
    put(document, st.session_state[FOLDER], max(number - 1, 0))
