"""Loss terms, each a pure function of tensors.

With x the (normalised) input, xhat its reconstruction and V the source's total variance, the mean
of `|x - mean|^2` over a large sample:

1. `normalised_mse`: mean of `|x - xhat|^2` over the batch, divided by V. This is the fraction of
   variance unexplained (FVU) against the source's variance, so 1 means no better than the mean.
2. `auxk` (Gao et al. 2024, arXiv 2406.04093, appendix A.2): with e = x - xhat (no gradient through
   it) and ehat what the `k_aux` strongest dead latents make of the same input, `sum |e - ehat|^2 /
   sum |e - mean(e)|^2` over the batch (normalised as in their code): dead latents learn what the
   live ones leave over. The bias `b_dec` takes part in neither e nor ehat.
3. `further`: `normalised_mse` of what else has to reconstruct the input: an eighth for multi-TopK
   (Gao et al. 2024), 1 for each of Matryoshka's inner prefixes (Bussmann et al. 2025, 2503.17547)
   and for the gates of Gated (Rajamanoharan et al. 2024, 2404.16014).
4. `penalty`: the activation's own, times its coefficient, in units that make it dimensionless: L1
   norms over sqrt(V), top-AFA's squared difference of norms over V / d (the authors' balance, since
   their squared error is a mean over the d coordinates of standardised rows), numbers of latents as
   they are.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from saes.activations import Activation, Gated, JumpRelu, Relu, TopAfa, TopK
from saes.types import Loss, TrainingOutput


def squared_error(
    target: Float[Tensor, "b d"], reconstruction: Float[Tensor, "b d"]
) -> Float[Tensor, " b"]:
    """`|target - reconstruction|^2` of each row; differentiable in `reconstruction`."""
    return _SquaredError.apply(target, reconstruction)


class _SquaredError(torch.autograd.Function):
    """Written out: autograd's own way passes over the rows eight times, this three times."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, reconstruction: Tensor) -> Tensor:
        error = reconstruction - target
        ctx.save_for_backward(error)
        return torch.linalg.vecdot(error, error)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (error,) = ctx.saved_tensors
        return None, error * (2 * gradient)[:, None]


def total_variance(x: Float[Tensor, "b d"]) -> float:
    """Mean of `|x - mean|^2` over the rows, summed in float64."""
    centred = x.double() - x.double().mean(0)
    return float(centred.square().sum(-1).mean())


def normalised_mse(
    target: Float[Tensor, "b d"], reconstruction: Float[Tensor, "b d"], variance: float
) -> Float[Tensor, ""]:
    """Mean squared error of a row over the source's total variance (dimensionless)."""
    return squared_error(target, reconstruction).mean() / variance


def auxk(
    error: Float[Tensor, "b d"],
    residual: Float[Tensor, "b d"],
    spread: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """NMSE of `residual` as reconstruction of `error`; 0 with nothing to learn.

    `spread` is the denominator where these rows are only a part of the batch.
    """
    error = error.detach()
    if spread is None:
        spread = (error - error.mean(0)).square().sum()
    if spread == 0:
        return error.new_zeros(())
    return squared_error(error, residual).sum() / spread


def training_loss(
    output: TrainingOutput,
    activation: Activation,
    *,
    variance: float,
    auxk_alpha: float,
    spread: Float[Tensor, ""] | None = None,
) -> Loss:
    """All terms of one training step; `variance` is that of the normalised source.

    `spread` is AuxK's denominator where the rows are only a part of the batch: see `auxk`.
    """
    d = output.target.shape[1]
    further = output.target.new_zeros(())
    for reconstruction in output.further:
        further = further + normalised_mse(output.target, reconstruction, variance)
    errors = squared_error(output.target, output.reconstruction)
    return Loss(
        errors=errors.detach(),
        mse=errors.mean() / variance,
        further=further * (1 / 8 if isinstance(activation, TopK) else 1),
        penalty=output.penalty * penalty_weight(activation, variance, d),
        auxk=auxk_alpha * _auxk_of(output, spread),
    )


def _auxk_of(output: TrainingOutput, spread: Tensor | None) -> Tensor:
    """`auxk` of a forward pass."""
    if output.residual is None:
        return output.target.new_zeros(())
    return auxk(output.target - output.reconstruction.detach(), output.residual, spread)


def penalty_weight(activation: Activation, variance: float, d: int) -> float:
    """The coefficient of an activation's penalty over the unit that the penalty is measured in."""
    match activation:
        case Relu(l1=weight) | Gated(l1=weight):
            return weight / math.sqrt(variance)
        case JumpRelu(l0=weight):
            return weight
        case TopAfa(afa=weight):
            return weight * d / variance
        case _:
            return 0.0
