"""Remedies for collapse, compared by what they do to the last digit's margin.

All are asked the copying question with the sequence first and the other digit last (`behaviour`):

- a hint that the last digit need not be the usual one; commas behind every third digit;
- a window of attention, with the first token kept visible or not;
- a number format, from exact arithmetic to int8;
- a separator *feature*: the feature of an SAE that fires at commas rather than at digits, set
  behind every third digit to what it is at commas, without any comma in the text. Beside it,
  changes of the same size at the same tokens along random directions and random other features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from analyses.cells import Frame
from analyses.collapse.behaviour import GROUP, Asked, copying_frame, margins
from analyses.collapse.families import find_family
from analyses.collapse.prompts import grow
from analyses.dose_cells import living
from probe.attention import Sink, Visible
from probe.capture import capturing
from probe.interventions import Coordinate, Edit, Turned, Where, applying
from probe.language import LanguageModel
from probe.rounding import Format
from probe.sites import parse_site
from saes.recipe_saes import LoadedSae, Reader

BASELINE = "none"
LAST = Asked(end="last")
ASKED = {
    BASELINE: LAST,
    "hint": Asked(end="last", hint=True),
    "commas": Asked(end="last", separators=True),
}
WINDOW_SINKS: tuple[Sink, ...] = ("like others", "kept")
"""What happens to the first token under a window."""
SEPARATED = 60
"""Ones in the text at whose commas the separator feature is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Separator:
    """The feature of an SAE that fires at commas between digits."""

    sae: str
    """The SAE's name."""
    feature: int
    """Its number."""
    value: float
    """Its mean value at commas."""
    elsewhere: float
    """Its mean value at the digits."""
    share: float
    """Length of what it adds at commas, over the mean length of the stream there."""


def find_separator(model: LanguageModel, name: str, loaded: LoadedSae) -> Separator:
    """The feature whose mean value at commas exceeds that at digits by most."""
    growing = grow(model, find_family("commas"), SEPARATED)
    inside = growing.trunk[growing.ends[0] :]
    commas = inside != inside[0]
    site = parse_site(loaded.site)
    with torch.no_grad(), capturing(model, [site]) as seen:
        model.run(growing.trunk[None])
        x = seen[site][0, growing.ends[0] :]
        codes = loaded.sae.encode(x.float()).dense(loaded.sae.config.d_sae)
    at, elsewhere = codes[commas].mean(0), codes[~commas].mean(0)
    feature = int((at - elsewhere).argmax())
    size = float(at[feature] * loaded.sae.W_dec[feature].norm())
    return Separator(
        sae=name, feature=feature, value=float(at[feature]), elsewhere=float(elsewhere[feature]),
        share=size / float(x[commas].norm(dim=-1).mean()),
    )  # fmt: skip


def strongest_separator(
    model: LanguageModel, saes: Mapping[str, LoadedSae]
) -> tuple[Separator, LoadedSae]:
    """Of all SAEs the separator feature that adds most, relative to the stream."""
    found = [find_separator(model, name, loaded) for name, loaded in saes.items()]
    best = max(found, key=lambda separator: separator.share)
    return best, saes[best.sae]


def plain_margins(
    model: LanguageModel, pair: tuple[int, int], lengths: Sequence[int]
) -> pd.DataFrame:
    """Margins of the remedies that are asked for: none, a hint, commas."""
    found = margins(model, pair, list(ASKED.values()), lengths)
    return _named(found, [name for name in ASKED for _ in lengths])


def windowed_margins(
    model: LanguageModel, pair: tuple[int, int], lengths: Sequence[int], windows: Sequence[int]
) -> Iterator[pd.DataFrame]:
    """Margins under windows of attention."""
    for window in windows:
        for sink in WINDOW_SINKS:
            visible = Visible(window=window, sink=sink)
            found = margins(model, pair, [LAST], lengths, visible=visible)
            yield _named(found, visible.name)


def margins_in_format(
    rounded: LanguageModel, format: Format, pair: tuple[int, int], lengths: Sequence[int]
) -> pd.DataFrame:
    """Margins of a model whose rounding is emulated (`probe.rounding.rounded_model`)."""
    return _named(margins(rounded, pair, [LAST], lengths), format)


def _named(found: Frame, remedy: str | list[str], control: int = 0) -> pd.DataFrame:
    """Margins under their remedy's name."""
    columns = {"remedy": remedy, "control": control, "n": found["n"], "margin": found["margin"]}
    return pd.DataFrame(columns)


# ------------------------------------------------------------------------- the separator feature


def clamped_margins(
    model: LanguageModel,
    separator: Separator,
    loaded: LoadedSae,
    pair: tuple[int, int],
    lengths: Sequence[int],
    *,
    controls: int,
    seed: int,
) -> Iterator[pd.DataFrame]:
    """Margins with the separator feature set behind every third digit, and with its controls.

    Yields tables of `remedy` (`separator feature`, `random direction`, `random feature`),
    `control` (its number), `n`, `margin`.
    """
    reader = Reader(loaded.sae)
    own = Coordinate(
        vector=loaded.sae.W_dec[separator.feature].detach().float().cpu(),
        read=lambda x: reader.feature(separator.feature, x),
    )
    turned: list[tuple[str, int, Coordinate | Turned]] = [("separator feature", 0, own)]
    for kind, directions in _controls(loaded, separator.feature, controls, seed).items():
        turned += [
            (kind, i, Turned(component=own, direction=way)) for i, way in enumerate(directions)
        ]
    for remedy, control, component in turned:
        for n in lengths:
            edit = Edit(
                site=parse_site(loaded.site), component=component, op="set",
                where=Where(prompt=ends_of_groups(model, pair, n)),
                value=torch.tensor([separator.value]),
            )  # fmt: skip
            with applying(model, [edit]):
                found = margins(model, pair, [LAST], [n])
            yield _named(found, remedy, control)


def ends_of_groups(model: LanguageModel, pair: tuple[int, int], n: int) -> torch.Tensor:
    """The tokens of a prompt of n digits that a comma would follow; bool, up to the last digit."""
    before, _, _ = copying_frame(model, pair, LAST)
    chosen = torch.zeros(len(before) + n - 1, dtype=torch.bool)
    chosen[len(before) + GROUP - 1 :: GROUP] = True
    return chosen


def _controls(
    loaded: LoadedSae, feature: int, n: int, seed: int
) -> dict[str, list[Float[Tensor, " d"]]]:
    """Directions of length 1: drawn, and of other features that fire."""
    generator = torch.Generator().manual_seed(seed)
    width = loaded.sae.W_dec.shape[1]
    drawn = [torch.randn(width, generator=generator) for _ in range(n)]
    others = living(loaded, feature, n, generator)
    rows = [loaded.sae.W_dec[other].detach().float().cpu() for other in others]
    return {
        "random direction": [functional.normalize(row, dim=0) for row in drawn],
        "random feature": [functional.normalize(row, dim=0) for row in rows],
    }
