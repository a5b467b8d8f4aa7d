"""Ablations against slow ones row by row, planted dictionaries, and scores by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from planted import class_texts, planted_sae, task_data

from probe.errors import UserError
from saes.dictionaries import PooledCodes, axes_dictionary, pool_codes, sae_dictionary
from saes.models import SparseAutoencoder
from saes.perturbation import (
    Ablation,
    Perturbation,
    effects,
    fit_spurious,
    make_spurious,
    measure_scr,
    measure_tpp,
    scr_scores,
    tpp_drops,
    tpp_scores,
)
from saes.probing import LinearProbe, binary_tasks, dense_probes, make_answers
from saes.tasks import TaskData
from saes.types import Codes


def ones(data: TaskData) -> torch.Tensor:
    return torch.ones(1, int(data.test.sum()), dtype=torch.float64)


# ------------------------------------------------------------------------------ ablation


def ablated(x: torch.Tensor, sae: SparseAutoencoder, latents: list[int]) -> torch.Tensor:
    """Rows with latents set to zero in their codes and the SAE's error added back."""
    codes = sae.encode(x)
    error = x - sae.decode(codes, x)
    kept = torch.where(torch.isin(codes.indices, torch.tensor(latents)), 0.0, codes.values)
    return sae.decode(Codes(values=kept, indices=codes.indices), x) + error


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_probes_say_what_they_say_of_activations_ablated_row_by_row(normalize: str) -> None:
    generator = torch.Generator().manual_seed(0)
    text = (
        torch.cat([torch.arange(12), torch.randint(12, (48,), generator=generator)]).sort().values
    )
    x = torch.randn(60, 6, generator=generator)
    data = task_data(torch.zeros(12, 6), ["a", "b"] * 6, [False, True, True] * 4)
    data = dataclasses.replace(data, rows=x, text=text)
    sae = planted_sae(torch.randn(14, 6, generator=generator), k=4, normalize=normalize)
    with torch.no_grad():
        sae.b_dec.add_(0.3)
    pooled = pool_codes(sae_dictionary(sae), data)
    rng = np.random.default_rng(0)
    probes = [LinearProbe(weight=rng.normal(size=6), bias=float(rng.normal()) / 3) for _ in "abcd"]
    texts = np.flatnonzero(data.test.numpy())
    ablation = Ablation.of(pooled, data.pooled().double().numpy(), texts, probes)
    changed = 0
    for latents in ([], [0], [3, 1, 9], list(range(14))):
        slow = ablated(x, sae, latents)
        means = torch.stack([slow[text == i].mean(0) for i in texts]).double().numpy()
        expected = np.stack([probe.decide(means) for probe in probes], 1)
        assert (ablation.decide(latents) == expected).all()
        changed += int((expected != (ablation.logits > 0)).sum())
    assert changed > 10


def test_effects_by_hand() -> None:
    data = task_data(
        torch.tensor([[3.0, 0], [1, 2], [0, 4], [0, 0]]), ["a", "a", "b", "b"], [False] * 4
    )
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    pooled = pool_codes(sae_dictionary(planted_sae(directions, k=2)), data)
    truth = np.array([True, True, False, False])
    probe = LinearProbe(weight=np.array([2.0, -3.0]), bias=0.0)
    # Means 2 and 1 inside, 0 and 2 outside; d . w = 2 and -3.
    np.testing.assert_allclose(effects(pooled, np.arange(4), truth, probe), [4, 3])
    # The second latent is less active on the class: it is none of the class's own.
    np.testing.assert_allclose(effects(pooled, np.arange(4), truth, probe, own=True), [4, 0])


# ------------------------------------------------------------------------------ TPP


def planted_classes(n_classes: int = 5, d: int = 60) -> tuple[TaskData, PooledCodes]:
    x, labels, test = class_texts(n=30, n_classes=n_classes, d=d)
    data = task_data(x, labels, test)
    return data, pool_codes(sae_dictionary(planted_sae(torch.eye(d), k=min(12, d))), data)


def own_channel_probes(n_classes: int, d: int) -> dict[str, LinearProbe]:
    """Probes that look at the class's own channel alone: absence of the others tells nothing."""
    return {f"class-{i}": LinearProbe(weight=np.eye(d)[i], bias=-2.0) for i in range(n_classes)}


def test_a_planted_dictionary_loses_one_class_at_a_time() -> None:
    data, pooled = planted_classes()
    tasks, probes = binary_tasks(data, 0), own_channel_probes(5, 60)
    measured = measure_tpp(pooled, data, tasks, probes, (1, 3))
    own, others = tpp_drops(measured, ones(data))[1]
    # Every probe is right, then says no to all: half of a balanced test.
    assert float(own[0]) == 0.5 and float(others[0]) == 0
    assert float(tpp_scores(measured, ones(data))[1][0]) == 0.5
    random = measure_tpp(pooled, data, tasks, probes, (1, 3), random_seed=0)
    assert random.name == "random_latents" and random.after[1].shape == (5, 5, 5)
    # A class's own latent is seldom among one or three of sixty.
    assert all(abs(float(score[0])) < 0.1 for score in tpp_scores(random, ones(data)).values())


def test_a_dictionary_that_spreads_its_classes_is_not_targeted() -> None:
    data, _ = planted_classes()
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(60, 60, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    spread = pool_codes(sae_dictionary(planted_sae(directions, k=12)), data)
    tasks, probes = binary_tasks(data, 0), own_channel_probes(5, 60)
    measured = measure_tpp(spread, data, tasks, probes, (1,))
    assert abs(float(tpp_scores(measured, ones(data))[1][0])) < 0.1


def test_all_latents_or_more_than_there_are() -> None:
    data, pooled = planted_classes(n_classes=3, d=5)
    tasks = binary_tasks(data, 0)
    _, probes = dense_probes(data.pooled().double().numpy(), tasks)
    measured = measure_tpp(pooled, data, tasks, probes, (100,), random_seed=3)
    # Everything is taken out for every class: whatever is lost is lost for all alike.
    assert float(tpp_scores(measured, ones(data))[100][0]) == pytest.approx(0, abs=1e-9)


def test_the_tpp_score_by_hand() -> None:
    test = torch.tensor([True] * 4)
    everyone = np.arange(4)

    def right(n: int) -> tuple[np.ndarray, np.ndarray]:
        return everyone, np.arange(4) < n

    # Before: 4/4 and 3/4. Latents of class 0 out: 1/4 and 3/4; of class 1: 4/4 and 1/4.
    answers = make_answers([right(4), right(3), right(1), right(3), right(4), right(1)], test)
    measured = Perturbation(
        name="d", label="d", answers=answers, before=np.arange(2),
        after={7: np.array([[[2, 3], [4, 5]]])},
    )  # fmt: skip
    weights = torch.ones(1, 4, dtype=torch.float64)
    own, others = tpp_drops(measured, weights)[7]
    assert float(own[0]) == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert float(others[0]) == pytest.approx(0)
    assert float(tpp_scores(measured, weights)[7][0]) == pytest.approx(5 / 8)


def test_tpp_needs_several_classes() -> None:
    data, pooled = planted_classes(n_classes=2, d=5)
    with pytest.raises(UserError, match="three classes"):
        measure_tpp(pooled, data, binary_tasks(data, 0), {}, (1,))


# ------------------------------------------------------------------------------ SCR

KINDS = {"yes": ("story",), "no": ("list", "table")}
TOPICS = {"wet": ("sea",), "dry": ("sand",)}


def spurious_texts(n: int = 40, d: int = 30, target: float = 2.0) -> TaskData:
    """Every combination alike often; the spurious property is the stronger direction."""
    generator = torch.Generator().manual_seed(0)
    cells = list(itertools.product(("story", "list"), ("sea", "sand"))) * n
    x = 0.1 * torch.randn(len(cells), d, generator=generator)
    for row, (label, attribute) in zip(x, cells, strict=True):
        row[0] += target * (label == "story")
        row[1] += 4.0 * (attribute == "sea")
    labels, attributes = zip(*cells, strict=True)
    test = torch.arange(len(cells)) // 4 % 2 == 0
    return task_data(x, list(labels), test, list(attributes))


def test_taking_out_the_planted_spurious_latent_frees_the_probe() -> None:
    data = spurious_texts()
    pooled = pool_codes(sae_dictionary(planted_sae(torch.eye(30), k=10)), data)
    task = make_spurious(data, KINDS, TOPICS, swapped=False, seed=0)
    assert (task.target, task.spurious) == ("yes against no", "wet against dry")
    x = data.pooled().double().numpy()
    # Leans on both properties alike: the spurious one, twice as strong, has the say.
    biased = LinearProbe(weight=np.eye(30)[0] + np.eye(30)[1], bias=-1.0)
    fitted = fit_spurious(x, task)
    oracle = LinearProbe(weight=np.eye(30)[0], bias=-1.0)
    probes = dataclasses.replace(fitted, biased=biased, oracle=oracle)
    scores = scr_scores(measure_scr(pooled, data, task, probes, (1,)), ones(data))
    assert float(scores.base[0]) == 0.75 and float(scores.oracle[0]) == 1
    assert float(scores.scores[1][0]) == 1
    # The probes that are fitted see the same: the biased one follows both, the others one each.
    for probe, strongest in ((fitted.biased, {0, 1}), (fitted.oracle, {0}), (fitted.spurious, {1})):
        scaled = np.abs(probe.weight * x.std(0))
        assert set(np.argsort(-scaled)[: len(strongest)].tolist()) == strongest
    random = scr_scores(measure_scr(pooled, data, task, probes, (1,), random_seed=1), ones(data))
    assert abs(float(random.scores[1][0])) < 0.25


def test_a_spurious_task_is_balanced_where_it_should_be() -> None:
    data = spurious_texts(n=21)
    for swapped in (False, True):
        task = make_spurious(data, KINDS, TOPICS, swapped=swapped, seed=0)
        assert (task.target_truth == task.spurious_truth)[task.biased].all()
        for texts in (task.balanced, task.test):
            counts = np.zeros((2, 2), int)
            np.add.at(counts, (task.target_truth[texts] * 1, task.spurious_truth[texts] * 1), 1)
            assert (counts == counts[0, 0]).all()
        assert len(task.biased) == len(task.balanced) == 20
        assert not data.test[torch.from_numpy(task.biased)].any()
        assert data.test[torch.from_numpy(task.test)].all()
    assert task.target == "wet against dry"


def test_too_few_texts_of_a_combination() -> None:
    data = spurious_texts(n=40)
    labels = tuple("story" if attribute == "sea" else "list" for attribute in data.attributes)
    with pytest.raises(UserError, match="the rarest has 0 and 0"):
        make_spurious(
            dataclasses.replace(data, labels=labels), KINDS, TOPICS, swapped=False, seed=0
        )


def test_scr_is_undefined_where_the_bias_costs_nothing() -> None:
    test = torch.tensor([True, True])
    both = np.arange(2)

    def measured(base: int, oracle: int, after: int) -> Perturbation:
        given = [(both, np.arange(2) < n) for n in (base, oracle, after)]
        return Perturbation(
            name="d", label="d", answers=make_answers(given, test), before=np.arange(2),
            after={1: np.array([[[2]]])},
        )  # fmt: skip

    weights = torch.ones(1, 2, dtype=torch.float64)
    assert float(scr_scores(measured(0, 2, 1), weights).scores[1][0]) == 0.5
    assert float(scr_scores(measured(1, 2, 0), weights).scores[1][0]) == -1
    for base, oracle in ((1, 1), (2, 1)):
        assert math.isnan(float(scr_scores(measured(base, oracle, 1), weights).scores[1][0]))


def test_principal_axes_may_point_either_way() -> None:
    data, _ = planted_classes(n_classes=3, d=6)
    tasks = binary_tasks(data, 0)
    _, probes = dense_probes(data.pooled().double().numpy(), tasks)
    scores = []
    for sign in (1, -1):
        axes = axes_dictionary("pca", "pca", sign * torch.eye(6), data.rows.mean(0))
        measured = measure_tpp(pool_codes(axes, data), data, tasks, probes, (1, 2))
        scores.append([float(score[0]) for score in tpp_scores(measured, ones(data)).values()])
    assert scores[0] == scores[1]
