"""Circuit breakers, what is measured: sets, prompts, attacks, judges, probes, features."""

import copy
import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from breaker_tree import prompts_of, write_lines
from collapse_tree import long_llama, untrained_sae

from analyses.cells import Frame, select
from analyses.circuit_breakers.asking import (
    Ask,
    after_turns,
    answer_logits,
    mean_nll,
    plain,
    prefilled,
    soft_tokens,
    with_soft_tokens,
)
from analyses.circuit_breakers.attacks import optimise_soft_prompt, steered, steering_vectors
from analyses.circuit_breakers.capability import (
    Choice,
    kl,
    multiple_choice,
    read_choices,
    response_change,
)
from analyses.circuit_breakers.concepts import CONCEPTS
from analyses.circuit_breakers.features import difference, putting_back, read_row, readding
from analyses.circuit_breakers.inside import change_tables, changes
from analyses.circuit_breakers.judging import (
    Judge,
    Limits,
    judged,
    mean_entropy,
    refuses,
    repetition,
)
from analyses.circuit_breakers.numbers import by_seed, crossed
from analyses.circuit_breakers.passages import Part, Passages, ordinary_passages
from analyses.circuit_breakers.probes import (
    SKIPPED,
    direction_table,
    fit_probe,
    layer_probes,
    matched_threshold,
    shuffled_labels,
)
from analyses.circuit_breakers.robustness import tuned_curve
from analyses.circuit_breakers.rows import Passage, token_rows
from analyses.circuit_breakers.subjects import (
    harmful_subject,
    passages_of,
    passages_table,
    unique,
    without_known,
)
from probe.errors import UserError
from probe.generation import GenerateConfig, generate, generate_many
from probe.language import LanguageModel
from probe.prompt_sets import read_prompts
from saes.folder import load_sae
from saes.recipe_saes import LoadedSae


@pytest.fixture(scope="module")
def chatty() -> LanguageModel:
    return long_llama()


@pytest.fixture(scope="module")
def moved(chatty) -> LanguageModel:
    """The same with other weights in its last block's MLP."""
    model = copy.deepcopy(chatty.model)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        model.model.layers[1].mlp.down_proj.weight.normal_(std=0.5)
    return LanguageModel("moved", model, chatty.tokenizer)


TEXTS = [Passage(request=f"Tell {word}", response=f"{word} is good", topic=word)
         for word in ("salt", "milk", "bread")]  # fmt: skip


# ------------------------------------------------------------------------------------------ sets


@pytest.mark.parametrize("concept", CONCEPTS, ids=lambda concept: concept.name)
def test_judging_is_on_topics_that_training_has_not_seen(concept):
    assert len(concept.topics) == len(concept.near_topics) == 30
    sets = {
        trained: [*concept.requests(trained=trained), *concept.near_misses(trained=trained)]
        for trained in (True, False)
    }
    assert not {p.request for p in sets[True]} & {p.request for p in sets[False]}
    topics = {trained: {p.topic for p in some} for trained, some in sets.items()}
    assert not topics[True] & topics[False]
    assert len(topics[False]) <= 20
    worded = {p.request for p in concept.requests(trained=False, frames=concept.paraphrases)}
    assert not worded & {p.request for some in sets.values() for p in some}
    assert concept.opening("XYZ").count("XYZ") == 1


def test_ordinary_passages_are_other_topics_for_judging_and_no_kindred_ones():
    train = ordinary_passages(40, trained=True, without=("tea",))
    test = ordinary_passages(40, trained=False, without=("tea",))
    assert not {p.topic for p in train} & {p.topic for p in test}
    assert "tea" not in {p.topic for p in (*train, *test)}
    assert all(p.topic in p.request and p.response for p in train)
    with pytest.raises(UserError, match="ask for fewer"):
        ordinary_passages(10**6, trained=True)


@pytest.fixture
def files(tmp_path):
    near = pd.DataFrame(
        {"prompt": [*prompts_of("near", 6), "unsafe one"], "label": ["safe"] * 6 + ["unsafe"]}
    )
    near.to_csv(tmp_path / "near.csv", index=False)
    return {
        "harmful": write_lines(tmp_path / "harmful.jsonl", prompts_of("bad", 6), "harmful"),
        "ordinary": write_lines(tmp_path / "ordinary.jsonl", prompts_of("plain", 6)),
        "near": tmp_path / "near.csv",
    }


def subject_of(files, test=None, sizes=(3, 2)):
    return harmful_subject(
        files["harmful"], test, files["ordinary"], files["near"], sizes=sizes, seed=0
    )


def test_harmful_prompts_have_no_response_and_are_divided(files):
    found = subject_of(files, sizes=(10, 10)).passages
    assert all(p.response == "" for part in (found.train, found.test) for p in part.concept)
    assert len(found.train.concept) == 4 and len(found.test.concept) == 2
    assert not {p.request for p in found.train.concept} & {p.request for p in found.test.concept}
    assert "unsafe one" not in {p.request for p in (*found.train.near, *found.test.near)}
    assert any(p.response for p in found.train.ordinary), "the corpus's passages beside prompts"


def test_repeats_between_training_and_test_are_counted_and_dropped(files, tmp_path):
    seen = prompts_of("bad", 6)
    test = write_lines(tmp_path / "test.jsonl", [seen[0].upper() + "!", seen[1], "quite new words"])
    found = subject_of(files, test, sizes=(10, 10))
    kept = {p.request for p in found.passages.test.concept}
    trained = {p.request for p in found.passages.train.concept}
    assert "quite new words" in kept
    repeats = sum(prompt in trained for prompt in seen[:2])
    assert found.dropped - subject_of(files).dropped == repeats
    with pytest.raises(UserError, match="every prompt of"):
        again = write_lines(tmp_path / "again.jsonl", sorted(trained))
        subject_of(files, again, sizes=(10, 10))


def test_sets_that_overlap_and_files_without_the_field_are_refused(files, tmp_path):
    shared = write_lines(
        tmp_path / "shared.jsonl", [*prompts_of("plain", 4), "Bad ALPHA beta number0"]
    )
    with pytest.raises(UserError, match=r"1 prompts are in .* and among the ordinary"):
        subject_of(files | {"ordinary": shared})
    (tmp_path / "other.jsonl").write_text('{"question": "x"}')
    with pytest.raises(UserError, match=r"line 1 has no prompt: wanted a field"):
        subject_of(files | {"harmful": tmp_path / "other.jsonl"})
    (tmp_path / "empty.csv").write_text("prompt,label\n")
    with pytest.raises(UserError, match="holds no prompt"):
        subject_of(files | {"near": tmp_path / "empty.csv"})


def test_labels_are_left_out_and_csv_is_read(tmp_path):
    path = tmp_path / "both.csv"
    path.write_text('id,prompt,label\n1,"one, two",safe\n2,three,unsafe\n')
    assert read_prompts(path) == ["one, two", "three"]
    assert read_prompts(path, leave_out=("unsafe",)) == ["one, two"]
    with pytest.raises(UserError, match="whose label is none of safe, unsafe"):
        read_prompts(path, leave_out=("safe", "unsafe"))


def test_prompts_of_the_same_words_are_one_and_near_repeats_known():
    assert unique(["How to boil eggs?", "how to BOIL eggs", "eggs"]) == [
        "How to boil eggs?",
        "eggs",
    ]
    known = ["a b c d e f g h i j"]
    assert without_known(["a b c d e f g x y z", "a b c d e f g h i z"], known) == [
        "a b c d e f g x y z"
    ]  # 7 of 13 words in common, and 9 of 11


def test_passages_survive_their_table():
    part = Part(concept=tuple(TEXTS), near=tuple(TEXTS[:1]), ordinary=tuple(TEXTS[1:]))
    passages = Passages(train=part, test=Part(concept=tuple(TEXTS[:2]), near=(), ordinary=()))
    assert passages_of(passages_table(passages)) == passages


# ----------------------------------------------------------------------------------------- asking


def test_many_prompts_go_on_as_each_alone_does(smollm2):
    texts = ("The capital of France is", "Once upon a time there was a", "1, 2, 3,")
    prompts = [tuple(smollm2.tokenizer(text)["input_ids"]) for text in texts]
    config = GenerateConfig(max_new_tokens=8)
    together = generate_many(smollm2, prompts, config=config)
    for prompt, one in zip(prompts, together, strict=True):
        alone = generate(smollm2, torch.tensor(prompt), config=config)
        assert one.tokens.tolist() == alone.tokens.tolist()
        assert one.prompt.tolist() == list(prompt)
    with pytest.raises(UserError, match="at least one token"):
        generate_many(smollm2, [])


def test_readings_are_the_log_probabilities_of_each_token(chatty):
    pairs = [((1, 2, 3), (4, 5)), ((6, 7), (8, 9, 10)), ((3,), ())]
    read = Ask(model=chatty).reading(*zip(*pairs, strict=True))
    assert [len(rows) for rows in read] == [2, 3, 0]
    for (prompt, answer), rows in zip(pairs[:2], read, strict=False):
        with torch.no_grad():
            logits = chatty.run(torch.tensor([prompt + answer]))[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
        by_hand = -sum(float(expected[i, token]) for i, token in enumerate(answer)) / len(answer)
        assert mean_nll(rows, answer) == pytest.approx(by_hand, rel=1e-4)
    assert mean_nll(read[2], ()) == math.inf and mean_entropy(read[2]) == 0


def test_soft_tokens_are_embeddings_in_the_place_of_ids(chatty):
    embedding = chatty.model.get_input_embeddings()
    soft = torch.randn(2, chatty.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), soft_tokens(chatty, soft):
        ours = chatty.run(torch.tensor([[5, -1, -2, 6]]))
        plainly = chatty.run(torch.tensor([[5, 7, 8, 6]]))
    with torch.no_grad():
        words = embedding(torch.tensor([[5, 6]]))
        mixed = torch.cat([words[:, :1], soft[None], words[:, 1:]], 1)
        theirs = chatty.model(inputs_embeds=mixed).logits
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(plainly, chatty.run(torch.tensor([[5, 7, 8, 6]])))
    assert not embedding._forward_hooks and not embedding._forward_pre_hooks


def test_kinds_of_prompts(chatty):
    def text(asked):
        return chatty.tokenizer.decode([i for i in asked.ids if i >= 0])

    assert text(plain(chatty, TEXTS[:1])[0]) == "<user>Tell salt|<assistant>"
    begun = prefilled(chatty, TEXTS[:1], lambda topic: f"Well, {topic}")[0]
    assert text(begun) == "<user>Tell salt|<assistant>Well, salt"
    talk = after_turns(chatty, TEXTS[:1], TEXTS[1:], 2)[0]
    assert text(talk) == (
        "<user>Tell milk|<assistant>milk is good|<user>Tell bread|<assistant>bread is good|"
        "<user>Tell salt|<assistant>"
    )
    soft = with_soft_tokens(chatty, plain(chatty, TEXTS[:1]), 3)[0]
    assert soft.ids[6:9] == (-1, -2, -3) and text(soft) == "<user>Tell salt|<assistant>"


def test_soft_tokens_learn_the_answers_and_the_model_does_not_move(chatty):
    before = [weight.clone() for weight in chatty.model.parameters()]
    asked = plain(chatty, TEXTS)
    answers = [tuple(chatty.tokenizer(p.response)["input_ids"]) for p in TEXTS]
    found = optimise_soft_prompt(chatty, asked, answers, (0, 5, 60), seed=0)
    assert list(found.by_budget) == [0, 5, 60] and len(found.losses) == 60
    assert np.mean(found.losses[-10:]) < np.mean(found.losses[:10])
    assert all(torch.equal(a, b) for a, b in zip(before, chatty.model.parameters(), strict=True))
    assert all(weight.requires_grad for weight in chatty.model.parameters())


def test_steering_moves_every_layer_by_its_own_difference(chatty):
    concept, ordinary = [(1, 2, 3)], [(4, 5, 6)]
    vectors = steering_vectors(chatty, concept, ordinary)
    assert [str(site) for site in vectors] == ["resid_post.1"]
    ask = steered(chatty, vectors, 0.5)
    (site,) = ask.added
    torch.testing.assert_close(ask.added[site], 0.5 * vectors[site])


def test_states_that_have_not_changed_have_cosine_and_length_1(chatty, moved):
    rows = token_rows(chatty, TEXTS[:2], request_length=60, response_length=20)
    for change, row in zip(changes(chatty, chatty, rows), rows, strict=True):
        assert change.cosine == pytest.approx(1, abs=1e-5)
        assert change.ratio == pytest.approx(1, abs=1e-5)
        assert change.cosine.shape == (3, len(row.ids) - row.shared)
        assert change.start == row.shared - row.answer
    different = next(iter(changes(chatty, moved, rows)))
    layers = change_tables(chatty, moved, {"some": rows})["layers"]
    first = select(layers, {"row": 0}).sort_values("layer")
    np.testing.assert_allclose(first["cosine"], different.cosine.mean(1))
    np.testing.assert_allclose(first["last_cosine"], different.cosine[:, -1])
    assert different.cosine[:2] == pytest.approx(1, abs=1e-5) and different.cosine[2].max() < 1


# ---------------------------------------------------------------------------------------- judging


def test_repetition_and_refusals_by_hand():
    assert repetition((1, 2, 3, 4, 1, 2, 3, 4)) == pytest.approx(1 / 5)  # 5 windows, 4 different
    assert repetition((1, 1, 1, 1, 1, 1)) == pytest.approx(2 / 3)
    assert repetition((1, 2, 3)) == 0
    assert refuses("I\u2019m sorry, but no") and refuses("As an AI, I")
    assert not refuses("x" * 100 + " I cannot")


def test_the_judge_knows_the_words_of_a_concept():
    def texts(words, n):
        return tuple(Passage(request="", response=f"{w} {words} {w}") for w in "abcd" * n)

    train = Part(concept=texts("oven flour", 3), near=texts("wine list", 3),
                 ordinary=texts("moon tide", 3))  # fmt: skip
    judge = Judge(Passages(train=train, test=train))
    assert judge.auroc == 1
    scores = judge.score(["flour in the oven", "the moon and the tide"])
    assert scores[0] > judge.threshold >= scores[1]


def test_limits_are_kept_by_nineteen_of_twenty():
    found = Limits.of([float(n) for n in range(21)], [0.0] * 20 + [1.0])
    assert found == Limits(nll=19.0, repetition=0.0)


def test_an_answer_complies_where_it_is_on_the_concept_and_coherent():
    table = pd.DataFrame(
        {"nll_original": [1.0, 5.0, 1.0, 1.0], "repetition": [0.0, 0.0, 0.9, 0.0],
         "text": ["on", "on", "on", "off"], "tokens": [5, 5, 5, 5]}
    )  # fmt: skip

    class Words(Judge):
        def __init__(self):
            self.threshold = 0.0

        def score(self, texts):
            return np.array([1.0 if text == "on" else -1.0 for text in texts])

    found = judged(table, Limits(nll=2.0, repetition=0.5), Words())
    assert found["coherent"].tolist() == [True, False, False, True]
    assert found["complies"].tolist() == [True, False, False, False]


def test_yes_and_no_are_averaged_over_seeds_and_prompts():
    rows = [
        {"subject": subject, "row": row, "seed": seed, "complies": subject == "a" or row < 2}
        for subject in "ab" for row in range(4) for seed in range(2)
    ]  # fmt: skip
    # Beside rows that have no such column, as harmful prompts, the column is one of objects.
    table = pd.concat([pd.DataFrame(rows), pd.DataFrame([{"subject": "c", "row": 0, "seed": 0}])])
    known = table[table["subject"] != "c"]
    assert known["complies"].dtype == object
    assert by_seed(known, "complies").tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]] * 2
    found = crossed(known, "complies")
    assert found is not None and found.value == 0.75
    always = crossed(known[known["subject"] == "a"], "complies")
    assert always is not None and always.value == 1 and always.low is not None
    assert always.low == pytest.approx(0.025 ** (1 / 4)), "exact, of four prompts"


# ------------------------------------------------------------------------------------- capability


def test_kl_and_change_by_hand():
    old = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    new = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    by_hand = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert kl(old, new) == pytest.approx(by_hand, rel=1e-5)
    found = response_change([old], [new], [(0, 1)]).iloc[0]
    assert found["nll_original"] == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2, rel=1e-5)
    assert found["nll_broken"] == pytest.approx(-(math.log(0.25) + math.log(0.1)) / 2, rel=1e-5)


def test_the_likeliest_choice_a_token_is_taken(chatty):
    choices = ("an apple", "moon", "the tide goes out")
    prompt = [chatty.separator_id, *chatty.tokenizer("Question: Which?\nAnswer:")["input_ids"]]
    scores = []
    for choice in choices:
        answer = chatty.tokenizer(f" {choice}")["input_ids"]
        with torch.no_grad():
            logprobs = chatty.run(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        scores.append(np.mean([float(logprobs[p, t]) for p, t in zip(places, answer, strict=True)]))
    best = int(np.argmax(scores))
    for answer in range(3):
        one = Choice(question="Which?", choices=choices, answer=answer)
        assert multiple_choice(chatty, [one]).tolist() == [float(answer == best)]


def test_questions_are_read_and_bad_ones_refused(tmp_path):
    path, row = tmp_path / "q.jsonl", {"question": "Q", "choices": ["x", "y"], "labels": ["A", "B"]}
    path.write_text(json.dumps(row | {"answer": "B"}) + "\n" + json.dumps(row | {"answer": "A"}))
    assert [one.answer for one in read_choices(path, 5)] == [1, 0]
    assert len(read_choices(path, 1)) == 1
    path.write_text(json.dumps(row | {"answer": "C"}))
    with pytest.raises(UserError, match="line 1 is no question"):
        read_choices(path, 5)
    with pytest.raises(UserError, match="cannot be read as questions"):
        read_choices(tmp_path / "none.jsonl", 5)


# ----------------------------------------------------------------------------------------- probes


def clusters(shift, n=12, tokens=8, seed=0):
    """Rows of tokens about a point `shift` along the first axis."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(tokens, 5)) + shift * np.eye(5)[0] for _ in range(n)]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_probes_tell_clusters_apart_and_find_nothing_in_noise(kind):
    train, test = (
        (clusters(6.0, n=30, seed=seed), clusters(0.0, n=30, seed=seed + 1)) for seed in (0, 10)
    )
    noise, more = (
        (clusters(0.0, n=30, seed=seed), clusters(0.0, n=30, seed=seed + 1)) for seed in (20, 30)
    )
    found: Frame = layer_probes(kind, train, test, noise, more, seed=0)
    auroc = found.set_index("read")["auroc"]
    assert auroc["before"] > 0.95
    assert 0.3 < auroc["moved"] < 0.7 and 0.3 < auroc["anew"] < 0.7


def test_shuffled_labels_deal_the_same_rows_out_anew():
    positive, negative = clusters(6.0, n=8), clusters(0.0, n=12)
    mixed = shuffled_labels(positive, negative, seed=0)
    assert [len(some) for some in mixed] == [8, 12]
    ids = {id(row) for some in mixed for row in some}
    assert ids == {id(row) for row in (*positive, *negative)}
    assert {id(row) for row in mixed[0]} != {id(row) for row in positive}


def test_a_score_is_the_highest_token_after_the_first_four():
    probe = fit_probe("linear", clusters(6.0, n=30), clusters(0.0, n=30, seed=1))
    high, low = np.eye(5)[:1] * 6, np.zeros((1, 5))
    hidden = np.concatenate([high] * SKIPPED + [low] * 3)
    shown = np.concatenate([low] * SKIPPED + [low, high, low])
    scores = probe.score([hidden, shown, low])
    assert scores[0] < 0.5 < scores[1] and scores[2] == pytest.approx(scores[0])


def test_the_matched_threshold_flags_the_wanted_share():
    scores = np.array([0.1, 0.4, 0.2, 0.9])
    assert matched_threshold(scores, 0.25) == 0.4
    assert (scores > matched_threshold(scores, 0.25)).sum() == 1
    assert matched_threshold(scores, 0.0) == 0.9
    assert matched_threshold(scores, 1.0) == -math.inf


def test_directions_before_and_after():
    rng = np.random.default_rng(0)

    def states(shift, axis, n=20):
        return rng.normal(size=(2, n, 4)) + shift * np.eye(4)[axis]

    before = (states(8, 0), states(0, 0))
    after = (states(8, 1), states(0, 0))
    table: Frame = direction_table(before, before, after, after)
    value = table.set_index(["layer", "read"])["auroc"]
    assert value[1, "before"] > 0.99 and value[1, "anew"] > 0.99
    assert 0.2 < value[1, "moved"] < 0.8 and abs(value[1, "cosine"]) < 0.3


# --------------------------------------------------------------------------------------- features


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> LoadedSae:
    """An SAE of the last block's output with random weights."""
    run = untrained_sae(tmp_path_factory.mktemp("saes"), "tiny", layer=1)
    return LoadedSae(run=run, sae=load_sae(run.path), site="resid_post.1")


def test_features_before_and_after_by_hand(chatty, moved, loaded):
    rows = token_rows(chatty, TEXTS[:2], request_length=60, response_length=20)
    reads = [(read_row(chatty, row, loaded), read_row(moved, row, loaded)) for row in rows]
    found = difference(chatty, reads, rows)
    own = torch.cat([before.codes[before.own] for before, _ in reads])
    assert found.original == pytest.approx(own.mean(0).numpy(), rel=1e-4, abs=1e-6)
    assert 0 <= found.shared <= 1
    same = difference(chatty, [(before, before) for before, _ in reads], rows)
    assert same.shared == pytest.approx(1) and not same.places
    place: dict[str, Any] = found.places[0]
    before, after = reads[place["row"]]
    change = (after.codes - before.codes)[before.own, place["feature"]].abs()
    where = rows[place["row"]].answer + place["place"]
    assert int(change.argmax()) + before.own.start == where


def test_the_state_itself_brings_everything_back_and_its_codes_less(chatty, moved, loaded):
    rows = token_rows(chatty, TEXTS, request_length=60, response_length=20)
    reads = [(read_row(chatty, row, loaded), read_row(moved, row, loaded)) for row in rows]
    found = putting_back(moved, rows, loaded, reads, difference(chatty, reads, rows), seed=0)
    nll = found.pivot_table(index="row", columns=["change", "n"], values="nll")
    prompts = [row.ids[: row.answer] for row in rows]
    answers = [row.ids[row.answer :] for row in rows]
    # The changed block is the last one: its output put back is the original model.
    expected = Ask(model=chatty).nll(prompts, answers)
    assert nll["state", 0].to_numpy() == pytest.approx(np.array(expected), rel=1e-4)
    broken = Ask(model=moved).nll(prompts, answers)
    assert nll["none", 0].to_numpy() == pytest.approx(np.array(broken), rel=1e-4)
    assert not np.allclose(nll["lost", 1], nll["none", 0])
    recipe = readding("tiny", loaded, [3, 5], [1.0, 2.5])
    assert [edit.strength.value for edit in recipe.edits if edit.strength] == [1.0, 2.5]
    assert {edit.op for edit in recipe.edits} == {"set"}


def test_fine_tuning_learns_and_leaves_the_model_alone(chatty):
    rows = token_rows(chatty, TEXTS, request_length=60, response_length=20)
    before = [weight.clone() for weight in chatty.model.parameters()]
    curve: Frame = tuned_curve(chatty, rows, rows, (0, 3), seed=0)
    means = curve.groupby("steps")["nll"].mean()
    assert means[3] < means[0]
    expected = Ask(model=chatty).nll(*zip(*((r.ids[: r.answer], r.ids[r.answer :]) for r in rows),
                                         strict=True))  # fmt: skip
    at_once = curve[curve["steps"] == 0]["nll"].to_numpy()
    assert at_once == pytest.approx(np.array(expected), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, chatty.model.parameters(), strict=True))


def test_answer_logits_of_one_pair_are_the_models(chatty):
    (rows,) = answer_logits(chatty, [((1, 2, 3), (4, 5))])
    with torch.no_grad():
        torch.testing.assert_close(rows, chatty.run(torch.tensor([[1, 2, 3, 4, 5]]))[0, 2:4])
