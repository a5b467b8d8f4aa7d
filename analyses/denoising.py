"""A denoising autoencoder: the rival that the k-sparse autoencoder is compared with on images.

Vincent, Larochelle, Lajoie, Bengio and Manzagol 2010 (JMLR 11, sections 2 and 4), for pixels in
[0, 1]: of every image a share `noise` of the pixels, drawn afresh each time, is set to 0; tied
weights and sigmoids on both sides; the loss is the cross-entropy between reconstruction and clean
image.

    y = sigmoid(W x~ + b)        xhat = sigmoid(W^T y + b')

It is trained like its rival: the same batches in the same order, as many steps, Adam with the same
decay rates and the same rise and fall of the learning rate.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional

from probe.errors import Failure
from probe.loader import ActivationSource
from saes.training import TrainConfig, set_lr


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisingConfig:
    """How a denoising autoencoder is trained; `train` has the settings that it shares."""

    noise: float
    """Share of the pixels set to 0."""
    train: TrainConfig
    """Units, steps, learning rate and its course, decay rates, seed."""


class DenoisingAutoencoder(nn.Module):
    """Float32 `W [s, d]`, `b_hidden [s]`, `b_visible [d]`."""

    def __init__(self, d_in: int, n_units: int, generator: torch.Generator) -> None:
        """Uniform weights of Glorot and Bengio (2010), times 4 for sigmoids; biases 0."""
        super().__init__()
        reach = 4 * (6 / (d_in + n_units)) ** 0.5
        uniform = torch.rand(n_units, d_in, generator=generator)
        self.W = nn.Parameter((2 * uniform - 1) * reach)
        self.b_hidden = nn.Parameter(torch.zeros(n_units))
        self.b_visible = nn.Parameter(torch.zeros(d_in))

    def encode(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b s"]:
        """Hidden units of clean or corrupted images."""
        return torch.sigmoid(functional.linear(x, self.W, self.b_hidden))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Logits of the reconstruction."""
        return functional.linear(self.encode(x), self.W.T, self.b_visible)


def fit_denoising(source: ActivationSource, config: DenoisingConfig) -> DenoisingAutoencoder:
    """Train on the batches of `source`. Raises `Failure` where the loss is not finite."""
    generator = torch.Generator().manual_seed(config.train.seed)
    model = DenoisingAutoencoder(source.d, config.train.d_sae, generator)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.train.lr, betas=config.train.betas, fused=True
    )
    batches = itertools.islice(source.batches(0), config.train.steps)
    for step, x in enumerate(batches):
        kept = torch.rand(x.shape, generator=generator) >= config.noise
        loss = cross_entropy(model(x * kept), x)
        if not torch.isfinite(loss.detach()):
            raise Failure(
                f"the denoising autoencoder's loss is {float(loss.detach())} at step {step + 1}; "
                f"give it a learning rate below {config.train.lr}."
            )
        set_lr(optimizer, config.train, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def cross_entropy(logits: Float[Tensor, "b d"], x: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Cross-entropy between images and their reconstructions, summed over pixels, mean over rows.

    Vincent et al. 2010, equation 6.
    """
    losses = functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return losses.sum(1).mean()


@torch.no_grad()
def hidden_units(
    model: DenoisingAutoencoder, pixels: Float32[np.ndarray, "n d"]
) -> Float32[np.ndarray, "n s"]:
    """Hidden units of clean images."""
    return model.encode(torch.from_numpy(pixels)).numpy()
