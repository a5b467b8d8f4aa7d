"""The page Collapse: what is chosen, the curve, the theorem's conditions, and the sensitivities."""

from dataclasses import replace

import streamlit as st

from analyses.collapse.families import FAMILIES, FORMS
from app import collapse_views, components, data, live_collapse, views
from app.live_collapse import EXACT, Chosen
from probe.rounding import FORMATS

FAMILY_LINES = {family.name: family.line for family in FAMILIES}
WINDOWS = {None: "all tokens", 16: "the last 16", 64: "the last 64", 256: "the last 256"}
LONGEST = 2000
"""Repetitions that the slider goes up to."""
START = 300
HELD = 200
"""Repetitions whose gradients are measured at most, while a person waits."""
BETAS = (1.0, 10.0, 100.0)


def draw() -> None:
    """The page below its heading."""
    chosen = _choice()
    with st.spinner("Loading the model ..."):
        limit = live_collapse.longest(chosen, LONGEST)
        n_layers = live_collapse.model_of(chosen).n_layers
    _curves(chosen, n_layers, limit)
    _sensitivity(chosen, limit)


def _models() -> dict[str, tuple[str, int | None]]:
    """The language models that there is anything of, each with its random-weight twin."""
    named = {"smollm2"}
    for record in data.sae_records():
        if not record.of_images:
            named.add(record.run.config["model"]["spec"])
    found: dict[str, tuple[str, int | None]] = {}
    for spec in sorted(named, key=lambda spec: (spec != "smollm2", spec)):
        found |= {spec: (spec, None), f"{spec}, random weights": (spec, 0)}
    return found


def _choice() -> Chosen:
    """Model, prompt, precision, attention."""
    models = _models()
    first, second, third, fourth, fifth = st.columns([4, 4, 4, 3, 3])
    model = first.selectbox("Model", list(models), key="collapse_model")
    family = second.selectbox(
        "Repeated", list(FAMILY_LINES), key="collapse_family",
        format_func=lambda name: f"{name}: {FAMILY_LINES[name]}",
    )  # fmt: skip
    form = third.selectbox(
        "Prompt", list(FORMS), key="collapse_form",
        format_func=lambda name: f"{name}: {FORMS[name]}",
    )  # fmt: skip
    precision = fourth.selectbox(
        "Precision", [EXACT, *FORMATS], key="collapse_format",
        help="Emulated: products in float64, everything the model computes rounded to the format. "
        "It takes some seconds and 8 bytes a parameter.",
    )  # fmt: skip
    window = fifth.selectbox(
        "Attention to", list(WINDOWS), format_func=WINDOWS.__getitem__, key="collapse_window"
    )
    spec, seed = models[model]
    return Chosen(spec, seed, family, form, precision, window)


def _curves(chosen: Chosen, n_layers: int, limit: int) -> None:
    n = st.slider(
        "Repetitions n", 12, max(limit, 13), min(START, limit), key="collapse_n",
        help="One pass over the longest prompt gives the whole curve.",
    )  # fmt: skip
    with st.spinner("Reading the prompts ..."):
        curves = {chosen.family: live_collapse.measured_curve(chosen, n)}
        if chosen.family != "digits":
            control = replace(chosen, family="digits")
            curves["random digits"] = live_collapse.measured_curve(
                control, min(n, live_collapse.longest(control, n))
            )
        tokens = live_collapse.next_tokens(chosen, n)
    left, right = st.columns([7, 4], gap="large")
    with left:
        components.chart(
            collapse_views.curve_figure(curves, n_layers, n), key="collapse_curve",
            name="Distance by length", own_colours=True,
        )  # fmt: skip
        st.markdown(collapse_views.reading(curves[chosen.family], n_layers, n))
    with right:
        _conditions(chosen)
        st.markdown("**What follows is predicted to be**")
        st.html(views.numbers_html(tokens.assign(token=tokens["token"].map(repr))))
    components.chart(
        collapse_views.layer_figure(curves[chosen.family]), key="collapse_layers",
        name="Distance by layer and length", own_colours=True,
    )  # fmt: skip


def _conditions(chosen: Chosen) -> None:
    """The theorem's conditions, and whether they are met here."""
    st.markdown("**The theorem speaks of prompts for which**")
    lines = [
        (chosen.repeats_last, "the prompt ends in the repeated token, and n + 1 has it once more"),
        (None, "positions fade with distance: rotary ones do so only roughly"),
        (True, "representations are bounded: the norms see to that"),
    ]
    marks = {True: ":material/check:", False: ":material/close:", None: ":material/question_mark:"}
    for met, line in lines:
        st.markdown(f"{marks[met]} {line}")
    if not chosen.repeats_last:
        st.caption("The first is not met here: a distance that stays contradicts nothing.")


@components.panel
def _sensitivity(chosen: Chosen, limit: int) -> None:
    st.subheader("Which tokens reach the last one?", anchor=False)
    first, second = st.columns([5, 4], vertical_alignment="bottom")
    longest = min(HELD, limit)
    n = first.slider("Repetitions", 4, longest, min(100, longest), key="collapse_held")
    with second:
        beta = components.choice(
            "Attention is divided by", {beta: f"{beta:g}" for beta in BETAS}, key="collapse_beta",
            explained="The theorem's beta, which stands for the norm. 1 is Proposition B.8's.",
        )  # fmt: skip
    if (
        not st.button("Measure", key="collapse_measure")
        and "collapse_shown" not in st.session_state
    ):
        st.caption(
            "Gradients of the last token's final output by every token at every depth, beside the "
            "sums over paths of attention that bound them. It takes a few seconds."
        )
        return
    st.session_state["collapse_shown"] = True
    with st.spinner("Measuring gradients ..."):
        found = live_collapse.measured_sensitivity(chosen, n, beta)
    components.chart(
        collapse_views.sensitivity_figure(found.gradient, found.path, beta),
        key="collapse_sensitivity", name="Sensitivity by token and depth", own_colours=True,
    )  # fmt: skip
    st.caption(
        "Each row against its largest; in the model's own arithmetic. Path sums are a bound with "
        "attention held constant, so they may be large where the gradient is small."
    )
