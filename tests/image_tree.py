"""Artifacts of an image model for tests: a tiny pipeline's folder and random SAEs of its blocks."""

from dataclasses import dataclass
from pathlib import Path

import torch

from probe.diffusion import DiffusionModel
from probe.runs import Run
from probe.toy import tiny_sdxl
from saes.activations import TopK
from saes.folder import save_sae
from saes.models import SaeConfig, SparseAutoencoder
from saes.recipe_saes import LoadedSae
from saes.scales import FeatureScales, save_scales

WIDTH, D_SAE, K = 16, 48, 4
BLOCKS = ("down.2.1", "up.0.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTree:
    """A root with an SAE for each of two blocks of a tiny pipeline, and the pipeline."""

    root: Path
    """Where the SAEs are found."""
    spec: str
    """The pipeline's folder."""
    model: DiffusionModel
    """The pipeline in memory, under the folder's name."""
    saes: dict[str, Run]
    """The SAEs' folders by block; each keeps the means and deviations of its features."""


def make_image_tree(folder: Path) -> ImageTree:
    """A tree made of random numbers."""
    pipeline = tiny_sdxl().pipeline
    pipeline.save_pretrained(folder / "tiny")
    spec = str(folder / "tiny")
    saes = {
        block: make_sae(folder / "artifacts", spec, block, seed)
        for seed, block in enumerate(BLOCKS)
    }
    return ImageTree(
        root=folder / "artifacts", spec=spec, model=DiffusionModel(spec, pipeline), saes=saes
    )


def make_sae(
    root: Path,
    spec: str,
    site: str,
    seed: int,
    width: int = WIDTH,
    d_sae: int = D_SAE,
    k: int = K,
) -> Run:
    """A random TopK SAE of a site in a complete run folder."""
    numbers = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, width, generator=numbers), dim=1)
    sae = SparseAutoencoder.from_tensors(
        SaeConfig(d_in=width, d_sae=d_sae, activation=TopK(k=k)),
        {
            "W_enc": W_dec.T.clone(),
            "W_dec": W_dec,
            "b_enc": 0.1 * torch.randn(d_sae, generator=numbers),
            "b_dec": 0.1 * torch.randn(width, generator=numbers),
        },
    )
    config = {
        "kind": "sae", "site": site,
        "model": {"spec": spec, "random_weights": None, "dtype": "float32"},
    }  # fmt: skip
    run = Run.create(root / "saes", f"tiny-{site}-{width}", config)
    save_sae(sae, run.path, metadata={}, golden_x=torch.randn(8, width, generator=numbers))
    scales = FeatureScales(
        mean=0.5 + torch.rand(d_sae, generator=numbers), sd=torch.rand(d_sae, generator=numbers)
    )
    save_scales(run.path, scales)
    run.finish(summary={}, inputs={}, seeds={}, device="cpu")
    return run


def loaded_sae(run: Run) -> LoadedSae:
    """An SAE of the tree in memory."""
    from saes.folder import load_sae

    return LoadedSae(run=run, sae=load_sae(run.path), site=run.config["site"])
