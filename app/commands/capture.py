"""`lorgnette capture`: a model reads a corpus, and the activations of some sites are kept."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, arg

from app.commands.options import Common, duration, plan, say, size
from probe.capture import capturing, site_width
from probe.corpora import read_documents, token_batches
from probe.language import LanguageModel
from probe.models import Dtype, load_language_model
from probe.ranks import Ranks, joined
from probe.runs import Run
from probe.sites import expand_sites, parse_site
from probe.store import StoreConfig
from probe.store_writing import capture_store, estimate_store


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Run a model over a corpus and keep the activations of some sites, several in one pass.

    Example: lorgnette capture smollm2 builtin --sites resid_post.12 mlp_out.12 --tokens 200000

    In several processes: torchrun --nproc-per-node 8 --no-python lorgnette capture ...
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """smollm2, a local folder in the Hugging Face layout, or a Hugging Face id."""
    corpus: Annotated[Positional[str], arg(metavar="CORPUS")] = "builtin"
    """builtin, a .txt, .jsonl[.gz] or .parquet file, or a Hugging Face dataset id."""
    sites: Annotated[tuple[str, ...], arg(metavar="SITE ...")] = ("resid_post.12",)
    """Where to read: resid_pre.L, resid_post.L, attn_out.L, mlp_out.L, mlp_act.L, head_out.L,
    module:<dotted path>[:input|:output|:update]; globs such as resid_post.* are allowed."""
    tokens: int = 1_000_000
    """Tokens to read; fewer where the corpus ends first."""
    context: int = 128
    """Tokens in a sequence."""
    batch_sequences: int = 16
    """Sequences in one forward pass."""
    shard_batches: int = 32
    """Batches in a shard: held in memory, and the most that a killed capture does again."""
    max_norm: float = 10.0
    """Leave out rows of a norm above so many medians (attention sinks); 0 keeps every row."""
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
    read_documents(command.corpus)
    model = load_language_model(
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


def capture(command: Command, config: StoreConfig, model: LanguageModel, ranks: Ranks) -> Run:
    """Fill the store's run folder, or find it filled."""
    parent = command.common.root / "activations"
    return capture_store(parent, config, model, progress=ranks.is_first, ranks=ranks).run


def store_config(command: Command, model: LanguageModel) -> StoreConfig:
    """What the command asks for, with globs and `auto` spelled out."""
    sites = expand_sites(command.sites, model.sites())
    for site in sites:
        model.hook_point(site)
    return StoreConfig(
        model={
            "spec": command.model,
            "random_weights": command.random_weights,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        corpus=command.corpus,
        sites=tuple(map(str, sites)),
        tokens=command.tokens,
        context=command.context,
        batch_sequences=command.batch_sequences,
        max_norm=command.max_norm,
        dtype=command.store_dtype,
        shard_batches=command.shard_batches,
    )


def dry_run_plan(config: StoreConfig, model: LanguageModel):
    """Shapes, disk and memory from the sizes; time from one batch that is really run."""
    widths = {name: site_width(model, parse_site(name)) for name in config.sites}
    estimate = estimate_store(config, widths)
    batch = next(
        token_batches(
            config.corpus,
            model,
            context=config.context,
            batch_sequences=config.batch_sequences,
            max_tokens=config.tokens,
        )
    )
    with torch.no_grad(), capturing(model, [parse_site(name) for name in config.sites]):
        model.run(batch.tokens)
        started = time.perf_counter()
        model.run(batch.tokens)
        seconds = time.perf_counter() - started
    return plan(
        "lorgnette capture would write",
        {
            "sites": ", ".join(f"{name} [{estimate.rows}, {w}]" for name, w in widths.items()),
            "sequences": f"{estimate.sequences} of {config.context} tokens",
            "disk": f"{size(estimate.disk_bytes)} in {estimate.shards} shards, {config.dtype}",
            "memory": f"{size(estimate.memory_bytes)} for a shard, besides the model",
            "time": f"about {duration(seconds * estimate.sequences / len(batch.tokens))}, "
            f"from one batch in {config.model['dtype']} on {model.device}",
        },
    )
