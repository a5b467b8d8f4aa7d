"""Maps of features: planted clusters, chance, repetition, and hardly any features."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, silhouette_score

from probe.errors import Failure, UserError
from probe.runs import Run, sha256_file
from saes import chance
from saes.map_clusters import NOISE, cluster_table, cohesion, find_clusters, measure, neighbourhoods
from saes.maps import MapConfig, build_map, lay_out, perplexity_of, read_clusters, read_map

QUICK = MapConfig(steps=400, perplexity=10.0)
N_GROUPS, SIZE, LOOSE, WIDTH = 5, 16, 70, 48


def planted() -> tuple[np.ndarray, np.ndarray]:
    """Tight groups of directions among loose ones, and the group of each (-1: none)."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(N_GROUPS, WIDTH))
    groups = np.repeat(centres, SIZE, 0) + 0.25 * rng.normal(size=(N_GROUPS * SIZE, WIDTH))
    rows = np.concatenate([groups, rng.normal(size=(LOOSE, WIDTH))]).astype(np.float32)
    rows *= rng.uniform(0.5, 3, (len(rows), 1)).astype(np.float32)
    return rows, np.repeat([*range(N_GROUPS), NOISE], [SIZE] * N_GROUPS + [LOOSE])


def made(folder, rows, config=QUICK, **more) -> Run:
    run = Run.create(folder, "map", config.run_config(sae="s", index=None, twin=None))
    return build_map(run, rows, config, progress=False, **more)


@pytest.fixture(scope="module")
def planted_map(tmp_path_factory) -> Run:
    rows, groups = planted()
    tokens = [["the", f" Word{group}"] if group >= 0 else ["the"] for group in groups.tolist()]
    return made(tmp_path_factory.mktemp("planted"), rows, tokens=tokens)


def test_planted_clusters_are_found_stand_out_and_are_named(planted_map):
    _, groups = planted()
    places, clusters = read_map(planted_map), read_clusters(planted_map)
    inside = places["feature"] < N_GROUPS * SIZE
    assert adjusted_rand_score(groups[inside], places["cluster"][inside]) > 0.9
    out = clusters[clusters["stands_out"]]
    assert len(out) == N_GROUPS == planted_map.summary["n_standing_out"]
    names = {name.split("  ")[0] for name in out["name"]}
    assert names == {f"word{group}" for group in range(N_GROUPS)}
    found = planted_map.summary["clusters"]
    assert found["sae"]["silhouette"] > 0.5 > 0.1 > (found["random"]["silhouette"] or 0)
    assert found["sae"]["cohesion_max"] > 1.25 * found["shaped"]["cohesion_max"]


def test_random_directions_hold_no_more_than_the_control(tmp_path):
    run = made(tmp_path, chance.isotropic(200, WIDTH, seed=11), replace(QUICK, min_cluster_size=5))
    found = run.summary
    assert found["clusters"]["sae"]["n_clusters"] > 3 and found["n_standing_out"] == 0
    own, control = found["clusters"]["sae"], found["clusters"]["random"]
    assert own["n_features"] == control["n_features"] == 200
    assert abs(own["noise_share"] - control["noise_share"]) < 0.4


def test_the_same_seed_gives_the_same_bytes_also_after_a_kill(tmp_path, planted_map):
    rows, _ = planted()
    other = Run.create(tmp_path, "map", planted_map.config)
    files = ("map.parquet", "control-random.parquet", "control-shaped.parquet")
    for name in files[:2]:  # as if killed before the last control
        (other.path / name).write_bytes((planted_map.path / name).read_bytes())
    build_map(other, rows, QUICK, progress=False)
    again = made(tmp_path / "again", rows)
    for name in files:
        wanted = sha256_file(planted_map.path / name)
        assert sha256_file(other.path / name) == sha256_file(again.path / name) == wanted
    assert other.summary["clusters"] == again.summary["clusters"]


def test_dead_features_and_zero_rows_have_no_place(tmp_path):
    rows, alive = chance.isotropic(40, 8, 0), np.ones(40, bool)
    rows[7], alive[[3, 11]] = 0, False
    run = made(tmp_path, rows, alive=alive, twin=rows[::-1].copy())
    assert read_map(run)["feature"].tolist() == sorted(set(range(40)) - {3, 7, 11})
    assert run.summary["n_placed"] == 37 and run.summary["n_features"] == 40
    assert 32 not in read_map(run, "twin")["feature"].tolist()
    assert read_map(run).drop(columns="feature").notna().to_numpy().all()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("d", [1, 2, 6])
def test_hardly_any_features(tmp_path, n, d):
    run = made(tmp_path, chance.isotropic(n, d, 5))
    places = read_map(run)
    assert len(places) == n and np.isfinite(places.to_numpy(float)).all()
    assert set(places["cluster"]) == {NOISE} and run.summary["n_standing_out"] == 0
    assert len(read_clusters(run)) == 0
    if n < 5:
        assert run.summary["perplexity"] is None
        assert places["tsne_x"].tolist() == places["pca_x"].tolist()


def test_equal_directions_lie_on_one_point(tmp_path):
    lengths = np.arange(1, 31, dtype=np.float32)
    run = made(tmp_path, np.ones((30, 4), np.float32) * lengths[:, None])
    assert (
        float(read_map(run)[["pca_x", "pca_y", "tsne_x", "tsne_y"]].abs().to_numpy().max()) < 1e-5
    )


def test_trouble_is_told(tmp_path):
    rows = chance.isotropic(6, 4, 0)
    with pytest.raises(UserError, match="all are dead or zero"):
        made(tmp_path / "a", rows, alive=np.zeros(6, bool))
    with pytest.raises(UserError, match="width 3 where the SAE's have 4"):
        made(tmp_path / "b", rows, twin=chance.isotropic(6, 3, 0))
    for wrong in (0.5, float("nan"), float("inf")):
        with pytest.raises(UserError, match="perplexity"):
            MapConfig(perplexity=wrong)
    with pytest.raises(UserError, match="400 steps"):
        MapConfig(steps=10)
    with pytest.raises(UserError, match="2 features"):
        MapConfig(min_cluster_size=1)
    run = made(tmp_path / "c", rows)
    (run.path / "map.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(Failure, match="lorgnette map"):
        read_map(run)


# ---------------------------------------------------------------------------------- parts


def test_pca_is_that_of_the_singular_values():
    rows = chance.isotropic(50, 7, 3)
    u, s, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    plane = lay_out(rows[:], MapConfig(steps=400)).pca
    np.testing.assert_allclose(np.abs(plane), np.abs(u[:, :2] * s[:2]), atol=1e-4)


def test_perplexity_is_lowered_where_features_are_few():
    assert perplexity_of(4, 30.0) is None
    assert perplexity_of(31, 30.0) == 10
    assert perplexity_of(1000, 30.0) == 30


def test_cohesion_by_hand_and_by_loops():
    rows = np.array([[1, 0], [0, 1], [0.6, 0.8], [1, 0], [-1, 0]], np.float32)
    clusters = np.array([0, 0, 0, 1, 1])
    # 0: cosines 0, 0.6, 0.8; 1: -1
    assert cohesion(rows, clusters) == pytest.approx([1.4 / 3, -1.0])
    assert cohesion(rows, np.full(5, NOISE)) == []
    table = cluster_table([1.4 / 3, -1.0], clusters, {3: 0.4, 2: 0.9}, None)
    assert table["stands_out"].tolist() == [True, False] and table["name"].tolist() == ["", ""]


@settings(max_examples=10, deadline=None)
@given(n=st.integers(4, 30), k=st.integers(2, 3), seed=st.integers(0, 99))
def test_measures_against_the_plain_definitions(n, k, seed):
    rows, clusters = chance.isotropic(n, 5, seed), np.arange(n) % (k + 1) - 1
    found = measure(rows, clusters)
    inside = clusters >= 0
    assert found.noise_share == pytest.approx(1 - inside.mean())
    slow = []
    for cluster in range(k):
        members = rows[clusters == cluster]
        pairs = [a @ b for i, a in enumerate(members) for b in members[:i]]
        slow.append(np.mean(pairs) if pairs else None)
    if None not in slow:
        assert cohesion(rows, clusters) == pytest.approx(slow, abs=1e-5)
    if k < inside.sum():
        distances = (1 - rows[inside] @ rows[inside].T).clip(0)
        np.fill_diagonal(distances, 0)
        expected = silhouette_score(distances, clusters[inside], metric="precomputed")
        assert found.silhouette == pytest.approx(expected, abs=1e-4)


def test_clusters_of_a_plane_are_numbered_by_size():
    rng = np.random.default_rng(0)
    sizes, centres = (30, 60, 45), ((0, 0), (50, 0), (0, 50))
    blobs = [rng.normal(c, 0.5, (n, 2)) for n, c in zip(sizes, centres, strict=True)]
    found = find_clusters(np.concatenate(blobs), 20)
    counts = pd.Series(found[found >= 0]).value_counts()
    assert counts.index.tolist() == sorted(counts.index) and counts.is_monotonic_decreasing
    assert find_clusters(np.zeros((3, 2)), 2).tolist() == [NOISE] * 3


@pytest.mark.parametrize("at_once", [1, 5, 256])
def test_neighbourhoods_against_loops(monkeypatch, at_once):
    monkeypatch.setattr("saes.map_clusters.ROWS_AT_ONCE", at_once)
    rows, slow = chance.isotropic(23, 4, 1), {}
    for size in (2, 3, 9, 23):
        slow[size] = -1.0
        for own in range(23):
            near = sorted(range(23), key=lambda other: (other != own, -(rows[own] @ rows[other])))
            members = rows[near[:size]]
            pairs = [a @ b for i, a in enumerate(members) for b in members[:i]]
            slow[size] = max(slow[size], float(np.mean(pairs)))
    assert neighbourhoods(rows, [2, 3, 9, 23]) == pytest.approx(slow, abs=1e-5)
    assert neighbourhoods(rows, []) == {}


def test_no_clusters_have_no_numbers():
    none = measure(chance.isotropic(20, 6, 0), np.full(20, NOISE))
    assert none.silhouette is None and none.cohesion_max is None and none.noise_share == 1


# ---------------------------------------------------------------------------------- chance


def test_shaped_directions_fill_the_same_dimensions_and_isotropic_ones_all():
    flat = chance.isotropic(4000, 12, 0)
    flat[:, 4:] = 0
    flat[:, 0] += 1
    flat = chance.unit(flat)
    same = chance.shaped(flat, 0)
    assert np.abs(same[:, 4:]).max() < 1e-6
    assert same[:, 0].mean() == pytest.approx(flat[:, 0].mean(), abs=0.05)
    np.testing.assert_allclose(np.linalg.norm(same, axis=1), 1, rtol=1e-5)
    free = chance.isotropic(4000, 12, 0)
    assert np.abs(free.mean(0)).max() < 0.05
    np.testing.assert_allclose((free**2).mean(0), 1 / 12, atol=0.01)


def test_chance_does_not_repeat_the_beginning_of_a_training():
    from saes.matching import random_directions

    beginning = random_directions(60, 32, seed=0).numpy()
    assert np.abs((beginning * chance.isotropic(60, 32, seed=0)).sum(1)).max() < 0.8
    assert not np.array_equal(chance.isotropic(5, 4, 0), chance.isotropic(5, 4, 1))
