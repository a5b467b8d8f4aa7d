import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from probe.errors import Failure, UserError
from saes import kernels
from saes.activations import TopK
from saes.constraints import (
    fold_scale,
    geometric_median,
    initialise,
    normalise_decoder,
    project_decoder_gradient,
)
from saes.losses import total_variance, training_loss
from saes.models import Normalize, SaeConfig, SparseAutoencoder, is_finite
from saes.training_forward import training_forward


def make_sae(normalize: Normalize = "none") -> SparseAutoencoder:
    sae = SparseAutoencoder(
        SaeConfig(d_in=48, d_sae=640, activation=TopK(k=8), normalize=normalize)
    )
    generator = torch.Generator().manual_seed(1)
    initialise(sae, torch.randn(64, 48, generator=generator), generator)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1, generator=generator)
        sae.W_enc.add_(torch.randn(48, 640, generator=generator), alpha=0.05)
    return sae


def hand_sae() -> SparseAutoencoder:
    """Latents along +x, +y, -x, -y."""
    sae = SparseAutoencoder(SaeConfig(d_in=2, d_sae=4, activation=TopK(k=1)))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


X = torch.tensor([[3.0, 1.0], [1.0, -2.0]])


def test_forward_by_hand() -> None:
    # Pre-activations [3, 1, -3, -1] and [1, -2, -1, 2]: latent 0 fires with 3, latent 3 with 2.
    output = hand_sae()(X)
    assert output.codes.values.tolist() == [[3.0], [2.0]]
    assert output.codes.indices.tolist() == [[0], [3]]
    assert output.reconstruction.tolist() == [[3.0, 0.0], [0.0, -2.0]]


def test_biases_by_hand() -> None:
    sae = hand_sae()
    with torch.no_grad():
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
        sae.b_enc.copy_(torch.tensor([0.0, 5.0, 0.0, 0.0]))
    # x - b_dec = [2, 1] and [0, -2]; latent 1 reads 1 + 5 = 6 and -2 + 5 = 3, both the largest.
    output = sae(X)
    assert output.codes.values.tolist() == [[6.0], [3.0]]
    assert output.reconstruction.tolist() == [[1.0, 6.0], [1.0, 3.0]]
    assert sae.pre_activations(X).tolist() == [[2, 6, -2, -1], [0, 3, 0, 2]]


@pytest.mark.parametrize("dense_share", [0.0, 1.0])
def test_auxk_by_hand(dense_share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DENSE_SHARE", dense_share)
    sae = hand_sae()
    with torch.no_grad():
        sae.b_enc[1] = 1.0
    output = training_forward(sae, X, dead=torch.tensor([1]), k_aux=256)
    # e = x - xhat = [0, 1] and [1, 0]. Dead latent 1 reads 1 + 1 = 2 and -2 + 1 = -1 -> 0, so
    # ehat = [0, 2] and [0, 0]; |e - ehat|^2 = 1 + 1 = 2. mean(e) = [.5, .5]: spread 4 * .25 = 1.
    assert output.residual is not None and output.residual.tolist() == [[0, 2], [0, 0]]
    loss = training_loss(output, sae.config.activation, variance=4.0, auxk_alpha=1 / 32)
    assert float(loss.mse.detach()) == (1 + 1) / 2 / 4
    assert float(loss.auxk.detach()) == 2 / 32
    loss.auxk.backward()
    # d/dz of latent 1 in row 1: 2 (ehat - e) . d_1 / spread / 32 = 2 / 32.
    # Its encoder column gets that times x; its decoder row gets z * 2 (ehat - e) / spread / 32.
    assert sae.W_enc.grad is not None and sae.W_dec.grad is not None
    assert sae.W_enc.grad.T.tolist() == [[0, 0], [3 / 16, 1 / 16], [0, 0], [0, 0]]
    assert sae.W_dec.grad.tolist() == [[0, 0], [0, 2 * 2 / 32], [0, 0], [0, 0]]


def reference_loss(sae: SparseAutoencoder, x: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """The training loss written densely, with nothing but autograd."""
    assert isinstance(sae.config.activation, TopK)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    values, indices = pre.topk(sae.config.activation.k)
    codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
    error = x - (codes @ sae.W_dec + sae.b_dec)
    loss = error.square().sum(1).mean() / 3.0
    if len(dead):
        values, indices = pre[:, dead].topk(min(k_aux, len(dead)))
        codes = torch.zeros_like(pre[:, dead]).scatter(1, indices, values.relu())
        e = error.detach()
        spread = (e - e.mean(0)).square().sum()
        loss = loss + (e - codes @ sae.W_dec[dead]).square().sum() / spread / 32
    return loss


@pytest.mark.parametrize("dense_share", [0.0, 1.0])
@pytest.mark.parametrize("n_dead", [0, 1, 5, 300])
@pytest.mark.parametrize("n_rows", [1, 33])
def test_loss_and_gradients_equal_dense_autograd(
    n_rows: int, n_dead: int, dense_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "DENSE_SHARE", dense_share)
    monkeypatch.setattr("saes.models.PRE_BYTES", 640 * 4 * 10)  # ten rows at a time
    sae = make_sae()
    x = torch.randn(n_rows, 48, generator=torch.Generator().manual_seed(2))
    dead = torch.arange(0, 2 * n_dead, 2)
    wanted = torch.autograd.grad(
        reference_loss(sae, x, dead if n_rows > 1 else dead[:0], 16), list(sae.parameters())
    )
    output = training_forward(sae, x, dead=dead, k_aux=16)
    loss = training_loss(output, sae.config.activation, variance=3.0, auxk_alpha=1 / 32)
    found = torch.autograd.grad(loss.total, list(sae.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_bfloat16_chooses_what_float32_chooses() -> None:
    sae = make_sae()
    x = 30 * torch.randn(333, 48, generator=torch.Generator().manual_seed(2))
    dead = torch.arange(0, 640, 3)
    rows = sae.training_input(x)
    exact = sae.choose(rows, training=True, dead=dead, k_dead=16)
    rough = sae.choose(rows, training=True, dead=dead, k_dead=16, dtype=torch.bfloat16)
    for a, b in zip(rough, exact, strict=True):
        assert torch.equal(a.latents, b.latents)
        torch.testing.assert_close(a.values, b.values, atol=1e-4, rtol=1e-5)


def test_any_leading_axes() -> None:
    sae = make_sae()
    x = torch.randn(2, 3, 48)
    output = sae(x)
    assert output.codes.values.shape == (2, 3, 8)
    assert output.reconstruction.shape == x.shape
    flat = sae(x.view(6, 48))
    torch.testing.assert_close(output.reconstruction.view(6, 48), flat.reconstruction)
    assert sae.encode(x[0, 0]).values.shape == (8,)
    assert sae(torch.zeros(0, 48)).reconstruction.shape == (0, 48)
    assert sae.pre_activations(x).shape == (2, 3, 640)


def test_half_precision_input_is_read_as_float32() -> None:
    sae = make_sae()
    x = torch.randn(4, 48).bfloat16()
    assert torch.equal(sae(x).reconstruction, sae(x.float()).reconstruction)


def test_the_encoder_is_differentiable_in_its_input() -> None:
    sae = make_sae()
    x = torch.randn(5, 48, requires_grad=True)
    (found,) = torch.autograd.grad(sae.encode(x).values.sum(), x)
    values = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).topk(8).values.relu()
    (wanted,) = torch.autograd.grad(values.sum(), x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_is_a_failure(bad: float) -> None:
    x = torch.zeros(3, 48)
    x[1, 7] = bad
    with pytest.raises(Failure, match="NaN or infinite"):
        make_sae().encode(x)


def test_opposite_infinities_and_large_numbers() -> None:
    assert not is_finite(torch.tensor([float("inf"), -float("inf")]).view(1, 2))
    assert is_finite(torch.full((4, 4), 3e38))


def test_wrong_width_and_too_large_k_are_the_users_mistakes() -> None:
    with pytest.raises(UserError, match="width 48 and got 47"):
        make_sae().encode(torch.zeros(3, 47))
    with pytest.raises(UserError, match="9 latents of 8 cannot be active"):
        SaeConfig(d_in=4, d_sae=8, activation=TopK(k=9))
    with pytest.raises(UserError, match="at least 1"):
        SaeConfig(d_in=0, d_sae=8, activation=TopK(k=1))


def test_layer_norm_ignores_each_rows_own_shift_and_gives_it_back() -> None:
    sae = make_sae(normalize="layer_norm")
    x = torch.randn(6, 48)
    moved = 7 * x + 100
    output, of_moved = sae(x), sae(moved)
    torch.testing.assert_close(of_moved.codes.values, output.codes.values, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        of_moved.reconstruction, 7 * output.reconstruction + 100, atol=2e-2, rtol=1e-3
    )
    with pytest.raises(UserError, match="pass decode the input"):
        sae.decode(output.codes)


def test_folding_the_scale_changes_nothing_but_the_units() -> None:
    sae = make_sae()
    x = torch.randn(9, 48)
    scale = 0.37
    with torch.no_grad():
        wanted = sae(scale * x)
        fold_scale(sae, scale)
        found = sae(x)
    assert torch.equal(found.codes.indices, wanted.codes.indices)
    torch.testing.assert_close(found.codes.values, wanted.codes.values / scale)
    torch.testing.assert_close(found.reconstruction, wanted.reconstruction / scale)


def test_initialisation() -> None:
    sae = SparseAutoencoder(SaeConfig(d_in=6, d_sae=20, activation=TopK(k=2)))
    sample = torch.randn(50, 6, generator=torch.Generator().manual_seed(3)) + 2
    initialise(sae, sample, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not bool(sae.b_enc.any())
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(sample))
    assert sae.W_enc.shape == (6, 20) and sae.W_enc.T.is_contiguous()


def test_geometric_median_equals_scipys_minimum() -> None:
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(4)).double()
    points[:5] += 30  # outliers that would drag a mean along

    def mean_distance(at: np.ndarray) -> float:
        return float(np.linalg.norm(points.numpy() - at, axis=1).mean())

    wanted = minimize(mean_distance, points.numpy().mean(0), method="Nelder-Mead").x
    found = geometric_median(points.float(), max_steps=1000, tolerance=1e-9).numpy()
    assert mean_distance(found) <= mean_distance(wanted) + 1e-6
    np.testing.assert_allclose(found, wanted, atol=1e-2)


def test_geometric_median_of_awkward_points() -> None:
    assert geometric_median(torch.tensor([[1.0, 2.0]])).tolist() == [1.0, 2.0]
    assert geometric_median(torch.ones(5, 3)).tolist() == [1.0, 1.0, 1.0]
    # In one dimension it is the median; the mean of this sample, 2, is one of its points.
    points = torch.tensor([[0.0], [0.0], [0.0], [2.0], [8.0]])
    assert float(geometric_median(points)) == pytest.approx(0.0, abs=1e-3)


def test_projection_takes_only_the_part_along_each_row() -> None:
    sae = hand_sae()
    sae.W_dec.grad = torch.tensor([[5.0, 1.0], [1.0, 5.0], [0.0, 0.0], [2.0, -2.0]])
    project_decoder_gradient(sae)
    assert sae.W_dec.grad.tolist() == [[0, 1], [1, 0], [0, 0], [2, 0]]


def test_normalising_the_decoder_leaves_a_zero_row_alone() -> None:
    sae = hand_sae()
    with torch.no_grad():
        sae.W_dec[0] = torch.tensor([3.0, 4.0])
        sae.W_dec[1] = 0.0
    normalise_decoder(sae)
    torch.testing.assert_close(sae.W_dec[0].detach(), torch.tensor([0.6, 0.8]))
    assert sae.W_dec[1].tolist() == [0.0, 0.0]


def test_total_variance_of_a_standardised_source_is_its_width() -> None:
    x = torch.randn(4000, 10, generator=torch.Generator().manual_seed(5))
    assert total_variance(x) == pytest.approx(10, rel=0.05)
