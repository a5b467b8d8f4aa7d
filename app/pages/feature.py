"""One feature: how often and strongly it fires, on what, what it promotes, and your own text."""

import json
import urllib.parse

import streamlit as st

from app import components, dashboard, data, views
from probe.errors import UserError

TOKENS_SHOWN = 12
HEADINGS = {"top": "Strongest", "interval": "By interval of activation", "random": "Random"}


def show() -> None:
    """Draw the page."""
    feature = _asked()
    title, sentence = (
        f"Feature {feature}",
        "What one feature of an SAE fires on, and what it promotes.",
    )
    if not any(record.index for record in data.sae_records()):
        components.heading(title, sentence)
        components.no_sae(data.sae_records())
        return
    beginning, choice = st.columns([5, 3], gap="large", vertical_alignment="bottom")
    with beginning:
        components.heading(title, sentence)
    with choice:
        record = components.choose_sae(indexed=True)
    if record is None:
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        _navigation(record, feature)
    row = data.feature_index(record).feature(feature)
    left, right = st.columns([5, 8], gap="large")
    with left:
        _statistics(record, row)
    with right:
        _own_text(record, feature, row)
        _examples(record, feature, row)


def _asked() -> int:
    text = st.query_params.get("feature", "0")
    if not text.isdecimal():
        raise UserError(f"feature {text!r} is not a number; features are counted from 0.")
    return int(text)


def _go(feature: int) -> None:
    st.query_params["feature"] = str(feature)


def _jump() -> None:
    _go(int(st.session_state["jump"]))


def _navigation(record: data.SaeRecord, feature: int) -> None:
    """Jump, previous, next, random, download, and the address to copy."""
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
    st.download_button(
        "JSON",
        lambda: json.dumps(data.feature_document(record, feature), indent=1),
        file_name=f"{record.name}-feature-{feature}.json",
        mime="application/json",
        on_click="ignore",
        icon=":material/download:",
        help="Everything on this page",
    )
    with st.popover("Link", icon=":material/link:", help="The address of this feature"):
        st.code(_link(record, feature), language=None)


def _step(label: str, feature: int, icon: str, explained: str) -> None:
    st.button(label, on_click=_go, args=(feature,), icon=f":material/{icon}:", help=explained)


def _go_random(record: data.SaeRecord) -> None:
    _go(data.feature_index(record).random_alive())


def _link(record: data.SaeRecord, feature: int) -> str:
    address = (st.context.url or "").removesuffix("/").removesuffix("/feature")
    query = urllib.parse.urlencode(components.feature_address(record, feature))
    return f"{address}/feature?{query}"


def _statistics(record: data.SaeRecord, row: dict) -> None:
    if not row["alive"]:
        st.warning(
            "This feature is dead: it fires on no token of the index.", icon=":material/bedtime:"
        )
    numbers = st.columns(3)
    numbers[0].metric("Density", views.percent(row["density"]), help="Share of tokens it fires on")
    numbers[1].metric("Largest", views.number(row["max"]), help="Largest activation")
    numbers[2].metric("Mean", views.number(row["mean"]), help="Over the tokens it fires on")
    if row["alive"]:
        st.subheader("Activations", anchor=False)
        components.chart(
            views.activation_figure(
                row["histogram"],
                data.feature_index(record).histogram_edges,
                marker=_marker(record, row),
            ),
            key="activations",
            name="Histogram of the feature's activations",
        )
    _logits(row)
    _tokens(record, row)
    _neighbours(record, row)
    st.subheader("Provenance", anchor=False)
    _provenance(record)


def _provenance(record: data.SaeRecord) -> None:
    known = data.provenance(record)
    st.html(views.facts_html(views.provenance_facts(record.name, known)))
    with st.expander("Everything recorded"):
        st.html(views.facts_html(known))


def _marker(record: data.SaeRecord, row: dict) -> float | None:
    marked = st.session_state.get("own_text_peak")
    if marked and marked[:2] == (record.name, row["feature"]):
        return marked[2]
    return None


def _logits(row: dict) -> None:
    st.subheader("Effect on the logits", anchor=False)
    if not row["positive_tokens"]:
        st.caption("This site has no direct reading in logits.")
        return
    up, down = st.columns(2, gap="medium")
    with up:
        st.caption("Promoted")
        bars = views.bars_html(
            row["positive_tokens"], row["positive_logits"], colour=views.BLUE_RGB
        )
        st.html(bars)
    with down:
        st.caption("Suppressed")
        bars = views.bars_html(
            row["negative_tokens"], row["negative_logits"], colour=views.RUST_RGB
        )
        st.html(bars)


def _tokens(record: data.SaeRecord, row: dict) -> None:
    tokens = data.feature_index(record).tokens_for_feature(row["feature"]).head(TOKENS_SHOWN)
    if len(tokens):
        st.subheader("Tokens it fires on", anchor=False)
        st.html(views.tokens_table_html(tokens))


def _neighbours(record: data.SaeRecord, row: dict) -> None:
    near = data.feature_index(record).neighbours(row["feature"])
    if not len(near):
        return
    st.subheader("Nearest decoder directions", anchor=False)
    for place in near.to_dict("records"):
        link, cosine, label = st.columns([5, 2, 8], vertical_alignment="center", gap="small")
        with link:
            components.feature_link(record, place["neighbour"])
        cosine.html(f'<span class="lg-value">{views.number(place["cosine"])}</span>')
        text = views.escaped(views.token_list(place["top_tokens"]))
        label.html(f'<span class="lg-tokens lg-muted lg-line">{text}</span>')


@components.panel
def _own_text(record: data.SaeRecord, feature: int, row: dict) -> None:
    st.subheader("Test it on your own text", anchor=False)
    with st.form("own_text", border=False):
        box, button = st.columns([6, 1], vertical_alignment="bottom")
        text = box.text_input(
            "Your text", key="own_text_box", placeholder="Type a sentence and press Enter",
            label_visibility="collapsed", persist_state="session",
        )  # fmt: skip
        button.form_submit_button("Test", width="stretch")
    if not text:
        return
    with st.spinner("Running the model ..."):
        from app import live

        strip = live.prompt_strip(live.prompt_codes(record, text), feature)
    peak = max(strip.activations)
    with st.container(key="own_text_result"):
        st.html(views.strip_html(strip, scale=row["max"] or peak))
    if peak > 0:
        share = f" ({views.percent(peak / row['max'])} of its largest)" if row["max"] else ""
        st.caption(f"Largest activation here: {views.number(peak)}{share}.")
    else:
        st.caption("It does not fire on this text.")
    mark = (record.name, feature, peak)
    if st.session_state.get("own_text_peak") != mark:
        st.session_state["own_text_peak"] = mark
        st.rerun()


@components.panel
def _examples(record: data.SaeRecord, feature: int, row: dict) -> None:
    st.subheader("Examples", anchor=False)
    groups = data.examples(record, feature)
    if not groups:
        st.caption("There are none: the feature never fires on the indexed tokens.")
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        context = components.choice("Context", views.CONTEXT_LABELS, key="context")
        line_breaks = components.line_break_toggle("line_breaks")
    st.html(views.scale_html(row["max"]))
    for kind in ("top", "interval", "random"):
        chosen = [group for group in groups if group.kind == kind]
        if chosen:
            st.markdown(f"**{HEADINGS[kind]}**")
            st.html(
                views.groups_html(
                    chosen, scale=row["max"], context=context, line_breaks=line_breaks
                )
            )


if __name__ == "__main__":
    dashboard.enter(show)
