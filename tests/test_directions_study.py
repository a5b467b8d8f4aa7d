"""The directions study, whole on a tiny model, its prompts, and its findings on made-up numbers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from analyses import directions
from analyses.contrasts import FRAMES, TOPICS, builtin_contrast, contrast_of_files
from analyses.directions import best_separating, candidate_places, make_study
from analyses.directions_findings import (
    auroc_by_place,
    causal,
    effect_estimates,
    equality,
    meets_criteria,
    over_random,
    selection_table,
)
from analyses.directions_measured import (
    PRESETS,
    Chosen,
    Config,
    Effects,
    Readings,
    Target,
    load_contrast,
    settle,
)
from analyses.directions_stages import RESULTS
from analyses.journal import Journal
from analyses.report import read_report
from probe.direction_selection import Candidate, Criteria, select
from probe.directions import load_direction
from probe.errors import UserError
from probe.runs import Run, find_runs
from probe.sites import Site
from probe.toy import tiny_llama

TEMPLATE = (
    "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


# ------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("name", list(FRAMES))
def test_builtin_contrasts(name):
    contrast = builtin_contrast(name, (128, 32, 32), 0)
    sizes = [
        (len(split.positive), len(split.negative))
        for split in (contrast.train, contrast.validation, contrast.test)
    ]
    assert sizes == [(128, 128), (32, 32), (32, 32)]
    everything = [
        prompt
        for split in (contrast.train, contrast.validation, contrast.test)
        for prompt in (*split.positive, *split.negative)
    ]
    assert len(set(everything)) == 384, "no prompt twice, none in two splits or sets"
    assert all(prompt[0].isupper() and "{" not in prompt for prompt in everything)


def test_splits_share_neither_frames_nor_topics():
    assert len(TOPICS) == len(set(TOPICS)) == 32
    contrast = builtin_contrast("sentiment", (128, 32, 32), 0)
    topics = [english for english, _ in TOPICS]
    for split, own in ((contrast.train, topics[:16]), (contrast.test, topics[24:])):
        said = {topic for topic in topics if any(topic in p.lower() for p in split.positive)}
        assert said == set(own)


def test_sets_are_paired_and_the_seed_decides_which():
    few = builtin_contrast("questions", (5, 2, 2), 1)
    assert len(few.train.positive) == 5
    for yes, no in zip(few.train.positive, few.train.negative, strict=True):
        shared = [e for e, _ in TOPICS if e in yes.lower()]
        assert shared and shared[0] in no.lower()
    assert few == builtin_contrast("questions", (5, 2, 2), 1)
    other = builtin_contrast("questions", (5, 2, 2), 2)
    assert few != other and few.checksum != other.checksum


def write_prompts(path: Path, word: str, n: int) -> Path:
    path.write_text("".join(f"{word} number {i}\n" for i in range(n)))
    return path


def test_contrast_of_files(tmp_path: Path):
    a, b = write_prompts(tmp_path / "a.txt", "yes", 24), write_prompts(tmp_path / "b.txt", "no", 12)
    found = contrast_of_files(a, b, (99, 99, 3), 0)
    assert (len(found.train.positive), len(found.validation.positive)) == (16, 4)
    assert (len(found.train.negative), len(found.validation.negative)) == (8, 2)
    assert (len(found.test.positive), len(found.test.negative)) == (3, 2)
    splits = (found.train, found.validation, found.test)
    assert len({p for s in splits for p in s.positive}) == 23
    assert (found.name, found.builtin) == ("a-b", False)


def test_wrong_files_are_told_in_a_sentence(tmp_path: Path):
    a, few = write_prompts(tmp_path / "a.txt", "x", 12), write_prompts(tmp_path / "f.txt", "y", 11)
    with pytest.raises(UserError, match="holds 11 different prompts where at least 12"):
        contrast_of_files(a, few, (9, 9, 9), 0)
    with pytest.raises(UserError, match="12 prompts are in both"):
        contrast_of_files(a, a, (9, 9, 9), 0)
    once = tmp_path / "once.txt"
    once.write_text("the same\n" * 40)
    with pytest.raises(UserError, match="holds 1 different prompts"):
        contrast_of_files(a, once, (9, 9, 9), 0)


# ------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Config(n_train=1), "n_train must be at least 2"),
        (Config(positive=Path("a.txt")), "both --positive and --negative"),
        (Config(depth=0.0), "depth must lie"),
        (Config(positions=(0,)), "positions count back"),
        (Config(target_tokens=()), "given empty"),
    ],
)
def test_senseless_options_are_refused(wrong: Config, said: str):
    with pytest.raises(UserError, match=said):
        settle(wrong)


def test_candidates_are_spread_over_what_the_depth_allows(tmp_path: Path):
    model = tiny_llama(n_layers=10)
    model.tokenizer.chat_template = TEMPLATE
    config = Config(preset="quick")
    contrast = load_contrast(config, PRESETS["quick"])
    study = make_study(config, contrast, model, tmp_path)
    assert study.positions == (-1, -2, -3)
    few = replace(PRESETS["quick"], n_layers=4, n_positions=1)
    assert candidate_places(config, few, study) == ((1, 0), (3, 0), (5, 0), (7, 0))
    every = candidate_places(config, PRESETS["full"], study)
    assert every == tuple((layer, p) for layer in range(8) for p in range(3))
    asked = candidate_places(Config(layers=(9,), positions=(-2,)), few, study)
    assert asked == ((9, 1),)
    with pytest.raises(UserError, match=r"layers \[10\] are not in"):
        candidate_places(Config(layers=(10,)), few, study)


# ----------------------------------------------------------------------------------- findings


def readings(seed: int = 0, n: int = 12) -> Readings:
    """Two sites and one position; the direction separates at the second site only."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([1.0, 0.0], n)
    own = rng.normal(size=(2 * n, 2, 1))
    own[:, 1, 0] += 2 * labels
    return Readings(
        own=own,
        random=rng.normal(size=(2 * n, 2, 1, 30)),
        shuffled=rng.normal(size=(2 * n, 2, 1, 6)),
        labels=labels,
        shuffled_labels=np.stack([rng.permutation(labels) for _ in range(6)]),
        validation=own,
        validation_labels=labels,
    )


def test_auroc_by_place_is_scikit_learns():
    r = readings()
    found = auroc_by_place(r)
    for s in range(2):
        assert found.own[s, 0] == pytest.approx(roc_auc_score(r.labels, r.own[:, s, 0]))
        for q in (0, 29):
            expected = roc_auc_score(r.labels, r.random[:, s, 0, q])
            assert found.random[s, 0, q] == pytest.approx(expected)
        for q, labels in enumerate(r.shuffled_labels):
            expected = roc_auc_score(labels, r.shuffled[:, s, 0, q])
            assert found.shuffled[s, 0, q] == pytest.approx(expected)
    assert best_separating(r, ((0, 0), (1, 0))) == (1, 0)


def test_of_equal_aurocs_the_clearest_gap_is_taken():
    r = readings()
    held = np.zeros_like(r.own)
    held[:, 0, 0] = r.labels + np.tile([0.0, 0.5], 12)
    held[:, 1, 0] = r.labels + np.tile([0.0, 0.1], 12)
    assert best_separating(replace(r, validation=held), ((0, 0), (1, 0))) == (1, 0)


def test_over_random_directions():
    r = readings()
    places = auroc_by_place(r)
    there, nowhere = over_random(r, (1, 0)), over_random(r, (0, 0))
    expected = places.own[1, 0] - places.random[1, 0].mean()
    assert there.value == pytest.approx(expected) and there.above(0)
    assert not nowhere.above(0)


def effects(*, shift: float = 1.0, n: int = 24) -> Effects:
    """The direction moves the score by `shift`, its controls not at all."""
    rng = np.random.default_rng(0)
    high, low = rng.normal(2, 0.1, n), rng.normal(-2, 0.1, n)
    none = rng.normal(0, 0.1, (10, n))
    return Effects(
        plain_positive=high, plain_negative=low, ablated=high - shift, added=low + shift,
        random_ablated=high + none, random_added=low + none, shuffled_ablated=high + none[:5],
        shuffled_added=low + none[:5], hook_minus_edit=1e-5, ablation_changes=3.0,
    )  # fmt: skip


def test_causal_verdicts():
    shown, not_shown = causal(effects()), causal(effects(shift=0.0))
    assert len(shown) == 4 and all(v.holds for v in shown)
    assert [v.value for v in shown] == pytest.approx([1.0] * 4, abs=0.1)
    assert not any(v.holds for v in not_shown)
    wrong_way = causal(effects(shift=-1.0))
    assert not any(v.holds for v in wrong_way)
    found = effect_estimates(effects())
    assert found["ablated: the direction"].value == pytest.approx(-1)
    assert found["added: the direction"].value == pytest.approx(1)


def test_equality_verdict():
    (same,) = equality(effects())
    (other,) = equality(replace(effects(), hook_minus_edit=0.5))
    assert same.holds and not other.holds
    assert equality(replace(effects(), hook_minus_edit=math.nan)) == []


def test_a_failed_selection_says_what_fails():
    rows = tuple(
        Candidate(
            site=Site(kind="resid_pre", layer=layer), position=-1, norm=1.0, ablated=-float(layer),
            added=-1.0, kl=0.01,
        )
        for layer in (1, 2)
    )  # fmt: skip
    chosen = Chosen(
        targets=(Target(text="a", positive=0.5, negative=0.1),), plain=(1.0, -1.0),
        criteria=Criteria(), candidates=rows, selection=select(rows, Criteria(), 10), published=0,
        effects=effects(),
    )  # fmt: skip
    verdict = meets_criteria(chosen)
    assert not verdict.holds and "score under addition too low" in verdict.statistic
    table = selection_table(chosen)
    assert table["site"].tolist() == ["resid_pre.2", "resid_pre.1"]
    assert table["chosen"].tolist() == ["chosen", ""]


def test_journal_forgets_a_line_cut_off(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    journal = Journal(path)
    journal.add("a", [1, 2])
    journal.add("b", 3)
    with path.open("a") as file:
        file.write('{"key": "c", "va')
    again = Journal(path)
    assert again.rows == {"a": [1, 2], "b": 3} and "c" not in again
    again.add("c", 4)
    assert Journal(path).rows == {"a": [1, 2], "b": 3, "c": 4}


# ---------------------------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that chats."""
    made = tmp_path_factory.mktemp("directions")
    model = tiny_llama()
    model.tokenizer.chat_template = TEMPLATE
    model.model.save_pretrained(made / "model")
    model.tokenizer.save_pretrained(made / "model")
    return made


@pytest.fixture(scope="module")
def study(folder: Path) -> tuple[Config, Path, Run]:
    """The whole study."""
    config = Config(
        model=str(folder / "model"), n_train=6, n_validation=3, n_test=4, n_random=2, device="cpu"
    )
    return config, folder / "root", directions.run(config, folder / "root")


def test_study_writes_its_report(study: tuple[Config, Path, Run]):
    config, root, folder = study
    report = read_report(folder.path)
    assert list(report.figures) == [
        "AUROC_by_layer", "AUROC_by_layer_and_position", "projections", "effects", "candidates",
    ]  # fmt: skip
    # Two of three positions, of layer 1 alone: at layer 0's input the template is all there is.
    assert len(report.tables["selection"]) == 2
    assert len(report.tables["target_tokens"]) == 10
    assert len(report.verdicts) == 3 + 1 + 4 + 1
    assert report.verdicts[-1].holds, "hooks and weight edit are equal"
    assert "`>A:`" in report.text and str(root) not in report.text
    assert directions.run(config, root).path == folder.path
    assert all(run.complete for run in find_runs(root))


def test_study_writes_the_direction(study: tuple[Config, Path, Run]):
    config, root, folder = study
    direction = load_direction(folder.path / "direction.safetensors")
    assert "direction.safetensors" in folder.manifest["files"]
    measured = directions.measure(config, root)
    assert torch.equal(direction.vector, measured.vector)
    assert (direction.site, direction.position) == (measured.site, measured.position)
    assert direction.sd is not None and direction.max is not None and direction.sd > 0
    assert direction.mean is not None and direction.max > direction.mean


def test_a_stopped_study_goes_on(study: tuple[Config, Path, Run]):
    config, root, _ = study
    before = directions.measure(config, root)
    for run in find_runs(root / "directions"):
        if (path := run.path / RESULTS).is_file():
            (run.path / "manifest.json").unlink()
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(lines[:-2]) + lines[-2][:9])
    after = directions.measure(config, root)
    assert before.chosen is not None and after.chosen is not None
    assert after.chosen.candidates == before.chosen.candidates
    assert after.place == before.place
    assert np.array_equal(after.chosen.effects.random_added, before.chosen.effects.random_added)


def test_the_same_seed_gives_the_same_numbers(study: tuple[Config, Path, Run], tmp_path: Path):
    config, root, _ = study
    before, again = directions.measure(config, root), directions.measure(config, tmp_path)
    assert torch.equal(before.vector, again.vector)
    assert np.array_equal(before.trained.random, again.trained.random)
    assert before.chosen is not None and again.chosen is not None
    assert before.chosen.candidates == again.chosen.candidates


def test_files_without_target_tokens_are_only_represented(folder: Path, tmp_path: Path):
    a, b = tmp_path / "loud.jsonl", tmp_path / "quiet.txt"
    a.write_text("".join(json.dumps({"prompt": f"LOUD {i}"}) + "\n" for i in range(12)))
    b.write_text("".join(f"quiet {i}\n" for i in range(12)))
    config = Config(model=str(folder / "model"), positive=a, negative=b, device="cpu")
    assert "only representations" in directions.estimate(config)["candidates"]
    report = directions.make_report(directions.measure(config, tmp_path / "root"))
    assert len(report.verdicts) == 3 and "effects" not in report.figures
    assert "only representations were measured" in report.text
    assert "LOUD" not in json.dumps(report.numbers) + report.text
    assert not list((tmp_path / "root" / "directions").glob("*-effects-*"))


def test_unknown_target_tokens_are_told_in_a_sentence(folder: Path, tmp_path: Path):
    config = Config(
        model=str(folder / "model"), target_tokens=("word",), n_train=2, n_validation=2, n_test=2,
        device="cpu",
    )  # fmt: skip
    with pytest.raises(UserError, match="'word' is not one token"):
        directions.run(config, tmp_path)
