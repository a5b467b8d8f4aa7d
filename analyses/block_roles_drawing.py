"""Drawing images while blocks' updates are changed: the one way in which this study intervenes.

A `Change` says, image by image, what becomes of a block's update: another update in its place, or
something added to it. In one step nothing before a block depends on its update, so that what an SAE
says of the unchanged drawing is what it would say while the block is being changed, and every
change can be worked out beforehand.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from analyses.block_roles_measured import ONE_STEP
from probe.diffusion import DiffusionModel, DrawConfig
from probe.interventions import editing
from probe.passes import read_passes
from probe.sites import Site, parse_site

BATCH = 50
"""Images drawn together."""
Ticks = Callable[[int], None]
"""Told how many images were drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Images to draw."""

    prompts: tuple[str, ...]
    """What."""
    seeds: tuple[int, ...]
    """The seeds of their noise."""

    def __len__(self) -> int:
        return len(self.prompts)

    def repeated(self, times: int) -> "Asked":
        """All of them, several times over."""
        return Asked(prompts=self.prompts * times, seeds=self.seeds * times)

    def part(self, chosen: Sequence[int]) -> "Asked":
        """Some of them, in that order."""
        return Asked(
            prompts=tuple(self.prompts[i] for i in chosen),
            seeds=tuple(self.seeds[i] for i in chosen),
        )


def joined(parts: Sequence[Asked]) -> Asked:
    """Images of several questions, one after the other."""
    return Asked(
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        seeds=tuple(seed for part in parts for seed in part.seeds),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What becomes of a block's update."""

    block: str
    """The block."""
    op: Literal["set", "add"]
    """Put in its place, or added to it."""
    value: Float[Tensor, "b t d"]
    """What, for each image, or for all alike (b = 1)."""
    steps: tuple[int, int | None] = (0, None)
    """First denoising step, and one past the last (None: no end)."""

    def of(self, chunk: slice) -> "Change":
        """The change of some of the images."""
        value = self.value if len(self.value) == 1 else self.value[chunk]
        return Change(block=self.block, op=self.op, value=value, steps=self.steps)

    def made(self, x: Float[Tensor, "b t d"], *, step: int) -> Float[Tensor, "b t d"]:
        """The update as it becomes at a step."""
        first, end = self.steps
        if step < first or (end is not None and step >= end):
            return x
        value = self.value.to(x)
        return value.expand_as(x) if self.op == "set" else x + value


def draw(
    model: DiffusionModel,
    asked: Asked,
    changes: Sequence[Change] = (),
    config: DrawConfig = ONE_STEP,
    *,
    tick: Ticks = lambda _: None,
) -> UInt8[Tensor, "b h w 3"]:
    """Draw images with all the changes in force. Raises as `DiffusionModel.generate` does."""
    drawn = []
    for chunk in chunks(len(asked)):
        with changing(model, [change.of(chunk) for change in changes]):
            some = model.generate(asked.prompts[chunk], asked.seeds[chunk], config)
        drawn.append(some.images)
        tick(len(some.images))
    return torch.cat(drawn)


@contextlib.contextmanager
def changing(model: DiffusionModel, changes: Sequence[Change]) -> Iterator[None]:
    """Make the changes in every pass run inside the block."""

    def make(change: Change, x: Tensor) -> Tensor:
        return change.made(x, step=model.step)

    with contextlib.ExitStack() as stack:
        for change in changes:
            made = functools.partial(make, change)
            stack.enter_context(editing(model, parse_site(change.block), made))
        yield


def draw_each(
    model: DiffusionModel,
    asked: Asked,
    changes: Sequence[Change],
    config: DrawConfig = ONE_STEP,
    *,
    tick: Ticks = lambda _: None,
) -> list[UInt8[Tensor, "b h w 3"]]:
    """The images once with each of the changes, which are of one block and kind, in few batches."""
    if not changes:
        return []
    first = changes[0]
    alike = {(change.block, change.op, change.steps) for change in changes}
    assert len(alike) == 1, "changes of different kinds are drawn one after another"
    value = torch.cat([change.value.expand(len(asked), -1, -1) for change in changes])
    together = Change(block=first.block, op=first.op, value=value, steps=first.steps)
    drawn = draw(model, asked.repeated(len(changes)), [together], config, tick=tick)
    return list(drawn.split(len(asked)))


def draw_and_read(
    model: DiffusionModel,
    asked: Asked,
    sites: Sequence[Site],
    *,
    tick: Ticks = lambda _: None,
) -> tuple[UInt8[Tensor, "b h w 3"], dict[str, Float[Tensor, "b t d"]]]:
    """Images drawn in one step, and the updates at some sites by their names; float32."""
    images, updates = [], {str(site): [] for site in sites}
    for chunk in chunks(len(asked)):
        passes = read_passes(
            model, asked.prompts[chunk], asked.seeds[chunk], ONE_STEP, sites, draw=True
        )
        assert passes.drawn is not None, "the images were asked for"
        images.append(passes.drawn.images)
        for site in sites:
            updates[str(site)].append(passes.values[site][0].float().cpu())
        tick(len(images[-1]))
    return torch.cat(images), {name: torch.cat(parts) for name, parts in updates.items()}


def chunks(n: int) -> Iterator[slice]:
    """Slices of at most `BATCH` of n."""
    return (slice(first, min(first + BATCH, n)) for first in range(0, n, BATCH))


def pixels(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """Images as numbers from 0 to 1."""
    return images.permute(0, 3, 1, 2).float() / 255


def moved(
    after: UInt8[Tensor, "b h w 3"], before: UInt8[Tensor, "b h w 3"]
) -> Float[Tensor, "b h w"]:
    """How far each pixel moved: the mean of |after - before| over its channels, from 0 to 1."""
    return (after.float() - before.float()).abs().mean(-1) / 255
