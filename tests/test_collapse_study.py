"""The collapse study on a tiny model: it runs, is kept, goes on after a stop, says its limits."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from collapse_tree import saved_llama, untrained_sae

from analyses.collapse import parts, study
from analyses.collapse.families import find_family
from analyses.collapse.findings import verdicts
from analyses.collapse.measured import PARTS, PRESETS, Config, Measured, settle
from analyses.collapse.numbers import early_over_late, geometric, log_ratios, slopes
from analyses.collapse.prompts import grow
from analyses.collapse.remedies import ends_of_groups, find_separator
from analyses.report import read_report
from probe.capture import capturing
from probe.errors import UserError
from probe.models import load_language_model
from probe.runs import Run, find_runs
from probe.sites import parse_site
from saes.folder import load_sae
from saes.recipe_saes import LoadedSae


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return saved_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("collapse")


@pytest.fixture(scope="module")
def sae(spec, root) -> Run:
    """An SAE of the tiny model's first layer, untrained."""
    return untrained_sae(root / "saes", spec, layer=0)


def small(spec: str, **changes) -> Config:
    return dataclasses.replace(Config(model=spec, longest=40, device="cpu"), **changes)


@pytest.fixture(scope="module")
def report(spec, root, sae):
    with pytest.MonkeyPatch.context() as here:
        preset = dataclasses.replace(
            PRESETS["quick"], path_length=30, probes=2, copy_lengths=(5, 20), count_lengths=(5,),
            remedy_lengths=(20, 21), clamp_lengths=(21,), windows=(8,), synthetic_seeds=2,
        )  # fmt: skip
        here.setitem(PRESETS, "quick", preset)
        here.setattr("analyses.report.CHROMIUM", root / "none")  # pictures take seconds
        run = study.run(small(spec, saes=(sae.path.name,)), root)
        again = study.run(small(spec, saes=(sae.path.name,)), root)
    assert again.path == run.path
    return read_report(run.path)


def test_every_part_is_in_the_report(report):
    claims = "\n".join(verdict.claim for verdict in report.verdicts)
    for words in ("Proposition B.4", "Collapse: the last tokens", "Commas help", "In bfloat16",
                  "Early tokens", "copied better", "A hint helps", "Fewer features tell",
                  "keep a count", "Remedy: commas", "random feature of the same size"):  # fmt: skip
        assert words in claims, words
    assert {"distance_by_family", "distance_by_layer", "sensitivity_by_depth", "remedies",
            "number_formats", "shapes", "telling_features"} <= set(report.figures)  # fmt: skip
    assert {"final_distance", "curves", "number_formats", "remedies", "separator_feature",
            "features_by_layer", "copying", "counting"} <= set(report.tables)  # fmt: skip
    assert "cannot show" in report.text and "theorem assumes" in report.text


def test_exact_claims_hold_and_intervals_surround_their_values(report):
    assert report.verdicts[0].holds and report.verdicts[1].holds
    for verdict in report.verdicts:
        assert math.isfinite(verdict.value), verdict.claim
        if verdict.low is not None:
            assert verdict.low <= verdict.value + 1e-9 and verdict.value <= verdict.high + 1e-9


def test_what_was_measured_is_kept_and_read_again(report, spec, root, monkeypatch):
    cells = [run for run in find_runs(root / "tasks") if run.kind == "collapse_cell"]
    assert len(cells) > 30 and all(cell.complete for cell in cells)
    monkeypatch.setattr(parts, "curves", None)  # a part that would be measured again would fail
    monkeypatch.setitem(
        PRESETS, "quick", dataclasses.replace(PRESETS["quick"], windows=(8,), synthetic_seeds=2)
    )
    measured = study.measure(small(spec, parts=("theory", "curves")), root)
    assert set(measured.tables) == {"curves"}
    assert {"ones", "digits", "copying", "commas", "sum", "words"} == set(
        measured.table("curves")["family"]
    )


def test_sum_goes_up_to_a_third(report):
    assert report.tables["curves"]["family"].isin(["sum"]).any()
    columns = [name for name in report.tables["final_distance"] if name.startswith("n =")]
    sums = report.tables["final_distance"].set_index("family").loc["sum", columns]
    assert sums[:4].notna().all() and "n = 11" in columns


def test_an_estimate_names_the_parts_without_a_model():
    rows = study.estimate(Config(preset="full", saes=("a",)))
    assert "precision" in rows["tokens read"] and "min" in rows["time"]
    few = study.estimate(Config(parts=("curves",)))
    assert "precision" not in few["tokens read"]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"families": ("twos",)}, "'twos' is no prompt family"),
        ({"families": ()}, "no prompt family or part is left"),
        ({"longest": 5}, "--longest must be 12 or more"),
        ({"longest": 5000}, "reads at most 2,048: ask for shorter ones"),
        ({"saes": ("nothing",)}, "nothing was named where the folder of an SAE was wanted"),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_sentence(spec, root, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        study.run(small(spec, **changes), root)


def test_an_sae_of_another_model_is_refused(spec, root, sae):
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match="and the study is about elsewhere; name SAEs of that"):
        study.run(Config(model="elsewhere", saes=(str(sae.path),)), root)
    assert sorted(root.rglob("*")) == before, "nothing is half-written"


def test_numbers_by_hand():
    n = [10, 100, 1000]
    falling = pd.DataFrame([[1.0, 0.1, 0.01], [1.0, 0.01, 0.0001]], columns=n)
    assert slopes(falling).tolist() == pytest.approx([-1, -2])
    ratios = log_ratios(falling, falling / 10, lengths=n)
    assert ratios.tolist() == pytest.approx([1, 1])
    assert geometric([1.0, 100.0]).value == pytest.approx(10)
    rows = pd.DataFrame({"unit": 0, "position": range(8), "gradient": [100.0] * 4 + [1.0] * 4})
    assert early_over_late(rows).tolist() == pytest.approx([2])


def test_groups_end_where_commas_would_stand(spec):
    model = load_language_model(spec, dtype="float32", device="cpu")
    chosen = ends_of_groups(model, (0, 1), 8)
    places = torch.nonzero(chosen).flatten()
    start = len(chosen) - 7
    assert (places - start).tolist() == [2, 5]


def test_the_separator_feature_is_the_one_of_commas(spec, sae):
    """An SAE that is given a feature along what commas have and digits have not finds it."""
    model = load_language_model(spec, dtype="float32", device="cpu")
    made = load_sae(sae.path)
    growing = grow(model, find_family("commas"), 60)
    site = parse_site("resid_post.0")
    with torch.no_grad(), capturing(model, [site]) as seen:
        model.run(growing.trunk[None])
    inside = growing.trunk[growing.ends[0] :]
    x, commas = seen[site][0, growing.ends[0] :], inside != inside[0]
    apart = x[commas].mean(0) - x[~commas].mean(0)
    with torch.no_grad():
        made.W_enc[:, 7] = 100 * apart
        made.W_dec[7] = apart / apart.norm()
        made.b_enc[7] = -50 * (x[commas].mean(0) + x[~commas].mean(0)) @ apart
    found = find_separator(model, "x", LoadedSae(run=sae, sae=made, site=str(site)))
    assert found.feature == 7 and found.value > found.elsewhere and found.share > 0


def test_a_missing_part_leaves_its_claims_out():
    config = Config(parts=("theory",))
    measured = Measured(
        config=config, settings=settle(config), model="m", n_layers=2, parameters=10,
        synthetic=parts.synthetic(5), tables={}, notes=(),
    )  # fmt: skip
    found = verdicts(measured)
    assert len(found) == 5 and all(verdict.holds for verdict in found)
    assert set(PARTS) >= {"theory", "curves"} and np.isfinite(found[2].value)
