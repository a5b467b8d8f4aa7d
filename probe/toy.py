"""Tiny seeded models, for tests and for trying things out.

They are the real classes of transformers and diffusers with small sizes, random weights and
tokenizers of single bytes: what works on them works on the real model, in milliseconds.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from probe.diffusion import DiffusionModel
from probe.language import LanguageModel
from probe.pipelines import import_diffusers

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


def tiny_sdxl(seed: int = 0) -> DiffusionModel:
    """A pipeline of SDXL's parts and block structure, with a few channels and random weights.

    Images of 32 x 32 pixels; the blocks `down.2.1`, `mid.0`, `up.0.0` and `up.0.1` are 16 channels
    wide and see 4 x 4 places.
    """
    diffusers = import_diffusers()
    tokenizer = clip_byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=_tiny_vae(),
            text_encoder=CLIPTextModel(_tiny_text_config(len(tokenizer))),
            text_encoder_2=CLIPTextModelWithProjection(_tiny_text_config(len(tokenizer))),
            tokenizer=tokenizer,
            tokenizer_2=clip_byte_tokenizer(),
            unet=_tiny_unet(),
            scheduler=diffusers.EulerAncestralDiscreteScheduler(**TURBO_SCHEDULE),
            add_watermarker=False,
        )
    return DiffusionModel("tiny-sdxl", pipeline)


TURBO_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
}
"""How SDXL-Turbo's scheduler is set."""


def clip_byte_tokenizer(n_tokens: int = 24) -> CLIPTokenizer:
    """CLIP's tokenizer with a token for each byte, alone or at a word's end, and no merges.

    Args:
        n_tokens: how much of a prompt is read, start and end included.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=n_tokens)


def _tiny_text_config(n_tokens: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=n_tokens,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=16,
        bos_token_id=n_tokens - 2,
        eos_token_id=n_tokens - 1,
        pad_token_id=n_tokens - 1,
        initializer_range=0.2,
    )


def _tiny_unet() -> Any:
    return import_diffusers().UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8, 16),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )


def _tiny_vae() -> Any:
    return import_diffusers().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )


def _seeded(model_class: type, config: LlamaConfig | GPT2Config, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)
