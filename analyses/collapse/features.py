"""Collapse in feature space: which features still tell n repetitions from n + 1, and which count.

Looked at are the units of every layer's MLP, which need no training, and the features of SAEs where
some are given. At the last token, with f its value at n and f* at n + 1:

- a feature is *active* where |f| or |f*| is above the root mean square of all features there;
- an active one *tells* where |f - f*| > 0.1 max(|f|, |f*|), and *differs in bfloat16* where the two
  are different numbers in that format;
- a feature *keeps a count* where its value follows n in rank over all lengths from 10 on, in every
  phrasing and in one direction (|rho| > 0.9), and its range is over half of its largest value. A
  feature may follow the position instead: the same is asked of random digits as long, where there
  is nothing to count.

The *last telling length* of a layer is the largest n at which any of its features tells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from analyses.collapse.curves import Condition
from analyses.collapse.prompts import Merged, grow
from probe.growing import Say, read_last_tokens
from probe.language import LanguageModel
from probe.sites import Site, parse_site
from saes.recipe_saes import LoadedSae

TELLS = 0.1
"""Smallest relative change that tells n from n + 1."""
FOLLOWS = 0.9
"""Rank correlation with n from which on a feature follows it."""
RANGE = 0.5
"""Part of its largest value that such a feature varies by."""
FROM = 10
"""Shortest length at which counting is looked at."""
MLP = "MLP units"


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """Feature values at the last token of each pair."""

    source: str
    """What the features are of: `MLP units`, or an SAE's name."""
    layer: int
    """The layer."""
    at_n: Float[Tensor, "n f"]
    """With n repetitions."""
    one_more: Float[Tensor, "n f"]
    """With n + 1."""


def feature_values(
    model: LanguageModel,
    condition: Condition,
    lengths: Sequence[int],
    saes: Mapping[str, LoadedSae],
    *,
    unit: int,
    merged: Merged,
    say: Say | None = None,
) -> list[Values]:
    """Every layer's MLP units and every SAE's features, at n and n + 1 repetitions."""
    growing = grow(
        model, condition.family, max(lengths) + 1, form=condition.form, phrasing=unit, seed=unit,
        merged=merged,
    )  # fmt: skip
    units = [parse_site(f"mlp_act.{layer}") for layer in range(model.n_layers)]
    read: list[Site] = [parse_site(one.site) for one in saes.values()]
    last = read_last_tokens(
        model, growing.trunk, growing.pairs(lengths), [*units, *dict.fromkeys(read)],
        visible=condition.visible, say=say,
    )  # fmt: skip
    found = [
        Values(source=MLP, layer=layer, at_n=rows[::2], one_more=rows[1::2])
        for layer, rows in enumerate(last.values[site] for site in units)
    ]
    for name, one in saes.items():
        site = parse_site(one.site)
        rows = last.values[site].to(one.sae.W_dec.device)
        with torch.no_grad():
            codes = one.sae.encode(rows).dense(one.sae.config.d_sae).cpu()
        assert site.layer is not None, "only SAEs of a layer are taken"
        found.append(Values(source=name, layer=site.layer, at_n=codes[::2], one_more=codes[1::2]))
    return found


def telling(values: Values, lengths: Sequence[int]) -> pd.DataFrame:
    """How many features tell, by length: `n`, `active`, `tell`, `differ_in_bfloat16`."""
    a, b = values.at_n, values.one_more
    larger = torch.maximum(a.abs(), b.abs())
    active = larger > a.square().mean(-1, keepdim=True).sqrt()
    tells = active & ((a - b).abs() > TELLS * larger)
    differs = active & (a.bfloat16() != b.bfloat16())
    return pd.DataFrame(
        {
            "source": values.source, "layer": values.layer, "n": list(lengths),
            "active": active.sum(-1).numpy(), "tell": tells.sum(-1).numpy(),
            "differ_in_bfloat16": differs.sum(-1).numpy(),
        }
    )  # fmt: skip


def counters(by_unit: Sequence[Values], lengths: Sequence[int]) -> Float[np.ndarray, " f"]:
    """For each feature the rank correlation with n that is weakest over the phrasings; 0 for one
    that changes direction between them, or whose range is small in one."""
    chosen = np.array([n >= FROM for n in lengths])
    n = np.array(lengths)[chosen]
    rhos = np.stack([_rank_correlations(n, one.at_n.numpy()[chosen]) for one in by_unit])
    same_way = (np.sign(rhos) == np.sign(rhos[0])).all(0)
    return np.where(same_way, np.sign(rhos[0]) * np.abs(rhos).min(0), 0.0)


def _rank_correlations(n: np.ndarray, values: Float[np.ndarray, "n f"]) -> Float[np.ndarray, " f"]:
    """Spearman's correlation of each column with n; 0 where a column's range is small."""
    largest = np.abs(values).max(0)
    varied = (np.ptp(values, 0) > RANGE * largest) & (largest > 0)
    ranks = stats.rankdata(values[:, varied], axis=0)
    ranks = ranks - ranks.mean(0)
    by_n = stats.rankdata(n) - (len(n) + 1) / 2
    found = np.zeros(values.shape[1])
    norms = np.sqrt((ranks**2).sum(0) * (by_n**2).sum())
    found[varied] = (by_n @ ranks) / norms
    return found
