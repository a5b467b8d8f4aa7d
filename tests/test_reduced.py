"""What is chosen by bfloat16 scores is what float32 chooses, entry by entry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saes import reduced, selection, selection_cpu
from saes.reduced import ReducedEncoder, Scores
from saes.selection_cpu import kth_largest


def make_scores(b: int, d: int, s: int, seed: int, *, spread: float = 0.0) -> Scores:
    """Scores of whole numbers that bfloat16 rounds and whose sums float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-400, 400, (b, d), generator=generator).float()
    sizes = torch.exp(spread * torch.randn(s, generator=generator)).clamp(max=4)  # 30 products fit
    weights = (torch.randint(-300, 300, (d, s), generator=generator) * sizes).round()
    bias = torch.randint(-9000, 9000, (s,), generator=generator).float()
    memory = torch.empty(b, s, dtype=torch.bfloat16)
    return ReducedEncoder.of(weights, bias).scores(rows, memory)


def exact(scores: Scores) -> torch.Tensor:
    assert scores.reduced is not None
    pre = scores.rows.double() @ scores.reduced.weights.double() + scores.reduced.bias
    assert pre.abs().max() < 2**24 if pre.numel() else True
    return pre.float()


@settings(max_examples=100, deadline=None)
@given(
    b=st.integers(0, 9),
    d=st.integers(1, 30),
    s=st.integers(1, 400),
    k=st.integers(1, 40),
    share=st.floats(0.1, 1.0),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.0, 0.7]),
)
def test_the_choice_is_that_of_exact_numbers(
    b: int, d: int, s: int, k: int, share: float, seed: int, spread: float
) -> None:
    scores = make_scores(b, d, s, seed, spread=spread)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randperm(s, generator=generator)[: max(1, round(share * s))].sort().values
    k = min(k, len(latents))
    wanted = selection.top_k_reference(exact(scores)[:, latents], k)
    indices = torch.where(wanted.values > 0, latents[wanted.indices], 0)
    for nominated_share in (0.0, 1.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reduced, "NOMINATED_SHARE", nominated_share)
            found = scores.top_k(k, latents)
        assert torch.equal(found.values, wanted.values)
        assert torch.equal(found.indices, indices)
    found = scores.top_k_reference(k, latents)
    assert torch.equal(found.values, wanted.values)
    assert torch.equal(found.indices, indices)


@pytest.mark.parametrize("shift", [-1e7, -15_000.0, 1e6])
def test_rows_with_few_positive_entries_or_none(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-200, 200, (50, 8), generator=generator).float()
    weights = torch.randint(-30, 30, (8, 300), generator=generator).float()
    encoder = ReducedEncoder.of(weights, torch.full((300,), shift))
    scores = encoder.scores(rows, torch.empty(50, 300, dtype=torch.bfloat16))
    found, wanted = scores.top_k(20), selection.top_k_reference(exact(scores), 20)
    assert torch.equal(found.values, wanted.values)
    assert torch.equal(found.indices, wanted.indices)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60), k=st.integers(1, 70), bits=st.integers(1, 20), seed=st.integers(0, 999)
)
def test_the_kth_largest_by_bits_is_that_by_sorting(n: int, k: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-(2**bits), 2**bits, (n,), generator=generator, dtype=torch.int32)
    ordered = numbers.sort(descending=True).values
    wanted = max(0, int(ordered[k - 1])) if k <= n else 0
    assert kth_largest(numbers.numpy(), k, 31) == wanted


@settings(max_examples=40, deadline=None)
@given(s=st.integers(0, 20), d=st.integers(1, 70), seed=st.integers(0, 999))
def test_weights_are_rounded_as_torch_rounds(s: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(s, d, generator=generator) * 10 ** torch.randint(-4, 5, (s, 1))
    halves = torch.randint(-(2**10), 2**10, (s, d), generator=generator) + 0.5  # as near to two
    for rows in (weights, halves):
        found = selection_cpu.rounded(rows, d + 3)
        wanted = reduced.rounded_reference(rows, d + 3)
        assert torch.equal(found[0].view(torch.int16), wanted[0].view(torch.int16))
        for a, b in zip(found[1:], wanted[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=0.0)
