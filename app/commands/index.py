"""`lorgnette index`: make an SAE's features browsable."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from torch import Tensor
from tyro.conf import Positional, arg

from app.commands.options import Common, find_run, plan, say, size
from app.resolve import RESIDUAL_KINDS, manifest_hash, model_of, store_of, weights_hash
from probe.language import LanguageModel
from probe.models import resolve_device
from probe.runs import Run
from probe.sites import parse_site
from probe.store import ActivationStore
from saes.feature_images import image_config, place_names
from saes.features import BuildLimits, IndexConfig, build_index
from saes.folder import load_sae


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Make an SAE's features browsable, in one pass over a store and in bounded memory.

    For every feature: how often and how strongly it fires, where (strongest, per interval, random
    examples), on which tokens, what it does to the logits, which features are near it, and which
    fire together with it. Of an image model: in which images, at which places and steps. Where an
    SAE of the same training on the model with random weights is indexed, too, the dashboard shows
    its numbers beside those of each feature.

    Example: lorgnette index artifacts/saes/smollm2-resid_post.12-topk32-4608-1a2b3c4d
    """

    sae: Annotated[Positional[Path], arg(metavar="SAE")]
    """Folder of a trained SAE."""
    store: Path | None = None
    """Store to look for examples in; the one the SAE was trained on where none is named."""
    index: IndexConfig = field(default_factory=IndexConfig)
    limits: BuildLimits = field(default_factory=BuildLimits)
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    common: Common = field(default_factory=Common)


def run(command: Command) -> Path | None:
    """Index, or say what an index would take; gives the index's folder."""
    sae_run = find_run(command.sae, "sae", command.common.root)
    weights = weights_hash(sae_run)
    store = store_of(sae_run, command.common.root, command.store)
    if command.common.dry_run:
        say(dry_run_plan(command, sae_run, store))
        return None
    return index(command, sae_run, weights, store).path


def index(command: Command, sae_run: Run, weights: str, store: ActivationStore) -> Run:
    """Fill the index's folder, or find it filled."""
    site = sae_run.config["site"]
    config = command.index.run_config(sae=weights, store=manifest_hash(store.run), site=site)
    folder = Run.create(sae_run.path, "index", config)
    if folder.complete:
        return folder
    vocabulary, special_ids, logit_matrix = words_of(store, site)
    device = resolve_device(command.device)
    return build_index(
        folder,
        load_sae(sae_run.path).to(device),
        store,
        site,
        command.index,
        logit_matrix=logit_matrix,
        vocabulary=vocabulary,
        special_ids=special_ids,
        limits=command.limits,
    ).run


def words_of(
    store: ActivationStore, site: str
) -> tuple[Sequence[str], Collection[int], Tensor | None]:
    """Names of the tokens, the special ones, and the unembedding where the site is read by it."""
    images = image_config(store)
    if images is not None:
        return place_names(images.grid), (), None
    model = model_of(store.run.config, device="cpu")
    assert isinstance(model, LanguageModel), "a store of text is of a language model"
    has_logits = parse_site(site).kind in RESIDUAL_KINDS
    return model.token_text(), model.special_ids, model.logit_matrix() if has_logits else None


def dry_run_plan(command: Command, sae_run: Run, store: ActivationStore):
    """Rows, and disk while the index is made: a firing takes about twelve bytes."""
    rows = min(store.n_rows, command.index.max_rows or store.n_rows)
    firings = rows * sae_run.summary.get("l0", sae_run.summary["d_sae"])
    return plan(
        "lorgnette index would read",
        {
            "features": str(sae_run.summary["d_sae"]),
            "rows": f"{rows} of {store.run.path}",
            "disk": f"up to {size(12 * firings)} while it works, a tenth of that in the end",
            "memory": f"{command.limits.memory_gb:g} GB for the statistics",
        },
    )
