"""Recipes in memory, ready to run at a page; models and SAEs are those of `app.live`."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st
from jaxtyping import UInt8
from torch import Tensor

from analyses.dose_cells import first_feature, measured_once
from analyses.dose_measured import Config, Dosed
from app import data
from app.data import artifact_root, stamp
from app.live import load, load_images, shared_sae
from probe.generation import prompt_tokens
from probe.tokens import token_texts
from saes import drawing
from saes.drawing import Drawing, Drawn
from saes.folder import WEIGHTS
from saes.recipe_saes import LoadedSae, common_dtype, find_sae_run
from saes.recipes import Recipe, recipe_from
from saes.steering import Steering, prepare

QUICK = Config(times=(0.5, 1.0, 1.5), prompts=8, written=3, new_tokens=16, sequences=1, controls=3)
"""The dose-response that a person waits for at the page."""


@st.cache_resource(show_spinner=False, max_entries=16)
def _steering(document: str, root: Path, folder: Path | None) -> tuple[Steering, threading.Lock]:
    recipe = recipe_from(json.loads(document), folder=folder)
    loaded = _loaded(recipe, root)
    model, lock = load(recipe.model.spec, recipe.model.random_weights, common_dtype(loaded))
    with lock:
        return prepare(recipe, root=root, model=model, saes=loaded), lock


def _loaded(recipe: Recipe, root: Path) -> dict[str, LoadedSae]:
    """A recipe's SAEs, shared with everybody who uses them."""
    loaded: dict[str, LoadedSae] = {}
    for key, reference in recipe.saes.items():
        found = find_sae_run(reference, root)
        sae = shared_sae(found.path, stamp(found.path / WEIGHTS))
        loaded[key] = LoadedSae(run=found, sae=sae, site=found.config["site"])
    return loaded


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


# -------------------------------------------------------------------------------------- of images


@st.cache_resource(show_spinner=False, max_entries=16)
def _drawing(document: str, root: Path, folder: Path | None) -> tuple[Drawing, threading.Lock]:
    recipe = recipe_from(json.loads(document), folder=folder)
    loaded = _loaded(recipe, root)
    model, lock = load_images(recipe.model.spec, recipe.model.random_weights, common_dtype(loaded))
    with lock:
        return drawing.prepare(recipe, root=root, model=model, saes=loaded), lock


def drawing_of(document: Mapping[str, Any], folder: Path | None) -> tuple[Drawing, threading.Lock]:
    """A recipe of images ready to run, and the lock to hold while it draws.

    Args:
        document: the recipe's JSON.
        folder: what its directions' paths are relative to.

    Raises `UserError` where it is none, or what it needs is not there or does not fit.
    """
    return _drawing(json.dumps(document), artifact_root(), folder)


@st.cache_resource(show_spinner=False, max_entries=64)
def _image(
    _ready: Drawing, _lock: threading.Lock, key: str, prompt: str, seed: int, times: float | None
) -> UInt8[Tensor, "h w 3"]:
    with _lock:
        return _ready.draw([prompt], [seed], times=times)[0]


def drawn(
    document: Mapping[str, Any], folder: Path | None, prompt: str, seed: int, times: float = 1.0
) -> Drawn:
    """One prompt and seed before and after a recipe, each drawn once. Raises as `drawing_of` does.

    The image before is the same for all recipes of a model that draw alike. Bit for bit what
    `Drawing.compare` and `lorgnette steer` give.
    """
    ready, lock = drawing_of(document, folder)
    plain = _plain(ready)
    edited = f"{plain} {artifact_root()} {folder} {json.dumps(document)}"
    before = _image(ready, lock, plain, prompt, seed, None)
    after = _image(ready, lock, edited, prompt, seed, times)
    return Drawn(
        prompts=(prompt,), seeds=(seed,), before=before[None], after=after[None],
        mask=ready.pixel_mask(),
    )  # fmt: skip


def _plain(ready: Drawing) -> str:
    """What an image without edits is known by, beside its prompt and seed."""
    return f"{ready.recipe.model} {ready.model.dtype} {ready.config}"


def doses(
    document: Mapping[str, Any],
    folder: Path | None,
    prompt: str,
    seed: int,
    times: Sequence[float],
) -> Drawn:
    """One image before, and after several multiples of a recipe's strengths.

    Raises as `drawing_of` does.
    """
    ready, lock = drawing_of(document, folder)
    before = _image(ready, lock, _plain(ready), prompt, seed, None)
    with lock:
        after = ready.dose_row(prompt, seed, times)
    return Drawn(
        prompts=(prompt,) * len(times), seeds=(seed,) * len(times),
        before=before.expand_as(after), after=after, mask=ready.pixel_mask(),
    )  # fmt: skip
