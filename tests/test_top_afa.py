"""The top-AFA study, whole and on hand-made results."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifact_tree import LINES, make_model

from analyses import top_afa
from analyses.report import read_report
from analyses.top_afa_cells import activation, make_groups, products_in
from analyses.top_afa_findings import differing_layers, only_above_d, slopes, verdicts
from analyses.top_afa_measured import (
    PRESETS,
    Cell,
    Config,
    Family,
    Group,
    Measured,
    Result,
    advantage,
    description_bits,
    matched,
    over_seeds,
    settle,
)
from probe.errors import UserError
from probe.runs import Run, find_runs
from saes.activations import BatchTopK, TopAfa, TopK

SMALL = replace(PRESETS["smollm2"], layers=(0, 1), ks=(2, 8), afas=(0.1, 0.4), seeds=2)


def result(
    family: Family, setting: float, fvu: float, l0: float, *, layer: int = 1, seed: int = 0,
    elbo: float = 1e-4,
) -> Result:  # fmt: skip
    cell = Cell(group=Group(layer=layer, seed=seed), family=family, setting=setting)
    facts: dict[str, float | None] = {
        "fvu": fvu, "l0": l0, "elbo": elbo, "ce_recovered": 0.9, "kl": 0.1, "dead_share": 0.0,
        "bits": description_bits(l0, 64), "code_over_input": 1.0, "over_share": 0.5,
        "elbo_support": None, "elbo_reconstruction": 0.1,
    }  # fmt: skip
    zf = {"input_norm": [1.0, 2.0], "code_norm": [1.0, 1.5]}
    return Result(cell=cell, facts=facts, course=[(1, 40.0), (2, l0)], zf=zf)


def measured(*results: Result, d_in: int = 16) -> Measured:
    return Measured(settings=SMALL, d_in=d_in, results=results)


def test_matched_l0_is_interpolated_on_logarithms_within_the_group() -> None:
    curve = [result("topk", 2.0, 0.4, 2.0), result("topk", 8.0, 0.1, 8.0)]
    # log FVU falls by log 4 over log 4 of L0: FVU is 0.8 / L0, at L0 = 4 it is 0.2.
    inside = result("top_afa", 0.1, 0.1, 4.0)
    outside = result("top_afa", 0.4, 0.1, 9.0)
    other_layer = result("top_afa", 0.1, 0.1, 4.0, layer=0)
    found = measured(*curve, inside, outside, other_layer)
    ((at, fvu),) = matched(found, found.pick("top_afa"))
    assert at is inside and fvu == pytest.approx(0.2)
    saved = advantage(found, found.pick("top_afa"))
    assert saved is not None and saved.value == pytest.approx(0.5) and saved.low is None
    assert advantage(found, [outside]) is None


def test_advantage_averages_logarithms_over_seeds() -> None:
    rows = []
    for seed, fvu in ((0, 0.1), (1, 0.4)):  # TopK has 0.2 at L0 = 4: saves a half, costs double
        rows += [result("topk", 2.0, 0.4, 2.0, seed=seed), result("topk", 8.0, 0.1, 8.0, seed=seed)]
        rows.append(result("top_afa", 0.1, fvu, 4.0, seed=seed))
    found = measured(*rows)
    saved = advantage(found, found.pick("top_afa"))
    assert saved is not None and saved.value == pytest.approx(0.0) and saved.n == 2
    # Student's t with one degree of freedom: 12.706 * log(2); 1 - exp(-+8.807...)
    reach = 12.7062047 * math.log(2)
    assert saved.low == pytest.approx(1 - math.exp(reach))
    assert saved.high == pytest.approx(1 - math.exp(-reach))


def test_seeds_are_the_units() -> None:
    rows = [
        result("topk", 2.0, fvu, 2.0, seed=seed) for seed, fvu in ((0, 1.0), (0, 3.0), (1, 4.0))
    ]
    found = over_seeds(rows, lambda r: r.fact("fvu"))
    assert found is not None and (found.value, found.n) == (3.0, 2)  # of 2 and 4
    assert over_seeds(rows, lambda r: r.fact("elbo_support")) is None


def test_slope_is_for_a_doubling() -> None:
    rows = [
        result("topk", k, fvu, k, layer=layer, seed=seed)
        for layer, seed in ((0, 0), (1, 0), (0, 1), (1, 1))
        for k, fvu in ((2.0, 0.8), (8.0, 0.2 if layer else 0.8))
    ]
    # Two doublings: log2 FVU falls by 2 at layer 1, by 0 at layer 0.
    assert slopes(measured(*rows), "topk").tolist() == [0.5, 0.5]


def test_worst_layers_differ() -> None:
    rows = []
    for seed in (0, 1):
        for setting, same in ((0.1, True), (0.4, False)):
            elbo = 2e-4 if same else 1e-4
            rows += [
                result("top_afa", setting, 0.3, 4.0, layer=0, seed=seed, elbo=elbo),
                result("top_afa", setting, 0.2, 4.0, layer=1, seed=seed, elbo=1.5e-4),
            ]  # fmt: skip
    share = differing_layers(measured(*rows), "top_afa")
    assert (share.value, share.low, share.high) == (0.5, 0.5, 0.5)


def test_only_above_d_says_which_side_there_was() -> None:
    curve = [result("topk", 2.0, 0.4, 2.0), result("topk", 64.0, 0.1, 64.0)]
    below = measured(*curve, result("top_afa", 0.1, 0.1, 4.0), d_in=16)
    (verdict,) = only_above_d(below)
    assert not verdict.holds and "below L0 = d, the only side" in verdict.statistic
    both = measured(
        *curve, result("top_afa", 0.1, 0.5, 4.0), result("top_afa", 0.4, 0.01, 32.0), d_in=16
    )
    (verdict,) = only_above_d(both)
    assert "above L0 = d, 1 seed" in verdict.statistic and verdict.value > 0.5
    assert only_above_d(measured(*curve)) == []


def test_description_length() -> None:
    assert description_bits(10.0, 4096) == 10 * (7 + 12)


def test_activation_of_each_family() -> None:
    assert activation("topk", 32.0) == TopK(k=32)
    assert activation("batch_topk", 8.0) == BatchTopK(k=8)
    assert activation("top_afa", 0.1) == activation("untrained", 0.1) == TopAfa(afa=0.1)
    assert activation("top_afa_paper", 0.1) == TopAfa(afa=0.1, paper_code=True)


def test_products_precision_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), products_in("bfloat16"):
        assert torch.get_float32_matmul_precision() == "medium"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


def test_published_preset() -> None:
    settings = settle(Config(preset="gpt2", seeds=1))
    assert settings.steps * settings.batch_size == 81_924_096  # the authors' number of tokens
    groups = make_groups(settings)
    main = groups[0]
    assert [c.setting for c in main if c.family == "topk"] == [2.0**i for i in range(5, 14)]
    assert sum(c.family == "top_afa" for c in main) == 5
    assert "gpt2 reads 82,000,000" in top_afa.estimate(Config(preset="gpt2"))["activations"]


@pytest.mark.parametrize(
    "wrong",
    [Config(ks=()), Config(ks=(8, 2)), Config(ks=(8, 9999)), Config(afas=(0.0, 0.1)),
     Config(layers=(3, 2)), Config(seeds=0), Config(batch_size=0)],
)  # fmt: skip
def test_senseless_settings_are_refused(wrong: Config) -> None:
    with pytest.raises(UserError):
        settle(wrong)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, Run]:
    """The whole study on a tiny model: two layers, two seeds."""
    folder = tmp_path_factory.mktemp("study")
    corpus = folder / "corpus.jsonl"
    lines = [json.dumps({"id": str(i), "text": LINES[i % len(LINES)]}) for i in range(96)]
    corpus.write_text("\n".join(lines))
    config = Config(
        model=str(make_model(folder / "model")), corpus=str(corpus), layers=(0, 1), tokens=4096,
        d_sae=48, ks=(2, 8), afas=(0.1, 0.4), steps=12, batch_size=64, seeds=2, n_rows=256,
        n_ce_tokens=256, products="float32", device="cpu",
    )  # fmt: skip
    return config, folder / "root", top_afa.run(config, folder / "root")


def test_study_trains_every_cell_once(study: tuple[Config, Path, Run]) -> None:
    config, root, report = study
    cells = [cell for group in make_groups(settle(config)) for cell in group]
    runs = find_runs(root / "saes" / "top-afa")
    # Main: layer 0 has 2 + 2 + 2 SAEs and the untrained one, layer 1 the authors' code too; raw and
    # twin have 2 + 1 each; all of it twice.
    assert len(cells) == len(runs) == 2 * (7 + 8 + 3 + 3)
    assert all(run.complete for run in runs)
    assert not list((root / "saes" / "top-afa").glob("*/training-*"))
    assert report.complete and top_afa.run(config, root).path == report.path


def test_study_measures_what_it_says(study: tuple[Config, Path, Run]) -> None:
    config, root, _ = study
    found = top_afa.measure(config, root)
    for r in found.pick("topk"):
        assert r.fact("l0") <= r.cell.setting and r.fact("fvu") > 0
        assert r.fact("bits") == pytest.approx(r.fact("l0") * (7 + math.log2(48)))
    for r in found.pick("top_afa"):
        assert r.course[-1][0] == 12
        assert len(r.zf["input_norm"]) == len(r.zf["code_norm"]) > 100
    # Standardised rows all have the norm sqrt(d) about 0; b_dec moves them a little.
    norms = found.pick("topk", layer=1)[0].zf["input_norm"]
    assert max(norms) < 2 * math.sqrt(found.d_in)
    # Layers of one seed are different SAEs, seeds too.
    fvus = {r.fact("fvu") for r in found.pick("topk", setting=8.0)}
    assert len(fvus) == 4
    assert verdicts(found)


def test_study_resumes_what_is_missing(study: tuple[Config, Path, Run]) -> None:
    config, root, _ = study
    before = top_afa.measure(config, root)
    path = next((root / "saes" / "top-afa").glob("layer1-layer_norm-seed1-topk-8-*"))
    (path / "manifest.json").unlink()
    (path / "result.json").unlink()
    again = top_afa.measure(config, root)
    assert again.results == before.results


def test_report_reads_back(study: tuple[Config, Path, Run]) -> None:
    report = read_report(study[2].path)
    assert list(report.figures) == [
        "fidelity_against_l0", "matched_l0", "settling", "choice_of_setting", "zf",
    ]  # fmt: skip
    table = report.tables["SAEs_mean_over_seeds"]
    assert len(table) == 7 + 8 + 3 + 3
    assert "short training" in report.text and str(study[1]) not in report.text
