"""What the page Compare prompts is asked: two prompts drawn alike, and at which places of each."""

import random
from dataclasses import dataclass, replace
from typing import Literal

import streamlit as st

from app import data, image_input
from app.image_input import Asked
from app.mask_canvas import Rows

TOY_SOURCE = image_input.TOY_EXAMPLE.replace("red", "green")
SOURCE = "a wolf in a suit reading a newspaper, cinematic photo"
KEY = "pair_source"
Aggregate = Literal["first", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedPair:
    """Two prompts drawn from the same seed."""

    source: str
    """The prompt that gives."""
    target: Asked
    """The image that is drawn again, and how both are drawn."""
    source_mask: Rows | None = None
    """Weights of the places that give; None for all."""
    target_mask: Rows | None = None
    """Weights of the places that something is removed at; None for all."""

    @property
    def source_image(self) -> Asked:
        """The image of the prompt that gives."""
        return replace(self.target, prompt=self.source)


def asked(record: data.SaeRecord) -> AskedPair | None:
    """The form of both prompts; None where nothing was drawn yet."""
    named = st.query_params.get("source")
    if named is not None and named != st.session_state.get("pair_address"):
        st.session_state[KEY] = named
    if KEY not in st.session_state:
        toy = data.builtin_prompts(record)
        st.session_state[KEY] = TOY_SOURCE if toy else SOURCE
    source = st.text_input("Prompt that gives", key=KEY, persist_state="session")
    target = image_input.asked(
        record, label="Prompt that is drawn again", surprise=lambda: _two_prompts(record)
    )
    if target is None:
        return None
    st.query_params["source"] = st.session_state["pair_address"] = source
    image_input.show_address(target)
    return AskedPair(source=source, target=target)


def _two_prompts(record: data.SaeRecord) -> str:
    """Choose both prompts: of toy-turbo's world two that differ in one word; gives the second."""
    if not data.builtin_prompts(record):
        st.session_state[KEY], other = random.sample(image_input.EXAMPLES, 2)
        return other
    st.session_state[KEY], other = captions_that_differ(random.randrange(2**31))
    return other


def captions_that_differ(seed: int) -> tuple[str, str]:
    """Two captions of toy-turbo's world that differ in one factor's value."""
    import torch

    from probe.toyturbo.briefs import Brief, describe, draw_briefs
    from probe.toyturbo.world import FACTORS, SCENE_FACTORS, THING_FACTORS

    brief, choice = draw_briefs(1, torch.Generator().manual_seed(seed)), random.Random(seed)
    name = choice.choice([*THING_FACTORS, *SCENE_FACTORS])
    things, surround = brief.things.clone(), brief.surround.clone()
    values = surround[0] if name in SCENE_FACTORS else things[0, 0]
    # The position stands before what a thing is.
    place = SCENE_FACTORS.index(name) if name in SCENE_FACTORS else 1 + THING_FACTORS.index(name)
    size = len(FACTORS[name])
    values[place] = (int(values[place]) + choice.randrange(1, size)) % size
    other = Brief(count=brief.count, things=things, surround=surround)
    return describe(brief)[0], describe(other)[0]
