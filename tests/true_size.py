"""A pipeline of SDXL-Turbo's true configuration with random weights.

The numbers are those of the published model's config.json files (stabilityai/sdxl-turbo): 2.57
billion parameters of the U-Net, 0.12 and 0.69 billion of the text encoders, 0.08 of the VAE. Made
in bfloat16 from the start, since a copy in float32 would take twice 14 GB.
"""

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from probe.diffusion import DiffusionModel
from probe.pipelines import import_diffusers
from probe.toy import TURBO_SCHEDULE, clip_byte_tokenizer

CLIP_TOKENS, CLIP_VOCABULARY = 77, 49408


def true_size_sdxl(seed: int = 0, device: str = "cpu") -> DiffusionModel:
    """SDXL-Turbo's parts at their true sizes, in bfloat16; prompts are read as single bytes."""
    diffusers = import_diffusers()
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            parts = {
                "unet": _unet(diffusers),
                "vae": _vae(diffusers),
                "text_encoder": CLIPTextModel(
                    _text_config(768, layers=12, heads=12, activation="quick_gelu")
                ),
                "text_encoder_2": CLIPTextModelWithProjection(
                    _text_config(1280, layers=32, heads=20, activation="gelu")
                ),
            }
    finally:
        torch.set_default_dtype(usual)
    pipeline = diffusers.StableDiffusionXLPipeline(
        **parts,
        tokenizer=clip_byte_tokenizer(CLIP_TOKENS),
        tokenizer_2=clip_byte_tokenizer(CLIP_TOKENS),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**TURBO_SCHEDULE),
        add_watermarker=False,
    )
    return DiffusionModel("true-size-sdxl", pipeline.to(device))


def _unet(diffusers):
    return diffusers.UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _vae(diffusers):
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
    )


def _text_config(width: int, *, layers: int, heads: int, activation: str) -> CLIPTextConfig:
    end = len(clip_byte_tokenizer(CLIP_TOKENS)) - 1
    return CLIPTextConfig(
        vocab_size=CLIP_VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
