"""Training the U-Net to draw a caption's scene in one step, block by block.

The target of a caption and a noise is the one scene that they mean together (`briefs.settle`), so
drawing in one step is plain regression of that scene's latents: no teacher, no adversary. A fifth
of the last phase's examples are later steps of a schedule of two to four, from a noisy version of
the scene, so that more steps work too.

Left to itself such a network takes noise for a nuisance, and does everything in the first block
that reads the caption. Here it first learns to see what the noise says, and then its blocks are
opened one after another, each on scenes with more detail, what lies before it held fast:

    noise     nothing is drawn: a temporary head asks the middle's output, at every place, for the
              scores of the noise that settle what captions leave open (`briefs.scores`)
    layout    down.2.1 and mid.0 read the caption; every thing is a plain disc
    shape     up.0.0 opens; things have their shapes; everything before the up path is fixed
    texture   up.0.1 opens; things have their textures; up.0.0's attention is fixed too
    joint     everything is trained together

While the middle is trained the head goes on asking. In the last phase a second temporary head asks
the last of the four blocks for the scene's factors: where a caption leaves one open, the average of
its values is a place that the regression of latents alone is slow to leave. The seven other
cross-attention blocks are the identity throughout. What each block does is therefore partly made by
this order, and no evidence about SDXL-Turbo.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer

from probe.adapters import ForwardStopped
from probe.toyturbo.briefs import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    N_SCORES,
    PATCH,
    describe,
    draw_briefs,
    scores,
    settle,
)
from probe.toyturbo.fitting import seeded
from probe.toyturbo.parts import (
    CARRYING,
    MAX_TOKENS,
    TEXT_WIDTHS,
    TIME_IDS,
    UNET_WIDTHS,
    make_scheduler,
    other_blocks,
)
from probe.toyturbo.text_training import TextEncoders, tokenize
from probe.toyturbo.vae_training import to_pixels
from probe.toyturbo.world import (
    ABSENT,
    FACTORS,
    FULL,
    SCENE_FACTORS,
    THING_FACTORS,
    Detail,
    Scenes,
    object_mask,
    render,
)

FIRST_TIMESTEP = 999
LATER_TIMESTEPS = (749, 666, 499, 332, 249)
"""The timesteps that schedules of one to four steps pass through."""
VALUES = (*THING_FACTORS, *SCENE_FACTORS)
"""What a scene's values at a place are of."""
SIZES = [len(FACTORS[name]) for name in VALUES]
THING_WEIGHT = 5.0
"""How much more an error counts where a thing is."""
CHANNEL_WEIGHTS = (1.0, 1.0, 1.0, 0.3)
"""What an error counts in each latent channel; the last one only sharpens edges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of the training."""

    name: str
    """For the checkpoint and the progress bar."""
    closed: tuple[str, ...]
    """Carrying blocks that are still the identity."""
    fixed: tuple[str, ...]
    """Names of the parameters (their beginnings) that are not trained."""
    detail: Detail
    """What the scenes show."""
    later: float
    """Share of the examples that are later steps."""
    gaps: float
    """Share of the captions that leave something open."""
    asking: float
    """Weight of the loss of the noise's scores."""
    telling: float = 0.0
    """Weight of the loss of the scene's factors."""


BEFORE_UP = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")
PHASES = (
    Phase(
        name="layout",
        closed=CARRYING[2:],
        fixed=(),
        detail=Detail(shapes=False, textures=False),
        later=0.0,
        gaps=0.5,
        asking=0.1,
    ),
    Phase(
        name="shape",
        closed=CARRYING[3:],
        fixed=BEFORE_UP,
        detail=Detail(textures=False),
        later=0.0,
        gaps=0.5,
        asking=0.0,
    ),
    Phase(
        name="texture",
        closed=(),
        fixed=(*BEFORE_UP, CARRYING[2]),
        detail=FULL,
        later=0.0,
        gaps=0.5,
        asking=0.0,
    ),
    Phase(
        name="joint",
        closed=(),
        fixed=(),
        detail=FULL,
        later=0.2,
        gaps=0.8,
        asking=0.05,
        telling=0.1,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A batch to learn from."""

    noisy: Float[Tensor, "b 4 32 32"]
    """What the U-Net is given."""
    latents: Float[Tensor, "b 4 32 32"]
    """The scenes' latents."""
    timesteps: Int[Tensor, " b"]
    """Where in the schedule."""
    weight: Float[Tensor, "b 1 32 32"]
    """How much an error counts."""
    values: Int[Tensor, "b 6 8 8"]
    """At each place, the scene's `VALUES`; `ABSENT` where there is no thing."""
    scores: Float[Tensor, "b 32 8 8"]
    """At each place, the scores of its cell's noise, and of all cells' together."""
    context: Float[Tensor, "b t c"]
    """The captions, token by token."""
    pooled: Float[Tensor, "b p"]
    """The captions as one vector."""


@dataclass(frozen=True, slots=True)
class Teaching:
    """What the U-Net's examples are made with."""

    tokenizer: CLIPTokenizer
    encoders: TextEncoders
    vae: AutoencoderTiny
    device: torch.device


class Answers(NamedTuple):
    """What the U-Net and its heads say of a batch; the first two are None where nothing was to be
    painted."""

    latents: Float[Tensor, "b 4 32 32"] | None
    """The predicted latents."""
    factors: Float[Tensor, "b v 8 8"] | None
    """At each place, logits of a thing's presence and of every factor's values."""
    scores: Float[Tensor, "b 32 8 8"]
    """At each place, the scores of the noise."""


class Scaffold(nn.Module):
    """The U-Net with the head that asks its middle for the noise's scores, and the one that asks
    the last of its four blocks for the scene's factors."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.head = nn.Conv2d(UNET_WIDTHS[-1], 2 * N_SCORES, 1)
        self.teller = nn.Conv2d(UNET_WIDTHS[-1], 1 + sum(SIZES), 1)

    def forward(self, drawn: "Drawn", *, paint: bool = True) -> Answers:
        """What is said of a batch; the pass stops in the middle where nothing is to be painted."""
        seen: dict[str, Tensor] = {}

        def keep_middle(_: nn.Module, __: Any, given: Tensor) -> None:
            seen["middle"] = given
            if not paint:
                raise ForwardStopped

        def keep_last(_: nn.Module, __: Any, given: tuple[Tensor]) -> None:
            seen["last"] = given[0]

        latents = None
        handles = [
            self.unet.get_submodule("mid_block").register_forward_hook(keep_middle),
            self.unet.get_submodule(CARRYING[-1]).register_forward_hook(keep_last),
        ]
        try:
            with contextlib.suppress(ForwardStopped):
                latents = predicted_latents(self.unet, drawn)
        finally:
            for handle in handles:
                handle.remove()
        factors = self.teller(seen["last"]) if paint else None
        return Answers(latents, factors, self.head(seen["middle"]))


def sigma_of(timesteps: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
    """The noise level of timesteps: sqrt((1 - a) / a), a the scheduler's cumulative product."""
    product = make_scheduler().alphas_cumprod[timesteps.cpu()]
    return ((1 - product) / product).sqrt().to(timesteps.device)[:, None, None, None]


def predicted_latents(unet: UNet2DConditionModel, drawn: Drawn) -> Float[Tensor, "b 4 32 32"]:
    """The scene that one step of the U-Net makes of a noisy one (v-prediction)."""
    sigma = sigma_of(drawn.timesteps)
    shrunk = drawn.noisy / (sigma.square() + 1).sqrt()
    ids = torch.tensor(TIME_IDS, dtype=torch.float, device=sigma.device)
    conditions = {"text_embeds": drawn.pooled, "time_ids": ids.expand(len(sigma), -1)}
    v = unet(
        shrunk, drawn.timesteps, drawn.context, added_cond_kwargs=conditions, return_dict=False
    )[0].float()
    return drawn.noisy / (sigma.square() + 1) - v * sigma / (sigma.square() + 1).sqrt()


def noise_loss(scaffold: Scaffold, teaching: Teaching, step: int, batch: int, seed: int) -> Tensor:
    """Mean squared error of the scores alone, with no caption to read."""
    noise = torch.randn(*latent_shape(batch), generator=seeded(seed, step)).to(teaching.device)
    timesteps = torch.full((batch,), FIRST_TIMESTEP, device=teaching.device)
    drawn = Drawn(
        noisy=noise * sigma_of(timesteps),
        latents=torch.zeros_like(noise),
        timesteps=timesteps,
        weight=torch.ones_like(noise[:, :1]),
        values=torch.full((batch, len(VALUES), *2 * [LATENT_SIDE // PATCH]), ABSENT),
        scores=_by_place(scores(noise)),
        context=noise.new_zeros(batch, MAX_TOKENS, sum(TEXT_WIDTHS)),
        pooled=noise.new_zeros(batch, TEXT_WIDTHS[1]),
    )
    with torch.autocast(teaching.device.type, torch.bfloat16):
        said = scaffold(drawn, paint=False)
    return (said.scores - drawn.scores).float().square().mean()


def unet_loss(
    scaffold: Scaffold, teaching: Teaching, phase: Phase, step: int, batch: int, seed: int
) -> Tensor:
    """Squared error of the predicted latents, with things weighted up, and the heads' losses."""
    drawn = draw_examples(teaching, phase, batch, seeded(seed, step))
    with torch.autocast(teaching.device.type, torch.bfloat16):
        said: Answers = scaffold(drawn)
    assert said.latents is not None and said.factors is not None, "it was to paint"
    weight = drawn.weight * torch.tensor(CHANNEL_WEIGHTS, device=said.latents.device)[:, None, None]
    loss = (weight * (said.latents - drawn.latents).square()).sum() / weight.sum()
    # Later steps start from noise that says nothing: the scene itself shines through.
    first = drawn.timesteps == FIRST_TIMESTEP
    loss = loss + phase.asking * (said.scores - drawn.scores)[first].float().square().mean()
    if phase.telling and first.any():
        loss = loss + phase.telling * telling_loss(said.factors[first].float(), drawn.values[first])
    return loss


def telling_loss(
    answers: Float[Tensor, "b v 8 8"], values: Int[Tensor, "b 6 8 8"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of a thing's presence and of every factor, where it has a value."""
    present, *logits = answers.split([1, *SIZES], dim=1)
    there = (values[:, 0] != ABSENT).float()
    losses = [functional.binary_cross_entropy_with_logits(present[:, 0], there)]
    for i, of in enumerate(logits):
        losses.append(functional.cross_entropy(of, values[:, i], ignore_index=ABSENT))
    return torch.stack(losses).mean()


@torch.no_grad()
def draw_examples(teaching: Teaching, phase: Phase, batch: int, generator: Generator) -> Drawn:
    """Captions, noises, and the scenes that they mean."""
    brief = draw_briefs(batch, generator, gaps=phase.gaps, empty=0.04)
    noise = torch.randn(*latent_shape(batch), generator=generator)
    scenes = settle(brief, noise)
    tokens = tokenize(teaching.tokenizer, describe(brief)).to(teaching.device)
    context, pooled = teaching.encoders(tokens)
    pixels = to_pixels(render(scenes, phase.detail)).to(teaching.device)
    latents = teaching.vae.encoder(pixels)
    mask = functional.avg_pool2d(object_mask(scenes, phase.detail), 2)[:, None]
    timesteps, start = _timesteps(batch, phase.later, generator)
    # A first step starts from noise alone, as the pipeline does: nothing of the scene is in it.
    level = sigma_of(timesteps).to(teaching.device)
    fresh = noise.to(teaching.device) * level
    noisy = torch.where(start.to(teaching.device), fresh, latents + fresh)
    return Drawn(
        noisy=noisy,
        latents=latents,
        timesteps=timesteps.to(teaching.device),
        weight=(1 + THING_WEIGHT * mask).to(teaching.device),
        values=values_by_place(scenes).to(teaching.device),
        scores=_by_place(scores(noise)).to(teaching.device),
        context=context,
        pooled=pooled,
    )


def _by_place(of_cell: Float[Tensor, "b 4 16"]) -> Float[Tensor, "b 32 8 8"]:
    """At all places, the scores of their cell and of the four cells together."""
    together = of_cell.sum(1, keepdim=True).expand(-1, 4, -1) / 2
    both = torch.cat([of_cell, together], dim=2).transpose(1, 2).unflatten(2, (2, 2))
    return functional.interpolate(both, scale_factor=LATENT_SIDE // PATCH // 2)


def values_by_place(scenes: Scenes) -> Int[Tensor, "b 6 8 8"]:
    """At all places, `VALUES` of their cell's thing and of the scene."""
    things = scenes.things.transpose(1, 2).unflatten(2, (2, 2))
    half = LATENT_SIDE // PATCH // 2
    of_things = things.repeat_interleave(half, 2).repeat_interleave(half, 3)
    of_scene = scenes.surround[:, :, None, None].expand(-1, -1, 2 * half, 2 * half)
    return torch.cat([of_things, of_scene], dim=1)


def _timesteps(batch: int, later: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Timesteps, and which of them are first steps [b, 1, 1, 1]."""
    chosen = torch.randint(len(LATER_TIMESTEPS), (batch,), generator=generator)
    first = torch.rand(batch, generator=generator) >= later
    timesteps = torch.where(first, FIRST_TIMESTEP, torch.tensor(LATER_TIMESTEPS)[chosen])
    return timesteps, first[:, None, None, None]


def latent_shape(batch: int) -> tuple[int, int, int, int]:
    """The shape of a batch of latents."""
    return batch, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE


def prepare_noise(scaffold: Scaffold) -> None:
    """Train the head and what lies before the up path, but for blocks that read captions."""
    for name, parameter in scaffold.unet.named_parameters():
        reads = name.startswith((*CARRYING, *other_blocks(scaffold.unet)))
        parameter.requires_grad_(name.startswith(BEFORE_UP) and not reads)
    scaffold.head.requires_grad_(True)
    scaffold.teller.requires_grad_(False)


def prepare_phase(scaffold: Scaffold, phase: Phase) -> None:
    """Say which parameters are trained: not those fixed, nor those of blocks that are closed."""
    still = (*phase.fixed, *phase.closed, *other_blocks(scaffold.unet))
    for name, parameter in scaffold.unet.named_parameters():
        parameter.requires_grad_(not name.startswith(still))
    scaffold.head.requires_grad_(phase.asking > 0)
    scaffold.teller.requires_grad_(phase.telling > 0)


@contextlib.contextmanager
def bypassing(unet: UNet2DConditionModel, names: tuple[str, ...] | list[str]) -> Iterator[None]:
    """Leave blocks out that are the identity anyway, and use attention that is quick to train."""

    def through(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: Any = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        return (hidden_states,)

    usual = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor())
    blocks = [unet.get_submodule(name) for name in names]
    for block in blocks:
        block.forward = through
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
        unet.set_attn_processor(usual)
