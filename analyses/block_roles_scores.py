"""What a feature's top images have in common: specificity, colour, texture, composition.

The automatic scores of the paper's first version rest on an image-text model and are known to us
from summaries alone; these are ours, in its spirit, from what is known of toy-turbo's world. Living
features are drawn by lot; a feature's top images are those with its largest activations, one an
image, the place of the largest being its peak and the quarter around it its peak cell.

- specificity: the share of pairs of top images that agree in a factor, mean over the factors: the
  peak cell itself (`position`), its thing's shape, colour, size and texture (two empty cells
  agree), the image's background and light. And the mean cosine between the vectors that the
  attribute reader has of two peak cells.
- colour: the Manhattan distance |dr| + |dg| + |db| between the mean colours (0 to 1) of the active
  regions of two top images, mean over pairs. Small is specific to a colour.
- texture: the share of the peak cell's spectral energy at the textures' period: of the luminance's
  discrete Fourier transform, |F|^2 at period 8 pixels across, down or both, over all |F|^2 but the
  mean's; mean over top images. And its spread: the mean difference between two top images.
- composition: where the feature fires over whether a thing is there. With p the share of its
  activation on things' places and q the share of all places that are things':
  |p - q| / (1 - q) where p > q, else |p - q| / q; 1 is always or never on a thing, 0 regardless.

The control of each are as many images, with a cell and the active region of another feature's peak,
drawn by lot: what a feature without preference would score. Of another model than toy-turbo the
colour score alone is there, and what `analyses.block_roles_clip` adds.

Table `scores`: weights, block, feature, score, value, random.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from analyses.block_roles_cells import described, kept
from analyses.block_roles_drawing import pixels
from analyses.block_roles_images import BlockCodes, Looked, quarter_of
from analyses.block_roles_measured import Config, Settings, Subject, Tables
from probe.toyturbo.fitting import seeded
from probe.toyturbo.reader import AttributeReader
from probe.toyturbo.world import CELL, CELLS, SCENE_FACTORS, THING_FACTORS, Scenes, object_mask

PART = "scores"
PERIOD = 8
"""Pixels of the world's textures."""
LUMINANCE = (0.299, 0.587, 0.114)
STREAM = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """Images, and where in each a feature is strongest."""

    images: Int[Tensor, " m"]
    """Their numbers."""
    cells: Int[Tensor, " m"]
    """The quarter of the peak in each."""
    regions: Bool[Tensor, "m h w"]
    """Where it fires in each."""


def scores(
    subject: Subject, block: str, looked: Looked, config: Config, settings: Settings, root: Path
) -> Tables:
    """The table `scores` of a block, or that kept."""
    asked = described(PART, subject, block) | {
        "images": len(looked), "seed": config.seed, "scored": settings.scored,
        "top": settings.top, "prompts": None if looked.truth else config.prompts,
    }  # fmt: skip
    found = kept(root, asked, lambda: measure_scores(subject, block, looked, settings, config.seed))
    found[PART].insert(0, "block", block)
    found[PART].insert(0, "weights", subject.weights)
    return found


def measure_scores(
    subject: Subject, block: str, looked: Looked, settings: Settings, seed: int
) -> Tables:
    """Score features by lot, each beside a set of images by lot."""
    codes, generator = looked.codes[block], seeded(seed, STREAM, *map(ord, block))
    rows = []
    for feature in scored_features(codes, settings, generator):
        top = top_images(codes, feature, settings.top)
        by_lot = random_images(codes, settings.top, generator)
        own, other = (score_images(subject.reader, looked, one) for one in (top, by_lot))
        if looked.truth is not None:
            things = thing_places(looked.truth, codes.grid)
            own["composition"] = composition(codes, feature, things)
            # By lot: the same activations, on the places of other images.
            moved = torch.randperm(len(things), generator=generator)
            other["composition"] = composition(codes, feature, things[moved])
        rows += [
            {"feature": feature, "score": name, "value": own[name], "random": other[name]}
            for name in own
        ]
    return {PART: pd.DataFrame(rows, columns=["feature", "score", "value", "random"])}


def scored_features(codes: BlockCodes, settings: Settings, generator: Generator) -> list[int]:
    """Features by lot that fire in as many images as are looked at."""
    enough = ((codes.largest() > 0).sum(0) >= settings.top).nonzero().squeeze(1)
    order = torch.randperm(len(enough), generator=generator)[: settings.scored]
    return enough[order].tolist()


def top_images(codes: BlockCodes, feature: int, n: int) -> Top:
    """The images of the feature's largest activations."""
    strength = (codes.values * (codes.indices == feature)).sum(-1)
    images = strength.amax(1).topk(n).indices
    return _top(codes, images, strength[images])


def random_images(codes: BlockCodes, n: int, generator: Generator) -> Top:
    """Images by lot, each with the region of a feature by lot that fires in it."""
    images = torch.randperm(len(codes.values), generator=generator)[:n]
    found = []
    for image in images.tolist():
        active = codes.indices[image][codes.values[image] != 0].unique()
        active = active if len(active) else torch.zeros(1, dtype=torch.int32)
        feature = active[int(torch.randint(len(active), (), generator=generator))]
        found.append((codes.values[image] * (codes.indices[image] == feature)).sum(-1))
    return _top(codes, images, torch.stack(found))


def _top(codes: BlockCodes, images: Int[Tensor, " m"], strength: Float[Tensor, "m t"]) -> Top:
    return Top(
        images=images,
        cells=quarter_of(codes.grid)[strength.argmax(1)],
        regions=(strength > 0).unflatten(1, codes.grid),
    )


def score_images(reader: AttributeReader | None, looked: Looked, top: Top) -> dict[str, float]:
    """The scores of some images but composition."""
    images = pixels(looked.images(top.images))
    found = {"colour distance": colour_distance(images, top.regions)}
    if looked.truth is None:
        return found
    assert reader is not None, "toy-turbo has a reader"
    energies = texture_energy(cells_of(images, top.cells))
    with torch.no_grad():
        vectors = reader.body(images - 0.5).flatten(2).transpose(1, 2)
    seen = functional.normalize(vectors[torch.arange(len(images)), top.cells], dim=1)
    return found | {
        "agreement of factors": agreement(facts(looked.truth, top)),
        "likeness to the reader": pair_mean(seen @ seen.T),
        "texture energy": float(energies.mean()),
        "texture spread": pair_mean((energies[:, None] - energies).abs()),
    }


# ------------------------------------------------------------------------------------- formulas


def pair_mean(values: Float[Tensor, "m m"]) -> float:
    """The mean over pairs of different ones."""
    m = len(values)
    return float((values.sum() - values.diagonal().sum()) / (m * (m - 1)))


def facts(truth: Scenes, top: Top) -> Int[Tensor, "m 7"]:
    """The true values that images are compared by: of the peak cells and of the scenes."""
    thing = truth.things[top.images, top.cells]
    assert thing.shape[1] == len(THING_FACTORS) and truth.surround.shape[1] == len(SCENE_FACTORS)
    return torch.cat([top.cells[:, None], thing, truth.surround[top.images]], dim=1)


def agreement(values: Int[Tensor, "m f"]) -> float:
    """Share of pairs that agree, mean over columns."""
    same = (values[:, None] == values[None]).double().mean(-1)
    return pair_mean(same)


def colour_distance(images: Float[Tensor, "m 3 H W"], regions: Bool[Tensor, "m h w"]) -> float:
    """Mean Manhattan distance between the mean colours of two images' regions, 0 to 3.

    A region without a place counts as the whole image.
    """
    mask = functional.interpolate(regions[:, None].float(), size=images.shape[2:])
    mask = torch.where(mask.sum((1, 2, 3), keepdim=True) > 0, mask, 1.0)
    colours = (images * mask).sum((2, 3)) / mask.sum((2, 3))
    return pair_mean((colours[:, None] - colours[None]).abs().sum(-1))


def cells_of(
    images: Float[Tensor, "m 3 64 64"], cells: Int[Tensor, " m"]
) -> Float[Tensor, "m 3 32 32"]:
    """A cell of each image."""
    whole = images.unflatten(2, (2, CELL)).unflatten(4, (2, CELL)).permute(0, 2, 4, 1, 3, 5)
    return whole.flatten(1, 2)[torch.arange(len(images)), cells]


def texture_energy(patches: Float[Tensor, "m 3 n n"]) -> Float[Tensor, " m"]:
    """Share of the luminance's spectral energy at the textures' period, the mean left out.

    0 for a patch without any contrast.
    """
    grey = torch.einsum("mchw,c->mhw", patches, torch.tensor(LUMINANCE))
    energy = torch.fft.fft2(grey).abs().square()
    energy[:, 0, 0] = 0
    n = energy.shape[-1]
    here = torch.zeros(n, dtype=torch.bool)
    here[[n // PERIOD, n - n // PERIOD]] = True
    still = torch.arange(n) == 0
    at = (here[:, None] & (here | still)[None]) | (still[:, None] & here[None])
    total = energy.sum((1, 2))
    # Rounding leaves something of nothing: of a constant patch the share would be noise.
    flat = total < 1e-6 * n**2
    return torch.where(flat, 0.0, (energy * at).sum((1, 2)) / total.clamp_min(1e-12))


def thing_places(truth: Scenes, grid: tuple[int, int]) -> Bool[Tensor, "n t"]:
    """At which places of the feature map a thing covers at least half."""
    assert CELLS == 4, "two by two"
    cover = functional.adaptive_avg_pool2d(object_mask(truth)[:, None], grid)
    return (cover >= 0.5).flatten(1)


def composition(codes: BlockCodes, feature: int, things: Bool[Tensor, "n t"]) -> float:
    """How far the feature's activation keeps to things, or off them: 0 to 1."""
    strength = (codes.values * (codes.indices == feature)).sum(-1).double()
    on = float((strength * things).sum() / strength.sum().clamp_min(1e-300))
    base = float(things.double().mean())
    if base in (0.0, 1.0):
        return 0.0
    return (on - base) / (1 - base) if on > base else (base - on) / base
