"""Last tokens of growing prompts: one pass with a cache is the same as a pass a prompt."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from probe.attention import AS_IT_IS, Visible
from probe.capture import capturing
from probe.errors import UserError
from probe.growing import CHUNK, Reading, branched, read_last_tokens
from probe.interventions import Channels, Edit, Where, applying
from probe.language import LanguageModel
from probe.sites import parse_site
from probe.toy import byte_tokenizer, tiny_gpt2, tiny_llama

VISIBLE = (
    AS_IT_IS,
    Visible(window=5),
    Visible(window=5, sink="kept"),
    Visible(sink="hidden"),
)
SITES = [parse_site("resid_post.1"), parse_site("head_out.0")]


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 250, (n,), generator=torch.Generator().manual_seed(seed))


def some_readings() -> list[Reading]:
    return [
        Reading(n_trunk=n, suffix=tuple(tokens(k, seed=n + k).tolist()))
        for n in (3, 10, 40, 60)
        for k in (0, 1, 4)
    ]


def plain(model: LanguageModel, trunk: torch.Tensor, one: Reading, visible: Visible):
    """A pass over one prompt, without a cache."""
    prompt = torch.cat([trunk[: one.n_trunk], torch.tensor(one.suffix, dtype=torch.long)])
    n = len(prompt)
    with torch.no_grad(), capturing(model, SITES, early_exit=False) as seen:
        logits = model.model(
            input_ids=prompt[None], use_cache=False,
            attention_mask=visible.mask(0, n, model.dtype, model.device),
        ).logits  # fmt: skip
    return {site: seen[site][0, -1] for site in SITES}, logits[0, -1]


def mistral(window: int = 6) -> LanguageModel:
    """A model whose layers have windows of their own."""
    config = MistralConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        sliding_window=window, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LanguageModel("tiny-mistral", MistralForCausalLM(config), byte_tokenizer())


@pytest.mark.parametrize("visible", VISIBLE, ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, mistral])
def test_every_prompt_reads_as_it_does_alone(make, visible):
    model, trunk = make(), tokens(60)
    readings = some_readings()
    last = read_last_tokens(model, trunk, readings, SITES, visible=visible)
    for i, one in enumerate(readings):
        values, logits = plain(model, trunk, one, visible)
        torch.testing.assert_close(last.logits[i], logits, atol=2e-5, rtol=1e-4)
        for site in SITES:
            torch.testing.assert_close(last.values[site][i], values[site], atol=2e-5, rtol=1e-4)


def test_a_trunk_of_several_chunks_and_prompts_named_twice():
    model = tiny_llama()
    model.model.config.max_position_embeddings = 4096
    trunk = tokens(CHUNK + 70)
    readings = [
        Reading(n_trunk=CHUNK + 60, suffix=(5, 6)),
        Reading(n_trunk=4),
        Reading(n_trunk=CHUNK),
        Reading(n_trunk=4),
    ]
    read: list[int] = []
    last = read_last_tokens(model, trunk, readings, SITES, say=read.append)
    assert sum(read) == CHUNK + 60 + 2, "the trunk once and the suffix once"
    for i, one in enumerate(readings):
        _, logits = plain(model, trunk, one, AS_IT_IS)
        torch.testing.assert_close(last.logits[i], logits, atol=2e-5, rtol=1e-4)


def test_edits_in_force_are_made_at_the_trunks_positions():
    model, trunk = tiny_llama(), tokens(12)
    chosen = torch.zeros(12, dtype=torch.bool)
    chosen[4] = True
    edit = Edit(
        site=parse_site("resid_post.0"), component=Channels(start=0, stop=32), op="add",
        where=Where(prompt=chosen), value=torch.full((32,), 0.5),
    )  # fmt: skip
    readings = [Reading(n_trunk=12, suffix=(7, 8)), Reading(n_trunk=4)]
    with applying(model, [edit]):
        last = read_last_tokens(model, trunk, readings, SITES)
        edited, _ = plain(model, trunk, readings[0], AS_IT_IS)
    before, _ = plain(model, trunk, readings[1], AS_IT_IS)
    for site in SITES:
        torch.testing.assert_close(last.values[site][0], edited[site], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(last.values[site][1], before[site], atol=2e-5, rtol=1e-4)


def test_a_branch_leaves_the_cache_as_it_is():
    model = tiny_llama()
    out = model.model(input_ids=tokens(6)[None], use_cache=True)
    cache = out.past_key_values
    branch = branched(cache)
    model.model(input_ids=tokens(3)[None], past_key_values=branch, use_cache=True)
    assert (cache.get_seq_length(), branch.get_seq_length()) == (6, 9)


def test_what_cannot_be_read_is_said_in_a_sentence():
    model, trunk = tiny_llama(), tokens(20)
    with pytest.raises(UserError, match="no prompt was given"):
        read_last_tokens(model, trunk, [])
    with pytest.raises(UserError, match="takes 21 tokens of a text that has 1 to 20"):
        read_last_tokens(model, trunk, [Reading(n_trunk=21)])
    with pytest.raises(UserError, match=r"has 257 tokens and tiny-llama reads at most 256: ask"):
        read_last_tokens(model, tokens(257), [Reading(n_trunk=257)])


def test_a_model_that_keeps_more_than_keys_and_values_is_refused():
    config = MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = LanguageModel("tiny-mamba", MambaForCausalLM(config), byte_tokenizer())
    with pytest.raises(UserError, match="choose a transformer whose every layer attends"):
        read_last_tokens(model, tokens(5), [Reading(n_trunk=5)])
