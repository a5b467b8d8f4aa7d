"""What the numbers of a feature mean: their distribution over the features of another SAE.

A control for every headline number of a feature: how the same number is spread over the living
features of an SAE that was trained in the same way on the same model with random weights (the twin;
Heap et al. 2025, 2501.17727, find that much of what is said of SAE features holds there, too).

Shares, cosines and Jaccard's measure compare as they are. Sizes of codes do not: they go with the
norm of what the SAE reads, which differs between models. An SAE's unit is therefore its *typical
code*: the median over its living features of their mean code. It goes up with every code when the
activations do, and neither a few dense features nor what is common to all rows, which `b_dec` takes
up, moves it (the mean norm of the site is mostly that). `mean_relative`, `sd_relative` and
`max_relative` are in this unit, and where two SAEs are compared the other one's `mean`, `sd` and
`max` are given as they would be with this SAE's typical code. Likewise `n_active`, with as many
rows. `mean_relative` has the median 1 in every SAE: only its spread says anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float

from probe.separation import separation
from saes.feature_queries import FeatureIndex

SIZES = ("mean", "sd", "max")
"""Numbers in units of the codes."""
TELLING = 0.1
"""How far from .5 an AUROC has to be for a number to tell two SAEs' features apart."""
COMPARED = 1000
"""Features of each SAE that an AUROC is taken on: enough to know it to about .02."""
HEADLINES = (
    "density", "n_active", "max", "mean", "sd", "max_relative", "mean_relative", "sd_relative",
    "nearest_cosine", "decoder_norm", "encoder_decoder_cosine", "top_token_share", "top_jaccard",
)  # fmt: skip
"""Numbers of a feature that have a reference. `top_token_share`: share of its summed activation on
the token that has most of it; `top_jaccard`: of the feature that fires together with it most, 0
where the index lists none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """How one number is spread over the living features of an SAE."""

    values: Float[np.ndarray, " n"]
    """The number of every feature that has it, smallest first; at least one."""

    @property
    def n(self) -> int:
        """Features."""
        return len(self.values)

    @property
    def median(self) -> float:
        """The middle one."""
        return float(np.median(self.values))

    @property
    def low(self) -> float:
        """The 5 % quantile, interpolated linearly."""
        return float(np.quantile(self.values, 0.05))

    @property
    def high(self) -> float:
        """The 95 % quantile, interpolated linearly."""
        return float(np.quantile(self.values, 0.95))

    def share_below(self, value: float) -> float:
        """The share of the features whose number is smaller than `value`."""
        return float(np.searchsorted(self.values, value, "left") / self.n)


def typical_code(index: FeatureIndex) -> float:
    """The median over the living features of their mean code; NaN where none lives."""
    numbers = index.numbers()
    return _median(numbers["mean"].to_numpy(np.float64)[numbers["alive"].to_numpy()])


def headline_numbers(index: FeatureIndex) -> pd.DataFrame:
    """The `HEADLINES` of every living feature, a row each, with `feature` as the index."""
    rows = pq.read_table(index.path / "features.parquet", filters=pc.field("alive"))
    columns = {name: rows[name].to_numpy() for name in HEADLINES if name in rows.column_names}
    unit = _median(columns["mean"].astype(np.float64))
    columns |= {f"{name}_relative": columns[name].astype(np.float64) / unit for name in SIZES}
    shares = rows["top_token_shares"].to_pylist()
    columns["top_token_share"] = np.array([first for first, *_ in shares], np.float64)
    strongest = np.zeros(index.n_features)
    pairs = pq.read_table(index.path / "coactivations.parquet", filters=pc.field("rank") == 0)
    strongest[pairs["feature"].to_numpy()] = pairs["jaccard"].to_numpy()
    features = rows["feature"].to_numpy()
    columns["top_jaccard"] = strongest[features]
    ordered = {name: columns[name].astype(np.float64) for name in HEADLINES}
    return pd.DataFrame(ordered, index=pd.Index(features, name="feature"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """How well a number tells the features of one SAE from those of another."""

    auroc: float
    """Share of pairs in which the first one's feature has the larger number; .5 tells nothing."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    """Upper end."""
    n: int
    """Features of the SAE with fewer of them."""

    @property
    def tells(self) -> bool | None:
        """Whether the interval lies beyond `TELLING` of .5; None where it lies across the bound."""
        if self.low > 0.5 + TELLING or self.high < 0.5 - TELLING:
            return True
        return False if self.low > 0.5 - TELLING and self.high < 0.5 + TELLING else None


def told_apart(index: FeatureIndex, twin: FeatureIndex, *, seed: int = 0) -> dict[str, Told]:
    """How well each headline number tells an SAE's living features from its twin's, by name.

    Sizes are compared in each SAE's own unit. Of each, `COMPARED` features at most, drawn by
    `seed`; intervals are of the features, not of the SAEs' training. Numbers that one of the two
    has of no feature are left out.
    """
    both = [headline_numbers(each) for each in (index, twin)]
    drawn = [n.sample(min(COMPARED, len(n)), random_state=seed) for n in both]
    found = {}
    for name in HEADLINES:
        column = f"{name}_relative" if name in SIZES else name
        own, other = (n[column].dropna().to_numpy(np.float64)[:, None] for n in drawn)
        if len(own) and len(other):
            one = separation(own, other, seed=seed)
            found[name] = Told(
                auroc=float(one.auroc[0]), low=float(one.low[0]), high=float(one.high[0]),
                n=min(len(own), len(other)),
            )  # fmt: skip
    return found


def twin_statistics(
    index: FeatureIndex, *, like: FeatureIndex | None = None
) -> dict[str, Reference]:
    """The spread of each headline number over an index's living features, by name.

    A number that no feature has is left out; all are where no feature lives.

    Args:
        index: of the twin.
        like: of the SAE that it is compared with: sizes are then in that SAE's units and `n_active`
            is of its number of rows. Without it all are as the twin has them.
    """
    numbers = headline_numbers(index)
    scales = {} if like is None else _scales(index, like)
    columns = {name: numbers[name].dropna().to_numpy() for name in HEADLINES}
    return {
        name: Reference(values=np.sort(values * scales.get(name, 1.0)))
        for name, values in columns.items()
        if len(values)
    }


def _scales(index: FeatureIndex, like: FeatureIndex) -> Mapping[str, float]:
    """What the numbers of `index` are multiplied with to be in the units of `like`."""
    sizes = dict.fromkeys(SIZES, typical_code(like) / typical_code(index))
    return {**sizes, "n_active": like.summary["n_rows"] / index.summary["n_rows"]}


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else float("nan")
