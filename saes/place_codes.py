"""What an SAE says of the places of an image, while the image is drawn.

codes = codes_of_image(model, sae, site, "a sloth", 42, DrawConfig())
codes.strongest(10)             # the features of the image, by their mean over its places
codes.heat_map(1674)            # [steps, h, w]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from probe.diffusion import DiffusionModel, DrawConfig
from probe.interventions import Edit, applying
from probe.passes import read_passes
from probe.sites import Site
from saes.models import SparseAutoencoder
from saes.types import Codes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceCodes:
    """The codes of every step and place of one image, on the CPU."""

    values: Float[Tensor, "s t k"]
    """Activations, strongest first."""
    indices: Int[Tensor, "s t k"]
    """Their features."""
    grid: tuple[int, int]
    """Height and width of the feature map: place = y * width + x."""
    image: UInt8[Tensor, "h w 3"] | None
    """The image; None where it was not asked for."""

    def heat_map(self, feature: int) -> Float[Tensor, "s h w"]:
        """One feature's code at every step and place."""
        here = (self.values * (self.indices == feature)).sum(-1)
        return here.unflatten(1, self.grid)

    def table(self) -> pd.DataFrame:
        """Every code that is not 0: `step`, `y`, `x`, `feature`, `activation`."""
        step, place, _ = (self.values != 0).nonzero(as_tuple=True)
        fires = self.values != 0
        return pd.DataFrame(
            {
                "step": step.numpy(),
                "y": (place // self.grid[1]).numpy(),
                "x": (place % self.grid[1]).numpy(),
                "feature": self.indices[fires].numpy(),
                "activation": self.values[fires].numpy(),
            }
        )

    def strongest(self, n: int, step: int | None = None) -> pd.DataFrame:
        """The features of largest mean over the places: `feature`, `mean`, `max`, `share`.

        Args:
            n: how many at most; fewer where fewer fire.
            step: of this step; None for all together.
        """
        chosen = slice(None) if step is None else slice(step, step + 1)
        values, indices = self.values[chosen].flatten(0, 1), self.indices[chosen].flatten(0, 1)
        fires = values != 0
        frame = pd.DataFrame(
            {"feature": indices[fires].numpy(), "activation": values[fires].double().numpy()}
        )
        found = frame.groupby("feature")["activation"].agg(["sum", "max", "size"]).reset_index()
        shown = pd.DataFrame(
            {
                "feature": found["feature"],
                "mean": found["sum"] / len(values),
                "max": found["max"],
                "share": found["size"] / len(values),
            }
        )
        return (
            shown.sort_values("mean", ascending=False, kind="stable").head(n).reset_index(drop=True)
        )


def codes_of_image(
    model: DiffusionModel,
    sae: SparseAutoencoder,
    site: Site,
    prompt: str,
    seed: int,
    config: DrawConfig,
    *,
    edits: Sequence[Edit] = (),
    draw: bool = True,
) -> PlaceCodes:
    """Draw an image and read an SAE's codes at every step; under guidance, of the conditional row.

    Args:
        model: the image model.
        sae: the SAE.
        site: where it reads.
        prompt: what to draw.
        seed: of the noise.
        config: how to draw.
        edits: edits in force; codes are of the edited activations.
        draw: finish the image too.

    Raises as `probe.passes.read_passes` does.
    """
    with applying(model, edits):
        passes = read_passes(model, [prompt], [seed], config, [site], draw=draw)
    image = None if passes.drawn is None else passes.drawn.images[0]
    return place_codes(sae, passes.values[site][:, 0], model.grid(site, config), image)


def place_codes(
    sae: SparseAutoencoder,
    x: Float[Tensor, "s t d"],
    grid: tuple[int, int],
    image: UInt8[Tensor, "h w 3"] | None,
) -> PlaceCodes:
    """What an SAE says of the activations of one image, at every step and place of its grid."""
    with torch.no_grad():
        codes: Codes = sae.encode(x.to(sae.W_dec.device, torch.float32))
    return PlaceCodes(
        values=codes.values.cpu(), indices=codes.indices.cpu(), grid=grid, image=image
    )
