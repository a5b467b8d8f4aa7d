"""What the pages of features ask for, put together from `app.data`, cached where it takes long."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from app import data, feature_table, tile_data
from app.feature_content import FeatureContent, WhereAndWhen
from app.feature_table import FeatureFilter
from app.headlines import Headline, headlines
from saes.feature_queries import FeatureIndex, FeaturePage

# ------------------------------------------------------------------------------- the whole table


def filtered_features(
    record: data.SaeRecord, wanted: FeatureFilter, on_text: Mapping[int, float] | None = None
) -> FeaturePage:
    """The first features that a filter lets through, in its order, and how many there are.

    Args:
        record: the SAE.
        wanted: the filter.
        on_text: where the filter searches in a text, the features that fire on it: how strongly,
            by feature (`app.live.features_on`).
    """
    index = data.feature_index(record)
    known = (index.path, data.stamp(index.path / "manifest.json"))
    matches = on_text
    if wanted.text and wanted.search_in == "all tokens":
        matches = _on_tokens(index, *known, wanted.text)
    if wanted.text and wanted.search_in == "prompts":
        matches = tile_data.features_of_prompts(index, wanted.text)
    return feature_table.select(
        labelled_features(record),
        wanted,
        dense_from=data.dense_from(),
        members=data.list_features(record, wanted.members_of) if wanted.members_of else None,
        matches=matches,
    )


@st.cache_resource(show_spinner=False, max_entries=16)
def _on_tokens(_index: FeatureIndex, path: Path, changed: float, text: str) -> Mapping[int, float]:
    found = _index.search_text(text, limit=feature_table.ROWS_SHOWN)
    fits = found["activation"] * found["share"]
    return dict(zip(found["feature"].tolist(), fits.tolist(), strict=True))


def labelled_features(record: data.SaeRecord) -> pd.DataFrame:
    """Every feature with its label, as `app.feature_table` has it; shared, not to be written to.

    Where the notes cannot be read, features are shown without the labels that are in them.
    """
    index = data.feature_index(record)
    known = (index.path, data.stamp(index.path / "manifest.json"))
    table = _base_table(index, *known)
    written = (data.artifact_root() / data.NOTES_FILE, data.notes_revision())
    return _labelled(table, record, *known, *written, _labelled_at(record))


@st.cache_resource(show_spinner=False, max_entries=4)
def _base_table(_index: FeatureIndex, path: Path, changed: float) -> pd.DataFrame:
    return feature_table.base_table(_index)


@st.cache_resource(show_spinner=False, max_entries=4)
def _labelled(
    _table: pd.DataFrame, _record: data.SaeRecord, path: Path, changed: float, written: Path,
    revision: int, automatic: float,
) -> pd.DataFrame:  # fmt: skip
    own = data.notes().labels(_record.name) if revision >= 0 else {}
    return feature_table.with_labels(_table, own, data.auto_labels(_record))


# --------------------------------------------------------------------------------- one feature


def feature_labels(record: data.SaeRecord, features: Sequence[int]) -> list[str]:
    """The labels of a few features, as `data.labels` has them; empty for one without a label."""
    made = data.auto_labels(record)
    rows = made.loc[np.isin(made["feature"].to_numpy(dtype=np.int64), features)]
    named = dict(zip(rows["feature"].tolist(), rows["label"].tolist(), strict=True))
    if data.notes_revision() >= 0:
        named |= data.notes().labels(record.name)
    return [named.get(feature, "") for feature in features]


def automatic_label(record: data.SaeRecord, feature: int) -> dict[str, Any] | None:
    """A feature's automatic label with its score and control; None where it has none."""
    made = data.auto_labels(record)
    rows = made.loc[made["feature"].to_numpy() == feature].to_dict("records")
    if not rows:
        return None
    return {str(name): value if pd.notna(value) else None for name, value in rows[0].items()}


def feature_content(record: data.SaeRecord, feature: int) -> FeatureContent:
    """All that there is to say about a feature. Raises `UserError` where there is no such one."""
    index = data.feature_index(record)
    row, written = index.feature(feature), data.notes()
    return FeatureContent(
        sae=record.name,
        feature=feature,
        row=row,
        edges=tuple(index.histogram_edges),
        headlines=feature_headlines(record, row),
        groups=data.examples(record, feature),
        tokens=index.tokens_for_feature(feature),
        in_images=WhereAndWhen(
            mean=index.images.mean_map(feature),
            firings=index.images.firings_map(feature),
            steps=index.images.steps(feature),
        )
        if index.of_images
        else None,
        neighbours=index.neighbours(feature),
        coactive=coactive(record, feature),
        note=written.note(record.name, feature),
        lists=tuple(written.lists_of(record.name, feature)),
        automatic=automatic_label(record, feature),
        provenance=data.provenance(record),
    )


def coactive(record: data.SaeRecord, feature: int) -> pd.DataFrame:
    """Features that fire on the same tokens or places."""
    return data.feature_index(record).coactive(feature)


def feature_headlines(record: data.SaeRecord, row: Mapping[str, Any]) -> tuple[Headline, ...]:
    """A feature's headline numbers beside those of the random-weight twin, as far as it is there.

    Args:
        record: the SAE.
        row: the feature's row of the index.
    """
    twin = data.twin_record(record)
    scores = data.auto_labels(twin)["score"].to_numpy(dtype=float) if twin else np.empty(0)
    made = automatic_label(record, row["feature"])
    told = data.told_from_twin(record)
    return headlines(row, made, data.twin_references(record), scores, told)


def twin_command(record: data.SaeRecord) -> str | None:
    """What to run so that the twin's numbers stand beside the feature's; None where they do."""
    twin = data.twin_record(record)
    if record.is_control or data.twin_references(record):
        return None
    if twin is not None:
        return f"lorgnette index {twin.run.path}"
    model, site = record.run.config["model"]["spec"], record.run.config["site"]
    return f"lorgnette capture {model} builtin --sites {site} --random-weights 0"


def _labelled_at(record: data.SaeRecord) -> float:
    """When the labels that `data.auto_labels` gives were finished."""
    finished = [
        data.stamp(run.path / "manifest.json")
        for run in data.runs_of("labels")
        if run.path.parent == record.run.path
    ]
    return max(finished, default=0.0)
