"""What a dose-response study asks and measures: options, candidates, the numbers of each.

A *candidate* is the recipe or one of its controls, at one strength. Every control changes the
activation by as much as the recipe does at the same token, in another direction:

- `random direction`: drawn, of length 1;
- `random feature`: the decoder direction of another living feature of the same SAE;
- `twin`: the decoder direction of the feature of the same number in the random-weight twin's SAE.

Measured of each candidate, everything against the model as it is:

- effect on tokens: the change of ln(p / (1 - p)) of coming next, p the probability of the recipe's
  `effect` tokens together, by prompt;
- effect on the text: the mean code of the recipe's feature on the tokens that the steered model
  wrote, read by the *unsteered* model and the SAE, less the same on the unsteered text, by prompt;
- effect on a probe: the change of the projection on a direction at its site at the last token of
  the prompt, by prompt (where a direction is given);
- cost: KL(clean || steered) and the rise of cross-entropy on neutral text, nats a token, by
  sequence;
- repetition: the share of the trigrams of tokens written that were there before, by prompt.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from analyses.statistics import FEW, Estimate, crossed_interval, mean_interval

Kind = Literal["recipe", "random direction", "random feature", "twin"]
KINDS: tuple[Kind, ...] = ("recipe", "random direction", "random feature", "twin")
Measure = Literal["tokens", "text", "probe", "kl", "ce", "repetition"]
MEASURES: dict[Measure, str] = {
    "tokens": "Log-odds of the wanted tokens",
    "text": "Feature on the text it wrote",
    "probe": "Projection on the probe",
    "kl": "KL on neutral text",
    "ce": "Rise of cross-entropy on neutral text",
    "repetition": "Repeated trigrams in what it wrote",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much does a recipe do at which strength, and what does it cost?

    Each recipe is run at several multiples of its own strengths, beside changes of the same size in
    random directions, along random features, and along the same feature of the random-weight twin.

    Example: lorgnette analyse dose-response --recipes artifacts/recipes/*.json
    """

    recipes: tuple[str, ...] = ()
    """Files of recipes."""
    times: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0)
    """Multiples of each recipe's strengths; 1 is the recipe itself."""
    twin: str = ""
    """SAE of the random-weight twin, a folder or its name; none: that control is left out."""
    probe: str = ""
    """A direction's file, whose projection is followed as well; none: left out."""
    prompts: int = 24
    """Openings of documents of the built-in corpus that are gone on from."""
    written: int = 8
    """Of these, how many are gone on from in full, for what is measured on written text."""
    new_tokens: int = 24
    """Tokens written of each."""
    sequences: int = 4
    """Sequences of 128 tokens of neutral text."""
    controls: int = 8
    """Random directions, and as many random features."""
    seed: int = 0
    """Seed of the controls."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dosed:
    """The measurements of one recipe."""

    name: str
    """The recipe's."""
    rows: pd.DataFrame
    """A number a row: `kind`, `control` (its number), `times`, `measure`, `unit` (number of the
    prompt or sequence), `value`."""
    samples: pd.DataFrame
    """What the recipe wrote: `prompt`, `times` (0: unsteered), `text`."""

    def measures(self) -> list[Measure]:
        """What was measured."""
        return [name for name in MEASURES if name in set(self.rows["measure"])]

    def kinds(self) -> list[Kind]:
        """Which candidates there are."""
        return [kind for kind in KINDS if kind in set(self.rows["kind"])]

    def values(self, kind: Kind, measure: Measure, times: float) -> np.ndarray:
        """What was measured of a kind at a strength: controls by units."""
        rows = self.rows
        chosen = rows[
            (rows["kind"] == kind) & (rows["measure"] == measure) & (rows["times"] == times)
        ]
        return chosen.pivot(index="control", columns="unit", values="value").to_numpy()

    def estimate(self, kind: Kind, measure: Measure, times: float) -> Estimate:
        """Mean over controls and units, with an interval as `over_units` takes it."""
        return over_units(self.values(kind, measure, times))

    def strengths(self) -> list[float]:
        """The multiples, ascending."""
        return sorted(self.rows["times"].unique())


def over_units(values: Float[np.ndarray, "c n"]) -> Estimate:
    """Mean over controls and units with its interval.

    Over controls and units both, where there are `FEW` units or more; of fewer units the bootstrap
    says too little, and the interval is Student's t of the controls' means by unit.
    """
    few = values.shape[1] < FEW
    return mean_interval(values.mean(0)) if few else crossed_interval(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The measurements of all recipes."""

    config: Config
    """What was asked."""
    recipes: tuple[Dosed, ...]
    """Each recipe's."""


def recipe_name(path: str) -> str:
    """A recipe's file as a short name."""
    return Path(path).stem
