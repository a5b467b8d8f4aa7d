"""First-letter absorption: does a general latent fall silent where a special one speaks?

Chanin et al. 2024 (2409.14507), in the form of SAEBench (Karvonen et al. 2025, 2503.09532). "Starts
with s" should be one latent; a sparse dictionary saves an active latent where a latent of one word
("short") carries the letter's direction along. For each letter:

1. p, the unit normal of a logistic probe for the letter on the whole activation.
2. Main latents: the latents whose codes are most above those of other letters' words, the first k
   of them, k growing as long as the F1 of a probe on those k codes grows by more than `tau_fs`.
3. For each test word of the letter that the probe recognises, with a_i the code and d_i the decoder
   row of latent i and x the activation: absorbers S_abs are the at most `max_absorbers` other
   latents of the largest a_i d_i . p > 0 with cos(d_i, p) >= `tau_ps`. The word's score is

       sum_{S_abs} a_i d_i . p / (sum_{S_abs} a_i d_i . p + sum_{S_main} a_i d_i . p)

   where the main latents fall short (sum_{S_main} < x . p) and the absorbers matter (sum_{S_abs} >=
   `tau_pa` x . p > 0), else 0; and 1 where the main latents point away from p.
4. A letter's score is the mean over its words, the dictionary's the mean over its letters: 0 is no
   absorption. (SAEBench's tables give 1 minus that.)

`PAPER` has the paper's thresholds, which let every latent with a positive share absorb, so that a
dictionary spread over many latents scores high without a rule like "s" and "short". `RELEASED` has
those of the released code: few, aligned, strong absorbers, and no more absorbed than is missing.

Controls: the whole procedure with letters shuffled among words, or on a random dictionary; and
random directions in place of p, with the same words and main latents. A score near theirs says
nothing of letters. Where main latents tell their letter badly there is no letter latent to fall
silent in the first place.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from scipy import sparse
from torch import Tensor

from probe.errors import UserError
from saes.dictionaries import PooledCodes
from saes.probing import (
    DENSE_PENALTY,
    PENALTY,
    LinearProbe,
    class_means,
    f1_score,
    fit_probe,
    largest,
)
from saes.tasks import TaskData


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What counts as absorbing."""

    tau_pa: float = 0.0
    """Least share of x . p that the absorbers must carry."""
    tau_ps: float = -1.0
    """Least cosine of an absorber with p."""
    max_absorbers: int | None = None
    """Absorbers of one word, at most; None for all."""
    capped: bool = False
    """Count no more as absorbed than the main latents leave of x . p."""


PAPER = Thresholds()
"""SAEBench's paper, table of settings."""
RELEASED = Thresholds(tau_pa=0.4, tau_ps=0.1, max_absorbers=3, capped=True)
"""SAEBench's released code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsorptionConfig:
    """How absorption is measured."""

    thresholds: Thresholds = PAPER
    """What counts as absorbing."""
    tau_fs: float = 0.03
    """Growth of F1 for which one more latent is a main latent."""
    max_main: int = 10
    """Main latents of one letter, at most."""
    n_random: int = 5
    """Random directions behind the control."""
    seed: int = 0
    """Decides them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """One letter's direction."""

    name: str
    """The letter."""
    probe: LinearProbe
    """Tells its words from all others."""
    f1: float
    """The probe's F1 on test words."""
    words: Int[np.ndarray, " n"]
    """Test words of the letter that the probe recognises."""
    train_truth: Bool[np.ndarray, " m"]
    """Which training words are the letter's."""

    @property
    def direction(self) -> Float64[np.ndarray, " d"]:
        """The probe's unit normal."""
        return self.probe.weight / np.linalg.norm(self.probe.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterAbsorption:
    """What a dictionary does with one letter."""

    letter: str
    """The letter."""
    probe_f1: float
    """F1 of the letter's probe on test words."""
    main: tuple[int, ...]
    """The main latents, the strongest first."""
    main_f1: float
    """F1 of a probe on them, on training words."""
    words: Int[np.ndarray, " n"]
    """The test words that are scored."""
    scores: Float64[np.ndarray, " n"]
    """Their scores, 0 to 1."""
    random: Float64[np.ndarray, " n"]
    """Their scores with random directions, averaged over these."""


def find_letters(data: TaskData) -> list[Letter]:
    """Every label's probe on the whole activation; the dictionary has no part in it.

    Raises `UserError` where there are fewer than two labels.
    """
    x = data.pooled().double().numpy()
    labels, test = np.array(data.labels), data.test.numpy()
    names = sorted(set(data.labels))
    if len(names) < 2:
        raise UserError("absorption needs words of two letters or more; give more words.")
    letters = []
    for name in names:
        truth = labels == name
        probe = fit_probe(x[~test], truth[~test], penalty=DENSE_PENALTY, balanced=True)
        decided = probe.decide(x)
        letters.append(
            Letter(
                name=name,
                probe=probe,
                f1=f1_score(truth[test], decided[test]),
                words=np.flatnonzero(test & truth & decided),
                train_truth=truth[~test],
            )
        )
    return letters


def shuffled(data: TaskData, seed: int) -> TaskData:
    """The same words, labels permuted within training words and within test words."""
    labels, test = np.array(data.labels), data.test.numpy()
    rng = np.random.default_rng(seed)
    for part in (test, ~test):
        labels[part] = rng.permutation(labels[part])
    return replace(data, labels=tuple(labels.tolist()))


def measure_absorption(
    pooled: PooledCodes, data: TaskData, letters: list[Letter], config: AbsorptionConfig
) -> list[LetterAbsorption]:
    """Every letter's absorption in a dictionary; letters without recognised words are left out."""
    x = data.pooled().double().numpy()
    train = np.flatnonzero(~data.test.numpy())
    directions = pooled.dictionary.directions.detach().cpu().double().numpy()
    rng = np.random.default_rng(config.seed)
    found = []
    for letter in letters:
        if not len(letter.words):
            continue
        main, f1 = main_latents(pooled, train, letter.train_truth, config)
        codes, rows = pooled.codes[letter.words], x[letter.words]
        arguments = (codes, directions, main, config.thresholds)
        random = [
            word_scores(rows, *arguments, p)
            for p in _random_directions(x, train, letter, rng, config)
        ]
        found.append(
            LetterAbsorption(
                letter=letter.name,
                probe_f1=letter.f1,
                main=tuple(main),
                main_f1=f1,
                words=letter.words,
                scores=word_scores(rows, *arguments, letter.direction),
                random=np.mean(random, axis=0),
            )
        )
    return found


def main_latents(
    pooled: PooledCodes,
    train: Int[np.ndarray, " m"],
    truth: Bool[np.ndarray, " m"],
    config: AbsorptionConfig,
) -> tuple[list[int], float]:
    """The main latents of the words marked in `truth`, and the F1 of a probe on their codes.

    Empty, with F1 0, where no latent is more active on them than on the others.
    """
    inside, outside = class_means(pooled.codes, train, truth)
    candidates = largest(inside - outside, config.max_main)
    main, best = [], -np.inf
    for k in range(1, len(candidates) + 1):
        x = pooled.columns(candidates[:k])[train]
        probe = fit_probe(x, truth, penalty=PENALTY, balanced=True)
        f1 = f1_score(truth, probe.decide(x))
        if f1 <= best + config.tau_fs:
            break
        main, best = candidates[:k], f1
    return main, max(best, 0.0)


def word_scores(
    x: Float64[np.ndarray, "n d"],
    codes: sparse.csr_array,
    directions: Float64[np.ndarray, "s d"],
    main: list[int],
    thresholds: Thresholds,
    p: Float64[np.ndarray, " d"],
) -> Float64[np.ndarray, " n"]:
    """The absorption score of every word, as in the module's docstring.

    Args:
        x: the words' activations.
        codes: their codes [n, s].
        directions: decoder rows.
        main: the main latents.
        thresholds: what counts as absorbing.
        p: a unit vector.
    """
    along = directions @ p
    norms = np.linalg.norm(directions, axis=1)
    cosines = np.divide(along, norms, out=np.zeros_like(along), where=norms > 0)
    target = x @ p
    by_main = codes[:, main] @ along[main] if main else np.zeros(len(x))
    may_absorb = cosines >= thresholds.tau_ps
    may_absorb[main] = False
    shares = sparse.csr_array(codes * np.where(may_absorb, along, 0.0)[None, :])
    by_absorbers = np.array([_absorbed(row, thresholds) for row in _rows(shares)])
    counts = (target > 0) & (by_main < target) & (by_absorbers > 0)
    counts &= by_absorbers >= thresholds.tau_pa * target
    if thresholds.capped:
        by_absorbers = np.minimum(by_absorbers, target - by_main)
    whole = by_absorbers + np.maximum(by_main, 0.0)
    return np.divide(by_absorbers, whole, out=np.zeros(len(x)), where=counts & (whole > 0))


def _rows(matrix: sparse.csr_array) -> list[np.ndarray]:
    return np.split(matrix.data, matrix.indptr[1:-1])


def _absorbed(shares: np.ndarray, thresholds: Thresholds) -> float:
    """Sum of the largest positive shares."""
    positive = np.sort(shares[shares > 0])[::-1]
    return float(positive[: thresholds.max_absorbers].sum())


def _random_directions(
    x: Float64[np.ndarray, "n d"],
    train: Int[np.ndarray, " m"],
    letter: Letter,
    rng: np.random.Generator,
    config: AbsorptionConfig,
) -> Float64[np.ndarray, "r d"]:
    """Random unit vectors, each turned so that the letter's words lie on its positive side."""
    drawn = rng.standard_normal((config.n_random, x.shape[1]))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    centre = x[train[letter.train_truth]].mean(0)
    return drawn * np.where(drawn @ centre < 0, -1.0, 1.0)[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanAbsorption:
    """A dictionary's score under several weightings of the test words."""

    score: Float64[Tensor, " r"]
    """Mean over letters of the mean over words."""
    random: Float64[Tensor, " r"]
    """The same with random directions."""


def mean_absorption(
    letters: list[LetterAbsorption], test: Bool[Tensor, " m"], weights: Float64[Tensor, "r n"]
) -> MeanAbsorption:
    """The mean over letters under each weighting of the texts that test."""
    column = test.long().cumsum(0).numpy() - 1
    n = int(test.sum())
    scores, random, asked = (torch.zeros(len(letters), n, dtype=torch.float64) for _ in range(3))
    for row, letter in enumerate(letters):
        places = torch.from_numpy(column[letter.words])
        scores[row, places] = torch.from_numpy(letter.scores)
        random[row, places] = torch.from_numpy(letter.random)
        asked[row, places] = 1
    total = weights @ asked.T

    def mean(values: Float64[Tensor, "q n"]) -> Float64[Tensor, " r"]:
        return torch.where(total > 0, weights @ values.T / total, torch.nan).nanmean(1)

    return MeanAbsorption(score=mean(scores), random=mean(random))
