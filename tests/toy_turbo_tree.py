"""An untrained toy-turbo in a folder, and SAEs of its blocks: for tests of what needs its world."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from analyses.block_roles_drawing import Asked, draw_and_read
from probe.diffusion import DiffusionModel
from probe.pipelines import make_random_unet
from probe.runs import Run
from probe.sites import parse_site
from probe.toyturbo.briefs import describe, draw_briefs
from probe.toyturbo.fitting import seeded
from probe.toyturbo.making import READER
from probe.toyturbo.parts import (
    idle,
    make_pipeline,
    make_text_encoders,
    make_tokenizer,
    make_unet,
    make_vae,
    other_blocks,
)
from probe.toyturbo.reader import AttributeReader
from saes.activations import TopK
from saes.folder import save_sae
from saes.models import SaeConfig, SparseAutoencoder

BLOCKS = ("down.2.1", "up.0.1")
D_SAE, K, TWIN = 24, 4, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyTree:
    """A root with SAEs of an untrained toy-turbo and of its twin."""

    root: Path
    """Where the SAEs are found."""
    spec: str
    """The model's folder, with an untrained attribute reader."""
    saes: dict[str, Run]
    """By block."""
    twins: dict[str, Run]
    """Of the random-weight twin, by block."""
    wide: Run
    """One of the first block with twice the features."""


def make_toy_tree(folder: Path) -> ToyTree:
    """A tree made of random numbers; the SAEs' directions are updates of the model itself."""
    torch.manual_seed(0)
    tokenizer, unet = make_tokenizer(), make_unet()
    idle(unet, other_blocks(unet))
    pipeline = make_pipeline(tokenizer, make_text_encoders(tokenizer), make_vae(), unet)
    spec = str(folder / "toy")
    pipeline.save_pretrained(spec)
    save_file(AttributeReader().state_dict(), folder / "toy" / READER)
    model, root = DiffusionModel(spec, pipeline), folder / "artifacts"
    saes = _make_saes(root, model, None, D_SAE)
    wide = _make_saes(root, model, None, 2 * D_SAE, BLOCKS[:1])[BLOCKS[0]]
    pipeline.unet = make_random_unet(unet.config, TWIN, torch.float32)
    twins = _make_saes(root, DiffusionModel(spec, pipeline, TWIN), TWIN, D_SAE)
    return ToyTree(root=root, spec=spec, saes=saes, twins=twins, wide=wide)


def _make_saes(
    root: Path, model: DiffusionModel, random: int | None, d_sae: int, blocks=BLOCKS
) -> dict[str, Run]:
    brief = draw_briefs(8, seeded(1))
    asked = Asked(prompts=tuple(describe(brief)), seeds=tuple(range(8)))
    _, updates = draw_and_read(model, asked, [parse_site(block) for block in blocks])
    return {
        block: make_sae(root, model.spec, block, x.flatten(0, 1), random, d_sae)
        for block, x in updates.items()
    }


def make_sae(
    root: Path, spec: str, site: str, x: torch.Tensor, random: int | None, d_sae: int = D_SAE
) -> Run:
    """A TopK SAE whose features are updates less their mean, in a complete run folder."""
    centre = x.mean(0)
    chosen = torch.randperm(len(x), generator=seeded(2))[:d_sae]
    W_dec = torch.nn.functional.normalize(x[chosen] - centre, dim=1)
    sae = SparseAutoencoder.from_tensors(
        SaeConfig(d_in=x.shape[1], d_sae=d_sae, activation=TopK(k=K)),
        {"W_enc": W_dec.T.clone(), "W_dec": W_dec, "b_enc": torch.zeros(d_sae), "b_dec": centre},
    )
    model = {"spec": spec, "random_weights": random, "dtype": "float32"}
    config = {"kind": "sae", "site": site, "model": model}
    run = Run.create(root / "saes", f"toy-{site.replace(':', '_')}", config | {"size": d_sae})
    save_sae(sae, run.path, metadata={}, golden_x=x[:8])
    run.finish(summary={}, inputs={}, seeds={}, device="cpu")
    return run
