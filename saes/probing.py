"""k-sparse probing: how much of a class a handful of latents knows.

Gurnee et al. 2023 (2305.01610) with the choices of SAEBench (Karvonen et al. 2025, 2503.09532,
"k-sparse probing"): for each class against the rest, with as many texts of the class as of the
rest,

1. choose the k latents whose pooled codes differ most between the two in the training texts
   (absolute difference of means);
2. fit a logistic regression on those k codes;
3. report its accuracy on the test texts. A coin gives 1/2.

What a code of k numbers must be compared with: k residual channels and k principal components
chosen in the same way (SAEBench's residual baseline reaches .65), k latents of a random dictionary,
a probe on the whole activation (the ceiling), and k latents chosen and fitted on shuffled labels
(the floor). Inputs of a probe are standardised by the training texts, so that the penalty falls on
all of them alike; SAEBench does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from probe.errors import UserError
from saes.dictionaries import PooledCodes
from saes.tasks import TaskData

ALL = 0
"""Stands for k where a probe sees every input."""
PENALTY = 1.0
"""Inverse strength C of a sparse probe's L2 penalty: scikit-learn's default."""
DENSE_PENALTY = 0.1
"""The same for a probe of hundreds of inputs: on SmolLM2's layer 12, 0.01 to 1 give test accuracies
within .005 of each other on classes of text, and .1 the best on first letters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BinaryTask:
    """A class against the rest: numbers of texts, half of them of the class."""

    name: str
    """The class."""
    train: Int[np.ndarray, " n"]
    """Training texts."""
    train_truth: Bool[np.ndarray, " n"]
    """Which of them are of the class."""
    test: Int[np.ndarray, " m"]
    """Test texts."""
    test_truth: Bool[np.ndarray, " m"]
    """Which of them are of the class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProbe:
    """A hyperplane in the units of its input."""

    weight: Float64[np.ndarray, " d"]
    """Normal vector; the class lies on its side."""
    bias: float
    """Offset."""

    def decide(self, x: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, " n"]:
        """Whether each row is of the class."""
        return x @ self.weight + self.bias > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What some probes said of the test texts: one row a question, one column a test text."""

    right: Bool[Tensor, "q n"]
    """Whether the answer was right; False where it was not asked."""
    asked: Bool[Tensor, "q n"]
    """Whether the text is among the question's."""

    def accuracy(self, weights: Float64[Tensor, "r n"]) -> Float64[Tensor, "r q"]:
        """Accuracy under each weighting of the texts; nan where none of a question's has weight."""
        asked = weights @ self.asked.double().T
        return torch.where(asked > 0, weights @ self.right.double().T / asked, torch.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseProbe:
    """One class, seen through k latents."""

    dictionary: str
    """Name of the dictionary."""
    k: int
    """Number of latents; 0 stands for all."""
    task: str
    """The class."""
    latents: tuple[int, ...]
    """The latents, that of the largest difference first; empty where all are used."""
    test: Int[np.ndarray, " m"]
    """The test texts it was asked about."""
    right: Bool[np.ndarray, " m"]
    """Whether it was right."""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.mean())


def make_answers(
    given: Sequence[tuple[Int[np.ndarray, " _"], Bool[np.ndarray, " _"]]],
    test: Bool[Tensor, " m"],
) -> Answers:
    """Answers of questions, each a pair of text numbers and whether they were answered rightly.

    Columns are the texts that test, in order.
    """
    column = test.long().cumsum(0).numpy() - 1
    right = torch.zeros(len(given), int(test.sum()), dtype=torch.bool)
    asked = torch.zeros_like(right)
    for question, (texts, answers) in enumerate(given):
        places = torch.from_numpy(column[texts])
        asked[question, places] = True
        right[question, places] = torch.from_numpy(answers)
    return Answers(right=right, asked=asked)


def binary_tasks(data: TaskData, seed: int) -> list[BinaryTask]:
    """Every class against the rest; with two classes the first alone, the other being its mirror.

    Raises `UserError` where there are fewer than two classes.
    """
    labels = np.array(data.labels)
    names = sorted(set(data.labels))
    if len(names) < 2:
        raise UserError(
            f"two classes or more were wanted and all texts are {names[0]!r}; give texts of "
            "several classes."
        )
    if len(names) == 2:
        names = names[:1]
    test = data.test.numpy()
    rng = np.random.default_rng(seed)
    return [make_task(name, labels, test, rng) for name in names]


def make_task(
    name: str, labels: np.ndarray, test: Bool[np.ndarray, " m"], rng: np.random.Generator
) -> BinaryTask:
    """Texts of a class and equally many of the others, these spread over their labels."""
    train, train_truth = _balanced(name, labels, np.flatnonzero(~test), rng)
    tested, test_truth = _balanced(name, labels, np.flatnonzero(test), rng)
    return BinaryTask(
        name=name, train=train, train_truth=train_truth, test=tested, test_truth=test_truth
    )


def _balanced(
    name: str, labels: np.ndarray, pool: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of `pool`, half of the class, and which are; ordered by number."""
    positive = rng.permutation(pool[labels[pool] == name])
    rest = rng.permutation(pool[labels[pool] != name])
    # Every label's first text, then every label's second, and so on.
    seen: dict[str, int] = {}
    turn = np.empty(len(rest), int)
    for i, label in enumerate(labels[rest]):
        turn[i] = seen[label] = seen.get(label, -1) + 1
    rest = rest[np.argsort(turn, kind="stable")]
    n = min(len(positive), len(rest))
    if n == 0:
        raise UserError(
            f"class {name!r} needs training and test texts of itself and of others; give more."
        )
    chosen = np.sort(np.concatenate([positive[:n], rest[:n]]))
    return chosen, labels[chosen] == name


def fit_probe(
    x: Float[np.ndarray, "n d"],
    truth: Bool[np.ndarray, " n"],
    *,
    penalty: float,
    balanced: bool = False,
) -> LinearProbe:
    """Logistic regression on standardised inputs, given back in the inputs' own units.

    `balanced` lets the rarer class weigh as much as the other. Constant inputs get weight 0.
    """
    mean, sd = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    varies = sd > 1e-12 * np.maximum(1, np.abs(mean))
    scale = np.where(varies, sd, 1.0)
    regression = LogisticRegression(
        C=penalty, max_iter=1000, class_weight="balanced" if balanced else None
    )
    regression.fit(np.where(varies, (x - mean) / scale, 0.0), truth)
    weight = np.where(varies, regression.coef_[0] / scale, 0.0)
    bias = float(np.ravel(regression.intercept_)[0] - weight @ mean)
    return LinearProbe(weight=weight.astype(np.float64), bias=bias)


def f1_score(truth: Bool[np.ndarray, " n"], decided: Bool[np.ndarray, " n"]) -> float:
    """Harmonic mean of precision and recall; 0 where there is neither truth nor decision."""
    either = int(truth.sum()) + int(decided.sum())
    return 2 * int((truth & decided).sum()) / either if either else 0.0


def class_means(
    codes: sparse.csr_array, texts: Int[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " s"], Float64[np.ndarray, " s"]]:
    """Mean code of every latent over the texts of the class, and over the others."""
    some = codes[texts].astype(np.float64)
    inside, outside = truth / truth.sum(), ~truth / (~truth).sum()
    return np.asarray(some.T @ inside), np.asarray(some.T @ outside)


def largest(scores: Float64[np.ndarray, " s"], k: int) -> list[int]:
    """Numbers of the at most k largest positive scores, largest first, the lower of equal ones."""
    order = np.argsort(-scores, kind="stable")[:k]
    return [int(i) for i in order if scores[i] > 0]


def k_sparse_probes(
    pooled: PooledCodes,
    tasks: Sequence[BinaryTask],
    ks: Sequence[int],
    *,
    shuffle: int | None = None,
) -> list[SparseProbe]:
    """Probes of the k most different latents of every class, for every k.

    `shuffle` is the seed by which the training labels are permuted first: the floor.
    """
    name = pooled.dictionary.name if shuffle is None else "shuffled"
    rng = np.random.default_rng(shuffle)
    probes = []
    for task in tasks:
        truth = task.train_truth if shuffle is None else rng.permutation(task.train_truth)
        inside, outside = class_means(pooled.codes, task.train, truth)
        chosen = largest(np.abs(inside - outside), max(ks))
        for k in ks:
            latents = chosen[:k]
            right = _answers(pooled, task, truth, latents)
            probes.append(
                SparseProbe(
                    dictionary=name,
                    k=k,
                    task=task.name,
                    latents=tuple(latents),
                    test=task.test,
                    right=right,
                )
            )
    return probes


def _answers(
    pooled: PooledCodes, task: BinaryTask, truth: Bool[np.ndarray, " n"], latents: list[int]
) -> Bool[np.ndarray, " m"]:
    if not latents:  # no code differs: one answer for all
        return task.test_truth == np.False_
    x = pooled.columns(latents)
    probe = fit_probe(x[task.train], truth, penalty=PENALTY)
    return probe.decide(x[task.test]) == task.test_truth


def dense_probes(
    x: Float[np.ndarray, "m d"], tasks: Sequence[BinaryTask], name: str = "dense"
) -> tuple[list[SparseProbe], dict[str, LinearProbe]]:
    """Probes on the whole activation: the ceiling of every class, and the hyperplanes."""
    probes, planes = [], {}
    for task in tasks:
        plane = fit_probe(x[task.train], task.train_truth, penalty=DENSE_PENALTY)
        planes[task.name] = plane
        probes.append(
            SparseProbe(
                dictionary=name,
                k=ALL,
                task=task.name,
                latents=(),
                test=task.test,
                right=plane.decide(x[task.test]) == task.test_truth,
            )
        )
    return probes, planes


def probe_answers(probes: Sequence[SparseProbe], test: Bool[Tensor, " m"]) -> Answers:
    """The probes' answers, a question each, in order."""
    return make_answers([(probe.test, probe.right) for probe in probes], test)


def mean_accuracy(
    probes: Sequence[SparseProbe], test: Bool[Tensor, " m"], weights: Float64[Tensor, "r n"]
) -> Mapping[tuple[str, int], Float64[Tensor, " r"]]:
    """Accuracy averaged over classes, by dictionary and k, under each weighting of the tests."""
    accuracy = probe_answers(probes, test).accuracy(weights)
    groups: dict[tuple[str, int], list[int]] = {}
    for question, probe in enumerate(probes):
        groups.setdefault((probe.dictionary, probe.k), []).append(question)
    return {key: accuracy[:, questions].nanmean(1) for key, questions in groups.items()}
