"""`lorgnette sweep`: many sparse autoencoders at once, on one stream of activations.

Every SAE becomes the folder that `lorgnette train` makes of the same options, with the same
numbers: what is there already is not trained again, and a stopped sweep goes on.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table
from tyro.conf import Positional, Suppress, arg

from app.commands import train
from app.commands.options import Common, find_run, plan, say, size
from probe.errors import UserError
from probe.loader import ActivationSource
from probe.models import Dtype, resolve_device
from probe.ranks import ALONE, Ranks, joined
from probe.sites import expand_sites, parse_site
from probe.store import ActivationStore
from saes.activations import NAMES, Activation, TopK, activation_name
from saes.presets import PRESETS, PresetName
from saes.replicas import Replicas
from saes.training import Job, TrainConfig, fit

STATE_BYTES = 16
"""For each parameter in training: itself, its gradient and Adam's two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedConfig(TrainConfig):
    """What all SAEs of the sweep have in common."""

    activation: Suppress[Activation] = TopK()  # noqa: RUF009 (frozen)
    seed: Suppress[int] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Train many sparse autoencoders at once: activations, widths and seeds at every site.

    Example: lorgnette sweep STORE --activations topk:k=16,32,64 top_afa:afa=1/64,1/32 --seeds 0 1

    Straight from a model, all sites captured in one pass:
    lorgnette sweep smollm2 --corpus builtin --sites resid_post.11 resid_post.12

    Of an image model, k and width around the published settings:
    lorgnette sweep STORE --preset sdxl-turbo --activations topk:k=5,10,20 --widths 320 640 1280

    Each becomes the folder that `lorgnette train` makes of the same options with --order-seed.
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE")] = tyro.MISSING
    """A store that `lorgnette capture` wrote or, together with --corpus, a model."""
    activations: Annotated[tuple[str, ...], arg(metavar="NAME[:OPTION=VALUE,...]")] = ("topk",)
    """Activations by name, each with values of its options: topk:k=16,32 is two, and
    jump_relu:l0=0.001,0.01:bandwidth=0.5,1 four. `lorgnette train --activation NAME --help` names
    the options; values of prefixes are written 64/256."""
    widths: tuple[int, ...] = ()
    """Numbers of latents, each with every activation; --d-sae where none is named."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights."""
    preset: PresetName | None = None
    """Published settings in place of the defaults below, fitted to the width of each site; options
    that are named count all the same."""
    fit: Suppress[tuple[str, ...]] = ()
    """Settings of the preset that are to be fitted: those that no option names."""
    sites: Annotated[tuple[str, ...], arg(metavar="SITE ...")] = ()
    """Sites, globs allowed; all of a store's where none is named."""
    order_seed: int = 0
    """Decides the order of the rows, which is the same for all."""
    corpus: str | None = None
    """Capture this corpus while training, and keep no store."""
    train: SharedConfig = field(default_factory=SharedConfig)
    batch_size: int = 2048
    """Rows (tokens) in a batch."""
    held_out_share: float = 0.05
    """Share of the store's sequences, at its end, kept from training for `lorgnette evaluate`."""
    buffer_rows: int = 2**17
    """Rows shuffled together in memory."""
    context: int = 128
    """With --corpus: tokens in a sequence."""
    batch_sequences: int = 16
    """With --corpus: sequences in one forward pass."""
    dtype: Dtype = "auto"
    """With --corpus: number format the model runs in."""
    random_weights: int | None = None
    """With --corpus: seed of fresh random weights, the control twin."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    common: Common = field(default_factory=Common)


def default(arguments: Sequence[str]) -> Command:
    """The command's defaults for the preset asked for."""
    if train.asked(arguments, "preset") not in PRESETS:
        return Command()
    alone = train.default(arguments)
    config = {each.name: getattr(alone.train, each.name) for each in fields(TrainConfig)}
    assert isinstance(alone.train.activation, TopK), "that of the presets"
    return Command(
        activations=(f"topk:k={alone.train.activation.k}",),
        train=SharedConfig(**config),
        batch_size=alone.batch_size,
        fit=alone.fit,
    )


def run(command: Command) -> list[Path]:
    """Train, or say what training would take; gives the SAEs' folders, to the first rank."""
    if command.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {command.batch_size}.")
    with joined() as ranks:
        folders = share(command, ranks)
        return folders if ranks.is_first else []


def share(command: Command, ranks: Ranks) -> list[Path]:
    """This rank's share of the command."""
    cells = list(trainings(command, ranks))
    if command.common.dry_run:
        if ranks.is_first:
            say(dry_run_plan(command, cells))
        return []
    jobs = [train.make_job(cell, training, ranks) for cell, training in cells]
    sources = [training.source for _, training in cells]
    device = str(resolve_device(command.device))
    fit(jobs, sources, device=device, division=Replicas(ranks=ranks))
    if ranks.is_first:
        say(results(jobs))
    return [job.run.path for job in jobs]


def trainings(
    command: Command, ranks: Ranks = ALONE
) -> Iterator[tuple[train.Command, train.Training]]:
    """Every SAE of the sweep as a command of its own; those of one site share its batches."""
    activations = [each for term in command.activations for each in parse_activations(term)]
    widths: Sequence[int | None] = command.widths or (None,)
    lists = (("activations", activations), ("widths", widths), ("seeds", command.seeds))
    for name, values in lists:
        if not values or len(set(map(str, values))) < len(values):
            raise UserError(f"--{name} must be one or more, each once.")
    sites = asked_sites(command)
    alone = as_train(command, sites[0], activations[0], widths[0], command.seeds[0])
    stream = None if command.corpus is None else train.open_stream(alone, sites, ranks)
    named = sites if stream is None else [str(site) for site in stream.sites]
    for site in named:
        shared: ActivationSource | None = None
        for options in itertools.product(activations, widths, command.seeds):
            cell = as_train(command, site, *options)
            made = train.from_store(cell) if stream is None else train.from_model(cell, stream)
            shared = made.source if shared is None else shared
            yield cell, replace(made, source=shared)


def asked_sites(command: Command) -> list[str]:
    """The sites of the sweep. Raises `UserError` where the source has none that is asked for."""
    if command.corpus is not None:
        if not command.sites:
            raise UserError("training straight from a model needs --sites, such as resid_post.12.")
        return list(command.sites)
    found = find_run(Path(command.source), "activations", command.common.root)
    held = ActivationStore.open(found.path).sites
    if not command.sites:
        return list(held)
    return [str(site) for site in expand_sites(command.sites, [parse_site(name) for name in held])]


def as_train(
    command: Command, site: str, activation: Activation, width: int | None, seed: int
) -> train.Command:
    """The `lorgnette train` that makes one SAE of the sweep; no width leaves it to --d-sae."""
    config = {each.name: getattr(command.train, each.name) for each in fields(TrainConfig)}
    config |= {"activation": activation, "seed": seed}
    fit = command.fit
    if width is not None:
        config["d_sae"] = width
        fit = tuple(name for name in fit if name != "d_sae")
    alike = {each.name for each in fields(train.Command)} & {each.name for each in fields(Command)}
    options = {name: getattr(command, name) for name in alike - {"train", "fit"}}
    return train.Command(site=site, train=TrainConfig(**config), fit=fit, **options)


def parse_activations(term: str) -> list[Activation]:
    """What NAME[:OPTION=VALUE,...] means, every combination. Raises `UserError` for nonsense."""
    name, *options = term.split(":")
    if name not in NAMES:
        raise UserError(f"{name!r} is no activation; wanted one of {', '.join(NAMES)}.")
    kind = NAMES[name]
    known = {each.name: each for each in fields(kind)}
    values: dict[str, list[Any]] = {}
    for option in options:
        key, _, text = option.partition("=")
        if key not in known or not text:
            raise UserError(
                f"{option!r} in {term!r} is no option with values; {name} has "
                f"{', '.join(f'{each}=...' for each in known)}."
            )
        values[key] = [parse_value(known[key].default, value, term) for value in text.split(",")]
    return [kind(**dict(zip(values, v, strict=True))) for v in itertools.product(*values.values())]


def parse_value(default: Any, text: str, term: str) -> Any:
    """A value of the kind of an option's default: yes or no, a number, or numbers with slashes."""
    assert default is not MISSING, "options of activations have defaults"
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, tuple):
            return tuple(int(part) for part in text.split("/"))
        return float(Fraction(text)) if isinstance(default, float) else int(text)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        wanted = {bool: "true or false", tuple: "64/256", float: "0.03 or 1/32"}
        like = wanted.get(type(default), "a whole number")
        raise UserError(f"{text!r} in {term!r} is no value; wanted {like}.") from error


def dry_run_plan(command: Command, cells: Sequence[tuple[train.Command, train.Training]]) -> Table:
    """How many there would be, and what they take together."""
    shapes = [(training.source.d, training.train.d_sae) for _, training in cells]
    parameters = sum((2 * d + 1) * d_sae + d for d, d_sae in shapes)
    steps = max(training.train.steps for _, training in cells)
    sites = dict.fromkeys(training.config["site"] for _, training in cells)
    names = dict.fromkeys(str(cell.train.activation) for cell, _ in cells)
    return plan(
        "lorgnette sweep would make",
        {
            "SAEs": f"{len(cells)}: {len(names)} activations, "
            + f"{len(command.widths)} widths, " * bool(command.widths)
            + f"{len(command.seeds)} seeds, {len(sites)} sites",
            "sites": ", ".join(sites),
            "activations": ", ".join(names),
            "training": f"{steps} steps of {command.batch_size} rows, all together",
            "memory": f"{size(STATE_BYTES * parameters)} for parameters, gradients and Adam",
            "disk": f"{size(4 * parameters)} and checkpoints of {size(2 * 12 * parameters)}",
        },
    )


def results(jobs: Sequence[Job]) -> Table:
    """A row for each SAE, by the last batch of its training."""
    table = Table("site", "activation", "latents", "seed", "FVU", "L0", "dead", "folder")
    for job in jobs:
        facts, options = job.run.summary, job.config.activation
        values = {each.name: getattr(options, each.name) for each in fields(options)}
        told = ", ".join(f"{name} {value}" for name, value in values.items())
        table.add_row(
            job.run.config["site"],
            f"{activation_name(options)} ({told})",
            str(job.config.d_sae),
            str(job.config.seed),
            f"{facts['fvu']:.4g}",
            f"{facts['l0']:.4g}",
            f"{facts['dead_share']:.2%}",
            job.run.path.name,
        )
    return table
