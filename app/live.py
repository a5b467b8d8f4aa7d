"""Models and SAEs in memory, for the text a person types; shared by all sessions.

Apart from `app.data`, because it imports the model libraries, which takes seconds: pages that only
look at files never wait for it.
"""

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
import torch

from analyses.dose_cells import first_feature, measured_once
from analyses.dose_measured import Config, Dosed
from app.data import SaeRecord, artifact_root, stamp
from app.views import Strip
from probe.generation import prompt_tokens, token_texts
from probe.language import LanguageModel
from probe.models import Dtype, load_model
from probe.runs import find_runs
from saes.folder import load_sae
from saes.models import SparseAutoencoder
from saes.prompts import PromptCodes, RankedFeature, Ranking, encode_prompt, rank_features
from saes.recipes import recipe_from
from saes.steering import LoadedSae, Steering, find_sae_run, prepare

QUICK = Config(times=(0.5, 1.0, 1.5), prompts=8, written=3, new_tokens=16, sequences=1, controls=3)
"""The dose-response that a person waits for at the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveSae:
    """A model and an SAE in memory, shared by all sessions."""

    model: LanguageModel
    """The model the SAE was trained on."""
    sae: SparseAutoencoder
    """The SAE."""
    site: str
    """Where it reads."""
    lock: threading.Lock
    """Held while the model runs: hooks of two sessions would see each other's text."""


@st.cache_resource(show_spinner=False, max_entries=2)
def _model(
    spec: str, random_weights: int | None, dtype: Dtype
) -> tuple[LanguageModel, threading.Lock]:
    return load_model(spec, random_weights=random_weights, dtype=dtype), threading.Lock()


@st.cache_resource(show_spinner=False, max_entries=4)
def _sae(path: Path, changed: float) -> SparseAutoencoder:
    return load_sae(path)


def live_sae(record: SaeRecord) -> LiveSae:
    """Load the SAE and its model, once for all sessions. Raises what loading raises."""
    config = record.run.config
    described = config["model"]
    model, lock = _model(
        described["spec"], described.get("random_weights"), described.get("dtype", "auto")
    )
    weights = record.run.path / "sae_weights.safetensors"
    return LiveSae(
        model=model, sae=_sae(record.run.path, stamp(weights)), site=config["site"], lock=lock
    )


@st.cache_resource(show_spinner=False, max_entries=16)
def _steering(document: str, root: Path, folder: Path | None) -> tuple[Steering, threading.Lock]:
    recipe = recipe_from(json.loads(document), folder=folder)
    loaded: dict[str, LoadedSae] = {}
    for key, reference in recipe.saes.items():
        found = find_sae_run(reference, root)
        weights = found.path / "sae_weights.safetensors"
        sae = _sae(found.path, stamp(weights))
        loaded[key] = LoadedSae(run=found, sae=sae, site=found.config["site"])
    dtypes = {one.run.config["model"].get("dtype", "auto") for one in loaded.values()} or {"auto"}
    model, lock = _model(recipe.model.spec, recipe.model.random_weights, dtypes.pop())
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


@st.cache_resource(show_spinner=False, max_entries=64)
def _prompt(_record: SaeRecord, path: Path, changed: float, text: str) -> PromptCodes:
    live = live_sae(_record)
    with live.lock:
        return encode_prompt(live.model, live.sae, live.site, text)


def prompt_codes(record: SaeRecord, text: str) -> PromptCodes:
    """Codes of every token of a text. Raises `UserError` where it has none."""
    path = record.run.path
    return _prompt(record, path, stamp(path / "sae_weights.safetensors"), text)


def prompt_strip(codes: PromptCodes, feature: int) -> Strip:
    """One feature on a person's text, the end-of-text token in front left out."""
    activations = codes.feature(feature).tolist()
    return Strip(tokens=codes.texts[1:], activations=tuple(activations[1:]), first_position=1)


def ranked(
    codes: PromptCodes, *, token: int | None, skip_special: bool, by: Ranking, top: int
) -> list[RankedFeature]:
    """Features that fire on one token (counted from 0), or on the whole text where it is None.

    Args:
        codes: the text's codes.
        token: the chosen token.
        skip_special: leave position 0 and special tokens out, unless one of them is chosen.
        by: what to rank by.
        top: how many at most.
    """
    if token is not None:
        chosen = torch.arange(len(codes.texts)) == token
    else:
        chosen = codes.keep if skip_special else torch.ones_like(codes.keep)
    return rank_features(codes, chosen, by=by, top=top)


def texts_of_prompt(spec: str, text: str, *, chat: bool) -> list[str]:
    """A prompt's tokens as text, the end-of-text token in front. Raises as `prompt_tokens`."""
    model, _ = _model(spec, None, "auto")
    return token_texts(model.tokenizer, prompt_tokens(model, text, chat=chat))


def dose(document: Mapping[str, Any], folder: Path | None, say: Callable[[str], None]) -> Dosed:
    """The quick dose-response of a recipe, measured once. Raises as `steering` does."""
    ready, lock = steering(document, folder)
    with lock:
        return measured_once(ready, QUICK, artifact_root(), twin=_twin(ready), probe=None, say=say)


def _twin(ready: Steering) -> LoadedSae | None:
    """The SAE of the random-weight twin that was trained the same way; None where there is none."""
    if (found := first_feature(ready)) is None:
        return None
    ours = found[1].run.config
    for run in find_runs(artifact_root(), "sae"):
        config = run.config
        seed = config["model"].get("random_weights")
        same = (config["site"], config.get("train")) == (ours["site"], ours.get("train"))
        if run.complete and seed is not None and same:
            weights = run.path / "sae_weights.safetensors"
            return LoadedSae(run=run, sae=_sae(run.path, stamp(weights)), site=config["site"])
    return None
