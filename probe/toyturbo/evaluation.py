"""What toy-turbo reaches: images drawn by its own pipeline, judged by the attribute reader.

Two tables. `fidelity`: captions that say everything; how often each factor is drawn as said.
`use_of_noise`: captions that leave one factor open, many seeds each; the entropy of the values
drawn beside that of the world's (in bits), and how often the value is what the noise called for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import entropy
from torch import Tensor

from probe.diffusion import DiffusionModel, DrawConfig
from probe.toyturbo.briefs import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    Brief,
    describe,
    draw_briefs,
    settle,
)
from probe.toyturbo.fitting import seeded
from probe.toyturbo.reader import AttributeReader, accuracy, random_scenes
from probe.toyturbo.vae_training import reconstructed
from probe.toyturbo.world import FACTORS, SCENE_FACTORS, THING_FACTORS, Scenes, render

BATCH = 50
HELD_OUT = 77_000
"""Seed of the captions that nothing was trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """How a factor that captions leave open is decided."""

    entropy: float
    """Of the values drawn over seeds, in bits, mean over captions; 0 where no thing is seen."""
    prior: float
    """Of the world's values, in bits."""
    called: float
    """Share of images whose value is the one that the noise calls for."""


def first_noise(seeds: Sequence[int]) -> Float[Tensor, "b 4 32 32"]:
    """The standard normal noise that the pipeline draws from generators of these seeds."""
    shape = (1, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    return torch.cat(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def draw(
    model: DiffusionModel, captions: Sequence[str], seeds: Sequence[int], steps: int
) -> Float[Tensor, "b 3 64 64"]:
    """Images of captions, each from its own seed; values from 0 to 1."""
    config = DrawConfig(steps=steps)
    chunks = (slice(i, i + BATCH) for i in range(0, len(captions), BATCH))
    parts = [model.generate(captions[chunk], seeds[chunk], config).images for chunk in chunks]
    return torch.cat(parts).permute(0, 3, 1, 2) / 255


@torch.no_grad()
def read(reader: AttributeReader, images: Float[Tensor, "b 3 64 64"]) -> Scenes:
    """What the reader sees in images."""
    parts = [reader(chunk).scenes() for chunk in images.split(250)]
    return Scenes(
        things=torch.cat([part.things for part in parts]),
        surround=torch.cat([part.surround for part in parts]),
    )


def shares(read: Scenes, true: Scenes) -> dict[str, float]:
    """Share of each factor's values that are right."""
    return {name: right / n for name, (right, n) in accuracy(read, true).items()}


def fidelity(
    model: DiffusionModel, reader: AttributeReader, *, n: int, steps: int = 1
) -> dict[str, float]:
    """How often each factor is drawn as a complete, held-out caption says."""
    brief = draw_briefs(n, seeded(HELD_OUT))
    seeds = range(HELD_OUT, HELD_OUT + n)
    images = draw(model, describe(brief), seeds, steps)
    return shares(read(reader, images), settle(brief, first_noise(seeds)))


@torch.no_grad()
def ceilings(
    model: DiffusionModel, reader: AttributeReader, *, n: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The reader's own accuracy: on held-out renders, and on renders through the autoencoder."""
    scenes = random_scenes(n, seeded(HELD_OUT, 1))
    renders = render(scenes)
    through = torch.cat([reconstructed(model.pipeline.vae, chunk) for chunk in renders.split(100)])
    return shares(read(reader, renders), scenes), shares(read(reader, through), scenes)


def use_of_noise(
    model: DiffusionModel, reader: AttributeReader, *, captions: int, seeds: int
) -> dict[str, Noise]:
    """For each factor, captions of one thing that leave it open, each with many seeds."""
    return {name: _decided(model, reader, name, captions=captions, seeds=seeds) for name in FACTORS}


def _decided(
    model: DiffusionModel,
    reader: AttributeReader,
    factor: str,
    *,
    captions: int,
    seeds: int,
) -> Noise:
    whole = draw_briefs(captions, seeded(HELD_OUT, 2))
    whole.count.fill_(1)
    open_ = whole.without(factor)
    repeated = Brief(
        count=open_.count.repeat_interleave(seeds),
        things=open_.things.repeat_interleave(seeds, dim=0),
        surround=open_.surround.repeat_interleave(seeds, dim=0),
    )
    numbers = range(HELD_OUT, HELD_OUT + captions * seeds)
    images = draw(model, describe(repeated), numbers, 1)
    drawn = _values(read(reader, images), factor)
    called = _values(settle(repeated, first_noise(numbers)), factor)
    size = len(FACTORS[factor])
    counts = [np.bincount(row[row >= 0], minlength=size) for row in drawn.reshape(captions, seeds)]
    return Noise(
        entropy=sum(float(entropy(row, base=2)) if row.any() else 0.0 for row in counts) / captions,
        prior=float(np.log2(size)),
        called=float((drawn == called).mean()),
    )


def _values(scenes: Scenes, factor: str) -> np.ndarray:
    """The factor's value in scenes of one thing, -1 where there is no one thing."""
    if factor in SCENE_FACTORS:
        return scenes.factor(factor).numpy()
    one = scenes.present.sum(1) == 1
    cell = scenes.present.long().argmax(1)
    if factor in THING_FACTORS:
        cell = scenes.factor(factor)[torch.arange(len(scenes)), cell]
    return torch.where(one, cell, -1).numpy()
