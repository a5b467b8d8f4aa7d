"""Pooled codes against slow sums, planted classes, and probes by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from planted import class_texts, planted_sae, task_data
from scipy import sparse

from probe.errors import Failure, UserError
from saes.baselines import random_dictionary_candidate
from saes.dictionaries import (
    Dictionary,
    axes_dictionary,
    channel_dictionary,
    pca_dictionary,
    pool_codes,
    probe_dictionary,
    random_dictionary,
    sae_dictionary,
)
from saes.probing import (
    Answers,
    binary_tasks,
    class_means,
    dense_probes,
    f1_score,
    fit_probe,
    k_sparse_probes,
    largest,
    make_answers,
    mean_accuracy,
)
from saes.tasks import TaskData
from saes.types import Codes


def several_rows(d: int = 6) -> TaskData:
    """Five texts of one to four rows."""
    lengths = [3, 1, 4, 2, 2]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(lengths), d, generator=generator) + 0.5
    data = task_data(torch.zeros(5, d), ["a", "b", "a", "b", "a"], [False, False, True, True, True])
    text = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    return dataclasses.replace(data, rows=x, text=text)


# ------------------------------------------------------------------------------ dictionaries


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_pooled_codes_are_what_each_latent_adds_on_average(normalize: str) -> None:
    data = several_rows()
    directions = torch.randn(11, 6, generator=torch.Generator().manual_seed(2))
    sae = planted_sae(directions, k=3, normalize=normalize)
    pooled = pool_codes(sae_dictionary(sae), data)
    assert 0 < pooled.l0 <= 3
    for text in range(5):
        rows = data.rows[data.text == text]
        mean = sae(rows).reconstruction.mean(0)
        offset = sae.b_dec if normalize == "none" else rows.mean(1, keepdim=True).mean(0)
        added = torch.from_numpy(pooled.codes[[text]].toarray()[0]).float() @ directions
        torch.testing.assert_close(added + offset, mean, rtol=1e-4, atol=1e-5)


def test_pooling_in_small_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = several_rows()
    dictionary = sae_dictionary(planted_sae(torch.eye(6), k=2))
    whole = pool_codes(dictionary, data).codes.toarray()
    monkeypatch.setattr("saes.dictionaries.ROWS_AT_ONCE", 2)
    np.testing.assert_allclose(pool_codes(dictionary, data).codes.toarray(), whole)


def test_linear_dictionaries_pool_rows_instead_of_codes() -> None:
    data = several_rows()
    axes = pca_dictionary(data)
    slow = dataclasses.replace(axes, linear=False)
    np.testing.assert_allclose(
        pool_codes(axes, data).codes.toarray(), pool_codes(slow, data).codes.toarray(), atol=1e-6
    )
    channels = pool_codes(channel_dictionary(data), data).codes.toarray()
    mean = data.rows[data.text < 2].mean(0)  # texts 0 and 1 train
    np.testing.assert_allclose(channels, data.pooled().numpy() - mean.numpy(), atol=1e-6)
    torch.testing.assert_close(axes.directions @ axes.directions.T, torch.eye(6))


def test_random_dictionary_is_the_baseline_s() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 8, generator=generator) + 3
    data = task_data(x, ["a", "b"] * 250, torch.arange(500) % 5 == 0)
    dictionary = random_dictionary(data, 40, 4, seed=0)
    training = x[~data.test]
    codes = dictionary.encode(training)
    assert (codes.values > 0).sum(1).max() == 4
    # Its directions are those of the codes: together they make the baseline's reconstruction.
    baseline = random_dictionary_candidate(training, training.mean(0), 40, 4, 0)
    new = codes.dense(40) @ dictionary.directions + training.mean(0)
    torch.testing.assert_close(new, baseline.reconstruct(training).reconstruction)


def test_a_probe_s_own_direction_is_taken_out_to_the_mean() -> None:
    data = several_rows()
    weights = np.array([[3.0, 0, 4, 0, 0, 0], [0, 2, 0, 0, 0, 0]])
    pooled = pool_codes(probe_dictionary(data, weights), data)
    np.testing.assert_allclose(pooled.dictionary.directions[0], [0.6, 0, 0.8, 0, 0, 0], rtol=1e-6)
    x = data.pooled().double().numpy()
    left = x - pooled.columns([1]) @ pooled.dictionary.directions[[1]].numpy()
    np.testing.assert_allclose(left[:, 1], float(data.rows[data.text < 2].mean(0)[1]), rtol=1e-5)
    np.testing.assert_allclose(np.delete(left, 1, 1), np.delete(x, 1, 1))


def test_another_width_and_nan_are_told() -> None:
    data = several_rows()
    with pytest.raises(UserError, match="directions of width 4 and the activations have width 6"):
        pool_codes(sae_dictionary(planted_sae(torch.eye(4), k=1)), data)

    def nothing(x: torch.Tensor) -> Codes:
        return Codes(
            values=torch.full((len(x), 1), torch.nan),
            indices=torch.zeros(len(x), 1, dtype=torch.long),
        )

    broken = Dictionary(name="b", label="broken", directions=torch.eye(6), encode=nothing)
    with pytest.raises(Failure, match="broken gives NaN"):
        pool_codes(broken, data)


# ------------------------------------------------------------------------------ pieces


def test_class_means_by_hand() -> None:
    codes = sparse.csr_array(np.array([[1.0, 0], [3, 2], [0, 4], [8, 8]]))
    inside, outside = class_means(codes, np.array([0, 1, 2]), np.array([True, True, False]))
    np.testing.assert_allclose(inside, [2, 1])
    np.testing.assert_allclose(outside, [0, 4])


def test_largest_takes_positive_scores_and_the_lower_of_equals() -> None:
    assert largest(np.array([0.0, 2, -1, 2, 3]), 3) == [4, 1, 3]
    assert largest(np.array([0.0, -1]), 3) == []


def test_f1_by_hand() -> None:
    truth = np.array([True, True, False, False])
    assert f1_score(truth, np.array([True, False, True, False])) == pytest.approx(1 / 2)
    assert f1_score(truth & False, truth & False) == 0


def test_a_probe_is_in_the_units_of_its_input() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(80) % 2 == 0
    x = np.stack([truth * 2e4 + rng.normal(size=80), np.full(80, 7.0)], 1) + 1e3
    probe = fit_probe(x, truth, penalty=1.0)
    assert probe.weight[1] == 0
    assert (probe.decide(x) == truth).all()
    np.testing.assert_allclose(-probe.bias / probe.weight[0], 1e3 + 1e4, rtol=0.02)


def test_balanced_probes_let_a_rare_class_count() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(400) % 40 == 0
    x = (truth * 1.0 + rng.normal(size=400) * 0.7)[:, None]
    plain = fit_probe(x, truth, penalty=1.0).decide(x)
    balanced = fit_probe(x, truth, penalty=1.0, balanced=True).decide(x)
    assert plain[truth].mean() < 0.3 < 0.6 < balanced[truth].mean()


def test_tasks_are_balanced_and_apart() -> None:
    labels = ["a"] * 30 + ["b"] * 10 + ["c"] * 50
    data = task_data(torch.zeros(90, 2), labels, torch.arange(90) % 3 == 0)
    tasks = binary_tasks(data, seed=0)
    assert [task.name for task in tasks] == ["a", "b", "c"]
    for task in tasks:
        for texts, truth in ((task.train, task.train_truth), (task.test, task.test_truth)):
            assert truth.sum() * 2 == len(texts) == len(set(texts))
            assert all((labels[i] == task.name) == t for i, t in zip(texts, truth, strict=True))
        assert not set(task.train) & set(task.test)
        assert not data.test[torch.from_numpy(task.train)].any()
    # c has 34 training texts, the others 20 and 6: all of these, and as many of c.
    assert len(tasks[2].train) == 2 * 26
    # a's 20 training texts stand against all 6 of b and 14 of c, taken in turn.
    against = [labels[i] for i in tasks[0].train if labels[i] != "a"]
    assert (against.count("b"), against.count("c")) == (6, 14)
    again = binary_tasks(data, seed=0)
    assert all((a.train == b.train).all() for a, b in zip(tasks, again, strict=True))


def test_two_classes_are_one_task_and_one_is_none() -> None:
    data = task_data(torch.zeros(8, 1), ["a", "b"] * 4, [False] * 4 + [True] * 4)
    assert [task.name for task in binary_tasks(data, 0)] == ["a"]
    same = task_data(torch.zeros(2, 1), ["a", "a"], [False, True])
    with pytest.raises(UserError, match="all texts are 'a'"):
        binary_tasks(same, 0)
    torn = task_data(torch.zeros(3, 1), ["a", "b", "c"], [False, False, True])
    with pytest.raises(UserError, match="needs training and test texts"):
        binary_tasks(torn, 0)


def test_accuracy_of_answers_by_hand() -> None:
    test = torch.tensor([False, True, True, False, True])
    answers = make_answers(
        [
            (np.array([1, 4]), np.array([True, False])),
            (np.array([2, 4]), np.array([True, True])),
        ],
        test,
    )
    assert answers.asked.tolist() == [[True, False, True], [False, True, True]]
    weights = torch.tensor([[1.0, 1, 1], [3, 0, 1], [0, 1, 0]], dtype=torch.float64)
    found = answers.accuracy(weights)
    assert found[:2].tolist() == [[1 / 2, 1], [3 / 4, 1]]
    assert found[2, 0].isnan() and found[2, 1] == 1
    assert isinstance(answers, Answers)


# ------------------------------------------------------------------------------ planted classes


def test_a_planted_latent_is_found_and_the_floor_is_a_coin() -> None:
    x, labels, test = class_texts(n=60, n_classes=4, d=24, noise=0.6)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(5)))[0]
    data = task_data(x @ rotation, labels, test)
    tasks = binary_tasks(data, 0)
    pooled = pool_codes(sae_dictionary(planted_sae(rotation, k=3)), data)
    probes = k_sparse_probes(pooled, tasks, (1, 2))
    probes += k_sparse_probes(pooled, tasks, (1,), shuffle=0)
    probes += k_sparse_probes(pool_codes(channel_dictionary(data), data), tasks, (1,))
    probes += dense_probes(data.pooled().double().numpy(), tasks)[0]
    assert [p.latents for p in probes[:8:2]] == [(0,), (1,), (2,), (3,)]
    ones = torch.ones(1, int(test.sum()), dtype=torch.float64)
    found = {key: float(value[0]) for key, value in mean_accuracy(probes, test, ones).items()}
    assert found["sae", 1] == found["sae", 2] == found["dense", 0] == 1
    assert 0.3 < found["shuffled", 1] < 0.7
    assert found["channels", 1] < 0.95
    assert found["channels", 1] == np.mean(
        [p.accuracy for p in probes if p.dictionary == "channels"]
    )


def test_codes_that_never_differ_answer_no() -> None:
    data = task_data(torch.zeros(12, 3), ["a", "b"] * 6, [False] * 8 + [True] * 4)
    pooled = pool_codes(sae_dictionary(planted_sae(torch.eye(3), k=1)), data)
    (probe,) = k_sparse_probes(pooled, binary_tasks(data, 0), (2,))
    assert probe.latents == () and probe.accuracy == 0.5


def test_more_latents_than_there_are() -> None:
    x, labels, test = class_texts(n=12, n_classes=3, d=3)
    data = task_data(x, labels, test)
    dictionary = axes_dictionary("axes", "axes", torch.eye(3), torch.zeros(3))
    probes = k_sparse_probes(pool_codes(dictionary, data), binary_tasks(data, 0), (50,))
    assert all(len(probe.latents) == 3 and probe.accuracy == 1 for probe in probes)
