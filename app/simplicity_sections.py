"""The page Simplicity: components, the drawn function, its complexity, and the map around it."""

from typing import Any, cast

import streamlit as st

from analyses.simplicity.networks import ACTIVATIONS, PRIORS, Activation, Architecture, Prior
from app import components, live_simplicity, simplicity_views
from app.live_simplicity import DEPTHS, PEERS, SCALES

NAMES: dict[Activation, str] = {
    "relu": "ReLU", "gelu": "GELU", "swish": "Swish", "selu": "SELU", "tanh": "tanh",
    "gaussian": "Gaussian", "sine": "sine", "fourier": "Fourier model, without a bias",
}  # fmt: skip
WIDTHS = (8, 16, 32, 64, 128, 256)
BIASES = (0.0, 0.25, 0.5, 1.0, 2.0)
PREFACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
START: dict[str, Any] = {
    "simplicity_depth": 3, "simplicity_scale": 4.0, "simplicity_draw": 0,
}  # fmt: skip
"""Where the controls begin that something else on the page moves too."""


def draw() -> None:
    """The page below its heading."""
    for key, value in START.items():
        st.session_state.setdefault(key, value)
    _move()
    chosen = _choice()
    _function(chosen)
    _map(chosen)


def _move() -> None:
    """Take over a cell of the map that was clicked, before the controls are drawn."""
    moved = st.session_state.pop("simplicity_moved", None)
    if moved is not None:
        st.session_state["simplicity_depth"], st.session_state["simplicity_scale"] = moved


def _choice() -> Architecture:
    """The kind of network."""
    first, second, third, fourth = st.columns([3, 3, 3, 4])
    activation = first.selectbox(
        "Activation", ACTIVATIONS, format_func=NAMES.__getitem__, key="simplicity_activation"
    )
    depth = second.select_slider("Hidden layers", DEPTHS, key="simplicity_depth")
    scale = third.select_slider(
        "Weight scale", SCALES, key="simplicity_scale", format_func="{:g}".format,
        help="1 is Glorot's. At every scale the weights are multiples of the same draws.",
    )  # fmt: skip
    with fourth:
        added = st.pills(
            "Components", ["layer norm", "residual", "gated"], selection_mode="multi",
            key="simplicity_components",
        )  # fmt: skip
    with st.expander("Width, biases, prefactor, law of the weights"):
        first, second, third, fourth = st.columns(4)
        width = first.select_slider("Width", WIDTHS, value=64, key="simplicity_width")
        bias = second.select_slider(
            "Size of the biases", BIASES, value=1.0, key="simplicity_bias",
            format_func="{:g}".format,
        )  # fmt: skip
        prefactor = third.select_slider(
            "Prefactor", PREFACTORS, value=1.0, key="simplicity_prefactor",
            format_func="{:g}".format, help="Multiplies what goes into each activation.",
        )  # fmt: skip
        prior = fourth.selectbox("Weights are drawn", PRIORS, key="simplicity_prior")
    return Architecture(
        activation=cast(Activation, activation), depth=int(depth), scale=float(scale),
        width=int(width), bias_scale=float(bias), prefactor=float(prefactor),
        prior=cast(Prior, prior), layer_norm="layer norm" in added, residual="residual" in added,
        gated="gated" in added,
    )  # fmt: skip


def _next_draw() -> None:
    st.session_state["simplicity_draw"] = (st.session_state["simplicity_draw"] + 1) % PEERS


def _function(chosen: Architecture) -> None:
    """The function beside its complexity among others of its kind."""
    left, right = st.columns([5, 6], gap="large")
    with left:
        first, second = st.columns([3, 2], vertical_alignment="bottom")
        number = first.number_input("Draw", 0, PEERS - 1, key="simplicity_draw")
        second.button("Next draw", on_click=_next_draw, width="stretch")
        values = live_simplicity.drawn(chosen, int(number)).numpy()
        components.chart(
            simplicity_views.function_figure(values), key="simplicity_function",
            name="The function on the square", own_colours=True,
        )  # fmt: skip
        st.caption("Both inputs run from -1 to 1. Blue is above the mean, rust below.")
    with right:
        with st.spinner("Measuring others of its kind ..."):
            peers = live_simplicity.peers(chosen)
        st.markdown(simplicity_views.reading(peers, int(number)))
        components.chart(
            simplicity_views.peers_figure(peers, int(number)), key="simplicity_peers",
            name="Complexity among draws of this kind", own_colours=True,
        )  # fmt: skip
        st.caption(
            f"The diamond among {PEERS} draws of the same kind, each measure from its least to its "
            f"greatest. {simplicity_views.shares(peers)}"
        )


def _map(chosen: Architecture) -> None:
    """Complexity by depth and scale; a click goes there."""
    st.subheader(f"{NAMES[chosen.activation]} by depth and weight scale", anchor=False)
    with st.spinner("Drawing networks of every depth and scale ..."):
        table = live_simplicity.depth_and_scale(chosen)
    clicked = components.clickable(
        simplicity_views.map_figure(table, chosen), key="simplicity_map",
        name="Complexity by depth and weight scale",
    )  # fmt: skip
    blank = " Where a cell is blank, all draws are constant." if table.isna().any(axis=None) else ""
    st.caption(
        f"Mean of a few draws with the components chosen above. Click a cell to go there.{blank}"
    )
    if clicked is not None:
        place = DEPTHS[clicked[0]], SCALES[clicked[1]]
        if place != st.session_state.get("simplicity_clicked"):
            st.session_state["simplicity_clicked"] = place
            st.session_state["simplicity_moved"] = place
            st.rerun()
