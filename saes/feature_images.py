"""What an index of images holds besides: passes, pictures, places and steps.

`saes.features` calls this where the store is of images; `saes.feature_schema` says what the tables
mean, and `saes.feature_places` answers from them. The statistics are by DuckDB from the same
firings as all others (`saes.feature_tables`), the pictures are copied from the store.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int

from probe.runs import atomic_path
from probe.store import ActivationStore, Shard
from probe.store_config import ImageStoreConfig
from saes.feature_schema import IMAGES, PASSES, PLACES, STEPS, literal_path
from saes.feature_tables import join_parts, write_query, write_tables

PICTURE_ROW_GROUP = 8
"""Pictures that are read together: a lookup is of single ones."""
MOST_PICTURE_ROW_GROUPS = 4096
"""Bounds the footer of images.parquet where there are very many pictures."""
PASS_ROW_GROUP = 1024
PLACE_ROW_GROUP = 64

PLACE_SUMS = """
SELECT
    feature,
    list(token ORDER BY token) AS places,
    list(n ORDER BY token) AS n,
    list(total / occurrences ORDER BY token) AS mean
FROM token_sums JOIN place_rows USING (token)
GROUP BY feature ORDER BY feature
"""

STEP_SUMS = """
SELECT
    feature,
    step,
    conditional,
    sums.n,
    sums.n / moments.n_active AS share,
    sums.n / step_rows.n AS density,
    sums.mean
FROM (
    SELECT feature, step, conditional, count(*) AS n, avg(value::DOUBLE) AS mean
    FROM codes JOIN passes USING (sequence)
    GROUP BY feature, step, conditional
) AS sums
JOIN moments USING (feature)
JOIN step_rows USING (step, conditional)
ORDER BY feature, step, conditional
"""


def place_names(grid: tuple[int, int]) -> list[str]:
    """What the places of a feature map of that height and width are called, by number: `y,x`."""
    height, width = grid
    return [f"{y},{x}" for y in range(height) for x in range(width)]


def image_config(store: ActivationStore) -> ImageStoreConfig | None:
    """The config of a store of images; None of text."""
    return store.config if isinstance(store.config, ImageStoreConfig) else None


def image_summary(config: ImageStoreConfig) -> dict[str, object]:
    """What the manifest of an index says of its images."""
    return {
        "grid": list(config.grid),
        "image_size": [config.height, config.width],
        "steps": config.steps,
        "guidance": config.guidance,
        "passes_of_step": list(config.passes_of_step),
    }


# ----------------------------------------------------------------------------------------- passes


def write_passes(path: Path, store: ActivationStore, site: str, used: Sequence[int]) -> None:
    """Write passes.parquet: which image and step each sequence that is used is of."""
    shards = (store.shard(number, site) for number in range(len(used)))
    tables = (
        _pass_rows(shard, length, store.config.context)
        for shard, length in zip(shards, used, strict=True)
    )
    write_tables(path, tables, PASSES, row_group=PASS_ROW_GROUP)


def _pass_rows(shard: Shard, n_rows: int, n_places: int) -> pa.Table:
    """A row for each sequence of a shard's first rows; whole sequences are used, or none of it."""
    assert shard.in_images is not None, "the store is of images"
    sequence = shard.sequence[:n_rows].numpy()
    numbers, first, counts = np.unique(sequence, return_index=True, return_counts=True)
    columns = {
        name: getattr(shard.in_images, name)[:n_rows].numpy()[first]
        for name in ("image", "step", "conditional")
    }
    kept = pa.ListArray.from_arrays(
        pa.array(np.append(first, n_rows).astype(np.int32)),
        pa.array(shard.position[:n_rows].numpy(), pa.int16()),
        mask=pa.array(counts == n_places),
    )
    return pa.table({"sequence": numbers.astype(np.int32), **columns, "kept": kept})


# ------------------------------------------------------------------------------ places and steps


def prepare_engine(
    engine: duckdb.DuckDBPyConnection,
    passes: Path,
    store: ActivationStore,
    site: str,
    used: Sequence[int],
    occurrences: Int[np.ndarray, " t"],
) -> None:
    """Give the engine what the statistics of images join with."""
    numbers = np.arange(len(occurrences), dtype=np.int32)
    engine.register("place_rows", pa.table({"token": numbers, "occurrences": occurrences}))
    # A temporary table would take memory for each sequence; a view is read again for each range.
    name = literal_path(passes).replace("'", "''")
    engine.execute(
        "CREATE OR REPLACE TEMP VIEW passes AS "
        f"SELECT sequence, step, conditional FROM read_parquet('{name}')"
    )
    engine.register("step_rows", _step_rows(store, site, used))


def _step_rows(store: ActivationStore, site: str, used: Sequence[int]) -> pa.Table:
    """Rows of each step and row of guidance."""
    counts: dict[tuple[int, bool], int] = {}
    for number, length in enumerate(used):
        places = store.shard(number, site).in_images
        assert places is not None, "the store is of images"
        both = 2 * places.step[:length].numpy().astype(np.int64) + places.conditional[
            :length
        ].numpy().astype(np.int64)
        for key, n in zip(*np.unique(both, return_counts=True), strict=True):
            pair = (int(key) // 2, bool(key % 2))
            counts[pair] = counts.get(pair, 0) + int(n)
    keys = sorted(counts)
    return pa.table(
        {
            "step": pa.array([step for step, _ in keys], pa.int16()),
            "conditional": [conditional for _, conditional in keys],
            "n": pa.array([counts[key] for key in keys], pa.int64()),
        }
    )


def write_image_parts(engine: duckdb.DuckDBPyConnection, paths: Mapping[str, Path]) -> None:
    """Write where and at which step the features of a range fire: the engine holds the range."""
    write_query(engine, PLACE_SUMS, {}, paths["places"], PLACES, row_group=PLACE_ROW_GROUP)
    write_query(engine, STEP_SUMS, {}, paths["steps"], STEPS)


def join_image_parts(folder: Path, parts: Mapping[str, Sequence[Path]]) -> None:
    """Write places and steps from the parts of all ranges."""
    places = folder / "places.parquet"
    join_parts(places, parts["places"], PLACES, row_group=PLACE_ROW_GROUP)
    join_parts(folder / "steps.parquet", parts["steps"], STEPS, row_group=PASS_ROW_GROUP)


# --------------------------------------------------------------------------------------- pictures


def write_images(folder: Path, store: ActivationStore) -> int:
    """Write images.parquet: the images that examples.parquet shows; gives how many have pixels."""
    shown = pq.read_table(folder / "examples.parquet", columns=["sequence"])["sequence"].to_numpy()
    passes = pq.read_table(folder / "passes.parquet", columns=["sequence", "image"])
    used = np.isin(passes["sequence"].to_numpy(), shown)
    wanted = np.unique(passes["image"].to_numpy()[used])
    n_kept = 0
    size = max(PICTURE_ROW_GROUP, -(-len(wanted) // MOST_PICTURE_ROW_GROUPS))
    with (
        atomic_path(folder / "images.parquet") as temporary,
        pq.ParquetWriter(
            temporary,
            IMAGES,
            # The pictures are compressed already, and statistics would repeat two of each group.
            compression="none",
            use_dictionary=False,
            write_statistics=["image"],  # type: ignore[arg-type]
        ) as writer,
    ):
        for table in _tables_of_images(store, wanted):
            n_kept += len(table) - table["data"].null_count
            if len(table):
                writer.write_table(table.cast(IMAGES), row_group_size=size)
    return n_kept


def _tables_of_images(store: ActivationStore, wanted: Int[np.ndarray, " n"]) -> Iterator[pa.Table]:
    """The wanted images in order: those the store kept from its files, then the others."""
    for path in sorted(store.run.path.glob("images-*.parquet")):
        found = pq.read_table(path, filters=pc.field("image").isin(pa.array(wanted, pa.int32())))
        yield found.select(IMAGES.names)
    # A store keeps the first of its images.
    yield _not_kept(store, wanted[wanted >= store.run.summary["kept_images"]])


def _not_kept(store: ActivationStore, images: Int[np.ndarray, " n"]) -> pa.Table:
    """Rows of images whose pixels the store did not keep; image number i draws prompt number i."""
    config, prompts = image_config(store), store.prompts()
    assert config is not None, "the store is of images"
    n = len(images)
    columns = {
        "image": images.astype(np.int32),
        "doc": images.astype(np.int32),
        "seed": config.seed + images.astype(np.int64),
        "prompt": [prompts[image] for image in images.tolist()],
        "height": np.full(n, config.height, np.int32),
        "width": np.full(n, config.width, np.int32),
        "format": pa.nulls(n, pa.string()),
        "data": pa.nulls(n, pa.binary()),
    }
    return pa.table(columns, schema=IMAGES)
