"""A feature's number beside the same number of the random-weight twin's features, in words."""

import math
from collections.abc import Callable, Mapping

from app.wording import number, percent
from saes.feature_reference import SIZES, Reference

SHARES = {"density", "top_token_share"}
"""Numbers that are shown as per cent."""
TWIN_EXPLAINED = (
    "The twin is an SAE trained in the same way on the same model with random weights. Given are "
    "the median of its living features, the range of nine in ten of them, and the share of them "
    "whose number is smaller than this feature's."
)
SIZE_EXPLAINED = (
    "Activations of two models differ in size: the twin's are scaled so that its typical feature "
    "has the mean activation of this SAE's."
)


def share_words(
    reference: Reference, value: float | None, show: Callable[[float], str] = number
) -> str:
    """What the twin's features have, and how many of them have less than `value`.

    "twin: 0.8 %, 0.1 % to 4 %; above 31 % of the twin's features". A feature without the number
    (a dead one has no mean) has no place among them, and only the first part is said; also where
    all are alike to the digits shown, and an order among them would be rounding.
    """
    low, middle, high = (show(at) for at in (reference.low, reference.median, reference.high))
    spread = f"twin: {middle}, {low} to {high}"
    if value is None or not math.isfinite(value) or low == high == show(value):
        return spread
    share = reference.share_below(value)
    shown = f"{100 * share:.0f} %" if 0.01 <= share <= 0.99 else percent(share)
    return f"{spread}; above {shown} of the twin's features"


def twin_words(references: Mapping[str, Reference], name: str, value: float | None) -> str:
    """`share_words` of one of the headline numbers, shown as it is; empty without a reference."""
    if name not in references:
        return ""
    return share_words(references[name], value, percent if name in SHARES else number)


def twin_help(references: Mapping[str, Reference], name: str) -> str:
    """What `twin_words` means, for a tooltip; empty without a reference."""
    if name not in references:
        return ""
    return f"{TWIN_EXPLAINED} {SIZE_EXPLAINED}" if name in SIZES else TWIN_EXPLAINED
