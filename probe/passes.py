"""Reading every step of a drawing, not the last alone.

seen = read_passes(model, ["a sloth"], [0], DrawConfig(steps=4), sites)
seen.values[site]           # [steps, images, places, d]
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from probe.adapters import ForwardStopped
from probe.capture import reading
from probe.diffusion import DiffusionModel, DrawConfig, Generated, Rows
from probe.errors import UserError
from probe.sites import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """What a drawing's passes gave."""

    values: dict[Site, Float[Tensor, "s b t d"]]
    """Each site's tensor by step and row, in the model's number format, on its device. Of both
    rows of guidance the unconditional ones come first."""
    drawn: Generated | None
    """The images; None where none were asked for."""


def read_passes(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DrawConfig,
    sites: Sequence[Site],
    *,
    rows: Rows = "conditional",
    draw: bool = False,
) -> Passes:
    """Draw images and keep what passes by at some sites of the U-Net, at every step.

    Args:
        model: the adapter.
        prompts: what to draw.
        seeds: one a prompt.
        config: how.
        sites: what to read.
        rows: which rows of guided passes.
        draw: finish the images; else the drawing stops after the last site of the last step.

    Raises `UserError` where a site is not in the model or is not passed once a step, where
    unconditional rows are asked for without guidance, or as `DiffusionModel.generate` does.
    """
    if rows != "conditional" and not config.guided:
        raise UserError(
            f"{rows} rows were asked for and guidance is {config.guidance:g}, so there is no "
            "unconditional row; ask for guidance above 1 or for the conditional row."
        )
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}

    def record(site: Site, tensor: Tensor) -> None:
        seen[site].append(tensor.detach()[model.rows(rows)])
        if not draw and all(len(values) == config.steps for values in seen.values()):
            raise ForwardStopped

    with contextlib.ExitStack() as stack:
        for site in seen:
            stack.enter_context(reading(model, site, record))
        drawn = model.run(prompts, seeds, config)
    for site, values in seen.items():
        if len(values) != config.steps:
            raise UserError(
                f"site {site} was passed {len(values)} times in {config.steps} steps, where once a "
                "step was wanted; choose a module of the U-Net."
            )
    return Passes(values={site: torch.stack(v) for site, v in seen.items()}, drawn=drawn)


def common_grid(
    model: DiffusionModel, sites: Sequence[Site], config: DrawConfig
) -> tuple[int, int]:
    """Height and width of the feature map that the sites share.

    Raises `UserError` where they do not share one, or a site is not in the model or has none.
    """
    grids = {site: model.grid(site, config) for site in sites}
    first = next(iter(grids.values()))
    if any(grid != first for grid in grids.values()):
        named = ", ".join(f"{site} {h} x {w}" for site, (h, w) in grids.items())
        raise UserError(
            f"the sites see different places: {named}; capture those of one grid at a time."
        )
    return first
