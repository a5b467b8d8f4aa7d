"""What k and width trade, and how much of later steps an SAE of one step explains.

- `widths`: every SAE of a block, on the updates of the same images drawn in one step. *Explained*
  is 1 - sum |x - xhat|^2 / sum |x - mean|^2 over places; *owned*, where the factors are known, the
  share of their values that have a feature with F1 of at least `OWN` on held-out images
  (`analyses.block_roles_probes`).
- `steps`: the study's own SAEs on the updates of each of four steps, beside one.

Table `widths`: block, sae, k (the features that may be active at a place; where nothing limits
them, their mean number), active (their mean number), d_sae, explained_by_channel (mean over
channels of 1 - Var(x - xhat) / Var(x)), and lists of a number and its resamples (of images):
explained, owned. Table `steps`: block, steps, step, and such a list: explained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.block_roles_cells import checksums, described, kept
from analyses.block_roles_drawing import Asked, Ticks, chunks
from analyses.block_roles_images import BlockCodes, by_quarter, joined_codes, questions
from analyses.block_roles_measured import ONE_STEP, OWN, Config, Settings, Subject, Tables
from analyses.block_roles_probes import N_DRAWS, samples, value_features
from analyses.block_roles_pushes import FOUR
from probe.diffusion import DrawConfig
from probe.passes import common_grid, read_passes
from probe.sites import parse_site
from probe.toyturbo.world import FACTORS, Scenes
from saes.activations import most_active
from saes.metrics import FidelityMeter, resampling_weights
from saes.models import SparseAutoencoder
from saes.recipe_saes import LoadedSae
from saes.types import SaeOutput

WIDTHS, STEPS = "widths", "steps"
MOST_IN_STEPS = 256
"""Images that are drawn in four steps."""


@dataclass(slots=True, kw_only=True)
class Reader:
    """How well an SAE does on the updates of some images, and what it says of them."""

    block: str
    """The block."""
    sae: SparseAutoencoder
    """The SAE."""
    grid: tuple[int, int]
    """Of the block's feature map."""
    meter: FidelityMeter = field(init=False)
    """What it explains, image by image."""
    codes: list[dict[str, Tensor]] = field(default_factory=list)
    """What it says, batch by batch; empty where nobody asks."""
    keeps_codes: bool = False
    """Whether anybody does."""

    def __post_init__(self) -> None:
        self.meter = FidelityMeter(n_latents=self.sae.config.d_sae)

    @torch.no_grad()
    def see(self, x: Float[Tensor, "b t d"]) -> None:
        """Read a batch of updates."""
        output = self.sae(x.to(self.sae.W_dec.device))
        for i, rows in enumerate(x):
            one = type(output.codes)(values=output.codes.values[i], indices=output.codes.indices[i])
            said = SaeOutput(reconstruction=output.reconstruction[i], codes=one)
            self.meter.update(rows, said)
        if self.keeps_codes:
            self.codes.append(
                {
                    "values": output.codes.values.cpu(),
                    "indices": output.codes.indices.cpu().int(),
                    "updates": by_quarter(x, self.grid),
                }
            )

    def explained(self, seed: int) -> list[float]:
        """The share of the variance that is explained, and its resamples."""
        weights = resampling_weights(len(self.meter.sequences), N_DRAWS, seed)
        fvu = [self.meter.metrics()["fvu"], *self.meter.resampled_fvu(weights).tolist()]
        return [1 - value for value in fvu]

    def owned(self, truth: Scenes, seed: int) -> list[float]:
        """The share of true values that have a feature of their own, and its resamples."""
        codes = BlockCodes(**joined_codes(self.codes), grid=self.grid, d_sae=self.sae.config.d_sae)
        pooled, found = codes.by_quarter().numpy(), []
        for factor in FACTORS:
            of = samples(factor, truth)
            found += value_features(of.of(pooled), of, seed)["f1"].tolist()
        return (np.array(found) >= OWN).mean(0).tolist()


def widths(
    subject: Subject, all_saes: Mapping[str, LoadedSae], config: Config, settings: Settings,
    root: Path, tick: Ticks,
) -> Tables:  # fmt: skip
    """The table `widths` of SAEs by name, or that kept."""
    known = subject.reader is not None
    asked = described(WIDTHS, subject) | {
        "saes": checksums(all_saes), "images": settings.images, "seed": config.seed,
        "prompts": None if known else config.prompts,
    }  # fmt: skip
    return kept(
        root, asked, lambda: measure_widths(subject, all_saes, config, settings.images, tick)
    )


def measure_widths(
    subject: Subject, all_saes: Mapping[str, LoadedSae], config: Config, n: int, tick: Ticks
) -> Tables:
    """Draw the images once and have every SAE read them."""
    asked, truth = questions(config, n, known=subject.reader is not None)
    grid = common_grid(subject.model, subject.sites, ONE_STEP)
    readers = {
        name: Reader(block=one.site, sae=one.sae, grid=grid, keeps_codes=truth is not None)
        for name, one in all_saes.items()
    }
    see(subject, asked, ONE_STEP, {name: [reader] for name, reader in readers.items()}, tick)
    rows = []
    for name, reader in readers.items():
        measured = reader.meter.metrics()
        rows.append(
            {
                "block": reader.block, "sae": name,
                "k": most_active(reader.sae.config.activation) or round(measured["l0"]),
                "active": measured["l0"],
                "d_sae": reader.sae.config.d_sae,
                "explained_by_channel": measured["explained_variance"],
                "explained": reader.explained(config.seed),
                "owned": None if truth is None else reader.owned(truth, config.seed),
            }
        )  # fmt: skip
    return {WIDTHS: pd.DataFrame(rows)}


def steps(subject: Subject, config: Config, settings: Settings, root: Path, tick: Ticks) -> Tables:
    """The table `steps`, or that kept."""
    n, known = in_steps(settings), subject.reader is not None
    asked = described(STEPS, subject) | {
        "images": n, "seed": config.seed, "prompts": None if known else config.prompts,
    }  # fmt: skip
    return kept(root, asked, lambda: measure_steps(subject, config, n, tick))


def in_steps(settings: Settings) -> int:
    """How many images are drawn in four steps."""
    return min(settings.images, MOST_IN_STEPS)


def measure_steps(subject: Subject, config: Config, n: int, tick: Ticks) -> Tables:
    """Draw in one step and in four, and read every step."""
    asked, _ = questions(config, n, known=subject.reader is not None)
    grid = common_grid(subject.model, subject.sites, ONE_STEP)
    rows = []
    for draw in (ONE_STEP, FOUR):
        readers = {
            block: [Reader(block=block, sae=one.sae, grid=grid) for _ in range(draw.steps)]
            for block, one in subject.saes.items()
        }
        see(subject, asked, draw, readers, tick)
        rows += [
            {
                "block": block, "steps": draw.steps, "step": step,
                "explained": reader.explained(config.seed),
            }
            for block, of_steps in readers.items()
            for step, reader in enumerate(of_steps, 1)
        ]  # fmt: skip
    return {STEPS: pd.DataFrame(rows)}


def see(
    subject: Subject,
    asked: Asked,
    config: DrawConfig,
    readers: Mapping[str, list[Reader]],
    tick: Ticks,
) -> None:
    """Have readers, one for each step, read the updates of images as they are drawn."""
    sites = {one.block: parse_site(one.block) for of_steps in readers.values() for one in of_steps}
    for chunk in chunks(len(asked)):
        passes = read_passes(
            subject.model, asked.prompts[chunk], asked.seeds[chunk], config, list(sites.values())
        )
        for of_steps in readers.values():
            for step, reader in enumerate(of_steps):
                reader.see(passes.values[sites[reader.block]][step].float().cpu())
        tick(chunk.stop - chunk.start)
