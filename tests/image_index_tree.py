"""Stores and indexes of images for tests: a tiny pipeline draws, a small SAE reads."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from app.commands import capture, evaluate, index, train
from app.commands.options import Common
from probe.diffusion import DiffusionModel
from probe.runs import Run
from probe.store import ActivationStore
from probe.store_config import ImageStoreConfig
from probe.store_writing import write_store
from probe.toy import tiny_sdxl
from saes.activations import TopK
from saes.constraints import initialise
from saes.evaluation import EvaluateConfig
from saes.feature_images import place_names
from saes.feature_queries import FeatureIndex
from saes.feature_schema import IndexConfig
from saes.features import BuildLimits, build_index
from saes.models import SaeConfig, SparseAutoencoder
from saes.training import TrainConfig

SITE = "down.2.1"
GRID = (4, 4)
D_SAE, K = 40, 4
THINGS = ("boat", "cat", "hill", "jar", "<b>fox</b>")
COLOURS = ("red", "blue", "pale")


@functools.cache
def pipeline() -> DiffusionModel:
    """The tiny pipeline, once for all tests."""
    return tiny_sdxl()


def write_prompts(path: Path, n: int) -> Path:
    """So many prompts of a few words."""
    words = [(COLOURS[i % len(COLOURS)], THINGS[i // 2 % len(THINGS)]) for i in range(n)]
    path.write_text("".join(f"a {colour} {thing}\n" for colour, thing in words))
    return path


def make_store(folder: Path, *, images: int = 12, **changes) -> ActivationStore:
    """A store of `images` images; `changes` are fields of its config."""
    prompts = write_prompts(folder / "prompts.txt", images + 3)
    values = {
        "model": {"spec": "tiny-sdxl", "random_weights": None, "dtype": "float32"},
        "prompts": str(prompts), "sites": (SITE,), "grid": GRID, "height": 32, "width": 32,
        "images": images, "batch_images": 3, "shard_batches": 2, "dtype": "float32", "seed": 7,
    }  # fmt: skip
    config = ImageStoreConfig(**(values | changes))
    run = Run.create(folder, "store", config.run_config())
    return write_store(run, pipeline(), progress=False)


def make_sae(store: ActivationStore, d_sae: int = D_SAE, site: str = SITE) -> SparseAutoencoder:
    """An SAE of random directions around the middle of a store's rows."""
    sae = SparseAutoencoder(SaeConfig(d_in=store.d(site), d_sae=d_sae, activation=TopK(k=K)))
    initialise(sae, store.shard(0, site).values.float(), torch.Generator().manual_seed(3))
    return sae.requires_grad_(False)


def make_index(
    folder: Path,
    store: ActivationStore,
    sae: SparseAutoencoder,
    config: IndexConfig,
    limits: BuildLimits | None = None,
) -> FeatureIndex:
    """An index of an SAE on the store."""
    run = Run.create(folder, "index", config.run_config(sae="0", store="1", site=SITE))
    return build_index(
        run, sae, store, SITE, config, logit_matrix=None, vocabulary=place_names(GRID),
        special_ids=(), limits=limits, progress=False,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTree:
    """A root with a trained, evaluated and indexed SAE of an image model."""

    root: Path
    """What LORGNETTE_ROOT names."""
    sae: Run
    """The SAE."""
    store: Path
    """Its store."""


def make_image_tree(folder: Path, *, images: int = 40, steps: int = 1) -> ImageTree:
    """A root made by the commands themselves."""
    spec, root = folder / "pipeline", folder / "artifacts"
    pipeline().pipeline.save_pretrained(spec)
    prompts = write_prompts(folder / "prompts.txt", images)
    common = Common(root=root)
    store = capture.run(
        capture.Command(
            model=str(spec), corpus=str(prompts), sites=(SITE,), images=images, steps=steps,
            store_dtype="float32", dtype="float32", device="cpu", common=common,
        )
    )  # fmt: skip
    assert store is not None
    options = TrainConfig(
        d_sae=D_SAE, activation=TopK(k=K), steps=40, warmup_steps=5, init_rows=256, k_aux=8,
        dead_after_tokens=2000, lr=3e-3,
    )  # fmt: skip
    sae = train.run(
        train.Command(
            source=str(store), train=options, batch_size=64, buffer_rows=512,
            held_out_share=0.2, device="cpu", common=common,
        )
    )  # fmt: skip
    assert sae is not None
    few = EvaluateConfig(n_rows=128, n_ce_tokens=64, n_fit_rows=512, held_out_share=0.2)
    evaluate.run(evaluate.Command(sae=sae, evaluate=few, device="cpu", common=common))
    index.run(index.Command(sae=sae, index=IndexConfig(top=8), device="cpu", common=common))
    return ImageTree(root=root, sae=Run.open(sae), store=store)
