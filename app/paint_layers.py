"""The layers of a painting: each a feature, its strength and a mask, an edit of one recipe.

A painting is nothing but a recipe of images; these functions change its document. An edit of
another kind, which a recipe from elsewhere may have, is a layer that is run and not painted.
"""

import copy
from collections.abc import Collection
from typing import Any

from app.data import SaeRecord
from app.image_input import Asked
from app.mask_canvas import Rows

Document = dict[str, Any]
STRENGTH, MOST = 10.0, 40.0
"""In the feature's mean: the brush of Surkov et al. 2024 (2410.22366) begins with 10 of 40."""


def new_painting(record: SaeRecord, feature: int, asked: Asked) -> Document:
    """A recipe with one layer, nothing painted on it yet."""
    described = record.run.config["model"]
    document: Document = {
        "schema": 2,
        "name": f"paint with feature {feature}",
        "note": "",
        "model": {"spec": described["spec"], "random_weights": described.get("random_weights")},
        "saes": {},
        "edits": [],
    }
    document["edits"].append(new_layer(document, record, feature, asked))
    return drawn_as(document, asked)


def new_layer(document: Document, record: SaeRecord, feature: int, asked: Asked) -> Document:
    """An edit that paints with a feature; its SAE is named in the document."""
    edit: Document = {
        "site": record.run.config["site"],
        "op": "add",
        "target": {"feature": feature, "sae": sae_key(document, record)},
        "strength": {"value": STRENGTH, "unit": "mean"},
        "positions": {"canvas": [[0.0]]},
        "steps": None,
    }
    # With guidance, what is added where the prompt is read is taken off where nothing is.
    return edit | ({"rows": "opposed"} if asked.guided else {})


def sae_key(document: Document, record: SaeRecord) -> str:
    """The key of an SAE in a document, which names it from here on."""
    weights = record.run.manifest["files"]["sae_weights.safetensors"]["sha256"]
    for key, known in document["saes"].items():
        if known["weights"] == weights:
            return key
    site, taken = record.run.config["site"], document["saes"]
    names = (site if n == 1 else f"{site}-{n}" for n in range(1, len(taken) + 2))
    key = next(name for name in names if name not in taken)
    taken[key] = {"name": record.name, "weights": weights}
    return key


def record_of(
    document: Document, edit: Document, records: Collection[SaeRecord]
) -> SaeRecord | None:
    """The SAE of a layer, known by its weights; None where it is not there."""
    known = document["saes"][edit["target"]["sae"]]
    files = ((one, one.run.manifest["files"]) for one in records)
    return next(
        (one for one, f in files if f["sae_weights.safetensors"]["sha256"] == known["weights"]),
        None,
    )


def drawn_as(document: Document, asked: Asked) -> Document:
    """The recipe of an image: with its prompt, seed and settings, and no SAE that nothing uses."""
    used = {e["target"]["sae"] for e in document["edits"] if isinstance(e["target"], dict)
            and "sae" in e["target"]}  # fmt: skip
    return copy.deepcopy(document) | {
        "saes": {key: value for key, value in document["saes"].items() if key in used},
        "draw": asked.draw,
        "prompts": [asked.prompt],
        "seeds": [asked.seed],
    }


def asked_of(document: Document) -> Asked | None:
    """The image that a recipe was made on; None where it names no prompt."""
    if not document.get("prompts"):
        return None
    seeds = document.get("seeds") or [Asked(prompt="").seed]
    return Asked(prompt=document["prompts"][0], seed=seeds[0], **document["draw"])


def is_painted(edit: Document) -> bool:
    """Whether an edit is a layer that can be painted: a feature added."""
    return edit["op"] == "add" and "feature" in edit["target"]


def mask_of(edit: Document, grid: tuple[int, int]) -> Rows:
    """What is painted on a layer: its own rows, or the whole feature map; no place of a new one."""
    positions = edit["positions"]
    if not isinstance(positions, dict):
        return filled(grid, 1.0)
    rows = tuple(tuple(map(float, row)) for row in next(iter(positions.values())))
    return filled(grid, 0.0) if not any(map(any, rows)) else rows


def positions_of(mask: Rows) -> Any:
    """A mask as a recipe says it."""
    if all(weight == 1 for row in mask for weight in row):
        return "all"
    return {"canvas": [list(row) for row in mask]}


def filled(grid: tuple[int, int], weight: float) -> Rows:
    """The same weight at all places."""
    return ((weight,) * grid[1],) * grid[0]


def union(masks: Collection[Rows]) -> Rows | None:
    """The larger weight of some masks of one shape, place by place; None of none."""
    if not masks:
        return None
    return tuple(tuple(map(max, *rows, rows[0])) for rows in zip(*masks, strict=True))


def unpainted(document: Document) -> list[int]:
    """Numbers of the layers, from 0, on which no place is painted."""
    return [
        number
        for number, edit in enumerate(document["edits"])
        if isinstance(edit["positions"], dict)
        and not any(map(any, next(iter(edit["positions"].values()))))
    ]


def target_words(edit: Document) -> str:
    """What a layer changes, in a few words."""
    target = edit["target"]
    if target == "site":
        return "the whole block"
    kind = next((name for name in target if name not in ("sae", "statistics")), None)
    if kind is None:
        return "what its SAE says"
    value = target[kind]
    return f"{len(value)} {kind}" if isinstance(value, list) else f"{kind} {value}"


def strength_words(edit: Document) -> str:
    """How much, in a few words; empty where there is no strength."""
    strength = edit.get("strength")
    if strength is None:
        return ""
    return f"{strength['value']:g}{'' if strength['unit'] == 'raw' else ' x ' + strength['unit']}"
