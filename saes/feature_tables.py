"""From firings to tables: exact statistics and examples, one range of features at a time.

Features are cut into ranges of about equal numbers of firings. DuckDB reads a range's firings from
the pieces of the pass, under a memory limit and with a folder to spill to, and gives for each range
three part files, each renamed into place when whole, so a killed build goes on with the next range:

    statistics-*.parquet   a row a living feature
    examples-*.parquet     rows of examples.parquet
    tokens-*.parquet       token <-> feature pairs that may be among the strongest of either

What is computed is defined in `saes.feature_schema`. Ties are broken by number and random choices
by a polynomial hash with per-feature coefficients (Wegman and Carter 1981), so the answer depends
neither on how the ranges are cut nor on the number of threads.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from probe.errors import UserError
from probe.runs import atomic_path
from saes.feature_schema import (
    EXAMPLE_ROW_GROUP,
    EXAMPLES,
    HISTOGRAM_DECADES,
    ROW_GROUP,
    TOKEN_RANKS,
    TOKENS,
    TOP_TOKENS,
    IndexConfig,
    literal_path,
)

HASH_PRIME = 2**32 - 5
"""The largest prime below 2^32: (p - 1) * p fits in 64 bits."""

STATISTICS_PART = pa.schema(
    [
        pa.field("feature", pa.int32()),
        pa.field("n_active", pa.int64()),
        pa.field("mean", pa.float32()),
        pa.field("sd", pa.float32()),
        pa.field("max", pa.float32()),
        pa.field("histogram", pa.list_(pa.int64())),
        pa.field("top_tokens", pa.list_(pa.int32())),
        pa.field("top_token_shares", pa.list_(pa.float32())),
    ]
)
TOKENS_PART = pa.schema(
    [
        pa.field("feature", pa.int32()),
        pa.field("token", pa.int32()),
        pa.field("n", pa.int64()),
        pa.field("total", pa.float64()),
        pa.field("max", pa.float32()),
        pa.field("rank_for_feature", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildLimits:
    """What a build may take of the machine; changes nothing in the result."""

    memory_gb: float = 2.0
    """Memory for the statistics, in GB; what does not fit is spilled to the run folder."""
    threads: int | None = None
    """Threads for the statistics; None for one a core."""
    firings: int = 8_000_000
    """Firings of one range of features, about 100 bytes of memory each."""

    def __post_init__(self) -> None:
        if self.memory_gb <= 0 or self.firings < 1 or (self.threads or 1) < 1:
            raise UserError(f"the limits of an index must be above zero; got {self}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FurtherParts:
    """Part files that an index of something else than text has besides."""

    tables: tuple[str, ...]
    """Their tables."""
    write: Callable[[duckdb.DuckDBPyConnection, Mapping[str, Path]], None]
    """Writes those of the range that the engine holds (`codes`, `moments`, `token_sums`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What must be known of all firings before the statistics of any feature."""

    n_active: np.ndarray
    """Firings of each feature, int64 [d_sae]."""
    smallest: float
    """Smallest positive code; 0 where nothing fires."""
    largest: float
    """Largest code; 0 where nothing fires."""


def open_engine(spill_dir: Path, limits: BuildLimits) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB within the limits, which spills to `spill_dir`."""
    spill_dir.mkdir(parents=True, exist_ok=True)
    threads = limits.threads or len(os.sched_getaffinity(0))
    return duckdb.connect(
        ":memory:",
        config={
            "memory_limit": f"{limits.memory_gb}GB",
            "threads": threads,
            "temp_directory": str(spill_dir),
        },
    )


def survey(engine: duckdb.DuckDBPyConnection, pieces: Sequence[Path], d_sae: int) -> Survey:
    """Count every feature's firings and find the smallest and largest code."""
    rows = engine.sql(
        "SELECT feature, count(*) AS n, min(value) AS low, max(value) AS high "
        "FROM read_parquet($pieces) GROUP BY feature",
        params={"pieces": _names(pieces)},
    ).to_arrow_table()
    assert rows is not None, "a SELECT gives a table"
    n_active = np.zeros(d_sae, np.int64)
    if not len(rows):
        return Survey(n_active=n_active, smallest=0.0, largest=0.0)
    found = {name: rows[name].to_numpy() for name in rows.column_names}
    n_active[found["feature"]] = found["n"]
    return Survey(
        n_active=n_active, smallest=float(found["low"].min()), largest=float(found["high"].max())
    )


def histogram_edges(smallest: float, largest: float, bins: int) -> list[float]:
    """Log-spaced edges, one more than `bins`, each exactly a float32 and the last one `largest`."""
    if largest <= 0:
        smallest, largest = 0.1, 1.0
    low = np.clip(smallest, largest / 10**HISTOGRAM_DECADES, largest / 10)
    edges = np.geomspace(low, largest, bins + 1).astype(np.float32)
    edges[-1] = largest
    return [float(edge) for edge in edges]


def feature_ranges(n_active: np.ndarray, firings: int) -> list[range]:
    """Cut the features into ranges of at most `firings` firings, or of one feature."""
    ranges, start, total = [], 0, 0
    for feature, n in enumerate(n_active.tolist()):
        if feature > start and total + n > firings:
            ranges.append(range(start, feature))
            start, total = feature, 0
        total += n
    return [*ranges, range(start, len(n_active))]


def hash_coefficients(d_sae: int, seed: int) -> np.ndarray:
    """Each feature's coefficients `(a, b, c)` of the hash, uint64 [d_sae, 3]."""
    return np.random.default_rng(seed).integers(1, HASH_PRIME, (d_sae, 3), dtype=np.uint64)


def write_parts(
    folder: Path,
    engine: duckdb.DuckDBPyConnection,
    pieces: Sequence[Path],
    ranges: Sequence[range],
    config: IndexConfig,
    edges: Sequence[float],
    *,
    more: FurtherParts | None = None,
    progress: bool,
) -> dict[str, list[Path]]:
    """Compute the part files of every range that are not there yet; gives all, by table."""
    d_sae = ranges[-1].stop
    a, b, c = hash_coefficients(d_sae, config.seed).T
    numbers = np.arange(d_sae, dtype=np.int32)
    engine.register("salts", pa.table({"feature": numbers, "a": a, "b": b, "c": c}))
    tables = ("statistics", "examples", "tokens", *(more.tables if more else ()))
    parts: dict[str, list[Path]] = {table: [] for table in tables}
    for features in tqdm(ranges, desc="statistics", unit=" ranges", disable=not progress):
        span = f"{features.start:08d}-{features.stop:08d}"
        paths = {table: folder / f"{table}-{span}.parquet" for table in parts}
        if not all(path.exists() for path in paths.values()):
            _load_range(engine, pieces, features)
            _write_range(engine, config, edges, paths, more)
        for table, path in paths.items():
            parts[table].append(path)
    return parts


def _load_range(engine: duckdb.DuckDBPyConnection, pieces: Sequence[Path], features: range) -> None:
    engine.execute(
        "CREATE OR REPLACE TEMP TABLE codes AS "
        "SELECT * FROM read_parquet($pieces) WHERE feature >= $start AND feature < $stop",
        {"pieces": _names(pieces), "start": features.start, "stop": features.stop},
    )


def _write_range(
    engine: duckdb.DuckDBPyConnection,
    config: IndexConfig,
    edges: Sequence[float],
    paths: Mapping[str, Path],
    more: FurtherParts | None,
) -> None:
    engine.execute(MOMENTS, {"upper_edges": list(edges[1:])})
    engine.execute(TOKEN_SUMS)
    write_query(engine, STATISTICS, {"n": TOP_TOKENS}, paths["statistics"], STATISTICS_PART)
    write_query(engine, TOKEN_PAIRS, {"n": TOKEN_RANKS}, paths["tokens"], TOKENS_PART)
    if more is not None:
        more.write(engine, paths)
    engine.execute("DROP TABLE token_sums")
    engine.execute(STRATA, {"intervals": config.intervals})
    engine.execute(PEAKS)
    engine.execute(
        CHOSEN,
        {
            "top": config.top,
            "random": config.random,
            "per_interval": config.per_interval,
            "prime": HASH_PRIME,
        },
    )
    engine.execute(SHARES)
    engine.execute("DROP TABLE strata; DROP TABLE peaks")
    engine.execute(SPANS)
    write_query(
        engine,
        EXAMPLE_ROWS,
        {"intervals": config.intervals},
        paths["examples"],
        EXAMPLES,
        row_group=EXAMPLE_ROW_GROUP,
    )


MOMENTS = """
CREATE OR REPLACE TEMP TABLE moments AS
SELECT
    feature,
    count(*) AS n_active,
    sum(value::DOUBLE) AS total,
    avg(value::DOUBLE) AS mean,
    stddev_pop(value::DOUBLE) AS sd,
    max(value) AS max,
    map_values(histogram(value, $upper_edges::FLOAT[])) AS histogram
FROM codes GROUP BY feature
"""

# Ranks go by sums rounded to float32: a sum in another order then gives the same rank.
TOKEN_SUMS = """
CREATE OR REPLACE TEMP TABLE token_sums AS
SELECT
    *,
    row_number() OVER (PARTITION BY feature ORDER BY total::FLOAT DESC, token) - 1
        AS rank_for_feature
FROM (
    SELECT feature, token, count(*) AS n, sum(value::DOUBLE) AS total, max(value) AS max
    FROM codes GROUP BY feature, token
)
"""

STATISTICS = """
SELECT feature, n_active, mean, sd, max, histogram, top_tokens, top_token_shares
FROM moments JOIN (
    SELECT
        feature,
        list(token ORDER BY rank_for_feature) AS top_tokens,
        list(token_sums.total / moments.total ORDER BY rank_for_feature) AS top_token_shares
    FROM token_sums JOIN moments USING (feature)
    WHERE rank_for_feature < $n
    GROUP BY feature
) USING (feature)
ORDER BY feature
"""

# A pair among the strongest of its token is so in its own range, too.
TOKEN_PAIRS = """
SELECT feature, token, n, total, max, rank_for_feature
FROM token_sums
QUALIFY rank_for_feature < $n
    OR row_number() OVER (PARTITION BY token ORDER BY total::FLOAT DESC, feature) <= $n
"""

# ceil(value * intervals / max) in float64 is exact: a float32 times a small integer is not rounded,
# and no quotient of two such numbers lies within rounding of an integer without being one.
STRATA = """
CREATE OR REPLACE TEMP TABLE strata AS
SELECT
    feature,
    ceil(codes.value::DOUBLE * $intervals / moments.max)::INTEGER - 1 AS interval,
    sequence,
    max(codes.value) AS value,
    count(*) AS n
FROM codes JOIN moments USING (feature)
GROUP BY feature, interval, sequence
"""

PEAKS = """
CREATE OR REPLACE TEMP TABLE peaks AS
SELECT
    feature, sequence, max(value) AS value
FROM strata GROUP BY feature, sequence
"""

CHOSEN = """
CREATE OR REPLACE TEMP TABLE chosen AS
WITH hashed AS (
    SELECT
        feature, sequence, value,
        ((a * (sequence + 1)::UBIGINT + b) % $prime::UBIGINT * (sequence + 1)::UBIGINT + c)
            % $prime::UBIGINT AS hash
    FROM peaks JOIN salts USING (feature)
),
top AS (
    SELECT
        feature, 'top' AS kind, -1 AS interval, sequence, value,
        row_number() OVER (PARTITION BY feature ORDER BY value DESC, sequence) - 1 AS rank
    FROM peaks QUALIFY rank < $top
),
random AS (
    SELECT
        feature, 'random' AS kind, -1 AS interval, sequence, value,
        row_number() OVER (PARTITION BY feature ORDER BY hash, sequence) - 1 AS rank
    FROM hashed QUALIFY rank < $random
),
drawn AS (
    SELECT feature, strata.interval, sequence, strata.value
    FROM strata JOIN hashed USING (feature, sequence)
    QUALIFY row_number() OVER (
        PARTITION BY feature, strata.interval
        ORDER BY strata.value < hashed.value, hash, sequence
    ) <= $per_interval
),
ranked AS (
    SELECT
        feature, 'interval' AS kind, interval, sequence, value,
        row_number() OVER (PARTITION BY feature, interval ORDER BY value DESC, sequence) - 1
            AS rank
    FROM drawn
)
SELECT * FROM top UNION ALL SELECT * FROM random UNION ALL SELECT * FROM ranked
"""

SHARES = """
CREATE OR REPLACE TEMP TABLE shares AS
SELECT feature, interval, sum(n) AS n FROM strata GROUP BY feature, interval
"""

SPANS = """
CREATE OR REPLACE TEMP TABLE spans AS
SELECT
    feature,
    sequence,
    list(position ORDER BY position) AS positions,
    list(doc ORDER BY position) AS docs,
    list(token ORDER BY position) AS tokens,
    list(value ORDER BY position) AS activations
FROM codes SEMI JOIN chosen USING (feature, sequence)
GROUP BY feature, sequence
"""

EXAMPLE_ROWS = """
SELECT
    feature,
    kind,
    interval,
    CASE WHEN interval >= 0 THEN interval * max::DOUBLE / $intervals END AS interval_low,
    CASE WHEN interval >= 0 THEN (interval + 1) * max::DOUBLE / $intervals END AS interval_high,
    shares.n / n_active AS interval_share,
    rank,
    value AS activation,
    sequence,
    positions[list_position(activations, value)] AS position,
    docs[list_position(activations, value)] AS doc,
    tokens[list_position(activations, value)] AS token,
    positions,
    activations
FROM chosen
JOIN spans USING (feature, sequence)
JOIN moments USING (feature)
LEFT JOIN shares USING (feature, interval)
ORDER BY feature, kind, interval, rank
"""

ALL_TOKENS = """
WITH ranked AS (
    SELECT
        *, row_number() OVER (PARTITION BY token ORDER BY total::FLOAT DESC, feature) - 1 AS place
    FROM read_parquet($parts)
)
SELECT
    token,
    feature,
    n,
    total / n AS mean,
    max,
    n / occurrences AS share,
    CASE WHEN place < $n THEN place END AS rank_for_token,
    CASE WHEN rank_for_feature < $n THEN rank_for_feature END AS rank_for_feature
FROM ranked JOIN occurrences USING (token)
WHERE place < $n OR rank_for_feature < $n
ORDER BY token, feature
"""


def write_tokens(
    path: Path,
    engine: duckdb.DuckDBPyConnection,
    parts: Sequence[Path],
    occurrences: np.ndarray,
) -> None:
    """Write tokens.parquet from its parts and each token's count of rows."""
    numbers = np.arange(len(occurrences), dtype=np.int32)
    engine.register("occurrences", pa.table({"token": numbers, "occurrences": occurrences}))
    parameters = {"parts": _names(parts), "n": TOKEN_RANKS}
    write_query(engine, ALL_TOKENS, parameters, path, TOKENS)


def join_parts(path: Path, parts: Sequence[Path], schema: pa.Schema, *, row_group: int) -> None:
    """Append sorted part files to one, a row group at a time."""
    write_tables(path, _row_groups(parts), schema, row_group=row_group)


def _row_groups(parts: Sequence[Path]) -> Iterator[pa.Table]:
    for part in parts:
        with pq.ParquetFile(part) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number)


def write_query(
    engine: duckdb.DuckDBPyConnection,
    query: str,
    parameters: Mapping[str, Any],
    path: Path,
    schema: pa.Schema,
    *,
    row_group: int = ROW_GROUP,
) -> None:
    """Write what a query gives, in its order and with exactly the schema, as Parquet."""
    reader = engine.sql(query, params=dict(parameters)).to_arrow_reader(row_group)
    assert reader is not None, "a SELECT gives a reader"
    tables = (pa.Table.from_batches([batch]) for batch in reader)
    write_tables(path, tables, schema, row_group=row_group)


def write_tables(
    path: Path, tables: Iterator[pa.Table], schema: pa.Schema, *, row_group: int = ROW_GROUP
) -> None:
    """Write tables one after another as one Parquet file (zstd), cast to the schema."""
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=row_group)


def _names(paths: Sequence[Path]) -> list[str]:
    return [literal_path(path) for path in paths]
