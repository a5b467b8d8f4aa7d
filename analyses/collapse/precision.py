"""The same pairs in number formats: when do they become equal, and how coarse is the format itself?

Two numbers decide: how far apart n and n + 1 repetitions are in a format, and how far the format
takes one prompt from what exact arithmetic makes of it, its rounding floor. Below the floor a pair
may still differ in its bits, but what differs is rounding. Formats are emulated
(`probe.rounding`), so that equal means equal on every processor.
"""

from collections.abc import Sequence

import pandas as pd

from analyses.collapse.curves import Condition, final_site, relative
from analyses.collapse.prompts import Merged, grow
from probe.growing import LastTokens, Say, read_last_tokens
from probe.language import LanguageModel


def read_pairs(
    model: LanguageModel,
    condition: Condition,
    lengths: Sequence[int],
    *,
    unit: int,
    merged: Merged,
    say: Say | None = None,
) -> LastTokens:
    """The final norm's output and the logits at n and n + 1, one after the other."""
    growing = grow(
        model, condition.family, max(lengths) + 1, form=condition.form, phrasing=unit, seed=unit,
        merged=merged,
    )  # fmt: skip
    return read_last_tokens(
        model, growing.trunk, growing.pairs(lengths), [final_site(model)],
        visible=condition.visible, say=say,
    )  # fmt: skip


def in_format(
    model: LanguageModel, last: LastTokens, exact: LastTokens, lengths: Sequence[int]
) -> pd.DataFrame:
    """What a format makes of each pair.

    Args:
        model: the model.
        last: the pairs in the format.
        exact: the same in float64.
        lengths: numbers of repetitions.

    Returns:
        A row a length: `n`, `distance` of the pair in the format; `floor`, the mean relative
        distance of its two prompts from their exact values; `equal_coordinates`, the share of the
        final norm's coordinates that are equal bit for bit; `same_hidden`, `same_logits`,
        `same_top`: whether all are, and whether the likeliest next token is the same.
    """
    site = final_site(model)
    y, true = last.values[site], exact.values[site]
    errors = relative(true, y)
    coordinates = y[::2] == y[1::2]
    top = last.logits.argmax(-1)
    return pd.DataFrame(
        {
            "n": list(lengths),
            "distance": relative(y[::2], y[1::2]).numpy(),
            "floor": ((errors[::2] + errors[1::2]) / 2).numpy(),
            "equal_coordinates": coordinates.double().mean(-1).numpy(),
            "same_hidden": coordinates.all(-1).numpy(),
            "same_logits": (last.logits[::2] == last.logits[1::2]).all(-1).numpy(),
            "same_top": (top[::2] == top[1::2]).numpy(),
        }
    )


def equal_from(lengths: Sequence[int], equal: Sequence[bool]) -> int | None:
    """The length from which on all pairs are equal; None where the last is not."""
    from_here = None
    for n, same in sorted(zip(lengths, equal, strict=True), reverse=True):
        if not same:
            break
        from_here = n
    return from_here
