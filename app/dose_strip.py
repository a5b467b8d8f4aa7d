"""Dose strips: a row of images over strengths, and how far each moved from the model's own."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from app import components, image_views, live_steering, views
from app.data import SaeRecord
from app.drawings import png
from app.image_input import Asked
from probe.diffusion import DrawConfig
from saes.drawing import Drawn
from saes.recipe_making import feature_recipe
from saes.recipes import Strength, to_json

WAYS = {"modulate": "Modulate", "add": "Add everywhere"}
EXPLAINED = (
    "Modulate: its code at each place, times 1 + the strength, so that the image changes where the "
    "feature fires. Add everywhere: the strength times its mean, at all places."
)
MOST_IMAGES = 9
LIMIT = 1000.0
"""Largest strength that can be asked for."""


@components.panel
def of_feature(record: SaeRecord, feature: int, asked: Asked, fires: Float[Tensor, "h w"]) -> None:
    """The strip of a feature.

    Args:
        record: its SAE.
        feature: its number.
        asked: the image.
        fires: 1 at the places where it fires, which its change is measured inside and outside of.
    """
    with st.expander(f"Dose strip of feature {feature}", icon=":material/gradient:"):
        way = components.choice("How", WAYS, key="dose_way", explained=EXPLAINED)
        strengths = _strengths("dose", -10.0, 10.0)
        shown = (record.name, feature, asked, way, strengths)
        if st.button("Draw the row", key="dose_draw", icon=":material/gradient:"):
            with st.spinner("Drawing ..."):
                drawn = live_steering.doses(
                    feature_document(record, feature, asked, way), None, asked.prompt, asked.seed,
                    strengths,
                )  # fmt: skip
                size = (drawn.before.shape[1], drawn.before.shape[2])
                where = functional.interpolate(fires[None, None], size=size)[0, 0]
                strip = _strip(replace(drawn, mask=where), strengths)
            st.session_state["dose_strip"] = (shown, strip)
        _show("dose_strip", shown, "where it fires", "elsewhere")


@components.panel
def of_recipe(document: Mapping[str, Any], folder: Path | None, asked: Asked) -> None:
    """The strip of a recipe: every strength in it multiplied."""
    with st.expander("Dose strip of the recipe", icon=":material/gradient:"):
        times = _strengths("recipe_dose", 0.0, 2.0)
        shown = (repr(document), asked, times)
        if st.button("Draw the row", key="recipe_dose_draw", icon=":material/gradient:"):
            with st.spinner("Drawing ..."):
                drawn = live_steering.doses(document, folder, asked.prompt, asked.seed, times)
            st.session_state["recipe_dose_strip"] = (shown, _strip(drawn, times))
        _show("recipe_dose_strip", shown, "inside the mask", "outside")


def feature_document(record: SaeRecord, feature: int, asked: Asked, way: str) -> dict[str, Any]:
    """The recipe that is a feature's strip once its strength is multiplied.

    Raises as `feature_recipe` does.
    """
    adds = way == "add"
    # A scale's factor f becomes 1 + times (f - 1): times is then the strength itself.
    strength = Strength(value=1.0, unit="mean") if adds else Strength(value=2.0)
    recipe = feature_recipe(
        record.run, feature, op="add" if adds else "scale", strength=strength,
        draw=DrawConfig(**asked.draw),
    )  # fmt: skip
    return to_json(recipe)


def _strengths(key: str, low: float, high: float) -> tuple[float, ...]:
    """The strengths of the row, evenly spread between two that a person gives."""
    with st.container(horizontal=True):
        first = st.number_input(
            "From", -LIMIT, LIMIT, low, 1.0, format="%g", key=f"{key}_from", width=120
        )
        last = st.number_input(
            "To", -LIMIT, LIMIT, high, 1.0, format="%g", key=f"{key}_to", width=120
        )
        images = st.number_input("Images", 2, MOST_IMAGES, 5, key=f"{key}_images", width=120)
    return tuple(float(f"{one:.4g}") for one in np.linspace(first, last, int(images)))


def _strip(drawn: Drawn, strengths: tuple[float, ...]) -> list[dict[str, Any]]:
    """What the page shows of each image: the picture as a file, and how far it moved."""
    rows = drawn.moved().to_dict("records")
    return [
        {**row, "strength": strength, "png": png(image_views.enlarged(picture, 256), pixels=256)}
        for row, strength, picture in zip(rows, strengths, drawn.after, strict=True)
    ]


def _show(key: str, shown: tuple, inside: str, outside: str) -> None:
    before, strip = st.session_state.get(key, (None, []))
    if not strip:
        return
    if before != shown:
        st.caption("The row below was drawn with other settings; draw it again for these.")
    with st.container(key=key):
        for column, row in zip(st.columns(len(strip), gap="small"), strip, strict=True):
            with column:
                strength = views.number(row["strength"])
                st.image(row["png"], width="stretch", alt=f"Strength {strength}")
                st.html(
                    f'<div style="text-align:center"><b>{strength}</b></div>'
                    + views.facts_html(
                        {
                            "moved": views.number(row["whole"]),
                            inside: views.number(row["inside"]),
                            outside: views.number(row["outside"]),
                        }
                    )
                )
    st.caption(
        "Moved: the mean of |after \N{MINUS SIGN} before| over pixels and channels, in levels of 0 "
        "to 255."
    )
