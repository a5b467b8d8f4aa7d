"""Images with a feature's heat map over them, as HTML: one, or many side by side.

The map is a picture of its own, one pixel a place, that the browser enlarges to whole squares
(nearest neighbour), so nothing is shown that was not measured; it is clear where the feature does
not fire. `HEAT` is a CSS variable: how opaque all maps of a page are is changed without sending the
pictures again.
"""

import base64
import functools
import io
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

from app.strips import ExampleGroup, interval_title
from app.wording import DASH, escaped, number

SCALE, DARKEST = "Inferno", 0.15
"""The colours of a heat map, and where in them it begins: below, it is as dark as many an image."""
LARGEST = 256
"""Pixels of the longest side of a picture on a page."""
UNKNOWN = (70, 66, 62, 150)
"""Colour of places of which the store kept nothing."""
TILE_STYLE = """<style>
.lg-tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.5rem,1fr));gap:.9rem .8rem}
.lg-tiles.lg-large{grid-template-columns:repeat(auto-fill,minmax(8.6rem,1fr))}
.lg-tile{margin:0;min-width:0;font-size:.8rem;line-height:1.35}
.lg-picture{position:relative;display:block;width:100%;border-radius:4px;overflow:hidden;
 background:repeating-linear-gradient(45deg,rgba(128,120,112,.18) 0 6px,transparent 6px 12px)}
.lg-picture img{position:absolute;inset:0;width:100%;height:100%;display:block;margin:0}
.lg-picture .lg-small,.lg-picture .lg-heat{image-rendering:pixelated}
.lg-picture .lg-heat{opacity:var(--lg-heat,.65);backdrop-filter:grayscale(1);
 mask-size:100% 100%;-webkit-mask-size:100% 100%}
.lg-tile figcaption{padding:.2rem .05rem 0 .05rem}
.lg-prompt{display:-webkit-box;-webkit-line-clamp:2;-webkit-box-orient:vertical;overflow:hidden;
 overflow-wrap:anywhere}
.lg-tile a{color:inherit}
.lg-few{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:.8rem}
.lg-mean{max-width:16rem;margin:0 0 .4rem 0}
.lg-thumb{width:2.1rem;height:2.1rem;flex:none}
.lg-named{display:flex;gap:.5rem;align-items:center;min-width:0}
</style>"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tile:
    """An example of an image feature: an image, and where in it the feature fires."""

    picture: str
    """The image as an address that holds it (`data:`); empty where the store kept none."""
    size: tuple[int, int]
    """Height and width of the image in pixels."""
    heat: Float[np.ndarray, "h w"]
    """The feature's activation at each place; 0 where it does not fire."""
    known: Bool[np.ndarray, "h w"]
    """Places whose activation is known."""
    focus: tuple[int, int]
    """The place that the example is about: y and x."""
    image: int
    """Number of the image."""
    prompt: str
    """What was drawn."""
    seed: int
    """From which noise."""
    step: int
    """At which denoising step the map was read, counted from 0."""
    conditional: bool
    """Whether that pass read the prompt."""
    draw: Mapping[str, str]
    """How it was drawn, as the address of the page Explore says it, if not as by default."""

    @property
    def activation(self) -> float:
        """The activation at the focus."""
        return float(self.heat[self.focus])

    @property
    def address(self) -> dict[str, str]:
        """The query that draws the image again on the page Explore."""
        return {"prompt": self.prompt, "seed": str(self.seed), **self.draw}


# ------------------------------------------------------------------------------------- pictures


@functools.cache
def colours() -> UInt8[np.ndarray, "256 3"]:
    """The colours of a heat map, from little to much."""
    from plotly.colors import sample_colorscale

    points = np.linspace(DARKEST, 1, 256).tolist()
    return (np.array(sample_colorscale(SCALE, points, colortype="tuple")) * 255).astype(np.uint8)


def heat_pixels(
    heat: Float[np.ndarray, "h w"], top: float, known: Bool[np.ndarray, "h w"] | None = None
) -> UInt8[np.ndarray, "h w 4"]:
    """A heat map as red, green, blue and opacity, a pixel a place.

    Args:
        heat: clear where it is 0 or less.
        top: what the end of the colour scale means.
        known: places of which anything is known; None for all.
    """
    share = np.clip(heat / top, 0, 1) if top > 0 else np.zeros_like(heat)
    pixels = np.zeros((*heat.shape, 4), np.uint8)
    pixels[..., :3] = colours()[np.round(share * 255).astype(int)]
    pixels[..., 3] = 255 * (heat > 0)
    if known is not None:
        pixels[~known] = UNKNOWN
    return pixels


def pixels_url(pixels: UInt8[np.ndarray, "h w c"]) -> str:
    """Pixels as an address that holds them as PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return _url("png", file.getvalue())


def picture_url(data: bytes, kind: str, largest: int = LARGEST) -> str:
    """An encoded image (`png` or `jpeg`) as an address that holds it, shrunk where it is large."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        if max(image.size) <= largest:
            return _url(kind, data)
        image.draft("RGB", (largest, largest))
        small, file = image.convert("RGB"), io.BytesIO()
    small.thumbnail((largest, largest))
    small.save(file, "JPEG", quality=85)
    return _url("jpeg", file.getvalue())


def _url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# ----------------------------------------------------------------------------------------- HTML


def picture_html(tile: Tile, *, scale: float, heat: bool = True) -> str:
    """The image with its heat map over it; `scale` is the activation of the brightest colour."""
    pixels = heat_pixels(tile.heat, scale, tile.known) if heat else None
    return layered_html(tile.picture, pixels, size=tile.size, alt=tile.prompt)


def layered_html(
    picture: str,
    heat: UInt8[np.ndarray, "h w 4"] | None,
    *,
    size: tuple[int, int],
    alt: str,
    classes: str = "",
) -> str:
    """A picture with a heat map over it.

    Args:
        picture: its address; empty where there is none.
        heat: a pixel a place, as `heat_pixels` gives; None for no map.
        size: height and width of the image in pixels.
        alt: what the picture is of.
        classes: further classes of the whole.
    """
    height, width = size
    small = ' class="lg-small"' if max(size) < LARGEST else ""
    shown = over = ""
    if picture:
        shown = f'<img{small} src="{picture}" alt="{escaped(alt)}">'
    if heat is not None:
        url = pixels_url(heat)
        # Under the map the image loses its own colours, which would mix with the map's.
        mask = f"-webkit-mask-image:url({url});mask-image:url({url})"
        over = f'<img class="lg-heat" src="{url}" style="{mask}" alt="heat map">'
    classes = f"lg-picture {classes}".strip()
    return f'<span class="{classes}" style="aspect-ratio:{width}/{height}">{shown}{over}</span>'


def tile_html(tile: Tile, *, scale: float, explore: Mapping[str, str] | None) -> str:
    """An image with what is to be said of it.

    Args:
        tile: the image.
        scale: the activation of the brightest colour, usually the feature's largest.
        explore: what the link to the page Explore says besides (SAE and feature); None for no link.
    """
    when = f", step {tile.step + 1}" if "steps" in tile.draw else ""
    row = "" if tile.conditional else ", without the prompt"
    y, x = tile.focus
    tip = (
        f"{tile.prompt}\nimage {tile.image}, seed {tile.seed}{when}{row}\n"
        f"activation {tile.activation:.4f} at y {y}, x {x}"
    )
    seed = f"seed {tile.seed}"
    if explore is not None:
        query = urllib.parse.urlencode({**explore, **tile.address})
        seed = f'<a href="explore?{escaped(query)}" target="_self">{seed}</a>'
    missing = "" if tile.picture else "The picture was not kept. "
    return (
        f'<figure class="lg-tile" title="{escaped(tip)}">{picture_html(tile, scale=scale)}'
        f"<figcaption><b>{number(tile.activation)}</b> at {y},{x}{when}{row}, {seed}"
        f'<span class="lg-prompt lg-muted">{missing}{escaped(tile.prompt) or DASH}</span>'
        "</figcaption></figure>"
    )


def card_html(feature: int, label: str, tile: Tile, *, scale: float, address: str) -> str:
    """A feature as the image that it fires on most, with a link to its page."""
    name = escaped(label) or f"<i>{escaped(tile.prompt)}</i>"
    return (
        f'<figure class="lg-tile" title="{escaped(label or tile.prompt)}">'
        f'<a href="{escaped(address)}" target="_self">{picture_html(tile, scale=scale)}</a>'
        f'<figcaption><a href="{escaped(address)}" target="_self"><b>Feature {feature}</b></a>'
        f'<span class="lg-prompt lg-muted">{name}</span></figcaption></figure>'
    )


def thumbnail_html(tile: Tile | None, *, scale: float, text: str) -> str:
    """A small picture of a feature's strongest image, and a line of text beside it."""
    shown = "" if tile is None else picture_html(tile, scale=scale)
    return (
        f'<span class="lg-named"><span class="lg-thumb">{shown}</span>'
        f'<span class="lg-line">{escaped(text)}</span></span>'
    )


def tiles_html(
    tiles: Sequence[Tile],
    *,
    scale: float,
    explore: Mapping[str, str] | None,
    large: bool = False,
) -> str:
    """Images side by side."""
    shown = "".join(tile_html(tile, scale=scale, explore=explore) for tile in tiles)
    return f'<div class="lg-tiles{" lg-large" * large}">{shown}</div>'


def tile_groups_html(
    groups: Sequence[ExampleGroup], *, scale: float, explore: Mapping[str, str] | None
) -> str:
    """Groups of images one under the other, intervals with their bounds and share above them."""
    parts = []
    for group in groups:
        if group.kind == "interval":
            parts.append(interval_title(group.low, group.high, group.share))
        large = group.kind == "top"
        parts.append(tiles_html(group.examples, scale=scale, explore=explore, large=large))
    return "".join(parts)


def heat_style(opacity: float) -> str:
    """A style that sets how opaque all heat maps of a page are, from 0 to 1."""
    return f"<style>:root{{--lg-heat:{opacity:.2f}}}</style>"


def heat_scale_html(scale: float, *, whose: str = "this feature's largest") -> str:
    """The legend of the heat maps' colours."""
    stops = ",".join(f"rgb({r},{g},{b})" for r, g, b in colours()[::32].tolist())
    return (
        '<span class="lg-muted">clear: silent; activation 0'
        f'<span class="lg-scale" style="background:linear-gradient(90deg,{stops})"></span>'
        f"{number(scale)} ({whose})</span>"
    )
