"""Running a recipe of images: the same prompt and seed drawn without and with its edits.

    recipe = read_recipe(Path("artifacts/recipes/red.json"))
    drawing = prepare(recipe, root=Path("artifacts"))
    drawn = drawing.compare(["a blue circle"], [42])
    drawn.before, drawn.after                   # uint8 [b, h, w, 3]
    drawing.codes("a blue circle", 42, "main").heat_map(7)

`saes.recipe_targets` says what a change of a feature is, `saes.steering` does the same for texts.
Every image is drawn by itself unless more are asked for at once, so that it does not depend on what
else is drawn: a page, a notebook and the command line give the same bits.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from probe.diffusion import DiffusionModel, DrawConfig, Generated
from probe.errors import Failure, UserError
from probe.interventions import Edit, Places, Rows, applying
from probe.models import load_image_model
from probe.passes import read_passes
from probe.sites import Site, parse_site
from saes.place_codes import PlaceCodes, codes_of_image
from saes.recipe_checks import WITH_SOURCE, checked
from saes.recipe_parts import Recipe, RecipeEdit
from saes.recipe_saes import LoadedSae, check_model, common_dtype, needed_saes
from saes.recipe_targets import Prepared, prepared_edits

Sources = Mapping[tuple[str, Site], Float[Tensor, "s b t d"]]
"""Activations of other prompts by prompt and site; of guided ones unconditional rows first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Images as the model draws them and as the recipe changes them."""

    prompts: tuple[str, ...]
    """Each image's prompt."""
    seeds: tuple[int, ...]
    """Each image's seed."""
    before: UInt8[Tensor, "b h w 3"]
    """The model's own."""
    after: UInt8[Tensor, "b h w 3"]
    """With the recipe's edits."""
    mask: Float[Tensor, "h w"]
    """Where the recipe edits: the largest weight of its edits above each pixel."""

    def moved(self) -> pd.DataFrame:
        """How far each image moved, in levels of 0 to 255: `prompt, seed, whole, inside, outside`.

        The mean of |after - before| over channels and pixels: all of them, those inside the mask
        and those outside (weighted by it); NaN where there are none.
        """
        change = (self.after.double() - self.before.double()).abs().mean(-1)
        rows = {"whole": torch.ones_like(change[0])}
        rows |= {"inside": self.mask.double(), "outside": 1 - self.mask.double()}
        means = {
            name: ((change * weights).sum((1, 2)) / weights.sum()).tolist()
            for name, weights in rows.items()
        }
        return pd.DataFrame({"prompt": self.prompts, "seed": self.seeds} | means)


def prepare(
    recipe: Recipe,
    *,
    root: Path,
    model: DiffusionModel | None = None,
    saes: Mapping[str, LoadedSae] | None = None,
    device: str = "auto",
) -> "Drawing":
    """Load what a recipe of images needs and check that it fits.

    Args:
        recipe: what to do.
        root: the folder below which its SAEs are looked for.
        model: the model, where it is in memory already; loaded otherwise.
        saes: the SAEs by their keys, likewise.
        device: where to load a model to.

    Raises:
        UserError: the recipe is of texts or for another model, an SAE is not there or of another
            width, block or model, there is no such feature, neuron or site, or a mask has another
            shape than the site's feature map.
    """
    recipe = checked(recipe)
    if recipe.draw is None:
        raise UserError(
            f'the recipe {recipe.name!r} is of texts and one of images was wanted: one with "draw".'
        )
    loaded = needed_saes(recipe, root, saes)
    if model is None:
        model = load_image_model(
            recipe.model.spec,
            random_weights=recipe.model.random_weights,
            dtype=common_dtype(loaded),
            device=device,
        )
    check_model(recipe, model, loaded)
    loaded = {key: one.on(model.device) for key, one in loaded.items()}
    return Drawing(
        recipe=recipe,
        model=model,
        config=recipe.draw,
        saes=loaded,
        prepared=prepared_edits(recipe, model, loaded, None),
        masks=tuple(
            mask_of(edit, model, recipe.draw, f"edit {i} of the recipe {recipe.name!r}")
            for i, edit in enumerate(recipe.edits, 1)
        ),
    )


# ----------------------------------------------------------------------------------------- masks


def mask_of(
    edit: RecipeEdit, model: DiffusionModel, config: DrawConfig, where: str
) -> Float[Tensor, "h w"] | None:
    """An edit's weights at its site's feature map; None for all places.

    Raises `UserError` where they do not fit it, or all are 0.
    """
    positions = edit.positions
    if positions.mask is None and positions.canvas is None:
        return None
    grid = model.grid(parse_site(edit.site), config)
    if positions.canvas is not None:
        mask = on_grid(torch.tensor(positions.canvas), grid, where)
    else:
        mask = torch.tensor(positions.mask, dtype=torch.float32)
        if mask.shape != grid:
            raise UserError(
                f"{where}: the mask is {mask.shape[0]} by {mask.shape[1]} and the feature map of "
                f"{edit.site} is {grid[0]} by {grid[1]}; give it that size, or as a canvas, which "
                "is averaged to it."
            )
    if not mask.any():
        raise UserError(f"{where}: the mask is 0 everywhere; choose some place.")
    return mask


def on_grid(
    canvas: Float[Tensor, "H W"], grid: tuple[int, int], where: str
) -> Float[Tensor, "h w"]:
    """A painted canvas as weights of a feature map: the mean over the area of each place.

    Raises `UserError` naming `where` for a canvas of another aspect.
    """
    (height, width), (h, w) = canvas.shape, grid
    if height * w != width * h:
        raise UserError(
            f"{where}: the canvas is {height} by {width} and the feature map {h} by {w}, which is "
            "another aspect; paint on the image that the recipe draws."
        )
    return functional.interpolate(canvas[None, None].float(), size=grid, mode="area")[0, 0]


# --------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A recipe of images ready to run. Made by `prepare`."""

    recipe: Recipe
    """What it does."""
    model: DiffusionModel
    """The model."""
    config: DrawConfig
    """How it draws."""
    saes: Mapping[str, LoadedSae]
    """Its SAEs by key."""
    prepared: tuple[Prepared, ...]
    """Its edits."""
    masks: tuple[Float[Tensor, "_h _w"] | None, ...]
    """Their weights at their sites' feature maps; None for all places."""

    def compare(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        times: float = 1.0,
        at_once: int = 1,
    ) -> Drawn:
        """Draw every prompt from every seed, without and with the edits.

        Args:
            prompts: what to draw.
            seeds: of the noise.
            times: strengths are multiplied by it.
            at_once: images in a batch; with more than one they may differ in the last bit from
                those drawn alone.

        Raises as `draw` does.
        """
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        every, noise = tuple(prompt for prompt, _ in pairs), tuple(seed for _, seed in pairs)
        return Drawn(
            prompts=every,
            seeds=noise,
            before=self.draw(every, noise, times=None, at_once=at_once),
            after=self.draw(every, noise, times=times, at_once=at_once),
            mask=self.pixel_mask(),
        )

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        times: float | None = 1.0,
        at_once: int = 1,
    ) -> UInt8[Tensor, "b h w 3"]:
        """Draw one image a prompt and seed, with the edits; without where `times` is None.

        Raises `UserError` where there is nothing to draw or the schedule has fewer steps, `Failure`
        where the model gives numbers that are not finite.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise UserError(
                f"one seed for each prompt was wanted, and at least one prompt; got "
                f"{len(prompts)} prompts and {len(seeds)} seeds."
            )
        drawn = []
        for first in range(0, len(prompts), at_once):
            some, noise = prompts[first : first + at_once], seeds[first : first + at_once]
            edits = [] if times is None else self.edits(noise, times=times)
            drawn.append(_images(self.model, some, noise, self.config, edits))
        return torch.cat(drawn)

    def dose_row(self, prompt: str, seed: int, times: Sequence[float]) -> UInt8[Tensor, "n h w 3"]:
        """One image at several multiples of the recipe's strengths. Raises as `draw` does."""
        sources = self.sources([seed])
        drawn = [
            _images(
                self.model, [prompt], [seed], self.config,
                self.edits([seed], times=factor, sources=sources),
            )
            for factor in times
        ]  # fmt: skip
        return torch.cat(drawn)

    def codes(self, prompt: str, seed: int, sae: str, *, edited: bool = False) -> PlaceCodes:
        """What one of the recipe's SAEs says of an image, before or after the edits.

        Raises as `draw` does.
        """
        one = self.saes[sae]
        edits = self.edits([seed]) if edited else []
        return codes_of_image(
            self.model, one.sae, parse_site(one.site), prompt, seed, self.config, edits=edits
        )

    def pixel_mask(self) -> Float[Tensor, "h w"]:
        """Where the recipe edits: the largest weight of its edits above each pixel."""
        size = self.model.image_size(self.config)
        masks = [torch.ones(1, 1) if mask is None else mask for mask in self.masks]
        shown = [functional.interpolate(mask[None, None], size=size)[0, 0] for mask in masks]
        return functools.reduce(torch.maximum, shown)

    # ------------------------------------------------------------------------------- edits

    def edits(
        self, seeds: Sequence[int], *, times: float = 1.0, sources: Sources | None = None
    ) -> list[Edit]:
        """The edits for a batch of images.

        Args:
            seeds: the images', which other prompts that are patched from are drawn with too.
            times: strengths are multiplied by it.
            sources: as `sources` gives them for these seeds; drawn where None.
        """
        sources = self.sources(seeds) if sources is None else sources
        found: list[Edit] = []
        for one, mask in zip(self.prepared, self.masks, strict=True):
            flat = None if mask is None else mask.flatten()
            for rows in self._rows(one):
                where = Places(mask=flat, steps=one.edit.steps or (0, None), rows=rows)
                for row, value in self._values(one, rows, len(seeds), times, sources):
                    found.append(
                        Edit(
                            site=one.site, component=one.component, op=one.op, where=where,
                            value=value, row=row,
                        )
                    )  # fmt: skip
        return found

    def sources(self, seeds: Sequence[int]) -> Sources:
        """The activations of the other prompts that the edits take from, drawn with the seeds."""
        wanted: dict[str, list[Site]] = {}
        for one in self.prepared:
            if one.edit.source is not None:
                wanted.setdefault(one.edit.source, []).append(one.site)
        found = {}
        for prompt, sites in wanted.items():
            passes = read_passes(
                self.model, [prompt] * len(seeds), seeds, self.config, list(dict.fromkeys(sites)),
                rows="both" if self.config.guided else "conditional",
            )  # fmt: skip
            found |= {(prompt, site): values for site, values in passes.values.items()}
        return found

    def _rows(self, one: Prepared) -> list[Rows]:
        """The rows of an edit; where each takes from rows of its own, one after the other."""
        if one.edit.rows == "both" and one.edit.op in WITH_SOURCE:
            return ["conditional", "unconditional"]
        return [one.edit.rows]

    def _values(
        self, one: Prepared, rows: Rows, n: int, times: float, sources: Sources
    ) -> list[tuple[int | None, Tensor]]:
        """An edit's value for all images at once (row None), or for each."""
        if one.edit.source is None:
            return [(None, one.at(times))]
        taken = sources[one.edit.source, one.site]
        taken = taken[:, :n] if rows == "unconditional" else taken[:, -n:]
        with torch.no_grad():
            numbers = torch.stack([one.component.values(x) for x in taken])
        factor = one.at(times).to(numbers.device)
        numbers = numbers if one.edit.op == "patch" else factor * numbers
        return [(row, numbers[:, row]) for row in range(n)]


def _images(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DrawConfig,
    edits: Sequence[Edit],
) -> UInt8[Tensor, "b h w 3"]:
    with applying(model, edits):
        drawn: Generated = model.generate(prompts, seeds, config)
    if not torch.isfinite(drawn.latents).all():
        raise Failure("the model gave NaN or infinite latents; try smaller strengths.")
    return drawn.images
