"""The prompt lab's input: a text, or the turns of a chat."""

import streamlit as st

from app import components
from probe.tokens import ROLES, Turn

EXAMPLE = "The lighthouse keeper wrote a letter to his sister in Lisbon every winter."
KINDS = {"text": "Text", "chat": "Chat"}
FIRST_TURNS = (
    Turn(role="system", content="You are a helpful assistant."),
    Turn(role="user", content="What is the capital of Portugal?"),
)
MOST_TURNS = 12


def typed() -> str | tuple[Turn, ...]:
    """What a person last asked to have read; an example to begin with."""
    kind = components.choice("Input", KINDS, key="input_kind")
    if kind == "text":
        with st.form("prompt", border=False):
            text = st.text_area(
                "Text", EXAMPLE, height=90, key="prompt_text", persist_state="session"
            )
            st.form_submit_button("Read the text", type="primary")
        return text
    return _chat()


def _chat() -> tuple[Turn, ...]:
    """A small editor of turns; what it returns changes when the button is pressed."""
    turns: list[int] = st.session_state.setdefault("turns", list(range(len(FIRST_TURNS))))
    asked = st.session_state.setdefault("asked_turns", FIRST_TURNS)
    for place in turns:
        _turn(place, removable=len(turns) > 1)
    with st.container(horizontal=True):
        if st.button("Read the chat", type="primary", key="read_chat"):
            asked = tuple(_said(place) for place in turns)
            st.session_state["asked_turns"] = asked
        st.button(
            "Add a turn", on_click=_add, icon=":material/add:", disabled=len(turns) >= MOST_TURNS
        )
    st.caption(
        "The chat is written as the tokenizer's template has it, up to where the model goes on; an "
        "assistant's turn at the end is left open for the model to continue."
    )
    return asked


def _turn(place: int, *, removable: bool) -> None:
    first = FIRST_TURNS[place] if place < len(FIRST_TURNS) else Turn(role="user", content="")
    role, said, away = st.columns([2, 9, 1], vertical_alignment="bottom")
    role.selectbox(
        "Role", ROLES, index=ROLES.index(first.role), key=f"role_{place}", persist_state="session"
    )
    said.text_area("Says", first.content, height=68, key=f"said_{place}", persist_state="session")
    away.button(
        "", icon=":material/close:", key=f"remove_{place}", on_click=_remove, args=(place,),
        disabled=not removable, help="Take this turn out",
    )  # fmt: skip


def _said(place: int) -> Turn:
    return Turn(role=st.session_state[f"role_{place}"], content=st.session_state[f"said_{place}"])


def _add() -> None:
    turns = st.session_state["turns"]
    turns.append(max(turns) + 1)


def _remove(place: int) -> None:
    st.session_state["turns"].remove(place)
