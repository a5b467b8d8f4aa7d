"""The Triton kernels against what they stand for: on a GPU, else in Triton's interpreter."""

import os

import pytest
import torch
from torch import Tensor

from saes import kernels, selection
from saes.types import Entries

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    reason = "no GPU; without one install triton and set TRITON_INTERPRET=1, for its interpreter"
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed; torch's CUDA builds bring it")
kernels_triton = pytest.importorskip("saes.kernels_triton")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ragged(b: int, s: int) -> Entries:
    """Rows of 0, 1, 2, ... entries, the first latent in all of them that have any."""
    lengths = torch.arange(b) % 5
    latents = torch.cat([torch.arange(int(n)) * 7 % s for n in lengths]).long()
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return Entries(latents=latents.to(DEVICE), starts=starts.to(DEVICE))


@pytest.mark.parametrize(("b", "d", "s"), [(1, 1, 1), (6, 37, 50), (9, 300, 23)])
def test_sparse_products(b: int, d: int, s: int) -> None:
    entries = ragged(b, s)
    weights, W, rows = random(len(entries.latents)), random(s, d, seed=1), random(b, d, seed=2)
    decoded = kernels_triton.weighted_rows(weights, entries.latents, entries.starts, W)
    torch.testing.assert_close(decoded, kernels.decode_reference(weights, entries, W))
    products = kernels_triton.row_products(rows, W, entries.latents, entries.starts)
    torch.testing.assert_close(products, (rows @ W.T)[entries.rows, entries.latents])
    starts, owners, order = kernels.by_latent_reference(entries, s)
    gradient = kernels_triton.weighted_rows(weights[order], owners, starts, rows)
    torch.testing.assert_close(gradient, kernels.scattered(weights, entries, s).T @ rows)


@pytest.mark.parametrize(
    "kind", ["usual", "ties", "norms", "all negative", "target 0", "unreached"]
)
def test_selection_is_that_of_the_full_sort(kind: str) -> None:
    pre = random(6, 33) * 10 ** random(6, 1, seed=1)
    norms = random(33, seed=2).abs() + 0.5 if kind == "norms" else torch.ones(33, device=DEVICE)
    share = torch.linspace(0.1, 0.99, 6, device=DEVICE)
    if kind == "ties":
        pre = random(6, 33).round()
    if kind == "all negative":
        pre = -pre.abs()
    target = share * (pre.relu() * norms).norm(dim=1)
    target = {"target 0": 0 * target, "unreached": 2 * target + 1}.get(kind, target)
    wanted = selection.nearest_norm_reference(pre, norms, target)
    found = selection._where(pre, kernels_triton.nearest_norm_mask(pre, norms, target))
    assert torch.equal(found.latents, wanted.latents)
    assert torch.equal(found.lengths, wanted.lengths)
