"""What a block's features predict, and which true values have a feature of their own.

Samples are what a factor is a factor of: every cell for `position` (is there a thing?), every thing
for shape, colour, size, texture and the pairs of colour and shape, every image for background and
light. A sample's codes are the means over its places: the quarter of the image for a cell or a
thing, all of it for an image. The first half of the images chooses and fits, the other is scored.

- `linear`: multinomial logistic regression on the SAE's codes, or on the update itself; its
  answers.
- `feature`: for a value v and a feature with threshold c > 0, "code > c" answers v. Of all features
  and thresholds the one of the largest F1 on the first half is the value's best feature;
  F1 = 2 tp / (2 tp + fp + fn) and the AUROC of its code are taken on the other half.
- `union`: features, each with its own best threshold, joined by "or", one at a time as long as F1
  on the first half grows by `LEAST_GAIN`, up to `MOST_JOINED`: what a value looks like that was
  split.

The floor is the same on shuffled labels, and on the twin of random weights. Resamples draw the
images of the second half.

Tables:

    answers   weights, block, factor, source (codes | update | shuffled), image, label, answer
    values    weights, block, factor, value, control ("" | shuffled), base, feature, threshold,
              joined, and lists of a number and its resamples: f1, auroc, union
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int

from analyses.block_roles_cells import described, kept
from analyses.block_roles_images import BlockCodes, Looked
from analyses.block_roles_measured import Config, Subject, Tables
from analyses.linear_probes import fit_classifier, total_variance
from probe.toyturbo.world import ABSENT, FACTORS, SCENE_FACTORS, Scenes
from saes.metrics import resampling_weights

PART = "probes"
PAIR = "colour and shape"
PROBED = (*FACTORS, PAIR)
PRESENCE = ("no thing", "a thing")
STRENGTHS = (3.0, 30.0, 300.0)
"""Inverse strengths of the linear probe's penalty, chosen on the last fifth of the first half."""
MOST_JOINED, LEAST_GAIN = 4, 0.02
N_DRAWS = 500
"""Resamples of the images behind an interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What a factor is a factor of."""

    factor: str
    """The factor."""
    names: tuple[str, ...]
    """Its values."""
    image: Int[np.ndarray, " m"]
    """Each sample's image."""
    cell: Int[np.ndarray, " m"] | None
    """Its cell; None where a sample is a whole image."""
    label: Int[np.ndarray, " m"]
    """The number of its value."""
    n_images: int
    """Images there are."""

    @property
    def fitted(self) -> Bool[np.ndarray, " m"]:
        """Which samples are of the first half of the images."""
        return self.image < self.n_images // 2

    @property
    def counted(self) -> range:
        """Values that can have a feature; that there is no thing is none."""
        return range(1 if self.names == PRESENCE else 0, len(self.names))

    def of(self, x: Float[np.ndarray, "n 4 w"]) -> Float[np.ndarray, "m w"]:
        """What is pooled over each sample's places."""
        return x.mean(1)[self.image] if self.cell is None else x[self.image, self.cell]

    def shuffled(self, seed: int) -> "Samples":
        """The same with labels that mean nothing."""
        label = np.random.default_rng(seed).permutation(self.label)
        return Samples(
            factor=self.factor, names=self.names, image=self.image, cell=self.cell, label=label,
            n_images=self.n_images,
        )  # fmt: skip


def samples(factor: str, truth: Scenes) -> Samples:
    """The samples of a factor in scenes."""
    n = len(truth)
    image, cell = np.divmod(np.arange(n * 4), 4)
    if factor in SCENE_FACTORS:
        return Samples(
            factor=factor, names=FACTORS[factor], image=np.arange(n), cell=None,
            label=truth.factor(factor).numpy(), n_images=n,
        )  # fmt: skip
    if factor == "position":
        names, label = PRESENCE, truth.present.flatten().long().numpy()
    elif factor == PAIR:
        colour, shape = (truth.factor(name).flatten() for name in ("colour", "shape"))
        names = tuple(f"{c} {s}" for c in FACTORS["colour"] for s in FACTORS["shape"])
        label = torch.where(shape == ABSENT, ABSENT, colour * len(FACTORS["shape"]) + shape).numpy()
    else:
        names, label = FACTORS[factor], truth.factor(factor).flatten().numpy()
    there = label != ABSENT
    return Samples(
        factor=factor, names=names, image=image[there], cell=cell[there], label=label[there],
        n_images=n,
    )  # fmt: skip


# ------------------------------------------------------------------------------------- the part


def probe(subject: Subject, block: str, looked: Looked, config: Config, root: Path) -> Tables:
    """A block's tables `answers` and `values`, or those kept."""
    assert looked.truth is not None, "probes need the truth"
    asked = described(PART, subject, block) | {"images": len(looked), "seed": config.seed}
    truth, codes = looked.truth, looked.codes[block]
    found = kept(root, asked, lambda: probe_block(codes, truth, config.seed))
    for table in found.values():
        table.insert(0, "block", block)
        table.insert(0, "weights", subject.weights)
    return found


def probe_block(codes: BlockCodes, truth: Scenes, seed: int) -> Tables:
    """The tables of a block, without the columns that name it."""
    pooled, updates = codes.by_quarter().numpy(), codes.updates.numpy()
    answers, values = [], []
    for factor in PROBED:
        asked = samples(factor, truth)
        mixed = asked.shuffled(seed)
        for source, x, of in (
            ("codes", pooled, asked), ("update", updates, asked), ("shuffled", pooled, mixed)
        ):  # fmt: skip
            answers.append(linear_answers(of.of(x), of).assign(source=source))
        for control, of in (("", asked), ("shuffled", mixed)):
            values.append(value_features(of.of(pooled), of, seed).assign(control=control))
    return {
        "answers": pd.concat(answers, ignore_index=True),
        "values": pd.concat(values, ignore_index=True),
    }


# ---------------------------------------------------------------------------------- linear probes


def linear_answers(x: Float[np.ndarray, "m w"], of: Samples) -> pd.DataFrame:
    """What a linear classifier of the first half says of the second: factor, image, label, answer.

    Where the first half has one value alone, that is the answer.
    """
    held_out = ~of.fitted
    answer = fitted_answers(x[of.fitted], of.label[of.fitted], x[held_out])
    return pd.DataFrame(
        {
            "factor": of.factor,
            "image": of.image[held_out],
            "label": of.label[held_out],
            "answer": answer,
        }
    )


def fitted_answers(
    x: Float[np.ndarray, "m w"], label: Int[np.ndarray, " m"], new: Float[np.ndarray, "h w"]
) -> Int[np.ndarray, " h"]:
    """Answers for new rows; the penalty is chosen on the last fifth of the others."""
    if len(set(label.tolist())) < 2:
        return np.full(len(new), label[0])
    scale = 1 / (total_variance(x) ** 0.5 or 1.0)
    x, new = x * scale, new * scale
    cut = len(x) * 4 // 5
    best, least = STRENGTHS[0], np.inf
    if len(set(label[:cut].tolist())) > 1:
        for strength in STRENGTHS:
            said = np.asarray(fit_classifier(x[:cut], label[:cut], strength).predict(x[cut:]))
            wrong = float((said != label[cut:]).mean())
            if wrong < least:
                best, least = strength, wrong
    return np.asarray(fit_classifier(x, label, best).predict(new))


# --------------------------------------------------------------------------------- best features


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """For every feature the threshold that answers a value best."""

    f1: Float64[np.ndarray, " s"]
    """Its F1; 0 for a feature that never fires."""
    threshold: Float64[np.ndarray, " s"]
    """The threshold: "code > threshold" answers the value."""


def best_thresholds(x: Float[np.ndarray, "m s"], truth: Bool[np.ndarray, "m v"]) -> Iterator[Best]:
    """For each value the best threshold of every feature, all cuts tried.

    A cut lies halfway between two neighbouring codes that differ, and never lets a code of 0
    through.
    """
    order = np.argsort(-x, axis=0, kind="stable")
    ordered = np.take_along_axis(x, order, axis=0)
    below = np.vstack([ordered[1:], np.zeros((1, x.shape[1]), x.dtype)])
    allowed = (ordered > below) & (ordered > 0)
    chosen = np.arange(1, len(x) + 1)[:, None]
    columns = np.arange(x.shape[1])
    for y in truth.T:
        hits = np.cumsum(y[order], axis=0)
        f1 = np.where(allowed, 2 * hits / (chosen + y.sum()), 0.0)
        cut = f1.argmax(0)
        halfway = (ordered[cut, columns].astype(np.float64) + below[cut, columns]) / 2
        yield Best(f1=f1[cut, columns], threshold=halfway)


def value_features(x: Float[np.ndarray, "m s"], of: Samples, seed: int) -> pd.DataFrame:
    """Every value's best feature and the best union of features, scored on the second half."""
    fitted, held_out = of.fitted, ~of.fitted
    numbers = list(of.counted)
    truth = of.label[:, None] == np.array(numbers)
    image = of.image[held_out] - of.n_images // 2
    weights = drawn_images(of.n_images - of.n_images // 2, seed)[:, image]
    rows = []
    for place, best in enumerate(best_thresholds(x[fitted], truth[fitted])):
        says, y = x > best.threshold, truth[:, place]
        joined = join(says[fitted], y[fitted], best.f1)
        first, either = joined[0], np.asarray(says[held_out][:, joined].any(1))
        rows.append(
            {
                "factor": of.factor,
                "value": of.names[numbers[place]],
                "base": float(y[held_out].mean()),
                "feature": first,
                "threshold": float(best.threshold[first]),
                "joined": joined,
                "f1": f1_draws(says[held_out, first], y[held_out], weights),
                "union": f1_draws(either, y[held_out], weights),
                "auroc": auroc_draws(x[held_out, first], y[held_out], weights),
            }
        )
    return pd.DataFrame(rows)


def join(
    says: Bool[np.ndarray, "m s"], truth: Bool[np.ndarray, " m"], f1: Float64[np.ndarray, " s"]
) -> list[int]:
    """Features whose "or" answers a value best, the best of them first, added greedily."""
    joined = [int(f1.argmax())]
    said, reached = says[:, joined[0]], float(f1.max())
    while len(joined) < MOST_JOINED:
        either = says | said[:, None]
        scores = 2 * (either & truth[:, None]).sum(0) / (either.sum(0) + truth.sum()).clip(1)
        if scores.max() < reached + LEAST_GAIN:
            break
        joined.append(int(scores.argmax()))
        said, reached = either[:, joined[-1]], float(scores.max())
    return joined


# ------------------------------------------------------------------------------------- resamples


def drawn_images(n: int, seed: int) -> Float64[np.ndarray, "r n"]:
    """How often each image counts: once each in the first row, as drawn in the others."""
    return np.vstack([np.ones((1, n)), resampling_weights(n, N_DRAWS, seed).numpy()])


def f1_draws(
    said: Bool[np.ndarray, " m"],
    truth: Bool[np.ndarray, " m"],
    weights: Float64[np.ndarray, "r m"],
) -> list[float]:
    """F1 under each weighting; 0 where nothing is true or said."""
    hits = weights @ (said & truth)
    either = weights @ (said.astype(np.float64) + truth)
    return (2 * hits / np.where(either > 0, either, 1)).tolist()


def auroc_draws(
    scores: Float[np.ndarray, " m"],
    truth: Bool[np.ndarray, " m"],
    weights: Float64[np.ndarray, "r m"],
) -> list[float]:
    """Share of the pairs in which the true one scores higher, ties half, under each weighting.

    One half where there is no pair.
    """
    _, rank = np.unique(scores, return_inverse=True)
    place, n = torch.from_numpy(rank), int(rank.max()) + 1
    weighted = torch.from_numpy(weights)
    sums = torch.zeros(2, len(weights), n, dtype=torch.float64)
    for side, chosen in enumerate((truth, ~truth)):
        mask = torch.from_numpy(chosen)
        sums[side].index_add_(1, place[mask], weighted[:, mask])
    positive, negative = sums
    won = (positive * (negative.cumsum(1) - negative / 2)).sum(1)
    pairs = positive.sum(1) * negative.sum(1)
    return torch.where(pairs > 0, won / pairs.clamp_min(1e-300), 0.5).tolist()
