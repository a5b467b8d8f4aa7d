"""The twin's numbers beside a feature's: the spread, the scale, and which SAE is the twin."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from artifact_tree import SITE, make_synthetic_index
from sklearn.metrics import roc_auc_score

from app import data
from probe.errors import Failure
from probe.runs import Run
from saes.activations import TopK
from saes.constraints import initialise
from saes.feature_queries import FeatureIndex
from saes.feature_reference import (
    HEADLINES,
    Reference,
    headline_numbers,
    told_apart,
    twin_statistics,
    typical_code,
)
from saes.folder import save_sae
from saes.models import SaeConfig, SparseAutoencoder

N_FEATURES = 60


def reference(*values: float) -> Reference:
    return Reference(values=np.sort(np.array(values, np.float64)))


def make_sae(
    root: Path,
    random_weights: int | None,
    *,
    corpus: str = "novels",
    site: str = SITE,
    steps: int = 10,
    dtype: str = "float32",
    index: bool = True,
) -> Run:
    """An untrained SAE's folder, with a synthetic index."""
    config = {
        "kind": "sae", "schema": 1,
        "model": {"spec": "toy", "random_weights": random_weights, "dtype": dtype},
        "site": site,
        "source": {"store": f"{corpus}-{random_weights}"},
        "train": {"d_sae": N_FEATURES, "steps": steps},
    }  # fmt: skip
    run = Run.create(root / "saes", f"toy-{random_weights}", config)
    sae = SparseAutoencoder(SaeConfig(d_in=4, d_sae=N_FEATURES, activation=TopK(k=4)))
    sample = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    initialise(sae, sample, torch.Generator().manual_seed(0))
    metadata = {"hook_name": site, "dataset_path": corpus, "context_size": 128}
    save_sae(sae, run.path, metadata=metadata, golden_x=sample)
    run.finish(summary={}, inputs={}, seeds={}, device="cpu")
    if index:
        make_synthetic_index(run, N_FEATURES, top=2)
    return run


def index_of(run: Run) -> FeatureIndex:
    (found,) = run.path.glob("index-*")
    return FeatureIndex.open(found)


def multiply_codes(run: Run, factor: float) -> None:
    """As if the SAE read activations `factor` times as large."""
    index = index_of(run)
    table = pq.read_table(index.path / "features.parquet")
    for name in ("mean", "sd", "max"):
        values = pa.array(
            [None if v is None else v * factor for v in table[name].to_pylist()], pa.float32()
        )
        table = table.set_column(table.column_names.index(name), table.schema.field(name), values)
    pq.write_table(table, index.path / "features.parquet")
    manifest = index.path / "manifest.json"
    content = json.loads(manifest.read_text())
    size = (index.path / "features.parquet").stat().st_size
    content["files"]["features.parquet"]["bytes"] = size
    manifest.write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORGNETTE_ROOT", str(tmp_path))
    data.found_runs.clear()
    return tmp_path


def record(run: Run) -> data.SaeRecord:
    data.found_runs.clear()
    return data.sae_record(run.path.name)


# ------------------------------------------------------------------------------- the spread


def test_a_reference_by_hand():
    found = reference(4.0, 1.0, 3.0, 2.0, 5.0)
    assert (found.n, found.median) == (5, 3.0)
    assert (found.low, found.high) == pytest.approx((1.2, 4.8))
    assert [found.share_below(value) for value in (0.0, 1.0, 2.5, 5.0, 9.0)] == [0, 0, 0.4, 0.8, 1]
    assert reference(2.0, 2.0).share_below(2.0) == 0, "an equal number is not below"
    one = reference(7.0)
    assert (one.median, one.low, one.high, one.n) == (7.0, 7.0, 7.0, 1)


def test_headline_numbers_are_those_of_the_tables(tmp_path):
    index = index_of(make_sae(tmp_path, None))
    rows = pq.read_table(index.path / "features.parquet").to_pandas()
    alive = rows[rows["alive"]]
    numbers = headline_numbers(index)
    assert numbers.index.tolist() == alive["feature"].tolist()
    assert list(numbers.columns) == list(HEADLINES)
    unit = np.median(alive["mean"].astype(float))
    assert typical_code(index) == unit
    for name in ("density", "n_active", "max", "mean", "sd", "nearest_cosine", "decoder_norm"):
        assert numbers[name].tolist() == alive[name].tolist()
    for name in ("mean", "sd", "max"):
        expected = alive[name].astype(float) / unit
        np.testing.assert_allclose(numbers[f"{name}_relative"], expected, rtol=1e-6)
    assert np.median(numbers["mean_relative"]) == pytest.approx(1)
    assert numbers["top_token_share"].tolist() == [s[0] for s in alive["top_token_shares"]]
    strongest = [max(index.coactive(f)["jaccard"], default=0.0) for f in alive["feature"]]
    assert numbers["top_jaccard"].tolist() == strongest
    assert max(strongest) > min(strongest) == 0


def test_statistics_leave_out_dead_features_and_missing_numbers(tmp_path):
    index = index_of(make_sae(tmp_path, None))
    found = twin_statistics(index)
    assert set(found) == set(HEADLINES)
    assert {spread.n for spread in found.values()} == {index.n_alive}
    assert index.n_alive < N_FEATURES
    rows = index.numbers()
    alive = rows[rows["alive"]]
    assert found["density"].median == np.median(alive["density"])
    assert found["max"].high == pytest.approx(np.quantile(alive["max"], 0.95))
    middle = float(np.median(alive["density"]))
    assert found["density"].share_below(middle) == (alive["density"] < middle).mean()


def test_statistics_of_an_index_without_neighbours_or_life(tmp_path):
    run = make_sae(tmp_path, None)
    index = index_of(run)
    rows = pq.read_table(index.path / "features.parquet")
    place = rows.column_names.index("nearest_cosine")
    nulls = pa.nulls(len(rows), pa.float32())
    pq.write_table(rows.set_column(place, "nearest_cosine", nulls), index.path / "features.parquet")
    resize(index.path)
    assert set(HEADLINES) - set(twin_statistics(index_of(run))) == {"nearest_cosine"}
    dead = pa.array([False] * len(rows))
    pq.write_table(rows.set_column(1, "alive", dead), index.path / "features.parquet")
    resize(index.path)
    assert twin_statistics(index_of(run)) == {}
    assert np.isnan(typical_code(index_of(run)))


def resize(index: Path) -> None:
    """Let the manifest agree with a changed file."""
    content = json.loads((index / "manifest.json").read_text())
    for name, recorded in content["files"].items():
        recorded["bytes"] = (index / name).stat().st_size
    (index / "manifest.json").write_text(json.dumps(content))


def test_sizes_are_scaled_by_the_typical_code_and_counts_by_the_rows(tmp_path):
    own, twin = make_sae(tmp_path, None), make_sae(tmp_path, 0)
    plain = twin_statistics(index_of(twin))
    multiply_codes(twin, 16.0)
    raw = twin_statistics(index_of(twin))
    assert raw["max"].median == pytest.approx(16 * plain["max"].median)
    assert raw["max_relative"].median == pytest.approx(plain["max_relative"].median)
    scaled = twin_statistics(index_of(twin), like=index_of(own))
    # The two indexes hold the same numbers but for the factor: scaled, they are the same.
    for name in HEADLINES:
        np.testing.assert_allclose(scaled[name].values, plain[name].values, rtol=1e-6)
    index = index_of(own)
    index.summary["n_rows"] *= 3
    counts = twin_statistics(index_of(twin), like=index)["n_active"]
    np.testing.assert_allclose(counts.values, 3 * plain["n_active"].values)


# ---------------------------------------------------------------------------------- the twin


def test_the_twin_is_the_one_trained_in_the_same_way(root):
    own = make_sae(root, None)
    assert data.twin_record(record(own)) is None
    assert data.twin_references(record(own)) == {}
    make_sae(root, 1, corpus="letters")
    make_sae(root, 1, steps=11)
    make_sae(root, 1, site="resid_post.0")
    make_sae(root, 1, dtype="bfloat16")
    assert data.twin_record(record(own)) is None
    later = make_sae(root, 2)
    make_sae(root, 1, index=False)
    found = data.twin_record(record(own))
    assert found is not None and found.name == later.path.name, "the indexed one comes first"
    first = make_sae(root, 0)
    found = data.twin_record(record(own))
    assert found is not None and found.name == first.path.name, "then the lower seed"
    assert data.twin_record(record(first)) is None, "a control has no control"


def test_references_are_read_again_when_the_index_changes(root):
    own, twin = make_sae(root, None), make_sae(root, 0)
    before = data.twin_references(record(own))
    assert set(before) == set(HEADLINES)
    assert data.twin_references(record(own)) is before
    multiply_codes(own, 2.0)
    manifest = index_of(own).path / "manifest.json"
    os.utime(manifest, (manifest.stat().st_atime, manifest.stat().st_mtime + 5))
    after = data.twin_references(record(own))
    assert after["max"].median == pytest.approx(2 * before["max"].median)
    config = index_of(twin).path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"schema": 1}))
    assert data.twin_references(record(own)) == {}, "an index of another schema says nothing"


def test_an_index_of_an_older_schema_gives_way_to_the_new_one(root):
    run = make_sae(root, None)
    new = index_of(run).path
    config = json.loads((new / "config.json").read_text())
    old = Run.create(run.path, "index", config | {"schema": 1})
    assert old.path != new, "the folder's name goes with the schema: nothing has to be deleted"
    shutil.copyfile(new / "manifest.json", old.path / "manifest.json")
    os.utime(old.path / "manifest.json", (2e9, 2e9))
    found = record(run).index
    assert found is not None and found.path == new, "though the old one was touched later"
    shutil.rmtree(new)
    with pytest.raises(Failure, match=r"has schema 1 where this .* reads 2; run `lorgnette index"):
        data.feature_index(record(run))


def test_no_references_without_an_index(root):
    own = make_sae(root, None, index=False)
    make_sae(root, 0)
    assert data.twin_record(record(own)) is not None
    assert data.twin_references(record(own)) == {}


def test_how_well_a_number_tells_two_indexes_apart(tmp_path):
    run, twin_run = make_sae(tmp_path, None), make_sae(tmp_path, 0, index=False)
    make_synthetic_index(twin_run, N_FEATURES // 2, top=2)
    trained, twin = index_of(run), index_of(twin_run)
    for found in told_apart(trained, trained).values():
        assert found.auroc == 0.5 and found.tells is not True
    numbers = [headline_numbers(index) for index in (trained, twin)]
    told = told_apart(trained, twin)
    for name, column in (("density", "density"), ("max", "max_relative")):
        own, other = (n[column].dropna().to_numpy() for n in numbers)
        labels = np.r_[np.ones(len(own)), np.zeros(len(other))]
        assert told[name].auroc == pytest.approx(roc_auc_score(labels, np.r_[own, other]))
        assert told[name].low <= told[name].auroc <= told[name].high
        assert told[name].n == min(len(own), len(other))
    assert told["density"].auroc != 0.5, "the two are not the same"
    multiply_codes(twin_run, 3.0)
    assert told_apart(trained, index_of(twin_run))["max"].auroc == pytest.approx(told["max"].auroc)
