"""From what a run's config says to the things it means: its store, its model, its SAE.

An SAE's config names its store by folder name and by the hash of the store's manifest, so a store
that was moved or made again under another name is not mistaken for it.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.commands.options import find_run
from probe.backends import transformer_lens_name
from probe.diffusion import DiffusionModel
from probe.errors import Failure, UserError
from probe.language import LanguageModel
from probe.models import load_model
from probe.runs import MANIFEST, Run, sha256_file
from probe.sites import parse_site
from probe.store import ActivationStore
from saes.activations import activation_name
from saes.folder import WEIGHTS
from saes.training import TrainConfig

RESIDUAL_KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_out")
"""Sites in the units of the residual stream, where a direction acts on the logits directly."""


def manifest_hash(run: Run) -> str:
    """SHA-256 of a run's manifest: it stands for every byte of the run."""
    return sha256_file(run.path / MANIFEST)


def weights_hash(sae_run: Run) -> str:
    """SHA-256 of an SAE's weights. Raises `Failure` where its training is not complete."""
    if not sae_run.complete:
        raise Failure(f"{sae_run.path} is still in training; run `lorgnette train` again first.")
    return sha256_file(sae_run.path / WEIGHTS)


def store_of(sae_run: Run, root: Path, given: Path | None) -> ActivationStore:
    """The store an SAE was trained on, or the one that is given.

    Raises `UserError` where the SAE was trained without a store, or its store is not there.
    """
    if given is not None:
        return ActivationStore.open(find_run(given, "activations", root).path)
    name = sae_run.config["source"].get("store")
    if name is None:
        raise UserError(
            f"{sae_run.path} was trained on a stream and has no store; "
            "capture one and name it with --store."
        )
    path = root / "activations" / name
    if not path.is_dir():
        raise UserError(
            f"the store {name} that {sae_run.path} was trained on is not in {path.parent}; "
            "capture it again, or name another with --store."
        )
    return ActivationStore.open(path)


def model_of(config: dict[str, Any], device: str = "auto") -> LanguageModel | DiffusionModel:
    """The model that a store's or an SAE's config describes."""
    described = config["model"]
    return load_model(
        described["spec"],
        dtype=described["dtype"],
        device=device,
        random_weights=described["random_weights"],
    )


def train_options(config: TrainConfig) -> dict[str, Any]:
    """A training config as JSON, with its activation's name beside the activation's options."""
    options = asdict(config) | {"betas": list(config.betas)}
    options["activation"] = {"name": activation_name(config.activation)} | asdict(config.activation)
    return options


def sae_metadata_of(config: dict[str, Any], corpus: str, context: int) -> dict[str, Any]:
    """What `cfg.json` says of where an SAE belongs, in the words of SAELens 6."""
    site = parse_site(config["site"])
    described = config["model"]
    return {
        "model_name": described["spec"],
        "hook_name": str(site) if site.layer is None else transformer_lens_name(site),
        "hook_head_index": None,
        "context_size": context,
        "prepend_bos": False,
        "dataset_path": corpus,
        "exclude_special_tokens": site.kind != "block",
        "site": str(site),
        "random_weights": described["random_weights"],
    }
