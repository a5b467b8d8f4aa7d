"""Numbers and tokens as a person reads them. All text becomes HTML through `escaped` only."""

import functools
import html
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Unit = Literal["tokens", "places"]
"""What a feature fires on: tokens of texts, places of images."""
RETURN = "\u21b5"
DASH = "\u2013"


def visible(token: str) -> str:
    """A token with its line breaks and control characters made visible, spaces kept."""
    shown = token.replace("\r", "").replace("\n", RETURN)
    return "".join(
        character if character == RETURN or character.isprintable() else repr(character)[1:-1]
        for character in shown
    )


@functools.lru_cache(maxsize=1 << 17)
def spaced(token: str) -> str:
    """A token for a list or a label: visible, with leading and trailing spaces shown as dots."""
    shown = visible(token)
    lead = len(shown) - len(shown.lstrip(" "))
    if lead == len(shown):
        return "\u00b7" * lead or "(empty)"
    trail = len(shown) - len(shown.rstrip(" "))
    return "\u00b7" * lead + shown.strip(" ") + "\u00b7" * trail


def token_list(tokens: Iterable[str] | None, count: int = 5) -> str:
    """The first tokens of a list in one line; empty where there are none."""
    return "" if tokens is None else "  ".join(map(spaced, itertools.islice(tokens, count)))


def markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~:$])", r"\\\1", text)


def pill(token: str) -> str:
    """A token as the label of a button."""
    return markdown(spaced(token))


def escaped(text: Any) -> str:
    """Any text, safe to stand in HTML."""
    return html.escape(str(text))


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def fact(value: Any) -> str:
    """Any plain value as a person would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(fact(item) for item in value)
    return str(value)


def number(value: float | int | None) -> str:
    """Three significant digits, with a real minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    size = abs(value)
    if size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 0.001 or size == 0:
        text = f"{value:.3g}"
    else:
        text = f"{value:.1e}"
    return text.replace("-", "\u2212", 1) if value < 0 else text


def percent(share: float | int | None) -> str:
    """A share as per cent with a sensible number of digits; a dash where there is none."""
    if share is None or not math.isfinite(share):
        return DASH
    hundred = 100 * share
    if 0 < abs(hundred) < 0.001:
        return "<0.001 %"
    digits = 1 if abs(hundred) >= 10 else 2 if abs(hundred) >= 1 else 3
    return f"{hundred:.{digits}f}".rstrip("0").rstrip(".") + " %"


def short(count: float | int | None) -> str:
    """A count with k, M or G."""
    if count is None:
        return DASH
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(count) >= size:
            scaled = count / (1e3 if letter == " k" else size)
            return f"{scaled:.3g}{letter}"
    return f"{count:,.0f}"
