"""An SAE from anywhere, and the model, site and store that it belongs to.

SOURCE is a folder or file of another project, a run of ours, or an index in one. What belongs to it
is what the person names, else what its run says, else what its metadata say. As a run of ours it is
described as `lorgnette train` describes one, so that evaluate, index and the dashboard work on it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from app.commands.options import find_run
from app.resolve import manifest_hash, store_of
from probe.errors import Failure, UserError
from probe.loader import StoreReader
from probe.models import model_name
from probe.runs import Run, is_run_config, newest_run, read_json
from probe.sites import parse_site
from probe.store import ActivationStore
from saes.activations import activation_name, short_name
from saes.features import FeatureIndex
from saes.folder import save_sae
from saes.interop.names import hook_of_site
from saes.interop.records import Imported
from saes.interop.verifying import probe_rows
from saes.metrics import FidelityMeter
from saes.models import SparseAutoencoder
from saes.scales import save_scales

UNKNOWN = "unknown"
GOLDEN_ROWS = 32
"""Rows of the store kept with an SAE to check it on every load."""
EVERY_MADE_ROW = 5
"""Without a store, every so many of the made rows are kept instead."""
ROWS_AT_ONCE = 256
OURS_ALONE = ("golden_rows", "conversion_notes")
"""Metadata that speak of our folder and are not handed on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """An SAE that was read, and the places it belongs to."""

    imported: Imported
    """The SAE, its metadata, and what was lost on reading."""
    path: Path
    """Where it was read from."""
    run: Run | None
    """Its run, where it is one of ours."""
    store: ActivationStore | None
    """Activations that belong to it."""
    site: str | None
    """The site that it reads; None where nobody says it."""
    model: dict[str, Any]
    """The model, as a run's config describes one."""

    @property
    def sae(self) -> SparseAutoencoder:
        """The SAE."""
        return self.imported.sae

    @property
    def name(self) -> str:
        """The name of what was read, without the ending of a file."""
        path = self.path.resolve()
        return path.stem if path.is_file() else path.name

    def sample(self, n: int) -> Float[Tensor, "n d"] | None:
        """`n` rows of real activations, spread over the store; None without one."""
        if self.store is None or self.site is None:
            return None
        return StoreReader(self.store, self.site, batch_size=1).sample(n)

    def metadata(self) -> dict[str, Any]:
        """Where the SAE belongs, for another project to read."""
        known = {k: v for k, v in self.imported.metadata.items() if k not in OURS_ALONE}
        if self.site is not None:
            known = {"hook_name": hook_of_site(self.site)} | known | {"site": self.site}
        return known | {"model_name": self.model["spec"]}

    def newest_index(self) -> FeatureIndex | None:
        """The SAE's newest complete index; None where it has none."""
        if self.run is None:
            return None
        newest = newest_run(self.run.path, "index")
        return None if newest is None else FeatureIndex.open(newest.path)


# ------------------------------------------------------------------------------- what belongs to it


def is_run(path: Path) -> bool:
    """Whether a folder is a run of ours."""
    file = path / "config.json"
    try:
        return file.is_file() and is_run_config(read_json(file))
    except Failure:
        return False


def find_source(given: Path, root: Path) -> tuple[Path, Run | None]:
    """The SAE's folder or file, and its run where it is one of ours.

    Raises `UserError` where there is no SAE, `Failure` where it is still in training.
    """
    if not given.exists():
        found = find_run(given, "sae", root)
        return found.path, found
    folder = Run.open(given) if is_run(given) else None
    if folder is not None and folder.kind == "index":
        folder = Run.open(given.resolve().parent)
    if folder is None:
        return given, None
    if folder.kind != "sae":
        raise UserError(f"{given} is a run of kind {folder.kind!r} where an SAE was wanted.")
    if not folder.complete:
        raise Failure(f"{given} is still in training; run `lorgnette train` again first.")
    return folder.path, folder


def find_store(given: Path | None, sae_run: Run | None, root: Path) -> ActivationStore | None:
    """The store that is named, or the one that the SAE was trained on where it is there."""
    if given is not None:
        return ActivationStore.open(find_run(given, "activations", root).path)
    named = None if sae_run is None else sae_run.config["source"].get("store")
    if sae_run is None or named is None or not (root / "activations" / named).is_dir():
        return None
    return store_of(sae_run, root, None)


def find_site(asked: str | None, said: Any, store: ActivationStore | None) -> str | None:
    """The site the SAE reads: as asked, as `said` in its description, or the store's only one.

    Raises `UserError` where the store has several, or another than the description says.
    """
    if asked is not None:
        return str(parse_site(asked))
    if isinstance(said, str) and (store is None or said in store.sites):
        return said
    if store is None:
        return None
    if isinstance(said, str) or len(store.sites) > 1:
        raise UserError(
            f"{store.run.path} holds the sites {', '.join(store.sites)} and the SAE's description "
            f"says {said or 'none'}; name the one that the SAE reads with --site."
        )
    return store.sites[0]


def find_model(
    asked: str | None, said: Any, sae_run: Run | None, store: ActivationStore | None
) -> dict[str, Any]:
    """The model, as the store, the SAE's own run, the person or the metadata say it."""
    run = sae_run if store is None else store.run
    if run is not None:
        return dict(run.config["model"])
    return {"spec": str(asked or said or UNKNOWN), "random_weights": None, "dtype": "float32"}


# --------------------------------------------------------------------------------- as a run of ours


def run_config(placed: Placed) -> dict[str, Any]:
    """The config.json of the SAE's run folder, as `lorgnette train` writes it.

    None of the store's rows trained an SAE of another project, so all of them count as held out.
    """
    source: dict[str, Any] = {
        "format": placed.imported.format,
        "name": placed.path.resolve().name,
        "checksum": tensors_checksum(placed.sae),
    }
    if placed.imported.scales is not None:
        source["scales"] = hashlib.sha256(placed.imported.scales.mean.numpy().tobytes()).hexdigest()
    if placed.store is not None:
        source["store"] = placed.store.run.path.name
        source["manifest"] = manifest_hash(placed.store.run)
        source["held_out_share"] = held_out_share(placed.run, placed.store)
    config = placed.sae.config
    activation = {"name": activation_name(config.activation)} | asdict(config.activation)
    return {
        "kind": "sae",
        "schema": 1,
        "model": placed.model,
        "site": placed.site or f"module:{UNKNOWN}",
        "source": source,
        "train": {
            "d_sae": config.d_sae, "activation": activation, "normalize": config.normalize,
        },
    }  # fmt: skip


def held_out_share(sae_run: Run | None, store: ActivationStore) -> float:
    """The share of the store that did not train the SAE: all, unless it is the one it is of."""
    trained_on = {} if sae_run is None else sae_run.config["source"]
    same = trained_on.get("store") == store.run.path.name
    return float(trained_on.get("held_out_share", 1.0)) if same else 1.0


def run_name(config: Mapping[str, Any], sae: SparseAutoencoder) -> str:
    """Model, site and shape, as `lorgnette train` names its folders."""
    described = config["model"]
    twin = "" if described["random_weights"] is None else f"-random{described['random_weights']}"
    site = config["site"].replace(":", "_")
    shape = f"{short_name(sae.config.activation)}-{sae.config.d_sae}"
    return f"{model_name(described['spec'])}{twin}-{site}-{shape}"


def tensors_checksum(sae: SparseAutoencoder) -> str:
    """SHA-256 of an SAE's tensors: the same SAE has the same one, whatever file it came in."""
    found = hashlib.sha256(repr(sae.config).encode())
    for name, tensor in sorted(sae.tensors().items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def fill(
    folder: Run,
    placed: Placed,
    notes: tuple[str, ...],
    rows: Float[Tensor, "n d"] | None,
    measured: Mapping[str, float],
) -> None:
    """Write the SAE, its golden batch (of `rows`, else of made rows) and its manifest."""
    golden = probe_rows(placed.sae)[::EVERY_MADE_ROW] if rows is None else rows[:GOLDEN_ROWS]
    metadata = placed.metadata() | {"conversion_notes": list(notes)}
    metadata |= {"site": folder.config["site"]}
    metadata["golden_rows"] = "made" if rows is None else "of the store"
    save_sae(placed.sae, folder.path, metadata=metadata, golden_x=golden)
    if placed.imported.scales is not None:
        save_scales(folder.path, placed.imported.scales)
    config = placed.sae.config
    shape = {
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "activation": activation_name(config.activation),
    }
    source = folder.config["source"]
    inputs = {"source": source["checksum"]}
    inputs |= {"store": source["manifest"]} if "manifest" in source else {}
    folder.finish(summary=shape | dict(measured), inputs=inputs, seeds={}, device="cpu")


def fidelity(sae: SparseAutoencoder, rows: Float[Tensor, "n d"]) -> dict[str, float]:
    """FVU, L0 and dead share on some rows of the store: a wrong site or scale shows at once."""
    meter = FidelityMeter(n_latents=sae.config.d_sae)
    with torch.no_grad():
        for x in rows.split(ROWS_AT_ONCE):
            meter.update(x, sae(x))
    measured = meter.metrics()
    return {name: measured[name] for name in ("fvu", "l0", "dead_share")}


def in_words(measured: Mapping[str, float]) -> str:
    """What the store's rows say of the SAE, in a line."""
    if not measured:
        return "nothing was measured: no store was named."
    line = f"on rows of the store: FVU {measured['fvu']:.4g}, L0 {measured['l0']:.4g}."
    if measured["fvu"] > 1:
        line += " That is worse than the mean row: is this the model, the site, the scale it wants?"
    return line
