"""Recipes that a person begins with, made of an SAE and a feature."""

from collections.abc import Sequence
from dataclasses import replace

from probe.diffusion import DrawConfig
from probe.errors import UserError
from probe.runs import Run
from saes.folder import sae_metadata
from saes.recipe_checks import checked
from saes.recipe_parts import (
    Feature,
    ModelReference,
    Op,
    Positions,
    Recipe,
    RecipeEdit,
    Statistics,
    Strength,
    WholeSite,
)
from saes.recipe_saes import sae_reference


def feature_recipe(
    sae: Run,
    feature: int,
    *,
    op: Op = "add",
    strength: Strength | None = None,
    statistics: Statistics | None = None,
    name: str = "",
    draw: DrawConfig | None = None,
    positions: Positions | None = None,
) -> Recipe:
    """The recipe that a person begins with: one feature pushed at every token or place.

    Args:
        sae: the SAE's folder.
        feature: its feature.
        op: what is done to it.
        strength: how much; for operations that take none, None.
        statistics: its activations, kept in the recipe; None to leave them to the SAE's index.
        name: a few words; None to make them.
        draw: how images are drawn; None for a recipe of texts.
        positions: at which tokens or places; None for all.

    Raises `Failure` where the SAE is not complete, `UserError` where the parts do not fit.
    """
    edit = RecipeEdit(
        site=sae.config["site"],
        op=op,
        target=Feature(feature=feature, sae="main", statistics=statistics),
        strength=strength,
        positions=positions or Positions(),
    )
    recipe = Recipe(
        name=name or f"{op} feature {feature}",
        model=model_reference(sae),
        saes={"main": sae_reference(sae)},
        edits=(edit,),
        draw=draw,
    )
    return checked(recipe)


def icon_recipe(
    sae: Run,
    feature: int,
    gamma: float = 1.0,
    *,
    draw: DrawConfig | None = None,
    seeds: Sequence[int] = (42,),
) -> Recipe:
    """What a feature stands for: nothing is asked for, and the block says the feature alone.

    The empty prompt is drawn with the block's update replaced by `gamma k mean f` everywhere, `f`
    the decoder direction, `mean` the feature's mean activation where it fires and `k` the number
    of features that are active at a place: as much as the block usually says. (Surkov et al. 2024,
    2410.22366, who take gamma 0.5, 1 and 1.5.)

    Raises `UserError` where the SAE has no fixed `k`, `Failure` where it is not complete.
    """
    k = sae_metadata(sae.path).get("activation", {}).get("k")
    if k is None:
        raise UserError(
            f"{sae.path.name} has no fixed number of active features to measure an icon in; give "
            "a TopK SAE, or a recipe of your own: op zero at the site and op add of the feature."
        )
    base = feature_recipe(
        sae, feature, strength=Strength(value=gamma * k, unit="mean"), draw=draw or DrawConfig(),
        name=f"icon of feature {feature}",
    )  # fmt: skip
    without = RecipeEdit(site=base.edits[0].site, op="zero", target=WholeSite())
    return checked(replace(base, edits=(without, *base.edits), prompts=("",), seeds=tuple(seeds)))


def model_reference(sae: Run) -> ModelReference:
    """How a recipe names the model that an SAE was trained on."""
    described = sae.config["model"]
    return ModelReference(spec=described["spec"], random_weights=described.get("random_weights"))
