"""Recipes: a JSON file that says what to change in a model, for the shell, a page or a notebook.

    {
      "schema": 1,
      "name": "more sea",
      "note": "what a person should know about it",
      "model": {"spec": "smollm2", "random_weights": null},
      "saes": {"main": {"name": "smollm2-resid_post.12-...", "weights": "<their SHA-256>"}},
      "edits": [
        {
          "site": "resid_post.12",
          "op": "add",
          "target": {"feature": 7, "sae": "main"},
          "strength": {"value": 2.0, "unit": "max"},
          "positions": "all",
          "steps": null
        }
      ],
      "special_tokens": false,
      "prompts": ["The captain looked at"],
      "effect": [" sea", " ship"]
    }

**op**: `add`, `set`, `scale`, `clamp`, `zero`, `mean_ablate`, `patch`, `project_out`
(`probe.interventions` has each one's formula).

**target**: `{"feature": n, "sae": key}`, `{"direction": "file.safetensors"}` (relative to the
recipe; taken at length 1), `{"neuron": n}` (a channel of the site), `{"head": n}` (at `head_out`
sites), `"site"` (all of it). A feature, direction or neuron is one number and takes every op (a
neuron is projected out by `zero`); a head and a site are many and take `scale`, `zero`,
`mean_ablate` and `patch`.

**strength**: for `add`, `set` and `clamp` a value in a unit: `raw` (the number itself), or times
the `mean`, `max` or `sd` of the target's own activations (of a feature: over the tokens it fires
on). For `scale` a factor, whose unit is `raw`. The others take none. A target may carry its
`statistics` (`mean`, `max`, `sd`), so that the recipe means the same where there is no index.

**positions**: `"all"`, `"prompt"`, `"generated"`, `"last"` (of the prompt), `{"range": [first,
end]}` (of the prompt, end excluded, negative from its end), `{"text": "..."}` (tokens of the prompt
that an occurrence reaches into), `{"mask": [...]}` (a truth value for each token of the prompt; for
an image rows of them). Position 0 and special tokens, on which SAEs are not trained, are left alone
unless `special_tokens` is true or the mask names them.

**steps**: null for all, or `[first, end]` (end excluded or null): step 0 reads the prompt, step n
the n-th generated token; of a diffusion model, the denoising steps.

**source**: for `patch`, the other prompt; `positions` have to choose as many tokens there as here.

**prompts** are tried where none is given. **effect** lists tokens the recipe is meant to make
likelier, which the dose-response study measures.

Unknown keys, operations, units or schema numbers are errors.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from probe.errors import UserError
from probe.interventions import Op
from probe.runs import write_json
from probe.sites import parse_site

SCHEMA = 1
Unit = Literal["raw", "mean", "max", "sd"]
WITH_STRENGTH: tuple[Op, ...] = ("add", "set", "scale", "clamp")
FOR_PARTS: tuple[Op, ...] = ("scale", "zero", "mean_ablate", "patch")
"""What can be done with a head or a whole site, which are many numbers."""
NAMED_POSITIONS = ("all", "prompt", "generated", "last")


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Sizes of a target's activations, that strengths are measured in."""

    mean: float
    """Mean; of a feature, over the tokens it fires on."""
    max: float
    """Largest."""
    sd: float
    """Standard deviation, over the same tokens as the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """A latent of an SAE."""

    feature: int
    """Its number."""
    sae: str
    """Key of its SAE in the recipe's `saes`."""
    statistics: Statistics | None = None
    """Its activations; None to look in the SAE's index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDirection:
    """A direction that `probe.directions` wrote."""

    direction: str
    """The file, relative to the recipe's folder."""
    statistics: Statistics | None = None
    """Projections on it; None to take those in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neuron:
    """One channel of the site."""

    neuron: int
    """Its number."""
    statistics: Statistics | None = None
    """Its activations; None to measure them on reference text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """An attention head's output."""

    head: int
    """Its number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeSite:
    """All of the site's activation."""


Target = Feature | FileDirection | Neuron | Head | WholeSite


@dataclass(frozen=True, slots=True, kw_only=True)
class Strength:
    """How much."""

    value: float
    """In the unit."""
    unit: Unit = "raw"
    """`raw`, or times the target's mean, max or sd."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Which tokens."""

    named: str | None = "all"
    """One of `NAMED_POSITIONS`; None where one of the others says it."""
    range: tuple[int, int | None] | None = None
    """First position of the prompt, and one past the last."""
    text: str | None = None
    """Text of the prompt whose tokens are meant."""
    mask: tuple[Any, ...] | None = None
    """A truth value for each token, or rows of them for an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeEdit:
    """One change."""

    site: str
    """Where in the model."""
    op: Op
    """What is done."""
    target: Target
    """To what."""
    strength: Strength | None = None
    """How much; None for operations that take none."""
    positions: Positions = field(default_factory=Positions)
    """At which tokens."""
    steps: tuple[int, int | None] | None = None
    """At which steps; None for all."""
    source: str | None = None
    """The prompt to patch from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReference:
    """The model a recipe is for."""

    spec: str
    """As `lorgnette capture` takes it."""
    random_weights: int | None = None
    """Seed, for a random-weight twin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeReference:
    """An SAE a recipe uses: it is known by its weights; its name says where to look first."""

    name: str
    """Name of its folder."""
    weights: str
    """SHA-256 of its weights' file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to change in a model. Made by `read_recipe`, or in Python and checked by `checked`."""

    name: str
    """A few words."""
    model: ModelReference
    """What it is for."""
    edits: tuple[RecipeEdit, ...]
    """What it changes; all of one site are read from the unedited activation."""
    saes: Mapping[str, SaeReference] = field(default_factory=dict)
    """The SAEs that its features belong to, by key."""
    note: str = ""
    """What a person should know about it."""
    special_tokens: bool = False
    """Edit position 0 and special tokens as well."""
    prompts: tuple[str, ...] = ()
    """Prompts to try it on."""
    effect: tuple[str, ...] = ()
    """Tokens it is meant to make likelier."""
    folder: Path | None = None
    """The folder of its file, which directions are looked for in; not part of the file."""


# -------------------------------------------------------------------------------- from and to JSON


def read_recipe(path: Path) -> Recipe:
    """Read a recipe's file. Raises `UserError` where it is none, saying what is wrong."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no recipe {path}; give the path of a recipe's file.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"the recipe {path} is not readable as JSON ({error}).") from error
    return recipe_from(found, str(path), folder=path.parent)


def recipe_from(found: Any, where: str = "the recipe", *, folder: Path | None = None) -> Recipe:
    """A recipe from parsed JSON. Raises `UserError` naming `where`, and what is wrong."""
    top = _object(found, where, {"schema", "name", "model", "edits"}, _names(Recipe) - {"folder"})
    if top["schema"] != SCHEMA:
        raise UserError(
            f"{where} has schema {top['schema']!r} and this version reads {SCHEMA}; write it again "
            "with this version, or use the version that wrote it."
        )
    model = _object(top["model"], f"model of {where}", {"spec"}, _names(ModelReference))
    saes = _dict(top.get("saes", {}), f"saes of {where}")
    edits = top["edits"]
    if not isinstance(edits, list) or not edits:
        raise UserError(f"edits of {where} must be a list of one edit or more.")
    recipe = Recipe(
        name=_text(top["name"], f"name of {where}"),
        note=_text(top.get("note", ""), f"note of {where}"),
        model=ModelReference(
            spec=_text(model["spec"], f"model's spec of {where}"),
            random_weights=_whole(model.get("random_weights"), f"random_weights of {where}", True),
        ),
        saes={key: _sae(value, f"SAE {key!r} of {where}") for key, value in saes.items()},
        edits=tuple(_edit(edit, f"edit {i} of {where}") for i, edit in enumerate(edits, 1)),
        special_tokens=_truth(top.get("special_tokens", False), f"special_tokens of {where}"),
        prompts=_texts(top.get("prompts", []), f"prompts of {where}"),
        effect=_texts(top.get("effect", []), f"effect of {where}"),
        folder=folder,
    )
    return checked(recipe, where)


def checked(recipe: Recipe, where: str = "the recipe") -> Recipe:
    """The recipe, once what it says fits together. Raises `UserError` naming `where`."""
    for i, edit in enumerate(recipe.edits, 1):
        _check_edit(edit, recipe, f"edit {i} of {where}")
    return recipe


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as its file holds it."""
    return {
        "schema": SCHEMA,
        "name": recipe.name,
        "note": recipe.note,
        "model": asdict(recipe.model),
        "saes": {key: asdict(sae) for key, sae in recipe.saes.items()},
        "edits": [_edit_json(edit) for edit in recipe.edits],
        "special_tokens": recipe.special_tokens,
        "prompts": list(recipe.prompts),
        "effect": list(recipe.effect),
    }


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe's file, whole or not at all."""
    write_json(path, to_json(checked(recipe, str(path))))


def _edit_json(edit: RecipeEdit) -> dict[str, Any]:
    positions = edit.positions
    others = {"range": positions.range, "text": positions.text, "mask": positions.mask}
    shown: Any = positions.named or {k: v for k, v in others.items() if v is not None}
    target = "site" if isinstance(edit.target, WholeSite) else _without_none(asdict(edit.target))
    document = {
        "site": edit.site,
        "op": edit.op,
        "target": target,
        "strength": None if edit.strength is None else asdict(edit.strength),
        "positions": json.loads(json.dumps(shown)),
        "steps": None if edit.steps is None else list(edit.steps),
        "source": edit.source,
    }
    optional = {"strength", "source"}
    return {k: v for k, v in document.items() if not (k in optional and v is None)}


def _without_none(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value is not None}


# ------------------------------------------------------------------------------------- parts of it


def _sae(found: Any, where: str) -> SaeReference:
    values = _object(found, where, _names(SaeReference), _names(SaeReference))
    return SaeReference(**{key: _text(value, f"{key} of {where}") for key, value in values.items()})


def _edit(found: Any, where: str) -> RecipeEdit:
    values = _object(found, where, {"site", "op", "target"}, _names(RecipeEdit))
    if values["op"] not in get_args(Op):
        raise UserError(
            f"{where} has op {values['op']!r}; wanted one of {', '.join(get_args(Op))}."
        )
    source = values.get("source")
    strength = values.get("strength")
    return RecipeEdit(
        site=str(parse_site(_text(values["site"], f"site of {where}"))),
        op=values["op"],
        target=_target(values["target"], where),
        strength=None if strength is None else _strength(strength, where),
        positions=_positions(values.get("positions", "all"), where),
        steps=_span(values.get("steps"), f"steps of {where}"),
        source=None if source is None else _text(source, f"source of {where}"),
    )


def _target(found: Any, where: str) -> Target:
    if found == "site":
        return WholeSite()
    kinds: dict[str, Callable[[dict[str, Any]], Target]] = {
        "feature": lambda values: Feature(
            feature=_count(values["feature"], f"feature of {where}"),
            sae=_text(values.get("sae"), f"sae of the target of {where}"),
            statistics=_statistics(values.get("statistics"), where),
        ),
        "direction": lambda values: FileDirection(
            direction=_text(values["direction"], f"direction of {where}"),
            statistics=_statistics(values.get("statistics"), where),
        ),
        "neuron": lambda values: Neuron(
            neuron=_count(values["neuron"], f"neuron of {where}"),
            statistics=_statistics(values.get("statistics"), where),
        ),
        "head": lambda values: Head(head=_count(values["head"], f"head of {where}")),
    }
    kind = next((name for name in kinds if isinstance(found, dict) and name in found), None)
    if kind is None:
        raise UserError(
            f'the target of {where} must be {{"feature": n, "sae": key}}, {{"direction": file}}, '
            f'{{"neuron": n}}, {{"head": n}} or "site"; got {found!r}.'
        )
    allowed = {"feature": _names(Feature), "direction": _names(FileDirection)}
    others = {"neuron": _names(Neuron), "head": _names(Head)}
    return kinds[kind](_object(found, f"target of {where}", {kind}, (allowed | others)[kind]))


def _statistics(found: Any, where: str) -> Statistics | None:
    if found is None:
        return None
    wanted = _names(Statistics)
    values = _object(found, f"statistics of {where}", wanted, wanted)
    return Statistics(**{k: _finite(v, f"{k} of the target of {where}") for k, v in values.items()})


def _strength(found: Any, where: str) -> Strength:
    if isinstance(found, int | float) and not isinstance(found, bool):
        return Strength(value=_finite(found, f"strength of {where}"))
    values = _object(found, f"strength of {where}", {"value"}, _names(Strength))
    unit = values.get("unit", "raw")
    if unit not in get_args(Unit):
        units = ", ".join(get_args(Unit))
        raise UserError(f"strength of {where} has unit {unit!r}; wanted one of {units}.")
    return Strength(value=_finite(values["value"], f"strength of {where}"), unit=unit)


def _positions(found: Any, where: str) -> Positions:
    if isinstance(found, str) and found in NAMED_POSITIONS:
        return Positions(named=found)
    kinds = ("range", "text", "mask")
    if not isinstance(found, dict) or len(found) != 1 or next(iter(found)) not in kinds:
        raise UserError(
            f"positions of {where} must be one of {', '.join(NAMED_POSITIONS)}, "
            f'{{"range": [first, end]}}, {{"text": ...}} or {{"mask": [...]}}; got {found!r}.'
        )
    kind, value = next(iter(found.items()))
    if kind == "range":
        return Positions(named=None, range=_span(value, f"range of {where}", negative=True))
    if kind == "text":
        return Positions(named=None, text=_text(value, f"text of the positions of {where}"))
    return Positions(named=None, mask=_mask(value, f"mask of {where}"))


def _mask(found: Any, where: str) -> tuple[Any, ...]:
    rows = found if isinstance(found, list) else []
    flat = all(isinstance(value, bool) for value in rows)
    image = all(
        isinstance(row, list) and row and len(row) == len(rows[0]) and _all_truths(row)
        for row in rows
    )
    if not rows or not (flat or image):
        raise UserError(
            f"{where} must be a list of true and false, a value for each token, or rows of them "
            "of one length."
        )
    return tuple(rows) if flat else tuple(tuple(row) for row in rows)


def _all_truths(row: list[Any]) -> bool:
    return all(isinstance(value, bool) for value in row)


def _check_edit(edit: RecipeEdit, recipe: Recipe, where: str) -> None:
    """Raise `UserError` where the parts of an edit do not fit together."""
    many = isinstance(edit.target, Head | WholeSite)
    if many and edit.op not in FOR_PARTS:
        part = "head" if isinstance(edit.target, Head) else "site"
        raise UserError(
            f"{where} wants to {edit.op} a whole {part}, which is many numbers; wanted one of "
            f"{', '.join(FOR_PARTS)}."
        )
    if isinstance(edit.target, Neuron) and edit.op == "project_out":
        raise UserError(f"{where} wants to project out a neuron; op zero does that.")
    if isinstance(edit.target, Head) and not edit.site.startswith("head_out."):
        raise UserError(f"{where} is of a head, which is at head_out sites; got {edit.site}.")
    if isinstance(edit.target, Feature) and edit.target.sae not in recipe.saes:
        there = ", ".join(recipe.saes) or "none"
        raise UserError(f"{where} uses the SAE {edit.target.sae!r}, and saes has {there}; add it.")
    if (edit.strength is not None) != (edit.op in WITH_STRENGTH):
        needs = "needs a strength" if edit.op in WITH_STRENGTH else "takes no strength"
        raise UserError(f"{where}: op {edit.op} {needs}.")
    if edit.strength is not None and not math.isfinite(edit.strength.value):
        raise UserError(f"strength of {where} must be a finite number; got {edit.strength.value}.")
    if edit.op == "scale" and edit.strength is not None and edit.strength.unit != "raw":
        raise UserError(f"{where}: a factor to scale by has no unit but raw.")
    if (edit.source is not None) != (edit.op == "patch"):
        needs = "needs a source prompt" if edit.op == "patch" else "takes no source"
        raise UserError(f"{where}: op {edit.op} {needs}.")


# ----------------------------------------------------------------------------------- plain values


def _names(kind: type) -> set[str]:
    return {one.name for one in fields(kind)} | ({"schema"} if kind is Recipe else set())


def _dict(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError(f"{where} must be a JSON object; got {type(found).__name__}.")
    return found


def _object(found: Any, where: str, needed: set[str], known: set[str]) -> dict[str, Any]:
    values = _dict(found, where)
    if unknown := sorted(set(values) - known):
        raise UserError(
            f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}."
        )
    if missing := sorted(needed - set(values)):
        raise UserError(f"{where} lacks {missing[0]!r}; add it.")
    return values


def _text(found: Any, where: str) -> str:
    if not isinstance(found, str):
        raise UserError(f"{where} must be a text; got {found!r}.")
    return found


def _texts(found: Any, where: str) -> tuple[str, ...]:
    if not isinstance(found, list):
        raise UserError(f"{where} must be a list of texts; got {found!r}.")
    return tuple(_text(value, where) for value in found)


def _truth(found: Any, where: str) -> bool:
    if not isinstance(found, bool):
        raise UserError(f"{where} must be true or false; got {found!r}.")
    return found


def _whole(found: Any, where: str, optional: bool) -> int | None:
    if optional and found is None:
        return None
    if not isinstance(found, int) or isinstance(found, bool):
        raise UserError(f"{where} must be a whole number; got {found!r}.")
    return found


def _count(found: Any, where: str) -> int:
    value = _whole(found, where, False)
    assert value is not None
    if value < 0:
        raise UserError(f"{where} must be 0 or more; got {value}.")
    return value


def _finite(found: Any, where: str) -> float:
    number = isinstance(found, int | float) and not isinstance(found, bool)
    if not number or not math.isfinite(found):
        raise UserError(f"{where} must be a finite number; got {found!r}.")
    return float(found)


def _span(found: Any, where: str, *, negative: bool = False) -> Any:
    """`[first, end]`, end excluded, or null for no end; None where there is none."""
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2:
        raise UserError(f"{where} must be [first, end], end excluded or null; got {found!r}.")
    first, end = _whole(found[0], where, False), _whole(found[1], where, True)
    assert first is not None
    same_side = end is not None and (first < 0) == (end < 0)
    if (not negative and first < 0) or (same_side and end is not None and end <= first):
        raise UserError(f"{where} must name one or more, counted from 0; got {found!r}.")
    return (first, end)
