"""`lorgnette train`: a sparse autoencoder on a store, or straight from a model."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, Suppress, arg

from app.commands.options import Common, find_run, plan, say, size
from app.resolve import manifest_hash, sae_metadata_of, train_options
from probe.corpora import corpus_checksum, read_documents, token_batches
from probe.diffusion import DiffusionModel, DrawConfig
from probe.errors import UserError
from probe.image_prompts import pass_batches, prompts_checksum, read_prompts
from probe.language import LanguageModel
from probe.loader import ActivationSource, StoreReader, StreamSource
from probe.models import Dtype, load_model, model_name, resolve_device, weights_checksum
from probe.passes import common_grid
from probe.pipelines import is_pipeline
from probe.ranks import ALONE, Ranks, create_run, joined
from probe.runs import Run
from probe.sites import Site, expand_sites, parse_site
from probe.store import ActivationStore
from probe.store_config import ImageStoreConfig
from saes.activations import NAMES, TopK, most_active, short_name
from saes.footprint import footprint
from saes.presets import FITTED, PRESETS, PresetName, fitted
from saes.replicas import Replicas
from saes.sharded import Shards
from saes.split import split_store
from saes.training import Job, TrainConfig, fit, sae_shape

ENDLESS = 2**31 - 1
"""Images of a stream: as many as numbers go."""
IMAGE_SEED = 0
"""A stream draws image number i from this and i."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Train a sparse autoencoder. A stopped run goes on from its last checkpoint, exactly.

    From a store: lorgnette train artifacts/activations/smollm2-builtin-1a2b3c4d --k 32

    With another activation (`--activation top_afa --help` shows its options):
    lorgnette train STORE --activation top_afa --afa 0.03

    Straight from a model, without a store:
    lorgnette train smollm2 --corpus builtin --site resid_post.12
    lorgnette train toy-turbo --corpus builtin --site down.2.1

    With the published settings for SDXL-Turbo: lorgnette train STORE --preset sdxl-turbo

    In several processes: torchrun --nproc-per-node 8 --no-python lorgnette train ...
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE")] = tyro.MISSING
    """A store that `lorgnette capture` wrote or, together with --corpus, a model."""
    site: str | None = None
    """Which of the store's sites; needed where it has several, and with --corpus."""
    corpus: str | None = None
    """Capture this corpus while training, and keep no store."""
    activation: Literal[
        "topk", "batch_topk", "matryoshka", "top_afa", "jump_relu", "gated", "relu", "k_sparse"
    ] = "topk"
    """What makes codes of pre-activations; each has options of its own."""
    preset: PresetName | None = None
    """Published settings in place of the defaults below, fitted to the width of the site; options
    that are named count all the same."""
    fit: Suppress[tuple[str, ...]] = ()
    """Settings of the preset that are to be fitted: those that no option names."""
    train: TrainConfig = field(default_factory=TrainConfig)
    batch_size: int = 2048
    """Rows (tokens) in a batch."""
    held_out_share: float = 0.05
    """Share of the store's sequences, at its end, kept from training for `lorgnette evaluate`."""
    buffer_rows: int = 2**17
    """Rows shuffled together in memory."""
    order_seed: int | None = None
    """Decides the order of the rows; None: --seed does."""
    context: int = 128
    """With --corpus: tokens in a sequence of text."""
    batch_sequences: int = 16
    """With --corpus: sequences, or images, in one forward pass."""
    dtype: Dtype = "auto"
    """With --corpus: number format the model runs in."""
    random_weights: int | None = None
    """With --corpus: seed of fresh random weights, the control twin."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    shard_latents: bool = False
    """With torchrun: spread the latents over the processes, not the rows; for topk."""
    common: Common = field(default_factory=Common)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A source of activations and how the run folder describes it."""

    source: ActivationSource
    """The stream of batches."""
    train: TrainConfig
    """How the SAE is trained."""
    config: dict[str, Any]
    """The run's config.json."""
    inputs: dict[str, str]
    """Hashes of what it is made from."""
    corpus: str
    """The text behind it."""
    context: int
    """Tokens in a sequence of it."""


def default(arguments: Sequence[str]) -> Command:
    """The command's defaults for the activation and preset asked for, so that options are known."""
    name, preset = asked(arguments, "activation"), asked(arguments, "preset")
    chosen = NAMES[name]() if name in NAMES else None
    if preset not in PRESETS:
        return Command(train=TrainConfig(activation=chosen or TopK()))
    published = PRESETS[preset]
    train = published.train if chosen is None else replace(published.train, activation=chosen)
    return Command(train=train, batch_size=published.batch_size, fit=not_named(arguments, FITTED))


def asked(arguments: Sequence[str], option: str) -> str | None:
    """The value that the arguments give an option; None where they do not name it."""
    found = [value for name, value in itertools.pairwise(arguments) if name == f"--{option}"]
    found += [text.partition("=")[2] for text in arguments if text.startswith(f"--{option}=")]
    return found[-1] if found else None


def not_named(arguments: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Those settings that no argument gives a value."""
    named = {text.partition("=")[0].removeprefix("--").replace("-", "_") for text in arguments}
    return tuple(name for name in names if name not in named)


def run(command: Command) -> Path | None:
    """Train, or say what training would take; gives the SAE's folder, to the first rank."""
    if command.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {command.batch_size}.")
    with joined() as ranks:
        folder = share(command, ranks)
        return folder if ranks.is_first else None


def share(command: Command, ranks: Ranks) -> Path | None:
    """This rank's share of the command."""
    if command.corpus is None:
        training = from_store(command)
    else:
        training = from_model(command, open_stream(command, [needed_site(command)], ranks))
    if command.common.dry_run:
        if ranks.is_first:
            say(dry_run_plan(command, training, ranks))
        return None
    return train(command, training, ranks).path


def train(command: Command, training: Training, ranks: Ranks = ALONE) -> Run:
    """Fill the SAE's run folder, or find it filled."""
    job = make_job(command, training, ranks)
    if not ranks.first_says(job.run.complete):
        division = Shards(ranks=ranks) if command.shard_latents else Replicas(ranks=ranks)
        device = str(resolve_device(command.device))
        fit([job], training.source, device=device, division=division)
    return job.run


def make_job(command: Command, training: Training, ranks: Ranks = ALONE) -> Job:
    """What trains the SAE, with its run folder, made or found.

    Raises `UserError`, before anything is written, where there can be no such SAE.
    """
    train = training.train
    sae_shape(train, training.source.d)
    described = training.config["model"]
    twin = "" if described["random_weights"] is None else f"-random{described['random_weights']}"
    site = training.config["site"].replace(":", "_")
    shape = f"{short_name(train.activation)}-{train.d_sae}"
    name = f"{model_name(described['spec'])}{twin}-{site}-{shape}"
    folder = create_run(ranks, command.common.root / "saes", name, training.config)
    metadata = sae_metadata_of(training.config, training.corpus, training.context)
    return Job(run=folder, config=train, metadata=metadata, inputs=training.inputs)


def settings(command: Command, source: ActivationSource) -> TrainConfig:
    """How the SAE is trained, the settings of a preset fitted to the source."""
    if command.preset is None:
        return command.train
    batches = None if source.n_rows is None else source.n_rows // command.batch_size
    preset = PRESETS[command.preset]
    return fitted(preset, command.train, command.fit, width=source.d, batches=batches)


def order_seed(command: Command) -> int:
    """What decides the order of the rows."""
    return command.train.seed if command.order_seed is None else command.order_seed


def from_store(command: Command) -> Training:
    """Batches of a store's training rows."""
    store = ActivationStore.open(
        find_run(Path(command.source), "activations", command.common.root).path
    )
    site = only_site(store, command.site)
    reader = StoreReader(
        store,
        site,
        command.batch_size,
        seed=order_seed(command),
        buffer_rows=command.buffer_rows,
        stop_row=split_store(store, command.held_out_share).training_rows,
    )
    source = {
        "store": store.run.path.name,
        "manifest": manifest_hash(store.run),
        "batch_size": command.batch_size,
        "held_out_share": command.held_out_share,
        "buffer_rows": command.buffer_rows,
        "order_seed": order_seed(command),
    }
    train = settings(command, reader)
    return Training(
        source=reader,
        train=train,
        config=sae_config(store.run.config["model"], site, source, train),
        inputs={"store": source["manifest"]},
        corpus=store.config.corpus,
        context=store.config.context,
    )


def only_site(store: ActivationStore, asked: str | None) -> str:
    """The site to train on. Raises `UserError` where the store has several and none is named."""
    if asked is not None:
        store.d(asked)
        return asked
    if len(store.sites) > 1:
        raise UserError(
            f"{store.run.path} holds several sites; name one with --site: {', '.join(store.sites)}."
        )
    return store.sites[0]


def needed_site(command: Command) -> str:
    """The site to train on. Raises `UserError` where none is named."""
    if command.site is None:
        raise UserError("training straight from a model needs a --site, such as resid_post.12.")
    return command.site


def open_stream(command: Command, sites: Sequence[str], ranks: Ranks = ALONE) -> StreamSource:
    """Batches of some sites (globs are allowed), captured together while training goes on."""
    assert command.corpus is not None, "a store is no stream"
    if is_pipeline(command.source):
        read_prompts(command.corpus, IMAGE_SEED)
    else:
        read_documents(command.corpus)
    model = load_model(
        command.source,
        dtype=command.dtype,
        device=command.device,
        random_weights=command.random_weights,
    )
    named = expand_sites(sites, model.sites())
    if isinstance(model, DiffusionModel):
        read = functools.partial(pass_batches, drawn_endlessly(command, model, named))
    else:
        read = functools.partial(
            token_batches,
            command.corpus,
            model,
            context=command.context,
            batch_sequences=command.batch_sequences,
        )
    return StreamSource(
        model,
        named,
        read,
        command.batch_size,
        order_seed(command),
        command.buffer_rows,
        max_norm=0.0 if isinstance(model, DiffusionModel) else 10.0,
        ranks=ranks,
    )


def described_model(command: Command, model: LanguageModel | DiffusionModel) -> dict[str, Any]:
    """The model as a config names it."""
    return {
        "spec": command.source,
        "random_weights": command.random_weights,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def drawn_endlessly(
    command: Command, model: DiffusionModel, sites: Sequence[Site]
) -> ImageStoreConfig:
    """Images drawn in one step, all places kept, as long as there are prompts."""
    assert command.corpus is not None, "a store is no stream"
    height, width = model.image_size(DrawConfig())
    return ImageStoreConfig(
        model=described_model(command, model),
        prompts=command.corpus,
        sites=tuple(map(str, sites)),
        grid=common_grid(model, sites, DrawConfig()),
        height=height,
        width=width,
        seed=IMAGE_SEED,
        images=ENDLESS,
        batch_images=command.batch_sequences,
    )


def from_model(command: Command, stream: StreamSource) -> Training:
    """One site of a stream: the one that the command names, or the stream's only one."""
    assert command.corpus is not None, "a store is no stream"
    (site,) = stream.sites if len(stream.sites) == 1 else (parse_site(needed_site(command)),)
    context, draw = command.context, {}
    if isinstance(stream.model, DiffusionModel):
        images = drawn_endlessly(command, stream.model, stream.sites)
        context, draw = images.context, {"draw": asdict(images.draw), "seed": images.seed}
    source = draw | {
        "corpus": command.corpus,
        "context": context,
        "batch_sequences": command.batch_sequences,
        "batch_size": command.batch_size,
        "buffer_rows": command.buffer_rows,
        "order_seed": order_seed(command),
    }
    checksum = prompts_checksum if draw else corpus_checksum
    hashes = {
        "model": weights_checksum(command.source),
        "corpus": checksum(command.corpus),
    }
    own = stream.at(site)
    train = settings(command, own)
    return Training(
        source=own,
        train=train,
        config=sae_config(described_model(command, stream.model), str(site), source, train),
        inputs={name: value for name, value in hashes.items() if value is not None},
        corpus=command.corpus,
        context=context,
    )


def sae_config(
    model: dict[str, Any], site: str, source: dict[str, Any], train: TrainConfig
) -> dict[str, Any]:
    """The config.json of an SAE's run folder."""
    described = {"model": model, "site": site, "source": source}
    return {"kind": "sae", "schema": 1} | described | {"train": train_options(train)}


def dry_run_plan(command: Command, training: Training, ranks: Ranks = ALONE):
    """Shapes, memory, and how far the training goes through the data."""
    config, source = training.train, training.source
    parameters = 2 * config.d_sae * source.d + config.d_sae + source.d
    rows = config.steps * command.batch_size
    epochs = "" if source.n_rows is None else f", {rows / source.n_rows:.2f} epochs"
    flops = 2 * rows * source.d * config.d_sae
    each = footprint(
        d=source.d,
        m=config.d_sae,
        k=most_active(config.activation) or source.d,
        b=command.batch_size,
        ranks=ranks.size,
        sharded=command.shard_latents,
        reduced=config.encoder_dtype == "bfloat16",
    )
    divided = "latents" if command.shard_latents else "rows of each batch"
    buffers = 4 * command.buffer_rows * source.d // (1 if command.shard_latents else ranks.size)
    return plan(
        "lorgnette train would make",
        {
            "SAE": f"{source.d} -> {config.d_sae} latents ({config.d_sae / source.d:.1f} times), "
            f"{config.activation}",
            "training": f"{config.steps} steps of {command.batch_size} rows{epochs}",
            "parameters": f"{parameters} ({size(4 * parameters)})",
            "processes": f"{ranks.size}"
            + (f", {divided} divided; each exchanges {size(each.exchanged_bytes)} in a step")
            * (ranks.size > 1),
            "memory": f"{size(each.state_bytes)} for parameters, gradients and Adam, "
            f"{size(each.activation_bytes)} for a batch, {size(buffers)} for the shuffled rows"
            + ", in each process"
            * (ranks.size > 1),
            "disk": f"{size(4 * parameters)} and two checkpoints of {size(12 * parameters)}",
            "arithmetic": f"{flops / 1e12:.1f} TFLOP in the dense encoder product",
        },
    )
