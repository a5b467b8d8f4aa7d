"""A feature's icon: the empty prompt, drawn with the block's update replaced by the feature alone.

The recipe is `saes.recipe_making.icon_recipe` (Surkov et al. 2024, 2410.22366); `app.live_steering`
runs it and keeps what it drew.
"""

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
    from app import live_steering
    from probe.diffusion import DrawConfig
    from saes.recipe_making import icon_recipe
    from saes.recipes import to_json

    tables = data.feature_index(record).images
    height, width = tables.image_size
    draw = DrawConfig(steps=tables.n_steps, guidance=tables.guidance, height=height, width=width)
    document = to_json(icon_recipe(record.run, feature, draw=draw, seeds=(SEED,)))
    found = {}
    for gamma in GAMMAS:
        drawn = live_steering.drawn(document, None, "", SEED, times=gamma).after[0]
        found[gamma] = (pixels_url(drawn.numpy()), drawn.shape[0], drawn.shape[1])
    return found
