"""Every sparse form equals its dense reference, values and gradients, at awkward sizes."""

import pytest
import torch
from torch import Tensor

from saes import kernels
from saes.kernels import (
    _SparseDecode,
    _SparsePreActivations,
    decode_reference,
    pre_activations_at_reference,
    row_products,
    transposed_product,
    weighted_rows,
)
from saes.types import Entries

# (rows, d, s, k): a width that is no power of two, k = s, one row, one latent, an empty batch.
SIZES = [(7, 48, 96, 5), (4, 16, 8, 8), (1, 48, 33, 3), (5, 3, 1, 1), (0, 48, 96, 5), (64, 8, 9, 4)]


def distinct(b: int, s: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.rand(b, s, generator=generator).argsort(1)[:, :k]


def make(size: tuple[int, int, int, int], padding: bool) -> tuple[dict[str, Tensor], Entries]:
    """Tensors and entries, as many in each row or, but for padding, fewer and fewer."""
    b, d, s, k = size
    generator = torch.Generator().manual_seed(sum(size))
    made = {
        "x": torch.randn(b, d, generator=generator),
        "b_dec": torch.randn(d, generator=generator),
        "W_enc": torch.randn(s, d, generator=generator).T,
        "b_enc": torch.randn(s, generator=generator),
        "W_dec": torch.randn(s, d, generator=generator),
        "values": torch.rand(b * k, generator=generator),
    }
    for tensor in made.values():
        tensor.requires_grad_()
    indices = distinct(b, s, k, generator)
    if padding:
        with torch.no_grad():
            made["values"].view(b, k)[:, k // 2 :] = 0
            indices[:, k // 2 :] = 0
    return made, Entries.of_rows(indices)


def make_ragged(size: tuple[int, int, int, int]) -> tuple[dict[str, Tensor], Entries]:
    """Row i holds i modulo (k + 1) entries, so some rows hold none."""
    b, _, _, k = size
    made, full = make(size, False)
    lengths = torch.arange(b) % (k + 1)
    keep = (torch.arange(k) < lengths[:, None]).flatten()
    made["values"] = made["values"].detach()[keep].requires_grad_()
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return made, Entries(latents=full.latents[keep], starts=starts)


KINDS = {
    "full": lambda size: make(size, False),
    "padded": lambda size: make(size, True),
    "ragged": make_ragged,
}


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.sin(torch.arange(out.numel()).float()).view(out.shape)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_decode_equals_reference(size: tuple[int, int, int, int], kind: str) -> None:
    m, entries = KINDS[kind](size)
    inputs = [m["values"], m["W_dec"]]
    fast = _SparseDecode.apply(m["values"], entries, m["W_dec"])
    slow = decode_reference(m["values"], entries, m["W_dec"])
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients(fast, inputs), gradients(slow, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_pre_activations_equal_reference(size: tuple[int, int, int, int], kind: str) -> None:
    m, entries = KINDS[kind](size)
    inputs = [m["x"], m["b_dec"], m["W_enc"], m["b_enc"]]
    slow = pre_activations_at_reference(m["x"], m["b_dec"], m["W_enc"], m["b_enc"], entries)
    wanted = gradients(slow, inputs)
    for known in (None, slow.detach()):
        fast = _SparsePreActivations.apply(*inputs, entries, known)
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
        for a, b in zip(gradients(fast, inputs), wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_latent_in_every_row_and_one_in_none() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    entries = Entries.of_rows(torch.tensor([[0, 1], [1, 3], [1, 0]]))
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    # Latent 0: 1*[1,0] + 6*[1,1]; 1: 2*[1,0] + 3*[0,1] + 5*[1,1]; 2: none; 3: 4*[0,1].
    expected = [[7, 6], [7, 8], [0, 0], [0, 4]]
    assert transposed_product(weights, entries, rows, 4).tolist() == expected
    W = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0], [5.0, 6.0]])
    assert row_products(rows, W, entries).tolist() == [1, 3, 4, 6, 7, 3]
    assert weighted_rows(weights, entries, W)[0].tolist() == [7, 10]  # 1*[1,2] + 2*[3,4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_dense_products_take_over_where_codes_are_dense(
    size: tuple[int, int, int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, entries = KINDS[kind](size)
    decoding = [m["values"], m["W_dec"]]
    encoding = [m["x"], m["b_dec"], m["W_enc"], m["b_enc"]]
    found = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(kernels, "DENSE_SHARE", share)
        assert not len(entries.latents) or kernels.is_dense(entries, size[2]) == (share == 0.0)
        out = kernels.decode(m["values"], entries, m["W_dec"])
        pre = kernels.pre_activations_at(m["x"], m["b_dec"], m["W_enc"], m["b_enc"], entries)
        found.append([out, *gradients(out, decoding), pre, *gradients(pre, encoding)])
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(dense, sparse, atol=1e-5, rtol=1e-5)


def test_gradients_have_their_parameters_layout() -> None:
    m, entries = make((7, 48, 96, 5), False)
    out = _SparsePreActivations.apply(m["x"], m["b_dec"], m["W_enc"], m["b_enc"], entries, None)
    (gradient,) = torch.autograd.grad(out.sum(), [m["W_enc"]])
    assert gradient.stride() == m["W_enc"].stride()
