"""Training the U-Net to draw a caption's scene in one step, block by block.

The target of a caption and a noise is the one scene that they mean together (`briefs.settle`), so
drawing in one step is plain regression of that scene's latents: no teacher, no adversary. A fifth
of the last phase's examples are later steps of a schedule of two to four, from a noisy version of
the scene, so that more steps work too.

Left to itself such a network takes noise for a nuisance, and does everything in the first block
that reads the caption. Here it first learns to see what the noise says, then its blocks are opened
one after another, each on scenes with more detail, what lies before it held fast, and then it
learns to use the noise:

    noise     nothing is drawn: a temporary head asks the middle's output, at every place, for the
              scores of the noise that settle what captions leave open (`briefs.scores`)
    layout    down.2.1 and mid.0 read the caption; every thing is a plain disc
    shape     up.0.0 opens; things have their shapes; everything before the up path is fixed
    texture   up.0.1 opens; things have their textures; up.0.0's attention is fixed too
    gaps      nothing is drawn: what comes out of the four blocks for a caption with gaps is pulled
              towards what came out of them, before this phase, for the caption without gaps that
              the noise makes of it (`briefs.complete`); what paints it is fixed
    joint     everything is trained together, and still pulled

The pull is there because the average of a factor's values is a place that the regression of latents
leaves slowly or never. While the middle is trained the head goes on asking. The seven other
cross-attention blocks are the identity throughout. What each block does is therefore partly made by
this training, and no evidence about SDXL-Turbo.
"""

import contextlib
from collections.abc import Callable, Iterator
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
    complete,
    describe,
    draw_briefs,
    scene_of,
    scores,
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
from probe.toyturbo.world import FULL, Detail, object_mask, render

FIRST_TIMESTEP = 999
LATER_TIMESTEPS = (749, 666, 499, 332, 249)
"""The timesteps that schedules of one to four steps pass through."""
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
    alone: float = 0.0
    """Share of these that leave one factor open and no other."""
    matching: float = 0.0
    """Weight of the distance from what the caption without gaps led to before the phase."""
    paints: bool = True
    """Whether anything is drawn."""


MIDDLE = "mid_block"
BEFORE_UP = ("conv_in", "time_embedding", "add_embedding", "down_blocks", MIDDLE)
PAINTING = (
    "up_blocks.0.resnets.2",
    "up_blocks.0.upsamplers",
    "up_blocks.1",
    "up_blocks.2",
    "conv_norm_out",
    "conv_out",
)
"""What lies after the four blocks."""
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
        name="gaps",
        closed=(),
        fixed=PAINTING,
        detail=FULL,
        later=0.0,
        gaps=0.8,
        asking=0.05,
        alone=0.7,
        matching=1.0,
        paints=False,
    ),
    Phase(
        name="joint",
        closed=(),
        fixed=(),
        detail=FULL,
        later=0.2,
        gaps=0.6,
        asking=0.05,
        alone=0.5,
        matching=0.1,
    ),
)


class Read(NamedTuple):
    """Captions as the text encoders read them."""

    context: Float[Tensor, "b t c"]
    """Token by token."""
    pooled: Float[Tensor, "b p"]
    """As one vector."""


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
    scores: Float[Tensor, "b 32 8 8"]
    """At each place, the scores of its cell's noise, and of all cells' together."""
    said: Read
    """The captions."""
    meant: Read
    """The captions with their gaps filled from the noise."""


@dataclass(frozen=True, slots=True)
class Teaching:
    """What the U-Net's examples are made with."""

    tokenizer: CLIPTokenizer
    encoders: TextEncoders
    vae: AutoencoderTiny
    device: torch.device


class Answers(NamedTuple):
    """What the U-Net and its head say of a batch."""

    latents: Float[Tensor, "b 4 32 32"] | None
    """The predicted latents; None where the pass stopped before."""
    blocks: list[Float[Tensor, "b d 8 8"]]
    """What comes out of the four blocks; of those that the pass came to."""
    scores: Float[Tensor, "b 32 8 8"]
    """At each place, the scores of the noise."""


class Scaffold(nn.Module):
    """The U-Net with the head that asks its middle for the noise's scores."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.head = nn.Conv2d(UNET_WIDTHS[-1], 2 * N_SCORES, 1)

    def forward(self, drawn: Drawn, read: Read, *, until: str = "") -> Answers:
        """What is said of a batch for captions; the pass stops after the module `until`."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, __: Any, given: Any) -> None:
                seen[name] = given if isinstance(given, Tensor) else given[0]
                if name == until:
                    raise ForwardStopped

            return hook

        latents = None
        modules = {name: self.unet.get_submodule(name) for name in (MIDDLE, *CARRYING)}
        handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
        try:
            with contextlib.suppress(ForwardStopped):
                latents = predicted_latents(self.unet, drawn, read)
        finally:
            for handle in handles:
                handle.remove()
        blocks = [seen[name] for name in CARRYING if name in seen]
        return Answers(latents, blocks, self.head(seen[MIDDLE]))


def sigma_of(timesteps: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
    """The noise level of timesteps: sqrt((1 - a) / a), a the scheduler's cumulative product."""
    product = make_scheduler().alphas_cumprod[timesteps.cpu()]
    return ((1 - product) / product).sqrt().to(timesteps.device)[:, None, None, None]


def predicted_latents(
    unet: UNet2DConditionModel, drawn: Drawn, read: Read
) -> Float[Tensor, "b 4 32 32"]:
    """The scene that one step of the U-Net makes of a noisy one for captions (v-prediction)."""
    sigma = sigma_of(drawn.timesteps)
    shrunk = drawn.noisy / (sigma.square() + 1).sqrt()
    ids = torch.tensor(TIME_IDS, dtype=torch.float, device=sigma.device)
    conditions = {"text_embeds": read.pooled, "time_ids": ids.expand(len(sigma), -1)}
    v = unet(
        shrunk, drawn.timesteps, read.context, added_cond_kwargs=conditions, return_dict=False
    )[0].float()
    return drawn.noisy / (sigma.square() + 1) - v * sigma / (sigma.square() + 1).sqrt()


def noise_loss(scaffold: Scaffold, teaching: Teaching, step: int, batch: int, seed: int) -> Tensor:
    """Mean squared error of the scores alone, with no caption to read."""
    noise = torch.randn(*latent_shape(batch), generator=seeded(seed, step)).to(teaching.device)
    timesteps = torch.full((batch,), FIRST_TIMESTEP, device=teaching.device)
    nothing = Read(
        noise.new_zeros(batch, MAX_TOKENS, sum(TEXT_WIDTHS)), noise.new_zeros(batch, TEXT_WIDTHS[1])
    )
    drawn = Drawn(
        noisy=noise * sigma_of(timesteps),
        latents=torch.zeros_like(noise),
        timesteps=timesteps,
        weight=torch.ones_like(noise[:, :1]),
        scores=_by_place(scores(noise)),
        said=nothing,
        meant=nothing,
    )
    with torch.autocast(teaching.device.type, torch.bfloat16):
        said = scaffold(drawn, drawn.said, until=MIDDLE)
    return (said.scores - drawn.scores).float().square().mean()


def unet_loss(
    scaffold: Scaffold,
    before: Scaffold,
    teaching: Teaching,
    phase: Phase,
    step: int,
    batch: int,
    seed: int,
) -> Tensor:
    """Squared error of the predicted latents, with things weighted up; the head's loss, and the
    distance from what the network `before` the phase has where the caption is complete."""
    drawn = draw_examples(teaching, phase, batch, seeded(seed, step))
    until = "" if phase.paints else CARRYING[-1]
    with torch.autocast(teaching.device.type, torch.bfloat16):
        said: Answers = scaffold(drawn, drawn.said, until=until)
    # Later steps start from noise that says nothing: the scene itself shines through.
    first = drawn.timesteps == FIRST_TIMESTEP
    loss = phase.asking * (said.scores - drawn.scores)[first].float().square().mean()
    if said.latents is not None:
        channels = torch.tensor(CHANNEL_WEIGHTS, device=teaching.device)[:, None, None]
        weight = drawn.weight * channels
        loss = loss + (weight * (said.latents - drawn.latents).square()).sum() / weight.sum()
    if phase.matching:
        with torch.no_grad(), torch.autocast(teaching.device.type, torch.bfloat16):
            meant: Answers = before(drawn, drawn.meant, until=CARRYING[-1])
        pairs = zip(said.blocks, meant.blocks, strict=True)
        apart = [distance(one[first], other[first]) for one, other in pairs]
        loss = loss + phase.matching * torch.stack(apart).mean()
    return loss


def distance(said: Float[Tensor, "b d h w"], meant: Float[Tensor, "b d h w"]) -> Float[Tensor, ""]:
    """Mean Euclidean distance of an image, each channel over its deviation in what was meant.

    It is not squared, so that a factor that takes little room there counts as one that takes much.
    """
    spread = meant.float().var((0, 2, 3), keepdim=True) + 1e-6
    squared = ((said.float() - meant.float()).square() / spread).mean((1, 2, 3))
    return (squared + 1e-4).sqrt().mean()


@torch.no_grad()
def draw_examples(teaching: Teaching, phase: Phase, batch: int, generator: Generator) -> Drawn:
    """Captions, noises, and the scenes that they mean."""
    brief = draw_briefs(batch, generator, gaps=phase.gaps, alone=phase.alone, empty=0.04)
    noise = torch.randn(*latent_shape(batch), generator=generator)
    whole = complete(brief, noise)
    scenes = scene_of(whole)
    said, meant = (
        Read(*teaching.encoders(tokenize(teaching.tokenizer, describe(of)).to(teaching.device)))
        for of in (brief, whole)
    )
    latents = torch.zeros_like(noise, device=teaching.device)
    if phase.paints:
        latents = teaching.vae.encoder(to_pixels(render(scenes, phase.detail)).to(teaching.device))
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
        scores=_by_place(scores(noise)).to(teaching.device),
        said=said,
        meant=meant,
    )


def _by_place(of_cell: Float[Tensor, "b 4 16"]) -> Float[Tensor, "b 32 8 8"]:
    """At all places, the scores of their cell and of the four cells together."""
    together = of_cell.sum(1, keepdim=True).expand(-1, 4, -1) / 2
    both = torch.cat([of_cell, together], dim=2).transpose(1, 2).unflatten(2, (2, 2))
    return functional.interpolate(both, scale_factor=LATENT_SIDE // PATCH // 2)


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
    reading = (*CARRYING, *other_blocks(scaffold.unet))
    for name, parameter in scaffold.unet.named_parameters():
        parameter.requires_grad_(name.startswith(BEFORE_UP) and not name.startswith(reading))
    scaffold.head.requires_grad_(True)


def prepare_phase(scaffold: Scaffold, phase: Phase) -> None:
    """Say which parameters are trained: not those fixed, nor those of blocks that are closed."""
    still = (*phase.fixed, *phase.closed, *other_blocks(scaffold.unet))
    for name, parameter in scaffold.unet.named_parameters():
        parameter.requires_grad_(not name.startswith(still))
    scaffold.head.requires_grad_(phase.asking > 0)


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
