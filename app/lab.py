"""What the prompt lab runs: models on a person's text, under the model's lock, cached by text.

Like `app.live` it imports the model libraries and is imported only where a page runs a model.

Codes come from the model in the number format that the SAE was trained on. Contributions, lens and
patching are measured in float32 where the model is small enough to be held a second time: in
bfloat16 the rounding inside the blocks is as large as the effect of many a feature.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import streamlit as st

from app import data, live
from app.data import SaeRecord, stamp
from probe.language import LanguageModel
from probe.lens import Lens, logit_lens
from probe.patching import Into, Pair, PatchedKind, PatchGrid, make_pair, patch_grid
from probe.readout import Metric, predicted
from probe.tokens import Prompt, Turn, one_token, read_chat, read_text, token_texts
from saes.attribution import Ablation, Attribution, Where, ablate, attribute
from saes.models import SparseAutoencoder
from saes.patching import FeaturePatching, patch_features
from saes.prompts import MAX_TOKENS

Typed = str | tuple[Turn, ...]
SMALL = 1_000_000_000
"""Parameters up to which a model in bfloat16 is held in float32 besides."""
CHOICES = 10
"""Likely next tokens that a person is offered."""


def prompt_of(record: SaeRecord, typed: Typed) -> Prompt:
    """The tokens of what a person typed, cut where it is too long; raises as `probe.tokens`."""
    model = live.live_sae(record).model
    if isinstance(typed, str):
        return read_text(model, typed, at_most=MAX_TOKENS)
    return read_chat(model, typed, at_most=MAX_TOKENS)


def token_number(record: SaeRecord, text: str, known: dict[str, int]) -> int:
    """The token that a text is; middle dots at its ends stand for spaces. Raises `UserError`."""
    if text in known:
        return known[text]
    plain = text.strip("\u00b7")
    lead, trail = text.find(plain), len(text) - len(text.rstrip("\u00b7"))
    spaced = " " * lead + plain + " " * trail if plain else " " * len(text)
    return one_token(live.live_sae(record).model, spaced)


def token_text(record: SaeRecord, token: int) -> str:
    """A token as it would be printed."""
    return token_texts(live.live_sae(record).model, [token])[0]


@contextmanager
def _exact(record: SaeRecord) -> Iterator[tuple[LanguageModel, SparseAutoencoder, str]]:
    """Model, SAE and its site for a measurement, the model's lock held."""
    held = live.live_sae(record)
    model, lock = exact_model(record)
    with lock:
        yield model, held.sae, held.site


def exact_model(record: SaeRecord) -> tuple[LanguageModel, threading.Lock]:
    """The model in float32 where it is small, else as it is."""
    held = live.live_sae(record)
    described = record.run.config["model"]
    if str(held.model.dtype) == "torch.float32" or held.model.model.num_parameters() > SMALL:
        return held.model, held.lock
    return live.load(described["spec"], described.get("random_weights"), "float32")


def number_format(record: SaeRecord) -> str:
    """The number format in which measurements are made."""
    return str(exact_model(record)[0].dtype).removeprefix("torch.")


def _key(record: SaeRecord) -> tuple[Path, float]:
    return record.run.path, stamp(record.run.path / "sae_weights.safetensors")


def next_tokens(record: SaeRecord, prompt: Prompt) -> list[tuple[int, str, float]]:
    """The likeliest tokens after a prompt: number, text, probability."""
    return _next_tokens(record, _key(record), prompt)


@st.cache_resource(show_spinner=False, max_entries=64)
def _next_tokens(
    _record: SaeRecord, key: tuple[Path, float], prompt: Prompt
) -> list[tuple[int, str, float]]:
    with _exact(_record) as (model, _, _):
        best = predicted(model, prompt).topk(CHOICES)
        ids = best.indices.tolist()
        return list(zip(ids, token_texts(model, ids), best.values.exp().tolist(), strict=True))


def lens_of(record: SaeRecord, prompt: Prompt, target: int | None) -> Lens:
    """The logit lens of a prompt."""
    return _lens(record, _key(record), prompt, target)


@st.cache_resource(show_spinner=False, max_entries=32)
def _lens(_record: SaeRecord, key: tuple[Path, float], prompt: Prompt, target: int | None) -> Lens:
    with _exact(_record) as (model, _, _):
        return logit_lens(model, prompt, target=target)


def attribution_of(record: SaeRecord, prompt: Prompt, metric: Metric) -> Attribution:
    """What each active feature contributes, estimated."""
    return _attribution(record, _key(record), prompt, metric)


@st.cache_resource(show_spinner=False, max_entries=32)
def _attribution(
    _record: SaeRecord, key: tuple[Path, float], prompt: Prompt, metric: Metric
) -> Attribution:
    with _exact(_record) as (model, sae, site):
        return attribute(model, sae, site, prompt, metric)


def ablation_of(
    record: SaeRecord, prompt: Prompt, metric: Metric, where: Where, top: int
) -> Ablation:
    """The features of largest attribution taken out."""
    return _ablation(record, _key(record), prompt, metric, where, top)


@st.cache_resource(show_spinner=False, max_entries=32)
def _ablation(
    _record: SaeRecord,
    key: tuple[Path, float],
    prompt: Prompt,
    metric: Metric,
    where: Where,
    top: int,
) -> Ablation:
    found = attribution_of(_record, prompt, metric)
    with _exact(_record) as (model, sae, _):
        return ablate(model, sae, found, top=top, where=where)


def pair_of(record: SaeRecord, clean: Prompt, corrupted: Prompt, metric: Metric | None) -> Pair:
    """Two prompts with their metrics. Raises `UserError` where they cannot be patched."""
    return _pair(record, _key(record), clean, corrupted, metric)


@st.cache_resource(show_spinner=False, max_entries=32)
def _pair(
    _record: SaeRecord,
    key: tuple[Path, float],
    clean: Prompt,
    corrupted: Prompt,
    metric: Metric | None,
) -> Pair:
    with _exact(_record) as (model, _, _):
        return make_pair(model, clean, corrupted, metric)


def grid_of(
    record: SaeRecord, pair: Pair, kind: PatchedKind, into: Into, layers: tuple[int, ...]
) -> PatchGrid:
    """Every chosen layer patched at every position that differs."""
    return _grid(record, _key(record), pair, kind, into, layers)


@st.cache_resource(show_spinner=False, max_entries=32)
def _grid(
    _record: SaeRecord,
    key: tuple[Path, float],
    pair: Pair,
    kind: PatchedKind,
    into: Into,
    layers: tuple[int, ...],
) -> PatchGrid:
    with _exact(_record) as (model, _, _):
        return patch_grid(model, pair, kind=kind, into=into, layers=layers)


def patched_features(record: SaeRecord, pair: Pair, into: Into, top: int) -> FeaturePatching:
    """Single features taken from the other prompt."""
    return _patched_features(record, _key(record), pair, into, top)


@st.cache_resource(show_spinner=False, max_entries=32)
def _patched_features(
    _record: SaeRecord, key: tuple[Path, float], pair: Pair, into: Into, top: int
) -> FeaturePatching:
    with _exact(_record) as (model, sae, site):
        return patch_features(model, sae, site, pair, into=into, top=top)


def separator(record: SaeRecord) -> int:
    """The token in front of a plain text."""
    return live.live_sae(record).model.separator_id


def n_layers(record: SaeRecord) -> int:
    """Layers of the SAE's model."""
    return live.live_sae(record).model.n_layers


def same_model(record: SaeRecord) -> list[SaeRecord]:
    """Complete SAEs of the same model, by layer and site, the newest of the same name last."""
    wanted = model_key(record)
    found = [
        other for other in data.sae_records() if other.run.complete and model_key(other) == wanted
    ]
    return sorted(found, key=lambda other: (site_order(other.run.config["site"]), other.name))


def model_key(record: SaeRecord) -> tuple[str, int | None]:
    """Which model an SAE belongs to: its name and the seed of random weights."""
    described = record.run.config["model"]
    return described["spec"], described.get("random_weights")


def site_order(site: str) -> tuple[int, str]:
    """Sites by layer, those without one at the end."""
    layer = site.rpartition(".")[2]
    return (int(layer), site) if layer.isdecimal() else (10**6, site)


def labels_of(record: SaeRecord, features: Sequence[int]) -> list[str]:
    """What is known of features in a few words: labels where there are any, else usual tokens."""
    from app.views import token_list

    labels = data.labels(record)
    index = data.feature_index(record) if record.index else None
    words = []
    for feature in features:
        usual = index.feature(feature)["top_tokens"] if index is not None else None
        words.append(labels.get(feature) or token_list(usual))
    return words
