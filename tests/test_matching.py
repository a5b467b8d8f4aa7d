"""Matching and coherence: permuted dictionaries, brute force, a simplex, and full matrices."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import UserError
from saes.matching import coherence, match_decoders, random_directions

LIMITS = [16_384, 0]
"""Both methods."""


@pytest.mark.parametrize("limit", LIMITS)
def test_a_permuted_dictionary_matches_with_cosine_one(limit: int) -> None:
    first = random_directions(50, 12, seed=0)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    second = first[order] * torch.linspace(0.1, 9, 50)[:, None]
    second[7] *= -1
    found = match_decoders(first, second, limit=limit)
    assert torch.equal(order[found.second], found.first)
    summary = found.summary()
    assert summary["mean_cosine"] == pytest.approx(1) and summary["n_pairs"] == 50
    assert summary["share_above_0.9"] == 1 and summary["share_opposite"] == 1 / 50
    torch.testing.assert_close(found.nearest, torch.ones(50))
    assert found.cosines[found.second == 7].item() == pytest.approx(-1)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 5), m=st.integers(1, 6), seed=st.integers(0, 1000))
def test_hungarian_pairs_are_the_best_of_all(n: int, m: int, seed: int) -> None:
    first, second = random_directions(n, 4, seed), random_directions(m, 4, seed + 5000)
    size = (first @ second.T).abs()
    if n > m:
        size = size.T
    few, many = size.shape
    best = max(
        sum(float(size[i, j]) for i, j in enumerate(chosen))
        for chosen in itertools.permutations(range(many), few)
    )
    found = match_decoders(first, second)
    assert float(found.cosines.abs().sum()) == pytest.approx(best, rel=1e-5)
    assert len(set(found.first.tolist())) == len(set(found.second.tolist())) == few


def test_mutual_neighbours_against_the_full_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = random_directions(70, 6, 0), random_directions(90, 6, 1)
    size = (first @ second.T).abs()
    expected = [
        (i, int(size[i].argmax())) for i in range(70) if size[:, size[i].argmax()].argmax() == i
    ]
    for block_bytes in (2**26, 4 * 90 * 8, 1):
        monkeypatch.setattr("saes.matching.BLOCK_BYTES", block_bytes)
        found = match_decoders(first, second, limit=10)
        assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected
        assert found.method == "mutual nearest neighbours"
        torch.testing.assert_close(found.nearest, size.max(1).values)
        assert match_decoders(first, second).method == "hungarian"


@pytest.mark.parametrize("limit", LIMITS)
def test_zero_rows_are_left_out(limit: int) -> None:
    first = random_directions(6, 3, 0)
    first[2] = 0
    found = match_decoders(first, first.clone(), limit=limit)
    assert found.first.tolist() == found.second.tolist() == [0, 1, 3, 4, 5]
    assert (found.n_first, found.n_second) == (5, 5)
    with pytest.raises(UserError, match="all zeros"):
        match_decoders(first, torch.zeros(4, 3), limit=limit)


def test_another_width_is_told() -> None:
    with pytest.raises(UserError, match="width 3 and 4"):
        match_decoders(torch.ones(2, 3), torch.ones(2, 4))


def test_chance_is_far_below_one() -> None:
    found = match_decoders(random_directions(200, 64, 0), random_directions(200, 64, 1)).summary()
    assert 0.2 < found["mean_cosine"] < 0.5 and found["share_above_0.7"] == 0


# ------------------------------------------------------------------------------ coherence


def test_a_simplex_reaches_the_welch_bound() -> None:
    angles = torch.tensor([0.0, 2 / 3, 4 / 3]) * math.pi
    found = coherence(torch.stack([angles.cos(), angles.sin()], 1) * 3)
    # Three directions at 120 degrees: |cos| = 1/2 = sqrt((3 - 2) / (2 * 2)).
    assert found.welch_bound == pytest.approx(0.5)
    assert found.max_cosine == pytest.approx(0.5, abs=1e-6)
    assert found.mean_nearest == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("block_bytes", [2**26, 4 * 41 * 7, 1])
def test_blocks_against_the_full_matrix(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saes.matching.BLOCK_BYTES", block_bytes)
    rows = random_directions(41, 5, 3)
    full = (rows @ rows.T).abs().fill_diagonal_(0)
    found = coherence(rows * 2)
    torch.testing.assert_close(found.nearest, full.max(1).values)
    assert found.max_cosine == pytest.approx(float(full.max()))
    assert found.welch_bound == pytest.approx(math.sqrt(36 / (5 * 40)))
    assert found.max_cosine >= found.welch_bound


def test_an_orthogonal_dictionary_is_incoherent_and_a_twin_pair_is_not() -> None:
    found = coherence(torch.eye(4))
    assert (found.max_cosine, found.mean_nearest, found.welch_bound) == (0, 0, 0)
    doubled = coherence(torch.cat([torch.eye(4), -torch.eye(4)[:1], torch.zeros(1, 4)]))
    assert doubled.max_cosine == 1
    assert doubled.nearest.tolist() == [1, 0, 0, 0, 1]
    with pytest.raises(UserError, match="two latents"):
        coherence(torch.eye(3)[:1])
