"""A prompt in a model and its broken copy, measured while a person waits; for all sessions.

Apart from `app.data`, because it imports the model libraries.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import streamlit as st
import torch
from jaxtyping import Float

from analyses.circuit_breakers.asking import Ask
from analyses.circuit_breakers.features import difference, read_row
from analyses.circuit_breakers.inside import changes
from analyses.circuit_breakers.rows import Passage, TokenRow, token_rows
from app.data import SaeRecord, stamp
from app.live import load, shared_sae
from probe.language import LanguageModel
from probe.prompt_sets import Row
from probe.sites import parse_site
from probe.tokens import token_texts
from saes.recipe_saes import LoadedSae

ANSWER = 48
"""Tokens that each model answers with, at most."""
LONGEST = 256
"""Tokens of a request that are read; its last ones where it is longer."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A request in both models."""

    answers: tuple[str, str]
    """What the original and the broken model answer; empty where they are not to."""
    ids: Row
    """The request's and the original's answer's tokens, with the template's."""
    start: int
    """The first token that not all prompts share: from here on states are compared."""
    texts: tuple[str, ...]
    """The compared tokens as they would be printed."""
    cosine: Float[np.ndarray, "e t"]
    """Cosine of the broken state with the original's, by state and token."""
    longer: Float[np.ndarray, "e t"]
    """Log of its length over the original's."""


def _models(adapter: str, base: str) -> tuple[LanguageModel, LanguageModel]:
    return load(base, None, "float32")[0], load(adapter, None, "float32")[0]


@st.cache_data(show_spinner=False, max_entries=32)
def compared(adapter: str, base: str, request: str, *, answering: bool) -> Compared:
    """Both models on a request. Raises `UserError` where it cannot be written or a model loaded.

    Args:
        adapter: the broken model's folder.
        base: the model that it was made of.
        request: what the user says.
        answering: let both answer, and read the original's answer too.
    """
    lock = load(base, None, "float32")[1]
    with lock:
        original, broken = _models(adapter, base)
        asked = Passage(request=request, response="x" if answering else "")
        (row,) = token_rows(original, [asked], request_length=LONGEST, response_length=1)
        prompt, answers = row.ids[: row.answer], ((), ())
        if answering:
            answers = tuple(
                Ask(model=model).continuations([prompt], ANSWER)[0] for model in (original, broken)
            )
        whole = TokenRow(ids=prompt + answers[0], shared=row.shared, answer=len(prompt))
        (change,) = changes(original, broken, [whole])
    start = max(1, whole.shared)
    texts = [str(original.tokenizer.decode(list(answer))) for answer in answers]
    return Compared(
        answers=(texts[0], texts[1]), ids=whole.ids, start=start,
        texts=token_texts(original, whole.ids)[start:], cosine=change.cosine,
        longer=np.log(np.maximum(change.ratio, 1e-8)),
    )  # fmt: skip


def fits(record: SaeRecord, base: str) -> bool:
    """Whether an SAE reads the residual stream of a model with its own weights."""
    described = record.run.config["model"]
    site = parse_site(record.run.config["site"])
    own = (described["spec"], described.get("random_weights")) == (base, None)
    return own and site.kind in ("resid_pre", "resid_post")


@st.cache_data(show_spinner=False, max_entries=32)
def feature_changes(
    _record: SaeRecord, adapter: str, base: str, ids: Row, start: int, top: int
) -> pd.DataFrame:
    """The features whose mean over the compared tokens falls and rises most.

    Columns `kind` (`lost`, `appeared`), `feature`, `original`, `broken`, `token` where it changes
    most.
    """
    path = _record.run.path
    loaded = LoadedSae(
        run=_record.run, sae=shared_sae(path, stamp(path / "sae_weights.safetensors")),
        site=_record.run.config["site"],
    )  # fmt: skip
    row = TokenRow(ids=ids, shared=start, answer=len(ids))
    with load(base, None, "float32")[1], torch.no_grad():
        original, broken = _models(adapter, base)
        reads = [(read_row(original, row, loaded), read_row(broken, row, loaded))]
        found = difference(original, reads, [row])
    tokens = {place["feature"]: place["token"] for place in found.places}
    change = found.broken - found.original
    order = np.argsort(change)
    rows = [
        {
            "kind": kind, "feature": int(feature), "original": float(found.original[feature]),
            "broken": float(found.broken[feature]), "token": tokens.get(int(feature), ""),
        }
        for kind, features in (("lost", order[:top]), ("appeared", order[::-1][:top]))
        for feature in features
        if change[feature] != 0
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["kind", "feature", "original", "broken", "token"])
