"""Paint: put features where a person wants them in an image, layer by layer, before and after."""

from pathlib import Path

import streamlit as st

from app import components, dashboard, data, image_input, paint_state, recipe_shelf
from app.paint_layers import Document, new_painting
from app.paint_state import RECIPE
from probe.errors import UserError


def show() -> None:
    """Draw the page."""
    components.heading(
        "Paint",
        "Choose a feature, paint where it should be, and see the image before and after. Several "
        "layers make one recipe, a file that the shell and notebooks run as well.",
    )
    records = data.image_saes()
    components.elsewhere(of_images=True)
    if not records:
        components.no_sae([], of_images=True)
        return
    _begin(records)
    document = st.session_state[RECIPE]
    record = _first_record(document, records)
    asked = image_input.asked(record)
    with st.expander("Saved recipes", icon=":material/folder_open:"):
        recipe_shelf.pick(of_images=True, key="paint", take=_take)
    if asked is None:
        st.info("Press Draw to see an image to paint on.", icon=":material/brush:")
        return
    with components.one_sentence_errors():
        with st.spinner("Drawing ..."):
            from app import live_images, paint_sections

            live_images.seen(record, asked)
        image_input.show_address(asked)
        paint_sections.painting(record, asked)


def _begin(records: list[data.SaeRecord]) -> None:
    """Start from what the address names (`?sae=&feature=` or `?recipe=`), once."""
    asked = {name: st.query_params.get(name) for name in ("sae", "feature", "recipe")}
    if RECIPE in st.session_state and st.session_state.get("paint_asked") == asked:
        return
    st.session_state["paint_asked"] = asked
    if asked["sae"]:
        data.sae_record(asked["sae"])
    names = {record.name: record for record in records}
    record = names.get(asked["sae"] or st.session_state.get("chosen_sae", ""), records[0])
    image = image_input.begins_with(record)
    if asked["recipe"] is not None:
        paint_state.take(*recipe_shelf.read(data.recipe_path(asked["recipe"])))
    elif asked["feature"] is not None and asked["sae"] in (None, record.name):
        if not asked["feature"].isdecimal():
            raise UserError(f"feature {asked['feature']!r} is not a number; they count from 0.")
        paint_state.paint_with(record, int(asked["feature"]), image)
    elif RECIPE not in st.session_state:
        alive = 0 if record.index is None else data.feature_index(record).random_alive(0)
        paint_state.put(new_painting(record, alive, image), None)


def _first_record(document: Document, records: list[data.SaeRecord]) -> data.SaeRecord:
    """An SAE of the recipe's model. Raises `UserError` where there is none."""
    for record in records:
        model = record.run.config["model"]
        named = {"spec": model["spec"], "random_weights": model.get("random_weights")}
        if named == document["model"]:
            return record
    spec = document["model"]["spec"]
    del st.session_state[RECIPE]
    raise UserError(
        f"the recipe {document['name']!r} is for the model {spec}, of which no SAE is below "
        f"{data.artifact_root()}; train one, or copy the recipe's own there."
    )


def _take(document: Document, folder: Path | None) -> None:
    """Go on with a recipe that was chosen."""
    paint_state.take(document, folder)
    st.rerun()


if __name__ == "__main__":
    dashboard.enter(show)
