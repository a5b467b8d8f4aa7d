"""What a page of images is asked to draw: prompt, seed, steps and guidance, and the form for it.

Pages share it: a prompt that was drawn on one is there on the next. The address says it too
(`?prompt=&seed=&steps=&guidance=`), so that an image can be passed on as a link.
"""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import streamlit as st

from app import data, views
from probe.errors import UserError

SEED, MOST_SEED, MOST_STEPS, MOST_GUIDANCE = 42, 2**32 - 1, 1000, 30.0
TOY_EXAMPLE = (
    "a large red striped disc at the top left and a small cyan plain cross at the bottom right "
    "on a grey background lit from above"
)
EXAMPLES = (
    "a sloth in a suit reading a newspaper, cinematic photo",
    "a lighthouse on a cliff in a storm, oil painting",
    "a bowl of oranges on a blue table, morning light",
    "a red fox in fresh snow, close-up photo",
    "an old tram in a narrow street in Lisbon, watercolour",
    "a glass greenhouse full of ferns at night",
)
ASKED, NEXT, ADDRESS = "image_asked", "image_next", "image_address"
WANTED, FEATURES = "image_features_wanted", "image_features"
"""Features to show that a person has just asked for; what `f` in the address last was."""
PARTS = ("prompt", "seed", "steps", "guidance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An image to draw."""

    prompt: str
    """What of; may be empty."""
    seed: int = SEED
    """Of the noise."""
    steps: int = 1
    """Denoising steps."""
    guidance: float = 0.0
    """Scale of classifier-free guidance; at most 1 is without."""
    height: int | None = None
    """Pixels; None for the model's own. Only a recipe asks for another size."""
    width: int | None = None
    """Pixels, likewise."""

    @property
    def draw(self) -> dict[str, Any]:
        """How it is drawn, as a recipe's `draw` says it."""
        names = ("steps", "guidance", "height", "width")
        return {name: getattr(self, name) for name in names}

    @property
    def guided(self) -> bool:
        """Whether each pass reads the empty prompt too."""
        return self.guidance > 1

    @property
    def address(self) -> dict[str, str]:
        """The query that means it, in an address of the dashboard."""
        found = {"prompt": self.prompt, "seed": str(self.seed)}
        if self.steps != 1:
            found["steps"] = str(self.steps)
        return found | ({"guidance": f"{self.guidance:g}"} if self.guidance else {})

    @property
    def words(self) -> str:
        """How it is drawn, in words."""
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        guided = f", guidance {self.guidance:g}" if self.guidance else ""
        sized = f", {self.height} by {self.width} pixels" if self.height or self.width else ""
        return f"seed {self.seed}, {steps}{guided}{sized}"


def asked_of(address: Mapping[str, str]) -> Asked | None:
    """What an address asks for; None where it has no prompt.

    Raises `UserError` where it has numbers that are none, or too large.
    """
    if "prompt" not in address:
        return None
    return Asked(
        prompt=address["prompt"],
        seed=_whole(address, "seed", SEED, 0, MOST_SEED),
        steps=_whole(address, "steps", 1, 1, MOST_STEPS),
        guidance=_guidance(address.get("guidance", "0")),
    )


def _whole(address: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = address.get(name, str(default))
    # Python refuses to read thousands of digits as a number.
    if not (text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise UserError(
            f"{name} must be a whole number from {least} to {most}; the address has {text[:40]!r}."
        )
    return int(text)


def _guidance(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found <= MOST_GUIDANCE:
        raise UserError(
            f"guidance must be a number from 0 (none) to {MOST_GUIDANCE:g}; the address has "
            f"{text[:40]!r}."
        )
    return found


# ---------------------------------------------------------------------------------------- the form


def asked(
    record: data.SaeRecord, *, label: str = "Prompt", surprise: Callable[[], str] | None = None
) -> Asked | None:
    """The form, and what a person last asked to have drawn; None where nothing was yet.

    Args:
        record: an SAE of the model that draws.
        label: what the prompt is called.
        surprise: gives another prompt where a person wants one; None for any of the model's.
    """
    _follow_address()
    if (wanted := st.session_state.pop(NEXT, None)) is not None:
        st.session_state[ASKED] = wanted
        _put(wanted)
    if "image_prompt" not in st.session_state:
        _put(st.session_state.get(ASKED) or Asked(prompt=example(record)))
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.text_input(label, key="image_prompt", on_change=_draw, persist_state="session")
        st.number_input(
            "Seed", 0, MOST_SEED, key="image_seed", persist_state="session", width=150,
            help="The noise that the image begins from.",
        )  # fmt: skip
        steps = st.number_input(
            "Steps", 1, MOST_STEPS, key="image_steps", persist_state="session", width=120,
            help="Denoising steps; with more than one, guidance can be set.",
        )  # fmt: skip
        if steps > 1 or st.session_state.get("image_guidance"):
            st.number_input(
                "Guidance", 0.0, MOST_GUIDANCE, step=0.5, format="%g", key="image_guidance",
                persist_state="session", width=120,
                help="Above 1, each step reads the empty prompt too.",
            )  # fmt: skip
        st.button("Draw", type="primary", on_click=_draw, icon=":material/brush:")
    with st.container(horizontal=True):
        st.button(
            "Surprise me", on_click=_surprise, args=(surprise or (lambda: any_prompt(record)),),
            icon=":material/casino:",
            type="tertiary", help="Another prompt and another seed.",
        )  # fmt: skip
        st.button(
            "Next seed", on_click=_next_seed, icon=":material/skip_next:", type="tertiary",
            help="The same prompt from other noise.",
        )  # fmt: skip
    found = st.session_state.get(ASKED)
    if found is not None and found != _typed():
        st.caption(
            f"Below: “{views.markdown(found.prompt)}”, {found.words}. Press Draw for what is above."
        )
    return found


def begins_with(record: data.SaeRecord) -> Asked:
    """What was last asked for, or else an example; the address goes first."""
    return asked_of(_address()) or st.session_state.get(ASKED) or Asked(prompt=example(record))


def ask_next(found: Asked) -> None:
    """Let an image be what is asked for when the page is drawn the next time."""
    st.session_state[NEXT] = found


def show_address(found: Asked) -> None:
    """Let the address say what is asked for."""
    for name in PARTS:
        if name in found.address:
            st.query_params[name] = found.address[name]
        else:
            st.query_params.pop(name, None)
    st.session_state[ADDRESS] = _address()


def follow_features() -> None:
    """Take over the features that the address names (`?f=3,5`), once each time it changes.

    Other pages name one as `feature`. Raises `UserError` where there is something else.
    """
    if "feature" in st.query_params:
        st.query_params["f"] = st.query_params["feature"]
        del st.query_params["feature"]
    text = st.query_params.get("f")
    if not text or text == st.session_state.get(FEATURES):
        return
    st.session_state[FEATURES] = text
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise UserError(
            f"the address has f={text[:40]!r} where numbers of features were wanted, as 3,5."
        )
    st.session_state[WANTED] = tuple(dict.fromkeys(map(int, parts)))


def example(record: data.SaeRecord) -> str:
    """A prompt to begin with."""
    return TOY_EXAMPLE if data.builtin_prompts(record) else EXAMPLES[0]


def _follow_address() -> None:
    """Take over what the address asks for, once each time that it says something else."""
    now = _address()
    if now == st.session_state.get(ADDRESS):
        return
    st.session_state[ADDRESS] = now
    if (found := asked_of(now)) is not None:
        st.session_state[ASKED] = found
        _put(found)


def _address() -> dict[str, str]:
    return {name: st.query_params[name] for name in PARTS if name in st.query_params}


def _put(found: Asked) -> None:
    for name in PARTS:
        st.session_state[f"image_{name}"] = getattr(found, name)


def _typed() -> Asked:
    """What the widgets say; the size is that of the image before."""
    before = st.session_state.get(ASKED) or Asked(prompt="")
    keys = {name: f"image_{name}" for name in PARTS}
    typed = {n: st.session_state[key] for n, key in keys.items() if key in st.session_state}
    return replace(before, **typed)


def _draw() -> None:
    st.session_state[ASKED] = _typed()
    show_address(_typed())


def _next_seed() -> None:
    st.session_state["image_seed"] = (st.session_state["image_seed"] + 1) % MOST_SEED
    _draw()


def _surprise(prompt: Callable[[], str]) -> None:
    st.session_state["image_prompt"] = prompt()
    st.session_state["image_seed"] = random.randrange(1000)
    _draw()


def any_prompt(record: data.SaeRecord) -> str:
    """A prompt that the model knows what to do with: of toy-turbo's world, or a picture's."""
    if not data.builtin_prompts(record):
        return random.choice(EXAMPLES)
    from probe.toyturbo.briefs import captions

    return next(captions(random.randrange(2**31)))
