"""The circuit-breaker study on a tiny model: it runs, is kept, and refuses what makes no sense."""

import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from breaker_tree import SECRET, SMALL, small, write_files
from collapse_tree import saved_llama, untrained_sae

from analyses.circuit_breakers import measured as measured_module
from analyses.circuit_breakers import study
from analyses.circuit_breakers.measured import PARTS, Config, settle
from analyses.circuit_breakers.parts import ablations
from analyses.circuit_breakers.settings import RECIPES
from analyses.report import read_report
from probe.errors import Failure, UserError
from probe.models import load_language_model
from probe.runs import find_runs
from saes.recipes import read_recipe
from saes.steering import prepare


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return saved_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("breakers")


@pytest.fixture(scope="module")
def sae(spec, root) -> str:
    return untrained_sae(root / "saes", spec, layer=1).path.name


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def report(spec, root, sae, files):
    with pytest.MonkeyPatch.context() as here:
        here.setitem(measured_module.PRESETS, "quick", SMALL)
        here.setattr("analyses.report.CHROMIUM", root / "none")  # pictures take seconds
        run = study.run(small(spec, saes=(sae,), **files), root)
        again = study.run(small(spec, saes=(sae,), **files), root)
    assert again.path == run.path
    return read_report(run.path)


def test_every_part_is_in_the_report(report):
    claims = "\n".join(verdict.claim for verdict in report.verdicts)
    for words in ("published constants reroute", "sets shuffled", "orthogonal to what they were",
                  "of harmful prompts orthogonal", "Near misses keep", "below the first target",
                  "leaves the others alone", "become unlikely: prefill",
                  "gibberish", "no refusals", "Held-out text", "Multiple-choice", "ordinary chat",
                  "RMU does not converge", "more than RandP", "Blanking requests",
                  "protect near misses", "than a linear probe", "no longer reads",
                  "steps of fine-tuning", "Soft tokens", "turns of other talk",
                  "Putting back the 100"):  # fmt: skip
        assert words in claims, words
    assert {"states", "attacks", "answers", "capability", "ablations", "probe_or_control",
            "probes", "wearing_down", "dictionaries", "features", "putting_back"} == set(
        report.tables)  # fmt: skip
    assert {"training", "terms", "cosine_by_layer", "length_by_layer", "attacks", "ablations",
            "cosine_by_layer_and_token", "probes_by_layer", "direction_by_layer", "fine_tuning",
            "soft_tokens", "longer_conversations", "putting_features_back",
            "likelihood_under_attacks"} == set(report.figures)  # fmt: skip
    assert "cannot show" in report.text and "Deviations from the published recipe" in report.text


def test_intervals_surround_their_values(report):
    for verdict in report.verdicts:
        if verdict.low is not None and math.isfinite(verdict.value):
            assert verdict.low <= verdict.value + 1e-9, verdict.claim
            assert verdict.value <= verdict.high + 1e-9, verdict.claim


def test_broken_models_are_models(report, root, spec):
    for folder in report.numbers["adapters"].values():
        assert load_language_model(str(root / folder), dtype="float32").n_layers == 2
    assert len(report.numbers["adapters"]) == 6


def test_recipes_put_lost_features_back_into_the_broken_model(report, root, sae):
    folder = next((root / "reports" / "circuit-breakers").iterdir()) / "recipes"
    names = {path.name for path in folder.glob("*.json")}
    assert {f"recipes-0-{sae}.json", f"place-0-{sae}.json"} <= names
    recipe = read_recipe(folder / f"recipes-0-{sae}.json")
    steering = prepare(recipe, root=root)
    tokens = torch.tensor([5, 6, 7, 8])
    assert torch.isfinite(steering.next_token(tokens, steering.edits(tokens))).all()
    changed = steering.next_token(tokens, steering.edits(tokens))
    assert not torch.equal(changed, steering.next_token(tokens, ()))


def test_of_harmful_prompts_nothing_is_kept(report, root):
    """Neither the prompts nor what models go on with after them."""
    for path in sorted(root.rglob("*")):
        if path.suffix in (".json", ".md", ".jsonl"):
            assert SECRET not in path.read_text(), path
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
            texts = table.select_dtypes(exclude="number").astype(str)
            found = texts.apply(lambda column: column.str.contains(SECRET))
            assert not found.to_numpy().any(), path
    cells = [run for run in find_runs(root / "tasks") if run.config.get("subject") == "harmful"]
    outputs = [run for run in cells if run.config["part"] == "outputs"]
    assert outputs
    for run in outputs:
        assert "text" not in pd.read_parquet(run.path / "outputs.parquet").columns


def test_what_was_measured_is_kept(report, spec, root, files, sae, monkeypatch):
    monkeypatch.setitem(measured_module.PRESETS, "quick", SMALL)
    for name in ("train", "store_reference"):
        monkeypatch.setattr(study, name, None)  # what would be done again would fail
    measured = study.measure(small(spec, saes=(sae,), **files), root)
    assert measured.subjects == ("recipes", "place", "harmful")
    runs = set(measured.table("brief")["run"])
    assert runs == {"rerouting", *ablations(measured.training)}


def test_a_part_alone_needs_no_other(spec, root, monkeypatch):
    monkeypatch.setitem(measured_module.PRESETS, "quick", SMALL)
    measured = study.measure(small(spec, parts=("inside",), concepts=("recipes",)), root)
    assert set(measured.tables) == {"passages", "training", "layers", "profile"}
    report = study.make_report(measured)
    assert report.verdicts and set(report.tables) == {"states"}


def test_ablations_change_one_thing_each():
    training = RECIPES["smollm2"]
    found = ablations(training)
    assert training not in [one for one, _ in found.values()]
    assert sum(claimed for _, claimed in found.values()) == 5
    for name, (one, _) in found.items():
        changed = [
            f.name for f in dataclasses.fields(one)
            if getattr(one, f.name) != getattr(training, f.name)
        ]  # fmt: skip
        assert len(changed) == 1 or name in ("published constants", "absolute retain term"), name
    absolute, published = found["absolute retain term"][0], found["published constants"][0]
    as_published = dataclasses.replace(training, retain="absolute", retain_weight=1.0)
    assert absolute == as_published  # a weight is for a term of that size
    assert (published.retain, published.b_std, published.lr) == ("absolute", 0.0, 1e-4)


def test_options_replace_the_recipe_and_the_preset():
    settings, training = settle(
        Config(recipe="mistral-7b", alpha=7.0, seeds=5, concepts=("french",), loss="randp")
    )
    assert (training.alpha, training.loss, training.lr) == (7.0, "randp", 1e-4)
    assert (settings.seeds, settings.concepts) == (5, ("french",))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target_layers": (9,)}, "target layers 9 were asked for; those of .* are 1 to 1"),
        ({"harmful": "x"}, "--harmful needs prompts to be kept as well"),
        ({"ordinary": "x"}, "go with --harmful"),
        ({"concepts": ()}, "nothing is left to break"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"saes": ("none",)}, "where the folder of an SAE was wanted"),
        ({"choices": "missing.jsonl"}, "cannot be read as questions"),
    ],
)
def test_what_makes_no_sense_is_one_sentence_and_leaves_nothing(spec, tmp_path, changes, sentence):
    paths = {"harmful", "ordinary", "choices"}
    changes = {k: Path(v) if k in paths else v for k, v in changes.items()}
    with pytest.raises(UserError, match=sentence):
        study.run(small(spec, **changes), tmp_path)
    assert not list(tmp_path.rglob("config.json"))


def test_a_loss_that_is_not_finite_is_said(spec, tmp_path, monkeypatch):
    monkeypatch.setitem(measured_module.PRESETS, "quick", SMALL)
    with pytest.raises(Failure, match="smaller --lr or --alpha"):
        study.run(small(spec, lr=1e30, steps=9, concepts=("recipes",)), tmp_path)
    assert not any(run.complete for run in find_runs(tmp_path / "reports"))


def test_the_estimate_names_what_would_be_done():
    rows = study.estimate(Config())
    assert "30 steps of 4 + 4 rows" in rows["training"] and "min" in rows["time"]
    full = study.estimate(Config(preset="full"))
    assert full["ablations"] == "28 more trainings"
    assert set(PARTS) >= {"outputs", "inside"}
