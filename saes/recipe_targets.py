"""From a recipe's targets and strengths to numbers of an activation, for texts and images alike.

A feature is pushed along its decoder direction: with `a` its code at a position and `a'` what the
recipe makes of it, `x` becomes `x + (a' - a) W_dec[f]`. The part of `x` that the SAE does not
reconstruct is kept as it is. `a` is read where the operation needs it; adding does not.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from probe.adapters import Model
from probe.capture import site_widths
from probe.directions import Direction, load_direction
from probe.errors import UserError
from probe.interventions import Channels, Coordinate, Coordinates, Op, Picked, Plain, Rest
from probe.language import LanguageModel
from probe.sites import Site, parse_site
from saes.recipe_parts import (
    Feature,
    Features,
    FileDirection,
    Head,
    Neuron,
    Neurons,
    OfSae,
    Recipe,
    RecipeEdit,
    Reconstruction,
    Statistics,
    Target,
    Unit,
)
from saes.recipe_saes import LoadedSae, Reader, feature_size

Measure = Callable[[Site, Plain], Float[Tensor, "n w"]]
"""A component's numbers on reference input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An edit of a recipe with everything but the prompt known."""

    edit: RecipeEdit
    """What the recipe says."""
    site: Site
    """Its site."""
    component: Plain
    """Its target."""
    value: Float[Tensor, " w"]
    """Its strength in raw units, or the mean that ablates; unused by `patch` and others."""

    @property
    def op(self) -> Op:
        """The operation on the target's numbers: a recipe has two more names for some."""
        names: dict[str, Op] = {"transport": "add", "reconstruct": "zero"}
        return names.get(self.edit.op) or self.edit.op  # type: ignore[return-value]

    def at(self, times: float) -> Float[Tensor, " w"]:
        """The value with its strength multiplied; a factor f to scale by becomes 1 + times (f - 1).

        What has no strength stays as it is.
        """
        if self.edit.op == "scale":
            return 1 + times * (self.value - 1)
        return self.value if self.edit.strength is None else times * self.value


def prepared_edits(
    recipe: Recipe, model: Model, loaded: Mapping[str, LoadedSae], measure: Measure | None
) -> tuple[Prepared, ...]:
    """A recipe's edits on a model.

    Args:
        recipe: what to do.
        model: the model that it is for.
        loaded: its SAEs by key.
        measure: how to measure a component that nothing is known of; None where that is not to be.

    Raises `UserError` where there is no such site, feature, neuron or head, or it does not fit.
    """
    sites = [parse_site(edit.site) for edit in recipe.edits]
    preparing = _Preparing(
        recipe=recipe,
        model=model,
        loaded=loaded,
        readers={key: Reader(one.sae) for key, one in loaded.items()},
        widths=site_widths(model, list(dict.fromkeys(sites))),
        measure=measure,
    )
    return tuple(
        preparing.prepared(edit, f"edit {i} of the recipe {recipe.name!r}")
        for i, edit in enumerate(recipe.edits, 1)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Preparing:
    recipe: Recipe
    model: Model
    loaded: Mapping[str, LoadedSae]
    readers: Mapping[str, Reader]
    widths: Mapping[str, int]
    measure: Measure | None

    def prepared(self, edit: RecipeEdit, where: str) -> Prepared:
        site = parse_site(edit.site)
        component = self.component(edit, self.widths[str(site)], where)
        value = torch.zeros(1)
        if edit.op == "mean_ablate":
            value = self.measured(site, component, where).mean(0)
        elif edit.strength is not None:
            size = self.size(edit.target, edit.strength.unit, site, component, where)
            value = torch.tensor([edit.strength.value * size])
        return Prepared(edit=edit, site=site, component=component, value=value)

    def component(self, edit: RecipeEdit, width: int, where: str) -> Plain:
        """What the target is in the activation."""
        target = edit.target
        if isinstance(target, OfSae):
            return self.of_sae(edit, target, width, where)
        if isinstance(target, FileDirection):
            found = self.direction(target)
            if len(found.vector) != width:
                raise UserError(
                    f"{where}: the direction {target.direction} has width {len(found.vector)} and "
                    f"{edit.site} has width {width}; give a direction of that site."
                )
            return Coordinate(vector=found.unit)
        if isinstance(target, Neuron):
            _check_numbers("neuron", (target.neuron,), width, edit.site, where)
            return Channels(start=target.neuron, stop=target.neuron + 1)
        if isinstance(target, Neurons):
            _check_numbers("neuron", target.neurons, width, edit.site, where)
            return Picked(channels=torch.tensor(target.neurons))
        if isinstance(target, Head):
            assert isinstance(self.model, LanguageModel), "recipes of images have no heads"
            n_heads = self.model.model.config.get_text_config().num_attention_heads
            _check_numbers("head", (target.head,), n_heads, edit.site, where)
            size = width // n_heads
            return Channels(start=target.head * size, stop=(target.head + 1) * size)
        return Channels(start=0, stop=width)

    def of_sae(self, edit: RecipeEdit, target: OfSae, width: int, where: str) -> Plain:
        one, reader = self.loaded[target.sae], self.readers[target.sae]
        _check_place(edit, one, width, where)
        if isinstance(target, Reconstruction):
            return Rest(rebuild=reader.reconstruction)
        name, d_sae = one.run.path.name, one.sae.config.d_sae
        if isinstance(target, Feature):
            _check_numbers("feature", (target.feature,), d_sae, name, where)
            return Coordinate(
                vector=one.sae.W_dec[target.feature].detach().float(),
                read=functools.partial(reader.feature, target.feature),
            )
        assert isinstance(target, Features)
        _check_numbers("feature", target.features, d_sae, name, where)
        return Coordinates(
            vectors=one.sae.W_dec[list(target.features)].detach().float(),
            read=functools.partial(reader.features, target.features),
        )

    def size(self, target: Target, unit: Unit, site: Site, component: Plain, where: str) -> float:
        """How large one of a strength's unit is."""
        if unit == "raw":
            return 1.0
        known = None
        if isinstance(target, Feature | FileDirection | Neuron):
            known = target.statistics
        if known is None and isinstance(target, Feature):
            return feature_size(self.loaded[target.sae].run, target.feature, unit)
        if known is None and isinstance(target, FileDirection):
            known = _recorded(self.direction(target))
        if known is not None:
            return getattr(known, unit)
        values = self.measured(site, component, where)[:, 0]
        return float({"mean": values.mean, "max": values.max, "sd": values.std}[unit]())

    def measured(self, site: Site, component: Plain, where: str) -> Float[Tensor, "n w"]:
        if self.measure is None:
            raise UserError(
                f"{where}: nothing says how large its target is; give the strength in raw units, "
                "or the target its statistics."
            )
        return self.measure(site, component)

    def direction(self, target: FileDirection) -> Direction:
        return load_direction((self.recipe.folder or Path()) / target.direction)


def _recorded(direction: Direction) -> Statistics | None:
    """The projections that a direction's file records; None where it records none."""
    if direction.mean is None or direction.max is None or direction.sd is None:
        return None
    return Statistics(mean=direction.mean, max=direction.max, sd=direction.sd)


def _check_numbers(what: str, numbers: tuple[int, ...], n: int, owner: str, where: str) -> None:
    largest = max(numbers)
    if largest >= n:
        raise UserError(f"{where}: {owner} has no {what} {largest}, only 0 to {n - 1}.")


def _check_place(edit: RecipeEdit, one: LoadedSae, width: int, where: str) -> None:
    """Raise `UserError` where an SAE's features do not belong at an edit's site."""
    name, d_in = one.run.path.name, one.sae.config.d_in
    if d_in != width:
        raise UserError(
            f"{where}: {name} has width {d_in} and {edit.site} has width {width}; its features "
            f"belong at {one.site}."
        )
    here, home = parse_site(edit.site), parse_site(one.site)
    if "block" in (here.kind, home.kind) and here.path != home.path:
        raise UserError(
            f"{where}: {name} was trained at {one.site} and the edit is at {edit.site}, another "
            f"block; give an SAE of {edit.site}, or edit {one.site}."
        )
    if here != home and edit.op not in ("add", "project_out"):
        raise UserError(
            f"{where}: op {edit.op} reads the feature, which can only be read at {one.site}, not "
            f"at {edit.site}; add works at any site of that width."
        )
