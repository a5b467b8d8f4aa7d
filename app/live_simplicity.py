"""Random networks drawn and measured while a person waits; shared by all sessions.

Apart from `app.data`, because it imports the model libraries.
"""

from dataclasses import replace

import pandas as pd
import streamlit as st
import torch
from jaxtyping import Float

from analyses.simplicity.measures import grid
from analyses.simplicity.networks import Architecture, draw, outputs, square
from analyses.simplicity.populations import Places, population

SIDE = 96
"""Points a side of the function that is shown."""
PEERS, CELLS = 40, 6
"""Draws of the kind that is looked at, and of each kind in the map."""
DEPTHS = (1, 2, 3, 4, 6, 8)
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Rows and columns of the map."""
FEWER = Places(side=32, order=16, lines=8, steps=32)
"""Where the functions of the map are looked at."""


@st.cache_data(show_spinner=False, max_entries=256)
def drawn(architecture: Architecture, number: int) -> Float[torch.Tensor, "r c"]:
    """A network's function on the square: rows by the first input."""
    weights = draw(architecture, number + 1, seed=0).part(slice(number, None))
    return outputs(architecture, weights, square(grid(SIDE)))[0].reshape(SIDE, SIDE)


@st.cache_data(show_spinner=False, max_entries=64)
def peers(architecture: Architecture) -> pd.DataFrame:
    """Complexities of the first draws of a kind: a row a draw."""
    return population(architecture, PEERS, Places(), seed=0)


def depth_and_scale(architecture: Architecture) -> pd.DataFrame:
    """Mean Fourier complexity of the same kind at all depths and scales: a row a depth, a column a
    weight scale."""
    return _depth_and_scale(replace(architecture, depth=1, scale=1.0))


@st.cache_data(show_spinner=False, max_entries=32)
def _depth_and_scale(architecture: Architecture) -> pd.DataFrame:
    found = {
        scale: [
            population(replace(architecture, depth=depth, scale=scale), CELLS, FEWER, seed=0)[
                "fourier"
            ].mean()
            for depth in DEPTHS
        ]
        for scale in SCALES
    }
    return pd.DataFrame(found, index=pd.Index(DEPTHS, name="depth"))
