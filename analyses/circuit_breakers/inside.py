"""How far the broken model's states are from what they were: cosine and length, layer by layer.

States are numbered as the paper does: 0 are the embeddings, l the output of block l - 1, the last
one behind the final norm. The layers below the first target are the control: adapters sit there
too, but nothing asks them to move.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from analyses.cells import Frame
from analyses.circuit_breakers.losses import TINY, cosines, lengths
from analyses.circuit_breakers.rows import TokenRow, row_batches
from analyses.circuit_breakers.states import run_states
from probe.language import LanguageModel

BEFORE, AFTER = 12, 40
"""Tokens before and after the beginning of a response that profiles show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of the states of one row's own tokens (those that not all prompts share)."""

    cosine: Float[np.ndarray, "e t"]
    """Cosine with the original state, by entry and token."""
    ratio: Float[np.ndarray, "e t"]
    """Length over the original's."""
    start: int
    """The first token's position, counted from the beginning of the response."""


def changes(
    original: LanguageModel, broken: LanguageModel, rows: Sequence[TokenRow]
) -> Iterator[Change]:
    """What became of each row's states."""
    for some, batch in row_batches(rows):
        with torch.no_grad():
            before, after = (run_states(one, batch).float().cpu() for one in (original, broken))
        cosine = cosines(after, before).numpy()
        ratio = (lengths(after) / lengths(before).clamp(min=TINY)).numpy()
        for i, row in enumerate(some):
            own = slice(max(1, row.shared), len(row.ids))
            yield Change(
                cosine=cosine[:, i, own], ratio=ratio[:, i, own], start=own.start - row.answer
            )


def change_tables(
    original: LanguageModel, broken: LanguageModel, sets: Mapping[str, Sequence[TokenRow]]
) -> dict[str, pd.DataFrame]:
    """Means by layer and row, and the row's last token (`layers`); means by layer and token over
    rows (`profile`)."""
    layers, profiles = [], []
    for name, rows in sets.items():
        found = list(changes(original, broken, rows))
        for number, change in enumerate(found):
            layers.append(
                pd.DataFrame(
                    {
                        "set": name,
                        "row": number,
                        "layer": np.arange(len(change.cosine)),
                        "cosine": change.cosine.mean(1),
                        "last_cosine": change.cosine[:, -1],
                        "log_ratio": np.log(change.ratio.clip(TINY)).mean(1),
                    }
                )
            )
        profiles.append(_profile(found).assign(set=name))
    return {"layers": pd.concat(layers), "profile": pd.concat(profiles)}


def _profile(found: Sequence[Change]) -> pd.DataFrame:
    """Mean cosine and log length ratio at each place around the beginning of the response."""
    parts = []
    for change in found:
        places = change.start + np.arange(change.cosine.shape[1])
        inside = (places >= -BEFORE) & (places < AFTER)
        entries = len(change.cosine)
        parts.append(
            pd.DataFrame(
                {
                    "layer": np.repeat(np.arange(entries), inside.sum()),
                    "place": np.tile(places[inside], entries),
                    "cosine": change.cosine[:, inside].ravel(),
                    "log_ratio": np.log(change.ratio[:, inside].clip(TINY)).ravel(),
                }
            )
        )
    together: Frame = pd.concat(parts)
    return together.groupby(["layer", "place"], as_index=False).mean()
