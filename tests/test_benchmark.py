"""The benchmark end to end on a tiny model, and what it says of what it cannot measure."""

import json
import math
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from planted import class_texts, planted_sae, task_data
from test_tasks import with_words

from analyses import benchmark, benchmark_suites
from analyses.benchmark import Config, estimate, figures, find_sae, measure, run
from analyses.benchmark_findings import verdicts, wide_table
from analyses.benchmark_measured import Measured, Results, resample_weights
from probe.errors import Failure, UserError
from probe.language import LanguageModel
from probe.runs import Run, verify
from saes.folder import save_sae

D = 32
WORDS = [f" {first}{a}{b}a" for first in "pqr" for a in "abcdefgh" for b in "abcdefgh"]


KINDS = {"digits": "7", "vowels": "e", "marks": "!"}
PLACES = {"near": "(", "far": "Z"}


def written(letters: random.Random, kind: str, place: str) -> str:
    """A text with three signs of its kind to six of its place, and others."""
    signs = [KINDS[kind]] * 3 + [PLACES[place]] * 6
    signs += [letters.choice("tnrshdlc") for _ in range(5)]
    return "".join(letters.sample(signs, len(signs)))


def name_words_after_letters(model: LanguageModel) -> None:
    """Turn the words' embeddings towards their first letters'."""
    weight = model.model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    towards = {letter: torch.randn(D, generator=generator) for letter in "pqr"}
    with torch.no_grad():
        for word in WORDS:
            token = model.tokenizer.convert_tokens_to_ids(word)
            weight[token] = 0.2 * weight[token] + towards[word[1]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, labelled texts and three SAEs: two at one site and one of the random-weight twin."""
    root = tmp_path_factory.mktemp("root")
    model = with_words(WORDS)
    name_words_after_letters(model)
    model.model.save_pretrained(root / "model")
    model.tokenizer.save_pretrained(root / "model")
    letters = random.Random(0)
    rows = [
        {"text": written(letters, kind, place), "kind": kind, "place": place}
        for kind in KINDS
        for place in PLACES
        for _ in range(60)
    ]
    (root / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, seed, twin, site in (
        ("main", 0, None, "resid_post.0"),
        ("second", 1, None, "resid_post.1"),
        ("twin", 2, 7, "resid_post.0"),
    ):
        make_sae(root, name, seed, twin, site)
    return root


def make_sae(root: Path, name: str, seed: int, twin: int | None, site: str) -> Run:
    described = {
        "kind": "sae",
        "model": {"spec": str(root / "model"), "random_weights": twin, "dtype": "float32"},
        "site": site,
    }
    run = Run.create(root / "saes", name, described)
    directions = torch.randn(48, D, generator=torch.Generator().manual_seed(seed))
    directions /= directions.norm(dim=1, keepdim=True)
    save_sae(planted_sae(directions, k=6), run.path, metadata={}, golden_x=torch.randn(4, D))
    run.finish(summary={}, inputs={}, seeds={}, device="cpu")
    return run


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Plotly's JSON is enough: drawing takes seconds a figure."""
    monkeypatch.setattr("analyses.report.CHROMIUM", tmp_path / "none")
    monkeypatch.setattr(benchmark, "MIN_WORDS_PER_LETTER", 20)
    monkeypatch.setattr(benchmark_suites, "MIN_WORDS", 3)


def asked(root: Path, **options: Any) -> Config:
    sae = next((root / "saes").glob("main-*"))
    defaults: dict[str, Any] = {
        "dataset": str(root / "texts.jsonl"), "label": "kind", "attribute": "place",
        "ks": (1, 3), "ns": (2, 5), "n_resamples": 20, "device": "cpu",
    }  # fmt: skip
    return Config(sae=sae.name, **(defaults | options))


def name_of(root: Path, name: str) -> str:
    return next((root / "saes").glob(f"{name}-*")).name


def test_everything_end_to_end(root: Path) -> None:
    config = asked(
        root, compare=name_of(root, "second"), twin=str(root / "saes" / name_of(root, "twin"))
    )
    folder = run(config, root)
    assert folder.complete and verify(folder) == []
    assert folder.path.parent == root / "reports" / "benchmark"
    names = {path.stem for path in (folder.path / "figures").glob("*.json")}
    assert names == {
        "probing", "targeted_probe_perturbation", "spurious_correlation_removal", "absorption",
        "matching", "coherence",
    }  # fmt: skip
    text = (folder.path / "report.md").read_text()
    for part in ("## Verdicts", "## Probing", "## Coherence", "residual channels", "95 %"):
        assert part in text
    table = pd.read_parquet(folder.path / "estimates.parquet")
    assert set(table["activations"]) == {"sae", "compare", "twin"}
    probing = table[table["suite"] == "probing"]
    assert set(probing.loc[probing["activations"] == "sae", "name"]) == {
        "sae", "channels", "pca", "random_dictionary", "dense", "shuffled"
    }  # fmt: skip
    assert set(probing.loc[probing["activations"] == "twin", "name"]) == {"sae", "dense"}
    within = table.dropna()
    low, value, high = (within[name].to_numpy() for name in ("low", "value", "high"))
    assert (low <= value + 1e-9).mean() > 0.95 and (value <= high + 1e-9).mean() > 0.95
    tpp = table[(table["suite"] == "tpp") & (table["activations"] == "sae")]
    assert set(tpp["name"]) == {
        "sae", "channels", "pca", "random_dictionary", "random_latents", "probe"
    }  # fmt: skip
    assert len(table[(table["suite"] == "absorption") & (table["activations"] == "sae")]) == 10
    letters = pd.read_parquet(folder.path / "tables" / "letters.parquet")
    assert letters["letter"].tolist() == ["p", "q", "r"]
    assert letters["absorbed (paper)"].between(0, 1).all()
    # Three sites were captured, each for texts and words; asked again, nothing is done.
    assert len(list((root / "tasks").iterdir())) == 6
    written = (folder.path / "manifest.json").stat().st_mtime_ns
    assert run(replace(config, device="auto"), root).path == folder.path
    assert (folder.path / "manifest.json").stat().st_mtime_ns == written


def test_a_class_that_bytes_give_away_is_read_from_the_whole_activation(root: Path) -> None:
    results = measure(asked(root, suites=("probing",)), root)
    dense = results.find("probing", "sae", "dense", "all")
    one, floor = (results.find("probing", "sae", name, "1") for name in ("sae", "shuffled"))
    assert dense is not None and one is not None and floor is not None
    assert dense.estimate.value > 0.85
    assert one.estimate.value > floor.estimate.value
    assert set(results.tables) == {"classes"} and not results.notes
    assert results.tables["classes"]["class"].tolist() == ["digits", "marks", "vowels"]
    assert set(figures(results)) == {"probing"}


def test_an_sae_matched_with_itself_is_the_same(root: Path) -> None:
    config = asked(root, compare=name_of(root, "main"), suites=("matching", "coherence"))
    results = measure(config, root)
    own, random_pairs = results.tables["matching"].to_dict("records")
    assert own["mean_cosine"] == pytest.approx(1) and own["share_above_0.9"] == 1
    assert random_pairs["mean_cosine"] < 0.9
    assert not results.estimates
    folder = run(config, root)
    verdicts = json.loads((folder.path / "metrics.json").read_text())["verdicts"]
    assert [v["holds"] for v in verdicts[:2]] == [True, True]
    assert verdicts[1]["value"] == 1 and verdicts[1]["low"] > 0.9


def test_a_second_sae_at_the_same_site_repeats_no_control(root: Path) -> None:
    config = asked(root, compare=name_of(root, "main"), suites=("probing", "scr"))
    results = measure(config, root)
    names = [(each.subject, each.name) for each in results.of("probing") if each.setting != "3"]
    assert [name for subject, name in names if subject == "compare"] == ["sae"]
    assert names.count(("sae", "dense")) == 1
    assert len(results.tables["spurious_probes"]) == 2
    one, same = (results.find("probing", subject, "sae", "1") for subject in ("sae", "compare"))
    assert one is not None and same is not None
    difference = one.minus(same)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_claims_are_read_off_intervals(root: Path) -> None:
    config = asked(root, suites=("probing", "absorption"))
    results = measure(config, root)
    found = {verdict.claim: verdict for verdict in verdicts(config, results)}
    for words, suite, setting, control in (
        ("One latent tells a class better than one residual channel does.", "probing", "1",
         "channels"),
        ("First letters are absorbed more than shuffled ones (released rule).", "absorption",
         "released", "sae/shuffled"),
    ):  # fmt: skip
        one, other = (results.find(suite, "sae", name, setting) for name in ("sae", control))
        assert one is not None and other is not None
        verdict, difference = found.pop(words), one.minus(other)
        assert (verdict.value, verdict.low) == (difference.value, difference.low)
        assert difference.low is not None and verdict.holds == (difference.low > 0)
    main = results.tables["letters"]["main F1"].to_numpy()
    assert found["Most letters have main latents that tell them."].value == (main > 0.5).mean()
    assert all("twin" not in claim and "Taking out" not in claim for claim in found)


def test_what_cannot_be_measured_is_said_and_the_rest_goes_on(root: Path) -> None:
    results = measure(asked(root, attribute=None, suites=("scr", "matching", "coherence")), root)
    assert len(results.notes) == 2
    assert results.notes[0].startswith("scr is left out: it needs a second column")
    assert "no second SAE" in results.notes[1]
    assert set(results.tables) == {"coherence"}
    with pytest.raises(UserError, match=r"nothing could be measured\. matching is left out"):
        measure(asked(root, suites=("matching",)), root)


def test_two_classes_have_no_tpp(root: Path, tmp_path: Path) -> None:
    rows = (root / "texts.jsonl").read_text().splitlines()
    (tmp_path / "two.jsonl").write_text("\n".join(row for row in rows if "marks" not in row))
    config = asked(root, dataset=str(tmp_path / "two.jsonl"), suites=("probing", "tpp"))
    results = measure(config, root)
    assert results.of("probing") and not results.of("tpp")
    assert "three classes" in results.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suites": ()}, "suites must be one or more"),
        ({"ks": (2, 1)}, "ks must be growing"),
        ({"ns": ()}, "ns must be growing"),
        ({"ns": (0, 1)}, "ns must be growing"),
        ({"n_resamples": 0}, "n_resamples"),
    ],
)
def test_a_config_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(sae="x", **options)


def test_every_option_has_a_default_and_a_plan() -> None:
    assert all(field.default is not field.default_factory for field in fields(Config))
    assert Config().columns == ("form", "topic")
    assert Config(label="topic").columns == ("topic", "form")
    assert Config(dataset="mine.csv").columns == ("label", None)
    assert Config().headline_n == 20 and Config(ns=(1, 2, 3)).headline_n == 2
    plan = estimate(Config(sae="a", twin="b", suites=("coherence",)))
    assert plan["SAEs"] == "a, b" and plan["texts"] == "none"


def test_an_sae_that_is_not_there_or_not_ready(root: Path, tmp_path: Path) -> None:
    for spec in ("", "nowhere"):
        with pytest.raises(UserError, match=r"main-[0-9a-f]{8}"):
            find_sae(spec, root)
    other = Run.create(tmp_path, "corpus", {"kind": "corpus"})
    with pytest.raises(UserError, match="of kind 'corpus'"):
        find_sae(str(other.path), root)
    young = Run.create(tmp_path, "young", {"kind": "sae", "model": {}, "site": "resid_post.0"})
    with pytest.raises(Failure, match="still in training"):
        find_sae(str(young.path), root)


# ------------------------------------------------------------------------------ pieces


def measured(values: list[float], n_texts: int = 9) -> Measured:
    return Measured(
        suite="tpp", subject="sae", name="sae", label="SAE", setting="5", n_texts=n_texts,
        draws=torch.tensor(values, dtype=torch.float64),
    )  # fmt: skip


def test_a_difference_is_taken_draw_by_draw() -> None:
    one = measured([0.5, *(i / 100 for i in range(101))])
    other = measured([0.2, *(i / 100 - 0.25 for i in range(101))])
    found = one.estimate
    assert (found.low, found.high) == pytest.approx((0.025, 0.975))
    difference = one.minus(other)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.3, 0.25, 0.25))
    single = measured([0.5, 0.4, 0.6], n_texts=1).estimate
    assert single.low is None and single.high is None


def test_a_wide_table_is_ordered_by_target_and_setting() -> None:
    def one(name: str, target: str, setting: str, value: float) -> Measured:
        draws = torch.tensor([value], dtype=torch.float64)
        plain = measured([0.0], n_texts=1)
        return replace(plain, label=name, variant=target, setting=setting, draws=draws)

    shown = [one("a", "x", "5", 0.5), one("a", "y", "5", math.nan), one("b", "x", "1", 2)]
    table = wide_table(shown)
    assert table.columns.tolist() == ["target", "what", "n = 1", "n = 5"]
    assert table.to_numpy(na_value="").tolist() == [
        ["x", "a", "", "0.500"], ["x", "b", "2.000", ""], ["y", "a", "", "-"],
    ]  # fmt: skip


def test_weights_begin_with_the_texts_as_they_are() -> None:
    x, labels, test = class_texts(n=9, n_classes=2, d=3)
    weights = resample_weights(task_data(x, labels, test), 15, seed=0)
    n = int(test.sum())
    assert weights.shape == (16, n) and (weights[0] == 1).all()
    assert (weights.sum(1) == n).all()


def test_results_find_and_headline() -> None:
    results = Results()
    assert results.headline_target == "" and results.find("tpp", "sae", "sae", "5") is None
    results.estimates.append(measured([0.5, 0.4, 0.6]))
    assert results.find("tpp", "sae", "sae", "5") is results.estimates[0]
    for place, target, biased, unbiased in (
        ("own", "a", 0.5, 0.6), ("own", "b", 0.6, 0.9), ("twin", "a", 0.1, 0.9)
    ):  # fmt: skip
        row = {"biased accuracy": biased, "unbiased accuracy": unbiased}
        results.add_rows("spurious_probes", [{"activations": place, "target": target} | row])
    assert results.headline_target == "b"
    assert isinstance(figures(results)["targeted_probe_perturbation"], go.Figure)
