"""The parts of toy-turbo: SDXL's classes and block names at a hundredth of its size.

    tokenizer, tokenizer_2   CLIPTokenizer in which every word of the world's captions is a token
    text_encoder             CLIPTextModel, 3 layers of 96
    text_encoder_2           CLIPTextModelWithProjection, 3 layers of 64
    vae                      AutoencoderTiny, 64 x 64 pixels to latents of 32 x 32
    unet                     UNet2DConditionModel, SDXL's three levels with 16, 32, 128 channels
    scheduler                EulerAncestralDiscreteScheduler as SDXL-Turbo's, but predicting v

One step of the pipeline is then x0 = c_skip * noise - c_out * v with c_skip = 1 / sqrt(sigma^2 + 1)
and c_out = sigma / sqrt(sigma^2 + 1), sigma = 14.61 (Salimans and Ho 2022, 2202.00512). SDXL-Turbo
predicts the noise instead, of which a small network's errors would be multiplied by sigma.
"""

import itertools
from collections import Counter

import torch
from diffusers import (
    AutoencoderTiny,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from probe.toyturbo.briefs import LATENT_CHANNELS, LATENT_SIDE
from probe.toyturbo.world import FACTORS, SIDE

OTHER_WORDS = "a an and at background from lit on the thing"
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 32
TEXT_WIDTHS = (96, 64)
UNET_WIDTHS = (16, 32, 128)
TIME_ID_WIDTH = 8

TIME_IDS = (SIDE, SIDE, 0, 0, SIDE, SIDE)
"""What the pipeline tells the U-Net about sizes and crops: original size, crop, target size."""

CARRYING = (
    "down_blocks.2.attentions.1",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
)
"""The cross-attention blocks that read the caption: the four that are studied in SDXL-Turbo."""


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over bytes whose merges make every word of the world one token."""
    words = {word for values in FACTORS.values() for value in values for word in value.split()}
    merges = _merges(sorted(words | set(OTHER_WORDS.split())))
    alphabet = sorted(ByteLevel.alphabet())
    pieces = itertools.chain(
        alphabet, (f"{symbol}</w>" for symbol in alphabet), ("".join(pair) for pair in merges)
    )
    vocabulary = {
        piece: i for i, piece in enumerate(itertools.chain(dict.fromkeys(pieces), (START, END)))
    }
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        model_max_length=MAX_TOKENS,
    )


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte pairs to merge, the most frequent first, until every word is one piece.

    The library's own trainer breaks ties at random, and other ids would mean other words to an
    encoder that goes on from a checkpoint.
    """
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for pieces in split for pair in itertools.pairwise(pieces)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = [_merged(pieces, best) for pieces in split]
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with every occurrence of a pair made one."""
    found: list[str] = []
    for piece in pieces:
        if found and (found[-1], piece) == pair:
            found[-1] += piece
        else:
            found.append(piece)
    return found


def make_text_encoders(
    tokenizer: CLIPTokenizer,
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both text encoders, of random weights; the U-Net reads their last layer but one."""
    first, second = (_text_config(tokenizer, width) for width in TEXT_WIDTHS)
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=TEXT_WIDTHS[1],
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.get_vocab()[START],
        eos_token_id=tokenizer.get_vocab()[END],
        pad_token_id=tokenizer.get_vocab()[END],
    )


def make_vae() -> AutoencoderTiny:
    """The autoencoder between pixels and latents, of random weights."""
    return AutoencoderTiny(
        encoder_block_out_channels=(24, 24),
        decoder_block_out_channels=(32, 32),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(2, 1),
        latent_channels=LATENT_CHANNELS,
    )


def make_unet() -> UNet2DConditionModel:
    """The U-Net, of random weights: SDXL's blocks, with one transformer layer in each."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=UNET_WIDTHS,
        layers_per_block=2,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 2, 4),  # type: ignore[arg-type]
        norm_num_groups=8,
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + TIME_ID_WIDTH * len(TIME_IDS),
    )


def make_scheduler() -> EulerAncestralDiscreteScheduler:
    """SDXL-Turbo's scheduler, predicting v."""
    return EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def make_pipeline(
    tokenizer: CLIPTokenizer,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    vae: AutoencoderTiny,
    unet: UNet2DConditionModel,
) -> StableDiffusionXLPipeline:
    """The parts as one pipeline."""
    pipeline = StableDiffusionXLPipeline(
        vae=vae,  # type: ignore[arg-type]
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),  # type: ignore[arg-type]
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def other_blocks(unet: UNet2DConditionModel) -> list[str]:
    """Names of the seven cross-attention blocks that are not `CARRYING`."""
    names = [name for name, _ in unet.named_modules() if name.split(".")[-2:-1] == ["attentions"]]
    return [name for name in names if name not in CARRYING]


@torch.no_grad()
def idle(unet: UNet2DConditionModel, names: list[str]) -> None:
    """Make blocks the identity: a transformer whose last projection is zero adds nothing."""
    for name in names:
        projection = unet.get_submodule(name).get_submodule("proj_out")
        for parameter in projection.parameters():
            parameter.zero_()
