"""Which features fire together: by hand, and against a dense matrix product."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_pairs import strongest_pairs

from probe.errors import UserError
from saes.feature_coactivation import (
    count_pairs,
    drawn_sequences,
    feature_blocks,
    write_coactivations,
)
from saes.feature_schema import CODES, IndexConfig
from saes.feature_tables import BuildLimits

SMALL = BuildLimits(threads=2, memory_gb=1e-7)
"""One feature a block, one piece at a time."""


def write_pieces(folder: Path, fires: np.ndarray, context: int, rows_of_piece: int) -> list[Path]:
    """Pieces of the pass in which row `r` is position 1 + r % context of sequence r // context."""
    paths = []
    for start in range(0, len(fires), rows_of_piece):
        feature, row = fires[start : start + rows_of_piece].T.nonzero()
        row = row + start
        columns = {
            "feature": feature,
            "sequence": row // context,
            "position": row % context + 1,
            "doc": row * 0,
            "token": row * 0,
            "value": np.ones(len(row)),
        }
        paths.append(folder / f"codes-{start:05d}.parquet")
        pq.write_table(pa.table(columns).cast(CODES), paths[-1], row_group_size=7)
    return paths


def coactivations(
    folder: Path,
    fires: np.ndarray,
    n: int = 10,
    *,
    limits: BuildLimits | None = None,
    sequences: np.ndarray | None = None,
    n_rows: int | None = None,
    context: int = 5,
    rows_of_piece: int = 20,
) -> list[tuple]:
    folder.mkdir(parents=True, exist_ok=True)
    pieces = write_pieces(folder, fires, context, rows_of_piece)
    parts = write_coactivations(
        folder, pieces, fires.shape[1], len(fires) if n_rows is None else n_rows, sequences,
        IndexConfig(coactive=n), limits or BuildLimits(threads=1), progress=False,
    )  # fmt: skip
    names = ("feature", "rank", "other", "n_both", "jaccard", "pmi")
    tables = [pq.read_table(part) for part in parts]
    return [tuple(row[name] for name in names) for t in tables for row in t.to_pylist()]


def matrix(n_rows: int, *rows_of_features: list[int]) -> np.ndarray:
    """A boolean matrix [rows, features] from the rows that each feature fires on."""
    fires = np.zeros((n_rows, len(rows_of_features)), bool)
    for feature, rows in enumerate(rows_of_features):
        fires[rows, feature] = True
    return fires


def test_by_hand(tmp_path):
    # 64 rows. Feature 0 on 8 of them, 1 on the first 6 of these and 2 others, 2 on all of 0's and 8
    # others, 3 never, 4 on one row, 5 alone on 16.
    fires = matrix(
        64, [*range(8)], [*range(6), 20, 21], [*range(8), *range(30, 38)], [], [0],
        [*range(48, 64)],
    )  # fmt: skip
    found = coactivations(tmp_path, fires)
    assert found == [
        (0, 0, 1, 6, 6 / 10, np.log2(6 * 64 / (8 * 8))),
        (0, 1, 2, 8, 8 / 16, 2.0),
        (1, 0, 0, 6, 6 / 10, np.log2(6.0)),
        (1, 1, 2, 6, 6 / 18, np.log2(3.0)),
        (2, 0, 0, 8, 8 / 16, 2.0),
        (2, 1, 1, 6, 6 / 18, np.log2(3.0)),
    ]
    assert coactivations(tmp_path / "one", fires, n=1) == found[::2]
    assert coactivations(tmp_path / "none", fires, n=0) == []


def test_equal_measures_go_by_number(tmp_path):
    fires = matrix(40, *[[*range(6)]] * 4)
    assert [(f, other) for f, _, other, *_ in coactivations(tmp_path, fires, n=2)] == [
        (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 0), (3, 1),
    ]  # fmt: skip


def test_pairs_of_few_rows_and_pairs_by_chance_are_left_out(tmp_path):
    four, five = [*range(4)], [*range(10, 15)]
    assert coactivations(tmp_path / "few", matrix(40, four, four)) == []
    assert len(coactivations(tmp_path / "enough", matrix(40, five, five))) == 2
    # Each on half of the rows, independent: a Jaccard of a third, and nothing in it.
    halves = [*range(20)], [*range(10, 30)]
    assert coactivations(tmp_path / "chance", matrix(40, *halves)) == []
    (one, _) = coactivations(tmp_path / "more", matrix(41, *halves))
    assert one[3:5] == (10, 1 / 3) and 0 < one[5] < 0.04
    everywhere = [*range(40)]
    assert coactivations(tmp_path / "all", matrix(40, everywhere, everywhere)) == []


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_firings_equal_a_matrix_product(tmp_path_factory, data):
    n_rows, d_sae = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    topics = rng.random((n_rows, 3)) < 0.4
    fires = (topics @ (rng.random((3, d_sae)) < 0.5)) & (rng.random((n_rows, d_sae)) < 0.9)
    counts = fires.astype(np.int64)
    n = data.draw(st.integers(1, 4))
    expected = strongest_pairs(counts.T @ counts, n_rows, n)
    for limits in (BuildLimits(threads=1), SMALL):
        folder = tmp_path_factory.mktemp("pairs")
        context = data.draw(st.integers(1, 7))
        size = context * data.draw(st.integers(1, 9))
        found = coactivations(folder, fires, n, limits=limits, context=context, rows_of_piece=size)
        assert [row[:5] for row in found] == [row[:5] for row in expected]
        np.testing.assert_allclose([r[5] for r in found], [r[5] for r in expected], atol=1e-12)


def test_only_drawn_sequences_count(tmp_path):
    rng = np.random.default_rng(0)
    fires = np.repeat(rng.random((200, 3)) < 0.4, 2, axis=1)
    drawn = np.arange(40) % 3 == 0
    kept = fires[np.repeat(drawn, 5)]
    expected = coactivations(tmp_path / "kept", kept)
    assert len(expected) == 6
    found = coactivations(tmp_path / "drawn", fires, sequences=drawn, n_rows=len(kept))
    assert found == expected
    nothing = np.zeros(40, bool)
    assert coactivations(tmp_path / "nothing", fires, sequences=nothing, n_rows=0) == []


def test_pairs_are_the_squares_of_the_firings_of_a_row(tmp_path):
    rng = np.random.default_rng(0)
    fires = rng.random((50, 6)) < 0.5
    pieces = write_pieces(tmp_path, fires, 5, 20)
    assert count_pairs(pieces) == (fires.sum(1) ** 2).sum()
    assert count_pairs([]) == 0


def test_sequences_are_drawn_where_the_pairs_are_too_many():
    config = IndexConfig(coactive_pairs=1000, seed=3)
    assert drawn_sequences(10_000, 1000, config) is None
    drawn = drawn_sequences(10_000, 4000, config)
    assert drawn is not None and 0.23 < drawn.mean() < 0.27
    again = drawn_sequences(10_000, 4000, config)
    assert again is not None and np.array_equal(drawn, again)
    with pytest.raises(UserError, match="coactive_pairs of an index must be 1 or more; got 0"):
        IndexConfig(coactive_pairs=0)


@pytest.mark.parametrize("d_sae, memory_gb", [(1, 1e-9), (7, 1e-7), (18_432, 2.0), (10**6, 1e-6)])
def test_blocks_cover_all_features_once_within_half_the_memory(d_sae, memory_gb):
    blocks = feature_blocks(d_sae, BuildLimits(memory_gb=memory_gb))
    assert blocks[0].start == 0 and blocks[-1].stop == d_sae
    assert all(one.stop == two.start for one, two in itertools.pairwise(blocks))
    for block in blocks:
        assert len(block) == 1 or 4 * d_sae * len(block) <= memory_gb * 1e9 / 2
