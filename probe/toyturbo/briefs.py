"""What a caption says of a scene, its words, and how noise decides what it leaves open.

A `Brief` is a scene with gaps. `describe` writes it as a caption:

    a large red striped disc at the top left and a small thing on a navy background lit from above

`settle` fills the gaps from the noise that the image will be drawn from, so that a caption and a
noise together mean exactly one scene. Its rule goes by sums over the noise [4, 32, 32] that a U-Net
comes by easily: the noise is seen as 8 x 8 patches of 4 x 4 (the resolution of the deepest level),
each patch as 2 x 2 quarters, and of every patch and channel the mean of the quarters, their
left-right, top-bottom and chequered contrast are taken and summed over the cell's 4 x 4 patches.
Scaled, these sixteen scores of a cell are independent standard normal numbers:

    colour      three signs: the means of channels 0, 1 and 2
    size        a sign: the mean of channel 3
    shape       two signs: the left-right contrasts of channels 0 and 1
    texture     a third of the circle: the left-right contrasts of channels 2 and 3 as an angle
    position    the free cell of the largest top-bottom contrast of channel 0
    background  two signs: the top-bottom contrasts of channels 1 and 2, summed over the cells
    light       two signs: the chequered contrasts of channels 0 and 1, summed over the cells
    how many    (an empty caption) the sign of the chequered contrasts of channel 2, summed

Every value is then equally likely and independent of the others. It is a rule that a network can
learn by plain regression, where a free choice would leave it with the average.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from probe.toyturbo.world import ABSENT, CELLS, FACTORS, SCENE_FACTORS, THING_FACTORS, Scenes

UNSAID = -1
BRIEF_FACTORS = ("position", *THING_FACTORS)
LATENT_SIDE, LATENT_CHANNELS, PATCH = 32, 4, 4
N_SCORES = 16
"""Scores of a cell's noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Brief:
    """What a batch of captions says; `UNSAID` is what they leave open."""

    count: Int[Tensor, " b"]
    """Number of things, 1 or 2; `UNSAID` for an empty caption."""
    things: Int[Tensor, "b 2 5"]
    """`BRIEF_FACTORS` of the first and the second thing mentioned."""
    surround: Int[Tensor, "b 2"]
    """`SCENE_FACTORS`."""

    def __len__(self) -> int:
        return len(self.count)

    def without(self, factor: str) -> "Brief":
        """The same with a factor left open, of every thing that has it."""
        things, surround = self.things.clone(), self.surround.clone()
        if factor in SCENE_FACTORS:
            surround[:, SCENE_FACTORS.index(factor)] = UNSAID
        else:
            things[:, :, BRIEF_FACTORS.index(factor)] = UNSAID
        return Brief(count=self.count, things=things, surround=surround)


def draw_briefs(
    n: int, generator: Generator, *, gaps: float = 0.0, alone: float = 0.0, empty: float = 0.0
) -> Brief:
    """Random briefs.

    Args:
        n: how many.
        generator: decides.
        gaps: the chance that a brief has gaps; it then leaves out each factor with chance 0.3.
        alone: the chance that one with gaps leaves out a single factor instead.
        empty: the chance that it says nothing at all.
    """
    sizes = [len(FACTORS[name]) for name in BRIEF_FACTORS[1:]]
    things = torch.stack([_integers(size, (n, 2), generator) for size in sizes], dim=2)
    first = _integers(CELLS, (n,), generator)
    second = (first + 1 + _integers(CELLS - 1, (n,), generator)) % CELLS
    things = torch.cat([torch.stack([first, second], dim=1)[:, :, None], things], dim=2)
    surround = [_integers(len(FACTORS[name]), (n,), generator) for name in SCENE_FACTORS]
    count = 1 + _integers(2, (n,), generator)
    with_gaps = torch.rand(n, generator=generator) < gaps
    nothing = torch.rand(n, generator=generator) < empty
    left_out = torch.rand(n, 2 * len(BRIEF_FACTORS) + 2, generator=generator) < 0.3
    if alone:
        one = _one_factor(n, generator)
        left_out = torch.where(torch.rand(n, 1, generator=generator) < alone, one, left_out)
    left_out = left_out & with_gaps[:, None] | nothing[:, None]
    things = things.masked_fill(left_out[:, 2:].unflatten(1, (2, -1)), UNSAID)
    things[:, 1] = things[:, 1].masked_fill((count == 1)[:, None], UNSAID)
    return Brief(
        count=count.masked_fill(nothing, UNSAID),
        things=things,
        surround=torch.stack(surround, dim=1).masked_fill(left_out[:, :2], UNSAID),
    )


def _one_factor(n: int, generator: Generator) -> Tensor:
    """One factor of the scene, or of both of its things, each."""
    n_scene, n_thing = len(SCENE_FACTORS), len(BRIEF_FACTORS)
    chosen = _integers(n_scene + n_thing, (n,), generator)
    of = functional.one_hot(chosen, n_scene + n_thing).bool()
    return torch.cat([of, of[:, n_scene:]], dim=1)


def _integers(size: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(size, shape, generator=generator)


# ------------------------------------------------------------------------------------- captions


def describe(brief: Brief) -> list[str]:
    """Each brief as a caption; an empty one where nothing is said."""
    rows = zip(brief.count.tolist(), brief.things.tolist(), brief.surround.tolist(), strict=True)
    return [_caption(count, things, surround) for count, things, surround in rows]


def _caption(count: int, things: list[list[int]], surround: list[int]) -> str:
    if count == UNSAID:
        return ""
    background, light = surround
    parts = [" and ".join(_thing(thing) for thing in things[:count])]
    if background != UNSAID:
        parts.append(f"on a {FACTORS['background'][background]} background")
    if light != UNSAID:
        side = FACTORS["light"][light]
        parts.append(f"lit from {'the ' if side in ('left', 'right') else ''}{side}")
    return " ".join(parts)


def _thing(values: list[int]) -> str:
    position, shape, colour, size, texture = values
    words = [
        FACTORS[name][value]
        for name, value in (("size", size), ("colour", colour), ("texture", texture))
        if value != UNSAID
    ]
    noun = "thing" if shape == UNSAID else FACTORS["shape"][shape]
    place = "" if position == UNSAID else f" at the {FACTORS['position'][position]}"
    phrase = " ".join([*words, noun])
    return f"{'an' if phrase.startswith('orange') else 'a'} {phrase}{place}"


def captions(seed: int) -> Iterator[str]:
    """Captions of random scenes without end, half of them with gaps."""
    generator = Generator().manual_seed(seed)
    while True:
        yield from describe(draw_briefs(64, generator, gaps=0.5))


# ---------------------------------------------------------------------- what the noise decides


def settle(brief: Brief, noise: Float[Tensor, "b 4 32 32"]) -> Scenes:
    """The scenes that captions and noise mean together; see the module's rule."""
    return scene_of(complete(brief, noise))


def complete(brief: Brief, noise: Float[Tensor, "b 4 32 32"]) -> Brief:
    """The briefs with their gaps filled from the noise; see the module's rule."""
    mean, across, down, chequered = scores(noise).unflatten(2, (4, 4)).unbind(2)
    count = torch.where(brief.count == UNSAID, 1 + _bit(chequered[..., 2].sum(1)), brief.count)
    cells = _free_cells(brief.things[:, :, 0], count, down[..., 0])
    choices = torch.stack(
        [
            2 * _bit(across[..., 0]) + _bit(across[..., 1]),
            4 * _bit(mean[..., 0]) + 2 * _bit(mean[..., 1]) + _bit(mean[..., 2]),
            _bit(mean[..., 3]),
            _third(across[..., 2], across[..., 3]),
        ],
        dim=2,
    )
    of_cells = torch.cat([cells[:, :, None], choices[torch.arange(len(brief))[:, None], cells]], 2)
    things = torch.where(brief.things == UNSAID, of_cells, brief.things)
    background = 2 * _bit(down[..., 1].sum(1)) + _bit(down[..., 2].sum(1))
    light = 2 * _bit(chequered[..., 0].sum(1)) + _bit(chequered[..., 1].sum(1))
    chosen = torch.stack([background, light], dim=1)
    surround = torch.where(brief.surround == UNSAID, chosen, brief.surround)
    return Brief(count=count, things=things, surround=surround)


def scene_of(brief: Brief) -> Scenes:
    """The scenes that complete briefs say."""
    things = torch.full((len(brief), CELLS, len(THING_FACTORS)), ABSENT)
    for i in range(2):
        there = brief.count > i
        cell, *values = brief.things[there, i].unbind(1)
        things[there, cell] = torch.stack(values, dim=1)
    return Scenes(things=things, surround=brief.surround)


def scores(noise: Float[Tensor, "b 4 32 32"]) -> Float[Tensor, "b 4 16"]:
    """The sixteen scores of each cell: mean, left-right, top-bottom, chequered by channel."""
    quarters = functional.avg_pool2d(noise.float(), PATCH // 2).unflatten(2, (-1, 2))
    (a, b), (c, d) = (row.unbind(-1) for row in quarters.unflatten(4, (-1, 2)).unbind(3))
    kinds = torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], dim=1)
    cells = functional.avg_pool2d(kinds.flatten(1, 2), kinds.shape[-1] // 2)
    return (kinds.shape[-1] // 2) * cells.flatten(2).transpose(1, 2)


def _bit(score: Tensor) -> Tensor:
    return (score > 0).long()


def _third(x: Tensor, y: Tensor) -> Tensor:
    """Which third of the circle a point lies in."""
    turn = torch.atan2(y, x) / (2 * math.pi)
    return ((turn % 1.0) * 3).long().clamp(max=2)


def _free_cells(said: Tensor, count: Tensor, scores: Tensor) -> Int[Tensor, "b 2"]:
    """The cells of both things: as said, else the free one of the largest score."""
    rows, cells = torch.arange(len(said)), said.clone()
    taken = torch.zeros_like(scores, dtype=torch.bool)
    for i in range(2):
        known = (said[:, i] != UNSAID) & (count > i)
        taken[rows[known], said[known, i]] = True
    for i in range(2):
        best = scores.masked_fill(taken, -math.inf).argmax(1)
        cells[:, i] = torch.where(said[:, i] == UNSAID, best, said[:, i])
        taken[rows, cells[:, i]] = True
    return cells
