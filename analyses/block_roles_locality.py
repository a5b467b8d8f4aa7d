"""Does a feature change the image where it fires, and there alone?

Living features of a block, drawn by lot, each on images where it fires at some places and not at
most of them. With S its activation at a place and f its direction, the update gets

- `times` c: (c - 1) S f, the feature multiplied by c (0 takes it away),
- `plus` m: m mean f wherever S > 0, mean being the feature's mean activation where it fires.

The heat map S > 0, enlarged to pixels, divides the image into inside and outside; the change of a
pixel is the mean of |after - before| over its channels, from 0 to 1. Locality is
inside / (inside + outside) of the mean changes: 1 is all inside, 1/2 is as much inside as out.

Controls, of the same length at the same places: the direction of another living feature (`random
feature`), and a direction drawn by lot (`random direction`). And the feature's own change, seen
through the heat map of another feature that fires on the same image (`elsewhere`).

Table `locality`: weights, block, feature, image, op, amount, kind, inside, outside, and of the
feature itself inside_elsewhere, outside_elsewhere (nan where no other feature has such a map).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from analyses.block_roles_cells import described, kept
from analyses.block_roles_drawing import Change, Ticks, draw, draw_each, moved
from analyses.block_roles_images import BlockCodes, Looked
from analyses.block_roles_measured import Config, Settings, Subject, Tables
from probe.toyturbo.fitting import seeded

PART = "locality"
KINDS = ("feature", "random feature", "random direction")
MOST_PLACES = 0.75
"""Share of the places that a map may cover: more leaves no outside to speak of."""
STREAM = 3


def locality(
    subject: Subject,
    block: str,
    looked: Looked,
    config: Config,
    settings: Settings,
    root: Path,
    tick: Ticks,
) -> Tables:
    """The table `locality` of a block, or that kept."""
    asked = described(PART, subject, block) | {
        "images": len(looked), "seed": config.seed, "features": settings.features,
        "per_feature": settings.per_feature, "factors": settings.factors,
        "doses": local_doses(settings), "prompts": None if looked.truth else config.prompts,
    }  # fmt: skip
    found = kept(
        root, asked, lambda: measure_locality(subject, block, looked, settings, config.seed, tick)
    )
    found[PART].insert(0, "block", block)
    found[PART].insert(0, "weights", subject.weights)
    return found


def local_doses(settings: Settings) -> tuple[float, ...]:
    """The doses that are added here: every other one."""
    return settings.doses[::2]


def n_images(settings: Settings) -> int:
    """How many images the part draws of one block, at most."""
    ops = len(settings.factors) + len(local_doses(settings))
    return settings.features * settings.per_feature * (1 + ops * len(KINDS))


def measure_locality(
    subject: Subject, block: str, looked: Looked, settings: Settings, seed: int, tick: Ticks
) -> Tables:
    """Draw and compare, feature by feature."""
    codes, generator = looked.codes[block], seeded(seed, STREAM, *map(ord, block))
    rows = []
    for chosen in choose(codes, settings.features, settings.per_feature, generator):
        rows.append(_of_feature(subject, block, looked, chosen, settings, generator, tick))
    return {PART: pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=COLUMNS)}


COLUMNS = (
    "feature", "image", "op", "amount", "kind", "inside", "outside", "inside_elsewhere",
    "outside_elsewhere",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A feature, and images to look at it in."""

    feature: int
    """Its number."""
    images: Int[Tensor, " m"]
    """Numbers of images."""


def choose(codes: BlockCodes, n: int, per_feature: int, generator: Generator) -> list[Chosen]:
    """Living features by lot, those of fewer suitable images left out."""
    living, found = codes.living(), []
    for i in torch.randperm(len(living), generator=generator).tolist():
        if len(found) == n:
            break
        images = suitable(codes, int(living[i]))
        if len(images) >= per_feature:
            order = torch.randperm(len(images), generator=generator)[:per_feature]
            found.append(Chosen(feature=int(living[i]), images=images[order]))
    return found


def suitable(codes: BlockCodes, feature: int) -> Int[Tensor, " m"]:
    """Images where a feature fires, but not nearly everywhere."""
    places = ((codes.indices == feature) & (codes.values != 0)).any(-1).sum(1)
    return ((places > 0) & (places <= MOST_PLACES * codes.values.shape[1])).nonzero().squeeze(1)


def _of_feature(
    subject: Subject,
    block: str,
    looked: Looked,
    chosen: Chosen,
    settings: Settings,
    generator: Generator,
    tick: Ticks,
) -> pd.DataFrame:
    codes, sae = looked.codes[block], subject.saes[block].sae
    asked = looked.asked.part(chosen.images.tolist())
    maps = codes.heat_map(chosen.feature, chosen.images)
    others = torch.stack(
        [_other_map(codes, chosen.feature, image, generator) for image in chosen.images.tolist()]
    )
    directions = controls(sae.W_dec.detach().cpu(), codes.living(), chosen.feature, generator)
    mean = float(codes.means()[chosen.feature])
    tried = [
        (op, amount, kind, Change(block=block, op="add", value=change[..., None] * direction))
        for op, amount, change in amounts(maps.flatten(1), mean, settings)
        for kind, direction in directions.items()
    ]
    before = draw(subject.model, asked, tick=tick)
    drawn = draw_each(subject.model, asked, [change for *_, change in tried], tick=tick)
    frames = []
    for (op, amount, kind, _), after in zip(tried, drawn, strict=True):
        pixel = moved(after, before)
        inside, outside = split_means(pixel, maps > 0)
        there, not_there = split_means(pixel, others > 0)
        if kind != "feature":
            there = not_there = torch.full_like(inside, torch.nan)
        frames.append(
            pd.DataFrame(
                {
                    "feature": chosen.feature, "image": chosen.images.numpy(), "op": op,
                    "amount": amount, "kind": kind, "inside": inside.numpy(),
                    "outside": outside.numpy(), "inside_elsewhere": there.numpy(),
                    "outside_elsewhere": not_there.numpy(),
                }
            )
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def _other_map(
    codes: BlockCodes, feature: int, image: int, generator: Generator
) -> Float[Tensor, "h w"]:
    """The heat map of another feature of an image, by lot; zeros where none has one that divides
    it."""
    values, indices = codes.values[image], codes.indices[image].long()
    places = torch.bincount(indices[values != 0], minlength=codes.d_sae)
    places[feature] = 0
    able = ((places > 0) & (places <= MOST_PLACES * len(values))).nonzero().squeeze(1)
    if not len(able):
        return torch.zeros(codes.grid)
    other = int(able[int(torch.randint(len(able), (), generator=generator))])
    return codes.heat_map(other, torch.tensor([image]))[0]


def controls(
    W_dec: Float[Tensor, "s d"], living: Int[Tensor, " m"], feature: int, generator: Generator
) -> dict[str, Float[Tensor, " d"]]:
    """A feature's direction, and the two others of its length, by kind."""
    own = W_dec[feature]
    others = living[living != feature]
    other = (
        W_dec[int(others[int(torch.randint(len(others), (), generator=generator))])]
        if len(others)
        else own
    )
    by_lot = torch.randn(len(own), generator=generator)
    return {
        kind: direction / direction.norm() * own.norm()
        for kind, direction in zip(KINDS, (own, other, by_lot), strict=True)
    }


def amounts(
    maps: Float[Tensor, "b t"], mean: float, settings: Settings
) -> Sequence[tuple[str, float, Float[Tensor, "b t"]]]:
    """What the feature's activation changes by at every place: op, its number, the change."""
    fires = (maps > 0).float()
    return [
        *(("times", factor, (factor - 1) * maps) for factor in settings.factors),
        *(("plus", dose, dose * mean * fires) for dose in local_doses(settings)),
    ]


def split_means(
    pixel: Float[Tensor, "b H W"], inside: Bool[Tensor, "b h w"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """The mean over the pixels inside a map and over those outside; nan where there are none."""
    mask = functional.interpolate(inside[:, None].float(), size=pixel.shape[1:])[:, 0]
    parts = []
    for weights in (mask, 1 - mask):
        count = weights.sum((1, 2))
        mean = (pixel * weights).sum((1, 2)) / count.clamp_min(1)
        parts.append(torch.where(count > 0, mean, torch.nan))
    return parts[0], parts[1]


def shares(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """inside / (inside + outside); nan where nothing changed."""
    total = inside + outside
    return np.divide(inside, total, out=np.full(len(total), np.nan), where=total > 0)
