"""Norms and epsilon-LBO by hand, the bounds on random dictionaries, the published numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from saes import afa
from saes.activations import Relu, TopAfa, TopK
from saes.constraints import initialise
from saes.models import SaeConfig, SparseAutoencoder
from saes.types import Entries


def hand_sae() -> SparseAutoencoder:
    """Decoder rows [2, 0] and [0, 1], read by the plain axes; bias [0, 1]."""
    sae = SparseAutoencoder(SaeConfig(d_in=2, d_sae=2, activation=Relu()))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        sae.W_enc.copy_(torch.eye(2))
        sae.b_dec.copy_(torch.tensor([0.0, 1.0]))
    return sae


def test_norms_by_hand() -> None:
    # x - b_dec = [3, 4], [0, -2] and [1, 0]; codes [3, 4], none, [1, 0]; scaled [6, 4], [], [2, 0].
    rows = afa.norm_rows(hand_sae(), torch.tensor([[3.0, 5.0], [0.0, -1.0], [1.0, 1.0]]))
    assert rows.input_norm.tolist() == [5, 2, 1]
    assert rows.code_norm.tolist() == pytest.approx([math.sqrt(52), 0, 2])
    # xhat - b_dec = [6, 4], [0, 0], [2, 0].
    assert rows.reconstruction_norm.tolist() == pytest.approx([math.sqrt(52), 0, 2])
    assert rows.l0.tolist() == [2, 0, 1]
    assert list(rows.frame()["l0"]) == [2, 0, 1]


def test_summary_by_hand() -> None:
    rows = afa.NormRows(
        input_norm=torch.tensor([5.0, 2.0, 2.0]),
        code_norm=torch.tensor([4.0, 0.0, 4.0]),
        reconstruction_norm=torch.tensor([4.0, 0.0, 3.0]),
        l0=torch.tensor([3, 0, 2]),
    )
    found = afa.summary(rows, d_sae=11, d_in=4)
    # ||f|| / ||z|| = 0.8, 0, 2: the median is 0.8. One row of three is over, two are under.
    assert found["code_over_input"] == pytest.approx(0.8)
    assert found["over_share"] == pytest.approx(1 / 3) and found["under_share"] == pytest.approx(
        2 / 3
    )
    # |25 - 16| / (10 * 16) = 0.05625 and |4 - 16| / (10 * 16) = 0.075; torch's median of two is the
    # lower one. Over the support: 9 / (2 * 16) = 0.28125 and 12 / (1 * 16) = 0.75.
    assert found["elbo"] == pytest.approx(0.05625)
    assert found["elbo_support"] == pytest.approx(0.28125)
    # On the reconstruction: |16 - 16| = 0 and |9 - 16| / 16 = 0.4375.
    assert found["elbo_reconstruction"] == 0
    # (11 - 4) / (4 * 10) = 0.175.
    assert found["welch"] == pytest.approx(math.sqrt(0.175))


def test_elbo_of_a_published_row() -> None:
    # GPT-2 layer 1, first row of the authors' table, 24,576 features: ztz and ftf as published.
    m = torch.full((1,), 24575.0, dtype=torch.float64)
    found = afa.epsilon_lbo(
        torch.tensor([19.033733], dtype=torch.float64),
        torch.tensor([17.208841], dtype=torch.float64),
        m,
    )
    assert float(found) == pytest.approx(1.824892 / (24575 * 17.208841))
    assert afa.welch(24576, 768) == pytest.approx(0.0355, abs=5e-5)
    assert afa.welch(12288, 768) == pytest.approx(0.0349, abs=5e-5)
    assert afa.welch(3, 5) == 0


def test_rows_without_codes_or_with_one_have_no_support_reading() -> None:
    squared = torch.tensor([4.0, 4.0])
    found = afa.epsilon_lbo(squared, torch.tensor([0.0, 4.0]), torch.tensor([3.0, 0.0]))
    assert bool(found.isnan().all())


@settings(max_examples=150, deadline=None)
@given(d=st.integers(2, 12), h=st.integers(2, 30), k=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_the_three_bounds_hold_on_random_dictionaries(d: int, h: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = functional.normalize(torch.randn(h, d, generator=generator, dtype=torch.float64), dim=1)
    f = torch.randn(8, h, generator=generator, dtype=torch.float64).abs()
    f[:, min(k, h) :] = 0
    epsilon = float((W @ W.T - torch.eye(h, dtype=torch.float64)).abs().max())
    squared, codes = (f @ W).square().sum(1), f.square().sum(1)
    spreads = (
        torch.full_like(codes, h - 1),
        (f != 0).sum(1).double() - 1,
        f.sum(1).square() / codes - 1,
    )
    for m in spreads:
        least, largest = afa.norm_bounds(squared, epsilon, m)
        assert bool((codes >= least * (1 - 1e-9)).all())
        assert bool((codes <= largest * (1 + 1e-9)).all())
        # The epsilon-LBO is a lower bound on the coherence, the identity being exact here.
        elbo = afa.epsilon_lbo(squared, codes, m)
        assert bool((elbo[elbo.isfinite() & (m > 1e-9)] <= epsilon * (1 + 1e-6)).all())
    assert bool((spreads[2] <= spreads[1] + 1e-9).all())
    assert bool((spreads[1] <= spreads[0]).all())


def test_the_reconstruction_reading_bounds_a_trained_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(SaeConfig(d_in=16, d_sae=64, activation=TopK(k=6)))
    with torch.no_grad():
        rows = functional.normalize(torch.randn(64, 16, generator=generator), dim=1)
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        found = afa.norm_rows(sae, torch.randn(200, 16, generator=generator))
    epsilon = float((rows @ rows.T - torch.eye(64)).abs().max())
    elbo = afa.epsilon_lbo(
        found.reconstruction_norm.square(), found.code_norm.square(), (found.l0 - 1).float()
    )
    assert float(elbo[elbo.isfinite()].max()) <= epsilon


def test_code_norms_have_gradients_where_nothing_is_active() -> None:
    values = torch.tensor([3.0, 4.0], requires_grad=True)
    entries = Entries(latents=torch.tensor([1, 0]), starts=torch.tensor([0, 2, 2]))
    norms = afa.code_norms(values, entries, torch.tensor([1.0, 1.0]))
    assert norms.tolist() == pytest.approx([5, 0], abs=1e-5)
    norms.sum().backward()
    assert values.grad is not None and values.grad.tolist() == pytest.approx([0.6, 0.8])


def test_authors_conventions_begin_where_their_two_norms_agree() -> None:
    sample = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) + 5.0
    begun = {}
    for paper_code in (True, False):
        activation = TopAfa(paper_code=paper_code)
        sae = SparseAutoencoder(SaeConfig(d_in=6, d_sae=12, activation=activation))
        initialise(sae, sample, torch.Generator().manual_seed(0))
        begun[paper_code] = sae.b_dec.detach()
    assert not begun[True].any()
    torch.testing.assert_close(begun[False], torch.full((6,), 5.0), atol=0.6, rtol=0)
