"""Images and heat maps as pictures to keep: what `app.tiles` shows in layers, as one. With torch.

A heat map has the feature map's own resolution and is enlarged by whole places (nearest
neighbour), so that nothing is shown that was not measured. Places where nothing fires are clear.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from app import tiles
from probe.pictures import encode

SHOWN = 512
"""Pixels that an image's longest side is shown at, about."""


def enlarged(picture: UInt8[Tensor, "h w 3"], pixels: int = SHOWN) -> UInt8[Tensor, "H W 3"]:
    """A small picture with every pixel repeated, up to about so many; a larger one as it is."""
    times = max(1, pixels // max(picture.shape[:2]))
    return picture.repeat_interleave(times, 0).repeat_interleave(times, 1)


def shrunk(picture: UInt8[Tensor, "h w 3"], pixels: int) -> UInt8[Tensor, "H W 3"]:
    """A large picture at so many pixels, each the mean of an area; a small one as it is."""
    height, width, _ = picture.shape
    longest = max(height, width)
    if longest <= pixels:
        return picture
    size = (max(1, height * pixels // longest), max(1, width * pixels // longest))
    channels = picture.permute(2, 0, 1)[None].float()
    small = functional.interpolate(channels, size=size, mode="area")[0]
    return small.permute(1, 2, 0).round().to(torch.uint8)


def overlay(
    picture: UInt8[Tensor, "h w 3"],
    heat: Float[Tensor, "gh gw"],
    *,
    opacity: float,
    pixels: int = SHOWN,
) -> UInt8[Tensor, "H W 3"]:
    """A picture under a heat map, whose largest number has the brightest colour.

    Args:
        picture: red, green and blue.
        heat: how strongly something fires at each place; clear where that is 0 or less.
        opacity: of the map, from 0 to 1.
        pixels: about how large to make it.
    """
    ground = enlarged(picture, pixels)
    places = torch.from_numpy(tiles.heat_pixels(heat.numpy(), float(heat.max())))
    size = (ground.shape[0], ground.shape[1])
    over = functional.interpolate(
        places.permute(2, 0, 1)[None].float(), size=size, mode="nearest-exact"
    )[0].permute(1, 2, 0)
    weight = opacity * over[..., 3:] / 255
    return (ground * (1 - weight) + over[..., :3] * weight).round().to(torch.uint8)


def change(
    before: UInt8[Tensor, "h w 3"], after: UInt8[Tensor, "h w 3"]
) -> tuple[UInt8[Tensor, "h w 3"], float]:
    """How far each pixel moved, as a picture from dark to the largest; and that largest.

    The mean over channels of |after - before|, in levels of 0 to 255.
    """
    moved = (after.double() - before.double()).abs().mean(-1)
    top = float(moved.max())
    level = moved / top if top > 0 else moved
    return torch.from_numpy(tiles.colours())[(level * 255).round().long()], top


def data_url(picture: UInt8[Tensor, "h w 3"]) -> str:
    """A picture as an address that holds it; a large one with the small losses of JPEG."""
    kind, encoded = encode(picture)
    return tiles.picture_url(encoded, kind, largest=2 * SHOWN)
