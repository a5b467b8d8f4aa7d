"""Compiled selections equal their definitions, entry by entry, on rows of every scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saes import selection, selection_cpu
from saes.types import Chosen, Codes


def same(found: Chosen | Codes, wanted: Chosen | Codes) -> bool:
    names = ("values", "latents", "lengths") if isinstance(found, Chosen) else ("values", "indices")
    return all(torch.equal(getattr(found, name), getattr(wanted, name)) for name in names)


def rows(b: int, s: int, seed: int, *, round_to: float = 0.0, shift: float = 0.0) -> Tensor:
    """Normal numbers, each row on a scale of its own from 1e-4 to 1e4; rounding makes ties."""
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(b, s, generator=generator) + shift
    if round_to:
        return (pre / round_to).round() * round_to
    return pre * 10 ** (8 * torch.rand(b, 1, generator=generator) - 4)


@settings(max_examples=80, deadline=None)
@given(
    b=st.integers(0, 9),
    s=st.integers(1, 200),
    k=st.integers(0, 200),
    seed=st.integers(0, 10**6),
    round_to=st.sampled_from([0.0, 0.5]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
)
def test_top_k_equals_torchs(
    b: int, s: int, k: int, seed: int, round_to: float, shift: float
) -> None:
    pre = rows(b, s, seed, round_to=round_to, shift=shift)
    found = selection_cpu.top_k(pre, min(k, s))
    assert same(found, selection.top_k_reference(pre, min(k, s)))


@settings(max_examples=80, deadline=None)
@given(
    b=st.integers(0, 9),
    s=st.integers(1, 200),
    seed=st.integers(0, 10**6),
    round_to=st.sampled_from([0.0, 0.5]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    reach=st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0, 2.0]),
)
def test_nearest_norm_equals_the_full_sort(
    b: int, s: int, seed: int, round_to: float, shift: float, reach: float
) -> None:
    pre = rows(b, s, seed, round_to=round_to, shift=shift)
    norms = 0.5 + torch.rand(s, generator=torch.Generator().manual_seed(seed))
    target = reach * (pre.relu() * norms).norm(dim=1)
    found = selection_cpu.nearest_norm(pre, norms, target)
    assert same(found, selection.nearest_norm_reference(pre, norms, target))


def test_nearest_norm_equals_the_full_sort_on_a_million_rows() -> None:
    for seed in range(20):
        pre = rows(50_000, 48, seed)
        norms = 0.5 + torch.rand(48, generator=torch.Generator().manual_seed(seed))
        largest = (pre.relu() * norms).norm(dim=1)
        target = largest * torch.rand(50_000, generator=torch.Generator().manual_seed(-seed)) * 1.1
        found = selection_cpu.nearest_norm(pre, norms, target)
        assert same(found, selection.nearest_norm_reference(pre, norms, target))


def test_nearest_norm_by_hand() -> None:
    # Sorted codes 4, 3, 2: norms of the prefixes 4, 5, sqrt(29) = 5.39.
    pre = torch.tensor([[3.0, -9.0, 4.0, 2.0]]).repeat(7, 1)
    target = torch.tensor([0.0, 4.4, 4.6, 5.0, 5.19, 5.21, 99.0])
    found = selection.nearest_norm(pre, torch.ones(4), target)
    assert found.lengths.tolist() == [1, 1, 2, 2, 2, 3, 3]
    assert found.latents.tolist()[:4] == [2, 2, 0, 2]
    # A decoder row of length 2 puts the code of 2 level with the one of 4; the lower number wins.
    level = selection.nearest_norm(pre[:1], torch.tensor([1.0, 1, 1, 2]), torch.tensor([4.0]))
    assert level.latents.tolist() == [2]


def test_above_is_strict_and_has_a_threshold_for_each_latent() -> None:
    pre = torch.tensor([[1.0, 2.0, -1.0], [0.5, 3.0, 0.0]])
    thresholds = torch.tensor([0.5, 2.0, -2.0])
    for function in (selection.above, selection.above_reference):
        found = function(pre, thresholds)
        assert found.latents.tolist() == [0, 2, 1, 2] and found.lengths.tolist() == [2, 2]
        assert found.values.tolist() == [1, -1, 3, 0]


def test_strongest_takes_the_first_of_equals_and_all_where_there_are_few() -> None:
    chosen = selection.above(torch.tensor([[1.0, 2.0, 2.0], [2.0, 0.0, 3.0]]), torch.zeros(3))
    found = selection.strongest(chosen, 3)
    assert found.values.tolist() == [2, 2, 3] and found.lengths.tolist() == [2, 1]
    assert found.latents.tolist() == [1, 2, 2]
    assert same(selection.strongest(chosen, 9), chosen)


@pytest.mark.parametrize("n", [1, 7, 100, 5000])
def test_a_pool_over_parts_is_the_strongest_of_the_whole(n: int) -> None:
    pre = rows(60, 50, 0, round_to=0.25)
    pool = selection.Pool(n)
    for part in pre.split(9):
        pool.add(part)
    whole = selection.strongest(selection.above(pre, torch.zeros(50)), n)
    assert same(pool.chosen, whole)


def test_padded_rows_are_sorted_and_as_wide_as_the_longest() -> None:
    chosen = selection.above(torch.tensor([[1.0, 3.0, 2.0], [-1.0, -1.0, 5.0]]), torch.zeros(3))
    codes = selection.padded(chosen.values, chosen)
    assert codes.values.tolist() == [[3, 2, 1], [5, 0, 0]]
    assert codes.indices.tolist() == [[1, 2, 0], [2, 0, 0]]
