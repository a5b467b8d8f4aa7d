"""Absorption: scores by hand, a planted absorbing latent, and thresholds."""

import numpy as np
import pytest
import torch
from planted import planted_sae, task_data
from scipy import sparse

from probe.errors import UserError
from saes.absorption import (
    PAPER,
    RELEASED,
    AbsorptionConfig,
    LetterAbsorption,
    Thresholds,
    find_letters,
    main_latents,
    mean_absorption,
    measure_absorption,
    shuffled,
    word_scores,
)
from saes.dictionaries import Dictionary, PooledCodes, pool_codes, sae_dictionary
from saes.tasks import TaskData
from saes.types import Codes

P = np.array([1.0, 0.0])
DIRECTIONS = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0], [0.8, -0.6], [0.0, 1.0]])
"""Cosines with P: 1, .6, -1, .8, 0."""


def score(x: float, codes: list[float], main: list[int], thresholds: Thresholds = PAPER) -> float:
    return float(
        word_scores(
            np.array([[x, 5.0]]), sparse.csr_array(np.array([codes])), DIRECTIONS, main,
            thresholds, P,
        )[0]
    )  # fmt: skip


def test_scores_by_hand() -> None:
    # Main latent 0 gives 1 of x . p = 4; 1 gives .6 * 2, 3 gives .8 * 1, 4 gives 0, 2 is negative.
    codes = [1.0, 2.0, 3.0, 1.0, 9.0]
    assert score(4, codes, [0]) == pytest.approx(2.0 / 3.0)
    assert score(4, codes, [0, 1]) == pytest.approx(0.8 / (0.8 + 2.2))
    # The main latents do their work: nothing is absorbed.
    assert score(1, codes, [0]) == 0
    assert score(0.9, codes, [0]) == 0
    # They fall silent, or point away: all is absorbed.
    assert score(4, [0.0, 2, 0, 0, 0], [0]) == 1
    assert score(4, [0.0, 2, 3, 0, 0], [2]) == 1
    assert score(4, [0.0, 2, 0, 0, 0], []) == 1
    # Nothing absorbs, or the word does not point along p.
    assert score(4, [1.0, 0, 0, 0, 9], [0]) == 0
    assert score(4, [0.0, 0, 0, 0, 0], [0]) == 0
    assert score(-4, codes, [0]) == 0


def test_thresholds_by_hand() -> None:
    codes = [1.0, 2.0, 3.0, 1.0, 9.0]
    assert score(4, codes, [0], Thresholds(tau_ps=0.7)) == pytest.approx(0.8 / 1.8)
    assert score(4, codes, [0], Thresholds(max_absorbers=1)) == pytest.approx(1.2 / 2.2)
    assert score(4, codes, [0], Thresholds(tau_pa=0.5)) == pytest.approx(2 / 3)
    assert score(4, codes, [0], Thresholds(tau_pa=0.51)) == 0
    # Absorbers give 2 where only 1.5 - 1 is missing.
    assert score(1.5, codes, [0], Thresholds(capped=True)) == pytest.approx(0.5 / 1.5)
    assert score(4, codes, [0], RELEASED) == pytest.approx(2 / 3)
    assert score(6, codes, [0], RELEASED) == 0  # 2 of 6 is less than .4


def test_decoder_rows_need_not_have_unit_norm() -> None:
    long = word_scores(
        np.array([[4.0, 5.0]]), sparse.csr_array([[0.1, 2.0, 0, 1.0, 0]]),
        DIRECTIONS * np.array([[10.0], [1], [1], [1], [0]]), [0], Thresholds(tau_ps=0.7), P,
    )  # fmt: skip
    assert float(long[0]) == pytest.approx(0.8 / 1.8)


def one_word(codes: np.ndarray, along: np.ndarray, cosines: np.ndarray, main: list[int], x: float):
    """The released rule for one word, step by step."""
    by_main = sum(codes[i] * along[i] for i in main)
    able = [i for i in range(len(codes)) if i not in main and cosines[i] >= 0.1]
    top = sum(sorted(codes[i] * along[i] for i in able if codes[i] * along[i] > 0)[-3:])
    if by_main >= x or top < 0.4 * x:
        return 0.0
    if by_main <= 0:
        return 1.0
    top = min(top, x - by_main)
    return top / (top + by_main)


def test_the_released_rule_against_a_slow_one() -> None:
    rng = np.random.default_rng(0)
    scored = 0
    for _ in range(300):
        s = int(rng.integers(4, 30))
        directions, p = rng.normal(size=(s, 6)), rng.normal(size=6)
        p /= np.linalg.norm(p)
        codes = rng.exponential(size=s) * (rng.random(s) < 0.4)
        x = codes @ directions + rng.normal(size=6)
        x -= 2 * min(0.0, x @ p) * p
        main = rng.permutation(s)[: rng.integers(1, 3)].tolist()
        found = word_scores(x[None], sparse.csr_array(codes[None]), directions, main, RELEASED, p)
        along = directions @ p
        cosines = along / np.linalg.norm(directions, axis=1)
        expected = one_word(codes, along, cosines, main, float(x @ p))
        assert float(found[0]) == pytest.approx(expected)
        scored += expected > 0
    assert scored > 100


# ------------------------------------------------------------------------------ planted


def planted(n: int = 90, d: int = 16) -> tuple[TaskData, PooledCodes]:
    """Three letters along channels 0 to 2 with a latent each; one word in five of the letter "a"
    is a special one, whose own latent (channels 0 and 3 together) does letter and word alike.
    """
    generator = torch.Generator().manual_seed(0)
    x = 0.05 * torch.randn(n, d, generator=generator)
    letter = torch.arange(n) % 3
    x[torch.arange(n), letter] += 2.0
    special = (letter == 0) & (torch.arange(n) % 5 == 0)
    x[special, 3] += 2.0
    test = torch.arange(n) % 2 == 0
    data = task_data(x, [f"{'abc'[i]}" for i in letter.tolist()], test)
    together = torch.zeros(d)
    together[[0, 3]] = 0.5**0.5
    directions = torch.cat([torch.eye(d)[:3], together[None]])

    def encode(rows: torch.Tensor) -> Codes:
        is_special = rows[:, 3] > 1
        values = torch.where(is_special, 8**0.5, rows[:, :3].max(1).values)
        indices = torch.where(is_special, 3, rows[:, :3].argmax(1))
        return Codes(values=values[:, None], indices=indices[:, None])

    dictionary = Dictionary(name="sae", label="planted", directions=directions, encode=encode)
    return data, pool_codes(dictionary, data)


def test_a_planted_absorber_is_found() -> None:
    data, pooled = planted()
    letters = find_letters(data)
    assert [letter.name for letter in letters] == ["a", "b", "c"]
    assert all(letter.f1 == 1 and len(letter.words) == 15 for letter in letters)
    config = AbsorptionConfig(thresholds=Thresholds(tau_pa=0.4, tau_ps=0.1))
    found = {each.letter: each for each in measure_absorption(pooled, data, letters, config)}
    # The special latent adds a fifth of the words to the main latent's: F1 from 8 / 9 to 1.
    assert found["a"].main == (0, 3) and found["a"].main_f1 == 1
    assert found["b"].main == (1,) and found["c"].main == (2,)
    assert all(each.scores.max() == 0 for each in found.values())

    strict = AbsorptionConfig(thresholds=config.thresholds, tau_fs=0.2)
    a, b, c = measure_absorption(pooled, data, letters, strict)
    assert a.main == (0,) and a.main_f1 == pytest.approx(8 / 9)
    special = data.rows[a.words, 3].numpy() > 1
    assert special.sum() == 3
    # Where the main latent is silent the special one has the whole of the letter.
    assert (a.scores[special] == 1).all() and (a.scores[~special] == 0).all()
    weights = torch.ones(2, 45, dtype=torch.float64)
    # A resample without the special words: the test words are every second text.
    columns = (data.rows[data.test, 3] > 1).nonzero().squeeze(1)
    weights[1, columns] = 0
    mean = mean_absorption([a, b, c], data.test, weights)
    assert mean.score.tolist() == pytest.approx([(3 / 15) / 3, 0])


def test_main_latents_grow_with_f1_and_stop() -> None:
    truth = np.arange(60) < 30
    codes = np.zeros((60, 4))
    codes[:20, 0] = 1  # F1 .8
    codes[20:29, 1] = 1  # together .983
    codes[29, 2] = 1  # and 1: less than .03 more
    codes[30:, 3] = 5  # of the others
    dictionary = Dictionary(
        name="d", label="d", directions=torch.eye(4), encode=lambda x: Codes(values=x, indices=x)
    )
    pooled = PooledCodes(dictionary=dictionary, codes=sparse.csr_array(codes), l0=1.0)
    main, f1 = main_latents(pooled, np.arange(60), truth, AbsorptionConfig())
    assert main == [0, 1] and f1 == pytest.approx(2 * 29 / 59)
    main, f1 = main_latents(pooled, np.arange(60), truth, AbsorptionConfig(tau_fs=0.01))
    assert main == [0, 1, 2] and f1 == 1
    assert main_latents(pooled, np.arange(60), truth, AbsorptionConfig(max_main=1))[0] == [0]
    silent = PooledCodes(dictionary=dictionary, codes=sparse.csr_array((60, 4)), l0=0.0)
    assert main_latents(silent, np.arange(60), truth, AbsorptionConfig()) == ([], 0.0)


def test_the_random_control_is_drawn_by_the_seed() -> None:
    data, _ = planted()
    directions = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    pooled = pool_codes(sae_dictionary(planted_sae(directions, k=8)), data)
    letters = find_letters(data)
    one, same, other = (
        measure_absorption(pooled, data, letters, AbsorptionConfig(seed=seed))[0].random
        for seed in (0, 0, 1)
    )
    assert (one == same).all() and (one != other).any()
    assert ((one >= 0) & (one <= 1)).all()


def test_shuffled_letters_stay_on_their_side_of_the_split() -> None:
    data, _ = planted()
    other = shuffled(data, 0)
    assert other.labels != data.labels and torch.equal(other.rows, data.rows)
    for part in (data.test, ~data.test):
        places = part.nonzero().squeeze(1).tolist()
        before, after = ([each.labels[i] for i in places] for each in (data, other))
        assert before != after and sorted(before) == sorted(after)


def test_a_letter_without_recognised_words_is_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 4, generator=generator)
    data = task_data(noise, ["a"] * 37 + ["b"] * 3, [False] * 37 + [True, False, False])
    letters = find_letters(data)
    pooled = pool_codes(sae_dictionary(planted_sae(torch.eye(4), k=2)), data)
    found = measure_absorption(pooled, data, letters, AbsorptionConfig())
    assert {each.letter for each in found} == {n.name for n in letters if len(n.words)} < {"a", "b"}
    with pytest.raises(UserError, match="two letters"):
        find_letters(task_data(noise, ["a"] * 40, [True] * 20 + [False] * 20))


def test_the_mean_weighs_letters_alike() -> None:
    def letter(name: str, words: list[int], scores: list[float]) -> LetterAbsorption:
        values = np.array(scores)
        return LetterAbsorption(
            letter=name, probe_f1=1.0, main=(0,), main_f1=1.0, words=np.array(words),
            scores=values, random=values / 2,
        )  # fmt: skip

    test = torch.tensor([True, False, True, True, True])
    letters = [letter("a", [0, 2, 3], [0.0, 0.5, 1.0]), letter("b", [4], [0.2])]
    weights = torch.tensor([[1.0, 1, 1, 1], [0, 0, 2, 0]], dtype=torch.float64)
    found = mean_absorption(letters, test, weights)
    assert found.score.tolist() == pytest.approx([(0.5 + 0.2) / 2, 1.0])
    assert found.random.tolist() == pytest.approx([0.175, 0.5])
