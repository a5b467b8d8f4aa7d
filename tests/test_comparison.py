"""Two dictionaries compared: permutations, one's own features, chance, dead features, widths."""

import numpy as np
import pytest

from probe.errors import Failure, UserError
from probe.runs import Run
from saes import chance
from saes.comparison import CompareConfig, Dictionary, compare, nearest
from saes.comparison_tables import read_comparison

CONFIG = CompareConfig()


def made(folder, first: Dictionary, second: Dictionary, config: CompareConfig = CONFIG) -> Run:
    run = Run.create(
        folder, "match", config.run_config(first="a", second="b", indexes=(None, None))
    )
    return compare(run, first, second, config, progress=False)


def test_shared_features_are_paired_and_the_rest_is_ones_own(tmp_path):
    shared, ours, theirs = (chance.isotropic(n, 32, s) for n, s in ((20, 50), (6, 51), (9, 52)))
    second = np.concatenate([theirs, -2 * shared[::-1]])
    run = made(
        tmp_path, Dictionary(decoder=np.concatenate([shared, ours])), Dictionary(decoder=second)
    )
    tables = read_comparison(run)
    pairs = tables["pairs"].set_index("first")
    assert pairs.loc[range(20), "second"].tolist() == [9 + 19 - i for i in range(20)]
    assert pairs.loc[range(20), "cosine"].tolist() == pytest.approx([-1] * 20, abs=1e-5)
    near = tables["nearest"]
    alone = near[near["cosine"].abs() < 0.9]
    assert alone[alone["side"] == "first"]["feature"].tolist() == list(range(20, 26))
    assert alone[alone["side"] == "second"]["feature"].tolist() == list(range(9))
    chances = tables["chance"]
    assert max(chances.loc[chances["control"] == "random", "cosine"].tolist()) < 0.9
    assert run.summary["n_pairs"] == 26 and run.summary["chance"]["shaped"]["n_pairs"] == 26


def test_random_dictionaries_match_like_chance(tmp_path):
    first, second = (Dictionary(decoder=chance.isotropic(200, 64, s)) for s in (7, 8))
    found = made(tmp_path, first, second).summary
    for control in found["chance"].values():
        assert found["mean_cosine"] == pytest.approx(control["mean_cosine"], rel=0.03)
    assert found["share_above_0.7"] == 0 and found["n_same_number"] < 8


def test_dead_features_are_left_out_of_all_tables(tmp_path):
    rows, alive = chance.isotropic(12, 8, 0), np.ones(12, bool)
    alive[[2, 5]] = False
    zero = rows.copy()
    zero[4] = 0
    run = made(tmp_path, Dictionary(decoder=rows, alive=alive), Dictionary(decoder=zero))
    tables = read_comparison(run)
    near = tables["nearest"]
    assert {2, 5}.isdisjoint(tables["pairs"]["first"])
    assert 4 not in tables["pairs"]["second"].tolist()
    first, second = (near[near["side"] == side] for side in ("first", "second"))
    assert {2, 5}.isdisjoint(first["feature"]) and {2, 5}.isdisjoint(second["other"])
    assert 4 not in first["other"].tolist()
    assert (run.summary["left_out_first"], run.summary["left_out_second"]) == (2, 1)
    assert run.summary["n_same_number"] == len(set(range(12)) - {2, 4, 5})


@pytest.mark.parametrize("at_once", [1, 7, 2048])
def test_nearest_against_the_full_matrix(monkeypatch, at_once):
    monkeypatch.setattr("saes.comparison.ROWS_AT_ONCE", at_once)
    a, b = chance.isotropic(30, 5, 0), chance.isotropic(17, 5, 1)
    full = a @ b.T
    places, cosines = nearest(a, b)
    assert places.tolist() == np.abs(full).argmax(1).tolist()
    np.testing.assert_allclose(cosines, full[np.arange(30), places], atol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 3), (2, 1)])
def test_hardly_any_features(tmp_path, n, m):
    sides = [Dictionary(decoder=chance.isotropic(size, 3, size)) for size in (n, m)]
    run = made(tmp_path, sides[0], sides[1])
    assert run.summary["n_pairs"] == 1
    assert len(read_comparison(run)["nearest"]) == n + m


def test_trouble_is_told(tmp_path):
    first, second = (Dictionary(decoder=chance.isotropic(4, d, 0)) for d in (3, 5))
    with pytest.raises(UserError, match="widths 3 and 5"):
        made(tmp_path / "a", first, second)
    dead = Dictionary(decoder=first.decoder, alive=np.zeros(4, bool))
    with pytest.raises(UserError, match="all zeros"):
        made(tmp_path / "b", first, dead)
    run = made(tmp_path / "c", first, first)
    (run.path / "pairs.parquet").write_bytes(b"")
    with pytest.raises(Failure, match="lorgnette compare"):
        read_comparison(run)
