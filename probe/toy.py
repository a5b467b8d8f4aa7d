"""Tiny seeded language models with a byte-level tokenizer, for tests and for trying things out.

They are the real transformers classes with small sizes and random weights: what works on them works
on the real model, in a millisecond.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from probe.language import LanguageModel

END_OF_TEXT = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte (ids 1 to 256) and the end of text (id 0)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def tiny_llama(seed: int = 0, n_layers: int = 2, d_model: int = 32) -> LanguageModel:
    """A Llama of a few layers with random weights."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=d_model,
        intermediate_size=3 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LanguageModel("tiny-llama", _seeded(LlamaForCausalLM, config, seed), byte_tokenizer())


def tiny_gpt2(seed: int = 0, n_layers: int = 2, d_model: int = 32) -> LanguageModel:
    """A GPT-2 of a few layers with random weights."""
    config = GPT2Config(
        vocab_size=257,
        n_embd=d_model,
        n_layer=n_layers,
        n_head=4,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    return LanguageModel("tiny-gpt2", _seeded(GPT2LMHeadModel, config, seed), byte_tokenizer())


def _seeded(model_class: type, config: LlamaConfig | GPT2Config, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)
