"""Collapse curves and sensitivities measured while a person waits; shared by all sessions.

Apart from `app.data`, because it imports the model libraries.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import streamlit as st
import torch
from jaxtyping import Float

from analyses.collapse.curves import Condition, curve, lengths_up_to, longest_that_fits
from analyses.collapse.families import Form, find_family
from analyses.collapse.paths import path_sums, sensitivities, without_empty_start
from analyses.collapse.prompts import grow
from app.live import load
from probe.attention import AS_IT_IS, Visible, attention_weights
from probe.growing import read_last_tokens
from probe.language import LanguageModel
from probe.rounding import Format, rounded_model
from probe.tokens import token_texts

EXACT = "as it is"
"""The model's own arithmetic, in float32."""
PROBES = 4
"""Random projections of a Jacobian, while a person waits."""
TOP = 6
"""Likeliest next tokens that are shown."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a person chose; equal choices are measured once."""

    spec: str
    """The model."""
    random_weights: int | None
    """The seed of its random weights, or None."""
    family: str
    """What is repeated."""
    form: Form
    """What stands around it."""
    number_format: str
    """A number format, or `EXACT`."""
    window: int | None
    """A window of attention, in tokens."""

    @property
    def condition(self) -> Condition:
        """As the study has it."""
        visible = AS_IT_IS if self.window is None else Visible(window=self.window)
        return Condition(family=find_family(self.family), form=self.form, visible=visible)

    @property
    def repeats_last(self) -> bool:
        """Whether n + 1 repeats n's last token and nothing follows it: the theorem's condition."""
        return self.condition.family.repeats_last and self.form != "chat"


@st.cache_resource(show_spinner=False, max_entries=1)
def _rounded(spec: str, random_weights: int | None, format: Format) -> LanguageModel:
    model, _ = load(spec, random_weights, "float32")
    return rounded_model(model, format)


def model_of(chosen: Chosen) -> LanguageModel:
    """The model, in the number format that was chosen."""
    if chosen.number_format == EXACT:
        return load(chosen.spec, chosen.random_weights, "float32")[0]
    return _rounded(chosen.spec, chosen.random_weights, chosen.number_format)  # type: ignore[arg-type]


def longest(chosen: Chosen, wanted: int) -> int:
    """Repetitions that can be asked for: at most `wanted`, fewer where the context ends before.

    Raises `UserError` where the prompt cannot be made.
    """
    model, _ = load(chosen.spec, chosen.random_weights, "float32")
    family = find_family(chosen.family)
    growing = grow(model, family, family.longest(wanted) + 1, form=chosen.form)
    return longest_that_fits(model, growing) - 1


@st.cache_data(show_spinner=False, max_entries=64)
def measured_curve(chosen: Chosen, n: int) -> pd.DataFrame:
    """Distances by length and layer up to n repetitions, as `analyses.collapse.curves.curve`."""
    _, lock = load(chosen.spec, chosen.random_weights, "float32")
    with lock:
        return curve(model_of(chosen), chosen.condition, lengths_up_to(n))


@st.cache_data(show_spinner=False, max_entries=64)
def next_tokens(chosen: Chosen, n: int) -> pd.DataFrame:
    """The likeliest tokens after n and after n + 1 repetitions: `token`, `n`, `n + 1` (shares)."""
    model, lock = model_of(chosen), load(chosen.spec, chosen.random_weights, "float32")[1]
    growing = grow(model, find_family(chosen.family), n + 1, form=chosen.form)
    with lock:
        last = read_last_tokens(
            model, growing.trunk, growing.pairs([n]), visible=chosen.condition.visible
        )
    shares = last.logits.double().softmax(-1)
    top = shares.amax(0).topk(TOP).indices
    return pd.DataFrame(
        {
            "token": token_texts(model, top.tolist()),
            "after n": shares[0, top].numpy(),
            "after n + 1": shares[1, top].numpy(),
        }
    )


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How much each token reaches the last, by depth."""

    tokens: tuple[str, ...]
    """The prompt's tokens."""
    gradient: Float[np.ndarray, "depths t"]
    """Norm of the derivative of the last output."""
    path: Float[np.ndarray, "depths t"]
    """Path sums of the model's own attention."""


@st.cache_data(show_spinner=False, max_entries=16)
def measured_sensitivity(chosen: Chosen, n: int, beta: float) -> Sensitivity:
    """Gradients and path sums of the prompt of n repetitions, in the model's own arithmetic.

    Raises `UserError` where the model gives no attention weights.
    """
    model, lock = load(chosen.spec, chosen.random_weights, "float32")
    growing = grow(model, find_family(chosen.family), n, form=chosen.form)
    asked = growing.reading(n)
    whole = torch.cat([growing.trunk[: asked.n_trunk], torch.tensor(asked.suffix).long()])
    tokens = without_empty_start(model, whole)
    visible = chosen.condition.visible
    with lock:
        attention = attention_weights(model, tokens, visible=visible).mean(1)
        gradient = sensitivities(model, tokens, probes=PROBES, visible=visible)
    return Sensitivity(
        tokens=token_texts(model, tokens.tolist()),
        gradient=gradient.numpy(),
        path=path_sums(attention, beta).numpy(),
    )
