"""What a caption says of a scene, its words, and how noise decides what it leaves open.

A `Brief` is a scene with gaps. `describe` writes it as a caption:

    a large red striped disc at the top left and a small thing on a navy background lit from above

`settle` fills the gaps from the noise that the image will be drawn from, so that a caption and a
noise together mean exactly one scene. The noise [4, 32, 32] is seen as 8 x 8 patches of 4 x 4, the
resolution of the U-Net's deepest level; the mean of a patch in a channel, times 4, is a standard
normal number. A cell of the scene has 4 x 4 patches. Of its upper left patch but one (row 1, column
1), its lower right but one (2, 2), and its patch at the middle of the image:

    colour      three signs: channels 0, 1 and 2 of the upper left patch
    size        a sign: its channel 3
    shape       two signs: channels 0 and 1 of the lower right patch
    texture     a third of the circle: its channels 2 and 3 as an angle
    position    the free cell whose patch at the middle is largest in channel 3
    background  two signs: channels 0 and 1 of the top left cell's patch at the middle
    light       two signs: those of the bottom right cell's
    how many    (an empty caption) the sign of channel 0 of the top right cell's

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


def draw_briefs(n: int, generator: Generator, *, gaps: float = 0.0, empty: float = 0.0) -> Brief:
    """Random briefs.

    Args:
        n: how many.
        generator: decides.
        gaps: the chance that a brief has gaps; it then leaves out each factor with chance 1/4.
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
    left_out = torch.rand(n, 2 * len(BRIEF_FACTORS) + 2, generator=generator) < 1 / 4
    left_out = left_out & with_gaps[:, None] | nothing[:, None]
    things = things.masked_fill(left_out[:, 2:].unflatten(1, (2, -1)), UNSAID)
    things[:, 1] = things[:, 1].masked_fill((count == 1)[:, None], UNSAID)
    return Brief(
        count=count.masked_fill(nothing, UNSAID),
        things=things,
        surround=torch.stack(surround, dim=1).masked_fill(left_out[:, :2], UNSAID),
    )


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
    upper, lower, middle = _patches(noise)
    count = torch.where(brief.count == UNSAID, 1 + _bit(middle[:, 1, 0]), brief.count)
    cells = _free_cells(brief.things[:, :, 0], count, middle[..., 3])
    rows = torch.arange(len(brief))
    things = torch.full((len(brief), CELLS, len(THING_FACTORS)), ABSENT)
    choices = torch.stack(
        [
            2 * _bit(lower[..., 0]) + _bit(lower[..., 1]),
            4 * _bit(upper[..., 0]) + 2 * _bit(upper[..., 1]) + _bit(upper[..., 2]),
            _bit(upper[..., 3]),
            _third(lower[..., 2], lower[..., 3]),
        ],
        dim=2,
    )
    for i in range(2):
        said = brief.things[:, i, 1:]
        values = torch.where(said == UNSAID, choices[rows, cells[:, i]], said)
        there = count > i
        things[rows[there], cells[there, i]] = values[there]
    chosen = 2 * _bit(middle[:, ::3, 0]) + _bit(middle[:, ::3, 1])
    surround = torch.where(brief.surround == UNSAID, chosen, brief.surround)
    return Scenes(things=things, surround=surround)


def _patches(noise: Tensor) -> list[Float[Tensor, "b 4 4"]]:
    """Channels of each cell's upper left, lower right and middle patch, standard normal."""
    patches = functional.avg_pool2d(noise.float(), PATCH) * PATCH
    # Cells by row and column, and for each the place of its three patches.
    places = [((1, 5), (1, 5)), ((2, 6), (2, 6)), ((3, 4), (3, 4))]
    return [
        torch.stack([patches[:, :, y, x] for y in rows for x in columns], dim=1)
        for rows, columns in places
    ]


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
