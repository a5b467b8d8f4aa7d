"""`lorgnette evaluate`: how well an SAE does its job, beside controls."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from tyro.conf import Positional, arg

from app.commands.options import Common, find_run, plan, say
from app.resolve import manifest_hash, model_of, store_of, weights_hash
from probe.errors import UserError
from probe.models import resolve_device
from probe.runs import Run, read_json
from probe.sites import parse_site
from probe.store import ActivationStore
from saes.evaluation import METRICS, EvaluateConfig, Subject, evaluate
from saes.folder import load_sae


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Measure an SAE on held-out rows, beside PCA, a random dictionary and the mean row.

    Fidelity (FVU, explained variance, cosine), sparsity (L0, dead and dense latents), and what the
    model loses when the reconstruction takes the activation's place: of text in cross-entropy and
    KL, of images in how far pixels and latents move, beside ablation.

    Example: lorgnette evaluate artifacts/saes/smollm2-resid_post.12-topk32-4608-1a2b3c4d
    """

    sae: Annotated[Positional[Path], arg(metavar="SAE")]
    """Folder of a trained SAE."""
    store: Path | None = None
    """Store to measure on; the one the SAE was trained on where none is named."""
    twin: Path | None = None
    """Folder of an SAE of the same recipe, trained on the random-weight twin of the model."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    baselines: bool = True
    """Measure PCA, the random dictionary and the mean row too."""
    downstream: bool = True
    """Put the reconstructions into the running model too."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    common: Common = field(default_factory=Common)


def run(command: Command) -> Path | None:
    """Measure, or say what would be measured; gives the evaluation's folder."""
    root = command.common.root
    sae_run = find_run(command.sae, "sae", root)
    weights_hash(sae_run)
    store = store_of(sae_run, root, command.store)
    check_held_out(command, sae_run, store)
    if command.common.dry_run:
        say(dry_run_plan(command, store))
        return None
    folder = measure(command, sae_run, store)
    say(results_table(read_json(folder.path / METRICS)))
    return folder.path


def measure(command: Command, sae_run: Run, store: ActivationStore) -> Run:
    """Fill the evaluation's folder, or find it filled."""
    root = command.common.root
    twin_run = None if command.twin is None else find_run(command.twin, "sae", root)
    config = command.evaluate.run_config(
        sae=weights_hash(sae_run),
        store=manifest_hash(store.run),
        site=parse_site(sae_run.config["site"]),
        baselines=command.baselines,
        twin=None if twin_run is None else weights_hash(twin_run),
    )
    folder = Run.create(sae_run.path, "evaluation", config | {"downstream": command.downstream})
    if folder.complete:
        return folder
    subject = make_subject(command, sae_run, store)
    twin = twin_run and make_subject(command, twin_run, store_of(twin_run, root, None))
    evaluate(
        folder,
        subject.sae,
        subject.store,
        subject.model,
        subject.site,
        command.evaluate,
        baselines=command.baselines,
        twin=twin,
    )
    return folder


def check_held_out(command: Command, sae_run: Run, store: ActivationStore) -> None:
    """Raises `UserError` where the evaluation would read rows that the SAE was trained on."""
    source = sae_run.config["source"]
    trained = source.get("held_out_share")
    if source.get("store") == store.run.path.name and command.evaluate.held_out_share > trained:
        raise UserError(
            f"--held-out-share {command.evaluate.held_out_share:g} reaches into the rows that the "
            f"SAE was trained on; its training held out {trained:g}: give at most that."
        )


def make_subject(command: Command, sae_run: Run, store: ActivationStore) -> Subject:
    """An SAE with its store and its model, in memory."""
    return Subject(
        sae=load_sae(sae_run.path).to(resolve_device(command.device)),
        store=store,
        site=parse_site(sae_run.config["site"]),
        model=model_of(store.run.config, command.device) if command.downstream else None,
    )


def dry_run_plan(command: Command, store: ActivationStore):
    """How much would be measured."""
    return plan(
        "lorgnette evaluate would measure",
        {
            "rows": f"{command.evaluate.n_rows}, held out from training, of {store.run.path}",
            "model": f"{command.evaluate.n_ce_tokens} tokens or places for each candidate"
            if command.downstream
            else "not run",
            "controls": "PCA, random dictionary, mean row" if command.baselines else "none",
            "twin": str(command.twin or "none: train one on a capture with --random-weights"),
        },
    )


COLUMNS = ("fvu", "cosine", "l0", "dead_share", "dense_share")
EFFECTS = ("ce", "ce_recovered", "kl", "pixel", "pixel_recovered", "latent_recovered")


def results_table(measured: dict[str, Any]) -> Table:
    """The results as a table for a person."""
    columns = [*COLUMNS, *(name for name in EFFECTS if name in measured["rows"][0])]
    table = Table("", *columns, title="held-out rows; 95 % intervals are in metrics.json")
    for row in measured["rows"]:
        cells = ("-" if row.get(name) is None else f"{row[name]:.4g}" for name in columns)
        table.add_row(row["label"], *cells)
    return table
