"""A feature's icon: the empty prompt, drawn with the block's update replaced by the feature alone.

The recipe is `saes.recipe_making.icon_recipe` (Surkov et al. 2024, 2410.22366); `app.live_steering`
runs it and keeps what it drew.
"""

from collections.abc import Mapping
from typing import Any

from app import data
from app.tiles import pixels_url
from probe.runs import read_json

GAMMAS = (0.5, 1.0, 1.5)
"""Strengths, as multiples of what the block usually says. Surkov et al. 2024."""
SEED = 42


def possible(record: data.SaeRecord) -> bool:
    """Whether the SAE has the fixed number of active features that an icon is measured in."""
    return record.run.complete and "k" in read_json(record.run.path / "cfg.json")


def icons(record: data.SaeRecord, feature: int) -> dict[float, tuple[str, int, int]]:
    """A feature's icon at each strength: its address, height and width.

    Raises `UserError` where the model is not there or the feature never fires.
    """
    tables = data.feature_index(record).images
    height, width = tables.image_size
    draw = {
        "steps": tables.n_steps, "guidance": tables.guidance, "height": height, "width": width,
    }  # fmt: skip
    return {gamma: icon(record, feature, draw, gamma) for gamma in GAMMAS}


def icon(
    record: data.SaeRecord, feature: int, draw: Mapping[str, Any], gamma: float = 1.0
) -> tuple[str, int, int]:
    """A feature's icon at one strength: its address, height and width.

    Args:
        record: the SAE.
        feature: the feature.
        draw: how to draw, as a recipe says it.
        gamma: times what the block usually says.

    Raises `UserError` where the model is not there, the SAE has no fixed k, or nobody knows how
    strongly the feature fires.
    """
    from app import live_steering
    from probe.diffusion import DrawConfig
    from saes.recipe_making import icon_recipe
    from saes.recipes import to_json

    recipe = icon_recipe(record.run, feature, draw=DrawConfig(**draw), seeds=(SEED,))
    drawn = live_steering.drawn(to_json(recipe), None, "", SEED, times=gamma).after[0]
    return pixels_url(drawn.numpy()), drawn.shape[0], drawn.shape[1]
