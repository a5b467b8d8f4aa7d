"""Taking latents out: spurious-correlation removal (SCR) and targeted probe perturbation (TPP).

SAEBench (Karvonen et al. 2025, 2503.09532; SCR after SHIFT, Marks et al. 2024, 2403.19647). Both
train probes on pooled activations, attribute them to latents, set the n latents of the largest
effect to zero in every row's code, add back what the SAE misses (so that only these latents
change), and look at the probes again. With m_i the mean code of latent i, d_i its decoder row and w
the probe's weights, latent i's effect on a probe for class c is

    (m_i over texts of c - m_i over the others) * d_i . w

**TPP**: every class has a probe (class against the rest). A_j is probe j's accuracy, A_ij that
after the latents of class i are taken out: those of the largest effect above 0 that are more active
on the class than off it.

    TPP = mean_i (A_i - A_ii) - mean_{i != j} (A_j - A_ij)

Test texts are balanced, so that a probe that has lost its class falls to 1/2: the score of a
perfect dictionary is about A_i - 1/2, not 1.

**SCR**: texts have a target and a spurious property. A biased probe is trained where the two go
together, an unbiased one for the target and one for the spurious property where they are
independent. The latents of the largest absolute effect on the spurious probe are taken out, and the
biased probe is tested on the target where the two are independent:

    SCR = (A_ablated - A_base) / (A_oracle - A_base)

A_base the biased, A_oracle the unbiased probe's accuracy: 0 is no change, 1 as if never biased. It
is undefined (nan) where the bias costs nothing (A_oracle <= A_base).

Controls: equally many random latents that are active at all; the same for a random dictionary, for
principal components and residual channels; and the probe's own direction, one number in place of
n, taken out of the activation (`saes.dictionaries.probe_dictionary`). SAEBench fits probes by AdamW
with an L1 penalty; here they are logistic regressions (`saes.probing`), which need no seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from scipy import sparse
from torch import Tensor

from probe.errors import UserError
from saes.dictionaries import PooledCodes
from saes.labelled_texts import Groups
from saes.probing import (
    DENSE_PENALTY,
    Answers,
    BinaryTask,
    LinearProbe,
    class_means,
    fit_probe,
    largest,
    make_answers,
)
from saes.tasks import TaskData

N_DRAWS = 5
"""Choices of random latents that a control averages over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perturbation:
    """Answers of probes before and after, under one way of choosing latents."""

    name: str
    """The way: the dictionary's name, or `random_latents`."""
    label: str
    """The same for people."""
    answers: Answers
    """All answers; the questions are told apart by the fields below."""
    before: Int[np.ndarray, " c"]
    """Questions of the untouched probes: a class each for TPP; base and oracle for SCR."""
    after: Mapping[int, Int[np.ndarray, "r i j"]]
    """Questions after taking n latents out, by n: [draw, class taken out, class asked]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpuriousTask:
    """Texts with a target and a spurious property, both yes or no."""

    target: str
    """The target, as `column: yes against no`."""
    spurious: str
    """The spurious property, likewise."""
    biased: Int[np.ndarray, " n"]
    """Training texts where both are yes or both are no."""
    balanced: Int[np.ndarray, " n2"]
    """As many training texts where the two are independent."""
    test: Int[np.ndarray, " m"]
    """Test texts where the two are independent."""
    target_truth: Bool[np.ndarray, " t"]
    """Which of all texts have the target."""
    spurious_truth: Bool[np.ndarray, " t"]
    """Which of all texts have the spurious property."""


def effects(
    pooled: PooledCodes,
    texts: Int[np.ndarray, " n"],
    truth: Bool[np.ndarray, " n"],
    probe: LinearProbe,
    *,
    own: bool = False,
) -> Float64[np.ndarray, " s"]:
    """Each latent's effect on a probe, in logits: mean difference times `d_i . w`.

    `own` sets it to 0 for latents that are less active on the class than off it, by the absolute
    mean code.
    """
    inside, outside = class_means(pooled.codes, texts, truth)
    found = (inside - outside) * _along(pooled, probe.weight)
    return np.where(np.abs(inside) >= np.abs(outside), found, 0.0) if own else found


def _along(
    pooled: PooledCodes, weights: Float64[np.ndarray, "d *c"]
) -> Float64[np.ndarray, "s *c"]:
    return pooled.dictionary.directions.detach().cpu().double().numpy() @ weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """Probes on test texts, ready to be asked with latents taken out.

    Probes are linear, so that `decide` needs the latents' codes and `D w` alone: no activation is
    made anew.
    """

    texts: Int[np.ndarray, " n"]
    """The test texts."""
    codes: sparse.csc_array
    """Their codes [n, s]."""
    logits: Float64[np.ndarray, "n c"]
    """What the untouched probes say."""
    along: Float64[np.ndarray, "s c"]
    """What a unit of each latent adds to each probe."""

    @staticmethod
    def of(
        pooled: PooledCodes,
        x: Float64[np.ndarray, "m d"],
        texts: Int[np.ndarray, " n"],
        probes: Sequence[LinearProbe],
    ) -> "Ablation":
        """Probes on some texts."""
        weights = np.stack([probe.weight for probe in probes], 1)
        return Ablation(
            texts=texts,
            codes=pooled.codes[texts].tocsc(),
            logits=x[texts] @ weights + np.array([probe.bias for probe in probes]),
            along=_along(pooled, weights),
        )

    def decide(self, latents: Sequence[int]) -> Bool[np.ndarray, "n c"]:
        """What each probe says of each text with these latents taken out."""
        if not len(latents):
            return self.logits > 0
        chosen = list(latents)
        return self.logits - self.codes[:, chosen] @ self.along[chosen] > 0


def random_choices(
    alive: Int[np.ndarray, " a"], n: int, rng: np.random.Generator
) -> list[list[int]]:
    """`N_DRAWS` choices of n of the latents that are alive."""
    return [rng.permutation(alive)[:n].tolist() for _ in range(N_DRAWS)]


def active_latents(pooled: PooledCodes, texts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " a"]:
    """Latents that are active on some of the texts."""
    return np.flatnonzero(abs(pooled.codes[texts]).sum(0))


# ------------------------------------------------------------- targeted probe perturbation


def measure_tpp(
    pooled: PooledCodes,
    data: TaskData,
    tasks: Sequence[BinaryTask],
    probes: Mapping[str, LinearProbe],
    ns: Sequence[int],
    *,
    random_seed: int | None = None,
) -> Perturbation:
    """Take every class's latents out and ask every class's probe.

    Args:
        pooled: the dictionary's codes.
        data: the texts.
        tasks: the classes, at least two.
        probes: each class's probe on pooled activations.
        ns: numbers of latents to take out.
        random_seed: take out random latents instead, drawn by this seed.

    Raises `UserError` for fewer than two classes.
    """
    if len(tasks) < 2:
        raise UserError(
            "targeted probe perturbation compares three classes or more; give texts of more."
        )
    test = np.flatnonzero(data.test.numpy())
    ablation = Ablation.of(
        pooled, data.pooled().double().numpy(), test, [probes[task.name] for task in tasks]
    )
    given = _all_asked(ablation, [], tasks)
    train = np.flatnonzero(~data.test.numpy())
    alive, rng = active_latents(pooled, train), np.random.default_rng(random_seed)
    scores = [
        effects(pooled, task.train, task.train_truth, probes[task.name], own=True) for task in tasks
    ]
    after: dict[int, np.ndarray] = {}
    for n in ns:
        questions = []
        for i in range(len(tasks)):
            random = random_seed is not None
            draws = random_choices(alive, n, rng) if random else [largest(scores[i], n)]
            for latents in draws:
                questions.append(np.arange(len(given), len(given) + len(tasks)))
                given += _all_asked(ablation, latents, tasks)
        after[n] = np.stack(questions).reshape(len(tasks), -1, len(tasks)).swapaxes(0, 1)
    return _perturbation(pooled, random_seed, make_answers(given, data.test), len(tasks), after)


def _all_asked(
    ablation: Ablation, latents: Sequence[int], tasks: Sequence[BinaryTask]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every class's texts, and whether its probe is right about them."""
    decided = ablation.decide(latents)
    places = [np.searchsorted(ablation.texts, task.test) for task in tasks]
    return [
        (task.test, decided[place, j] == task.test_truth)
        for j, (task, place) in enumerate(zip(tasks, places, strict=True))
    ]


def _perturbation(
    pooled: PooledCodes,
    random_seed: int | None,
    answers: Answers,
    n_before: int,
    after: Mapping[int, np.ndarray],
) -> Perturbation:
    random = random_seed is not None
    return Perturbation(
        name="random_latents" if random else pooled.dictionary.name,
        label="random latents" if random else pooled.dictionary.label,
        answers=answers,
        before=np.arange(n_before),
        after=after,
    )


def tpp_scores(
    measured: Perturbation, weights: Float64[Tensor, "r n"]
) -> dict[int, Float64[Tensor, " r"]]:
    """The TPP score by n, under each weighting of the test texts; draws are averaged."""
    return {n: own - others for n, (own, others) in tpp_drops(measured, weights).items()}


def tpp_drops(
    measured: Perturbation, weights: Float64[Tensor, "r n"]
) -> dict[int, tuple[Float64[Tensor, " r"], Float64[Tensor, " r"]]]:
    """Mean loss of accuracy of the class taken out, and of the other classes, by n."""
    accuracy = measured.answers.accuracy(weights)
    clean = accuracy[:, torch.from_numpy(measured.before)]
    own = torch.eye(len(measured.before), dtype=torch.bool)
    drops = {}
    for n, questions in measured.after.items():
        drop = clean[:, None, None, :] - accuracy[:, torch.from_numpy(questions)]
        drop = drop.mean(1)
        drops[n] = (drop[:, own].mean(1), drop[:, ~own].mean(1))
    return drops


# ------------------------------------------------------------- spurious-correlation removal


def make_spurious(
    data: TaskData, target: Groups, spurious: Groups, *, swapped: bool, seed: int
) -> SpuriousTask:
    """Set labels against attributes, each in two groups; texts in neither group are left out.

    Args:
        data: texts with labels and attributes.
        target: two groups of labels.
        spurious: two groups of attributes.
        swapped: make the attribute the target and the label the spurious property.
        seed: decides which texts are used where a cell has more than others.

    Raises `UserError` where one of the four combinations has too few texts.
    """
    label = _membership(data.labels, target)
    attribute = _membership(data.attributes, spurious)
    names = [" against ".join(target), " against ".join(spurious)]
    rng = np.random.default_rng(seed)
    cells = {
        test: {
            (a, b): rng.permutation(
                np.flatnonzero((label == a) & (attribute == b) & (data.test.numpy() == test))
            )
            for a in (1, 0)
            for b in (1, 0)
        }
        for test in (False, True)
    }
    n_train, n_test = (min(map(len, cells[test].values())) for test in (False, True))
    if n_train < 8 or n_test < 4:
        raise UserError(
            f"spurious-correlation removal needs 8 training and 4 test texts of every combination "
            f"of {names[0]} with {names[1]}; the rarest has {n_train} and {n_test}: give more."
        )
    together = [cells[False][1, 1], cells[False][0, 0]]
    n = n_train // 2
    truths = label == 1, attribute == 1
    return SpuriousTask(
        target=names[swapped],
        spurious=names[not swapped],
        biased=np.sort(np.concatenate([cell[: 2 * n] for cell in together])),
        balanced=np.sort(np.concatenate([cell[:n] for cell in cells[False].values()])),
        test=np.sort(np.concatenate([cell[:n_test] for cell in cells[True].values()])),
        target_truth=truths[swapped],
        spurious_truth=truths[not swapped],
    )


def _membership(values: Sequence[str], groups: Groups) -> Int[np.ndarray, " m"]:
    """1 in the first group, 0 in the second, -1 in neither."""
    yes, no = groups.values()
    return np.array([1 if value in yes else 0 if value in no else -1 for value in values])


@dataclass(frozen=True, slots=True, kw_only=True)
class SpuriousProbes:
    """The three probes of a spurious task, on pooled activations."""

    biased: LinearProbe
    """Target, trained where the two properties go together."""
    oracle: LinearProbe
    """Target, trained where they are independent."""
    spurious: LinearProbe
    """Spurious property, trained where they are independent."""


def fit_spurious(x: Float64[np.ndarray, "m d"], task: SpuriousTask) -> SpuriousProbes:
    """Train the three probes."""

    def fit(texts: np.ndarray, truth: np.ndarray) -> LinearProbe:
        return fit_probe(x[texts], truth[texts], penalty=DENSE_PENALTY)

    return SpuriousProbes(
        biased=fit(task.biased, task.target_truth),
        oracle=fit(task.balanced, task.target_truth),
        spurious=fit(task.balanced, task.spurious_truth),
    )


def measure_scr(
    pooled: PooledCodes,
    data: TaskData,
    task: SpuriousTask,
    probes: SpuriousProbes,
    ns: Sequence[int],
    *,
    random_seed: int | None = None,
) -> Perturbation:
    """Take the spurious property's latents out and ask the biased probe for the target.

    Arguments as in `measure_tpp`; `before` holds the questions of the biased probe and the oracle.
    """
    x = data.pooled().double().numpy()
    ablation = Ablation.of(pooled, x, task.test, [probes.biased, probes.oracle])
    truth = task.target_truth[task.test]

    def asked(probe: int, latents: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return task.test, ablation.decide(latents)[:, probe] == truth

    given = [asked(0, []), asked(1, [])]
    found = effects(pooled, task.balanced, task.spurious_truth[task.balanced], probes.spurious)
    alive, rng = active_latents(pooled, task.balanced), np.random.default_rng(random_seed)
    after = {}
    for n in ns:
        random = random_seed is not None
        draws = random_choices(alive, n, rng) if random else [largest(np.abs(found), n)]
        after[n] = np.arange(len(given), len(given) + len(draws)).reshape(-1, 1, 1)
        given += [asked(0, latents) for latents in draws]
    return _perturbation(pooled, random_seed, make_answers(given, data.test), 2, after)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrScores:
    """SCR and what it is made of, under each weighting of the test texts."""

    base: Float64[Tensor, " r"]
    """Accuracy of the biased probe."""
    oracle: Float64[Tensor, " r"]
    """Accuracy of the unbiased probe."""
    ablated: dict[int, Float64[Tensor, " r"]]
    """Accuracy of the biased probe with n latents taken out, by n; draws are averaged."""
    scores: dict[int, Float64[Tensor, " r"]]
    """The score, by n; nan where the oracle is no better than the base."""


def scr_scores(measured: Perturbation, weights: Float64[Tensor, "r n"]) -> ScrScores:
    """The SCR score by n."""
    accuracy = measured.answers.accuracy(weights)
    base, oracle = accuracy[:, 0], accuracy[:, 1]
    gap = oracle - base
    after = {
        n: accuracy[:, torch.from_numpy(questions.ravel())].mean(1)
        for n, questions in measured.after.items()
    }
    return ScrScores(
        base=base,
        oracle=oracle,
        ablated=after,
        scores={
            n: torch.where(gap > 0, (each - base) / gap, torch.nan) for n, each in after.items()
        },
    )
