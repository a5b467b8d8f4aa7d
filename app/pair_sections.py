"""The sections of the page Compare prompts. Imports the model libraries: used once both images are
drawn."""

from dataclasses import dataclass, replace
from typing import Any, cast

import pandas as pd
import streamlit as st
from jaxtyping import UInt8
from torch import Tensor

from app import (
    components,
    data,
    image_views,
    live_images,
    live_steering,
    live_transport,
    recipe_shelf,
    views,
)
from app import mask_canvas as canvas
from app.data import SaeRecord
from app.drawings import png
from app.mask_canvas import Rows
from app.paint_layers import filled
from app.pair_input import Aggregate, AskedPair
from probe.errors import UserError

METHODS = {"features": "Features", "updates": "Whole updates", "neurons": "Neurons"}
METHODS_HELP = (
    "Features: codes of the chosen features. Beside it two baselines: whole updates (activation "
    "steering) and neurons (the GEGLU outputs inside the blocks, chosen by the same score)."
)
SIDES = {"source": "Prompt that gives", "target": "Prompt that is drawn again"}
PLACES = {"all": "All places", "painted": "Painted places"}
LISTED = 40
RESULT = "pair_result"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How features are transported."""

    k: int
    """Features added, and removed, of all blocks together."""
    m: float
    """How many times."""
    aggregate: Aggregate
    """What scores are made of."""
    only_add: bool
    """Remove nothing."""
    n_neurons: int
    """Neurons added, and removed, by the baseline of neurons."""


@components.panel
def pair(records: tuple[SaeRecord, ...], asked: AskedPair) -> None:
    """Both images, the features that tell them apart, and what comes of transporting them."""
    asked = _images(records, asked)
    methods, settings = _settings(records, asked)
    with components.one_sentence_errors():
        added, removed = _sets(records, asked, settings)
        if st.button("Transport", type="primary", icon=":material/move_down:", key="pair_go"):
            recipes = _recipes(records, asked, methods, settings, added, removed)
            st.session_state[RESULT] = _results(records, asked, recipes)
        if RESULT in st.session_state:
            _shown(asked, st.session_state[RESULT])


# ------------------------------------------------------------------------------------- both images


def _images(records: tuple[SaeRecord, ...], asked: AskedPair) -> AskedPair:
    """Both images, and the places that are meant in each; gives the pair with its masks."""
    masks: dict[str, Rows | None] = {}
    for column, side in zip(st.columns(2, gap="large"), SIDES, strict=True):
        with column:
            image = asked.source_image if side == "source" else asked.target
            st.subheader(SIDES[side], anchor=False)
            st.caption(views.markdown(image.prompt) or "(empty)")
            places = components.choice("Places", PLACES, key=f"pair_places_{side}")
            found = live_images.seen(records[0], image)
            if places == "all":
                st.image(png(image_views.enlarged(found.image)), width=380, alt=image.prompt)
                masks[side] = None
            else:
                masks[side] = _mask(found, side)
    return replace(asked, source_mask=masks["source"], target_mask=masks["target"])


def _mask(found: live_images.Seen, side: str) -> Rows:
    """The places painted on one of the images, on the finest grid of the blocks."""
    grid = max(found.grids.values())
    return canvas.mask_canvas(
        image_views.data_url(found.image),
        filled(grid, 0.0),
        size=(found.image.shape[0], found.image.shape[1]),
        key=f"pair_mask_{side}_{grid}",
        label=f"Mask on the image of the {SIDES[side].lower()}; arrow keys move, space paints",
    )


def _settings(records: tuple[SaeRecord, ...], asked: AskedPair) -> tuple[list[str], Settings]:
    """The methods that are tried, and how."""
    widths = [live_images.sae_of(record).config.d_sae for record in records]
    most = sum(widths) // 2
    aggregate, n_neurons = "first", 1
    with st.container(horizontal=True, vertical_alignment="bottom"):
        chosen = st.segmented_control(
            "By", list(METHODS), format_func=METHODS.__getitem__, selection_mode="multi",
            default=["features"], key="pair_methods", help=METHODS_HELP, width="content",
        )  # fmt: skip
        # As published: 80 to 640 of 20,480 features, 5,000 to 80,000 of 204,800 neurons.
        k = st.number_input(
            "Features", 1, most, max(1, sum(widths) // 100), key=f"pair_k_{most}", width=150,
            help="How many are added, and how many removed, of all blocks together.",
        )  # fmt: skip
        if "neurons" in chosen:
            every = live_transport.n_neurons(records)
            n_neurons = st.number_input(
                "Neurons", 1, every // 2, max(1, every // 20), key=f"pair_neurons_{every}",
                width=150,
            )  # fmt: skip
        m = st.slider("Strength", 0.0, 4.0, 1.0, 0.25, key="pair_m", width=200)
        only_add = st.toggle("Only add", key="pair_only_add", help="Remove nothing.")
        if asked.target.steps > 1 and st.toggle(
            "Scores of all steps", key="pair_aggregate", help="Else of the first step alone."
        ):
            aggregate = "mean"
    return list(chosen), Settings(
        k=int(k), m=float(m), aggregate=cast(Aggregate, aggregate), only_add=only_add,
        n_neurons=int(n_neurons),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- features


def _sets(
    records: tuple[SaeRecord, ...], asked: AskedPair, settings: Settings
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The features to add and to remove: the k of largest and smallest score, as ticked."""
    scores = live_transport.scores(records, asked, settings.aggregate)
    sets = []
    titles = {"add": ("Added", "source"), "remove": ("Removed", "target")}
    for column, (kind, (title, side)) in zip(
        st.columns(2, gap="large"), titles.items(), strict=True
    ):
        ordered = scores if kind == "add" else scores.iloc[::-1]
        with column:
            st.subheader(title, anchor=False)
            if kind == "remove" and settings.only_add:
                st.caption("Nothing is removed.")
                sets.append(ordered.head(0))
            else:
                st.caption(f"More in the {SIDES[side].lower()}; ticked ones are transported.")
                sets.append(_ticked(records, asked, ordered, settings, kind))
    return sets[0], sets[1]


def _ticked(
    records: tuple[SaeRecord, ...],
    asked: AskedPair,
    ordered: pd.DataFrame,
    settings: Settings,
    kind: str,
) -> pd.DataFrame:
    """A list of features, the first k of them ticked; what is ticked, and the k beyond the list."""
    listed = ordered.head(LISTED)
    known = {record.run.config["site"]: record for record in records}
    names = {site: data.labels(record) for site, record in known.items()}
    shown = listed.assign(
        source=100 * listed["source"], target=100 * listed["target"], score=100 * listed["score"]
    )
    if any(names.values()):
        labels = [names[row["site"]].get(row["feature"], "") for row in listed.to_dict("records")]
        shown.insert(2, "label", labels)
    column = st.column_config
    share = {"format": "%.2f %%", "width": 75}
    rows = st.dataframe(
        shown,
        hide_index=True,
        height=300,
        column_config={
            "site": column.TextColumn("Block", width=70),
            "feature": column.NumberColumn("Feature", format="%d", width=70),
            "label": column.TextColumn("Label", width=140),
            "source": column.NumberColumn("Gives", help="Share of all codes there", **share),
            "target": column.NumberColumn("Again", help="Share of all codes there", **share),
            "score": column.NumberColumn("Score", help="The difference", **share),
        },
        key=f"pair_{kind}_{_turn(records, asked, settings)}",
        on_select="rerun",
        selection_mode="multi-row",
        selection_default={"selection": {"rows": list(range(min(settings.k, LISTED)))}},
        alt=f"Features to {kind}",
    )["selection"]["rows"]
    beyond = ordered.iloc[LISTED : settings.k]
    if len(beyond):
        st.caption(f"{len(beyond):,} further features beyond this list are among them.")
    return pd.concat([listed.iloc[[row for row in rows if row < len(listed)]], beyond])


def _turn(records: tuple[SaeRecord, ...], asked: AskedPair, settings: Settings) -> int:
    """A number that is another one where the lists have other rows, or k is another."""
    shown = ([record.name for record in records], asked, settings.k, settings.aggregate)
    if st.session_state.get("pair_listed") != shown:
        st.session_state["pair_listed"] = shown
        st.session_state["pair_turn"] = st.session_state.get("pair_turn", 0) + 1
    return st.session_state["pair_turn"]


# --------------------------------------------------------------------------------------- the result


def _recipes(
    records: tuple[SaeRecord, ...],
    asked: AskedPair,
    methods: list[str],
    settings: Settings,
    added: pd.DataFrame,
    removed: pd.DataFrame,
) -> dict[str, dict[str, Any]]:
    """The recipe of each method that is tried."""
    if not methods:
        raise UserError("no way of transporting is chosen; choose features, updates or neurons.")
    m, only_add = settings.m, settings.only_add
    made = {
        "features": lambda: live_transport.features(records, asked, added, removed, m=m),
        "updates": lambda: live_transport.updates(records, asked, m=m, only_add=only_add),
        "neurons": lambda: live_transport.neurons(
            records, asked, k=settings.n_neurons, m=m, aggregate=settings.aggregate,
            only_add=only_add,
        ),
    }  # fmt: skip
    with st.spinner("Reading ..."):
        return {method: made[method]() for method in METHODS if method in methods}


def _results(
    records: tuple[SaeRecord, ...], asked: AskedPair, recipes: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What the page shows of each method: the image as a file, and how far it is from both."""
    source = live_images.seen(records[0], asked.source_image).image
    target = live_images.seen(records[0], asked.target).image
    results: dict[str, Any] = {"asked": asked, "apart": _apart(source, target), "methods": {}}
    for method, document in recipes.items():
        with st.spinner(f"Drawing: {METHODS[method].lower()} ..."):
            drawn = live_steering.drawn(document, None, asked.target.prompt, asked.target.seed)
        results["methods"][method] = {
            "document": document,
            "picture": png(image_views.enlarged(drawn.after[0])),
            "moved": drawn.moved().to_dict("records")[0],
            "from_source": _apart(drawn.after[0], source),
        }
    return results


def _apart(one: UInt8[Tensor, "h w 3"], other: UInt8[Tensor, "h w 3"]) -> float:
    """The mean difference of two images over pixels and channels, in levels of 0 to 255."""
    return float((one.double() - other.double()).abs().mean())


def _shown(asked: AskedPair, result: dict[str, Any]) -> None:
    """The images that came of it, each with its distances and its recipe."""
    if result["asked"] != asked:
        st.caption("Below is an earlier transport; press Transport for this one.")
    with st.container(key="pair_results"):
        columns = st.columns(max(3, len(result["methods"])), gap="medium")
        for column, (method, one) in zip(columns, result["methods"].items(), strict=False):
            with column:
                st.subheader(METHODS[method], anchor=False)
                st.image(one["picture"], width="stretch", alt=f"After: {METHODS[method]}")
                facts = {
                    "moved": views.number(one["moved"]["whole"]),
                    "inside the masks": views.number(one["moved"]["inside"]),
                    "outside": views.number(one["moved"]["outside"]),
                    "from the image that gives": views.number(one["from_source"]),
                }
                st.html(views.facts_html({k: v for k, v in facts.items() if v != views.DASH}))
                recipe_shelf.keep(one["document"], key=f"pair_{method}")
    st.caption(
        f"Mean differences over pixels and channels, in levels of 0 to 255; the two images are "
        f"{views.number(result['apart'])} apart."
    )
