"""Labels of features: a short phrase for each, and how far it can be trusted.

    index --> contexts of each feature, half of them held out    (`saes.label_contexts`)
          --> a rule from the other half, and its phrase         (`label_making`, `label_phrases`)
          --> detection on the held-out half, with a control     (`label_detection`)
          --> labels.parquet

Three methods fill the same table. `offline` needs the index, and its store to know more silent
contexts. `file` takes labels that somebody else made. `endpoint` asks a model behind an
OpenAI-compatible address (`saes.label_endpoint`). A label without a rule is scored by
showing the contexts to the endpoint, where there is one; else its score is null.

Whether an offline label is true of the feature is what its score says; a feature that no short rule
describes gets a label all the same, and a score near 1/2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from tqdm import tqdm

from saes.feature_queries import FeatureIndex
from saes.label_contexts import (
    HARD_TOKENS,
    Contexts,
    Evidence,
    Firing,
    Sampler,
)
from saes.label_detection import Score, score_answers
from saes.label_making import gather, make_rule
from saes.label_phrases import phrase
from saes.label_pool import Pool
from saes.label_rules import Rule
from saes.label_schema import LABELS, LabelConfig, read_labels, summarise, write_labels
from saes.label_texts import Texts

__all__ = [
    "LABELS",
    "LabelConfig",
    "Subject",
    "offline_labels",
    "read_labels",
    "summarise",
    "write_labels",
]

PROMOTED = 5
"""Tokens that a rule says the feature promotes."""
WEAK = 0.7
"""Score on the making contexts below which a label also says what the feature promotes."""


class Subject:
    """What is labelled, with everything that is the same for all of its features."""

    def __init__(
        self, index: FeatureIndex, texts: Texts, config: LabelConfig, pool: Pool | None
    ) -> None:
        self.index, self.texts, self.config = index, texts, config
        self.sampler = Sampler(index, texts, pool, config.seed)
        numbers = index.numbers()
        self.living: list[int] = numbers["feature"][numbers["alive"]].tolist()
        self.density = numbers["density"].to_numpy()
        features = pq.read_table(index.path / "features.parquet", columns=["positive_tokens"])
        self.promoted: list[list[str] | None] = features["positive_tokens"].to_pylist()
        self._bases: dict[int, np.ndarray] = {}

    def base(self, width: int) -> np.ndarray:
        """Share of the making half's blocks of that width that hold each token."""
        if width not in self._bases:
            self._bases[width] = self.texts.block_shares(width)
        return self._bases[width]

    def promotes(self, feature: int) -> tuple[str, ...]:
        """The tokens that a feature raises most in the logits."""
        return tuple((self.promoted[feature] or [])[:PROMOTED])

    def contexts(self, feature: int) -> tuple[Contexts, Contexts, Evidence, Firing]:
        """A feature's contexts for making and for testing, its tokens, and where it fires."""
        firing = self.sampler.firing(feature)
        width, evidence = self.sampler.width_for(firing), self.sampler.evidence(firing)
        driving = evidence.tokens[:HARD_TOKENS]
        making, testing = (
            self.sampler.contexts(firing, side, driving, width) for side in ("make", "test")
        )
        return making, testing, evidence, firing


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A feature's rule and the contexts that test it."""

    feature: int
    """The feature."""
    rule: Rule
    """What was made of the making half."""
    making: float | None
    """Its score on the contexts that it was made from; None where there are too few."""
    contexts: Contexts
    """Held-out contexts."""


def judge(subject: Subject, feature: int) -> Judged:
    """Make a feature's rule and choose the contexts that test it."""
    texts = subject.texts
    making, testing, evidence, firing = subject.contexts(feature)
    rule = Rule(promotes=subject.promotes(feature))
    value = None
    if len(making.positive):
        found = gather(
            texts,
            making,
            evidence,
            firing.flat[~texts.held_out[firing.flat // texts.stride]],
            float(subject.density[feature]),
            subject.base(making.width),
            rule.promotes,
        )
        rule = make_rule(found)
        said = rule.matches(texts.words, texts.read(making.blocks, making.width))
        score = score_answers(said, len(making.positive))
        value = score and score.value
    return Judged(feature=feature, rule=rule, making=value, contexts=testing)


def offline_labels(subject: Subject, *, progress: bool = True) -> pd.DataFrame:
    """A label for every living feature, from the index alone, with its score and control."""
    return label_table(
        subject.living,
        subject.config,
        partial(judge, subject),
        partial(_row, subject),
        progress=progress,
    )


J = TypeVar("J", bound=Judged)


def label_table(
    features: Sequence[int],
    config: LabelConfig,
    judge: Callable[[int], J],
    row: Callable[[J, Sequence[Rule]], dict[str, Any]],
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """A label for every feature, with its score and control; columns are `LABELS`.

    Args:
        features: what is labelled.
        config: how many other features' rules are the control, and the seed that draws them.
        judge: makes a feature's rule and chooses the contexts that test it.
        row: a row of labels.parquet, of a feature and the rules that it is compared with.
        progress: show two progress bars.
    """
    judged = [
        judge(feature)
        for feature in tqdm(features, desc="label", unit=" features", disable=not progress)
    ]
    rng = np.random.default_rng(config.seed)
    rows = []
    for place, found in enumerate(
        tqdm(judged, desc="score", unit=" features", disable=not progress)
    ):
        others = other_places(rng, len(judged), place, config.controls)
        rows.append(row(found, [judged[other].rule for other in others]))
    return pd.DataFrame(rows, columns=LABELS.names)


def other_places(rng: np.random.Generator, n: int, place: int, wanted: int) -> list[int]:
    """Different places of a list, none of them `place`."""
    drawn = rng.choice(n - 1, min(wanted, n - 1), replace=False) if n > 1 else []
    return [int(other) + int(other >= place) for other in drawn]


def _row(subject: Subject, judged: Judged, others: Sequence[Rule]) -> dict[str, Any]:
    """A row of labels.parquet: the label, its score, and the score of other features' rules."""
    words, contexts = subject.texts.words, judged.contexts
    blocks = subject.texts.read(contexts.blocks, contexts.width)
    n_positive = len(contexts.positive)
    score = score_answers(judged.rule.matches(words, blocks), n_positive)
    weak = judged.making is None or judged.making < WEAK
    row = {
        "feature": judged.feature,
        "label": phrase(judged.rule, words, weak=weak),
        "rule": judged.rule.to_text(words),
        "method": "offline",
        "making": judged.making,
    } | counted(contexts)
    if score is None:
        return row
    controls = [score_answers(rule.matches(words, blocks), n_positive) for rule in others]
    values = [control.value for control in controls if control is not None]
    return row | scored(score, values)


def counted(contexts: Contexts) -> dict[str, Any]:
    """The columns of labels.parquet that say what a label was tested on."""
    return {
        "n_positive": len(contexts.positive),
        "n_negative": len(contexts.negative),
        "n_hard": contexts.n_hard,
        "width": contexts.width,
    }


def scored(score: Score, controls: Sequence[float]) -> dict[str, Any]:
    """The columns of labels.parquet that a score fills."""
    return {
        "score": score.value,
        "score_low": score.low,
        "score_high": score.high,
        "sensitivity": score.sensitivity,
        "specificity": score.specificity,
        "control": float(np.mean(controls)) if controls else None,
    }
