"""Loss terms, each a pure function of tensors.

With x the (normalised) input, xhat its reconstruction and V the source's total variance, the mean
of `|x - mean|^2` over a large sample:

1. `normalised_mse`: mean of `|x - xhat|^2` over the batch, divided by V. This is the fraction of
   variance unexplained (FVU) against the source's variance, so 1 means no better than the mean.
2. `auxk` (Gao et al. 2024, arXiv 2406.04093, appendix A.2): with e = x - xhat (no gradient through
   it) and ehat what the `k_aux` strongest dead latents make of the same input, `sum |e - ehat|^2 /
   sum |e - mean(e)|^2` over the batch (normalised as in their code): dead latents learn what the
   live ones leave over. The bias `b_dec` takes part in neither e nor ehat.
"""

from jaxtyping import Float
from torch import Tensor

from saes.types import Loss, TrainingOutput


def squared_error(
    target: Float[Tensor, "b d"], reconstruction: Float[Tensor, "b d"]
) -> Float[Tensor, " b"]:
    """`|target - reconstruction|^2` of each row."""
    return (target - reconstruction).square().sum(-1)


def total_variance(x: Float[Tensor, "b d"]) -> float:
    """Mean of `|x - mean|^2` over the rows, summed in float64."""
    centred = x.double() - x.double().mean(0)
    return float(centred.square().sum(-1).mean())


def normalised_mse(
    target: Float[Tensor, "b d"], reconstruction: Float[Tensor, "b d"], variance: float
) -> Float[Tensor, ""]:
    """Mean squared error of a row over the source's total variance (dimensionless)."""
    return squared_error(target, reconstruction).mean() / variance


def auxk(error: Float[Tensor, "b d"], residual: Float[Tensor, "b d"] | None) -> Float[Tensor, ""]:
    """NMSE of `residual` as reconstruction of `error`; 0 with nothing dead or nothing to learn."""
    if residual is None:
        return error.new_zeros(())
    error = error.detach()
    spread = (error - error.mean(0)).square().sum()
    if spread == 0:
        return error.new_zeros(())
    return (error - residual).square().sum() / spread


def training_loss(output: TrainingOutput, *, variance: float, auxk_alpha: float) -> Loss:
    """All terms of one training step; `variance` is that of the normalised source."""
    error = output.target - output.reconstruction
    return Loss(
        mse=normalised_mse(output.target, output.reconstruction, variance),
        auxk=auxk_alpha * auxk(error, output.residual),
    )
