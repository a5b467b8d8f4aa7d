"""Models and SAEs in memory, for the text a person types; shared by all sessions.

Apart from `app.data`, because it imports the model libraries, which takes seconds: pages that only
look at files never wait for it.
"""

import threading
from dataclasses import dataclass
from pathlib import Path

import streamlit as st
import torch

from app.data import SaeRecord, stamp
from app.views import Strip
from probe.diffusion import DiffusionModel
from probe.language import LanguageModel
from probe.models import Dtype, load_image_model, load_language_model
from probe.tokens import Prompt
from saes.folder import load_sae
from saes.models import SparseAutoencoder
from saes.prompts import PromptCodes, RankedFeature, Ranking, encode_prompt, rank_features


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


@st.cache_resource(show_spinner=False, max_entries=4)
def load(
    spec: str, random_weights: int | None, dtype: Dtype
) -> tuple[LanguageModel, threading.Lock]:
    """A model and the lock to hold while it runs, once for all sessions."""
    return load_language_model(spec, random_weights=random_weights, dtype=dtype), threading.Lock()


@st.cache_resource(show_spinner=False, max_entries=2)
def load_images(
    spec: str, random_weights: int | None, dtype: Dtype
) -> tuple[DiffusionModel, threading.Lock]:
    """An image model and the lock to hold while it draws, once for all sessions."""
    return load_image_model(spec, random_weights=random_weights, dtype=dtype), threading.Lock()


@st.cache_resource(show_spinner=False, max_entries=8)
def shared_sae(path: Path, changed: float) -> SparseAutoencoder:
    """An SAE, once for all sessions; `changed` is when its weights last did."""
    return load_sae(path)


def live_sae(record: SaeRecord) -> LiveSae:
    """Load the SAE and its model, once for all sessions. Raises what loading raises."""
    config = record.run.config
    described = config["model"]
    model, lock = load(
        described["spec"], described.get("random_weights"), described.get("dtype", "auto")
    )
    weights = record.run.path / "sae_weights.safetensors"
    return LiveSae(
        model=model, sae=shared_sae(record.run.path, stamp(weights)), site=config["site"], lock=lock
    )


@st.cache_resource(show_spinner=False, max_entries=64)
def _prompt(_record: SaeRecord, path: Path, changed: float, text: str | Prompt) -> PromptCodes:
    live = live_sae(_record)
    with live.lock:
        return encode_prompt(live.model, live.sae, live.site, text)


def prompt_codes(record: SaeRecord, text: str | Prompt) -> PromptCodes:
    """Codes of every token of a text. Raises `UserError` where it has none."""
    path = record.run.path
    return _prompt(record, path, stamp(path / "sae_weights.safetensors"), text)


def prompt_strip(codes: PromptCodes, feature: int) -> Strip:
    """One feature on a person's text, the first token (mostly an end of text) left out."""
    activations = codes.feature(feature).tolist()
    return Strip(tokens=codes.texts[1:], activations=tuple(activations[1:]), first_position=1)


def features_on(record: SaeRecord, text: str) -> dict[int, float]:
    """The features that fire on a text and the largest activation of each, strongest first.

    Position 0 and special tokens count for nothing. Raises `UserError` where the text has no token.
    """
    codes = prompt_codes(record, text)
    everything = codes.values.numel()
    found = ranked(codes, token=None, skip_special=True, by="max", top=everything)
    return {feature.feature: feature.max for feature in found}


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
