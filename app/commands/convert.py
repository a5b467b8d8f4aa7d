"""`lorgnette convert`: read and write the SAE formats of other projects."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tyro.conf import Positional, arg

from app.commands.options import Common, plan, say, size
from app.peers import (
    Placed,
    fidelity,
    fill,
    find_model,
    find_site,
    find_source,
    find_store,
    in_words,
    is_run,
    run_config,
    run_name,
)
from probe.errors import UserError
from probe.models import model_name
from probe.runs import Run
from probe.store_config import ImageStoreConfig
from saes.features import FeatureIndex
from saes.interop import delphi, neuronpedia
from saes.interop.names import module_of_site
from saes.interop.neuronpedia import NeuronpediaOptions
from saes.interop.reading import read_peer
from saes.interop.writing import writable_form, write_peer
from saes.scales import FeatureScales, feature_scales

TITLE = "lorgnette convert would write"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Read and write the SAE formats of other projects. What a format cannot hold is said.

    Example, into a folder of our own, tied to a store so that evaluate, index and dashboard work:
        lorgnette convert downloads/layers.12 --store artifacts/activations/smollm2-builtin-1a2b3c4d

    Out of one:
        lorgnette convert artifacts/saes/smollm2-resid_post.12-topk32-4608-1a2b3c4d --to saelens

    Formats that are read: saelens (6), sparsify, dictionary_learning, openai, sdxl-unbox, top-afa.
    """

    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """Folder or file of an SAE; for neuronpedia an SAE of ours with an index, or the index."""
    to: Literal["lorgnette", "saelens", "sparsify", "sdxl-unbox", "delphi", "neuronpedia"] = (
        "lorgnette"
    )
    """The format to write: weights, or (delphi, neuronpedia) what the SAE says of a store."""
    from_: Annotated[
        Literal[
            "auto", "lorgnette", "saelens", "sparsify", "dictionary_learning", "openai",
            "sdxl-unbox", "top-afa",
        ],
        arg(name="from"),
    ] = "auto"  # fmt: skip
    """The format of SOURCE; looked at where it is auto."""
    out: Path | None = None
    """Folder to write (for delphi and neuronpedia to write in); below the root's `exports` where
    none is named. Not for lorgnette, whose folders are found by their name."""
    name: str | None = None
    """Name of the folder (with --to delphi: of the hookpoint); made of model, site and shape where
    none is given."""
    store: Path | None = None
    """Store of activations that belongs to the SAE: to link it, to measure on, to encode."""
    site: str | None = None
    """The site that the SAE reads, where neither SOURCE nor the store says it."""
    model: str | None = None
    """The model that the SAE belongs to, where neither SOURCE nor the store says it."""
    unit_norm: bool = False
    """Give decoder rows unit norm, and codes the length of what they add."""
    input_scale: float | None = None
    """The factor on the input of a SAELens SAE with `expected_average_only_in`."""
    rows: int = 4096
    """Rows of the store to measure on, to choose a fixed k, and for the features' scales."""
    splits: int = 5
    """With --to delphi: files, each with a range of latents."""
    neuronpedia: NeuronpediaOptions = field(default_factory=NeuronpediaOptions)
    common: Common = field(default_factory=Common)


def run(command: Command) -> Path | None:
    """Convert, or say what would be written; gives the folder."""
    if command.rows < 1:
        raise UserError(f"--rows must be at least 1, got {command.rows}.")
    if command.name is not None and Path(command.name).name != command.name:
        raise UserError(f"--name is the name of one folder, without slashes; got {command.name!r}.")
    placed = read(command)
    say_notes(placed.imported.notes)
    writers = {"lorgnette": into_ours, "delphi": into_delphi, "neuronpedia": into_neuronpedia}
    return writers.get(command.to, into_weights)(command, placed)


def read(command: Command) -> Placed:
    """Read the SAE and find what belongs to it.

    Raises `UserError` where SOURCE is no SAE, or store and SAE do not fit each other.
    """
    path, sae_run = find_source(command.source, command.common.root)
    imported = read_peer(
        path, command.from_, unit_norm=command.unit_norm, input_scale=command.input_scale
    )
    metadata = imported.metadata
    store = find_store(command.store, sae_run, command.common.root)
    said = metadata.get("site") if sae_run is None else sae_run.config["site"]
    site = find_site(command.site, said, store)
    if store is not None and site is not None and store.d(site) != imported.sae.config.d_in:
        raise UserError(
            f"the SAE reads activations of width {imported.sae.config.d_in} and site {site} of "
            f"{store.run.path} has width {store.d(site)}; name another with --site or --store."
        )
    return Placed(
        imported=imported,
        path=path,
        run=sae_run,
        store=store,
        site=site,
        model=find_model(command.model, metadata.get("model_name"), sae_run, store),
    )


def into_ours(command: Command, placed: Placed) -> Path | None:
    """Write a run folder that evaluate, index and the dashboard find."""
    if command.out is not None:
        raise UserError("a folder of ours is found by its name below the root; use --name.")
    lost: tuple[str, ...] = ()
    if placed.store is None:
        lost += (
            "no store is linked: evaluate and index need one, named here or there with --store.",
        )
    named = placed.imported.metadata.get("model_name")
    if named is not None and model_name(str(named)) != model_name(placed.model["spec"]):
        lost += (f"it says it is of {named}; it is tied to {placed.model['spec']}.",)
    if placed.site is None:
        lost += ("nobody says which site it reads; name it with --site.",)
    say_notes(lost)
    rows = placed.sample(command.rows)
    measured = {} if rows is None else fidelity(placed.sae, rows)
    config = run_config(placed)
    name = command.name or run_name(config, placed.sae)
    if command.common.dry_run:
        folder = f"{command.common.root / 'saes' / name}-<hash>, as `lorgnette train` does"
        store = "none" if placed.store is None else str(placed.store.run.path)
        rest = {"folder": folder, "store": store, "measured": in_words(measured)}
        say(plan(TITLE, sae_rows(placed) | rest))
        return None
    folder = Run.create(command.common.root / "saes", name, config)
    if not folder.complete:
        with folder.lock():
            fill(folder, placed, placed.imported.notes + lost, rows, measured)
    say(in_words(measured))
    return folder.path


def into_weights(command: Command, placed: Placed) -> Path | None:
    """Write another project's folder of weights."""
    rows = placed.sample(command.rows)
    name = f"{command.name or placed.name}-{command.to}"
    folder = command.out or command.common.root / "exports" / name
    if command.common.dry_run:
        written, _ = writable_form(placed.sae, command.to, rows)
        say_notes(written.notes)
        rest = {"folder": str(folder), "as": f"{command.to}, {written.sae.config.activation}"}
        say(plan(TITLE, sae_rows(placed) | rest))
        return None
    written = write_peer(
        placed.sae,
        folder,
        command.to,
        metadata=placed.metadata(),
        rows=rows,
        scales=find_scales(placed, rows) if command.to == "sdxl-unbox" else None,
        notes=placed.imported.notes,
    )
    say_notes(written.notes[len(placed.imported.notes) :])
    return folder


def find_scales(placed: Placed, rows: Float[Tensor, "n d"] | None) -> FeatureScales | None:
    """How strongly each feature fires: as the SAE came with it, by its index, else by `rows`."""
    if placed.imported.scales is not None:
        return placed.imported.scales
    index = placed.newest_index()
    if index is not None:
        numbers = index.numbers()
        mean, sd = (
            torch.tensor(numbers[name].fillna(0).to_numpy(), dtype=torch.float32)
            for name in ("mean", "sd")
        )
        return FeatureScales(mean=mean, sd=sd)
    return None if rows is None else feature_scales(placed.sae, rows)


def into_delphi(command: Command, placed: Placed) -> Path | None:
    """Write a latent cache for delphi's explainers and scorers."""
    if placed.store is None or placed.site is None:
        raise UserError(
            "a latent cache says what the SAE says of a store; name one with --store (and the "
            "site with --site)."
        )
    if isinstance(placed.store.config, ImageStoreConfig):
        raise UserError(
            f"delphi explains text and {placed.store.run.path} is of images; `lorgnette label` "
            "labels features of images."
        )
    model = command.model or str(placed.model["spec"])
    hookpoint = command.name or module_of_site(placed.site, model)
    cache = command.out or command.common.root / "exports" / f"{placed.name}-delphi"
    if command.common.dry_run:
        say_notes(delphi.losses(placed.store))
        say(plan(TITLE, sae_rows(placed) | delphi_rows(command, placed, cache / hookpoint, model)))
        return None
    notes = delphi.write_cache(
        placed.sae,
        placed.store,
        placed.site,
        cache,
        hookpoint=hookpoint,
        model_name=model,
        n_splits=command.splits,
    )
    say_notes(notes)
    return cache / hookpoint


def delphi_rows(command: Command, placed: Placed, folder: Path, model: str) -> dict[str, str]:
    """Rows, files and disk of a latent cache: a firing takes eight bytes."""
    store, rows = placed.store, placed.sample(min(command.rows, 512))
    assert store is not None and rows is not None, "a cache is of a store"
    disk = 8 * store.n_rows * fidelity(placed.sae, rows)["l0"]
    tokens = 8 * store.config.context * store.run.summary["n_sequences"]
    return {
        "folder": str(folder),
        "rows": f"{store.n_rows} of {store.run.path}, site {placed.site}",
        "files": f"{command.splits}, {size(disk + command.splits * tokens)} together",
        "tokenizer": f"delphi will load that of {model}",
    }


def into_neuronpedia(command: Command, placed: Placed) -> Path | None:
    """Write a folder for Neuronpedia's bulk import."""
    asked = is_run(command.source) and Run.open(command.source).kind == "index"
    index = FeatureIndex.open(command.source) if asked else placed.newest_index()
    if index is None:
        raise UserError(
            f"{command.source} has no complete index to export; run `lorgnette index` on it first."
        )
    if index.of_images:
        raise UserError(
            f"Neuronpedia shows text and {index.path} is an index of images; `lorgnette dashboard` "
            "shows it."
        )
    metadata = placed.metadata()
    metadata |= {} if command.model is None else {"model_name": command.model}
    folder = command.out or command.common.root / "exports" / f"{placed.name}-neuronpedia"
    if command.common.dry_run:
        n = -(-index.n_features // neuronpedia.FEATURES_AT_ONCE)
        files = f"{n} of features and {n} of activations"
        say_notes(neuronpedia.LOST)
        rest = {"index": str(index.path), "folder": str(folder), "files": files}
        say(plan(TITLE, sae_rows(placed) | rest))
        return None
    target, notes = neuronpedia.write_import(
        index, placed.sae, folder, command.neuronpedia, metadata=metadata
    )
    say_notes(notes)
    return target


def say_notes(notes: Sequence[str]) -> None:
    """What changed or was lost, a line each."""
    for note in notes:
        say(f"note: {note}")


def sae_rows(placed: Placed) -> dict[str, str]:
    """What was read, for a plan."""
    config = placed.sae.config
    n = sum(tensor.numel() for tensor in placed.sae.tensors().values())
    return {
        "SAE": f"{config.d_in} -> {config.d_sae} latents, {config.activation}, read as "
        f"{placed.imported.format}",
        "site": placed.site or "nobody says it",
        "weights": size(4 * n),
    }
