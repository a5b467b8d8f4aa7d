"""How an SAE's parameters begin, what training holds them to, and how its scale is undone.

Initialisation (Gao et al. 2024, 2406.04093, appendix A.1): rows of `W_dec` random unit vectors,
`W_enc` its transpose, `b_enc` zero, `b_dec` the geometric median of a sample. Their code also
rescales `W_enc` so that reconstructions of unit vectors have unit norm, noting no clear benefit. It
is left out: after 400 steps on SmolLM2-135M (layer 12, 4608 latents, lr 1e-3) FVU was 0.203 with it
and 0.187 without. The k-sparse autoencoder begins with weights of deviation 0.01 and biases of 0
(Makhzani and Frey 2013, their code). So does `b_dec` under top-AFA's `paper_code` begin at 0: the
authors' loss wants |f| = |x| and their selection |f| = |x - b_dec|, and where the two begin far
apart, as they do in a residual stream with a large mean, all codes collapse to one latent.

Decoder rows keep unit norm, but for tied weights. Before a step the gradient loses its component
along each row (`project_decoder_gradient`), after it the rows are normalised (`normalise_decoder`).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from saes.activations import JumpRelu, TopAfa
from saes.models import SparseAutoencoder

ROWS_AT_ONCE = 512
"""Decoder rows handled at a time: they stay in the cache."""
TIED_DEVIATION = 0.01
"""Standard deviation of the first weights of a k-sparse autoencoder."""


@torch.no_grad()
def initialise(
    sae: SparseAutoencoder, sample: Float[Tensor, "n d"], generator: torch.Generator
) -> None:
    """Set all parameters for training; `sample` is in the units that training will see."""
    rows = sae.training_input(sample)
    directions = torch.randn(sae.config.d_sae, sae.config.d_in, generator=generator)
    for parameter in sae.parameters():
        parameter.zero_()
    if sae.config.tied:
        sae.W_dec.copy_(directions * TIED_DEVIATION)
        return
    sae.W_dec.copy_(functional.normalize(directions, dim=1))
    sae.W_enc.copy_(sae.W_dec.T)
    if not (isinstance(sae.config.activation, TopAfa) and sae.config.activation.paper_code):
        sae.b_dec.copy_(geometric_median(rows))
    if isinstance(sae.config.activation, JumpRelu):
        sae.log_threshold.fill_(math.log(sae.config.activation.start))


def geometric_median(
    points: Float[Tensor, "n d"], *, max_steps: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d"]:
    """The point with the smallest mean distance to `points`, in float64.

    Weiszfeld's iteration from the mean, with the step of Vardi and Zhang (2000) where the estimate
    sits on a data point; it stops once a step is shorter than `tolerance` times the mean distance.
    """
    assert len(points), "the geometric median of no points"
    x = points.double()
    median = x.mean(0)
    for _ in range(max_steps):
        distances = torch.linalg.vector_norm(x - median, dim=1)
        scale = distances.mean()
        away = distances > 1e-12 * scale
        if not away.any():
            break
        weights = torch.where(away, 1 / distances, 0)
        step = (weights @ x) / weights.sum() - median
        pull = torch.linalg.vector_norm(step) * weights.sum()
        step = step * (1 - (~away).sum() / pull.clamp_min(1e-300)).clamp_min(0)
        median = median + step
        if torch.linalg.vector_norm(step) < tolerance * scale:
            break
    return median.to(points.dtype)


@torch.no_grad()
def project_decoder_gradient(sae: SparseAutoencoder) -> None:
    """Remove from the decoder's gradient what would only change the length of its unit rows."""
    assert sae.W_dec.grad is not None, "no gradient to project: call backward first"
    pairs = zip(sae.W_dec.split(ROWS_AT_ONCE), sae.W_dec.grad.split(ROWS_AT_ONCE), strict=True)
    for rows, gradients in pairs:
        gradients.sub_(rows * (rows * gradients).sum(1, keepdim=True))


@torch.no_grad()
def normalise_decoder(sae: SparseAutoencoder) -> None:
    """Give every decoder row unit norm."""
    for rows in sae.W_dec.split(ROWS_AT_ONCE):
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12))


@torch.no_grad()
def fold_scale(sae: SparseAutoencoder, scale: float) -> None:
    """Make an SAE trained on `scale * x` read `x` itself.

    Trained: z = f(W_enc^T (c x - b_dec) + b_enc), and c xhat = W_dec^T z + b_dec. Dividing the
    pre-activation by c > 0 gives W_enc^T (x - b_dec / c) + b_enc / c. The largest stay the largest,
    ReLU commutes with a positive factor, a threshold divided by c is exceeded by the same entries,
    and top-AFA compares two norms that shrink alike; so z / c are the codes of x under biases and
    thresholds divided by c, and W_dec^T (z / c) + b_dec / c = xhat. The weights (and `r_mag`, a
    factor) stay.
    """
    assert scale > 0, scale
    for name, tensor in [*sae.named_parameters(), *sae.named_buffers()]:
        if name.startswith("b_") or name == "threshold":
            tensor.div_(scale)
        elif name == "log_threshold":
            tensor.sub_(math.log(scale))
