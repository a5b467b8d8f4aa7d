"""One feature: how often and strongly it fires, on what, what it promotes, and your own text."""

import urllib.parse

import streamlit as st

from app import (
    components,
    dashboard,
    data,
    feature_data,
    feature_download,
    feature_sections,
    image_sections,
    note_panels,
    views,
)
from probe.errors import Failure, UserError


def show() -> None:
    """Draw the page."""
    feature = _asked()
    title, sentence = (
        f"Feature {feature}",
        "What one feature of an SAE fires on, and what it does.",
    )
    if not any(record.index for record in data.sae_records()):
        components.heading(title, sentence)
        components.no_sae(data.sae_records())
        return
    beginning, choice = st.columns([5, 3], gap="large", vertical_alignment="bottom")
    with choice:
        record = components.choose_sae(indexed=True)
    with beginning:
        components.heading(title, sentence if record is None else _called(record, feature))
    if record is None:
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        _navigation(record, feature)
    row = data.feature_index(record).feature(feature)
    left, right = st.columns([5, 8], gap="large")
    with left:
        note_panels.label_and_lists(record, feature)
        feature_sections.numbers(record, row)
        feature_sections.activations(record, row)
        if record.of_images:
            image_sections.places(record, row)
        else:
            feature_sections.logits(row)
            feature_sections.tokens(record, row)
        feature_sections.others(record, row)
        feature_sections.provenance(record)
    with right:
        if record.of_images:
            image_sections.icon(record, feature, row)
            image_sections.examples(record, feature, row)
        else:
            feature_sections.own_text(record, feature, row)
            feature_sections.examples(record, feature, row)


def _asked() -> int:
    text = st.query_params.get("feature", "0")
    if not text.isdecimal():
        raise UserError(f"feature {text!r} is not a number; features are counted from 0.")
    return int(text)


def _called(record: data.SaeRecord, feature: int) -> str:
    """What a feature is called: a person's label, else the automatic one and that it is one."""
    try:
        own = data.notes().note(record.name, feature).label
    except Failure:  # the panel of labels says what is wrong
        own = ""
    if own:
        return f"**{views.markdown(own)}**"
    made = feature_data.automatic_label(record, feature)
    if made is not None and made["label"]:
        return f"*{views.markdown(made['label'])}* :small[(automatic label)]"
    return "No label yet."


def _go(feature: int) -> None:
    st.query_params["feature"] = str(feature)


def _jump() -> None:
    _go(int(st.session_state["jump"]))


def _navigation(record: data.SaeRecord, feature: int) -> None:
    """Jump, previous, next, random, steer, files, and the address to copy."""
    index = data.feature_index(record)
    last = index.n_features - 1
    st.query_params.update(components.feature_address(record, feature))
    st.session_state["jump"] = min(feature, last)
    st.number_input("Go to feature", 0, last, key="jump", on_change=_jump, width=140)
    if 0 <= feature <= last and index.n_alive:
        _step("Previous", index.previous_alive(feature), "chevron_left", "The living one before")
        _step("Next", index.next_alive(feature), "chevron_right", "The living one after")
        st.button(
            "Random", on_click=_go_random, args=(record,), icon=":material/casino:",
            help="Any living feature",
        )  # fmt: skip
    address = components.feature_address(record, feature)
    if record.of_images:
        on_prompt = {"sae": record.name, "f": str(feature)}
        _go_to("explore", "Its map on your prompt", "image_search", on_prompt)
        _go_to("paint", "Paint with this feature", "brush", address)
    else:
        _go_to("steer", "Steer with this feature", "tune", address)
    with st.popover("Download", icon=":material/download:", help="Everything on this page"):
        _downloads(record, feature)
    with st.popover("Link", icon=":material/link:", help="The address of this feature"):
        st.code(_link(record, feature), language=None)


def _go_to(page: str, label: str, icon: str, query: dict[str, str]) -> None:
    st.page_link(
        f"pages/{page}.py", label=label, icon=f":material/{icon}:", query_params=query
    )  # fmt: skip


def _step(label: str, feature: int, icon: str, explained: str) -> None:
    st.button(label, on_click=_go, args=(feature,), icon=f":material/{icon}:", help=explained)


def _go_random(record: data.SaeRecord) -> None:
    _go(data.feature_index(record).random_alive())


def _link(record: data.SaeRecord, feature: int) -> str:
    address = (st.context.url or "").removesuffix("/").removesuffix("/feature")
    query = urllib.parse.urlencode(components.feature_address(record, feature))
    return f"{address}/feature?{query}"


def _downloads(record: data.SaeRecord, feature: int) -> None:
    for kind in feature_download.FILES:
        if kind.needs_browser and not feature_download.can_draw():
            st.caption(feature_download.NO_BROWSER)
            continue
        st.download_button(
            kind.label,
            lambda make=kind.make: make(feature_data.feature_content(record, feature)),
            file_name=f"{record.name}-feature-{feature}.{kind.ending}",
            mime=kind.mime,
            key=f"download_{kind.ending}",
            on_click="ignore",
            icon=":material/download:",
            help=kind.explained,
            width="stretch",
        )


if __name__ == "__main__":
    dashboard.enter(show)
