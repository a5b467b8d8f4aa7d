"""What people write, on the pages: the label and the lists of a feature, lists of many, files."""

import json
from collections.abc import Sequence
from datetime import datetime

import pandas as pd
import streamlit as st

from app import components, data, views
from saes.note_files import parse_document
from saes.notes import Conflict, Note

EVERY = "(any)"
NEW_LIST = "Choose a list, or type a new name"


# --------------------------------------------------------------------------- many features at once


def choose_list(record: data.SaeRecord) -> str:
    """Let a person choose one of the lists that the SAE has features in; empty for none."""
    names: dict[str, int] = {}
    with components.one_sentence_errors():
        names = data.lists(record)
    if st.session_state.get("in_list") not in names:
        st.session_state["in_list"] = EVERY
    offered = [EVERY, *names]
    chosen = st.selectbox("In list", offered, key="in_list") or EVERY
    return "" if chosen == EVERY else chosen


def bulk(record: data.SaeRecord, rows: pd.DataFrame, ticked: Sequence[int]) -> None:
    """Put the ticked rows, or all rows where none is, into a list or into a file."""
    chosen = rows.iloc[list(ticked)] if ticked else rows
    what = f"{len(chosen):,} ticked" if ticked else f"all {len(chosen):,} listed"
    with st.container(horizontal=True, vertical_alignment="center"):
        with (
            st.popover("Add to a list", icon=":material/playlist_add:"),
            components.one_sentence_errors(),
        ):
            _add_all(record, chosen["feature"].tolist(), what)
        st.download_button(
            "CSV",
            lambda: chosen.to_csv(index=False),
            file_name=f"{record.name}-features.csv",
            mime="text/csv",
            on_click="ignore",
            icon=":material/download:",
            help=f"The table's columns of {what} features",
        )
        st.caption(f"of {what}")


def _add_all(record: data.SaeRecord, features: list[int], what: str) -> None:
    with st.form("add_to_list", border=False, clear_on_submit=True):
        names = list(data.lists())
        name = st.selectbox(
            "List", names, index=None, placeholder=NEW_LIST, accept_new_options=True
        )
        if st.form_submit_button(f"Add {what}", type="primary") and name:
            added = data.notes().add_all(name, record.name, features)
            st.toast(f"{added:,} features are new in the list “{name}”.", icon=":material/check:")


@components.panel
def carry_over(record: data.SaeRecord) -> None:
    """Export of everything that was written, and import of such a file."""
    with st.expander("Labels, notes and lists: import and export", icon=":material/import_export:"):
        notes = data.notes()
        if notes.revision():
            _exports(record)
        else:
            st.caption("Nothing is written yet: open a feature, and give it a label.")
        with st.form("import_notes", border=False):
            file = st.file_uploader("A file that an export wrote", type="json")
            if st.form_submit_button("Import") and file is not None:
                st.session_state.pop("imported", None)
                st.session_state["imported"] = notes.load(parse_document(file.getvalue()))
                st.rerun()
        merged = st.session_state.get("imported")
        if merged is not None:
            st.success(
                f"Labels: {merged.added:,} added, {merged.updated:,} replaced by newer ones (the "
                f"older ones stay in the history), {merged.kept:,} left because those here are "
                f"newer, {merged.same:,} already here. New members of lists: {merged.listed:,}."
            )


def _exports(record: data.SaeRecord) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.download_button(
            "Everything (JSON)",
            lambda: json.dumps(data.notes().export(), indent=1, ensure_ascii=False),
            file_name="lorgnette-notes.json",
            mime="application/json",
            on_click="ignore",
            icon=":material/download:",
            help="Every version of every label and note, and all lists, of all SAEs",
        )
        st.download_button(
            "Labels of this SAE (CSV)",
            lambda: data.notes().export_labels(record.name),
            file_name=f"{record.name}-labels.csv",
            mime="text/csv",
            on_click="ignore",
            icon=":material/download:",
            help="The label and note of each feature that has one, as of now",
        )


# ------------------------------------------------------------------------------------ one feature


@components.panel
def label_and_lists(record: data.SaeRecord, feature: int) -> None:
    """A feature's label and note to write, what was written before, and the lists it is in."""
    keys = _Keys(record.name, feature)
    _begin(record, feature, keys)
    with st.form(f"{keys.stem} form", border=False):
        st.text_input("Label", key=keys.label, placeholder="What this feature stands for")
        st.text_area("Note", key=keys.note, placeholder="Anything more", height=68)
        if st.form_submit_button("Save", icon=":material/save:"):
            _save(record, feature, keys)
    _told(record, feature, keys)
    _lists(record, feature, keys)


class _Keys:
    """Names in the session's state of what belongs to a feature's form."""

    def __init__(self, sae: str, feature: int) -> None:
        self.stem = f"notes of {sae} {feature}"
        self.label, self.note = f"{self.stem} label", f"{self.stem} note"
        self.read, self.lists = f"{self.stem} read", f"{self.stem} lists"


def _begin(record: data.SaeRecord, feature: int, keys: _Keys) -> None:
    """Fill the boxes when they are first drawn; from then on they are the person's."""
    if keys.label in st.session_state:
        return
    text = data.notes().note(record.name, feature)
    st.session_state[keys.label], st.session_state[keys.note] = text.label, text.note
    st.session_state[keys.read] = text


def _save(record: data.SaeRecord, feature: int, keys: _Keys) -> None:
    """Save on top of what was read; after a conflict, what the other wrote has been read."""
    read: Note = st.session_state[keys.read]
    try:
        saved = data.notes().save(
            record.name, feature, label=st.session_state[keys.label],
            note=st.session_state[keys.note], version=read.version,
        )  # fmt: skip
    except Conflict as conflict:
        theirs = st.session_state[keys.read] = conflict.theirs
        st.warning(
            f"Another tab or program saved meanwhile, at {_clock(theirs)}, the label "
            f"“{views.markdown(theirs.label)}”. Your text is still in the boxes: save again to put "
            "it on top. Every version is kept.",
            icon=":material/call_split:",
        )
    else:
        st.session_state[keys.read] = saved
        st.toast(f"Saved, version {saved.version}.", icon=":material/check:")
        st.rerun()


def _told(record: data.SaeRecord, feature: int, keys: _Keys) -> None:
    """When it was last saved, and what was written before."""
    read: Note = st.session_state[keys.read]
    if not read.version:
        return
    history = data.notes().history(record.name, feature)
    with st.expander(f"Version {read.version}, saved {_clock(read)}"):
        st.html("".join(_version_html(text) for text in reversed(history)))


def _version_html(text: Note) -> str:
    label = views.escaped(text.label) or '<span class="lg-muted">no label</span>'
    note = f"<br>{views.escaped(text.note)}" if text.note else ""
    return (
        f'<div class="lg-version"><span class="lg-muted">{text.version}, {_clock(text)}</span> '
        f"{label}{note}</div>"
    )


def _clock(text: Note) -> str:
    return f"{datetime.fromisoformat(text.changed):%Y-%m-%d %H:%M:%S} UTC" if text.changed else "?"


def _lists(record: data.SaeRecord, feature: int, keys: _Keys) -> None:
    shown = f"{keys.lists} shown"
    if keys.lists not in st.session_state:
        st.session_state[keys.lists] = data.notes().lists_of(record.name, feature)
        st.session_state[shown] = tuple(st.session_state[keys.lists])
    st.multiselect(
        "Lists",
        sorted({*data.lists(), *st.session_state[keys.lists]}),
        key=keys.lists,
        accept_new_options=True,
        placeholder=NEW_LIST,
    )
    _change_lists(record, feature, keys.lists, shown)


def _change_lists(record: data.SaeRecord, feature: int, key: str, shown: str) -> None:
    """Carry over what a person changed here; what another tab changed meanwhile is left alone."""
    before, now = set(st.session_state[shown]), set(st.session_state[key])
    for name in now - before:
        data.notes().add(name, record.name, feature)
    for name in before - now:
        data.notes().remove(name, record.name, feature)
    st.session_state[shown] = tuple(now)
