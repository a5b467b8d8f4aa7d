"""The form that makes a recipe: an edit a box, as the recipe's JSON before and after.

What a person types is only put into the document; whether it makes sense is for `saes.recipes` to
say, in its sentence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from app import views
from probe.errors import UserError

OPS = {
    "add": "Add",
    "set": "Set to",
    "scale": "Scale by",
    "clamp": "Clamp within",
    "zero": "Set to zero",
    "mean_ablate": "Set to its mean",
    "patch": "Patch from another prompt",
    "project_out": "Project out",
    "transport": "Transport from another prompt",
    "reconstruct": "Reconstruct",
}
UNITS = {"raw": "raw", "mean": "x mean", "max": "x max", "sd": "x sd"}
TARGETS = {
    "feature": "Feature of an SAE",
    "features": "Features of an SAE",
    "sae": "All that an SAE says",
    "direction": "Direction from a file",
    "neuron": "Neuron",
    "neurons": "Neurons",
    "head": "Head",
    "site": "Whole site",
}
POSITIONS = {
    "all": "all",
    "prompt": "the prompt",
    "generated": "generated ones",
    "last": "the prompt's last",
    "range": "a range of the prompt",
    "text": "tokens of a text",
    "mask": "tokens picked below",
}
WITH_STRENGTH = ("add", "set", "scale", "clamp", "transport")
FACTORS = ("scale", "transport")
WITH_SOURCE = ("patch", "transport")
Document = dict[str, Any]


def edit_form(
    edit: Document, saes: Mapping[str, str], tokens: Sequence[str], *, key: str
) -> Document:
    """The widgets of one edit, and the edit as they say it.

    Args:
        edit: the edit as it is in the recipe.
        saes: name of each SAE by its key in the recipe.
        tokens: the prompt's tokens as text, to pick from.
        key: begins the widgets' keys; another one forgets what was typed.
    """
    target, positions = edit["target"], edit.get("positions", "all")
    # An SAE's key stands beside its features: alone, all of it is meant.
    kinds = [name for name in TARGETS if name != "sae" and name in target] or ["sae"]
    kind = "site" if target == "site" else kinds[0]
    first = st.columns([4, 3, 4, 4], vertical_alignment="bottom")
    op = first[0].selectbox(
        "Operation", list(OPS), index=list(OPS).index(edit["op"]), key=f"{key}-op",
        format_func=OPS.__getitem__,
    )  # fmt: skip
    new_kind = first[1].selectbox(
        "Target", list(TARGETS), index=list(TARGETS).index(kind), key=f"{key}-target",
        format_func=TARGETS.__getitem__,
    )  # fmt: skip
    with first[2]:
        new_target = _target(new_kind, target if new_kind == kind else {}, saes, key)
    site = first[3].text_input("Site", edit["site"], key=f"{key}-site")
    made: Document = {"site": site, "op": op, "target": new_target}
    second = st.columns([2, 2, 3, 3, 2], vertical_alignment="bottom")
    if op in WITH_STRENGTH:
        made["strength"] = _strength(op, edit.get("strength"), second[0], second[1], key)
    if op in WITH_SOURCE:
        made["source"] = second[1 if op in WITH_STRENGTH else 0].text_input(
            "From the prompt", edit.get("source", ""), key=f"{key}-source"
        )
    made["positions"] = _positions(positions, tokens, second[2], second[3], key)
    made["steps"] = _steps(edit.get("steps"), second[4], key)
    return made


def _target(kind: str, target: Any, saes: Mapping[str, str], key: str) -> Any:
    known = target if isinstance(target, dict) else {}
    if kind == "site":
        st.text_input("All of it", "", disabled=True, key=f"{key}-whole")
        return "site"
    if kind == "direction":
        file = st.text_input("File", known.get("direction", ""), key=f"{key}-direction")
        return {"direction": file} | _kept(known, file == known.get("direction"))
    if kind == "sae":
        chosen = st.selectbox("SAE", list(saes), key=f"{key}-whole-sae")
        return {"sae": chosen or ""}
    if kind in ("features", "neurons"):
        shown = ", ".join(map(str, known.get(kind, [0])))
        typed = st.text_input(f"{kind.capitalize()}, with commas", shown, key=f"{key}-numbers")
        of_sae = {"sae": known.get("sae") or next(iter(saes), "")} if kind == "features" else {}
        return {kind: parsed_numbers(typed)} | of_sae
    label = {"feature": "Feature", "neuron": "Neuron", "head": "Head"}[kind]
    number = int(st.number_input(label, 0, None, int(known.get(kind, 0)), key=f"{key}-number"))
    made: Document = {kind: number}
    if kind == "feature":
        made["sae"] = known.get("sae") or next(iter(saes), "")
        if len(saes) > 1:
            made["sae"] = st.selectbox(
                "of", list(saes), index=list(saes).index(made["sae"]), key=f"{key}-sae"
            )
    return made | _kept(known, number == known.get(kind) and made.get("sae") == known.get("sae"))


def _kept(known: Mapping[str, Any], same: bool) -> Document:
    """The statistics of a target, as long as it is the same."""
    return {"statistics": known["statistics"]} if same and "statistics" in known else {}


def _strength(op: str, strength: Any, value_at: Any, unit_at: Any, key: str) -> Document:
    known = strength or {"value": 1.0, "unit": "raw" if op in FACTORS else "max"}
    value = value_at.number_input(
        "Strength", value=float(known["value"]), step=0.1, format="%g", key=f"{key}-value"
    )
    if op in WITH_SOURCE:
        return {"value": value, "unit": "raw"}
    units = ["raw"] if op in FACTORS else list(UNITS)
    unit = unit_at.selectbox(
        "Unit", units, index=units.index(known["unit"]) if known["unit"] in units else 0,
        format_func=UNITS.__getitem__, key=f"{key}-unit-{op == 'scale'}",
        help="raw: the activation's own units; the others are times the target's mean, largest "
        "or standard deviation (of a feature: over the tokens it fires on).",
    )  # fmt: skip
    return {"value": value, "unit": unit}


def _positions(positions: Any, tokens: Sequence[str], kind_at: Any, more_at: Any, key: str) -> Any:
    kind = positions if isinstance(positions, str) else next(iter(positions))
    chosen = kind_at.selectbox(
        "Tokens", list(POSITIONS), index=list(POSITIONS).index(kind), key=f"{key}-positions",
        format_func=POSITIONS.__getitem__,
        help="Position 0 and special tokens are left alone, unless picked.",
    )  # fmt: skip
    known = positions.get(chosen) if isinstance(positions, dict) else None
    if chosen == "range":
        text = more_at.text_input(
            "From : to", span_text(known or [1, None]), key=f"{key}-range",
            help="Positions of the prompt, the end not included; -1 is the last token. 1: is all "
            "but the first.",
        )  # fmt: skip
        return {"range": parsed_span(text)}
    if chosen == "text":
        return {"text": more_at.text_input("Text", known or "", key=f"{key}-text")}
    if chosen == "mask":
        before = [i for i, on in enumerate(known or []) if on is True and i < len(tokens)]
        picked = st.pills(
            "Tokens of the prompt", range(len(tokens)), selection_mode="multi", default=before,
            format_func=lambda place: views.pill(str(tokens[place])),
            key=f"{key}-mask-{len(tokens)}",
        )  # fmt: skip
        return {"mask": [place in picked for place in range(len(tokens))]}
    return chosen


def _steps(steps: Any, at: Any, key: str) -> Any:
    text = at.text_input(
        "Steps", span_text(steps), key=f"{key}-steps", placeholder="all",
        help="From : to, the end not included. Step 0 reads the prompt, step n the n-th generated "
        "token. Empty for all.",
    )  # fmt: skip
    return parsed_span(text) if text.strip() else None


def parsed_numbers(text: str) -> list[int]:
    """`3, 5` as `[3, 5]`. Raises `UserError` where it is no list of whole numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{text!r} is no list of whole numbers: wanted some as 3, 5.") from error


def span_text(span: Sequence[int | None] | None) -> str:
    """`[1, 5]` as `1:5`, `[1, None]` as `1:`; empty for none."""
    if span is None:
        return ""
    first, end = span
    return f"{first}:{'' if end is None else end}"


def parsed_span(text: str) -> list[int | None]:
    """`1:5` as `[1, 5]`. Raises `UserError` where it is neither that nor `1:`."""
    first, colon, end = text.partition(":")
    try:
        return [int(first), int(end) if end.strip() or not colon else None]
    except ValueError as error:
        raise UserError(
            f"{text!r} is no range: wanted from:to, as 1:5, or from:, as 1:."
        ) from error
