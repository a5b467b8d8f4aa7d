"""Recipes on disk and from elsewhere: the pages that make them load and save them here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

from app import data
from probe.errors import UserError

Document = dict[str, Any]
Take = Callable[[Document, Path | None], None]
"""What a page does with a recipe, and the folder that its directions are in."""


def read(path: Path) -> tuple[Document, Path]:
    """A saved recipe and its folder. Raises `UserError` where it is none."""
    from saes.recipes import read_recipe, to_json

    return to_json(read_recipe(path)), path.parent


def pick(
    *, of_images: bool, key: str, take: Take, beside: Callable[[], None] | None = None
) -> None:
    """Let a person choose a saved recipe, or one from a file of theirs.

    Args:
        of_images: offer those of images, or those of texts.
        key: begins the widgets' keys.
        take: gets what was chosen.
        beside: draws more in the same row.
    """
    saved = {path.stem: path for path in data.saved_recipes(of_images=of_images)}
    chosen = st.selectbox(
        "Saved recipes", list(saved), index=None, key=f"{key}_saved",
        placeholder=f"{len(saved)} in {data.recipe_folder()}" if saved else "none yet",
    )  # fmt: skip
    with st.container(horizontal=True, vertical_alignment="bottom"):
        if st.button("Load", icon=":material/folder_open:", disabled=chosen is None) and chosen:
            take(*read(saved[chosen]))
        with st.popover("From a file", icon=":material/upload:"):
            file = st.file_uploader("A recipe's JSON", type="json", key=f"{key}_upload")
            if file is not None and st.button("Use it", key=f"{key}_use"):
                take(uploaded(file.getvalue(), file.name), None)
        if beside is not None:
            beside()


def uploaded(content: bytes, name: str) -> Document:
    """A recipe from a file's content. Raises `UserError` where it is none."""
    from saes.recipes import recipe_from, to_json

    try:
        found = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} is not readable as JSON ({error}).") from error
    return to_json(recipe_from(found, name))


def keep(document: Document, *, key: str) -> bool:
    """Save a recipe below the root, download it, and how to run it elsewhere; whether it was saved.

    Raises `UserError` where it is asked to be saved and does not fit together.
    """
    path, saved = data.recipe_folder() / data.file_name(document["name"]), False
    with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="right"):
        if st.button("Save", icon=":material/save:", help=f"To {path}", key=f"{key}_save"):
            from saes.recipes import recipe_from, write_recipe

            write_recipe(recipe_from(document, folder=path.parent), path)
            saved = True
            st.toast(f"Saved to {path}", icon=":material/check:")
        st.download_button(
            "JSON", json.dumps(document, indent=2), file_name=path.name, mime="application/json",
            on_click="ignore", icon=":material/download:", key=f"{key}_json",
        )  # fmt: skip
        with st.popover("Elsewhere", icon=":material/terminal:"):
            st.markdown("The saved recipe from the shell, and from Python:")
            shell, python = _elsewhere(path, of_images="draw" in document)
            st.code(shell, language="bash")
            st.code(python, language="python")
    return saved


def _elsewhere(path: Path, *, of_images: bool) -> tuple[str, str]:
    """How to run a recipe from the shell and from Python."""
    module, name, run = (
        ("saes.drawing", "drawing", 'compare(["..."], [42]).after')
        if of_images
        else ("saes.steering", "steering", 'compare("...").steered.text')
    )
    shell = f'lorgnette steer {path} --prompt "..."{" --seed 42" if of_images else ""}'
    python = (
        "from pathlib import Path\nfrom saes.recipes import read_recipe\n"
        f"from {module} import prepare\n\n"
        f'{name} = prepare(read_recipe(Path("{path}")), root=Path("{data.artifact_root()}"))\n'
        f"print({name}.{run})"
    )
    return shell, python
