"""`lorgnette capture`: a model reads or draws, and the activations of some sites are kept."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from app.commands.options import Common, duration, plan, say, size
from probe.capture import site_widths
from probe.corpora import read_documents
from probe.diffusion import DiffusionModel, DrawConfig, Rows
from probe.errors import UserError
from probe.image_prompts import read_prompts
from probe.language import LanguageModel
from probe.models import Dtype, load_model
from probe.passes import common_grid
from probe.pictures import Picture
from probe.pipelines import is_pipeline
from probe.ranks import Ranks, joined
from probe.rows import capture_rows
from probe.runs import Run
from probe.sites import Site, expand_sites, parse_site
from probe.store_config import DTYPES, AnyStoreConfig, ImageStoreConfig, StoreConfig
from probe.store_sources import open_source
from probe.store_writing import capture_store, estimate_store

TEXT_OPTIONS = ("tokens", "context", "batch_sequences", "max_norm")
IMAGE_OPTIONS = (
    *("images", "steps", "guidance", "size", "rows", "places", "seed", "batch_images"),
    "keep_images",
)
TEXT_SITES = ("resid_post.12",)
IMAGE_SITES = ("down.2.1", "mid.0", "up.0.0", "up.0.1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Run a model over a corpus and keep the activations of some sites, several in one pass.

    Example: lorgnette capture smollm2 builtin --sites resid_post.12 mlp_out.12 --tokens 200000

    Example: lorgnette capture toy-turbo --sites down.2.1,mid.0,up.0.0,up.0.1 --images 2000

    In several processes: torchrun --nproc-per-node 8 --no-python lorgnette capture ...
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """smollm2, toy-turbo, sdxl-turbo, sdxl-base, a local folder in the layout of transformers or
    diffusers, or a Hugging Face id."""
    corpus: Annotated[Positional[str], arg(metavar="CORPUS")] = "builtin"
    """builtin, a .txt, .jsonl[.gz] or .parquet file, or a Hugging Face dataset id. For images, a
    prompt a line or a row."""
    sites: Annotated[tuple[str, ...], arg(metavar="SITE ...")] = ()
    """Where to read, with spaces or commas between. Text (resid_post.12 if none is given):
    resid_pre.L, resid_post.L, attn_out.L, mlp_out.L, mlp_act.L, head_out.L. Images (the four blocks
    of sdxl-unbox if none is given): down.B.A, mid.A, up.B.A with [:input|:output|:update]. Both:
    module:<dotted path>[:input|:output|:update]. Globs such as resid_post.* or up.0.* are
    allowed."""
    tokens: int | None = None
    """Text: tokens to read, 1,000,000 if not given; fewer where the corpus ends first."""
    context: int | None = None
    """Text: tokens in a sequence, 128 if not given."""
    batch_sequences: int | None = None
    """Text: sequences in one forward pass, 16 if not given."""
    max_norm: float | None = None
    """Text: leave out rows of a norm above so many medians (attention sinks), 10 if not given; 0
    keeps every row."""
    images: int | None = None
    """Images to draw, one a prompt, 1000 if not given; fewer where the prompts end first."""
    steps: int | None = None
    """Images: denoising steps, 1 if not given; every one is kept."""
    guidance: float | None = None
    """Images: scale of classifier-free guidance, 0 (none) if not given."""
    size: Annotated[tuple[int, ...] | None, arg(metavar="HEIGHT [WIDTH]")] = None
    """Images: pixels, the model's own if not given."""
    rows: Rows | None = None
    """Images: which rows of a guided pass are kept, the conditional one if not given."""
    places: int | None = None
    """Images: places kept of each pass, drawn at random; all of them if not given."""
    seed: int | None = None
    """Images: image number i is drawn from seed + i; 0 if not given."""
    batch_images: int | None = None
    """Images drawn together, 8 if not given."""
    keep_images: int | None = None
    """Images: how many of the first are kept as pictures; all of them if not given."""
    shard_batches: int | None = None
    """Batches in a shard, 32 of text or 16 of images if not given: held in memory, and the most
    that a killed capture does again."""
    store_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format on disk."""
    dtype: Dtype = "auto"
    """Number format the model runs in; auto is bfloat16 where the hardware has it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    random_weights: int | None = None
    """Seed: the same architecture with fresh random weights, the control twin."""
    common: Common = field(default_factory=Common)


def run(command: Command) -> Path | None:
    """Capture, or say what a capture would take; gives the store's folder, to the first rank."""
    with joined() as ranks:
        folder = share(command, ranks)
        return folder if ranks.is_first else None


def share(command: Command, ranks: Ranks) -> Path | None:
    """This rank's share of the command."""
    check_options(command)
    model = load_model(
        command.model,
        dtype=command.dtype,
        device=command.device,
        random_weights=command.random_weights,
    )
    config = store_config(command, model)
    if command.common.dry_run:
        if ranks.is_first:
            say(dry_run_plan(config, model))
        return None
    return capture(command, config, model, ranks).path


def check_options(command: Command) -> None:
    """Raise `UserError` where the corpus is not there, or an option is of the other kind of model.

    Done before the model is loaded, which takes long.
    """
    images = is_pipeline(command.model)
    if images:
        read_prompts(command.corpus, command.seed or 0)
    else:
        read_documents(command.corpus)
    others = TEXT_OPTIONS if images else IMAGE_OPTIONS
    given = [name for name in others if getattr(command, name) is not None]
    if given:
        kind = "an image model" if images else "a language model"
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(
            f"{command.model} is {kind}, which does not take {named}; `lorgnette capture --help` "
            "says which options are for text and which for images."
        )


def capture(
    command: Command,
    config: AnyStoreConfig,
    model: LanguageModel | DiffusionModel,
    ranks: Ranks,
) -> Run:
    """Fill the store's run folder, or find it filled."""
    parent = command.common.root / "activations"
    return capture_store(parent, config, model, progress=ranks.is_first, ranks=ranks).run


def store_config(command: Command, model: LanguageModel | DiffusionModel) -> AnyStoreConfig:
    """What the command asks for, with globs and `auto` spelled out."""
    asked = [name for text in command.sites for name in text.split(",") if name]
    default = IMAGE_SITES if isinstance(model, DiffusionModel) else TEXT_SITES
    sites = expand_sites(asked or default, model.sites())
    for site in sites:
        model.hook_point(site)
    shared: dict[str, Any] = {
        "model": {
            "spec": command.model,
            "random_weights": command.random_weights,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "sites": tuple(map(str, sites)),
        "dtype": command.store_dtype,
    } | given_options(command, ["shard_batches"])
    if isinstance(model, DiffusionModel):
        return image_config(command, model, sites, shared)
    options = given_options(command, TEXT_OPTIONS)
    return StoreConfig(corpus=command.corpus, **shared, **options)


def image_config(
    command: Command, model: DiffusionModel, sites: Sequence[Site], shared: dict[str, Any]
) -> ImageStoreConfig:
    """A store of images, with the model's own size and the sites' grid spelled out."""
    if command.size is not None and len(command.size) not in (1, 2):
        raise UserError(f"--size takes HEIGHT or HEIGHT WIDTH, got {list(command.size)}.")
    options = given_options(command, [name for name in IMAGE_OPTIONS if name != "size"])
    sized = DrawConfig(
        height=command.size[0] if command.size else None,
        width=command.size[-1] if command.size else None,
    )
    height, width = model.image_size(sized)
    config = ImageStoreConfig(
        prompts=command.corpus,
        grid=common_grid(model, sites, sized),
        height=height,
        width=width,
        **shared,
        **options,
    )
    model.check_steps(config.draw)
    return config


def given_options(command: Command, names: Sequence[str]) -> dict[str, Any]:
    """The options that were given; the store's own defaults stand for the others."""
    asked = {name: getattr(command, name) for name in names}
    return {name: value for name, value in asked.items() if value is not None}


def dry_run_plan(config: AnyStoreConfig, model: LanguageModel | DiffusionModel):
    """Shapes, disk and memory from the sizes; time from one batch that is really run."""
    sites = [parse_site(name) for name in config.sites]
    source = open_source(config, model)
    widths = site_widths(model, sites)
    batch = next(iter(source.batches(0)))
    pictures: list[Picture] = []
    seconds = 0.0
    for _ in range(2):  # the first time warms up
        pictures.clear()
        started = time.perf_counter()
        capture_rows(model, batch, sites, DTYPES[config.dtype], source.keeper(batch, pictures))
        seconds = time.perf_counter() - started
    picture_bytes = sum(len(one.data) for one in pictures) // max(len(pictures), 1)
    estimate = estimate_store(config, widths, picture_bytes)
    if isinstance(config, ImageStoreConfig):
        h, w = config.grid
        sequences = (
            f"{config.images} images of {config.height} x {config.width} pixels, "
            f"{estimate.sequences} passes, {config.kept_positions} of {h} x {w} places each"
        )
    else:
        sequences = f"{estimate.sequences} of {config.context} tokens"
    return plan(
        "lorgnette capture would write",
        {
            "sites": ", ".join(f"{name} [{estimate.rows}, {w}]" for name, w in widths.items()),
            "sequences": sequences,
            "disk": f"{size(estimate.disk_bytes)} in {estimate.shards} shards, {config.dtype}",
            "memory": f"{size(estimate.memory_bytes)} for a shard, besides the model",
            "time": f"about {duration(seconds * estimate.sequences / len(batch.tokens))}, "
            f"from one batch in {config.model['dtype']} on {model.device}",
        },
    )
