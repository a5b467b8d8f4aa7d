"""Maps and comparisons as the pages read them: what `app.data` is for all else.

Every read is cached by path and time of change; frames are shared, not to be written to.

Labels and a person's lists are joined where there are any.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from app import data, tile_data
from app.data import SaeRecord, stamp
from app.wording import token_list
from probe.errors import UserError
from probe.runs import MANIFEST, Run

WEIGHTS = "sae_weights.safetensors"
TOKENS_NAMED = 5
"""Tokens in a line about a feature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMap:
    """A map with what is known of each feature on it."""

    run: Run
    """The map's folder."""
    places: pd.DataFrame
    """A row a feature that has a place: the columns of map.parquet, and those of `known`."""
    clusters: pd.DataFrame
    """A row a cluster: cluster, n_features, cohesion, chance, stands_out, name."""
    summary: Mapping[str, Any]
    """The run's numbers, those of the controls among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two SAEs matched, with what is known of the features of each."""

    run: Run
    """The comparison's folder."""
    pairs: pd.DataFrame
    """A row a pair: first, second, cosine, and what each fires on."""
    nearest: pd.DataFrame
    """A row a feature of either: side, feature, other, cosine, and what it fires on."""
    chance: pd.DataFrame
    """Cosines with directions of chance: control, measure, cosine."""
    summary: Mapping[str, Any]
    """The run's numbers."""


def maps_of(record: SaeRecord) -> list[Run]:
    """Complete maps of an SAE, the newest first."""
    return _nested(record, "map")


def _nested(record: SaeRecord, kind: str) -> list[Run]:
    found = [
        run for run in data.runs_of(kind) if run.path.parent == record.run.path and run.complete
    ]
    return sorted(found, key=lambda run: -stamp(run.path / MANIFEST))


def feature_map(record: SaeRecord, run: Run, control: str | None = None) -> FeatureMap:
    """A map and what is known of its features; or a control's, of which nothing is known."""
    return _feature_map(record, run.path, _state(record, run), control)


@st.cache_resource(show_spinner=False, max_entries=8)
def _feature_map(_record: SaeRecord, path: Path, changed: tuple, control: str | None) -> FeatureMap:
    from saes.maps import read_clusters, read_map

    run = Run.open(path)
    places = read_map(run, control)
    if control is None:
        places = places.merge(known(_record), on="feature", how="left")
    return FeatureMap(
        run=run,
        places=places,
        clusters=read_clusters(run) if control is None else read_clusters(run).iloc[:0],
        summary=run.summary,
    )


def known(record: SaeRecord) -> pd.DataFrame:
    """A row a feature: feature, density, label, score and tokens; what is not known is null.

    `label` is a person's, else the automatic one; `tokens` are those it fires on most, in one line,
    or of images the prompt of the one it fires on most.
    """
    run = record.run if record.index is None else record.index
    return _known(record, run.path, _state(record, run))


@st.cache_resource(show_spinner=False, max_entries=4)
def _known(_record: SaeRecord, path: Path, changed: tuple) -> pd.DataFrame:
    if _record.index is None:
        numbers = np.arange(shape(_record)[0], dtype=np.int32)
        frame = pd.DataFrame({"feature": numbers, "density": np.nan, "tokens": ""})
    else:
        index = data.feature_index(_record)
        rows = index.table(limit=index.n_features).rows
        frame = rows.loc[:, ["feature", "density"]].copy()
        if index.of_images:
            prompts = tile_data.prompts(index)
            first = prompts[prompts["rank"] == 0].set_index("feature")["prompt"]
            frame["tokens"] = frame["feature"].map(first).fillna("")
        else:
            frame["tokens"] = [token_list(tokens, TOKENS_NAMED) for tokens in rows["top_tokens"]]
    labels, scores = _labels(_record)
    frame["label"] = [labels.get(feature, "") for feature in frame["feature"]]
    frame["score"] = [scores.get(feature, np.nan) for feature in frame["feature"]]
    return frame


def _labels(record: SaeRecord) -> tuple[Mapping[int, str], Mapping[int, float]]:
    """Labels of features, and the detection scores of the automatic ones."""
    rows = data.auto_labels(record)
    return data.labels(record), dict(zip(rows["feature"], rows["score"], strict=True))


def _state(record: SaeRecord, run: Run) -> tuple:
    """What decides whether a cached read still holds: the run, the index, labels, the notes."""
    inside = [stamp(run.path / MANIFEST)]
    inside += [] if record.index is None else [stamp(record.index.path / MANIFEST)]
    inside += [stamp(found.path / MANIFEST) for found in _nested(record, "labels")]
    notes = data.artifact_root() / "notes.sqlite"
    return (*inside, stamp(notes), stamp(notes.with_name("notes.sqlite-wal")))


def lists() -> list[str]:
    """Names of a person's lists of features."""
    return sorted(data.lists())


def listed(name: str, record: SaeRecord) -> frozenset[int]:
    """Features of an SAE on one of a person's lists."""
    return frozenset(data.list_features(record, name))


# ------------------------------------------------------------------------------ comparisons


def comparison_of(first: SaeRecord, second: SaeRecord) -> Run | None:
    """The newest complete comparison of two SAEs, kept with the first; None where there is none."""
    wanted = (_weights(first), _weights(second))
    for run in _nested(first, "match"):
        if (run.config["first"], run.config["second"]) == wanted:
            return run
    return None


def _weights(record: SaeRecord) -> str:
    """SHA-256 of the weights, as the manifest has it."""
    return record.run.manifest["files"][WEIGHTS]["sha256"]


def shape(record: SaeRecord) -> tuple[int, int]:
    """Features of an SAE, and the width it reads. Raises `UserError` where it is in training."""
    if not record.run.complete:
        raise UserError(f"{record.name} is still in training; finish `lorgnette train` first.")
    from safetensors import safe_open

    with safe_open(record.run.path / WEIGHTS, "np") as tensors:
        n_features, width = tensors.get_slice("W_dec").get_shape()
    return n_features, width


def comparison(first: SaeRecord, second: SaeRecord, run: Run) -> Comparison:
    """A comparison with labels and tokens of the features of both."""
    changed = (_state(first, run), _state(second, second.run))
    return _comparison(first, second, run.path, second.name, changed)


@st.cache_resource(show_spinner=False, max_entries=4)
def _comparison(
    _first: SaeRecord, _second: SaeRecord, path: Path, other: str, changed: tuple
) -> Comparison:
    from saes.comparison_tables import read_comparison

    run = Run.open(path)
    tables = read_comparison(run)
    about = {
        side: known(record).set_index("feature")[["label", "tokens"]]
        for side, record in (("first", _first), ("second", _second))
    }
    pairs = tables["pairs"]
    for side, frame in about.items():
        pairs = pairs.join(frame.add_prefix(f"{side}_"), on=side)
    sides = [
        tables["nearest"][tables["nearest"]["side"] == side].join(frame, on="feature")
        for side, frame in about.items()
    ]
    return Comparison(
        run=run,
        pairs=pairs,
        nearest=pd.concat(sides, ignore_index=True),
        chance=tables["chance"],
        summary=run.summary,
    )
