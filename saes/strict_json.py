"""Values of parsed JSON, each of the kind that was wanted, or a `UserError` that says where."""

import math
from typing import Any

from probe.errors import UserError


def as_dict(found: Any, where: str) -> dict[str, Any]:
    """A JSON object. Raises `UserError` for anything else."""
    if not isinstance(found, dict):
        raise UserError(f"{where} must be a JSON object; got {type(found).__name__}.")
    return found


def as_object(found: Any, where: str, needed: set[str], known: set[str]) -> dict[str, Any]:
    """A JSON object with the needed keys and no unknown one. Raises `UserError` otherwise."""
    values = as_dict(found, where)
    if unknown := sorted(set(values) - known):
        raise UserError(
            f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}."
        )
    if missing := sorted(needed - set(values)):
        raise UserError(f"{where} lacks {missing[0]!r}; add it.")
    return values


def as_text(found: Any, where: str) -> str:
    """A text. Raises `UserError` for anything else."""
    if not isinstance(found, str):
        raise UserError(f"{where} must be a text; got {found!r}.")
    return found


def as_texts(found: Any, where: str) -> tuple[str, ...]:
    """A list of texts. Raises `UserError` for anything else."""
    if not isinstance(found, list):
        raise UserError(f"{where} must be a list of texts; got {found!r}.")
    return tuple(as_text(value, where) for value in found)


def as_truth(found: Any, where: str) -> bool:
    """True or false. Raises `UserError` for anything else."""
    if not isinstance(found, bool):
        raise UserError(f"{where} must be true or false; got {found!r}.")
    return found


def as_whole(found: Any, where: str, optional: bool) -> int | None:
    """A whole number, or None where `optional`. Raises `UserError` for anything else."""
    if optional and found is None:
        return None
    if not isinstance(found, int) or isinstance(found, bool):
        raise UserError(f"{where} must be a whole number; got {found!r}.")
    return found


def as_counts(found: Any, where: str) -> tuple[int, ...]:
    """A list of one whole number from 0 on or more, each once. Raises `UserError` otherwise."""
    if not isinstance(found, list) or not found:
        raise UserError(f"{where} must be a list of one whole number or more; got {found!r}.")
    counts = tuple(as_count(value, where) for value in found)
    if len(set(counts)) < len(counts):
        raise UserError(f"{where} must name each once; got {found!r}.")
    return counts


def as_count(found: Any, where: str) -> int:
    """A whole number from 0 on. Raises `UserError` for anything else."""
    value = as_whole(found, where, False)
    assert value is not None
    if value < 0:
        raise UserError(f"{where} must be 0 or more; got {value}.")
    return value


def as_finite(found: Any, where: str) -> float:
    """A finite number. Raises `UserError` for anything else."""
    number = isinstance(found, int | float) and not isinstance(found, bool)
    if not number or not math.isfinite(found):
        raise UserError(f"{where} must be a finite number; got {found!r}.")
    return float(found)


def as_span(found: Any, where: str, *, negative: bool = False) -> Any:
    """`[first, end]`, end excluded, or null for no end; None where there is none."""
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2:
        raise UserError(f"{where} must be [first, end], end excluded or null; got {found!r}.")
    first, end = as_whole(found[0], where, False), as_whole(found[1], where, True)
    assert first is not None
    same_side = end is not None and (first < 0) == (end < 0)
    if (not negative and first < 0) or (same_side and end is not None and end <= first):
        raise UserError(f"{where} must name one or more, counted from 0; got {found!r}.")
    return (first, end)
