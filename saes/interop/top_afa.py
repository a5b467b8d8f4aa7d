"""The reference code of top-AFA (Lee, Davies, Canby, Hockenmaier 2025, arXiv 2503.24277).

    checkpoints/<name>_<step>/sae.pt        W_enc [d, L], W_dec [L, d], b_enc [L], b_dec [d]
    checkpoints/<name>_<step>/config.json   sae_type, act_size, dict_size, top_k, afa_coeff,
                                            input_unit_norm, model_name, layer, site, ...

The formula: y is x, or under `input_unit_norm` x freed of its mean and divided by its deviation;
a = ReLU((y - b_dec) W_enc). `b_enc` is stored and not used. top-AFA sorts c = (a |W_dec,i|)^2
downwards and keeps the first j for which | sqrt(c_1 + ... + c_j) - |y - b_dec| | is smallest;
`topk` keeps the `top_k` largest a. xhat = f W_dec + b_dec, the normalisation undone.

The same code also trains batch-top-k, JumpReLU and plain SAEs. Batch-top-k SAEs are saved without a
threshold, so their codes depend on the batch they are read in; they are refused.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe.errors import UserError
from probe.sites import LAYER_KINDS
from saes.activations import Activation, TopAfa, TopK
from saes.interop.names import hook_of_site
from saes.interop.records import Found, Said
from saes.interop.tensor_files import (
    checked,
    matrix_shape,
    only_known,
    read_description,
    read_pickle,
    whole,
)
from saes.models import LAYER_NORM_EPS, SaeConfig, SparseAutoencoder

CFG, WEIGHTS = "config.json", "sae.pt"
NAMES = {"W_enc", "W_dec", "b_enc", "b_dec"}


def matches(path: Path) -> bool:
    """Whether a folder looks like a checkpoint of the reference code."""
    return (path / CFG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Found:
    """The SAE of a checkpoint.

    Raises `UserError` for a type that has no place here, `Failure` where a file is damaged.
    """
    cfg = read_description(path / CFG)
    d, L = (whole(path / CFG, name, cfg.get(name)) for name in ("act_size", "dict_size"))
    activation = _activation(path, cfg)
    standardised = str(cfg.get("input_unit_norm", False)).lower() == "true"
    stored = read_pickle(path / WEIGHTS)
    only_known(path / WEIGHTS, stored, NAMES, "tensors")
    matrix_shape(path / WEIGHTS, stored, "W_enc")
    w = checked(
        path / WEIGHTS, stored, {"W_enc": (d, L), "W_dec": (L, d), "b_enc": (L,), "b_dec": (d,)}
    )
    notes = ()
    if bool(w["b_enc"].any()):
        notes = ("its encoder bias, which the reference code stores and never adds, is dropped.",)
    sae = SparseAutoencoder.from_tensors(
        SaeConfig(
            d_in=d,
            d_sae=L,
            activation=activation,
            normalize="layer_norm" if standardised else "none",
        ),
        dict(w) | {"b_enc": torch.zeros(L)},
    )
    says = partial(_say, w, activation, standardised)
    return Found(sae=sae, metadata=_metadata(cfg), notes=notes, says=says)


def _activation(path: Path, cfg: Mapping[str, Any]) -> Activation:
    kind = str(cfg.get("sae_type", "")).lower().replace("-", "").replace("_", "")
    if "afa" in kind:
        coefficient = cfg.get("afa_coeff", 1 / 32)
        if not isinstance(coefficient, int | float) or not 0 <= coefficient < float("inf"):
            raise UserError(
                f"{path / CFG} says afa_coeff = {coefficient!r}; a number from 0 on was wanted."
            )
        return TopAfa(afa=float(coefficient), paper_code=True)
    if kind == "topk":
        return TopK(k=whole(path / CFG, "top_k", cfg.get("top_k")))
    raise UserError(
        f"{path / CFG} is of the type {cfg.get('sae_type')!r}; top-AFA and topk are read (a "
        "batch-top-k SAE of this code holds no threshold, so it says nothing of a single row)."
    )


def _metadata(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Where the SAE belongs, as far as the config says."""
    metadata: dict[str, Any] = {
        name: cfg[name] for name in ("model_name", "dataset_path") if isinstance(cfg.get(name), str)
    }
    if isinstance(cfg.get("seq_len"), int):
        metadata["context_size"] = cfg["seq_len"]
    kind, layer = cfg.get("site"), cfg.get("layer", cfg.get("hook_point_layer"))
    if kind in LAYER_KINDS and isinstance(layer, int):
        metadata["site"] = f"{kind}.{layer}"
        metadata["hook_name"] = hook_of_site(metadata["site"])
    return metadata


def _say(
    w: Mapping[str, Tensor], activation: Activation, standardised: bool, x: Float[Tensor, "n d"]
) -> Said:
    """The formula of the module's docstring."""
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    y = (x - mean) / (deviation + LAYER_NORM_EPS) if standardised else x
    a = torch.relu((y - w["b_dec"]) @ w["W_enc"])
    if isinstance(activation, TopK):
        kept = torch.topk(a, activation.k, dim=1).indices
    else:
        strengths = (a.double() * w["W_dec"].double().norm(dim=1)).square()
        ordered, order = strengths.sort(dim=1, descending=True, stable=True)
        target = (y - w["b_dec"]).double().norm(dim=1, keepdim=True)
        last = (ordered.cumsum(1).sqrt() - target).abs().argmin(1, keepdim=True)
        beyond = torch.arange(a.shape[1]) > last
        a = a.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0.0)
        kept = order
    codes = torch.zeros_like(a).scatter(1, kept, a.gather(1, kept))
    decoded = codes @ w["W_dec"] + w["b_dec"]
    return Said(codes=codes, reconstruction=decoded * deviation + mean if standardised else decoded)
