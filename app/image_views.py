"""Images and heat maps as PNG files; knows nothing of Streamlit. Imports torch: used inside pages.

A heat map has the feature map's own resolution and is enlarged by whole places (nearest
neighbour), so that nothing is shown that was not measured. Places where nothing fires are clear.
"""

import base64
import functools

import numpy as np
import torch
from jaxtyping import Float, UInt8
from plotly.colors import sample_colorscale
from torch import Tensor
from torch.nn import functional

from app.drawings import png

SCALE = "Inferno"
DARKEST = 0.15
"""Where the colour scale begins: below, it is as dark as many an image."""
SHOWN = 512
"""Pixels that an image's longest side is shown at, about."""


def enlarged(picture: UInt8[Tensor, "h w 3"], pixels: int = SHOWN) -> UInt8[Tensor, "H W 3"]:
    """A small picture with every pixel repeated, up to about so many; a larger one as it is."""
    times = max(1, pixels // max(picture.shape[:2]))
    return picture.repeat_interleave(times, 0).repeat_interleave(times, 1)


def overlay(
    picture: UInt8[Tensor, "h w 3"],
    heat: Float[Tensor, "gh gw"],
    *,
    opacity: float = 0.6,
    top: float | None = None,
    pixels: int = SHOWN,
) -> UInt8[Tensor, "H W 3"]:
    """A picture under a heat map.

    Args:
        picture: red, green and blue.
        heat: how strongly something fires at each place; clear where that is 0 or less.
        opacity: of the map, from 0 to 1.
        top: the number that the end of the colour scale means; the map's largest where None.
        pixels: about how large to make it.
    """
    ground = enlarged(picture, pixels)
    size = (ground.shape[0], ground.shape[1])
    values = functional.interpolate(heat[None, None].float(), size=size, mode="nearest-exact")[0, 0]
    top = float(heat.max()) if top is None else top
    share = (values / top).clamp(0, 1) if top > 0 else torch.zeros_like(values)
    colours = _colours()[(share * 255).round().long()]
    weight = opacity * (values > 0)[..., None].float()
    # Under the map the image loses its own colours, which would mix with the map's.
    grey = ground.float().mean(-1, keepdim=True)
    ground = ground * (1 - weight) + grey * weight
    return (ground * (1 - weight) + colours * weight).round().to(torch.uint8)


def change(
    before: UInt8[Tensor, "h w 3"], after: UInt8[Tensor, "h w 3"]
) -> tuple[UInt8[Tensor, "h w 3"], float]:
    """How far each pixel moved, as a picture from black to the largest; and that largest.

    The mean over channels of |after - before|, in levels of 0 to 255.
    """
    moved = (after.double() - before.double()).abs().mean(-1)
    top = float(moved.max())
    level = moved / top if top > 0 else moved
    ramp = _colours(0.0)[(level * 255).round().long()]
    return ramp.to(torch.uint8), top


@functools.cache
def _colours(start: float = DARKEST) -> Float[Tensor, "256 3"]:
    """The colour scale, 256 steps of it."""
    points = np.linspace(start, 1, 256).tolist()
    return torch.tensor(sample_colorscale(SCALE, points, colortype="tuple")) * 255


def gradient(start: float = DARKEST) -> str:
    """The colour scale as CSS, from left to right."""
    stops = ",".join(
        f"rgb({red:.0f},{green:.0f},{blue:.0f})" for red, green, blue in _colours(start)[::32]
    )
    return f"linear-gradient(90deg,{stops})"


def data_url(picture: UInt8[Tensor, "h w 3"]) -> str:
    """A picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
