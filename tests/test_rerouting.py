"""Circuit breakers, the training: losses and schedule by hand, masks, states, resuming, merging."""

import copy
import dataclasses

import pandas as pd
import pytest
import torch
from collapse_tree import long_llama, saved_llama
from safetensors.torch import load_file

from analyses.cells import Frame
from analyses.circuit_breakers import training as training_module
from analyses.circuit_breakers.losses import (
    RandomTarget,
    cosines,
    lengths,
    random_target,
    rerouting_loss,
    retain_loss,
    schedule,
)
from analyses.circuit_breakers.rows import Masking, Passage, batch_of, shared_tokens, token_rows
from analyses.circuit_breakers.settings import RECIPES, Training
from analyses.circuit_breakers.states import (
    LiveReference,
    StoredReference,
    first_blocks,
    run_states,
    store_reference,
)
from analyses.circuit_breakers.training import (
    ADAPTER,
    LOG,
    References,
    TrainingRows,
    draw,
    train,
)
from probe.errors import Failure, UserError
from probe.language import LanguageModel
from probe.lora import Lora, adapter_tensors, lora_adapters, merged_adapter, save_adapter
from probe.models import base_spec, is_adapter, load_language_model, weights_checksum
from saes.checkpoints import checkpoint_paths

PASSAGES = [
    Passage(request=f"Say {word} twice", response=f"{word} {word}, and that is that", topic=word)
    for word in ("salt", "pepper", "sugar", "honey", "bread", "milk")
]
APART = [
    Passage(request=word * 4, response=word * 3, topic=word)
    for word in ("5281", "9376", "sugar", "honey", "bread", "4837")
]
"""Numbers to be rerouted, words to be kept: what so small a model tells apart."""
TINY = Training(
    target_layers=(1,), lora_r=2, lora_dropout=0.1, steps=6, batch=2, lr=1e-2, b_std=0.05,
    retain="relative", retain_weight=1.1, padded_mean=False, masking="shared", borderline=0.5,
    request_length=60, response_length=20, gradient_checkpointing=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def chatty():
    return long_llama()


def rows_of(model, training=TINY, texts=PASSAGES):
    def rows(passages, blank=False):
        return tuple(
            token_rows(
                model, passages, request_length=training.request_length,
                response_length=training.response_length, blank=blank,
            )
        )  # fmt: skip

    return TrainingRows(
        breaking=rows(texts[:2]), blanked=rows(texts[:2], blank=True),
        retain=rows(texts[2:4]), borderline=rows(texts[4:5]), held_out=rows(texts[5:]),
        held_out_retain=rows(texts[4:5]),
    )  # fmt: skip


# -------------------------------------------------------------------------------- losses by hand


def test_the_schedule_is_the_papers():
    assert schedule(1, 150, 10.0) == pytest.approx((10 * (1 - 1 / 300), 10 / 300))
    assert schedule(150, 150, 10.0) == (5.0, 5.0)
    assert schedule(75, 150, 4) == (3.0, 1.0)


def test_rerouting_loss_is_the_mean_positive_cosine_of_tokens_that_count():
    # Tokens: cosine 3/5, cosine -1, one that does not count, cosine 1 of another length.
    reference = torch.tensor([[[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [2.0, 0.0]]]])
    states = torch.tensor([[[[3.0, 4.0], [0.0, -1.0], [1.0, 1.0], [7.0, 0.0]]]])
    mask = torch.tensor([[True, True, False, True]])
    assert cosines(states, reference).flatten().tolist() == pytest.approx([0.6, -1, 1, 1])
    assert float(rerouting_loss("rr", states, reference, mask, None)) == pytest.approx(1.6 / 3)
    assert float(rerouting_loss("rr", states, reference, ~mask & mask, None)) == 0


def test_the_alternatives_are_distances_from_their_targets():
    states = torch.tensor([[[[3.0, 4.0], [0.0, 5.0]]]])
    mask = torch.tensor([[True, True]])
    along = RandomTarget(direction=torch.tensor([1.0, 0.0]), size=3.0)
    # To (3, 0): 4 and sqrt(9 + 25).
    rmu = rerouting_loss("rmu", states, states, mask, along)
    assert float(rmu) == pytest.approx((4 + 34**0.5) / 2)
    # Of length 1, to (1, 0): (-.4, .8) and (-1, 1).
    for loss in ("randc", "randp"):
        found = rerouting_loss(loss, states, states, mask, along)
        assert float(found) == pytest.approx((0.8**0.5 + 2**0.5) / 2)


def test_random_targets_are_one_for_good_or_new_each_step_and_of_length_1():
    drawn = {
        loss: [random_target(loss, 500, seed=1, step=step).direction for step in (1, 2)]
        for loss in ("rmu", "randc", "randp")
    }
    assert torch.equal(*drawn["rmu"])
    assert not torch.equal(*drawn["randc"])
    assert not torch.equal(*drawn["randp"])
    assert all(float(one.norm()) == pytest.approx(1) for pair in drawn.values() for one in pair)
    assert bool((drawn["randp"][0] > 0).all())
    assert abs(float(drawn["randc"][0].mean())) < 0.01
    assert random_target("rmu", 4, seed=0, step=1, size=7).size == 7


def test_retain_loss_absolute_relative_and_padded():
    reference = torch.tensor([[[[3.0, 4.0], [0.0, 10.0], [1.0, 1.0]]]]).repeat(2, 1, 1, 1)
    moved = torch.tensor([[3.0, 4.0], [-2.0, 0.0], [9.0, 9.0]])
    states = reference + torch.stack([moved, 2 * moved])[:, None]
    mask = torch.tensor([[True, True, False]])
    # Distances 5, 2 and 10, 4; lengths 5 and 10.
    absolute = retain_loss(states, reference, mask, relative=False)
    assert float(absolute) == pytest.approx(21 / 4)
    relative = retain_loss(states, reference, mask, relative=True)
    assert float(relative) == pytest.approx((1 + 0.2 + 2 + 0.4) / 4)
    # The published mean is over 2 entries x 1 row x 6 places.
    padded = retain_loss(states, reference, mask, relative=False, padded=6)
    assert float(padded) == pytest.approx(21 / 12)


def test_a_state_that_has_not_moved_has_a_gradient_of_0():
    states = torch.ones(1, 1, 2, 3, requires_grad=True)
    retain_loss(states, torch.ones(1, 1, 2, 3), torch.ones(1, 2).bool(), relative=False).backward()
    assert states.grad is not None
    assert bool((states.grad == 0).all())
    assert lengths(torch.tensor([[[[0.0, 0.0], [3.0, 4.0]]]])).flatten().tolist() == [0, 5]


# ------------------------------------------------------------------------------------------ rows


def test_rows_are_the_template_the_request_and_the_response(chatty):
    (row,) = token_rows(chatty, PASSAGES[:1], request_length=60, response_length=4)
    assert chatty.tokenizer.decode(row.ids) == "<user>Say salt twice|<assistant>salt"
    assert row.shared == shared_tokens(chatty) == len("<user>")
    assert row.answer == len("<user>Say salt twice|<assistant>")
    (cut,) = token_rows(chatty, PASSAGES[:1], request_length=20, response_length=4)
    assert chatty.tokenizer.decode(cut.ids) == "lt twice|<assistant>salt"
    assert cut.shared == 0


def test_a_row_without_response_ends_with_the_users_last_word(chatty):
    prompt = [Passage(request="How do I boil an egg", response="")]
    (row,) = token_rows(chatty, prompt, request_length=60, response_length=20)
    assert chatty.tokenizer.decode(row.ids) == "<user>How do I boil an egg"
    assert row.answer == len(row.ids)


def test_a_blanked_row_keeps_the_template_and_the_response(chatty):
    (row,) = token_rows(chatty, PASSAGES[:1], request_length=60, response_length=4, blank=True)
    assert chatty.tokenizer.decode(row.ids) == "<user>|<assistant>salt"


def test_masking_leaves_out_padding_the_first_token_or_what_all_share(chatty):
    rows = token_rows(chatty, PASSAGES[:2], request_length=60, response_length=20)
    n, longest = len(rows[0].ids), len(rows[1].ids)
    assert n < longest
    starts: dict[Masking, int] = {"padding": 0, "first": 1, "shared": len("<user>")}
    for masking, start in starts.items():
        batch = batch_of(rows, masking)
        assert batch.tokens.shape == (2, longest)
        counted = [start <= place < n for place in range(longest)]
        assert batch.counted[0].tolist() == counted
        assert batch.attended[0].tolist() == [place < n for place in range(longest)]
    assert batch_of(rows, "shared", length=90).tokens.shape == (2, 90)


def test_a_set_without_passages_is_refused(chatty):
    with pytest.raises(UserError, match="set of passages is empty"):
        token_rows(chatty, [], request_length=5, response_length=5)


# ---------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_states_are_those_of_transformers(name, request):
    fixture = request.getfixturevalue(name)
    model = copy.deepcopy(fixture.model)  # transformers leaves hooks on it
    wrapped = LanguageModel("copy", model, fixture.tokenizer)
    rows = token_rows(wrapped, [Passage(request="abc", response="defgh")] * 2,
                      request_length=9, response_length=9)  # fmt: skip
    batch = batch_of(rows, "padding")
    with torch.no_grad():
        ours = run_states(wrapped, batch)
        theirs = model(
            input_ids=batch.tokens, attention_mask=batch.attended.long(), output_hidden_states=True
        ).hidden_states
    torch.testing.assert_close(ours, torch.stack(theirs))


def test_taking_off_blocks_changes_no_state_below_and_is_undone(chatty):
    rows = token_rows(chatty, PASSAGES[:2], request_length=60, response_length=20)
    batch = batch_of(rows, "padding")
    with torch.no_grad():
        whole = run_states(chatty, batch)
        with first_blocks(chatty, 1):
            cut = run_states(chatty, batch)
        assert len(whole) == 3
        assert len(cut) == 2
        torch.testing.assert_close(cut[0], whole[0])
        norm = chatty.model.get_submodule(chatty.names.final_norm)
        torch.testing.assert_close(cut[1], norm(whole[1]))
        torch.testing.assert_close(run_states(chatty, batch), whole)
    with pytest.raises(UserError, match="has 2; name layers from 1 to 1"), first_blocks(chatty, 3):
        pass


def test_reference_states_are_those_of_a_second_model(chatty, tmp_path):
    rows = token_rows(chatty, PASSAGES[:3], request_length=60, response_length=20)
    second = copy.deepcopy(chatty.model)
    with torch.no_grad():
        expected = run_states(LanguageModel("second", second, chatty.tokenizer),
                              batch_of(rows[1:], "padding"))  # fmt: skip
    length = expected.shape[2]
    store_reference(tmp_path / "all", chatty, rows, None, 2)
    store_reference(tmp_path / "some", chatty, rows, [1], 2)
    attended = batch_of(rows[1:], "padding").attended
    with lora_adapters(chatty, Lora(layers=2, r=2, b_std=0.5), seed=0) as adapted:
        with torch.no_grad():
            assert not torch.allclose(run_states(chatty, batch_of(rows[1:], "padding")), expected)
        live = LiveReference(chatty, adapted, rows, None).of([1, 2], length)
    stored = StoredReference(tmp_path / "all", rows).of([1, 2], length)
    some = StoredReference(tmp_path / "some", rows).of([2], length)
    for found in (live, stored):
        torch.testing.assert_close(found[:, attended], expected[:, attended])
    torch.testing.assert_close(some[0][attended[1:]], expected[1, 1:][attended[1:]])
    assert bool((stored[:, ~attended] == 0).all())


# -------------------------------------------------------------------------------------- gradients


def gradient_of_b(model, b_std):
    rows = token_rows(model, PASSAGES[:2], request_length=60, response_length=20)
    batch = batch_of(rows, "shared")
    with torch.no_grad():
        before = run_states(model, batch)[[1]]
    with lora_adapters(model, Lora(layers=2, r=2, dropout=0.0, b_std=b_std), seed=0) as adapted:
        after = run_states(model, batch)[[1]]
        rerouting_loss("rr", after, before, batch.counted, None).backward()
        return max(
            float(weight.grad.abs().max())
            for name, weight in adapter_tensors(adapted).items()
            if weight.grad is not None
        )


def test_with_b_at_0_the_rerouting_loss_has_no_gradient(chatty):
    still, moving = gradient_of_b(chatty, 0.0), gradient_of_b(chatty, 0.05)
    assert still < 1e-6
    assert moving > 1e3 * still


# --------------------------------------------------------------------------------------- training


def test_draws_go_through_every_row_and_follow_from_seed_and_step(chatty):
    rows = rows_of(chatty)
    training = dataclasses.replace(TINY, borderline=0.0)
    first = [draw(rows, training, 0, t) for t in (1, 2, 3)]
    assert first == [draw(rows, training, 0, t) for t in (1, 2, 3)]
    assert all(sorted(breaking) == [0, 1] for breaking, _ in first)
    assert all(sorted(retain) == [0, 1] for _, retain in first)
    always = dataclasses.replace(TINY, borderline=1.0, blank=1.0)
    breaking, retain = draw(rows, always, 0, 1)
    assert sorted(breaking) == [2, 3]
    assert retain == [2, 2]


def trained(model, folder, **changes):
    train(model, rows_of(model), dataclasses.replace(TINY, **changes), seed=3, folder=folder)
    return folder


def test_training_reroutes_and_leaves_the_model_as_it_was(chatty, tmp_path):
    before = {name: weight.clone() for name, weight in chatty.model.state_dict().items()}
    folder, training = tmp_path / "run", dataclasses.replace(TINY, steps=60)
    train(chatty, rows_of(chatty, texts=APART), training, seed=3, folder=folder)
    after = chatty.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(chatty.model.model.layers) == 2
    log: Frame = pd.read_parquet(folder / LOG)
    assert log["step"].tolist() == list(range(1, 61))
    last = log.iloc[-1]
    assert max(last["cb_cos_sim"], last["held_out_cos"]) < 0.3
    assert min(last["retain_cos_sim"], last["held_out_retain_cos"]) > 0.7
    looked = log.dropna()
    assert looked["step"].tolist() == [10, 20, 30, 40, 50, 60]
    c_s, c_r = schedule(60, 60, TINY.alpha)
    assert last["breaking_term"] == pytest.approx(c_s * last["rerouting_loss"], rel=1e-5)
    assert last["retain_term"] == pytest.approx(1.1 * c_r * last["retain_loss"], rel=1e-5)
    assert not checkpoint_paths(folder)


class Killed(Exception):
    pass


def test_going_on_after_a_kill_is_the_same_as_never_having_stopped(chatty, tmp_path, monkeypatch):
    monkeypatch.setattr(training_module, "CHECKPOINT_EVERY", 2)
    whole = trained(chatty, tmp_path / "whole", blank=0.5)

    def kill(step):
        if step == 5:
            raise Killed

    rows, training = rows_of(chatty), dataclasses.replace(TINY, blank=0.5)
    cut, steps = tmp_path / "cut", []
    with pytest.raises(Killed):
        train(chatty, rows, training, seed=3, folder=cut, on_step=kill)
    assert [path.name for path in checkpoint_paths(cut)] == ["step-000002", "step-000004"]
    train(chatty, rows, training, seed=3, folder=cut, on_step=steps.append)
    assert steps == [4, 5, 6]
    weights = [load_file(path / ADAPTER / "adapter_model.safetensors") for path in (whole, cut)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (whole / LOG).read_bytes() == (cut / LOG).read_bytes()


def test_stored_states_train_as_live_ones_do(chatty, tmp_path):
    rows = rows_of(chatty)
    references = References(breaking=tmp_path / "b", retain=tmp_path / "r")
    store_reference(tmp_path / "b", chatty, rows.all_breaking, [1], 2)
    store_reference(tmp_path / "r", chatty, rows.all_retain, None, 2)
    train(chatty, rows, TINY, seed=3, folder=tmp_path / "stored", references=references)
    trained(chatty, tmp_path / "live")
    logs = [pd.read_parquet(tmp_path / name / LOG) for name in ("stored", "live")]
    assert logs[0]["loss"].to_numpy() == pytest.approx(logs[1]["loss"].to_numpy(), rel=1e-4)


def test_gradient_checkpointing_changes_nothing(chatty, tmp_path):
    logs = [
        pd.read_parquet(trained(chatty, tmp_path / str(on), gradient_checkpointing=on) / LOG)
        for on in (False, True)
    ]
    assert logs[0]["loss"].to_numpy() == pytest.approx(logs[1]["loss"].to_numpy(), rel=1e-4)
    assert not chatty.model.is_activation_checkpointing


@pytest.mark.parametrize("loss", ["rmu", "randc", "randp"])
def test_the_alternatives_train(chatty, tmp_path, loss):
    log: Frame = pd.read_parquet(trained(chatty, tmp_path, loss=loss, steps=3) / LOG)
    assert log["rerouting_loss"].notna().all()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    chatty, tmp_path, monkeypatch
):
    monkeypatch.setattr(training_module, "CHECKPOINT_EVERY", 1)
    with pytest.raises(Failure, match=r"the loss was (nan|inf) at step \d of 6; the last good"):
        trained(chatty, tmp_path, lr=1e30)
    kept = checkpoint_paths(tmp_path)
    assert kept
    with pytest.raises(Failure, match="the loss was"):
        trained(chatty, tmp_path, lr=1e30)


def test_constants_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="numbered from 1"):
        Training(target_layers=(0, 3))
    with pytest.raises(UserError, match="at least 1"):
        Training(steps=0)
    with pytest.raises(UserError, match="between 0 and 1"):
        Training(blank=1.5)


def test_the_published_constants():
    mistral, llama = RECIPES["mistral-7b"], RECIPES["llama-3-8b"]
    for recipe in (mistral, llama):
        assert recipe.target_layers == (10, 20)
        assert (recipe.blocks, recipe.lora_r, recipe.lora_alpha) == (21, 16, 16)
        assert (recipe.lora_dropout, recipe.lr, recipe.steps) == (0.05, 1e-4, 150)
        assert (recipe.batch, recipe.request_length + recipe.response_length) == (16, 1024)
        assert (recipe.loss, recipe.retain, recipe.masking) == ("rr", "absolute", "padding")
        assert (recipe.b_std, recipe.padded_mean) == (0.0, True)
    assert (mistral.alpha, llama.alpha) == (5.0, 10.0)
    assert (mistral.blank, llama.blank) == (0.0, 0.5)


# --------------------------------------------------------------------------------------- adapters


def test_merged_weights_give_what_adapters_give(chatty, tmp_path):
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    with lora_adapters(chatty, Lora(layers=2, r=3, b_std=0.3), seed=1) as adapted, torch.no_grad():
        expected = chatty.run(tokens)
        with adapted.disable_adapter():
            plain = chatty.run(tokens)
        save_adapter(adapted, tmp_path)
    assert not torch.allclose(expected, plain)
    with torch.no_grad():
        torch.testing.assert_close(chatty.run(tokens), plain, rtol=0, atol=0)
        merged = merged_adapter(chatty, tmp_path)
        torch.testing.assert_close(merged.run(tokens), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(chatty.run(tokens), plain, rtol=0, atol=0)


def test_an_adapter_is_a_model_by_its_folder(tmp_path):
    spec = saved_llama(tmp_path / "base")
    base = load_language_model(spec, dtype="float32")
    with lora_adapters(base, Lora(layers=1, r=2, b_std=0.3), seed=1) as adapted:
        save_adapter(adapted, tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    assert is_adapter(folder)
    assert not is_adapter(spec)
    assert base_spec(folder) == spec
    loaded, tokens = load_language_model(folder, dtype="float32"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.run(tokens), merged_adapter(base, folder).run(tokens))
    assert weights_checksum(folder) not in (None, weights_checksum(spec))
    with pytest.raises(UserError, match="means nothing on random weights"):
        load_language_model(folder, random_weights=0)


def test_an_adapter_of_another_model_is_refused_in_one_sentence(chatty, llama, tmp_path):
    with lora_adapters(chatty, Lora(layers=2, r=2), seed=0) as adapted:
        save_adapter(adapted, tmp_path)
    smaller = copy.deepcopy(llama)
    with pytest.raises(UserError, match=r"does not fit .* give one that was trained on this"):
        merged_adapter(smaller, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(Failure, match=r"adapter_model.safetensors is missing"):
        merged_adapter(chatty, tmp_path)


def test_an_adapter_that_names_no_model_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="does not name the model that it is for"):
        base_spec(str(tmp_path))


def test_adapters_on_more_blocks_than_there_are_are_refused(chatty):
    with pytest.raises(UserError, match="ask for 1 to 2"), \
            lora_adapters(chatty, Lora(layers=3), seed=0):  # fmt: skip
        pass
