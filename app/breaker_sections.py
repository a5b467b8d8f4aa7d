"""The page Circuit breakers: the run, its training and attacks, and one prompt in both models."""

import streamlit as st

from analyses.cells import select
from analyses.circuit_breakers.concepts import CONCEPTS
from analyses.circuit_breakers.measured import HARMFUL
from app import breaker_views, components, data, live_breakers, views
from app.data import BrokenModel
from app.live_breakers import Compared

EXAMPLES = {concept.name: concept.requests(trained=False)[0].request for concept in CONCEPTS}
"""A request on each concept, about a topic that training has not seen."""
TOP = 10
"""Features of each kind that are listed."""


def draw(models: list[BrokenModel], reports: list[str]) -> None:
    """The page below its heading."""
    chosen = st.selectbox(
        "Broken model", models, format_func=lambda model: model.label, key="breaker_model",
        help="Runs of the study, the newest first; their folders are models to every command.",
    )  # fmt: skip
    st.caption(
        f"A model to every command, as in `lorgnette capture {chosen.adapter} builtin --sites "
        "resid_post.9`"
    )
    _run(chosen, reports)
    _prompt(chosen)


def _run(chosen: BrokenModel, reports: list[str]) -> None:
    left, right = st.columns([5, 6], gap="large")
    with left:
        components.chart(
            breaker_views.training_figure(data.breaker_log(chosen)), key="breaker_training",
            name="Cosines by step", own_colours=True,
        )  # fmt: skip
    with right:
        table = breaker_views.attack_rows(data.breaker_attacks(reports), chosen.subject)
        st.markdown("**Attacks**")
        if not len(table):
            st.caption("No report of the study has attacks on this subject.")
        else:
            st.html(views.table_html(table, words=list(table.columns)))
            st.caption(
                "Answers that are on the concept and coherent; and how much less likely the "
                "original's answers became, nats a token. Over the seeds of the newest report."
            )


@components.panel
def _prompt(chosen: BrokenModel) -> None:
    st.subheader("One prompt in both models", anchor=False)
    example = EXAMPLES.get(chosen.subject, "")
    request = st.text_input("Request", value=example, key=f"breaker_request_{chosen.subject}")
    if not request.strip():
        st.info("Type a request: both models read it.", icon=":material/edit:")
        return
    with st.spinner("Both models read and answer ..."):
        found = live_breakers.compared(
            str(chosen.adapter), chosen.base, request, answering=chosen.subject != HARMFUL
        )
    _answers(found, chosen)
    layers = found.cosine.shape[0]
    for column, name, figure in zip(
        st.columns(2, gap="large"), ("Cosine", "Length"),
        (breaker_views.cosine_map(found), breaker_views.length_map(found)), strict=True,
    ):  # fmt: skip
        with column:
            components.chart(
                figure,
                key=f"breaker_{name.lower()}_map",
                name=f"{name} by layer and token",
                own_colours=True,
            )
    layer = st.slider(
        "State", 0, layers - 1, min(10, layers - 1), key="breaker_layer",
        help="0 are the embeddings, l the output of block l - 1, the last is behind the norm.",
    )  # fmt: skip
    components.chart(
        breaker_views.layer_figure(found, layer), key="breaker_line",
        name="Cosine and length by token", own_colours=True,
    )  # fmt: skip
    _features(found, chosen)


def _answers(found: Compared, chosen: BrokenModel) -> None:
    if chosen.subject == HARMFUL:
        st.caption("Of harmful prompts no answer is written: the states are the request's own.")
        return
    for column, name, text in zip(
        st.columns(2, gap="large"), ("The model as it was", "The broken model"), found.answers,
        strict=True,
    ):  # fmt: skip
        column.markdown(f"**{name}**")
        column.text(text or "(nothing)")


def _features(found: Compared, chosen: BrokenModel) -> None:
    st.markdown("**Features of the request and the original's answer**")
    records = [
        record for record in data.sae_records()
        if record.run.complete and not record.of_images and live_breakers.fits(record, chosen.base)
    ]  # fmt: skip
    if not records:
        components.empty(
            f"There is no SAE of the residual stream of {chosen.base}. Features show what went:",
            f"lorgnette train {chosen.base} --corpus builtin --site resid_post.9",
        )
        return
    record = st.selectbox(
        "SAE", records, format_func=lambda one: one.name, key="breaker_sae"
    )  # fmt: skip
    with st.spinner("Reading features ..."):
        changed = live_breakers.feature_changes(
            record, str(chosen.adapter), chosen.base, found.ids, found.start, TOP
        )
    labels = data.labels(record)
    for column, kind, line in zip(
        st.columns(2, gap="large"), ("lost", "appeared"),
        ("Rerouted: fire less", "Appeared: fire more"), strict=True,
    ):  # fmt: skip
        with column:
            st.markdown(f"**{line}**")
            for row in select(changed, {"kind": kind}).to_dict("records"):
                _feature_row(record, row, labels.get(row["feature"], ""))


def _feature_row(record: data.SaeRecord, row: dict, label: str) -> None:
    link, said = st.columns([2, 5], vertical_alignment="center")
    with link:
        components.feature_link(record, row["feature"])
    name = f"{label}; " if label else ""
    said.caption(
        f"{name}{row['original']:.3g} to {row['broken']:.3g} a token, most at {row['token']!r}"
    )
