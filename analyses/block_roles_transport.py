"""Transport of features between two captions, beside whole updates and neurons.

Pairs of captions that differ in one factor (`analyses.block_roles_pairs`); the base caption is
drawn again with what the partner's drawing has and its own has not, by the recipes of
`saes.transport`, in one step, all of the study's blocks together:

- `features`: the k features of largest score added, the k of smallest removed, m times;
- `whole updates`: the partner's updates added m times and the own taken off m times;
- `neurons`: GEGLU outputs, chosen as features are;
- `random features`: as `features`, with living features by lot: the control.

Places: the first thing's cell; for `position` its cells in both captions; for background and light
all. *Moved* and *others* are those of `analyses.block_roles_causes`; *outside* is the mean change
of a pixel beyond the places (nan where they are all).

Table `transports`: factor, unit, method, k (0 for whole updates), m, moved, counts, others,
outside.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Generator, Tensor

from analyses.block_roles_cells import described, kept
from analyses.block_roles_drawing import Ticks, draw, moved, pixels
from analyses.block_roles_images import Looked
from analyses.block_roles_locality import split_means
from analyses.block_roles_measured import ONE_STEP, OUTCOMES, Config, Settings, Subject, Tables
from analyses.block_roles_pairs import Pairs, make_pairs, outcomes
from probe.toyturbo.evaluation import read
from probe.toyturbo.fitting import seeded
from probe.toyturbo.world import SCENE_FACTORS
from saes.drawing import Drawing, prepare
from saes.recipe_parts import Features, Recipe, RecipeEdit
from saes.transport import Pair, neuron_recipe, steering_recipe, transport_recipe

PART = "transports"
PAIRS_SEED, STREAM = 1, 6
"""Transport has pairs of its own: these, added to the seed."""


def transports(
    subject: Subject,
    factor: str,
    looked: Looked,
    config: Config,
    settings: Settings,
    root: Path,
    tick: Ticks,
) -> Tables:
    """The table `transports` of a factor, or that kept."""
    asked = described(PART, subject) | {
        "factor": factor, "seed": config.seed, "transports": settings.transports,
        "counts": settings.counts, "neurons": settings.neuron_counts,
        "strengths": settings.strengths, "steering": settings.steering,
    }  # fmt: skip
    transporting = Transporting(
        subject=subject, looked=looked, settings=settings, factor=factor, seed=config.seed,
        tick=tick,
    )  # fmt: skip
    return kept(root, asked, transporting.measure)


def n_images(settings: Settings) -> int:
    """How many images the part draws for one factor."""
    of_features = 2 * len(settings.counts) + len(settings.neuron_counts)
    return settings.transports * (
        2 + of_features * len(settings.strengths) + len(settings.steering)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A recipe, and the multiples of it that are tried."""

    method: str
    """Features, neurons, ..."""
    k: int
    """How many of them; 0 where everything is meant."""
    recipe: Recipe
    """What is done at strength 1."""
    strengths: Sequence[float]
    """The multiples (m)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transporting:
    """Transport between the pairs of one factor."""

    subject: Subject
    """The model and its SAEs."""
    looked: Looked
    """Images that tell which features live."""
    settings: Settings
    """How much."""
    factor: str
    """The factor that the captions differ in."""
    seed: int
    """Decides the pairs."""
    tick: Ticks
    """Told of every image drawn."""

    def measure(self) -> Tables:
        """The table."""
        pairs = make_pairs(self.settings.transports, self.seed + PAIRS_SEED)
        target = draw(self.subject.model, pairs.asked, tick=self.tick)
        source = draw(self.subject.model, pairs.partner(self.factor), tick=self.tick)
        rows = []
        for unit in range(len(target)):
            for way in self.ways(pairs, unit):
                drawing = self._drawing(way.recipe)
                images = drawing.dose_row(
                    way.recipe.prompts[0], way.recipe.seeds[0], list(way.strengths)
                )
                self.tick(len(images))
                seen = self._seen(pairs, unit, target, source, images)
                rows.append(seen.assign(unit=unit, method=way.method, k=way.k, m=way.strengths))
        return {PART: pd.concat(rows, ignore_index=True)}

    def ways(self, pairs: Pairs, unit: int) -> Iterator[Way]:
        """Everything that is tried on a pair."""
        model, saes, settings = self.subject.model, self.subject.saes, self.settings
        mask = mask_of(self.factor, pairs.cells(self.factor)[unit])
        pair = Pair(
            source=pairs.partner(self.factor).prompts[unit], target=pairs.asked.prompts[unit],
            seed=pairs.seeds[unit], draw=ONE_STEP, source_mask=mask, target_mask=mask,
        )  # fmt: skip
        generator = seeded(self.seed, STREAM, unit, OUTCOMES.index(self.factor))
        n_features = sum(one.sae.config.d_sae for one in saes.values())
        for k in (k for k in settings.counts if k <= n_features // 2):
            recipe = transport_recipe(model, saes, pair, k=k)
            yield Way(method="features", k=k, recipe=recipe, strengths=settings.strengths)
            by_lot = self._by_lot(recipe, generator)
            yield Way(method="random features", k=k, recipe=by_lot, strengths=settings.strengths)
        whole = steering_recipe(model, self.subject.sites, pair)
        yield Way(method="whole updates", k=0, recipe=whole, strengths=settings.steering)
        for k in settings.neuron_counts:
            recipe = neuron_recipe(model, self.subject.sites, pair, k=k)
            yield Way(method="neurons", k=k, recipe=recipe, strengths=settings.strengths)

    def _by_lot(self, recipe: Recipe, generator: Generator) -> Recipe:
        """The recipe with other features, living ones, as many of each block."""
        edits = tuple(self._other_features(edit, generator) for edit in recipe.edits)
        return replace(recipe, name=f"{recipe.name}, by lot", edits=edits)

    def _other_features(self, edit: RecipeEdit, generator: Generator) -> RecipeEdit:
        assert isinstance(edit.target, Features), "transport of features names features"
        living = self.looked.codes[edit.site].living()
        order = torch.randperm(len(living), generator=generator)[: len(edit.target.features)]
        numbers = tuple(living[order].tolist()) or edit.target.features
        return replace(edit, target=replace(edit.target, features=numbers))

    def _drawing(self, recipe: Recipe) -> Drawing:
        saes = {key: self.subject.saes[key] for key in recipe.saes}
        return prepare(recipe, root=Path(), model=self.subject.model, saes=saes)

    def _seen(
        self,
        pairs: Pairs,
        unit: int,
        target: UInt8[Tensor, "b h w 3"],
        source: UInt8[Tensor, "b h w 3"],
        images: UInt8[Tensor, "m h w 3"],
    ) -> pd.DataFrame:
        """What became of one pair's target, an image a row."""
        cells = pairs.cells(self.factor)[unit]
        before, there = (self._shown(one[unit : unit + 1], cells) for one in (target, source))
        after = self._shown(images, cells)
        column = OUTCOMES.index(self.factor)
        counts = bool(before[0, column] != there[0, column])
        others = torch.arange(len(OUTCOMES)) != column
        places = inside(self.factor, cells)[None].expand(len(images), -1, -1)
        outside = split_means(moved(images, target[unit : unit + 1].expand_as(images)), places)[1]
        return pd.DataFrame(
            {
                "factor": self.factor, "counts": counts,
                "moved": (counts & (after[:, column] == there[0, column])).numpy(),
                "others": (after != before)[:, others].any(1).numpy(),
                "outside": outside.numpy(),
            }
        )  # fmt: skip

    def _shown(self, images: UInt8[Tensor, "b h w 3"], cells: Int[Tensor, " 3"]) -> Tensor:
        assert self.subject.reader is not None, "outcomes need a reader"
        seen = read(self.subject.reader, pixels(images))
        return outcomes(seen, cells[None].expand(len(images), -1))


def inside(factor: str, cells: Int[Tensor, " 3"]) -> Bool[Tensor, "2 2"]:
    """The cells of the image that are changed."""
    if factor in SCENE_FACTORS:
        return torch.ones(2, 2, dtype=torch.bool)
    found = torch.zeros(4, dtype=torch.bool)
    found[cells[:2]] = True
    return found.unflatten(0, (2, 2))


def mask_of(factor: str, cells: Int[Tensor, " 3"]) -> Float[Tensor, "2 2"] | None:
    """The same as a recipe's canvas; None for everywhere."""
    return None if factor in SCENE_FACTORS else inside(factor, cells).float()
