"""A tiny model with room for long prompts and a chat template, for tests of the collapse study."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from probe.language import LanguageModel
from probe.runs import Run
from probe.toy import byte_tokenizer
from saes.activations import TopK
from saes.folder import save_sae
from saes.models import SaeConfig, SparseAutoencoder

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


def untrained_sae(folder: Path, spec: str, *, layer: int) -> Run:
    """An SAE of a tiny model's block with random weights."""
    made = SparseAutoencoder(SaeConfig(d_in=32, d_sae=48, activation=TopK(k=4)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    described = {
        "kind": "sae", "site": f"resid_post.{layer}",
        "model": {"spec": spec, "random_weights": None, "dtype": "float32"},
    }  # fmt: skip
    run = Run.create(folder, f"tiny-resid_post.{layer}", described)
    metadata = {"hook_name": f"blocks.{layer}.hook_resid_post", "model_name": "tiny"}
    save_sae(made, run.path, metadata=metadata, golden_x=torch.randn(4, 32, generator=generator))
    run.finish(summary={}, inputs={}, seeds={}, device="cpu")
    return run
