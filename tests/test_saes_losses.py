import pytest
import torch

from saes.activations import TopK
from saes.losses import auxk, normalised_mse, squared_error, total_variance, training_loss
from saes.types import Entries, TrainingOutput


def test_normalised_mse_by_hand() -> None:
    target = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    reconstruction = torch.tensor([[1.0, 1.0], [1.0, 4.0]])
    assert squared_error(target, reconstruction).tolist() == [1.0, 4.0]
    # Mean of 1 and 4 is 2.5; over a variance of 10 that is 0.25.
    assert float(normalised_mse(target, reconstruction, 10.0)) == 0.25


def test_the_gradient_of_the_squared_error_is_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    reconstruction = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: squared_error(target, r), reconstruction)


def test_total_variance_by_hand() -> None:
    # Mean [2, 3]; every row is 1 + 1 away from it.
    assert total_variance(torch.tensor([[1.0, 2.0], [3.0, 4.0]])) == 2.0


def test_the_mean_scores_one() -> None:
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    mean = x.mean(0).expand_as(x)
    assert float(normalised_mse(x, mean, total_variance(x))) == pytest.approx(1.0)


def test_auxk_by_hand() -> None:
    error = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    residual = torch.tensor([[0.0, 0.0], [3.0, 2.0]])
    # |e - ehat|^2 = 1 + 4 = 5. mean(e) = [2, 0], so the spread is 1 + 1 = 2.
    assert float(auxk(error, residual)) == 2.5


def test_auxk_is_zero_with_nothing_to_learn() -> None:
    assert float(auxk(torch.ones(1, 2), torch.zeros(1, 2))) == 0.0  # one row has no spread
    assert float(auxk(torch.zeros(3, 2), torch.ones(3, 2))) == 0.0


def test_auxk_sends_no_gradient_into_the_reconstruction() -> None:
    target = torch.randn(4, 3)
    reconstruction = torch.randn(4, 3, requires_grad=True)
    residual = torch.randn(4, 3, requires_grad=True)
    output = TrainingOutput(
        target=target,
        reconstruction=reconstruction,
        further=(),
        residual=residual,
        penalty=torch.zeros(()),
        fired=torch.zeros(5, dtype=torch.bool),
        l0=0.0,
        smallest=None,
        values=torch.zeros(0),
        entries=Entries.of_rows(torch.zeros(4, 0, dtype=torch.long)),
    )
    loss = training_loss(output, TopK(k=1), variance=2.0, auxk_alpha=0.5)
    loss.auxk.backward()
    assert reconstruction.grad is None
    assert residual.grad is not None and bool(residual.grad.any())
    assert float(loss.total.detach()) == pytest.approx(
        float((loss.mse + 0.5 * auxk(target - reconstruction, residual)).detach())
    )
