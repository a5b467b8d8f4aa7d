"""The table of all features, held in memory: which rows a filter lets through, in which order.

A filter and a sort over twenty thousand rows are then a few milliseconds of pandas. What is slow in
Python, the texts of a row's tokens, is made once for an index (`base_table`), and what changes when
a person writes something, the labels, is joined once for each change (`with_labels`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from app.wording import token_list
from probe.errors import UserError
from saes.feature_queries import FeatureIndex, FeaturePage

ROWS_SHOWN = 20_000
"""Rows that the table of features sends to the browser at most."""
COLUMNS_SHOWN = (
    "feature", "label", "score", "match", "density_percent", "max", "mean", "top_tokens",
    "positive_tokens", "nearest_cosine",
)  # fmt: skip
"""Columns of that table: what is not shown is not sent."""
TOKENS_NAMED = 5
"""Tokens in a cell of that table."""
MATCH = "match"
"""The order of a search that ranks what it finds."""
SearchPlace = Literal["named", "all tokens", "prompts", "label", "text"]
RANKED: Collection[SearchPlace] = ("all tokens", "prompts", "text")
"""Searches that say how well a feature matches, not only whether."""
FeatureState = Literal["alive", "dead", "dense", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureFilter:
    """Which features to list, and in which order."""

    state: FeatureState = "alive"
    """Alive: fires at all. Dense: on more than `dense_from` of the tokens."""
    density: tuple[float, float] = (0.0, 1.0)
    """Least and largest density, as shares of tokens."""
    text: str = ""
    """What to search for; empty for no search."""
    search_in: SearchPlace = "named"
    """Where to look for the text: the few tokens named beside a feature (those it fires on most and
    those it promotes), all tokens that the index says it fires on, the prompts of its strongest
    images, the feature's label; or the text is run through the model, and features that fire on it
    are found."""
    members_of: str = ""
    """Name of a list that the feature has to be in; empty for any."""
    order: str = "feature"
    """The column to sort by."""
    descending: bool = False
    """Largest first; a search that ranks what it finds has the best first in any case."""


def base_table(index: FeatureIndex) -> pd.DataFrame:
    """Every feature's numbers, the texts of its tokens as a person reads them, and for searches.

    A row a feature, in order.
    """
    rows = index.table(limit=index.n_features).rows
    lists = zip(rows["top_tokens"], rows["positive_tokens"], strict=True)
    rows["named"] = ["\x1f".join([*_all(top), *_all(promoted)]).lower() for top, promoted in lists]
    for column in ("top_tokens", "positive_tokens"):
        rows[column] = [token_list(_all(tokens), TOKENS_NAMED) for tokens in rows[column]]
    rows["density_percent"] = 100 * rows["density"]
    return rows.drop(columns=[name for name in rows if name.startswith("negative_")])


def _all(tokens: Any) -> Collection[str]:
    """A list of tokens; empty where the index has none, which pandas tells in several ways."""
    return tokens if isinstance(tokens, Collection) else ()


def with_labels(
    table: pd.DataFrame, own: Mapping[int, str], automatic: pd.DataFrame
) -> pd.DataFrame:
    """The table with a label and its score: a person's label first, which has no score.

    Args:
        table: of `base_table`.
        own: labels that a person wrote, by feature.
        automatic: columns feature, label and score; may be empty.
    """
    labels, scores = np.full(len(table), "", dtype=object), np.full(len(table), np.nan)
    features = automatic["feature"].to_numpy(dtype=np.int64)
    labels[features] = automatic["label"].to_numpy()
    scores[features] = automatic["score"].to_numpy(dtype=float)
    for feature, label in own.items():
        if feature < len(table):
            labels[feature], scores[feature] = label, np.nan
    return table.assign(label=labels, score=scores, label_key=[text.lower() for text in labels])


def select(
    table: pd.DataFrame,
    wanted: FeatureFilter,
    *,
    dense_from: float,
    members: Collection[int] | None,
    matches: Mapping[int, float] | None,
) -> FeaturePage:
    """The first `ROWS_SHOWN` features that a filter lets through, in its order, and their number.

    Args:
        table: of `with_labels`.
        wanted: the filter.
        dense_from: the density from which on a feature is dense.
        members: the features of the list that the filter names; None for all.
        matches: what a ranked search found: how well each feature matches; None where the filter
            has no such search.

    Raises `UserError` for a column that one cannot sort by.
    """
    kept = _in_state(table, wanted, dense_from)
    if members is not None:
        kept &= np.isin(table["feature"].to_numpy(), list(members))
    fits = np.full(len(table), np.nan)
    if matches is not None:
        fits[list(matches)] = list(matches.values())
        kept &= ~np.isnan(fits)
    elif wanted.text:
        column = "label_key" if wanted.search_in == "label" else "named"
        kept &= table[column].str.contains(wanted.text.lower(), regex=False).to_numpy(dtype=bool)
    found = table.assign(match=fits).loc[kept]
    return FeaturePage(rows=_shown(_sorted(found, wanted)), total=len(found))


def _in_state(table: pd.DataFrame, wanted: FeatureFilter, dense_from: float) -> np.ndarray:
    low, high = wanted.density
    density, alive = table["density"].to_numpy(), table["alive"].to_numpy(dtype=bool)
    low = max(low, dense_from) if wanted.state == "dense" else low
    kept = (density >= low) & (density <= high)
    if wanted.state == "all":
        return kept
    return kept & (alive if wanted.state != "dead" else ~alive)


def _sorted(found: pd.DataFrame, wanted: FeatureFilter) -> pd.DataFrame:
    """By the wanted column; missing values come last, equals by number of feature."""
    column = "label_key" if wanted.order == "label" else wanted.order
    if column not in found:
        raise UserError(f"the table has no column {wanted.order!r} to sort by.")
    missing = (found[column] == "") if column == "label_key" else found[column].isna()
    known, unknown = found.loc[~missing], found.loc[missing]
    ascending = not wanted.descending and column != MATCH
    known = known.sort_values(column, ascending=ascending, kind="stable")
    return pd.concat([known, unknown])


def _shown(found: pd.DataFrame) -> pd.DataFrame:
    """The rows and columns to send; columns of which nothing is known are left out."""
    known = {
        "label": (found["label"] != "").to_numpy().any(),
        "score": found["score"].notna().to_numpy().any(),
        "match": found["match"].notna().to_numpy().any(),
        "positive_tokens": (found["positive_tokens"] != "").to_numpy().any(),
    }
    columns = [name for name in COLUMNS_SHOWN if known.get(name, True)]
    return found.head(ROWS_SHOWN).loc[:, columns].reset_index(drop=True)
