"""The world that toy-turbo draws: scenes of one or two things, all of whose factors are known.

A scene is 64 x 64 pixels, cut into 2 x 2 cells of 32. A thing fills the middle of a cell and has a
shape, a colour, a size and a texture; the scene has a background and a side that the light comes
from. Factors are numbers that index `FACTORS`; everything here works on whole batches of scenes.

Textures alternate between the colour and a darker one with a period of 8 pixels, in step with the
cells. Light multiplies the whole image by a ramp from 1 on the lit side to `SHADE` on the other.
"""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SIDE, CELL, CELLS = 64, 32, 4
"""Pixels of an image's side and of a cell's, and the number of cells."""

FACTORS: dict[str, tuple[str, ...]] = {
    "position": ("top left", "top right", "bottom left", "bottom right"),
    "shape": ("disc", "square", "triangle", "cross"),
    "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white"),
    "size": ("small", "large"),
    "texture": ("plain", "striped", "checkered"),
    "background": ("grey", "brown", "navy", "teal"),
    "light": ("left", "right", "above", "below"),
}
"""Every factor's values, by their numbers."""

THING_FACTORS = ("shape", "colour", "size", "texture")
SCENE_FACTORS = ("background", "light")
ABSENT = -1

COLOURS = (
    (222, 40, 40),
    (240, 140, 30),
    (240, 226, 60),
    (50, 178, 66),
    (64, 212, 218),
    (48, 84, 226),
    (156, 60, 204),
    (240, 240, 240),
)
BACKGROUNDS = ((104, 104, 108), (108, 74, 46), (32, 42, 92), (28, 92, 84))
RADII = (9.5, 14.5)
DARK, SHADE = 0.4, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenes:
    """A batch of scenes."""

    things: Int[Tensor, "b 4 4"]
    """For each cell, its thing's `THING_FACTORS`; `ABSENT` where the cell is empty."""
    surround: Int[Tensor, "b 2"]
    """`SCENE_FACTORS`."""

    def __len__(self) -> int:
        return len(self.things)

    def factor(self, name: str) -> Int[Tensor, "b 4"] | Int[Tensor, " b"]:
        """A factor's values: by cell for a thing's, `ABSENT` in empty cells; else by scene."""
        if name in SCENE_FACTORS:
            return self.surround[:, SCENE_FACTORS.index(name)]
        return self.things[:, :, THING_FACTORS.index(name)]

    @property
    def present(self) -> Tensor:
        """Whether each cell has a thing in it, [b, 4]."""
        return self.things[:, :, 0] != ABSENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """How much of a scene is drawn; less than all only while toy-turbo is being trained."""

    shapes: bool = True
    """Each thing's own shape; else every thing is a disc."""
    textures: bool = True
    """Each thing's own texture; else every thing is plain."""


FULL = Detail()


def render(scenes: Scenes, detail: Detail = FULL) -> Float[Tensor, "b 3 64 64"]:
    """Draw scenes; values from 0 to 1. Edges are anti-aliased over one pixel."""
    outlines, patterns, ramps = _templates()
    background, light = scenes.surround.unbind(1)
    shape, colour, size, texture = scenes.things.clamp(min=0).unbind(2)
    shape = shape if detail.shapes else torch.zeros_like(shape)
    texture = texture if detail.textures else torch.zeros_like(texture)
    cover = outlines[shape, size] * scenes.present[:, :, None, None]
    paint = _rgb(COLOURS)[colour][..., None, None] * patterns[texture][:, :, None]
    ground = _rgb(BACKGROUNDS)[background][:, None, :, None, None]
    cells = ground + cover[:, :, None] * (paint - ground)
    image = cells.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIDE, SIDE)
    return image * ramps[light][:, None]


def object_mask(scenes: Scenes, detail: Detail = FULL) -> Float[Tensor, "b 64 64"]:
    """How much of each pixel a thing covers, from 0 to 1."""
    outlines, _, _ = _templates()
    shape, _, size, _ = scenes.things.clamp(min=0).unbind(2)
    shape = shape if detail.shapes else torch.zeros_like(shape)
    cover = outlines[shape, size] * scenes.present[:, :, None, None]
    return cover.unflatten(1, (2, 2)).permute(0, 1, 3, 2, 4).reshape(-1, SIDE, SIDE)


def _rgb(colours: tuple[tuple[int, int, int], ...]) -> Float[Tensor, "n 3"]:
    return torch.tensor(colours) / 255


@functools.cache
def _templates() -> tuple[Tensor, Tensor, Tensor]:
    """Outlines [shape, size, 32, 32], textures [texture, 32, 32] and light [light, 64, 64]."""
    ticks = torch.arange(CELL) - CELL / 2 + 0.5
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    outlines = torch.stack(
        [torch.stack([_inside(shape, x, y, r) for r in RADII]) for shape in FACTORS["shape"]]
    )
    rows = (torch.arange(CELL) // 4 % 2)[:, None].expand(CELL, CELL)
    odd = torch.stack([torch.zeros_like(rows), rows, rows ^ rows.T])
    ramp = torch.linspace(1, SHADE, SIDE).expand(SIDE, SIDE)
    ramps = torch.stack([ramp, ramp.flip(1), ramp.T, ramp.T.flip(0)])
    return outlines, torch.where(odd == 1, DARK, 1.0), ramps


def _inside(shape: str, x: Tensor, y: Tensor, r: float) -> Float[Tensor, "32 32"]:
    """How much of each pixel is inside, from the signed distance to the outline."""
    if shape == "disc":
        depth = r - (x.square() + y.square()).sqrt()
    elif shape == "square":
        half = 0.88 * r
        depth = half - torch.maximum(x.abs(), y.abs())
    elif shape == "triangle":
        # Base below, apex above; the two slanted sides fall by 1 for every 1/2 to the side.
        depth = torch.minimum(0.9 * r - y, (y + r - 2 * x.abs()) / 5**0.5)
    else:
        arm = 0.38 * r
        upright = torch.minimum(arm - x.abs(), r - y.abs())
        depth = torch.maximum(upright, torch.minimum(arm - y.abs(), r - x.abs()))
    return (depth + 0.5).clamp(0, 1)
