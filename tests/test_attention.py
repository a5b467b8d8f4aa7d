"""Attention weights, which tokens are visible, and gradients with the weights held constant."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from probe.attention import (
    AS_IT_IS,
    Visible,
    attention_weights,
    frozen_attention,
)
from probe.errors import UserError
from probe.language import LanguageModel
from probe.toy import byte_tokenizer, tiny_gpt2, tiny_llama

TOKENS = torch.tensor([0, 12, 80, 80, 80, 9])


def seen(visible: Visible, n: int = 5) -> list[list[int]]:
    mask = visible.mask(0, n, torch.float32, torch.device("cpu"))
    assert mask is not None and mask.shape == (1, 1, n, n)
    return [torch.nonzero(row == 0).flatten().tolist() for row in mask[0, 0]]


def test_what_is_visible_by_hand():
    assert AS_IT_IS.mask(0, 5, torch.float32, torch.device("cpu")) is None
    assert seen(Visible(window=2)) == [[0], [0, 1], [1, 2], [2, 3], [3, 4]]
    kept = [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]
    assert seen(Visible(window=2, sink="kept")) == kept
    assert seen(Visible(sink="hidden")) == [[0], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]


def test_a_mask_of_later_tokens_is_the_end_of_the_whole_mask():
    visible = Visible(window=3, sink="kept")
    whole = visible.mask(0, 9, torch.float32, torch.device("cpu"))
    part = visible.mask(6, 9, torch.float32, torch.device("cpu"))
    assert whole is not None and part is not None
    assert torch.equal(part, whole[:, :, 6:])


def test_a_window_of_no_token_is_refused():
    with pytest.raises(UserError, match="a window of 0 tokens"):
        Visible(window=0)


def test_names_in_words():
    names = [AS_IT_IS, Visible(sink="hidden"), Visible(window=9), Visible(window=9, sink="kept")]
    assert [visible.name for visible in names] == [
        "all", "first token hidden", "window 9", "window 9, first token kept"
    ]  # fmt: skip


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_weights_are_causal_and_sum_to_one(make):
    model = make()
    weights = attention_weights(model, TOKENS)
    assert weights.shape == (2, 4, 6, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))
    assert float(weights.triu(1).abs().max()) == 0
    windowed = attention_weights(model, TOKENS, visible=Visible(window=2))
    assert float(windowed.tril(-2).abs().max()) == 0
    assert model.model.config._attn_implementation != "eager", "as it was before"


def test_weights_are_the_softmax_of_the_scores():
    model = tiny_llama()
    layer = model.model.model.layers[0]
    x = model.model.model.embed_tokens(TOKENS[None])
    normed = layer.input_layernorm(x)
    q, k = (
        project(normed).view(1, 6, -1, 8).transpose(1, 2)
        for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    cos, sin = model.model.model.rotary_emb(x, torch.arange(6)[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    scores = q @ repeat_kv(k, 2).transpose(-1, -2) / 8**0.5
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(attention_weights(model, TOKENS)[0], scores.softmax(-1)[0])


def test_hiding_the_first_token_is_as_if_it_were_not_there_where_positions_are_relative():
    model = tiny_llama()
    hidden = Visible(sink="hidden").mask(0, 6, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        with_mask = model.model(input_ids=TOKENS[None], attention_mask=hidden).logits[0, -1]
        without = model.model(input_ids=TOKENS[None, 1:]).logits[0, -1]
    torch.testing.assert_close(with_mask, without, atol=1e-5, rtol=1e-4)


def test_frozen_attention_is_the_gradient_with_constant_weights():
    model = tiny_llama(n_layers=1)
    inner = model.model.model
    layer = inner.layers[0]
    weights = attention_weights(model, TOKENS)

    def by_hand(x):
        values = layer.self_attn.v_proj(layer.input_layernorm(x)).view(1, 6, -1, 8).transpose(1, 2)
        heads = (weights[0] @ repeat_kv(values, 2)).transpose(1, 2).reshape(1, 6, -1)
        z = x + layer.self_attn.o_proj(heads)
        return inner.norm(z + layer.mlp(layer.post_attention_layernorm(z)))[0, -1]

    x = inner.embed_tokens(TOKENS[None]).detach().requires_grad_()
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    (wanted,) = torch.autograd.grad(by_hand(x) @ direction, x)
    with frozen_attention(model):
        output = inner(inputs_embeds=x, use_cache=False).last_hidden_state[0, -1]
        (frozen,) = torch.autograd.grad(output @ direction, x)
    output = inner(inputs_embeds=x, use_cache=False).last_hidden_state[0, -1]
    (whole,) = torch.autograd.grad(output @ direction, x)
    torch.testing.assert_close(frozen, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(whole, wanted, atol=1e-3)


def test_a_model_without_attention_is_refused():
    config = MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = LanguageModel("tiny-mamba", MambaForCausalLM(config), byte_tokenizer())
    with pytest.raises(UserError, match="tiny-mamba"):
        attention_weights(model, TOKENS)
