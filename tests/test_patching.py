"""Patching activations and single features between two prompts."""

import pytest
import torch

from probe.capture import capturing
from probe.errors import UserError
from probe.interventions import editing
from probe.patching import (
    PATCHED_KINDS,
    make_pair,
    patch_grid,
    patched_metrics,
    unrelated_prompt,
)
from probe.readout import Metric, token_metric
from probe.sites import Site, parse_site
from probe.tokens import read_text
from saes.activations import TopK
from saes.constraints import initialise
from saes.models import SaeConfig, SparseAutoencoder
from saes.patching import patch_features

CLEAN, CORRUPTED = "Anna met Tom.", "Anna met Kim."
METRIC = Metric(target=70, contrast=101)


@pytest.fixture(scope="module")
def pair(llama):
    return make_pair(llama, CLEAN, CORRUPTED, METRIC)


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(SaeConfig(d_in=32, d_sae=48, activation=TopK(k=3)))
    initialise(sae, torch.randn(64, 32, generator=generator), generator)
    return sae.requires_grad_(False)


def tensor(model, site: Site, prompt) -> torch.Tensor:
    with torch.no_grad(), capturing(model, [site]) as seen:
        model.run(prompt.tokens)
    return seen[site][0]


def plain(model, prompt, metric=METRIC) -> float:
    with torch.no_grad():
        logits = model.run(prompt.tokens)
    return float(metric.of(logits[:, -1].float())[0])


def test_values_are_those_of_plain_passes(llama, pair):
    assert pair.clean_value == pytest.approx(plain(llama, pair.clean), abs=1e-5)
    assert pair.corrupted_value == pytest.approx(plain(llama, pair.corrupted), abs=1e-5)
    assert pair.differing == (10, 11) and pair.clean.texts[10:12] == ("T", "o")


@pytest.mark.parametrize("layer", [0, 1])
def test_patching_all_of_a_layer_gives_the_clean_metric(llama, pair, layer):
    site = Site(kind="resid_post", layer=layer)
    cells = torch.ones(1, len(pair.clean), dtype=torch.bool)
    source = tensor(llama, site, pair.clean).expand(len(cells), -1, -1)
    found = patched_metrics(llama, site, pair.corrupted, source, cells, METRIC)
    assert float(found[0]) == pytest.approx(pair.clean_value, abs=1e-5)


def test_the_last_position_of_the_last_layer_is_the_whole_effect(llama, pair):
    grid = patch_grid(llama, pair)
    assert grid.effect.shape == (2, 4) and grid.positions == (10, 11, 12, 13)
    assert float(grid.effect[1, -1]) == pytest.approx(1, abs=1e-4)
    assert grid.effect[1, :-1].abs().max() < 1e-4


@pytest.mark.parametrize("kind", PATCHED_KINDS)
@pytest.mark.parametrize("into", ["corrupted", "clean"])
def test_every_cell_is_a_plain_pass(llama, pair, kind, into):
    grid = patch_grid(llama, pair, kind=kind, into=into)
    base, source = (
        (pair.corrupted, pair.clean) if into == "corrupted" else (pair.clean, pair.corrupted)
    )
    control = unrelated_prompt(llama, base)
    for other, found in ((source, grid.effect), (control, grid.control)):
        for row, layer in enumerate(grid.layers):
            site = Site(kind=kind, layer=layer)
            values = tensor(llama, site, other)
            for column, position in enumerate(grid.positions):

                def change(x, values=values, position=position):
                    new = x.clone()
                    new[0, position] = values[position]
                    return new

                with editing(llama, site, change):
                    metric = plain(llama, base)
                expected = (metric - pair.corrupted_value) / (
                    pair.clean_value - pair.corrupted_value
                )
                assert float(found[row, column]) == pytest.approx(expected, abs=1e-4)


def test_positions_before_the_first_difference_would_change_nothing(llama, pair):
    site = Site(kind="resid_post", layer=0)
    cells = torch.eye(len(pair.clean), dtype=torch.bool)[:10]
    source = tensor(llama, site, pair.clean).expand(len(cells), -1, -1)
    found = patched_metrics(llama, site, pair.corrupted, source, cells, METRIC)
    torch.testing.assert_close(found, torch.full((10,), pair.corrupted_value))


def test_equal_metrics_give_plain_differences_and_no_nan(llama):
    # The same token against itself: both prompts give 0.
    equal = make_pair(llama, CLEAN, CORRUPTED, Metric(target=70, contrast=70))
    assert equal.gap is None
    grid = patch_grid(llama, equal)
    assert torch.equal(grid.effect, torch.zeros(2, 4))
    assert torch.equal(grid.control, torch.zeros(2, 4))


def test_gpt2_and_some_layers_and_batches_in_parts(gpt2, monkeypatch):
    pair = make_pair(gpt2, CLEAN, CORRUPTED, METRIC)
    whole = patch_grid(gpt2, pair, kind="mlp_out")
    monkeypatch.setattr("probe.readout.TOKENS_AT_ONCE", 50)
    parts = patch_grid(gpt2, pair, kind="mlp_out", layers=[1])
    torch.testing.assert_close(parts.effect[0], whole.effect[1])
    table = parts.table()
    assert table["layer"].tolist() == [1] * 4 and table["clean"].tolist()[:2] == ["T", "o"]
    assert table["corrupted"].tolist()[:2] == ["K", "i"]


def test_without_a_metric_the_two_predictions_are_told_apart(llama):
    pair = make_pair(llama, CLEAN, CORRUPTED)
    with torch.no_grad():
        ours, theirs = (
            int(llama.run(read_text(llama, text).tokens)[0, -1].argmax())
            for text in (CLEAN, CORRUPTED)
        )
    assert pair.metric.target == ours
    assert pair.metric.contrast == (None if ours == theirs else theirs)


def test_prompts_that_do_not_match_are_told_in_a_sentence(llama):
    with pytest.raises(UserError, match="the clean one has 14 and the corrupted one 15"):
        make_pair(llama, CLEAN, "Anna met Emma.")
    with pytest.raises(UserError, match="the same"):
        make_pair(llama, CLEAN, CLEAN)
    with pytest.raises(UserError, match="unrelated text is empty"):
        unrelated_prompt(llama, read_text(llama, CLEAN), "")


def test_the_unrelated_prompt_keeps_length_and_special_tokens(llama):
    like = read_text(llama, "ab<|endoftext|>cdef")
    made = unrelated_prompt(llama, like, "xyz")
    assert "".join(made.texts[1:]) == "xy<|endoftext|>zxyz"
    assert made.ids[0] == like.ids[0] and len(made) == len(like)


# --------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("into", ["corrupted", "clean"])
def test_patched_features_are_plain_passes(llama, sae, pair, into):
    site = parse_site("resid_post.0")
    found = patch_features(llama, sae, str(site), pair, top=4, into=into)
    base, source = (
        (pair.corrupted, pair.clean) if into == "corrupted" else (pair.clean, pair.corrupted)
    )
    ours, theirs = (sae.encode(tensor(llama, site, p)).dense(48) for p in (base, source))
    begin, end = plain(llama, base), plain(llama, source)
    assert len(found.table) == 4
    for row in found.table.to_dict("records"):
        f = row["feature"]
        amount = (theirs - ours)[:, f]
        amount[0] = 0
        with editing(llama, site, lambda x, f=f, amount=amount: x + amount[:, None] * sae.W_dec[f]):
            metric = plain(llama, base)
        assert row["effect"] == pytest.approx((metric - begin) / (end - begin), abs=1e-4)
        assert row["n_tokens"] == int((amount != 0).sum())
        assert row["difference"] == pytest.approx(float(amount[row["position"]]), abs=1e-5)
        assert row["token"] == base.texts[row["position"]]


def test_estimates_are_slopes(llama, sae, pair):
    """Halving the step ten times over brings measurement to estimate."""
    site = parse_site("resid_post.0")
    row = patch_features(llama, sae, str(site), pair, top=1).table.iloc[0]
    ours, theirs = (
        sae.encode(tensor(llama, site, p)).dense(48) for p in (pair.corrupted, pair.clean)
    )
    amount = (theirs - ours)[:, row["feature"]] * 1e-2
    amount[0] = 0
    values = []
    for sign in (1, -1):
        shift = sign * amount[:, None] * sae.W_dec[row["feature"]]
        with editing(llama, site, lambda x, shift=shift: x + shift):
            values.append(plain(llama, pair.corrupted))
    assert pair.gap is not None
    assert row["estimate"] == pytest.approx((values[0] - values[1]) / 2e-2 / pair.gap, rel=3e-2)


def test_named_features_also_where_nothing_differs(llama, sae, pair):
    found = patch_features(llama, sae, "resid_post.0", pair, features=[0, 47])
    assert found.table["feature"].tolist() == [0, 47]
    silent = found.table[found.table["n_tokens"] == 0]
    assert all(abs(effect) < 1e-6 for effect in silent["effect"])
    assert patch_features(llama, sae, "resid_post.0", pair, features=[]).table.empty
    with pytest.raises(UserError, match="0 to 47"):
        patch_features(llama, sae, "resid_post.0", pair, features=[48])


@pytest.mark.slow
def test_where_a_name_is_moved_in_the_real_model(smollm2):
    pair = make_pair(
        smollm2,
        "When Mary and John went to the store, John gave a drink to",
        "When Mary and John went to the store, Mary gave a drink to",
        token_metric(smollm2, " Mary", " John"),
    )
    grid = patch_grid(smollm2, pair, layers=[3, 29])
    assert float(grid.effect[0, 0]) > 0.9 and float(grid.effect[1, -1]) > 0.99
    assert float(grid.effect[0, -1]) < 0.1
