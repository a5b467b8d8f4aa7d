"""The adapter for text-to-image U-Nets: Stable Diffusion XL's pipeline and its relatives.

An image is a sequence of its places: one pass of the U-Net over one image is a row of the batch,
and the places of a feature map, row by row (`place = y * width + x`), are its positions. A site's
tensor is therefore `[b, t, d]`, as of text.

A block's update is what its last projection gives, before the block adds its input: so that input
plus update is the output bit for bit, which `output - input`, rounded twice, is not. (Cf. Surkov et
al. 2024, 2410.22366, who take the difference; the two differ by the rounding alone.)

With guidance above 1 the pipeline runs every pass on the empty prompt and on the prompt: of `n`
images rows 0 to n - 1 are unconditional and rows n to 2 n - 1 conditional. While an image is drawn
`model.step` and `model.conditional_rows` tell a hook where it is.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from probe.adapters import (
    ForwardStopped,
    HookSide,
    Moment,
    floats_of,
    hidden_input,
    module_at,
    with_floats,
)
from probe.errors import UserError
from probe.sites import Site, named_sites

Rows = Literal["conditional", "unconditional", "both"]
TRY_OUT_PIXELS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawConfig:
    """How images are drawn; the defaults are SDXL-Turbo's published ones."""

    steps: int = 1
    """Denoising steps."""
    guidance: float = 0.0
    """Scale of classifier-free guidance; at most 1 is without."""
    height: int | None = None
    """Pixels, a multiple of 8; None for the model's own."""
    width: int | None = None
    """Pixels, a multiple of 8; None for the model's own."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"an image needs at least 1 step, got {self.steps}.")
        if not 0 <= self.guidance < float("inf"):
            raise UserError(f"guidance must be 0 (none) or more, got {self.guidance}.")
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and (size < 8 or size % 8):
                raise UserError(f"{name} must be a multiple of 8 pixels, got {size}.")

    @property
    def guided(self) -> bool:
        """Whether each pass has unconditional rows too."""
        return self.guidance > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """Images and what they were decoded from, on the CPU."""

    images: UInt8[Tensor, "b h w 3"]
    """Red, green and blue, 0 to 255."""
    latents: Float[Tensor, "b c lh lw"]
    """The last step's latents, in the model's number format."""


@dataclass(slots=True, kw_only=True)
class Drawing:
    """The images being drawn."""

    config: DrawConfig
    """How."""
    n_images: int
    """How many."""
    step: int = 0
    """The step that the U-Net is at, counted from 0; `config.steps` while images are decoded."""
    latents: Tensor | None = None
    """As the newest step left them."""


class DiffusionModel:
    """A text-to-image pipeline with named sites.

    Only its `StableDiffusionXLPipeline` knows of prompts, schedule and decoding: it is called as
    its users call it, and this class hangs hooks into it.
    """

    def __init__(self, spec: str, pipeline: Any, random_weights: int | None = None) -> None:
        """Wrap a loaded pipeline.

        Args:
            spec: the name it was asked for by.
            pipeline: a `StableDiffusionXLPipeline`; its parts are put into evaluation mode. (Not
                imported here for its name alone: that takes long.)
            random_weights: the seed, where the U-Net's weights are fresh random ones.

        Raises `UserError` where the scheduler takes several passes a step.
        """
        if pipeline.scheduler.order != 1:
            raise UserError(
                f"the scheduler of {spec}, {type(pipeline.scheduler).__name__}, runs the U-Net "
                "more than once a step; give the pipeline one of first order, such as "
                "EulerAncestralDiscreteScheduler."
            )
        self.spec = spec
        self.pipeline = pipeline
        self.random_weights = random_weights
        self.parts = nn.ModuleDict(
            {
                name: part.eval()
                for name, part in pipeline.components.items()
                if isinstance(part, nn.Module)
            }
        )
        self.drawing: Drawing | None = None
        pipeline.set_progress_bar_config(disable=True)

    # ------------------------------------------------------------------------ what it is

    @property
    def unet(self) -> Any:
        """The denoising network, a `UNet2DConditionModel`."""
        return self.pipeline.unet

    @property
    def net(self) -> nn.Module:
        """What runs once a pass: the U-Net."""
        return self.pipeline.unet

    @property
    def device(self) -> torch.device:
        """Where the U-Net's weights are."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's number format."""
        return next(self.unet.parameters()).dtype

    @property
    def n_train_steps(self) -> int:
        """Steps of the schedule that the model was trained with: no more can be asked for."""
        return self.pipeline.scheduler.config.num_train_timesteps

    def image_size(self, config: DrawConfig) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        own = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return config.height or own, config.width or own

    def truncated(self, prompts: Sequence[str]) -> Bool[Tensor, " b"]:
        """Which prompts are longer than the tokenizers read: their ends say nothing."""
        longer = torch.zeros(len(prompts), dtype=torch.bool)
        for tokenizer in self._tokenizers():
            # Some versions warn of every long text; how many there are is the caller's to say.
            ids = tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]
            longer |= torch.tensor([len(row) > tokenizer.model_max_length for row in ids])
        return longer

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt that are read, start and end included: CLIP's 77."""
        return min(one.model_max_length for one in self._tokenizers())

    def _tokenizers(self) -> list[Any]:
        both = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        return [tokenizer for tokenizer in both if tokenizer is not None]

    # ---------------------------------------------------------------------------- sites

    def sites(self) -> list[Site]:
        """The update of every attention block, in the order in which a pass comes by them."""
        blocks = {"down": self.unet.down_blocks, "up": self.unet.up_blocks}
        names = {
            end: [
                f"{end}.{b}.{a}"
                for b, block in enumerate(list_of)
                for a in range(len(getattr(block, "attentions", ())))
            ]
            for end, list_of in blocks.items()
        }
        n_middle = len(getattr(self.unet.mid_block, "attentions", ()))
        middle = [f"mid.{a}" for a in range(n_middle)]
        paths = names["down"] + middle + names["up"]
        return [Site(kind="block", path=path, tensor="update") for path in paths]

    def hook_point(self, site: Site) -> tuple[nn.Module, HookSide]:
        """The module that `site`'s tensor passes by, and on which side of it.

        Raises `UserError` where the model has no such block or module.
        """
        if site.kind == "module":
            return module_at(self.parts, site, self.spec), site.tensor
        block = self.block(site)
        if site.tensor == "update":
            return block.get_submodule("proj_out"), "output"
        return block, site.tensor

    def block(self, site: Site) -> nn.Module:
        """The `Transformer2DModel` that a block site means. Raises `UserError` for none."""
        known = self.sites()
        if site.kind != "block" or site.path not in [one.path for one in known]:
            raise UserError(
                f"site {site} is not in {self.spec}, an image model, which has "
                f"{named_sites(known)} and any module:<dotted path>."
            )
        return self.unet.get_submodule(block_path(site))

    def grid(self, site: Site, config: DrawConfig | None = None) -> tuple[int, int]:
        """Height and width of a site's feature map for images of the config's size.

        A block's is known without running; that of another module is looked for. Raises `UserError`
        for a site that is not in the model or sees no feature map.
        """
        if site.kind == "module":
            return self._grid_of_module(site, config)
        self.block(site)
        assert site.path is not None
        end, *numbers = site.path.split(".")
        depth = len(self.unet.down_blocks) - 1
        halvings = {"down": int(numbers[0]), "mid": depth, "up": depth - int(numbers[0])}[end]
        height, width = self.image_size(config or DrawConfig())
        scale = self.pipeline.vae_scale_factor
        return -(-(height // scale) // 2**halvings), -(-(width // scale) // 2**halvings)

    def _grid_of_module(self, site: Site, config: DrawConfig | None) -> tuple[int, int]:
        module, side = self.hook_point(site)
        for block in self.sites():
            if f"{site.path}.".startswith(f"unet.{block_path(block)}."):
                return self.grid(block, config)
        shapes: list[tuple[int, ...]] = []

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            raw = hidden_input(args, kwargs) if side == "input" else out
            shapes.append(tuple(floats_of(site, raw).shape))
            raise ForwardStopped

        handle = module.register_forward_hook(look, with_kwargs=True)
        try:
            self.run([""], [0], config)
        finally:
            handle.remove()
        if not shapes or len(shapes[0]) != 4:
            raise UserError(
                f"site {site} gives {list(shapes[0]) if shapes else 'nothing'} where a feature map "
                "[images, channels, height, width] was wanted; choose a module of the U-Net."
            )
        return shapes[0][2], shapes[0][3]

    def read(self, site: Site, raw: Any) -> Float[Tensor, "*lead d"]:
        """The site's tensor out of what its module took or gave; a feature map as `[b, t, d]`.

        Raises `UserError` where that is no tensor of floats.
        """
        tensor = floats_of(site, raw)
        return tensor.flatten(2).transpose(1, 2) if tensor.ndim == 4 else tensor

    def write(self, site: Site, raw: Any, new: Tensor) -> Any:
        """What the module took or gave, with the site's tensor replaced by `new`."""
        old = floats_of(site, raw)
        if old.ndim == 4:
            new = new.transpose(1, 2).unflatten(2, old.shape[2:]).contiguous()
        return with_floats(raw, new)

    # -------------------------------------------------------------------------- drawing

    @property
    def step(self) -> int:
        """The step that the U-Net is at, counted from 0."""
        return 0 if self.drawing is None else self.drawing.step

    @property
    def in_last_pass(self) -> bool:
        """Whether the U-Net is at the last step (or runs outside a drawing)."""
        return self.drawing is None or self.drawing.step >= self.drawing.config.steps - 1

    @property
    def conditional_rows(self) -> slice:
        """The rows of a pass that read the prompts; the others read nothing."""
        return self.rows("conditional")

    def moment(self, arguments: dict[str, Any]) -> Moment:
        """The step that the U-Net is at, and how many of its rows are unconditional."""
        return Moment(step=self.step, n_unconditional=self.conditional_rows.start or 0)

    def rows(self, which: Rows) -> slice:
        """The rows of a pass that read the prompts, that read nothing, or all.

        Raises `UserError` for unconditional rows where the images are drawn without guidance.
        """
        if self.drawing is None or which == "both":
            return slice(None)
        guided, n = self.drawing.config.guided, self.drawing.n_images
        if which == "unconditional" and not guided:
            raise UserError(
                "without guidance a pass has no unconditional row; ask for guidance above 1 or for "
                "the conditional row."
            )
        return slice(n, 2 * n) if guided and which == "conditional" else slice(0, n)

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], config: DrawConfig | None = None
    ) -> Generated:
        """Draw one image a prompt.

        Args:
            prompts: what to draw.
            seeds: one a prompt; the noise of each image is drawn on the CPU by a generator of its
                own, so that any image can be drawn again alone.
            config: how; None for the defaults.

        Raises `UserError` where there is nothing to draw, the seeds do not fit the prompts, or
        there are more steps than the model's schedule has.
        """
        drawn = self.run(prompts, seeds, config)
        assert drawn is not None, "no capture is active, so the drawing ran to its end"
        return drawn

    def run(
        self, prompts: Sequence[str], seeds: Sequence[int], config: DrawConfig | None = None
    ) -> Generated | None:
        """As `generate`; None where a capture stopped the last pass on purpose."""
        config = config or DrawConfig()
        self._check(prompts, seeds, config)
        height, width = self.image_size(config)
        with self._drawing(config, len(prompts)) as drawing, contextlib.suppress(ForwardStopped):
            images = self.pipeline(
                prompt=list(prompts),
                height=height,
                width=width,
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="pt",
                callback_on_step_end=_following(drawing),
            ).images
            assert drawing.latents is not None
            pixels = (images.float() * 255).round().to(torch.uint8)
            return Generated(
                images=pixels.permute(0, 2, 3, 1).cpu().contiguous(), latents=drawing.latents.cpu()
            )
        return None

    def try_out(self) -> None:
        """Draw a small image of nothing."""
        size = min(TRY_OUT_PIXELS, *self.image_size(DrawConfig()))
        self.run([""], [0], DrawConfig(height=size, width=size))

    @contextlib.contextmanager
    def _drawing(self, config: DrawConfig, n_images: int) -> Iterator[Drawing]:
        self.drawing = Drawing(config=config, n_images=n_images)
        try:
            yield self.drawing
        finally:
            self.drawing = None

    def _check(self, prompts: Sequence[str], seeds: Sequence[int], config: DrawConfig) -> None:
        if isinstance(prompts, str) or not prompts or len(prompts) != len(seeds):
            raise UserError(
                f"one seed for each prompt was wanted, and at least one prompt; got "
                f"{len(prompts)} prompts and {len(seeds)} seeds."
            )
        self.check_steps(config)

    def check_steps(self, config: DrawConfig) -> None:
        """Raise `UserError` where there are more steps than the model's schedule has."""
        if config.steps > self.n_train_steps:
            raise UserError(
                f"{config.steps} steps were asked for and the schedule of {self.spec} has "
                f"{self.n_train_steps}; ask for 1 to {self.n_train_steps}."
            )


def block_path(site: Site) -> str:
    """Where a block site's module is inside the U-Net: `down_blocks.2.attentions.1`."""
    assert site.kind == "block" and site.path is not None
    *where, attention = site.path.split(".")
    parent = "mid_block" if where == ["mid"] else f"{where[0]}_blocks.{where[1]}"
    return f"{parent}.attentions.{attention}"


def _following(drawing: Drawing):
    """The pipeline's callback at the end of a step: keeps the latents and counts on."""

    def after(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        drawing.step, drawing.latents = step + 1, tensors["latents"]
        return {}

    return after
