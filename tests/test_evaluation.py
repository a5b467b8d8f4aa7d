"""Evaluation: by-hand numbers, slow recounts in numpy, scikit-learn, and exact splices."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional

from probe.capture import capturing
from probe.corpora import TokenBatch
from probe.errors import Failure, UserError
from probe.interventions import editing
from probe.language import LanguageModel
from probe.runs import Run, verify
from probe.sites import parse_site
from probe.store import ActivationStore, StoreConfig
from probe.store_writing import write_store
from probe.toy import tiny_gpt2, tiny_llama
from saes.activations import TopK
from saes.baselines import (
    Candidate,
    constant_candidate,
    fit_principal_axes,
    pca_candidate,
    random_dictionary_candidate,
    sae_candidate,
)
from saes.downstream import CLEAN, check_model, compare, measure_downstream, splice
from saes.evaluation import (
    EvaluateConfig,
    Subject,
    evaluate,
    measure,
    measure_fidelity,
    norm_limit,
)
from saes.metrics import (
    DEFINITIONS,
    Anchors,
    Downstream,
    FidelityMeter,
    Moments,
    downstream_metrics,
    interval,
    resampling_weights,
)
from saes.models import SaeConfig, SparseAutoencoder
from saes.split import read_rows, read_tokens, sequence_spans, split_store, spread, spread_rows
from saes.types import Codes, SaeOutput

SITE = parse_site("resid_post.0")
CONTEXT = 16
D = 32


def output(
    reconstruction: Tensor, values: Tensor | None = None, indices: Tensor | None = None
) -> SaeOutput:
    n = len(reconstruction)
    return SaeOutput(
        reconstruction=reconstruction,
        codes=Codes(
            values=torch.ones(n, 1) if values is None else values,
            indices=torch.zeros(n, 1, dtype=torch.long) if indices is None else indices,
        ),
    )


def as_candidate(name: str, change) -> Candidate:
    return Candidate(
        name=name, label=name, n_latents=1, reconstruct=lambda x: output(change(x).float())
    )


# ------------------------------------------------------------------------------ fidelity


def test_fidelity_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 8.0]])
    new = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 8.0]])
    values = torch.tensor([[2.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    indices = torch.tensor([[0, 3], [3, 0], [0, 0]])
    meter = FidelityMeter(n_latents=5)
    meter.update(x, output(new, values, indices))
    # mean (3, 4): deviations 4+0+4 and 16+0+16, together 40; errors 0, 4, 25.
    # residual channel 0: 0, 0, 5 (mean 5/3, deviation 50/3); channel 1: 0, 2, 0 (8/3).
    expected = {
        "fvu": 29 / 40,
        "explained_variance": ((1 - (50 / 3) / 8) + (1 - (8 / 3) / 32)) / 2,
        "cosine": (1 + 17 / (5 * math.sqrt(13)) + 64 / (math.sqrt(89) * 8)) / 3,
        "mse": 29 / 6,
        "relative_norm": (1 + math.sqrt(13) + 8) / (1 + 5 + math.sqrt(89)),
        "l0": 1.0,
        "dead_share": 3 / 5,
        "dense_share": 2 / 5,
    }
    assert meter.metrics() == pytest.approx(expected, rel=1e-12)
    assert set(meter.metrics()) <= set(DEFINITIONS)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streaming_matches_a_recount(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 7, 30, 2, 60]
    x = torch.randn(100, 6, generator=generator) + offset
    new = x + 0.3 * torch.randn(100, 6, generator=generator)
    values = torch.randn(100, 3, generator=generator).relu()
    indices = torch.randint(1, 40, (100, 3), generator=generator).sort(1).values
    indices = indices + torch.arange(3) * 40
    meter = FidelityMeter(n_latents=130)
    for rows in torch.arange(100).split(lengths):
        meter.update(x[rows], output(new[rows], values[rows], indices[rows]))

    a, b = x.double().numpy(), new.double().numpy()
    dense = Codes(values=values, indices=indices).dense(130).numpy() > 0
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    expected = {
        "fvu": ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum(),
        "explained_variance": (1 - (a - b).var(0) / a.var(0)).mean(),
        "cosine": ((a * b).sum(1) / norms[0] / norms[1]).mean(),
        "mse": ((a - b) ** 2).mean(),
        "relative_norm": norms[1].sum() / norms[0].sum(),
        "l0": dense.sum() / 100,
        "dead_share": (~dense.any(0)).mean(),
        "dense_share": (dense.mean(0) > 0.1).mean(),
    }
    assert meter.metrics() == pytest.approx(expected, rel=1e-9)


def test_moments_merge_exactly_and_survive_a_large_mean() -> None:
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)) + 1e6
    merged = Moments.of(rows[:9]) + Moments.of(rows[9:10]) + Moments.of(rows[10:])
    exact = rows.double()
    torch.testing.assert_close(merged.mean, exact.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(
        merged.deviation, (exact - exact.mean(0)).square().sum(0), rtol=1e-9, atol=0
    )


def test_constant_rows_have_no_fvu() -> None:
    meter = FidelityMeter(n_latents=1)
    for n in (3, 5):
        x = torch.tensor([0.1, 0.7]).expand(n, 2)
        meter.update(x, output(x + 1))
    metrics = meter.metrics()
    assert math.isnan(metrics["fvu"]) and math.isnan(metrics["explained_variance"])
    assert metrics["mse"] == pytest.approx(1, rel=1e-6)


def test_a_constant_channel_is_left_out_of_explained_variance() -> None:
    x = torch.tensor([[1.0, 5.0], [2.0, 5.0]])
    meter = FidelityMeter(n_latents=1)
    meter.update(x, output(x.clone()))
    assert meter.metrics()["explained_variance"] == 1


def test_outlier_share_by_hand() -> None:
    x = torch.tensor([[0.0], [2.0], [4.0], [94.0]])
    rows, typical = FidelityMeter(n_latents=1), FidelityMeter(n_latents=1)
    rows.update(x, output(x))
    typical.update(x[:3], output(x[:3]))
    # mean 25: squared deviations 625, 529, 441 and 4761.
    assert rows.outlier_share(typical) == pytest.approx(4761 / (625 + 529 + 441 + 4761))
    assert rows.outlier_share(rows) == 0


def test_zero_rows_have_cosine_zero() -> None:
    meter = FidelityMeter(n_latents=1)
    meter.update(torch.zeros(2, 2), output(torch.zeros(2, 2)))
    assert meter.metrics()["cosine"] == 0
    assert math.isnan(meter.metrics()["relative_norm"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_numbers_are_a_failure(bad: float) -> None:
    for x, new in ((0.0, bad), (bad, 0.0)):
        with pytest.raises(Failure, match="NaN"):
            FidelityMeter(n_latents=1).update(
                torch.full((1, 2), x), output(torch.full((1, 2), new))
            )


# ------------------------------------------------------------------------------ intervals


def test_resampled_fvu_matches_resampled_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(n, 4, generator=generator) * n for n in (3, 2, 6, 4)]
    errors = [torch.randn(part.shape, generator=generator) for part in parts]
    meter = FidelityMeter(n_latents=1)
    for part, error in zip(parts, errors, strict=True):
        meter.update(part, output(part + error))
    weights = resampling_weights(4, 20, seed=3)
    found = meter.resampled_fvu(weights).numpy()
    for row, fvu in zip(weights.int().tolist(), found, strict=True):
        a = torch.cat([p for p, n in zip(parts, row, strict=True) for _ in range(n)]).double()
        b = torch.cat([e for e, n in zip(errors, row, strict=True) for _ in range(n)]).double()
        expected = float(b.square().sum() / (a - a.mean(0)).square().sum())
        assert fvu == pytest.approx(expected, rel=1e-5)
    once = meter.resampled_fvu(torch.ones(1, 4, dtype=torch.float64))
    assert float(once[0]) == pytest.approx(meter.metrics()["fvu"], rel=1e-12)


def test_resampling_draws_as_many_as_there_are_and_repeats() -> None:
    weights = resampling_weights(7, 50, seed=0)
    assert (weights.sum(1) == 7).all()
    assert torch.equal(weights, resampling_weights(7, 50, seed=0))
    assert not torch.equal(weights, resampling_weights(7, 50, seed=1))


def test_interval_ends_by_hand() -> None:
    low, high = interval(torch.arange(1001, dtype=torch.float64), n=5)
    assert (low, high) == pytest.approx((25, 975))
    assert all(math.isnan(end) for end in interval(torch.ones(3, dtype=torch.float64), n=1))


def test_downstream_metrics_by_hand() -> None:
    def sums(*numbers: float) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64)

    measured = Downstream(n_predictions=sums(2, 2), cross_entropy=sums(6, 10), kl=sums(1, 3))
    anchors = Anchors(clean=sums(4, 8), zero=sums(20, 24), mean=sums(12, 16))
    found = downstream_metrics(measured, anchors, torch.ones(1, 2, dtype=torch.float64))
    expected = {
        "ce": 4, "ce_clean": 3, "ce_zero": 11, "ce_mean": 7,
        "ce_recovered": 7 / 8, "ce_recovered_mean": 3 / 4, "kl": 1,
    }  # fmt: skip
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)
    same = Anchors(clean=sums(4, 8), zero=sums(4, 8), mean=sums(12, 16))
    found = downstream_metrics(measured, same, torch.ones(1, 2, dtype=torch.float64))
    assert math.isnan(found["ce_recovered"])


# ------------------------------------------------------------------------------ baselines


@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_pca_matches_scikit_learn(k: int) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(200, 5, generator=generator) * torch.tensor([5.0, 1, 3, 2, 0.5]) + 100
    fitted = fit_principal_axes(x.split([50, 1, 149]), x[:30].mean(0))
    found = pca_candidate(fitted, k).reconstruct(x)
    exact = x.double().numpy()
    if k == 0:
        expected = np.broadcast_to(exact.mean(0), exact.shape)
    else:
        reference = PCA(k).fit(exact)
        expected = reference.inverse_transform(reference.transform(exact))
        np.testing.assert_allclose(
            fitted.variances[:k] * 200 / 199, reference.explained_variance_, rtol=1e-9
        )
    np.testing.assert_allclose(found.reconstruction, expected, rtol=1e-5, atol=1e-4)
    assert found.codes.values.shape == (200, k)


def test_pca_has_no_more_components_than_channels() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    candidate = pca_candidate(fit_principal_axes([x], x[0]), 9)
    assert candidate.n_latents == 3
    torch.testing.assert_close(candidate.reconstruct(x).reconstruction, x)


def test_random_dictionary_is_scaled_by_least_squares() -> None:
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(5)) + 2
    mean = x.mean(0)
    candidate = random_dictionary_candidate(x, mean, 24, 4, seed=0)
    found = candidate.reconstruct(x)
    part = found.reconstruction - mean
    # At the best scale the error is orthogonal to the reconstruction.
    assert float((part * (x - found.reconstruction)).sum()) == pytest.approx(0, abs=1e-2)
    assert (found.codes.values != 0).sum(1).max() == 4
    assert 0.3 < float((x - found.reconstruction).square().sum() / (x - mean).square().sum()) < 1
    again = random_dictionary_candidate(x, mean, 24, 4, seed=0).reconstruct(x)
    assert torch.equal(again.reconstruction, found.reconstruction)


def test_random_dictionary_without_codes_is_the_mean() -> None:
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(5))
    found = random_dictionary_candidate(x, x.mean(0), 6, 0, seed=0).reconstruct(x)
    torch.testing.assert_close(found.reconstruction, x.mean(0).expand_as(x))


# ------------------------------------------------------------------------------ the split


def write_corpus(path: Path, n_documents: int = 60) -> str:
    letters = random.Random(7)
    lines = [
        json.dumps({"text": "".join(letters.choice("abcdefgh \n") for _ in range(1 + 40))})
        for _ in range(n_documents)
    ]
    path.write_text("\n".join(lines))
    return str(path)


def make_store(folder: Path, model: LanguageModel, corpus: str, seed: int | None = None):
    config = StoreConfig(
        model={"spec": "tiny-llama", "random_weights": seed, "dtype": "float32"},
        corpus=corpus,
        sites=(str(SITE),),
        tokens=100_000,
        context=CONTEXT,
        batch_sequences=4,
        shard_batches=5,
        dtype="float32",
    )
    return write_store(Run.create(folder, "tiny", config.run_config()), model, progress=False)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_llama(0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def store(
    model: LanguageModel, corpus: str, tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    return make_store(tmp_path_factory.mktemp("store"), model, corpus)


def test_split_keeps_documents_on_one_side(store: ActivationStore) -> None:
    split = split_store(store, 0.2)
    training = sequence_spans(store, range(split.training_rows))
    held_out = sequence_spans(store, range(split.evaluation_start, store.n_rows))
    n_sequences = store.run.manifest["summary"]["n_sequences"]
    assert len(training) == n_sequences - math.ceil(0.2 * n_sequences)
    assert training[-1].sequence < held_out[0].sequence <= training[-1].sequence + 5
    docs = [set(read_tokens(store, [span]).doc.flatten().tolist()) for span in training]
    seen = set().union(*docs)
    for span in held_out:
        assert not seen & set(read_tokens(store, [span]).doc.flatten().tolist())


def test_a_corpus_of_one_document_is_cut_at_the_border(model, tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("abcdefg " * 40)
    store = make_store(tmp_path, model, str(path))
    split = split_store(store, 0.5)
    assert split.training_rows == split.evaluation_start == store.n_rows // 2


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_bad_shares_are_refused(store: ActivationStore, share: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        split_store(store, share)


def test_a_split_without_training_rows_is_refused(model, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a" * (CONTEXT + 3))
    with pytest.raises(UserError, match="none to train on"):
        split_store(make_store(tmp_path, model, str(path)), 0.5)


def test_spans_rows_and_tokens_agree(store: ActivationStore) -> None:
    spans = sequence_spans(store, range(store.n_rows))
    assert [span.sequence for span in spans] == list(range(len(spans)))
    assert sum(span.stop - span.start for span in spans) == store.n_rows
    for span in (spans[0], spans[25], spans[-1]):
        shard = store.shard(span.shard, SITE)
        batch = read_tokens(store, [span])
        assert torch.equal(batch.tokens[batch.keep].int(), shard.token[span.start : span.stop])
        assert not batch.keep[:, 0].any() and not batch.keep[batch.tokens == 0].any()
        assert int(batch.keep.sum()) == len(read_rows(store, SITE, span))


def test_spread_is_even(store: ActivationStore) -> None:
    spans = sequence_spans(store, range(store.n_rows))[:10]
    assert [s.sequence for s in spread(spans, 5)] == [0, 2, 4, 6, 8]
    assert spread(spans, 99) == spans
    assert len(spread_rows(spans, 1)) == 1
    assert spread_rows(spans, 10**9) == spans


# ------------------------------------------------------------------------------ downstream


def batches(store: ActivationStore, n: int = 6) -> list[TokenBatch]:
    spans = sequence_spans(store, range(store.n_rows))[:n]
    return [read_tokens(store, spans[: n - 2]), read_tokens(store, spans[n - 2 :])]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_is_the_clean_model(store: ActivationStore, make, dtype) -> None:
    model = make(0)
    model.model.to(dtype)
    zero = constant_candidate("zero", "zero", torch.zeros(D))
    found = measure_downstream(
        model, SITE, [as_candidate("identity", lambda x: x), zero], batches(store)
    )
    assert torch.equal(found["identity"].cross_entropy, found[CLEAN].cross_entropy)
    assert torch.equal(found["identity"].kl, torch.zeros(6, dtype=torch.float64))
    anchors = Anchors(
        clean=found[CLEAN].cross_entropy,
        zero=found["zero"].cross_entropy,
        mean=found["zero"].cross_entropy,
    )
    ones = torch.ones(1, 6, dtype=torch.float64)
    assert downstream_metrics(found["identity"], anchors, ones)["ce_recovered"] == 1
    assert downstream_metrics(found["zero"], anchors, ones)["ce_recovered"] == 0
    assert (found["zero"].kl > 0).all()


def test_cross_entropy_matches_a_recount(model: LanguageModel, store: ActivationStore) -> None:
    half = as_candidate("half", lambda x: x / 2)
    found = measure_downstream(model, SITE, [half], batches(store))["half"]
    (batch,) = [read_tokens(store, sequence_spans(store, range(store.n_rows))[:6])]
    factor = torch.where(batch.keep, 0.5, 1.0)[..., None]
    with torch.no_grad():
        clean = model.run(batch.tokens)
        with editing(model, SITE, lambda x: x * factor):
            spliced = model.run(batch.tokens)
    assert clean is not None and spliced is not None
    for i, row in enumerate(batch.tokens):
        ce, kl = 0.0, 0.0
        for t in range(CONTEXT - 1):
            p = functional.softmax(clean[i, t].double(), 0)
            q = functional.softmax(spliced[i, t].double(), 0)
            ce -= math.log(q[row[t + 1]])
            kl += float((p * (p / q).log()).sum())
        assert float(found.cross_entropy[i]) == pytest.approx(ce, rel=1e-5)
        assert float(found.kl[i]) == pytest.approx(kl, rel=1e-4)
    assert found.n_predictions.tolist() == [CONTEXT - 1] * 6


def test_only_kept_positions_are_touched(model: LanguageModel, store: ActivationStore) -> None:
    batch = batches(store)[0]
    assert (~batch.keep[:, 1:]).any(), "some special tokens beside position 0"
    with torch.no_grad(), capturing(model, [SITE]) as seen:
        model.run(batch.tokens)
    change = splice(as_candidate("x", lambda x: -3 * x).reconstruct, batch.keep)
    before, after = seen[SITE], change(seen[SITE])
    assert torch.equal(after[~batch.keep], before[~batch.keep])
    assert torch.equal(after[batch.keep], -3 * before[batch.keep])


def test_nothing_kept_changes_nothing() -> None:
    x = torch.randn(1, 3, 2)
    change = splice(as_candidate("x", torch.zeros_like).reconstruct, torch.zeros(1, 3).bool())
    assert torch.equal(change(x), x)


def test_non_finite_logits_are_a_failure() -> None:
    logits = torch.zeros(1, 3, 4)
    with pytest.raises(Failure, match="with broken spliced in"):
        compare(logits, logits + math.nan, torch.zeros(1, 3, dtype=torch.long), "broken")


def test_another_model_is_noticed(model: LanguageModel, store: ActivationStore) -> None:
    span = sequence_spans(store, range(store.n_rows))[3]
    batch, rows = read_tokens(store, [span]), read_rows(store, SITE, span)
    check_model(model, SITE, batch, rows)
    with pytest.raises(UserError, match="other activations"):
        check_model(tiny_llama(1), SITE, batch, rows)
    with pytest.raises(UserError, match="width 16"):
        check_model(tiny_llama(0, d_model=16), SITE, batch, rows)


# ------------------------------------------------------------------------------ as a whole


def make_sae(seed: int = 0, d_in: int = D, k: int = 4) -> SparseAutoencoder:
    sae = SparseAutoencoder(SaeConfig(d_in=d_in, d_sae=48, activation=TopK(k=k)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        directions = torch.randn(48, d_in, generator=generator)
        sae.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


CONFIG = EvaluateConfig(
    held_out_share=0.2, n_rows=200, n_ce_tokens=160, n_fit_rows=500, n_resamples=50
)


def make_run(folder: Path, config: EvaluateConfig = CONFIG) -> Run:
    asked = config.run_config(sae="a", store="b", site=SITE, baselines=True, twin=None)
    return Run.create(folder, "evaluation", asked)


def test_evaluate_writes_metrics(
    model: LanguageModel, store: ActivationStore, corpus: str, tmp_path: Path
) -> None:
    twin_model = tiny_llama(9)
    twin_store = make_store(tmp_path / "twin", twin_model, corpus, seed=9)
    twin = Subject(sae=make_sae(1), store=twin_store, site=SITE, model=twin_model)
    run = make_run(tmp_path)
    sae = make_sae()
    evaluate(run, sae, store, model, SITE, CONFIG, twin=twin, progress=False)

    found = json.loads((run.path / "metrics.json").read_text())
    assert verify(run) == [] and run.complete
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["sae", "pca", "random_dictionary", "mean", "random_weight_twin"]
    shared = {"fvu", "fvu_low", "fvu_high", "explained_variance", "cosine", "l0", "dead_share"}
    shared |= {"ce", "ce_clean", "ce_zero", "ce_mean", "ce_recovered", "kl", "kl_low", "kl_high"}
    assert all(shared <= set(row) for row in rows.values())
    for row in rows.values():
        assert set(row) - {"name", "label", "note"} <= {
            name + end for name in DEFINITIONS for end in ("", "_low", "_high")
        }
        for name in ("ce", "kl"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]

    held_out = range(split_store(store, 0.2).evaluation_start, store.n_rows)
    spans = spread_rows(sequence_spans(store, held_out), 200)
    x = torch.cat([read_rows(store, SITE, span) for span in spans])
    assert found["n_rows"] == len(x) and found["n_ce_tokens"] == 160
    with torch.no_grad():
        error = x - sae(x).reconstruction
    fvu = float(error.square().sum() / (x - x.mean(0)).square().sum())
    assert rows["sae"]["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert found["n_outliers"] == 0 and found["outlier_variance_share"] == pytest.approx(0)
    assert rows["sae"]["fvu_typical"] == rows["sae"]["fvu"]
    assert rows["pca"]["l0"] == rows["random_dictionary"]["l0"] == round(rows["sae"]["l0"])
    assert rows["mean"]["ce_recovered_mean"] == 0 and rows["mean"]["dead_share"] is None
    assert rows["mean"]["fvu"] == pytest.approx(1, abs=0.1)
    assert rows["sae"]["ce_clean"] != rows["random_weight_twin"]["ce_clean"]
    assert rows["sae"]["ce_zero"] == rows["pca"]["ce_zero"]


def test_the_same_question_gets_the_same_answer(
    model: LanguageModel, store: ActivationStore, tmp_path: Path
) -> None:
    def ask(folder: str, seed: int, model: LanguageModel | None) -> dict:
        run = make_run(tmp_path / folder)
        return evaluate(run, make_sae(seed), store, model, SITE, CONFIG, progress=False)

    first = ask("a", 0, model)
    assert first == ask("b", 0, model)
    again = ask("a", 3, None)
    assert again == first, "a complete run is read, not made again"


def test_without_a_model_there_is_fidelity_alone(store: ActivationStore) -> None:
    subject = Subject(sae=make_sae(), store=store, site=SITE, model=None)
    found = measure(subject, CONFIG, baselines=False)
    assert [row["name"] for row in found["rows"]] == ["sae"]
    assert "ce" not in found["rows"][0] and found["n_ce_tokens"] == 0


def test_a_perfect_dictionary_recovers_everything(
    model: LanguageModel, store: ActivationStore
) -> None:
    sae = SparseAutoencoder(SaeConfig(d_in=D, d_sae=2 * D, activation=TopK(k=D)))
    with torch.no_grad():
        both = torch.cat([torch.eye(D), -torch.eye(D)])
        sae.W_dec.copy_(both)
        sae.W_enc.copy_(both.T)
    subject = Subject(sae=sae, store=store, site=SITE, model=model)
    (row,) = measure(subject, CONFIG, baselines=False)["rows"]
    assert row["fvu"] < 1e-12 and row["explained_variance"] == pytest.approx(1)
    assert row["ce_recovered"] == pytest.approx(1, abs=1e-5)
    assert row["l0"] == pytest.approx(D, abs=0.5)


def test_outliers_are_told_apart(store: ActivationStore) -> None:
    subject = Subject(sae=make_sae(), store=store, site=SITE, model=None)
    spans = sequence_spans(store, range(store.n_rows))[:6]
    limit = norm_limit(subject, spans)
    rows = torch.cat([read_rows(store, SITE, span) for span in spans])
    assert limit == pytest.approx(10 * float(rows.norm(dim=1).median()))
    half = float(rows.norm(dim=1).median())
    found = measure_fidelity(sae_candidate(subject.sae), subject, spans, half)
    within = rows[rows.norm(dim=1) <= half]
    assert found.rows.n_rows == len(rows) and found.typical.n_rows == len(within)
    with torch.no_grad():
        error = within - subject.sae(within).reconstruction
    fvu = float(error.square().sum() / (within - within.mean(0)).square().sum())
    assert found.typical.metrics()["fvu"] == pytest.approx(fvu, rel=1e-5)


def test_a_silent_sae_has_baselines_without_codes(
    model: LanguageModel, store: ActivationStore
) -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    subject = Subject(sae=sae, store=store, site=SITE, model=model)
    rows = measure(subject, CONFIG, baselines=True)["rows"]
    assert rows[0]["l0"] == 0 and rows[0]["dead_share"] == 1
    assert rows[1]["label"] == "PCA, 0 components" and rows[1]["dead_share"] is None
    # b_dec is zero here, so a silent SAE is zero ablation.
    assert rows[0]["ce_recovered"] == 0


def test_widths_that_differ_are_named(
    model: LanguageModel, store: ActivationStore, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"width 16 .* width 32"):
        evaluate(make_run(tmp_path), make_sae(d_in=16), store, model, SITE, CONFIG, progress=False)
    with pytest.raises(UserError, match="no site"):
        evaluate(
            make_run(tmp_path), make_sae(), store, model, parse_site("mlp_out.0"), CONFIG,
            progress=False,
        )  # fmt: skip


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(UserError, match="n_rows must be at least 1, got 0"):
        EvaluateConfig(n_rows=0)


def test_the_sae_is_a_candidate_like_any_other() -> None:
    sae = make_sae()
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(sae_candidate(sae).reconstruct(x).reconstruction, sae(x).reconstruction)
