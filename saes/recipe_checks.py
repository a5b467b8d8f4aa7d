"""Whether the parts of a recipe fit together, before any model is loaded."""

import math

from probe.errors import UserError
from probe.sites import parse_site
from saes.recipe_parts import (
    Features,
    Head,
    Neuron,
    Neurons,
    OfSae,
    Op,
    Recipe,
    RecipeEdit,
    Reconstruction,
    WholeSite,
)

WITH_STRENGTH: tuple[Op, ...] = ("add", "set", "scale", "clamp", "transport")
FACTORS: tuple[Op, ...] = ("scale", "transport")
"""Their strength is a factor."""
WITH_SOURCE: tuple[Op, ...] = ("patch", "transport")
FOR_PARTS: tuple[Op, ...] = ("scale", "zero", "mean_ablate", "patch", "transport")
"""What can be done with many numbers at once: a head, a whole site, several features or neurons."""
PARTS = {Head: "head", WholeSite: "site", Features: "set of features", Neurons: "set of neurons"}
OPPOSABLE: tuple[Op, ...] = ("add", "scale", "transport")


def checked(recipe: Recipe, where: str = "the recipe") -> Recipe:
    """The recipe, once what it says fits together. Raises `UserError` naming `where`."""
    if recipe.draw is None and recipe.seeds:
        raise UserError(f"{where} has seeds, which are of images, and no draw; add it.")
    for i, edit in enumerate(recipe.edits, 1):
        _check_edit(edit, recipe, f"edit {i} of {where}")
        if recipe.draw is None:
            _check_of_text(edit, f"edit {i} of {where}")
        else:
            _check_of_images(edit, recipe, f"edit {i} of {where}")
    return recipe


def _check_edit(edit: RecipeEdit, recipe: Recipe, where: str) -> None:
    """Raise `UserError` where the parts of an edit do not fit together."""
    _check_target(edit, recipe, where)
    if (edit.strength is not None) != (edit.op in WITH_STRENGTH):
        needs = "needs a strength" if edit.op in WITH_STRENGTH else "takes no strength"
        raise UserError(f"{where}: op {edit.op} {needs}.")
    if edit.strength is not None and not math.isfinite(edit.strength.value):
        raise UserError(f"strength of {where} must be a finite number; got {edit.strength.value}.")
    if edit.op in FACTORS and edit.strength is not None and edit.strength.unit != "raw":
        raise UserError(f"{where}: a factor to {edit.op} by has no unit but raw.")
    if (edit.source is not None) != (edit.op in WITH_SOURCE):
        needs = "needs a source prompt" if edit.op in WITH_SOURCE else "takes no source"
        raise UserError(f"{where}: op {edit.op} {needs}.")


def _check_target(edit: RecipeEdit, recipe: Recipe, where: str) -> None:
    """Raise `UserError` where an operation cannot be done with its target."""
    target = edit.target
    if (edit.op == "reconstruct") != isinstance(target, Reconstruction):
        raise UserError(
            f'{where}: op reconstruct and the target {{"sae": key}} belong together, and one '
            "of them is missing."
        )
    if type(target) in PARTS and edit.op not in FOR_PARTS:
        raise UserError(
            f"{where} wants to {edit.op} a whole {PARTS[type(target)]}, which is many numbers; "
            f"wanted one of {', '.join(FOR_PARTS)}."
        )
    if isinstance(target, Features) and edit.op == "mean_ablate":
        raise UserError(f"{where} wants to mean_ablate several features; wanted zero or scale.")
    if isinstance(target, Neuron) and edit.op == "project_out":
        raise UserError(f"{where} wants to project out a neuron; op zero does that.")
    if isinstance(target, Head) and not edit.site.startswith("head_out."):
        raise UserError(f"{where} is of a head, which is at head_out sites; got {edit.site}.")
    if isinstance(target, OfSae) and target.sae not in recipe.saes:
        there = ", ".join(recipe.saes) or "none"
        raise UserError(f"{where} uses the SAE {target.sae!r}, and saes has {there}; add it.")


def _check_of_text(edit: RecipeEdit, where: str) -> None:
    """Raise `UserError` where an edit of a recipe of texts says what only images have."""
    if parse_site(edit.site).kind == "block":
        raise UserError(
            f"{where} is at {edit.site}, a block of an image model, and the recipe does not say "
            'how images are drawn; give it schema 2 and "draw".'
        )
    mask = edit.positions.mask
    if edit.positions.canvas is not None or (mask is not None and isinstance(mask[0], tuple)):
        n_rows = "" if mask is None else f", {len(mask)} by {len(mask[0])},"
        raise UserError(
            f"{where}: the mask is of an image{n_rows} and a language model's prompt wants a list "
            "of true and false, a value for each token."
        )
    if edit.rows != "conditional":
        raise UserError(f"{where} asks for rows of guidance, which only images have.")


def _check_of_images(edit: RecipeEdit, recipe: Recipe, where: str) -> None:
    """Raise `UserError` where an edit of a recipe of images says what only texts have."""
    draw, site = recipe.draw, parse_site(edit.site)
    assert draw is not None
    if site.kind != "block" and not (site.path or "").startswith("unet."):
        raise UserError(
            f"{where} is at {edit.site} and the recipe draws images; wanted a block such as "
            "down.2.1, or module:unet.<dotted path>."
        )
    positions = edit.positions
    of_tokens = positions.mask is not None and not isinstance(positions.mask[0], tuple)
    if positions.named not in ("all", None) or positions.range or positions.text or of_tokens:
        raise UserError(
            f"{where} chooses tokens of a text and the recipe draws images; wanted the positions "
            'all, {"mask": rows of weights} or {"canvas": rows of weights}.'
        )
    if edit.op == "mean_ablate":
        raise UserError(
            f"{where}: op mean_ablate needs a mean of reference text, which images have not; "
            "wanted zero, or set with a strength."
        )
    first, end = edit.steps or (0, None)
    if first >= draw.steps or (end or 0) > draw.steps:
        raise UserError(
            f"{where} is at the steps {list(edit.steps or ())} and the recipe draws in "
            f"{draw.steps}, counted from 0; choose from those."
        )
    if edit.rows != "conditional" and not draw.guided:
        raise UserError(
            f"{where} asks for {edit.rows} rows and guidance is {draw.guidance:g}, so there is no "
            "unconditional row; ask for guidance above 1 or for the conditional row."
        )
    if edit.rows == "opposed" and edit.op not in OPPOSABLE:
        raise UserError(
            f"{where}: op {edit.op} cannot be opposed; wanted one of {', '.join(OPPOSABLE)}, or "
            "the rows both."
        )
