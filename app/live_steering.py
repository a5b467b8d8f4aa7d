"""Recipes in memory, ready to run at a page; models and SAEs are those of `app.live`."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from analyses.dose_cells import first_feature, measured_once
from analyses.dose_measured import Config, Dosed
from app import data
from app.data import artifact_root, stamp
from app.live import load, shared_sae
from probe.generation import prompt_tokens
from probe.tokens import token_texts
from saes.folder import WEIGHTS
from saes.recipe_saes import LoadedSae, find_sae_run
from saes.recipes import recipe_from
from saes.steering import Steering, prepare

QUICK = Config(times=(0.5, 1.0, 1.5), prompts=8, written=3, new_tokens=16, sequences=1, controls=3)
"""The dose-response that a person waits for at the page."""


@st.cache_resource(show_spinner=False, max_entries=16)
def _steering(document: str, root: Path, folder: Path | None) -> tuple[Steering, threading.Lock]:
    recipe = recipe_from(json.loads(document), folder=folder)
    loaded: dict[str, LoadedSae] = {}
    for key, reference in recipe.saes.items():
        found = find_sae_run(reference, root)
        weights = found.path / WEIGHTS
        sae = shared_sae(found.path, stamp(weights))
        loaded[key] = LoadedSae(run=found, sae=sae, site=found.config["site"])
    dtypes = {one.run.config["model"].get("dtype", "auto") for one in loaded.values()} or {"auto"}
    model, lock = load(recipe.model.spec, recipe.model.random_weights, dtypes.pop())
    with lock:
        return prepare(recipe, root=root, model=model, saes=loaded), lock


def steering(document: Mapping[str, Any], folder: Path | None) -> tuple[Steering, threading.Lock]:
    """A recipe ready to run, and the lock to hold while it runs.

    Args:
        document: the recipe's JSON.
        folder: what its directions' paths are relative to.

    Raises `UserError` where it is no recipe, or what it needs is not there or does not fit.
    """
    return _steering(json.dumps(document), artifact_root(), folder)


def texts_of_prompt(spec: str, text: str, *, chat: bool) -> list[str]:
    """A prompt's tokens as text, the end-of-text token in front. Raises as `prompt_tokens`."""
    model, _ = load(spec, None, "auto")
    return list(token_texts(model, prompt_tokens(model, text, chat=chat).tolist()))


def dose(document: Mapping[str, Any], folder: Path | None, say: Callable[[str], None]) -> Dosed:
    """The quick dose-response of a recipe, measured once. Raises as `steering` does."""
    ready, lock = steering(document, folder)
    with lock:
        return measured_once(ready, QUICK, artifact_root(), twin=_twin(ready), probe=None, say=say)


def _twin(ready: Steering) -> LoadedSae | None:
    """The SAE of the random-weight twin that was trained the same way; None where there is none."""
    if (found := first_feature(ready)) is None:
        return None
    record = data.twin_record(data.sae_record(found[1].run.path.name))
    if record is None or not record.run.complete:
        return None
    run, weights = record.run, record.run.path / WEIGHTS
    return LoadedSae(run=run, sae=shared_sae(run.path, stamp(weights)), site=run.config["site"])
