"""Difference-in-means directions: making, choosing, ablating, adding, keeping them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from probe.ablation import ablated_copy, ablating, ablation_sites, adding, untie
from probe.capture import capturing
from probe.corpora import TokenBatch
from probe.direction_selection import (
    Candidate,
    Criteria,
    divergence,
    make_validation,
    measure_candidate,
    select,
    target_ids,
    target_scores,
)
from probe.directions import (
    METADATA,
    Direction,
    contrast_weights,
    load_direction,
    mean_differences,
    projection_statistics,
    read_rows,
    save_direction,
    weighted_sums,
)
from probe.errors import UserError
from probe.language import LanguageModel
from probe.prompt_sets import (
    ending_positions,
    instruction_ending,
    last_logits,
    read_prompts,
    write_rows,
)
from probe.separation import auroc, separation
from probe.sites import Site, parse_site
from probe.toy import byte_tokenizer, tiny_gpt2, tiny_llama

TEMPLATE = (
    "{% for m in messages %}system: be kind|{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}>A:{% endif %}"
)
PROMPTS = ["one", "seven things", "a much longer prompt than these", "two", "six", "eleven people"]
SITES = [parse_site(name) for name in ("resid_pre.0", "resid_pre.1", "mlp_out.1")]


def chatting() -> LanguageModel:
    model = tiny_llama()
    model.tokenizer.chat_template = TEMPLATE
    return model


def tiny_neox() -> LanguageModel:
    config = GPTNeoXConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return LanguageModel("tiny-neox", GPTNeoXForCausalLM(config), byte_tokenizer())


def tiny_gemma2() -> LanguageModel:
    config = Gemma2Config(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return LanguageModel("tiny-gemma2", Gemma2ForCausalLM(config), byte_tokenizer())


def a_vector(d: int = 32, seed: int = 3) -> Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(seed))


def shaken(model: LanguageModel) -> LanguageModel:
    """The model with biases and norms that are not zero and one."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def run(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits of a whole pass."""
    with torch.inference_mode():
        logits = model.run(tokens)
    assert logits is not None
    return logits


def head_and_table(model: LanguageModel) -> tuple[Any, Any]:
    """The unembedding and the embedding."""
    return model.model.get_output_embeddings(), model.model.get_input_embeddings()


def one_by_one(model: LanguageModel, rows: list[tuple[int, ...]], site: Site) -> list[Tensor]:
    """The slow obvious reference: a prompt at a time, its site's whole tensor."""
    found = []
    for row in rows:
        with torch.inference_mode(), capturing(model, [site]) as seen:
            model.run(torch.tensor([row]))
        found.append(seen[site][0].double())
    return found


# --------------------------------------------------------------------------------- prompt sets


def test_prompts_are_written_through_the_template_where_there_is_one():
    model = chatting()
    text = "system: be kind|hi>A:"
    assert write_rows(model, ["hi"]) == [tuple(model.tokenizer(text)["input_ids"])]
    assert write_rows(model, ["hi"], chat=False) == [tuple(model.tokenizer("hi")["input_ids"])]
    assert instruction_ending(model) == tuple(model.tokenizer(">A:")["input_ids"])
    assert ending_positions(model) == (-1, -2, -3)


def test_plain_text_has_no_ending(llama):
    assert instruction_ending(llama) == () and ending_positions(llama) == (-1,)


def test_wrong_prompts_are_told_in_a_sentence(llama):
    for prompts, said in (
        ([], "no prompt was given"),
        (["a", " \n"], "prompt 2 of 2 is empty"),
        (["a", "b" * 257], "prompt 2 of 2 has 257 tokens where tiny-llama takes 256"),
    ):
        with pytest.raises(UserError, match=said):
            write_rows(llama, prompts)
    with pytest.raises(UserError, match="no chat template"):
        write_rows(llama, ["a"], chat=True)


def test_files_of_prompts(tmp_path: Path):
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("first\n\n second \n")
    rows.write_text('{"prompt": "x", "id": 1}\n{"text": "y\\nz"}\n')
    assert read_prompts(text) == ["first", "second"]
    assert read_prompts(rows) == ["x", "y\nz"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.jsonl", '{"prompt": "x"}\n{"promt": "y"}\n', "line 2 has no prompt"),
        ("a.jsonl", '{"prompt": ""}\n', "line 1 has no prompt"),
        ("a.jsonl", "[1]\nnot", "line 1 has no prompt"),
        ("a.jsonl", "{not json", "line 1 is not JSON"),
        ("a.csv", "prompt\n", "holds no prompt"),
        ("a.csv", "prompt,label\n a,b\n ,c\n", "line 3 has no prompt"),
        ("a.csv", "x\n1\n", "line 2 has no prompt"),
        ("a.pdf", "x", "no file of prompts"),
    ],
)
def test_damaged_files_of_prompts(tmp_path: Path, name: str, content: str, said: str):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_prompts(path)


def test_a_missing_file_of_prompts(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("made", [chatting, tiny_gpt2, tiny_neox], ids=["llama", "gpt2", "neox"])
def test_running_together_is_running_alone(made):
    """Lengths differ, and with a template all prompts begin alike: nothing shows in the logits."""
    model = made()
    rows = write_rows(model, PROMPTS)
    assert len({len(row) for row in rows}) > 2
    alone = torch.stack([run(model, torch.tensor([row]))[0, -1] for row in rows])
    assert torch.allclose(last_logits(model, rows), alone, atol=1e-4)
    with adding(model, a_vector(), parse_site("resid_pre.1")):
        alone = torch.stack([run(model, torch.tensor([row]))[0, -1] for row in rows])
        assert torch.allclose(last_logits(model, rows), alone, atol=1e-4)


# ------------------------------------------------------------------------------------- means


def test_a_planted_contrast_is_found_exactly():
    """Prompts end in a token whose embedding differs by a known vector, and nothing else."""
    model = tiny_llama()
    a, b = (model.tokenizer(letter)["input_ids"][0] for letter in "ab")
    planted = a_vector()
    with torch.no_grad():
        table = head_and_table(model)[1].weight
        table[a] = table[b] + planted
    positive, negative = (
        write_rows(model, ["one a", "sea a"]),
        write_rows(model, ["one b", "six b"]),
    )
    found = mean_differences(model, positive, negative, SITES[:1], [-1])
    assert torch.allclose(found[0, 0].float(), planted, atol=1e-6)


@pytest.mark.parametrize("made", [chatting, tiny_gpt2], ids=["llama", "gpt2"])
def test_means_are_those_of_single_runs(made):
    model = made()
    rows, positions = write_rows(model, PROMPTS), [-1, -3]
    found = mean_differences(model, rows[:4], rows[4:], SITES, positions)
    for s, site in enumerate(SITES):
        alone = torch.stack([x[positions] for x in one_by_one(model, rows, site)])
        expected = alone[:4].mean(dim=0) - alone[4:].mean(dim=0)
        assert torch.allclose(found[s], expected, atol=1e-5)
        read = read_rows(model, rows, [site], positions)[:, 0].double()
        assert torch.allclose(read, alone, atol=1e-5)


def test_one_prompt_of_each_set_makes_a_direction(llama):
    positive, negative = write_rows(llama, ["first"]), write_rows(llama, ["second"])
    found = mean_differences(llama, positive, negative, SITES[:1], [-1])
    one, other = one_by_one(llama, [*positive, *negative], SITES[0])
    assert torch.allclose(found[0, 0], one[-1] - other[-1], atol=1e-6)


def test_weights_by_hand():
    labels = torch.tensor([True, True, False, False, False])
    weights = contrast_weights(labels)
    assert weights.tolist() == pytest.approx([1 / 2, 1 / 2, -1 / 3, -1 / 3, -1 / 3])


def test_several_sums_at_once_are_each_alone(llama):
    rows = write_rows(llama, PROMPTS)
    weights = torch.randn(3, len(rows), generator=torch.Generator().manual_seed(0)).double()
    together = weighted_sums(llama, rows, weights, SITES, [-1, -2])
    for r in range(3):
        alone = weighted_sums(llama, rows, weights[r : r + 1], SITES, [-1, -2])
        assert torch.allclose(together[r], alone[0], atol=1e-12)


def test_wrong_questions_are_told_in_a_sentence(llama):
    rows = write_rows(llama, ["abc", "de"])
    for positive, negative, sites, positions, said in (
        ([], rows, SITES, [-1], "the positive set has no prompt"),
        (rows, [], SITES, [-1], "the negative set has no prompt"),
        (rows, rows, [], [-1], "no site was given"),
        (rows, rows, SITES, [], "positions count back"),
        (rows, rows, SITES, [0], "positions count back"),
        (rows, rows, SITES, [-3], "prompt 2 of 4 has 2 tokens where position -3"),
        (rows, rows, [parse_site("resid_pre.9")], [-1], "is not in tiny-llama"),
        (rows, rows, [parse_site("resid_pre.0"), parse_site("mlp_act.0")], [-1], "one width"),
    ):
        with pytest.raises(UserError, match=said):
            mean_differences(llama, positive, negative, sites, positions)


def test_projection_statistics_by_hand(llama):
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    keep = torch.tensor([[False, True, True], [False, True, False]])
    batch = TokenBatch(tokens=tokens, doc=tokens.int(), keep=keep, first_sequence=0)
    vector = 5 * a_vector()
    mean, sd, largest = projection_statistics(llama, vector, SITES[1], [batch])
    values = torch.cat(one_by_one(llama, [(1, 2, 3), (4, 5, 6)], SITES[1]))[[1, 2, 4]]
    along = (values @ (vector / vector.norm()).double()).numpy()
    assert (mean, sd, largest) == pytest.approx((along.mean(), along.std(), along.max()), abs=1e-5)
    none = TokenBatch(tokens=tokens, doc=tokens.int(), keep=keep & False, first_sequence=0)
    with pytest.raises(UserError, match="no token that is kept"):
        projection_statistics(llama, vector, SITES[1], [none])


# ---------------------------------------------------------------------------------- ablation


@pytest.mark.parametrize(
    "made", [tiny_llama, tiny_gpt2, tiny_neox, tiny_gemma2], ids=["llama", "gpt2", "neox", "gemma2"]
)
def test_ablation_leaves_nothing_at_any_listed_place(made):
    model, vector = shaken(made()), a_vector()
    direction = vector / vector.norm()
    tokens = torch.tensor([[5, 6, 7, 8]])
    places = [*ablation_sites(model), parse_site("resid_post.1")]
    assert len(places) == 7
    with (
        torch.inference_mode(),
        ablating(model, vector),
        capturing(model, places, early_exit=False) as seen,
    ):
        model.run(tokens)
    for site in places:
        assert (seen[site] @ direction).abs().max() < 1e-4, site
    with torch.inference_mode(), capturing(model, places, early_exit=False) as seen:
        model.run(tokens)
    assert all((seen[site] @ direction).abs().max() > 1e-2 for site in places)


@pytest.mark.parametrize("made", [tiny_llama, tiny_gpt2, tiny_neox], ids=["llama", "gpt2", "neox"])
def test_hooks_and_weight_edit_are_equal(made):
    model, vector = shaken(made()), a_vector()
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    plain = run(model, tokens)
    with ablating(model, vector):
        hooked = run(model, tokens)
    edited = run(ablated_copy(model, vector), tokens)
    assert torch.allclose(hooked, edited, atol=1e-4)
    assert (hooked - plain).abs().max() > 0.1
    assert torch.equal(run(model, tokens), plain)
    after = model.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_tied_embeddings_are_untied_in_the_copy_and_would_matter():
    model, vector = shaken(tiny_gpt2()), a_vector()
    head, table = head_and_table(model)
    assert head.weight is table.weight
    edited = ablated_copy(model, vector)
    own_head, own_table = head_and_table(edited)
    assert head.weight is table.weight
    assert torch.equal(own_head.weight, head.weight)
    assert not torch.equal(own_table.weight, table.weight)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with ablating(model, vector):
        hooked = run(model, tokens)
    assert torch.allclose(run(edited, tokens), hooked, atol=1e-4)
    # Tied again, the edit reaches what reads the stream, and the logits are no longer the hooks'.
    own_head.weight = own_table.weight
    assert (run(edited, tokens) - hooked).abs().max() > 1e-2


def test_untying_what_is_not_tied_changes_nothing():
    model = tiny_llama()
    before = head_and_table(model)[0].weight
    untie(model)
    assert head_and_table(model)[0].weight is before


def test_hooks_and_weight_edit_are_equal_on_smollm2(smollm2):
    rows = write_rows(smollm2, ["Où est la gare ?", "Tell me about the sea."])
    vector = mean_differences(smollm2, rows[:1], rows[1:], [parse_site("resid_pre.15")], [-1])
    plain = last_logits(smollm2, rows)
    with ablating(smollm2, vector[0, 0].float()):
        hooked = last_logits(smollm2, rows)
    edited = ablated_copy(smollm2, vector[0, 0].float())
    assert (last_logits(edited, rows) - hooked).abs().max() < 1e-3
    assert (hooked - plain).abs().max() > 1
    head, table = head_and_table(smollm2)
    assert head.weight is table.weight
    own_head, own_table = head_and_table(edited)
    own_head.weight = own_table.weight
    assert (last_logits(edited, rows) - hooked).abs().max() > 1e-2


def test_a_norm_after_the_output_matrix_is_refused():
    with pytest.raises(UserError, match="ablate by hooks"):
        ablated_copy(tiny_gemma2(), a_vector())


def n_hooks(model: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())


def test_hooks_are_gone_after_trouble():
    model, vector = tiny_llama(), a_vector()
    with pytest.raises(IndexError), ablating(model, vector):
        assert n_hooks(model) == 6
        model.run(torch.tensor([[999]]))
    with pytest.raises(IndexError), adding(model, vector, SITES[0]):
        model.run(torch.tensor([[999]]))
    assert n_hooks(model) == 0


def test_directions_that_do_not_fit_are_told_in_a_sentence(llama):
    for vector, said in (
        (torch.ones(31), "has 31 numbers where the model is 32 wide"),
        (torch.full((32,), math.nan), "is not finite"),
        (torch.zeros(32), "is zero everywhere"),
    ):
        with pytest.raises(UserError, match=said), ablating(llama, vector):
            pass
        with pytest.raises(UserError, match=said), adding(llama, vector, SITES[0]):
            llama.run(torch.tensor([[1, 2]]))
    assert n_hooks(llama) == 0


def test_addition_by_hand(llama):
    tokens, vector = torch.tensor([[5, 6, 7]]), a_vector()
    with torch.inference_mode(), capturing(llama, SITES[1:2]) as seen:
        llama.run(tokens)
        plain = seen[SITES[1]].clone()
    for positions, chosen in ((None, [0, 1, 2]), ([-1], [2]), ([0, -2], [0, 1])):
        expected = plain.clone()
        expected[:, chosen] += 2 * vector
        with (
            torch.inference_mode(),
            adding(llama, vector, SITES[1], strength=2, positions=positions),
            capturing(llama, SITES[1:2]) as seen,
        ):
            llama.run(tokens)
        assert torch.allclose(seen[SITES[1]], expected, atol=1e-6)


# --------------------------------------------------------------------------------- selection


def test_target_scores_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    # T = {0, 1}: log(0.75 / 0.25) = log 3, log(0.2 / 0.8) = -log 4
    found = target_scores(p.log(), [0, 1]).tolist()
    assert found == pytest.approx([math.log(3), -math.log(4)], abs=1e-6)
    certain = target_scores(torch.tensor([[200.0, 0.0]]), [0]).item()
    assert certain == pytest.approx(-math.log(1e-8), abs=1e-6)
    assert target_scores(torch.tensor([[200.0, 0.0]]), [1]).item() == pytest.approx(-certain)


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert divergence(p, q).item() == pytest.approx(expected, abs=1e-6)
    assert divergence(p, p + 3).item() == pytest.approx(0, abs=1e-7)


def candidate(
    layer: int, ablated: float, added: float = 1.0, kl: float = 0.01, position: int = -1
) -> Candidate:
    site = Site(kind="resid_pre", layer=layer)
    return Candidate(
        site=site, position=position, norm=1.0, ablated=ablated, added=added, kl=kl
    )  # fmt: skip


def test_selection_by_hand():
    rows = [
        candidate(2, -1.0),
        candidate(3, -3.0, kl=0.2),
        candidate(4, -2.0),
        candidate(5, -4.0, added=-0.1),
        candidate(8, -9.0),  # 8 is not below 0.8 * 10
        candidate(6, math.nan),
        candidate(7, -2.0),  # a tie: the first stays
    ]
    found = select(rows, Criteria(), n_layers=10)
    assert found.chosen == 2 and found.passed
    assert found.misses == ((), ("kl",), (), ("added",), ("layer",), ("not finite",), ())


def test_selection_at_the_very_bounds():
    at_bounds = candidate(7, -1.0, added=0.0, kl=0.1)
    assert at_bounds.misses(Criteria(), n_layers=10) == ()


def test_where_nothing_passes_the_nearest_is_named_with_what_it_misses():
    rows = [
        candidate(1, -9.0, added=-1.0, kl=1.0),
        candidate(2, -1.0, kl=1.0),
        candidate(3, -2.0, kl=1.0),
    ]
    found = select(rows, Criteria(), n_layers=10)
    assert found.chosen == 2 and not found.passed and found.misses[2] == ("kl",)
    with pytest.raises(UserError, match="no candidate"):
        select([candidate(1, math.nan)], Criteria(), n_layers=10)
    with pytest.raises(UserError, match="no candidate"):
        select([], Criteria(), n_layers=10)


def test_a_candidate_is_measured_as_by_hand(llama):
    positive, negative = write_rows(llama, ["abc", "de"]), write_rows(llama, ["xyz", "uv"])
    validation = make_validation(llama, positive, negative, [7, 9])
    vector, site = a_vector(), SITES[1]
    found = measure_candidate(llama, vector, site, -1, validation)
    with ablating(llama, vector):
        ablated, quiet = last_logits(llama, positive), last_logits(llama, negative)
    with adding(llama, vector, site):
        added = last_logits(llama, negative)
    assert found.ablated == pytest.approx(float(target_scores(ablated, [7, 9]).mean()))
    assert found.added == pytest.approx(float(target_scores(added, [7, 9]).mean()))
    plain = last_logits(llama, negative)
    assert found.kl == pytest.approx(float(divergence(plain, quiet).mean()))
    assert found.kl > 0 and found.norm == pytest.approx(float(vector.norm()))
    with pytest.raises(UserError, match="at least one positive"):
        make_validation(llama, [], negative, [7])


def test_target_tokens(llama):
    (a,) = llama.tokenizer("a")["input_ids"]
    assert target_ids(llama, ["a", "a"]) == (a,)
    with pytest.raises(UserError, match=r"'ab' is not one token of tiny-llama but 2 \('a', 'b'\)"):
        target_ids(llama, ["a", "ab"])
    with pytest.raises(UserError, match="not one token"):
        target_ids(llama, [""])
    with pytest.raises(UserError, match="no target token"):
        target_ids(llama, [])


# -------------------------------------------------------------------------------- separation


def test_auroc_is_scikit_learns():
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(0.5, 1, (17, 4)), rng.normal(0, 1, (23, 4))
    positive[:, 3], negative[:, 3] = rng.integers(0, 4, 17), rng.integers(0, 3, 23)  # many ties
    labels = np.repeat([1, 0], [17, 23])
    expected = [
        roc_auc_score(labels, np.concatenate([positive[:, c], negative[:, c]])) for c in range(4)
    ]
    assert auroc(positive, negative) == pytest.approx(expected)
    found = separation(positive, negative)
    assert found.auroc == pytest.approx(expected)
    assert (found.low < found.auroc).all() and (found.auroc < found.high).all()


def test_bootstrap_resamples_the_prompts():
    """Against resampling the prompts themselves, drawn by someone else's function."""
    rng = np.random.default_rng(1)
    positive, negative = rng.normal(1, 1, (20, 1)), rng.normal(0, 1, (20, 1))
    found = separation(positive, negative, n_resamples=4000)
    labels = np.repeat([1, 0], 20)
    drawn = [
        roc_auc_score(
            labels, np.concatenate([rng.choice(positive[:, 0], 20), rng.choice(negative[:, 0], 20)])
        )
        for _ in range(300)
    ]
    assert [found.low[0], found.high[0]] == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]), abs=0.04
    )


def test_auroc_of_the_plain_cases():
    ones, zeros = np.ones((3, 1)), np.zeros((4, 1))
    assert auroc(ones, zeros)[0] == 1 and auroc(zeros, ones)[0] == 0
    assert auroc(ones, np.ones((2, 1)))[0] == 0.5
    same = separation(ones, zeros)
    assert (same.low[0], same.high[0]) == (1, 1)
    assert separation(ones, zeros, seed=1).low == separation(ones, zeros, seed=1).low
    with pytest.raises(ValueError, match="both groups"):
        auroc(ones, np.ones((0, 1)))


# ------------------------------------------------------------------------------------- files


def a_direction() -> Direction:
    return Direction(
        vector=a_vector(), site=parse_site("resid_pre.1"), model="tiny", random_weights=3,
        name="a against b", position=-2, mean=0.5, sd=1.5, max=4.0,
    )  # fmt: skip


def test_a_direction_is_read_as_it_was_written(tmp_path: Path):
    path, direction = tmp_path / "direction.safetensors", a_direction()
    save_direction(path, direction)
    found = load_direction(path)
    assert torch.equal(found.vector, direction.vector)
    names = ("site", "model", "random_weights", "name", "position", "mean", "sd", "max")
    assert all(getattr(found, name) == getattr(direction, name) for name in names)
    assert found.unit.norm().item() == pytest.approx(1)
    assert found.norm == pytest.approx(float(direction.vector.norm()))


def test_a_direction_knows_whether_a_model_is_as_wide(llama):
    a_direction().check_model(llama)
    with pytest.raises(UserError, match="has 32 numbers where the model is 16 wide"):
        a_direction().check_model(tiny_llama(d_model=16))


@pytest.mark.parametrize(
    ("tensors", "change", "said"),
    [
        ({}, {}, "holds no tensor 'direction'"),
        ({"direction": torch.ones(2, 4)}, {}, "must be one vector"),
        ({"direction": torch.full((4,), math.inf)}, {}, "is not finite"),
        ({"direction": torch.zeros(4)}, {}, "is zero everywhere"),
        ({"direction": torch.ones(4)}, {"schema": 2}, "has the schema 2"),
        ({"direction": torch.ones(4)}, {"position": "last"}, "is not right at position"),
        ({"direction": torch.ones(4)}, {"colour": "red"}, "is not right at colour"),
        ({"direction": torch.ones(4)}, {"mean": True}, "is not right at mean"),
        ({"direction": torch.ones(4)}, {"site": "resid_pre"}, "is not known"),
    ],
)
def test_wrong_direction_files(tmp_path: Path, tensors, change: dict, said: str):
    good = tmp_path / "good.safetensors"
    save_direction(good, a_direction())
    facts = {
        "schema": 1, "site": "resid_pre.1", "model": "tiny", "random_weights": None, "name": "x",
        "position": -1, "mean": None, "sd": None, "max": None,
    } | change  # fmt: skip
    path = tmp_path / "wrong.safetensors"
    save_file(tensors or {"other": torch.ones(1)}, path, metadata={METADATA: json.dumps(facts)})
    with pytest.raises(UserError, match=said):
        load_direction(path)


def test_files_that_are_no_directions(tmp_path: Path):
    plain = tmp_path / "plain.safetensors"
    save_file({"direction": torch.ones(4)}, plain)
    with pytest.raises(UserError, match="has the schema None"):
        load_direction(plain)
    other = tmp_path / "other.safetensors"
    other.write_text("not at all")
    for path in (other, tmp_path / "missing.safetensors"):
        with pytest.raises(UserError, match="is not a direction file"):
            load_direction(path)
    with pytest.raises(UserError, match="is not finite"):
        Direction(vector=torch.full((4,), math.nan), site=SITES[0], model="x")
