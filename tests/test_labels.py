"""Labels of planted features: what they say, what they score, and that the test is held out."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from label_world import (
    AFTER_OF,
    ALWAYS,
    BANK,
    DEAD,
    DIGITS,
    FORMS,
    N_SEQUENCES,
    NOISE,
    ONCE,
    RIVER,
    VOCABULARY,
    World,
    kept,
    known_pool,
    make_sae_run,
    make_world,
    token,
    write_index,
)

from probe.errors import Failure, UserError
from probe.runs import Run
from saes.feature_queries import FeatureIndex
from saes.label_contexts import HARD_TOKENS
from saes.label_detection import balanced_accuracy, score_answers, wilson
from saes.label_files import read_label_file
from saes.label_making import Atom, cover
from saes.label_phrases import phrase
from saes.label_rules import Blocks, Part, Rule
from saes.label_schema import LABELS, LabelConfig, read_labels, write_labels
from saes.label_texts import Texts
from saes.label_words import KIND_NAMES, Words, stem
from saes.labels import Subject, judge, offline_labels

WORLD = make_world()
CONFIG = LabelConfig(pool_sequences=40)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> FeatureIndex:
    return write_index(make_sae_run(tmp_path_factory.mktemp("labels")), WORLD)


def subject_of(index: FeatureIndex, world: World = WORLD, pool: int = 40) -> Subject:
    texts = Texts(index, 0)
    known = known_pool(world, texts, pool) if pool else None
    return Subject(index, texts, CONFIG, known)


@pytest.fixture(scope="module")
def subject(index) -> Subject:
    return subject_of(index)


@pytest.fixture(scope="module")
def table(subject):
    return offline_labels(subject, progress=False).set_index("feature")


# ------------------------------------------------------------------------------ planted features


def test_a_token_is_the_label_of_the_feature_that_fires_on_it_and_scores_one(table):
    row = table.loc[RIVER]
    assert row["label"] == '"river"'
    named = json.loads(row["rule"])["tokens"]["tokens"]
    assert named == [{"id": token(" river"), "text": " river", "weight": pytest.approx(1)}]
    assert row["score"] == 1.0 and row["score_high"] == 1.0 and row["score_low"] > 0.85
    assert 0.3 < row["control"] < 0.8


def test_labels_name_kinds_places_and_forms(table):
    assert table.loc[DIGITS, "label"] == "digits"
    assert table.loc[AFTER_OF, "label"] == 'after "of"'
    assert table.loc[FORMS, "label"].lower() == '"river" and its forms'
    assert (table.loc[[DIGITS, AFTER_OF, FORMS], "score"] > 0.97).all()


def test_a_word_that_counts_only_in_some_texts_is_told_by_these(table):
    row = table.loc[BANK]
    assert row["label"] == 'in text with "water"' or row["label"].startswith('"bank" in text with')
    assert row["score"] > 0.9


def test_a_label_of_noise_shows_as_such(table):
    row = table.loc[NOISE]
    assert row["score_low"] <= 0.5 <= row["score_high"]
    assert row["making"] >= row["score"]


def test_the_dead_get_no_label_and_what_cannot_be_tested_no_score(table, index):
    assert DEAD not in table.index
    assert set(table.index) == set(range(index.n_features)) - {DEAD}
    for feature in (ALWAYS, ONCE):
        row = table.loc[feature]
        assert row["label"] and math.isnan(row["score"]) and math.isnan(row["control"])


def test_the_same_labels_again(subject, table):
    again = offline_labels(subject, progress=False).set_index("feature")
    assert again.equals(table)


def test_without_a_pool_negatives_come_from_the_examples_own_sequences(index):
    table = offline_labels(subject_of(index, pool=0), progress=False).set_index("feature")
    assert table.loc[RIVER, "score"] == 1.0 and table.loc[DIGITS, "score"] > 0.97


# ------------------------------------------------------------------------------------ held out


def active(world: World, feature: int, block: int, width: int) -> bool:
    n = -(-world.tokens.shape[1] // width)
    row, number = divmod(block, n)
    return bool(world.values[feature, row, number * width : (number + 1) * width].any())


def test_contexts_are_what_they_claim_and_testing_is_held_out(subject):
    texts = subject.texts
    assert texts.held_out.sum() == N_SEQUENCES // 2
    for feature in subject.living:
        making, testing, evidence, _ = subject.contexts(feature)
        hard = set(evidence.tokens[:HARD_TOKENS].tolist())
        for contexts, held_out in ((making, False), (testing, True)):
            rows = contexts.blocks // texts.n_blocks(contexts.width)
            assert (texts.held_out[rows] == held_out).all()
            assert len(set(contexts.blocks.tolist())) == len(contexts.blocks)
            assert all(active(WORLD, feature, b, contexts.width) for b in contexts.positive)
            assert not any(active(WORLD, feature, b, contexts.width) for b in contexts.negative)
            blocks = texts.read(contexts.negative[: contexts.n_hard], contexts.width)
            assert all(
                hard & set(row[keep].tolist())
                for row, keep in zip(blocks.tokens, blocks.keep, strict=True)
            )


def test_positives_are_the_held_out_random_and_interval_examples(subject, index):
    texts = subject.texts
    rows = index.examples(RIVER)
    rows = rows[texts.held_out[rows["sequence"]] & (rows["kind"] != "top")]
    _, testing, _, _ = subject.contexts(RIVER)
    n = texts.n_blocks(32)
    wanted = {s * n + p // 32 for s, p in zip(rows["sequence"], rows["position"], strict=True)}
    assert set(testing.positive.tolist()) == wanted


def test_token_counts_leave_out_the_sequences_that_are_tested(index):
    everything = subject_of(index, pool=N_SEQUENCES)
    held_out = everything.texts.held_out
    keep = kept(WORLD.tokens)
    for feature in (RIVER, NOISE, DIGITS):
        evidence = everything.sampler.evidence(everything.sampler.firing(feature))
        fires = WORLD.values[feature][~held_out] > 0
        wanted = Counter(WORLD.tokens[~held_out][fires].tolist())
        found = dict(zip(evidence.tokens.tolist(), evidence.counts.tolist(), strict=True))
        assert found == wanted
        there = Counter(WORLD.tokens[~held_out][keep[~held_out]].tolist())
        shares = dict(zip(evidence.tokens.tolist(), evidence.share.tolist(), strict=True))
        assert shares == pytest.approx({t: n / there[t] for t, n in wanted.items()})


def test_what_happens_in_the_tested_half_changes_no_rule(tmp_path, index):
    texts = Texts(index, 0)
    values = WORLD.values.copy()
    rng = np.random.default_rng(9)
    elsewhere = rng.permuted(values[NOISE][texts.held_out], axis=1)
    values[NOISE][texts.held_out] = elsewhere * kept(WORLD.tokens)[texts.held_out]
    other_world = World(tokens=WORLD.tokens, values=values)
    other_index = write_index(make_sae_run(tmp_path), other_world)
    rules = []
    for world, there in ((WORLD, index), (other_world, other_index)):
        subject = subject_of(there, world, pool=N_SEQUENCES)
        rules.append(judge(subject, NOISE))
    assert rules[0].rule == rules[1].rule and rules[0].making == rules[1].making
    assert rules[0].contexts.positive.tolist() != rules[1].contexts.positive.tolist()


# ------------------------------------------------------------------------------------ the parts


def test_balanced_accuracy_and_its_interval_by_hand():
    score = balanced_accuracy(8, 10, 15, 20)
    assert score.value == pytest.approx((0.8 + 0.75) / 2)
    # Wilson: 8 of 10 is (.4902, .9433), 15 of 20 is (.5313, .8881)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)
    assert score.low == pytest.approx(0.775 - math.hypot(0.3098, 0.2187) / 2, abs=1e-4)
    assert score.high == pytest.approx(0.775 + math.hypot(0.1433, 0.1381) / 2, abs=1e-4)
    assert balanced_accuracy(5, 5, 5, 5).high == 1.0
    assert score_answers(np.ones(9, bool), 4) is None
    always = score_answers(np.ones(20, bool), 10)
    assert always is not None and always.value == 0.5


def test_wilson_is_scipys():
    from scipy.stats import binomtest

    for hits, n in ((0, 7), (3, 7), (7, 7), (41, 90)):
        wanted = binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits, n) == pytest.approx((wanted.low, wanted.high))


def words() -> Words:
    return Words(VOCABULARY, np.arange(len(VOCABULARY)) == 0)


def blocks(*texts: str) -> Blocks:
    """Blocks of a token a piece; the neighbours are those inside the block."""
    tokens = np.array([[token(piece) for piece in text.split(",")] for text in texts])
    nothing = np.full((len(tokens), 1), len(VOCABULARY))
    return Blocks(
        tokens=tokens,
        previous=np.hstack([nothing, tokens[:, :-1]]),
        earlier=np.hstack([nothing, nothing, tokens[:, :-2]]),
        following=np.hstack([tokens[:, 1:], nothing]),
        keep=tokens != 0,
    )


def part(*texts: str) -> Part:
    return Part(tokens=tuple((token(text), 1 / len(texts)) for text in texts))


def test_a_rule_holds_where_all_its_parts_do():
    shown = blocks(
        " of, the, river", " the, of, river", " sea, the, ship", "<|end|>, the, sea"
    )  # fmt: skip
    cases = {
        Rule(tokens=part(" river")): [True, True, False, False],
        Rule(tokens=part(" river"), after=part(" the")): [True, False, False, False],
        Rule(after=Part(phrases=((token(" of"), token(" the")),))): [True, False, False, False],
        Rule(before=part(" ship", " sea")): [False, False, True, True],
        Rule(tokens=part(" the"), context=part(" sea")): [False, False, True, True],
        Rule(tokens=Part(tokens=((0, 1.0),))): [False, False, False, False],
        Rule(): [False] * 4,
        Rule(promotes=(" river",)): [False] * 4,
    }
    for rule, wanted in cases.items():
        assert rule.matches(words(), shown).tolist() == wanted, rule
        assert Rule.from_text(rule.to_text(words())) == rule


def test_rules_in_words():
    forms = Part(tokens=((token(" river"), 0.6), (token(" rivers"), 0.3)))
    many = Part(tokens=tuple((token(f" {w}"), 0.1) for w in ("sea", "ship", "tree", "walk")))
    said = {
        Rule(tokens=part(" river")): '"river"',
        Rule(tokens=forms): '"river" and its forms',
        Rule(tokens=many): '"sea", "ship", "tree" and 1 more',
        Rule(tokens=Part(kinds=("digits",), tokens=((token(" sea"), 1.0),))): 'digits, "sea"',
        Rule(tokens=Part(endings=("ing",))): 'words ending in "-ing"',
        Rule(tokens=part("ing")): '"-ing"',
        Rule(after=Part(phrases=((token(" of"), token(" the")),))): 'after "of the"',
        Rule(tokens=part(" sea"), before=part("\n")): '"sea" before "↵"',
        Rule(before=part(" sea", " ship"), promotes=(" sea", " ship")): (
            'before what it promotes, "sea", "ship"'
        ),
        Rule(tokens=part(" bank"), context=part(" water")): '"bank" in text with "water"',
        Rule(): "no rule found",
    }
    for rule, wanted in said.items():
        assert phrase(rule, words()) == wanted
    assert phrase(Rule(promotes=(" sea",)), words(), weak=True) == 'no rule found; promotes "sea"'


def test_kinds_endings_and_stems():
    texts = [" River", "ing", " 12", "\n\n", '."', " x", "NASA", " wanting", "é", " they", "  ", ""]
    vocabulary = Words(texts, np.zeros(len(texts), bool))
    kinds = {
        text: {KIND_NAMES[kind] for kind in np.flatnonzero(vocabulary.kinds[i])}
        for i, text in enumerate(texts)
    }
    assert kinds[" River"] == {"capitalised words"}
    assert kinds["ing"] == {"pieces inside a word"}
    assert kinds[" 12"] == {"digits"} and kinds["\n\n"] == {"line breaks"}
    assert kinds['."'] == {"punctuation", "ends of sentences", "quotation marks"}
    assert kinds[" x"] == {"single letters", "lower-case words"}
    assert kinds["NASA"] == {"words in capitals"} and kinds["  "] == {"spaces"}
    assert kinds[" they"] == {"lower-case words", "pronouns"}
    assert "text outside ASCII" in kinds["é"] and kinds[""] == set()
    assert np.flatnonzero(vocabulary.part("ing", first=False)).tolist() == [7]
    assert np.flatnonzero(vocabulary.part("wa", first=True)).tolist() == [7]
    assert stem("rivers") == stem("river") and stem("baking") == stem("bakes") == stem("bake")
    assert stem("running") == stem("run") and stem("cities") == stem("city")
    assert stem("class") == "class" and stem("this") == "this"


def test_cover_takes_what_adds_most_and_stops():
    def atom(name: str, positive: list[int], negative: list[int], cost: float = 0.01) -> Atom:
        return Atom(
            part=part(name), cost=cost, positive=np.array(positive, bool),
            negative=np.array(negative, bool),
        )  # fmt: skip

    wide = atom(" sea", [1, 1, 1, 0], [1, 0, 0, 0])  # (3/4 - 1/4) / 2 - .01 = .24
    sharp = atom(" ship", [1, 1, 0, 0], [0, 0, 0, 0])  # .24, taken first: it comes first
    rest = atom(" tree", [0, 0, 0, 1], [0, 0, 0, 0])  # 1/8 - .01 = .115
    useless = atom(" walk", [1, 1, 1, 1], [1, 1, 1, 1])
    found = cover([sharp, wide, rest, useless])
    assert {number for number, _ in found.part.tokens} == {token(" ship"), token(" tree")}
    assert found.value == pytest.approx(0.5 + 0.24 + 0.115)
    assert cover([]).value == 0.5 and cover([useless]).part.empty


# ------------------------------------------------------------------------------------- on disk


def test_written_and_read_back(tmp_path, table):
    run = Run.create(tmp_path, "labels", CONFIG.run_config(index="1", method="offline", source={}))
    with pytest.raises(Failure, match="not complete"):
        read_labels(run)
    write_labels(run, table.reset_index(), CONFIG, device="cpu")
    back = read_labels(Run.open(run.path))
    assert back.columns.tolist() == LABELS.names
    assert back["feature"].tolist() == table.index.tolist()
    assert run.summary["n_labelled"] == len(table) and run.summary["n_scored"] == len(table) - 2
    assert run.summary["median"] == pytest.approx(table["score"].median())
    (run.path / "labels.parquet").write_bytes(b"short")
    with pytest.raises(Failure, match=r"not as it was written; delete .* and run `lorgnette label"):
        read_labels(run)


def test_reading_something_else_is_a_sentence(index):
    with pytest.raises(UserError, match=r"folder of labels was wanted and .* of kind 'index'"):
        read_labels(index.run)


@pytest.mark.parametrize(
    "name,text",
    [
        ("a.csv", 'feature,label,more\n3,"rivers, lakes",x\n0,digits,y\n'),
        (
            "a.json",
            '[{"feature": 3, "label": "rivers, lakes"}, {"feature": "0", "label": "digits"}]',
        ),
        ("b.json", '{"3": "rivers,  lakes", "0": "digits"}'),
    ],
)
def test_files_of_labels(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert read_label_file(path, 9) == {3: "rivers, lakes", 0: "digits"}


@pytest.mark.parametrize(
    "name,text,said",
    [
        (
            "a.csv",
            "feature,label\n9,x\n-1,y\nfour,z\n",
            "does not have: 9, -1, four; it has 0 to 8",
        ),
        ("a.csv", "feature,label\n1,x\n1,y\n", "labels features twice: 1"),
        ("a.csv", "feature,label\n1,\n", "no label for features 1"),
        ("a.csv", "feature,label\n", "holds no label"),
        ("a.csv", "feature,name\n1,x\n", "columns feature and label; it has feature, name"),
        ("a.csv", "", "cannot be read as CSV"),
        ("a.json", "{", "cannot be read as JSON"),
        ("a.json", "[1, 2]", "cannot be read as JSON"),
        ("a.parquet", "no", "cannot be read as PARQUET"),
        ("a.txt", "1 x", r"ends in \.csv, \.json, \.parquet; got"),
    ],
)
def test_bad_files_of_labels_are_told_in_a_sentence(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_label_file(path, 9)
    with pytest.raises(UserError, match="there is no file"):
        read_label_file(tmp_path / "none.csv", 9)
