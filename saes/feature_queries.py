"""Questions to a feature index, answered from its Parquet files without a model.

The numbers of all features (and the tokens named beside them) are small and are held in memory;
examples, sequences, tokens, neighbours and coactivations are read from disk, of each file only the
row groups that a question touches. `FeatureIndex` never writes and may be shared between threads.
"""

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from probe.errors import Failure, UserError
from probe.runs import Run
from saes.feature_places import ImageTables
from saes.feature_schema import FEATURES, IMAGE_TABLES, SCHEMA, TABLES, literal_path
from saes.sorted_parquet import SortedParquet

ExampleKind = Literal["top", "interval", "random"]

NUMBERS = [name for name in FEATURES.names if not str(FEATURES.field(name).type).startswith("list")]
"""Columns of features.parquet that hold one number: those one can sort by."""
UNREADABLE = (duckdb.IOException, duckdb.InvalidInputException, OSError, pa.ArrowInvalid)
TABLE_COLUMNS = [name for name in FEATURES.names if name != "histogram"]
TEXTS_NAMED = 5
"""Matched tokens that a search names beside a feature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturePage:
    """One page of the table of features."""

    rows: pd.DataFrame
    """Columns of features.parquet but the histogram."""
    total: int
    """Rows that fit the filters, on all pages."""


class FeatureIndex:
    """A complete index, read-only. Open one with `FeatureIndex.open`."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.path = run.path
        self.summary: dict[str, Any] = run.manifest["summary"]
        self.n_features: int = self.summary["n_features"]
        self.histogram_edges: list[float] = self.summary["histogram_edges"]
        self._engine = duckdb.connect(":memory:")
        with self._explaining():
            file = _quoted(self._file("tokens"))
            self._engine.execute(f"CREATE VIEW tokens AS FROM read_parquet({file})")
            self._engine.execute(LOAD_FEATURES.format(file=_quoted(self._file("features"))))
            self._engine.execute(LOAD_VOCABULARY.format(file=_quoted(self._file("vocabulary"))))
            texts = pq.read_table(self._file("vocabulary"), columns=["text"])["text"]
            self._features = SortedParquet(self._file("features"), "feature")
            self._examples = SortedParquet(self._file("examples"), "feature")
            self._neighbours = SortedParquet(self._file("neighbours"), "feature")
            self._coactivations = SortedParquet(self._file("coactivations"), "feature")
            self._tokens = SortedParquet(self._file("tokens"), "token")
            self._sequences = SortedParquet(self._file("sequences"), "sequence")
            self._documents = SortedParquet(self._file("documents"), "doc")
            self._images = ImageTables(self.path, self.summary) if "grid" in self.summary else None
        self._texts = np.array(texts.to_pylist(), dtype=object)
        alive = self._rows("SELECT feature FROM features WHERE alive ORDER BY feature")
        self._alive = alive["feature"].to_numpy()

    @staticmethod
    def open(path: Path) -> "FeatureIndex":
        """Open an index folder and check that its files have their sizes.

        Raises `UserError` where the folder holds no index, and `Failure` where it is incomplete, of
        another schema, or a file is missing or truncated.
        """
        run = Run.open(path)
        again = f"`lorgnette index {run.path.parent}`"
        if run.kind != "index":
            raise UserError(
                f"an index of features was wanted and {path} is of kind {run.kind!r}; give the "
                "folder that `lorgnette index <sae folder>` printed."
            )
        if not run.complete:
            raise Failure(f"the index in {path} is not complete; run {again}: it goes on.")
        if run.config.get("schema") != SCHEMA:
            raise Failure(
                f"the index in {path} has schema {run.config.get('schema')!r} where this version "
                f"reads {SCHEMA}; run {again}: it makes a new one beside it, which is then used."
            )
        files = run.manifest["files"]
        tables = [*TABLES, *(IMAGE_TABLES if "passes.parquet" in files else ())]
        for name in (f"{table}.parquet" for table in tables):
            file, wanted = run.path / name, files.get(name, {}).get("bytes")
            found = file.stat().st_size if file.is_file() else None
            if found is None or found != wanted:
                was = "is missing" if found is None else f"has {found} bytes, not {wanted}"
                raise Failure(f"{file} {was}; delete {run.path} and run {again}.")
        return FeatureIndex(run)

    @property
    def of_images(self) -> bool:
        """Whether its tokens are places of images."""
        return self._images is not None

    @property
    def images(self) -> ImageTables:
        """What an index of images holds besides; one of text has none."""
        assert self._images is not None, "an index of text has no images"
        return self._images

    # ------------------------------------------------------------------------------- features

    def numbers(self) -> pd.DataFrame:
        """The numbers of all features, one row a feature, in order."""
        return self._rows(f"SELECT {', '.join(NUMBERS)} FROM features ORDER BY feature")

    def table(
        self,
        *,
        sort: str = "feature",
        descending: bool = False,
        alive: bool | None = None,
        min_density: float = 0.0,
        max_density: float = 1.0,
        text: str = "",
        among: Sequence[int] | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> FeaturePage:
        """One page of the features that fit all filters.

        Args:
            sort: a column that holds numbers; nulls come last, equals by number of feature.
            descending: largest first.
            alive: living features only, or dead ones only; None for both.
            min_density: share of rows on which a feature fires, at least.
            max_density: the same, at most.
            text: part of one of the feature's top tokens or raised tokens, in any case.
            among: only these features.
            limit: rows of a page.
            offset: rows before it.

        Raises `UserError` for an unknown column or a negative page.
        """
        if sort not in NUMBERS:
            raise UserError(f"features sort by one of {', '.join(NUMBERS)}; got {sort!r}.")
        if limit < 0 or offset < 0:
            raise UserError(f"limit and offset must be 0 or more; got {limit} and {offset}.")
        asked: dict[str, Any] = {"low": min_density, "high": max_density}
        conditions = ["density BETWEEN $low AND $high"]
        if alive is not None:
            conditions.append("alive" if alive else "NOT alive")
        if text:
            conditions.append("contains(named, lower($text))")
            asked["text"] = text
        if among is not None:
            conditions.append("list_contains($among::INTEGER[], feature)")
            asked["among"] = [int(feature) for feature in among]
        where = " AND ".join(conditions)
        total = self._rows(f"SELECT count(*) AS n FROM features WHERE {where}", asked)
        order = "DESC" if descending else "ASC"
        by = f"{sort} {order} NULLS LAST, feature"
        # Sorted without its lists, which are fetched for the page only.
        rows = self._rows(
            f"WITH page AS (SELECT feature FROM features WHERE {where} "
            f"ORDER BY {by} LIMIT $limit OFFSET $offset) "
            f"SELECT {', '.join(TABLE_COLUMNS)} FROM features "
            f"WHERE feature IN (FROM page) ORDER BY {by}",
            asked | {"limit": limit, "offset": offset},
        )
        return FeaturePage(rows=rows, total=int(total["n"].iloc[0]))

    def feature(self, feature: int) -> dict[str, Any]:
        """A feature's row of features.parquet, its histogram with it; None for null.

        Raises `UserError` where there is no such feature.
        """
        with self._explaining():
            return self._features.read([self._known(feature)]).to_pylist()[0]

    def next_alive(self, feature: int) -> int:
        """The living feature that follows, the first one after the last."""
        self._known(feature)
        return int(self._living()[np.searchsorted(self._alive, feature, "right") % self.n_alive])

    def previous_alive(self, feature: int) -> int:
        """The living feature before, the last one before the first."""
        self._known(feature)
        return int(self._living()[np.searchsorted(self._alive, feature, "left") - 1])

    def random_alive(self, seed: int | None = None) -> int:
        """A living feature, each as likely; the same for the same seed."""
        return int(random.Random(seed).choice(self._living()))

    @property
    def n_alive(self) -> int:
        """Number of living features."""
        return len(self._alive)

    # ------------------------------------------------------------------- one feature's tables

    def examples(self, feature: int, kind: ExampleKind | None = None) -> pd.DataFrame:
        """A feature's examples, of one kind or all, by kind, interval and rank.

        Beside the columns of examples.parquet: `document` (id), `tokens` (ids of the whole
        sequence) and `texts` (the same as text); `positions` and `activations` say where in it the
        feature fires. Raises `UserError` where there is no such feature.
        """
        with self._explaining():
            rows = self._examples.read([self._known(feature)]).to_pandas()
            if kind is not None:
                rows = rows[rows["kind"] == kind].reset_index(drop=True)
            found = self._documents.read(rows["doc"].tolist())
        documents = dict(zip(found["doc"].to_pylist(), found["id"].to_pylist(), strict=True))
        rows["document"] = [documents.get(doc) for doc in rows["doc"]]
        tokens = self.sequences(rows["sequence"].tolist())
        rows["tokens"] = [tokens[sequence] for sequence in rows["sequence"]]
        rows["texts"] = [self.texts(ids) for ids in rows["tokens"]]
        return rows

    def strongest_examples(self, features: Sequence[int]) -> pd.DataFrame:
        """The first `top` example of each of some features, by feature: rows of examples.parquet.

        Dead features have none.
        """
        with self._explaining():
            rows = self._examples.read([self._known(feature) for feature in features])
        kinds, ranks = rows["kind"].to_numpy(zero_copy_only=False), rows["rank"].to_numpy()
        return rows.filter(pa.array((kinds == "top") & (ranks == 0))).to_pandas()

    def neighbours(self, feature: int) -> pd.DataFrame:
        """Features with the nearest decoder directions, nearest first, and what they fire on."""
        with self._explaining():
            near = self._neighbours.read([self._known(feature)])
        return self._rows(
            "SELECT rank, neighbour, cosine, alive, density, max, top_tokens FROM given "
            "JOIN features ON features.feature = neighbour ORDER BY rank",
            given=near,
        )

    def coactive(self, feature: int) -> pd.DataFrame:
        """Features that fire together with it most, by Jaccard's measure, and what they fire on.

        Empty for a dead feature, and where it shares too few rows with each other one
        (`saes.feature_schema`). Raises `UserError` where there is no such feature.
        """
        with self._explaining():
            found = self._coactivations.read([self._known(feature)])
        return self._rows(
            "SELECT rank, other, n_both, jaccard, pmi, alive, density, max, top_tokens FROM given "
            "JOIN features ON features.feature = other ORDER BY rank",
            given=found,
        )

    def tokens_for_feature(self, feature: int) -> pd.DataFrame:
        """The tokens a feature fires on most, by summed activation."""
        rows = self._rows(
            "SELECT token, n, mean, max, share, rank_for_feature AS rank FROM tokens "
            "WHERE feature = $feature AND rank_for_feature IS NOT NULL ORDER BY rank",
            {"feature": self._known(feature)},
        )
        rows.insert(1, "text", self.texts(rows["token"].tolist()))
        return rows

    # ------------------------------------------------------------------------- from a token

    def features_for_token(self, token: int | str) -> pd.DataFrame:
        """The features that fire most on a token, by summed activation.

        A text is taken with and without a space before it, and may be the text of several tokens.
        Raises `UserError` where there is no such token.
        """
        with self._explaining():
            pairs = self._tokens.read(self._token_ids(token))
        return self._rows(
            "SELECT token, text, feature, n, given.mean, given.max, share, "
            "rank_for_token AS rank, density, top_tokens FROM given "
            "JOIN vocabulary USING (token) JOIN features USING (feature) "
            "WHERE rank_for_token IS NOT NULL ORDER BY n * given.mean DESC, feature",
            given=pairs,
        )

    def tokens_like(self, text: str, limit: int = 50) -> pd.DataFrame:
        """Tokens whose text contains `text`, in any case, shortest first."""
        return self._rows(
            "SELECT token, text, special FROM vocabulary WHERE contains(lowered, lower($text)) "
            "ORDER BY length(text), token LIMIT $limit",
            {"text": text, "limit": limit},
        )

    def search_text(self, text: str, limit: int = 50) -> pd.DataFrame:
        """Features that fire on tokens whose text contains `text`, in any case.

        `activation` is summed over those tokens (of the pairs that tokens.parquet keeps), `share`
        is its share of the feature's summed activation. Sorted by the product of both, so that
        neither features that fire once nor those that fire on everything come first. Raises
        `UserError` for an empty text.
        """
        if not text:
            raise UserError("a search needs part of a token's text; got nothing.")
        return self._rows(SEARCH_TEXT, {"text": text, "limit": limit, "named": TEXTS_NAMED})

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """The texts of token ids."""
        return self._texts[np.asarray(tokens, dtype=np.int64)].tolist()

    def sequences(self, numbers: Sequence[int]) -> dict[int, list[int]]:
        """The token ids of whole sequences, by number; reads only the row groups they are in."""
        with self._explaining():
            found = self._sequences.read(numbers, ["sequence", "tokens"])
        return dict(zip(found["sequence"].to_pylist(), found["tokens"].to_pylist(), strict=True))

    # ------------------------------------------------------------------------------ internals

    def _file(self, table: str) -> Path:
        return self.path / f"{table}.parquet"

    def _known(self, feature: int) -> int:
        if not 0 <= feature < self.n_features:
            raise UserError(
                f"there is no feature {feature}; this SAE has features 0 to {self.n_features - 1}."
            )
        return int(feature)

    def _living(self) -> np.ndarray:
        if not len(self._alive):
            raise UserError(f"no feature of {self.path.parent} fires on any row of the index.")
        return self._alive

    def _token_ids(self, token: int | str) -> list[int]:
        if isinstance(token, int):
            if 0 <= token < len(self._texts):
                return [token]
            raise UserError(f"there is no token {token}; ids go from 0 to {len(self._texts) - 1}.")
        found = self._rows(
            "SELECT token FROM vocabulary WHERE text = $text OR text = ' ' || $text",
            {"text": token},
        )["token"].tolist()
        if found:
            return found
        like = self.tokens_like(token, 5)["text"].tolist() if token else []
        hint = f"these contain it: {', '.join(map(repr, like))}" if like else "none contains it"
        raise UserError(f"{token!r} is no token of this vocabulary; {hint}.")

    def _rows(
        self, query: str, asked: Mapping[str, Any] | None = None, *, given: pa.Table | None = None
    ) -> pd.DataFrame:
        """What a query gives; `given` is a table that it may call so."""
        with self._explaining(), self._engine.cursor() as cursor:
            if given is not None:
                cursor.register("given", given)
            return cursor.execute(query, dict(asked or {})).df()

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """A file that cannot be read is a `Failure` with a way out."""
        try:
            yield
        except UNREADABLE as error:
            raise Failure(
                f"the index in {self.path} cannot be read ({str(error).splitlines()[0]}); delete "
                f"it and run `lorgnette index {self.path.parent}`."
            ) from error


LOAD_FEATURES = """
CREATE TABLE features AS
SELECT
    * EXCLUDE (histogram),
    lower(array_to_string(list_concat(top_tokens, positive_tokens), chr(31))) AS named
FROM read_parquet({file})
"""

LOAD_VOCABULARY = """
CREATE TABLE vocabulary AS SELECT *, lower(text) AS lowered FROM read_parquet({file})
"""

SEARCH_TEXT = """
WITH pairs AS (
    SELECT feature, token, text, n * tokens.mean::DOUBLE AS activation
    FROM tokens JOIN vocabulary USING (token)
    WHERE contains(lowered, lower($text))
),
best AS (
    SELECT
        feature,
        found.activation,
        found.activation / (mean::DOUBLE * n_active) AS share,
        n_tokens,
        density,
        max,
        top_tokens
    FROM (
        SELECT feature, sum(activation) AS activation, count(*) AS n_tokens
        FROM pairs GROUP BY feature
    ) AS found JOIN features USING (feature)
    ORDER BY found.activation * share DESC, feature
    LIMIT $limit
)
SELECT feature, best.activation, share, n_tokens, matched, density, max, top_tokens
FROM best JOIN (
    SELECT feature, list(text ORDER BY activation DESC, token)[:$named] AS matched
    FROM pairs WHERE feature IN (SELECT feature FROM best) GROUP BY feature
) USING (feature)
ORDER BY best.activation * share DESC, feature
"""


def _quoted(path: Path) -> str:
    return "'" + literal_path(path).replace("'", "''") + "'"
