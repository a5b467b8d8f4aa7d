"""The autoencoder between pixels and latents.

Three latent channels are held near a shrunken copy of the image, so that latents have about unit
variance and distances between latents are distances between images; the fourth is free for edges.
Trained on crops of renders, so that it learns edges and not whole scenes.
"""

import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from probe.toyturbo.fitting import seeded
from probe.toyturbo.reader import random_scenes
from probe.toyturbo.world import SIDE, render

GAIN = 1.6
"""Pixels from -1 to 1 times this make latents of about unit variance."""
CROP = 32
COPY_WEIGHT, FREE_WEIGHT = 0.1, 0.01


def to_pixels(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """From 0..1 to the -1..1 that the pipeline's autoencoders take."""
    return images * 2 - 1


def vae_loss(vae: AutoencoderTiny, step: int, batch: int, seed: int) -> Tensor:
    """Reconstruction error (L1 and L2), and how far latents are from the shrunken copy."""
    generator = seeded(seed, step)
    images = render(random_scenes(batch, generator))
    top, left = (
        int(torch.randint(SIDE - CROP + 1, (), generator=generator)) // 2 * 2 for _ in "yx"
    )
    pixels = to_pixels(images[:, :, top : top + CROP, left : left + CROP])
    latents = vae.encoder(pixels)
    error = vae.decoder(latents) - pixels
    copy = latents[:, :3] - GAIN * functional.avg_pool2d(pixels, 2)
    free = latents[:, 3]
    spread = free.mean().square() + (free.square().mean() - 1).square()
    return (
        error.abs().mean()
        + 4 * error.square().mean()
        + COPY_WEIGHT * copy.square().mean()
        + FREE_WEIGHT * spread
    )


@torch.no_grad()
def reconstructed(
    vae: AutoencoderTiny, images: Float[Tensor, "b 3 64 64"]
) -> Float[Tensor, "b 3 64 64"]:
    """Images through latents and back; values from 0 to 1."""
    return (vae.decoder(vae.encoder(to_pixels(images))) / 2 + 0.5).clamp(0, 1)
