"""The attribute reader: a small network that says which scene an image shows.

It is trained on renders alone (never on what toy-turbo draws) with a little noise, blur and change
of brightness, and judges toy-turbo's images; its own accuracy on held-out renders is in the model
card.
"""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional

from probe.toyturbo.briefs import draw_briefs, settle
from probe.toyturbo.fitting import seeded
from probe.toyturbo.world import ABSENT, FACTORS, SCENE_FACTORS, THING_FACTORS, Scenes, render

THING_SIZES = [len(FACTORS[name]) for name in THING_FACTORS]
SCENE_SIZES = [len(FACTORS[name]) for name in SCENE_FACTORS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the reader says of a batch of images, as logits."""

    present: Float[Tensor, "b 4"]
    """That a cell has a thing in it."""
    things: list[Float[Tensor, "b 4 _"]]
    """Each of `THING_FACTORS`, by cell, as if there were a thing."""
    surround: list[Float[Tensor, "b _"]]
    """Each of `SCENE_FACTORS`."""

    def scenes(self) -> Scenes:
        """The likeliest scene."""
        things = torch.stack([logits.argmax(-1) for logits in self.things], dim=2)
        empty = (self.present < 0)[..., None]
        return Scenes(
            things=things.masked_fill(empty, ABSENT),
            surround=torch.stack([logits.argmax(-1) for logits in self.surround], dim=1),
        )

    def factor(self, name: str) -> Float[Tensor, "*lead v"]:
        """The logits of a factor's values: by cell for a thing's, else by scene."""
        if name in SCENE_FACTORS:
            return self.surround[SCENE_FACTORS.index(name)]
        return self.things[THING_FACTORS.index(name)]


class AttributeReader(nn.Module):
    """Convolutions down to one vector a cell, from which everything is read."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 3 * width)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 3, padding=1, stride=2),
                nn.GroupNorm(8, after),
                nn.GELU(),
                nn.Conv2d(after, after, 3, padding=1),
                nn.GroupNorm(8, after),
                nn.GELU(),
            ]
        cell = 4 * width
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], cell, 4, stride=4), nn.GELU())
        self.of_cell = nn.Linear(cell, 1 + sum(THING_SIZES))
        self.of_scene = nn.Linear(4 * cell, sum(SCENE_SIZES))

    def forward(self, images: Float[Tensor, "b 3 64 64"]) -> Reading:
        """Read images with values from 0 to 1."""
        cells = self.body(images - 0.5).flatten(2).transpose(1, 2)
        present, *things = self.of_cell(cells).split([1, *THING_SIZES], dim=-1)
        surround = self.of_scene(cells.flatten(1)).split(SCENE_SIZES, dim=-1)
        return Reading(present=present.squeeze(-1), things=things, surround=list(surround))


def reader_loss(reader: AttributeReader, step: int, batch: int, seed: int) -> Tensor:
    """Cross-entropy on a batch of renders, made worse on purpose."""
    generator = seeded(seed, step)
    scenes = random_scenes(batch, generator)
    reading = reader(_worsened(render(scenes), generator))
    there = scenes.present
    loss = functional.binary_cross_entropy_with_logits(reading.present, there.float())
    for i, logits in enumerate(reading.things):
        loss = loss + functional.cross_entropy(logits[there], scenes.things[..., i][there])
    for i, logits in enumerate(reading.surround):
        loss = loss + functional.cross_entropy(logits, scenes.surround[:, i])
    return loss


def random_scenes(n: int, generator: Generator) -> Scenes:
    """Scenes of the world, every value of a factor as likely as the others."""
    return settle(draw_briefs(n, generator), torch.zeros(n, 4, 32, 32))


def _worsened(images: Tensor, generator: Generator) -> Tensor:
    """Half of the images a little blurred, all a little noisy and brighter or darker."""
    n = len(images)
    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(n, 1, 1, 1, generator=generator) * (
        torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    )
    images = images + share * (blurred - images)
    brightness = 1 + 0.1 * torch.randn(n, 1, 1, 1, generator=generator)
    noise = 0.06 * torch.rand(n, 1, 1, 1, generator=generator)
    return images * brightness + noise * torch.randn(images.shape, generator=generator)


# ------------------------------------------------------------------------------------- accuracy


def accuracy(read: Scenes, true: Scenes) -> dict[str, tuple[int, int]]:
    """How many values of each factor were read rightly, and of how many.

    `position` counts cells, by whether they have a thing; a thing's factors count the things that
    are there and are wrong where none was seen.
    """
    found = {"position": (read.present == true.present)}
    for name in THING_FACTORS:
        found[name] = (read.factor(name) == true.factor(name))[true.present]
    for name in SCENE_FACTORS:
        found[name] = read.factor(name) == true.factor(name)
    return {name: (int(right.sum()), right.numel()) for name, right in found.items()}
