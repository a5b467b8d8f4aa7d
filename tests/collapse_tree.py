"""A tiny model with room for long prompts and a chat template, for tests of the collapse study."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from probe.language import LanguageModel
from probe.toy import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def long_llama(context: int = 2048) -> LanguageModel:
    """A byte-level Llama of two layers that reads long texts and has a chat template."""
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LanguageModel("tiny", LlamaForCausalLM(config), byte_tokenizer())
    model.tokenizer.chat_template = TEMPLATE
    return model


def saved_llama(folder: Path, context: int = 2048) -> str:
    """The same as a folder; gives its path."""
    model = long_llama(context)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)
