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

A recipe of images has schema 2 and further keys; it has no `special_tokens` and no `effect`:

      "draw": {"steps": 1, "guidance": 0.0, "height": null, "width": null},
      "seeds": [42],

**op**: `add`, `set`, `scale`, `clamp`, `zero`, `mean_ablate`, `patch`, `project_out`
(`probe.interventions` has each one's formula); `transport`: c + strength times the number in the
run of another prompt; `reconstruct`: the activation becomes what an SAE makes of it.

**target**: `{"feature": n, "sae": key}`, `{"features": [n, ...], "sae": key}`, `{"direction":
"file.safetensors"}` (relative to the recipe; taken at length 1), `{"neuron": n}` (a channel of the
site), `{"neurons": [n, ...]}`, `{"head": n}` (at `head_out` sites), `"site"` (all of it), `{"sae":
key}` (for `reconstruct`). A feature, direction or neuron is one number and takes every op but
`reconstruct` (a neuron is projected out by `zero`); the others are many and take `scale`, `zero`,
`mean_ablate` (not features), `patch` and `transport`.

**strength**: for `add`, `set` and `clamp` a value in a unit: `raw` (the number itself), or times
the `mean`, `max` or `sd` of the target's own activations (of a feature: over the rows it fires on).
For `scale` and `transport` a factor, whose unit is `raw`. The others take none. A target may carry
its `statistics` (`mean`, `max`, `sd`), so that the recipe means the same where there is no index.

**positions** of text: `"all"`, `"prompt"`, `"generated"`, `"last"` (of the prompt), `{"range":
[first, end]}` (of the prompt, end excluded, negative from its end), `{"text": "..."}` (tokens of
the prompt that an occurrence reaches into), `{"mask": [...]}` (a truth value for each token of the
prompt). Position 0 and special tokens, on which SAEs are not trained, are left alone unless
`special_tokens` is true or the mask names them.

**positions** of images: `"all"`, `{"mask": [[...], ...]}` (rows of weights from 0 to 1, which the
change is multiplied by; of the size of the site's feature map and no other), `{"canvas": [[...],
...]}` (the same at any size of the same aspect, such as a painted image's: averaged over areas to
each site's feature map).

**steps**: null for all, or `[first, end]` (end excluded or null). Of text, step 0 reads the prompt,
step n the n-th generated token; of images they are the denoising steps, counted from 0.

**rows** of guided images: `conditional` (where it is not said), `both`, or `opposed`: added to the
conditional row and taken off the unconditional one (`add`, `scale` and `transport` only).

**source**: for `patch` and `transport`, the other prompt. Of text, `positions` have to choose as
many tokens there as here; of images, the source is drawn from the same seed with the same settings
and read at the same places and steps.

**prompts** (and **seeds**) are tried where none is given. **effect** lists tokens the recipe is
meant to make likelier, which the dose-response study measures.

Unknown keys, operations, units or schema numbers are errors.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from probe.diffusion import DrawConfig
from probe.errors import UserError
from probe.interventions import Rows
from probe.runs import write_json
from probe.sites import parse_site
from saes.recipe_checks import checked
from saes.recipe_parts import (
    Feature,
    Features,
    FileDirection,
    Head,
    ModelReference,
    Neuron,
    Neurons,
    Op,
    Positions,
    Recipe,
    RecipeEdit,
    Reconstruction,
    SaeReference,
    Statistics,
    Strength,
    Target,
    Unit,
    WholeSite,
)
from saes.strict_json import (
    as_count,
    as_counts,
    as_dict,
    as_finite,
    as_object,
    as_span,
    as_text,
    as_texts,
    as_truth,
    as_whole,
)

TEXT, IMAGES = 1, 2
"""Schema numbers."""
NAMED_POSITIONS = ("all", "prompt", "generated", "last")
PLACED_POSITIONS = ("range", "text", "mask", "canvas")
ONLY_TEXT, ONLY_IMAGES = {"special_tokens", "effect"}, {"draw", "seeds"}


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
    top = _top(found, where)
    model = as_object(top["model"], f"model of {where}", {"spec"}, _names(ModelReference))
    seed = as_whole(model.get("random_weights"), f"random_weights of {where}", True)
    saes = as_dict(top.get("saes", {}), f"saes of {where}")
    edits = top["edits"]
    if not isinstance(edits, list) or not edits:
        raise UserError(f"edits of {where} must be a list of one edit or more.")
    recipe = Recipe(
        name=as_text(top["name"], f"name of {where}"),
        note=as_text(top.get("note", ""), f"note of {where}"),
        model=ModelReference(
            spec=as_text(model["spec"], f"model's spec of {where}"), random_weights=seed
        ),
        saes={key: _sae(value, f"SAE {key!r} of {where}") for key, value in saes.items()},
        edits=tuple(_edit(edit, f"edit {i} of {where}") for i, edit in enumerate(edits, 1)),
        special_tokens=as_truth(top.get("special_tokens", False), f"special_tokens of {where}"),
        prompts=as_texts(top.get("prompts", []), f"prompts of {where}"),
        effect=as_texts(top.get("effect", []), f"effect of {where}"),
        draw=_draw(top["draw"], f"draw of {where}") if "draw" in top else None,
        seeds=as_counts(top["seeds"], f"seeds of {where}") if top.get("seeds", []) != [] else (),
        folder=folder,
    )
    return checked(recipe, where)


def _top(found: Any, where: str) -> dict[str, Any]:
    """A recipe's JSON with the keys of its schema and no others."""
    needed, known = {"schema", "name", "model", "edits"}, _names(Recipe) - {"folder"} | {"schema"}
    schema = as_object(found, where, needed, known)["schema"]
    if schema not in (TEXT, IMAGES) or isinstance(schema, bool):
        raise UserError(
            f"{where} has schema {schema!r} and this version reads {TEXT} (of texts) and {IMAGES} "
            "(of images); write it again with this version, or use the version that wrote it."
        )
    if schema == TEXT:
        return as_object(found, f"{where}, of schema {TEXT} (texts),", needed, known - ONLY_IMAGES)
    where = f"{where}, of schema {IMAGES} (images),"
    return as_object(found, where, needed | {"draw"}, known - ONLY_TEXT)


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as its file holds it."""
    document = {
        "schema": TEXT if recipe.draw is None else IMAGES,
        "name": recipe.name,
        "note": recipe.note,
        "model": asdict(recipe.model),
        "saes": {key: asdict(sae) for key, sae in recipe.saes.items()},
        "edits": [_edit_json(edit) for edit in recipe.edits],
    }
    prompts = {"prompts": list(recipe.prompts)}
    if recipe.draw is not None:
        return document | {"draw": asdict(recipe.draw)} | prompts | {"seeds": list(recipe.seeds)}
    document |= {"special_tokens": recipe.special_tokens} | prompts
    return document | {"effect": list(recipe.effect)}


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe's file, whole or not at all."""
    write_json(path, to_json(checked(recipe, str(path))))


def _edit_json(edit: RecipeEdit) -> dict[str, Any]:
    positions = edit.positions
    shown: Any = positions.named or _without_none(
        {name: getattr(positions, name) for name in PLACED_POSITIONS}
    )
    target = "site" if isinstance(edit.target, WholeSite) else _without_none(asdict(edit.target))
    document = {
        "site": edit.site,
        "op": edit.op,
        "target": target,
        "strength": None if edit.strength is None else asdict(edit.strength),
        "positions": shown,
        "steps": None if edit.steps is None else list(edit.steps),
        "source": edit.source,
        "rows": None if edit.rows == "conditional" else edit.rows,
    }
    optional = {"strength", "source", "rows"}
    shortened = {k: v for k, v in document.items() if not (k in optional and v is None)}
    return json.loads(json.dumps(shortened))


def _without_none(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value is not None}


# ------------------------------------------------------------------------------------- parts of it


def _sae(found: Any, where: str) -> SaeReference:
    values = as_object(found, where, _names(SaeReference), _names(SaeReference))
    return SaeReference(
        **{key: as_text(value, f"{key} of {where}") for key, value in values.items()}
    )


def _edit(found: Any, where: str) -> RecipeEdit:
    values = as_object(found, where, {"site", "op", "target"}, _names(RecipeEdit))
    if values["op"] not in get_args(Op):
        raise UserError(
            f"{where} has op {values['op']!r}; wanted one of {', '.join(get_args(Op))}."
        )
    source = values.get("source")
    strength = values.get("strength")
    return RecipeEdit(
        site=str(parse_site(as_text(values["site"], f"site of {where}"))),
        op=values["op"],
        target=_target(values["target"], where),
        strength=None if strength is None else _strength(strength, where),
        positions=_positions(values.get("positions", "all"), where),
        steps=as_span(values.get("steps"), f"steps of {where}"),
        source=None if source is None else as_text(source, f"source of {where}"),
        rows=_rows(values.get("rows", "conditional"), where),
    )


def _target(found: Any, where: str) -> Target:
    if found == "site":
        return WholeSite()
    kind = next((name for name in TARGETS if isinstance(found, dict) and name in found), None)
    if kind is None:
        raise UserError(
            f'the target of {where} must be {{"feature": n, "sae": key}}, {{"features": [n, ...], '
            '"sae": key}, {"direction": file}, {"neuron": n}, {"neurons": [n, ...]}, {"head": n}, '
            f'{{"sae": key}} or "site"; got {found!r}.'
        )
    target, value = TARGETS[kind]
    needed = {kind} | ({"sae"} & _names(target))
    values = as_object(found, f"target of {where}", needed, _names(target))
    parts: dict[str, Any] = {kind: value(values[kind], f"{kind} of {where}")}
    if "sae" in needed:
        parts["sae"] = as_text(values["sae"], f"sae of the target of {where}")
    if "statistics" in values:
        parts["statistics"] = _statistics(values["statistics"], where)
    return target(**parts)


TARGETS: dict[str, tuple[type, Callable[[Any, str], Any]]] = {
    "feature": (Feature, as_count),
    "features": (Features, as_counts),
    "direction": (FileDirection, as_text),
    "neuron": (Neuron, as_count),
    "neurons": (Neurons, as_counts),
    "head": (Head, as_count),
    "sae": (Reconstruction, as_text),
}
"""Targets by the key that tells them apart, and how its value is read."""


def _statistics(found: Any, where: str) -> Statistics | None:
    if found is None:
        return None
    wanted = _names(Statistics)
    values = as_object(found, f"statistics of {where}", wanted, wanted)
    return Statistics(
        **{k: as_finite(v, f"{k} of the target of {where}") for k, v in values.items()}
    )


def _strength(found: Any, where: str) -> Strength:
    if isinstance(found, int | float) and not isinstance(found, bool):
        return Strength(value=as_finite(found, f"strength of {where}"))
    values = as_object(found, f"strength of {where}", {"value"}, _names(Strength))
    unit = values.get("unit", "raw")
    if unit not in get_args(Unit):
        units = ", ".join(get_args(Unit))
        raise UserError(f"strength of {where} has unit {unit!r}; wanted one of {units}.")
    return Strength(value=as_finite(values["value"], f"strength of {where}"), unit=unit)


def _rows(found: Any, where: str) -> Rows:
    known = ("conditional", "both", "opposed")
    if found not in known:
        raise UserError(f"rows of {where} must be one of {', '.join(known)}; got {found!r}.")
    return found


def _draw(found: Any, where: str) -> DrawConfig:
    values = as_object(found, where, set(), _names(DrawConfig))
    sizes = {
        name: as_whole(values[name], f"{name} of {where}", name != "steps")
        for name in ("steps", "height", "width")
        if name in values
    }
    guidance = as_finite(values.get("guidance", 0.0), f"guidance of {where}")
    return DrawConfig(**sizes, guidance=guidance)  # type: ignore[arg-type]


def _positions(found: Any, where: str) -> Positions:
    if isinstance(found, str) and found in NAMED_POSITIONS:
        return Positions(named=found)
    kinds = PLACED_POSITIONS
    if not isinstance(found, dict) or len(found) != 1 or next(iter(found)) not in kinds:
        raise UserError(
            f"positions of {where} must be one of {', '.join(NAMED_POSITIONS)}, "
            '{"range": [first, end]}, {"text": ...}, {"mask": [...]} or {"canvas": [[...]]}; got '
            f"{found!r}."
        )
    kind, value = next(iter(found.items()))
    if kind == "range":
        return Positions(named=None, range=as_span(value, f"range of {where}", negative=True))
    if kind == "text":
        return Positions(named=None, text=as_text(value, f"text of the positions of {where}"))
    if kind == "canvas":
        return Positions(named=None, canvas=_weights(value, f"canvas of {where}"))
    if isinstance(value, list) and value and all(isinstance(one, bool) for one in value):
        return Positions(named=None, mask=tuple(value))
    return Positions(named=None, mask=_weights(value, f"mask of {where}"))


def _weights(found: Any, where: str) -> tuple[tuple[float, ...], ...]:
    rows = found if isinstance(found, list) else []
    if not rows or not all(
        isinstance(row, list) and row and len(row) == len(rows[0]) and all(map(_is_weight, row))
        for row in rows
    ):
        raise UserError(
            f"{where} must be a list of true and false, a value for each token, or, of an image, "
            "rows of one length of weights from 0 to 1."
        )
    return tuple(tuple(float(weight) for weight in row) for row in rows)


def _is_weight(found: Any) -> bool:
    return isinstance(found, int | float) and 0 <= found <= 1


def _names(kind: type) -> set[str]:
    return {one.name for one in fields(kind)}
