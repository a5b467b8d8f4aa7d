"""Do the best features of true values bring these values about? And in a drawing of four steps?

For a value v of a factor and a block's best feature of it (`analyses.block_roles_probes`): images
that do not show v, drawn again with `m mean f` added to the block's update, f the feature's
direction and mean its mean activation where it fires, at the places of the first thing's cell (for
`position`: of an empty cell; for background and light: everywhere). It *became* v where the reader
then says v; *others* says whether anything else that is read changed.

Controls of the same length at the same places: another living feature's direction, one by lot.

In four steps the same is done with the SAEs of one step, at all steps or at one alone.

Table `pushes`: weights, block, factor, value, feature, unit, dose, kind, when (`one step`, `all of
4`, `step s of 4`), counts (the unchanged image does not show v), became, others, inside, outside
(mean change of a pixel). Table `pushed`, of the first unit: block, factor, value, dose (0:
unchanged), data (PNG).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from analyses.block_roles_cells import described, kept
from analyses.block_roles_drawing import Asked, Change, Ticks, draw, draw_each, moved, pixels
from analyses.block_roles_images import FIRST_SEED, Looked, quarter_of
from analyses.block_roles_locality import KINDS, controls, split_means
from analyses.block_roles_measured import (
    ONE_STEP,
    OUTCOMES,
    Config,
    Frame,
    Settings,
    Subject,
    Tables,
)
from analyses.block_roles_pairs import outcomes, varied
from probe.diffusion import DrawConfig
from probe.pictures import encode
from probe.toyturbo.briefs import BRIEF_FACTORS, Brief, describe, draw_briefs
from probe.toyturbo.evaluation import read
from probe.toyturbo.fitting import seeded
from probe.toyturbo.world import FACTORS, SCENE_FACTORS

PART, STEPS_PART = "pushes", "pushes-in-steps"
NOISE, STREAM, POOL = 3_000_000, 4, 256
FOUR = DrawConfig(steps=4)
WHENS: Mapping[str, tuple[DrawConfig, tuple[int, int | None]]] = {
    "one step": (ONE_STEP, (0, None)),
    "all of 4": (FOUR, (0, None)),
    **{f"step {s + 1} of 4": (FOUR, (s, s + 1)) for s in range(FOUR.steps)},
}
"""How an image is drawn, and at which steps it is changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """A value to bring about, and the feature that is to do it."""

    factor: str
    """The factor."""
    value: str
    """The value."""
    feature: int
    """The feature."""


def pushes_of(values: Frame, block: str) -> list[Push]:
    """A block's best features of all values of single factors, that of the largest F1 first."""
    own = values[(values["block"] == block) & (values["control"] == "")]
    own = own[own["factor"].isin(list(FACTORS)) & (own["weights"] == "trained")]
    order = own["f1"].map(lambda draws: -draws[0]).sort_values(kind="stable").index
    chosen = own.loc[order, ["factor", "value", "feature"]].itertuples(index=False)
    return [Push(factor=str(f), value=str(v), feature=int(n)) for f, v, n in chosen]


def pushes(
    subject: Subject,
    block: str,
    looked: Looked,
    wanted: Sequence[Push],
    config: Config,
    settings: Settings,
    root: Path,
    tick: Ticks,
) -> Tables:
    """What a block's features do in one step: tables `pushes` and `pushed`, or those kept."""
    return _kept(
        PART, subject, block, looked, wanted, config, settings, root, tick,
        doses=settings.doses, kinds=KINDS, whens=["one step"],
    )  # fmt: skip


def pushes_in_steps(
    subject: Subject,
    block: str,
    looked: Looked,
    wanted: Sequence[Push],
    config: Config,
    settings: Settings,
    root: Path,
    tick: Ticks,
) -> Tables:
    """What they do in four steps, beside one: table `pushes_in_steps`, or that kept."""
    found = _kept(
        STEPS_PART, subject, block, looked, wanted, config, settings, root, tick,
        doses=[steps_dose(settings)], kinds=(KINDS[0], KINDS[2]), whens=list(WHENS),
    )  # fmt: skip
    return {"pushes_in_steps": found["pushes"]}


def steps_dose(settings: Settings) -> float:
    """The dose that is added in four steps."""
    return settings.doses[len(settings.doses) // 2]


def _kept(
    part: str,
    subject: Subject,
    block: str,
    looked: Looked,
    wanted: Sequence[Push],
    config: Config,
    settings: Settings,
    root: Path,
    tick: Ticks,
    *,
    doses: Sequence[float],
    kinds: Sequence[str],
    whens: Sequence[str],
) -> Tables:
    asked = described(part, subject, block) | {
        "images": len(looked), "seed": config.seed, "per_feature": settings.per_feature,
        "doses": doses, "wanted": [[p.factor, p.value, p.feature] for p in wanted],
    }  # fmt: skip
    pusher = Pusher(
        subject=subject, block=block, looked=looked, n=settings.per_feature, seed=config.seed,
        doses=doses, kinds=kinds, whens=whens, tick=tick,
    )  # fmt: skip
    found = kept(root, asked, lambda: pusher.measure(wanted))
    for table in found.values():
        table.insert(0, "block", block)
        table.insert(0, "weights", subject.weights)
    return found


def n_images(settings: Settings) -> int:
    """How many images the part draws of one block, in one step."""
    n_values = sum(len(values) for values in FACTORS.values()) - len(FACTORS["position"]) + 1
    return n_values * settings.per_feature * (1 + len(settings.doses) * len(KINDS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Images without a value, and where it is to be brought about."""

    asked: Asked
    """The images."""
    cells: Int[Tensor, "b 3"]
    """As `outcomes` takes them; for `position` the second is the empty cell."""
    where: Bool[Tensor, "b t"]
    """The places that are changed."""
    value: int
    """The number of the value."""


def scene_without(push: Push, n: int, seed: int, grid: tuple[int, int]) -> Scene:
    """`n` images whose captions do not say a value."""
    brief = draw_briefs(POOL, seeded(FIRST_SEED, seed, STREAM))
    names = ("a thing",) if push.factor == "position" else FACTORS[push.factor]
    value = names.index(push.value)
    free = varied(brief, "position", seeded(FIRST_SEED, seed, STREAM, 1)).things[:, 0, 0]
    chosen = torch.arange(n)
    if push.factor != "position":
        chosen = (_said(brief, push.factor) != value).nonzero().squeeze(1)[:n]
    own = brief.things[chosen, 0, 0]
    other = torch.where(brief.count[chosen] > 1, brief.things[chosen, 1, 0], -1)
    target = free[chosen] if push.factor == "position" else own
    where = quarter_of(grid)[None] == target[:, None]
    prompts = describe(brief)
    return Scene(
        asked=Asked(
            prompts=tuple(prompts[i] for i in chosen.tolist()),
            seeds=tuple(FIRST_SEED + NOISE + seed * 10_000 + i for i in chosen.tolist()),
        ),
        cells=torch.stack([own, target, other], dim=1),
        where=torch.ones_like(where) if push.factor in SCENE_FACTORS else where,
        value=value,
    )


def _said(brief: Brief, factor: str) -> Int[Tensor, " b"]:
    """What captions say of the first thing, or of the scene."""
    if factor in SCENE_FACTORS:
        return brief.surround[:, SCENE_FACTORS.index(factor)]
    return brief.things[:, 0, BRIEF_FACTORS.index(factor)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pusher:
    """Pushes features of one block."""

    subject: Subject
    """The model and its SAEs."""
    block: str
    """The block."""
    looked: Looked
    """Images that tell how strongly features fire."""
    n: int
    """Images for each value."""
    seed: int
    """Decides images and controls."""
    doses: Sequence[float]
    """Multiples of the feature's mean."""
    kinds: Sequence[str]
    """The feature and its controls."""
    whens: Sequence[str]
    """Of `WHENS`."""
    tick: Ticks
    """Told of every image drawn."""

    def measure(self, wanted: Sequence[Push]) -> Tables:
        """The tables, without the columns that name the block."""
        frames, shown = [pd.DataFrame({"factor": []})], []
        means = self.looked.codes[self.block].means()
        for push in wanted:
            for when in self.whens:
                found, images = self._push(push, when, float(means[push.feature]))
                frames.append(found)
                shown += images
        table = pd.concat(frames[1:] or frames, ignore_index=True)
        return {"pushes": table, "pushed": pd.DataFrame(shown)}

    def _push(self, push: Push, when: str, mean: float) -> tuple[pd.DataFrame, list[dict]]:
        codes, sae = self.looked.codes[self.block], self.subject.saes[self.block].sae
        scene = scene_without(push, self.n, self.seed, codes.grid)
        config, steps = WHENS[when]
        generator = seeded(self.seed, STREAM, push.feature, *map(ord, push.value))
        directions = controls(sae.W_dec.detach().cpu(), codes.living(), push.feature, generator)
        tried = [(dose, kind) for dose in self.doses for kind in self.kinds]
        changes = [
            Change(
                block=self.block, op="add", steps=steps,
                value=dose * mean * scene.where[..., None] * directions[kind],
            )
            for dose, kind in tried
        ]  # fmt: skip
        model = self.subject.model
        before = draw(model, scene.asked, config=config, tick=self.tick)
        drawn = draw_each(model, scene.asked, changes, config, tick=self.tick)
        frames, shown = [], [_image(push, 0.0, before)]
        for (dose, kind), after in zip(tried, drawn, strict=True):
            row = {"value": push.value, "feature": push.feature, "dose": dose, "kind": kind}
            frames.append(self._compared(push, scene, before, after).assign(**row, when=when))
            if kind == KINDS[0]:
                shown.append(_image(push, dose, after))
        return pd.concat(frames, ignore_index=True), shown

    def _compared(
        self,
        push: Push,
        scene: Scene,
        before: UInt8[Tensor, "b h w 3"],
        after: UInt8[Tensor, "b h w 3"],
    ) -> pd.DataFrame:
        assert self.subject.reader is not None, "pushes need a reader"
        own = scene.cells[:, [0, 0, 2]]
        seen = [read(self.subject.reader, pixels(images)) for images in (before, after)]
        shown = [outcomes(one, own) for one in seen]
        column = list(OUTCOMES).index(push.factor)
        if push.factor == "position":
            rows, there = torch.arange(len(own)), scene.cells[:, 1]
            had, has = (one.present[rows, there] for one in seen)
        else:
            had, has = (one[:, column] == scene.value for one in shown)
        others = torch.arange(len(OUTCOMES)) != column
        inside, outside = split_means(
            moved(after, before), scene.where.unflatten(1, self.looked.codes[self.block].grid)
        )
        return pd.DataFrame(
            {
                "factor": push.factor, "unit": range(len(own)), "counts": ~had.numpy(),
                "became": (has & ~had).numpy(),
                "others": (shown[0] != shown[1])[:, others].any(1).numpy(),
                "inside": inside.numpy(), "outside": outside.numpy(),
            }
        )  # fmt: skip


def _image(push: Push, dose: float, images: UInt8[Tensor, "b h w 3"]) -> dict:
    return {
        "factor": push.factor, "value": push.value, "dose": dose, "data": encode(images[0])[1],
    }  # fmt: skip
