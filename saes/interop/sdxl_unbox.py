"""sdxl-unbox (github.com/surkovv/sdxl-unbox; Surkov et al. 2024, arXiv 2410.22366).

    checkpoints/<block>_k10_hidden5120_auxk256_bs4096_lr0.0001/final/
        config.json      n_dirs_local, d_model, k, auxk, dead_steps_threshold
        state_dict.pth   {"state_dict": pre_bias [d], latent_bias [L], encoder.weight [L, d],
                          decoder.weight [d, L], stats_last_nonzero [L]}
        mean.pt, std.pt  [L]: each feature's scale, the unit of the brush

The formula: ReLU of the k largest of (x - pre_bias) encoder.weight^T + latent_bias, and
xhat = f decoder.weight^T + pre_bias. x is what a block of SDXL's U-Net adds to its input (output
minus input), one vector a place of the feature map.

The project does not say how mean.pt and std.pt were made. What is read is kept in the SAE's folder
(`saes.scales`) and is then the unit of strengths. What is written here is the mean and the standard
deviation over the rows on which a feature fires, 0 where it never does.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe.runs import write_json
from probe.sites import block_of_path
from saes.activations import TopK
from saes.interop.records import OWN_KEY, Found, Said, read_own_words
from saes.interop.tensor_files import (
    checked,
    matrix_shape,
    only_known,
    read_description,
    read_pickle,
    read_vector,
    save_pickle,
    whole,
)
from saes.models import SaeConfig, SparseAutoencoder
from saes.scales import FeatureScales

CFG, WEIGHTS, MEAN, SD = "config.json", "state_dict.pth", "mean.pt", "std.pt"
KNOWN_CFG = {"n_dirs_local", "d_model", "k", "auxk", "dead_steps_threshold", OWN_KEY}
BLOCK = re.compile(r"(unet\.[\w.]+?)_k\d+_hidden\d+.*")
DEAD_STEPS = 2441
"""10 M tokens in batches of 4096, as in the published checkpoints; it decides nothing here."""


def matches(path: Path) -> bool:
    """Whether a folder looks like one of sdxl-unbox."""
    return (path / CFG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Found:
    """The SAE of an sdxl-unbox folder. Raises `Failure` where a file is damaged."""
    cfg = read_description(path / CFG)
    only_known(path / CFG, cfg, KNOWN_CFG, "keys")
    file = path / WEIGHTS
    inner = read_pickle(file).get("state_dict")
    stored = inner if isinstance(inner, Mapping) else {}
    d, L = (whole(path / CFG, name, cfg.get(name)) for name in ("d_model", "n_dirs_local"))
    k = whole(path / CFG, "k", cfg.get("k"))
    matrix_shape(file, stored, "encoder.weight")
    shapes = {
        "pre_bias": (d,), "latent_bias": (L,), "encoder.weight": (L, d), "decoder.weight": (d, L),
    }  # fmt: skip
    only_known(file, stored, {*shapes, "stats_last_nonzero"}, "tensors")
    w = checked(file, stored, shapes)
    sae = SparseAutoencoder.from_tensors(
        SaeConfig(d_in=d, d_sae=L, activation=TopK(k=k)),
        {
            "W_enc": w["encoder.weight"].T,
            "W_dec": w["decoder.weight"].T,
            "b_enc": w["latent_bias"],
            "b_dec": w["pre_bias"],
        },
    )
    metadata, notes = read_own_words(cfg), ()
    if OWN_KEY not in cfg:
        metadata = _metadata(path)
        notes = ("it reads what a block adds to its input (output minus input), not the output.",)
    if (path / MEAN).is_file() and not (path / SD).is_file():
        notes += (f"{SD} is missing, so strengths cannot be measured in sd.",)
    return Found(
        sae=sae, metadata=metadata, notes=notes, says=partial(_say, w, k), scales=_scales(path, L)
    )


def write(
    sae: SparseAutoencoder, folder: Path, words: Mapping[str, Any], scales: FeatureScales | None
) -> None:
    """Write a TopK SAE that reads raw activations into `folder`, with `scales` where given.

    The project's own reader skips our `words`.
    """
    activation = sae.config.activation
    assert isinstance(activation, TopK), f"sdxl-unbox holds TopK SAEs, not {activation}"
    tensors = sae.tensors()
    state = {
        "pre_bias": tensors["b_dec"],
        "latent_bias": tensors["b_enc"],
        "stats_last_nonzero": torch.zeros(sae.config.d_sae, dtype=torch.long),
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "decoder.weight": tensors["W_dec"].T.contiguous(),
    }
    save_pickle(folder / WEIGHTS, {"state_dict": state})
    if scales is not None:
        save_pickle(folder / MEAN, scales.mean.float().cpu())
        save_pickle(folder / SD, scales.sd.float().cpu())
    cfg = {
        "n_dirs_local": sae.config.d_sae,
        "d_model": sae.config.d_in,
        "k": activation.k,
        "auxk": None,
        "dead_steps_threshold": DEAD_STEPS,
        OWN_KEY: dict(words),
    }
    write_json(folder / CFG, cfg)


def _scales(path: Path, n_features: int) -> FeatureScales | None:
    """The brush's units; None where the folder has none."""
    if not (path / MEAN).is_file():
        return None
    mean = read_vector(path / MEAN, n_features)
    known = (path / SD).is_file()
    sd = read_vector(path / SD, n_features) if known else torch.zeros(n_features)
    return FeatureScales(mean=mean, sd=sd)


def _metadata(path: Path) -> dict[str, Any]:
    """Where a published SAE belongs, as its folder's name says."""
    metadata: dict[str, Any] = {"model_name": "sdxl-turbo", "tensor_kind": "update"}
    blocks = [found[1] for part in path.resolve().parts if (found := BLOCK.fullmatch(part))]
    if blocks:
        site = block_of_path(blocks[-1]) or f"module:{blocks[-1]}:update"
        metadata["site"] = metadata["hook_name"] = site
    return metadata


def _say(w: Mapping[str, Tensor], k: int, x: Float[Tensor, "n d"]) -> Said:
    """The formula of the module's docstring."""
    pre = (x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
    largest = torch.topk(pre, k, dim=1)
    codes = torch.zeros_like(pre).scatter(1, largest.indices, largest.values.relu())
    return Said(codes=codes, reconstruction=codes @ w["decoder.weight"].T + w["pre_bias"])
