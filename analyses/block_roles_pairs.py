"""Captions that differ in exactly one factor, and what a drawing is read to show of them.

A base caption says everything of one or two things. Its partner says the same but for one factor,
of the first thing or of the scene; where that factor is the position, the first thing goes to a
free cell. Both are drawn from the same noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from analyses.block_roles_drawing import Asked
from analyses.block_roles_images import FIRST_SEED
from analyses.block_roles_measured import OUTCOMES
from probe.toyturbo.briefs import BRIEF_FACTORS, UNSAID, Brief, describe, draw_briefs
from probe.toyturbo.fitting import seeded
from probe.toyturbo.world import ABSENT, CELLS, FACTORS, SCENE_FACTORS, THING_FACTORS, Scenes

NOISE, OTHER_NOISE, STREAM = 1_000_000, 2_000_000, 1
"""Where this part's seeds begin after `FIRST_SEED`, and what tells its captions from others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Base captions, and a partner of each for every factor."""

    base: Brief
    """What the base captions say."""
    partners: Mapping[str, Brief]
    """By factor."""
    seeds: tuple[int, ...]
    """The noise that a base caption and its partners are drawn from."""

    @property
    def asked(self) -> Asked:
        """The base captions as images to draw."""
        return Asked(prompts=tuple(describe(self.base)), seeds=self.seeds)

    def partner(self, factor: str) -> Asked:
        """The partners that differ in a factor."""
        return Asked(prompts=tuple(describe(self.partners[factor])), seeds=self.seeds)

    @property
    def other_noise(self) -> Asked:
        """The base captions from other noise."""
        seeds = tuple(seed - NOISE + OTHER_NOISE for seed in self.seeds)
        return Asked(prompts=self.asked.prompts, seeds=seeds)

    def cells(self, factor: str | None) -> Int[Tensor, "b 3"]:
        """Of each pair the first thing's cell, its cell in the partner, the other thing's or -1."""
        partner = self.base if factor is None else self.partners[factor]
        other = torch.where(self.base.count > 1, self.base.things[:, 1, 0], ABSENT)
        return torch.stack([self.base.things[:, 0, 0], partner.things[:, 0, 0], other], dim=1)


def make_pairs(n: int, seed: int) -> Pairs:
    """Random base captions and their partners."""
    base = draw_briefs(n, seeded(FIRST_SEED, seed, STREAM))
    first = FIRST_SEED + NOISE + seed * 10_000
    partners = {
        factor: varied(base, factor, seeded(FIRST_SEED, seed, STREAM, number))
        for number, factor in enumerate(FACTORS)
    }
    return Pairs(base=base, partners=partners, seeds=tuple(range(first, first + n)))


def varied(base: Brief, factor: str, generator: Generator) -> Brief:
    """The same with another value of a factor: of the first thing where it is a thing's."""
    n, size = len(base), len(FACTORS[factor])
    step = 1 + torch.randint(size - 1, (n,), generator=generator)
    surround, things = base.surround.clone(), base.things.clone()
    if factor in SCENE_FACTORS:
        column = SCENE_FACTORS.index(factor)
        surround[:, column] = (surround[:, column] + step) % size
    elif factor == "position":
        things[:, 0, 0] = _free_cell(base, generator)
    else:
        column = BRIEF_FACTORS.index(factor)
        things[:, 0, column] = (things[:, 0, column] + step) % size
    return replace(base, things=things, surround=surround)


def _free_cell(base: Brief, generator: Generator) -> Int[Tensor, " b"]:
    """A cell that neither thing is in, all equally likely."""
    chance = torch.rand(len(base), CELLS, generator=generator)
    rows, taken = torch.arange(len(base)), base.things[:, :, 0]
    for i in range(2):
        there = taken[:, i] != UNSAID
        chance[rows[there], taken[there, i]] = -1.0
    return chance.argmax(1)


def outcomes(read: Scenes, cells: Int[Tensor, "b 3"]) -> Int[Tensor, "b 8"]:
    """What drawings of pairs show, as numbers to compare: a column for each of `OUTCOMES`.

    `position` is which cells have a thing, that of the other thing left out. The first thing's
    factors are read where the partner has it, if something is there and nothing at its own place,
    else at its own place; -1 where nothing is there. `other thing` is all of that thing's factors
    as one number; 0 where there is none in the caption, -1 where nothing is in its cell.

    Args:
        read: what the reader sees.
        cells: as `Pairs.cells` gives them.
    """
    rows, (own, partner, other) = torch.arange(len(read)), cells.unbind(1)
    there = read.present.clone()
    there[rows[other != ABSENT], other[other != ABSENT]] = False
    position = (there.long() * 2 ** torch.arange(CELLS)).sum(1)
    went = read.present[rows, partner] & ~read.present[rows, own]
    thing = read.things[rows, torch.where(went, partner, own)]
    found = {"position": position, "other thing": _other(read, other)}
    found |= {name: thing[:, i] for i, name in enumerate(THING_FACTORS)}
    found |= {name: read.factor(name) for name in SCENE_FACTORS}
    return torch.stack([found[name] for name in OUTCOMES], dim=1)


def _other(read: Scenes, cell: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    values = read.things[torch.arange(len(read)), cell.clamp(min=0)]
    number = torch.zeros(len(values), dtype=torch.long)
    for i, name in enumerate(THING_FACTORS):
        number = number * len(FACTORS[name]) + values[:, i]
    number = torch.where(values[:, 0] == ABSENT, ABSENT, number)
    return torch.where(cell == ABSENT, 0, number)
