"""What changes in the image when a block's update comes from another drawing, or is taken away.

- `patch`: base caption, with the update of its partner's drawing (same noise, one factor
  different) in the place of its own. The factor *moved* where the image then shows the partner's
  value; another factor *changed* where it no longer shows what the unpatched image shows. Both are
  as the reader sees it, so that what the model never drew as said counts for nothing. A pair counts
  for its factor where its two unpatched images differ in it.
- `noise`: the same with the update of the same caption from other noise.
- `zero`, `mean`: the update is 0, or its mean over the base captions' images (place by place).

Every one for each block, `patch` and `noise` also for all of the study's blocks at once.

Table `causes`: weights, what, factor (of patches), block, unit (number of the base caption), moved,
counts (whether the pair counts for its factor), pixels (mean change of a pixel, from 0 to 1), and
for each of `OUTCOMES` a column that says whether it changed. Patches also keep, of the first
captions, the images: table `patched`: factor, unit, block (also `target` and `source`), data (PNG).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jaxtyping import Int, UInt8
from torch import Tensor

from analyses.block_roles_cells import described, kept
from analyses.block_roles_drawing import Asked, Change, Ticks, draw, draw_and_read, moved, pixels
from analyses.block_roles_images import Looked
from analyses.block_roles_measured import ALL_BLOCKS, OUTCOMES, Config, Settings, Subject, Tables
from analyses.block_roles_pairs import Pairs, make_pairs, outcomes
from probe.pictures import encode
from probe.toyturbo.evaluation import read
from probe.toyturbo.world import FACTORS

PART = "causes"
SHOWN = 3
"""Base captions whose patched images are kept."""
Updates = Mapping[str, Tensor]
"""A drawing's updates [b, t, d] by block."""


def causes(
    subject: Subject, looked: Looked, config: Config, settings: Settings, root: Path, tick: Ticks
) -> Tables:
    """The tables `causes` and `patched`, or those kept.

    Of a model whose factors are not known `causes` has ablations alone, and of them only how far
    they move pixels; they are made in the first of the images that were looked at.
    """
    known = looked.truth is not None
    asked = described(PART, subject) | {"pairs": settings.pairs, "seed": config.seed}
    # What is patched are updates, whatever the SAEs say of them.
    asked |= {"saes": subject.blocks, "prompts": None if known else config.prompts}
    few = looked.asked.part(range(min(settings.pairs, len(looked))))
    found = kept(
        root,
        asked,
        lambda: (
            measure_causes(subject, settings, config.seed, tick)
            if known
            else measure_ablations(subject, few, tick)
        ),
    )
    for table in found.values():
        table.insert(0, "weights", subject.weights)
    return found


def n_images(settings: Settings, n_blocks: int) -> int:
    """How many images the part draws of one model."""
    kinds = len(FACTORS) * (n_blocks + 2) + 1  # partners; patches by each block and all
    kinds += 1 + n_blocks + 1  # other noise
    return settings.pairs * (kinds + 2 * n_blocks)


def measure_causes(subject: Subject, settings: Settings, seed: int, tick: Ticks) -> Tables:
    """Draw everything and read it."""
    pairs = make_pairs(settings.pairs, seed)
    images, updates = draw_and_read(subject.model, pairs.asked, subject.sites, tick=tick)
    base = Base(subject=subject, pairs=pairs, images=images, tick=tick)
    frames, shown = [], []
    for factor in FACTORS:
        there, theirs = draw_and_read(
            subject.model, pairs.partner(factor), subject.sites, tick=tick
        )
        drawn = {"target": images, "source": there}
        for block in (*subject.blocks, ALL_BLOCKS):
            drawn[block] = base.with_updates(theirs, block)
            frames.append(base.rows("patch", factor, block, drawn[block], there))
        shown += _shown(factor, drawn)
    _, noisy = draw_and_read(subject.model, pairs.other_noise, subject.sites, tick=tick)
    means = {block: x.mean(0, keepdim=True) for block, x in updates.items()}
    zeros = {block: 0 * x for block, x in means.items()}
    for what, new in (("noise", noisy), ("zero", zeros), ("mean", means)):
        together = [ALL_BLOCKS] if what == "noise" else []
        for block in (*subject.blocks, *together):
            frames.append(base.rows(what, "", block, base.with_updates(new, block), None))
    return {"causes": pd.concat(frames, ignore_index=True), "patched": pd.DataFrame(shown)}


def measure_ablations(subject: Subject, asked: Asked, tick: Ticks) -> Tables:
    """How far pixels move where a block's update is 0 or its mean over the images."""
    images, updates = draw_and_read(subject.model, asked, subject.sites, tick=tick)
    frames = []
    for block, x in updates.items():
        mean = x.mean(0, keepdim=True)
        for what, new in (("zero", 0 * mean), ("mean", mean)):
            change = Change(block=block, op="set", value=new)
            after = draw(subject.model, asked, [change], tick=tick)
            pixel = moved(after, images).mean((1, 2)).numpy()
            row = {"what": what, "factor": "", "block": block, "unit": range(len(asked))}
            frames.append(pd.DataFrame(row | {"pixels": pixel}))
    return {"causes": pd.concat(frames, ignore_index=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base captions as they are drawn unchanged."""

    subject: Subject
    """The model."""
    pairs: Pairs
    """The captions."""
    images: UInt8[Tensor, "b h w 3"]
    """Their images."""
    tick: Ticks
    """Told of every image drawn."""

    def with_updates(self, updates: Updates, block: str) -> UInt8[Tensor, "b h w 3"]:
        """The base captions drawn with other updates of a block, or of all."""
        chosen = self.subject.blocks if block == ALL_BLOCKS else [block]
        changes = [Change(block=one, op="set", value=updates[one]) for one in chosen]
        return draw(self.subject.model, self.pairs.asked, changes, tick=self.tick)

    def shown(self, images: UInt8[Tensor, "b h w 3"], factor: str | None) -> Int[Tensor, "b 8"]:
        """What images show, read at the cells of the pairs of a factor."""
        assert self.subject.reader is not None, "outcomes need a reader"
        return outcomes(read(self.subject.reader, pixels(images)), self.pairs.cells(factor))

    def rows(
        self,
        what: str,
        factor: str,
        block: str,
        images: UInt8[Tensor, "b h w 3"],
        source: UInt8[Tensor, "b h w 3"] | None,
    ) -> pd.DataFrame:
        """What changed from the base captions' own images."""
        place = factor or None
        before, after = self.shown(self.images, place), self.shown(images, place)
        there = None if source is None else self.shown(source, place)
        pixel = moved(images, self.images).mean((1, 2))
        found = pd.DataFrame(
            {"what": what, "factor": factor, "block": block, "unit": range(len(images))}
        )
        return found.assign(**compared(before, after, there, factor), pixels=pixel.numpy())


def compared(
    before: Int[Tensor, "b 8"],
    after: Int[Tensor, "b 8"],
    source: Int[Tensor, "b 8"] | None,
    factor: str,
) -> dict[str, list[bool]]:
    """Columns `moved`, `counts` and one for each outcome."""
    columns = {name: (after != before)[:, i].tolist() for i, name in enumerate(OUTCOMES)}
    if source is None:
        return {"moved": [False] * len(after), "counts": [False] * len(after)} | columns
    i = OUTCOMES.index(factor)
    counts = before[:, i] != source[:, i]
    became = counts & (after[:, i] == source[:, i])
    return {"moved": became.tolist(), "counts": counts.tolist()} | columns


def _shown(factor: str, drawn: Mapping[str, UInt8[Tensor, "b h w 3"]]) -> list[dict]:
    return [
        {"factor": factor, "unit": unit, "block": block, "data": encode(images[unit])[1]}
        for block, images in drawn.items()
        for unit in range(min(SHOWN, len(images)))
    ]
