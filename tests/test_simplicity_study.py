"""The simplicity-bias study end to end, small."""

import contextlib
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from artifact_tree import SITE, Tree, make_tree
from collapse_tree import untrained_sae
from scipy import stats
from transformers import GPT2Config, LlamaConfig

from analyses.catalog import load_study
from analyses.report import read_report
from analyses.simplicity import measured as measured_module
from analyses.simplicity import study
from analyses.simplicity.feature_paths import line_states, read_lines
from analyses.simplicity.measured import Config, Settings, settle
from analyses.simplicity.numbers import paired, rank_correlations
from analyses.simplicity.sequences import (
    Phi,
    Variant,
    complexity,
    drawn_model,
    random_tokens,
    sequences,
    tiny_gpt2,
    written,
)
from analyses.simplicity.twins import find_twins
from app.commands import capture, index, train
from app.commands.options import Common
from probe.capture import capturing
from probe.errors import UserError
from probe.language import ForwardStopped, LanguageModel
from probe.models import load_language_model
from probe.prompt_sets import Row
from probe.runs import Run
from probe.sites import parse_site
from saes.activations import TopK
from saes.recipe_saes import LoadedSae
from saes.training import TrainConfig

SMALL = Settings(
    depths=(1, 3), scales=(0.5, 8.0), draws=3, component_depths=(2,),
    component_activations=("relu", "tanh"), widths=(8, 16), bias_scales=(0.5, 1.0),
    boolean_draws=20_000, perceptron_inputs=(3, 4), perceptron_draws=500, moduli=(10, 4),
    prefactors=(0.5, 2.0), seeds=2, steps=4, sequences=3, transformer_depths=(1, 2),
    norm_scales=(0.5, 1.0), architecture_sequences=1, suites=("coherence", "matching"), paths=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Tree:
    return make_tree(tmp_path_factory.mktemp("simplicity"))


@pytest.fixture(scope="module")
def twin(tree) -> Run:
    """An SAE of the same recipe on random weights, indexed."""
    common = Common(root=tree.root)
    store = capture.run(
        capture.Command(
            model=tree.sae.config["model"]["spec"], corpus=str(tree.root.parent / "corpus.jsonl"),
            sites=(SITE,), tokens=4096, context=64, random_weights=0, dtype="float32",
            device="cpu", common=common,
        )
    )  # fmt: skip
    recipe = TrainConfig(d_sae=64, activation=TopK(k=4), steps=20, warmup_steps=5, init_rows=512)
    folder = train.run(
        train.Command(
            source=str(store), train=recipe, batch_size=128, buffer_rows=1024, device="cpu",
            common=common,
        )
    )  # fmt: skip
    assert folder is not None
    index.run(index.Command(sae=folder, device="cpu", common=common))
    return Run.open(folder)


@pytest.fixture(scope="module")
def config(tree, twin) -> Config:
    return Config(
        grid=16, width=8, model=tree.sae.config["model"]["spec"], sae=tree.sae.path.name,
        twin=twin.path.name,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(tree, config):
    with pytest.MonkeyPatch.context() as here:
        here.setitem(measured_module.PRESETS, "quick", SMALL)
        here.setattr(study, "TRAIN_DIGITS", 60)
        here.setattr(study, "VARIED_ACTIVATIONS", ("gelu", "tanh"))
        here.setattr("analyses.report.CHROMIUM", tree.root / "none")  # pictures take seconds
        run = study.run(config, tree.root)
        again = study.run(config, tree.root)
    assert again.path == run.path
    return read_report(run.path)


def test_every_part_is_in_the_report(report):
    claims = "\n".join(verdict.claim for verdict in report.verdicts)
    for words in ("Tanh networks grow complex", "ReLU's complexity rises less than sine",
                  "does not rise at all", "GELU rises less than tanh",
                  "least complex of all at the smallest",
                  "rank alike by", "plain Fourier transform", "Layer norm takes",
                  "Residual connections lower", "Gates raise", "The width does nothing (relu)",
                  "The size of the biases does nothing (sine)", "long-tailed",
                  "the less probable the more complex", "Half of all networks",
                  "Every choice of signs", "On centred inputs", "M = 10", "best prefactor",
                  "the colour, is what is learnt", "write more simply than at random",
                  "Larger gains of the norms", "density tells a trained model's feature",
                  "vary more along lines between texts"):  # fmt: skip
        assert words in claims, words
    assert {"complexity", "components", "priors", "boolean_functions", "likeliest_functions",
            "perceptrons", "modulo", "shortcut", "sequences", "headline_numbers",
            "lines_between_texts"} <= set(report.tables)  # fmt: skip
    assert {"functions", "complexity_maps", "spread_over_draws", "components", "width",
            "size_of_biases", "agreement_of_measures", "boolean_functions", "boolean_ranks",
            "perceptron", "modulo", "modulo_and_complexity", "shortcut", "sequences",
            "sequences_by_norm", "headline_numbers", "lines_between_texts"} <= set(
        report.figures)  # fmt: skip
    exact = [v for v in report.verdicts if v.statistic.startswith("share of n = 3 to 4")]
    assert len(exact) == 2 and all(v.holds and v.value == 1 for v in exact)


def test_a_lost_part_comes_out_the_same(tree, config, report, monkeypatch):
    monkeypatch.setitem(measured_module.PRESETS, "quick", SMALL)
    parts = ("maps", "boolean")
    lost = sorted((tree.root / "tasks").glob("simplicity-maps-*"))[0]
    before = pd.read_parquet(lost / "functions.parquet")
    kept = {p: p.stat().st_mtime_ns for p in (tree.root / "tasks").glob("*/manifest.json")}
    shutil.rmtree(lost)
    study.measure(replace(config, parts=parts, sae="", twin=""), tree.root)
    pd.testing.assert_frame_equal(before, pd.read_parquet(lost / "functions.parquet"))
    now = {p: p.stat().st_mtime_ns for p in (tree.root / "tasks").glob("*/manifest.json")}
    assert [p.parent for p in kept if kept[p] != now[p]] == [lost]


def test_the_catalog_has_it_and_the_estimate_says_how_long():
    found = load_study("simplicity-bias").estimate(Config())
    assert "min on two cores" in found["time"] and found["SAEs"].startswith("none")
    assert "10,000,000 networks" in study.estimate(Config(preset="full"))["Boolean functions"]


def test_where_all_functions_are_constant_there_is_nothing_to_say(tmp_path, monkeypatch):
    monkeypatch.setitem(measured_module.PRESETS, "quick", SMALL)
    config = Config(grid=8, width=8, scales=(0.0,), parts=("maps", "components"))
    with np.errstate(all="raise"):
        made = study.measure(config, tmp_path)
    assert (
        made.table("functions").loc[lambda t: t["activation"] != "fourier", "fourier"].isna().all()
    )
    report = study.make_report(made)
    assert not any("relu" in verdict.claim.lower() for verdict in report.verdicts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depths": (0, 2)}, "start at 1"),
        ({"scales": (-1.0,)}, "scales -1 were asked for; give finite ones"),
        ({"scales": (1.0, float("nan"))}, "give finite ones"),
        ({"seed": -1}, "0 is the least"),
        ({"draws": 0}, "start at 1"),
        ({"activations": ()}, "an activation"),
        ({"parts": ()}, "no part is named; choose from maps"),
        ({"sae": "a"}, "--sae and --twin go together"),
        ({"grid": 3}, "too small for a spectrum"),
    ],
)
def test_bad_options_are_said(options, words):
    with pytest.raises(UserError, match=words):
        settle(Config(**options))


def test_twins_have_to_be_twins(tree, twin, tmp_path):
    with pytest.raises(UserError, match="these are of random weights and trained weights"):
        find_twins(twin.path.name, tree.sae.path.name, tree.root)
    other = untrained_sae(tmp_path / "saes", tree.sae.config["model"]["spec"], layer=0)
    with pytest.raises(UserError, match="give SAEs of the same model and site"):
        find_twins(str(other.path), twin.path.name, tree.root)


# -------------------------------------------------------------------------------------- sequences


def test_complexity_of_sequences_does_not_mind_which_tokens():
    tokens = torch.tensor([[5, 5, 5, 5, 5, 5], [9, 2, 9, 2, 9, 2], [1, 2, 3, 4, 5, 6]])
    assert complexity(tokens).tolist() == [3, 4, 6]  # a aa aaa; a b ab a(b); six of one
    assert (complexity(tokens + 7) == complexity(tokens)).all()
    assert complexity(random_tokens(5, 1000, seed=0)).min() > 85


LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
    max_position_embeddings=32, eos_token_id=None,
)  # fmt: skip


@pytest.mark.parametrize("config", [tiny_gpt2(2, width=16, vocabulary=50), LLAMA])
def test_models_that_write_together_write_what_each_generates(config):
    models = [drawn_model(Variant(config=config, activation="tanh"), seed) for seed in (3, 4)]
    found = written(models, [0, 1], length=12)
    for model, tokens in zip(models, found, strict=True):
        alone: Any = model
        given = alone.generate(
            tokens[None, :1], attention_mask=torch.ones(1, 1, dtype=torch.long), pad_token_id=0,
            max_new_tokens=11, do_sample=False,
        )  # fmt: skip
        assert given[0].tolist() == tokens.tolist()
    embeddings: list[Any] = [model.get_input_embeddings().weight for model in models]
    assert not torch.equal(*embeddings)


def test_sequences_are_the_same_however_many_write_together(monkeypatch):
    variant = Variant(config=tiny_gpt2(1, width=16, vocabulary=50))
    table = sequences(variant, 3, seed=0)
    monkeypatch.setattr("analyses.simplicity.sequences.WEIGHTS_AT_ONCE", 1)
    pd.testing.assert_frame_equal(table, sequences(variant, 3, seed=0))


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=32),
        LLAMA,
    ],
)
def test_activation_and_gains_are_changed_where_they_are(config):
    model = drawn_model(Variant(config=config, activation="sine", norm_scale=3.0), 0)
    changed = [name for name, module in model.named_modules() if isinstance(module, Phi)]
    assert len(changed) == 1
    norms: list[Any] = [module.weight for name, module in model.named_modules()
             if "norm" in type(module).__name__.lower()]  # fmt: skip
    assert len(norms) == 3 and all(torch.all(weight == 3) for weight in norms)


# ------------------------------------------------------------------------------------ agreement


def test_agreement_weighs_draws_as_a_loop_does():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 7, 5)) + np.arange(7)[:, None] / 2
    values[0, 3, 1] = np.nan
    times = np.array([[1, 1, 1, 1, 1], [0, 2, 1, 0, 2], [3, 0, 0, 2, 0]])
    for row, found in zip(times, rank_correlations(values, times.astype(float)), strict=True):
        drawn = np.repeat(values, row, axis=2)
        means: Any = np.nanmean(drawn, axis=2)
        slow: Any = stats.spearmanr(*means)
        assert found == pytest.approx(slow.statistic)


# -------------------------------------------------------------------------------------- lines


def captured(model: LanguageModel, text: Row) -> torch.Tensor:
    """The stream at the last token of a text that the model reads as tokens."""
    site = parse_site("resid_post.1")
    with capturing(model, [site]) as seen, contextlib.suppress(ForwardStopped):
        model.model(torch.tensor([text]))
    return seen[site][0, -1]


def test_a_line_begins_and_ends_in_its_texts(llama):
    first, last = (1, 2, 3, 4), (9, 8, 7, 6)
    states = line_states(llama, "resid_post.1", first, last, steps=5)
    for place, text in ((0, first), (-1, last)):
        torch.testing.assert_close(states[place], captured(llama, text))
    assert not torch.allclose(states[2], states[0])


def test_features_and_random_directions_are_read_on_every_line(tree):
    loaded = LoadedSae.of(tree.sae)
    model = load_language_model(tree.sae.config["model"]["spec"], dtype="float32")
    lines = [((1, 2, 3, 4), (5, 6, 7, 8)), ((9, 9, 9, 9), (3, 1, 4, 1))]
    table = read_lines(model, loaded, lines, seed=0)
    assert set(table["read"]) <= {"feature", "encoder", "random"}
    random = table[table["read"] == "random"]
    assert len(random) == 2 and (random["n"] == 256).all()
    assert np.isfinite(random["variation"]).all()


def test_differences_are_of_draws_that_both_have():
    a = pd.Series([3.0, 5.0, np.nan], index=[0, 1, 2])
    b = pd.Series([1.0, 1.0, 1.0], index=[1, 0, 2])
    found = paired(a, b)
    assert found is not None and (found.value, found.n) == (3.0, 2)
    assert paired(a[2:], b) is None
