"""EleutherAI's sparsify (github.com/EleutherAI/sparsify).

    <hookpoint>/cfg.json          activation, k, num_latents, expansion_factor, d_in, ...
    <hookpoint>/sae.safetensors   encoder.weight [L, d], encoder.bias [L], W_dec [L, d], b_dec [d]

The formula: pre = ReLU((x - b_dec) encoder.weight^T + encoder.bias), the k largest are kept, and
xhat = f W_dec + b_dec. `W_dec` is stored as the encoder is, one row a latent: a reader that takes
it for the weight of a linear layer transposes the dictionary. The hookpoint, a module's name in the
Hugging Face base model, is the folder's name.

Transcoders (`transcode`, `skip_connection` with its W_skip) reconstruct another tensor than they
read and are refused, as are groupmax and the older signed TopK.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe.errors import UserError
from probe.runs import write_json
from saes.activations import TopK
from saes.interop.names import hook_of_site, site_of_module
from saes.interop.records import OWN_KEY, Found, Said, read_own_words
from saes.interop.tensor_files import (
    checked,
    matrix_shape,
    only_known,
    read_description,
    read_safetensors,
    save_tensors,
    whole,
)
from saes.models import SaeConfig, SparseAutoencoder

CFG, WEIGHTS = "cfg.json", "sae.safetensors"
KNOWN = {
    "activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk",
    "skip_connection", "transcode", "d_in", "signed", "embed_skip", "gram_lookup",
    "lookup_max_order", "gram_table_hash", OWN_KEY,
}  # fmt: skip
REFUSED = {
    "transcode": "it predicts a module's output from its input (a transcoder)",
    "skip_connection": "it adds a linear map of its input to the output (W_skip)",
    "embed_skip": "it adds a map of the embeddings to the output",
    "gram_lookup": "it adds a table of n-grams to the output",
    "signed": "it keeps the largest latents by absolute value",
}


def matches(path: Path) -> bool:
    """Whether a folder looks like one of sparsify."""
    return (path / CFG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Found:
    """The SAE of a sparsify folder.

    Raises `UserError` for what is no plain TopK SAE, `Failure` where a file is damaged.
    """
    cfg = read_description(path / CFG)
    only_known(path / CFG, cfg, KNOWN, "keys")
    for key, what in REFUSED.items():
        if cfg.get(key):
            raise UserError(
                f"{path / CFG} says {key}: {what}, which has no place here; choose a plain SAE of "
                "the same model."
            )
    activation = cfg.get("activation", "topk")
    if activation != "topk":
        raise UserError(f"{path / CFG} says activation = {activation!r}; only topk is read.")
    k = whole(path / CFG, "k", cfg.get("k", 32))
    stored = read_safetensors(path / WEIGHTS)
    L, d = matrix_shape(path / WEIGHTS, stored, "encoder.weight")
    shapes = {"encoder.weight": (L, d), "encoder.bias": (L,), "W_dec": (L, d), "b_dec": (d,)}
    only_known(path / WEIGHTS, stored, set(shapes), "tensors")
    _check_sizes(path, cfg, L, d)
    w = checked(path / WEIGHTS, stored, shapes)
    multi = bool(cfg.get("multi_topk")) and 4 * k <= L
    sae = SparseAutoencoder.from_tensors(
        SaeConfig(d_in=d, d_sae=L, activation=TopK(k=k, multi=multi)),
        {
            "W_enc": w["encoder.weight"].T,
            "W_dec": w["W_dec"],
            "b_enc": w["encoder.bias"],
            "b_dec": w["b_dec"],
        },
    )
    site = site_of_module(path.resolve().name)
    metadata = {} if site is None else {"site": site, "hook_name": hook_of_site(site)}
    metadata |= read_own_words(cfg)
    return Found(sae=sae, metadata=metadata, notes=(), says=partial(_say, w, k))


def write(sae: SparseAutoencoder, folder: Path, words: Mapping[str, Any]) -> None:
    """Write a TopK SAE that reads raw activations into `folder`; sparsify skips our `words`."""
    activation = sae.config.activation
    assert isinstance(activation, TopK), f"sparsify holds TopK SAEs, not {activation}"
    tensors = sae.tensors()
    save_tensors(
        folder / WEIGHTS,
        {
            "encoder.weight": tensors["W_enc"].T,
            "encoder.bias": tensors["b_enc"],
            "W_dec": tensors["W_dec"],
            "b_dec": tensors["b_dec"],
        },
    )
    cfg: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": max(1, sae.config.d_sae // sae.config.d_in),
        "normalize_decoder": True,
        "num_latents": sae.config.d_sae,
        "k": activation.k,
        "multi_topk": activation.multi,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.config.d_in,
        OWN_KEY: dict(words),
    }
    write_json(folder / CFG, cfg)


def _check_sizes(path: Path, cfg: Mapping[str, Any], L: int, d: int) -> None:
    d_in = whole(path / CFG, "d_in", cfg.get("d_in", d))
    latents = whole(path / CFG, "num_latents", cfg.get("num_latents", 0), least=0)
    latents = latents or d_in * whole(path / CFG, "expansion_factor", cfg.get("expansion_factor"))
    if (latents, d_in) != (L, d):
        raise UserError(
            f"{path / CFG} speaks of {latents} latents of width {d_in} and {WEIGHTS} holds {L} of "
            f"width {d}; the two do not belong together: download both again."
        )


def _say(w: Mapping[str, Tensor], k: int, x: Float[Tensor, "n d"]) -> Said:
    """The formula of the module's docstring."""
    pre = torch.relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    largest = torch.topk(pre, k, dim=1)
    codes = torch.zeros_like(pre).scatter(1, largest.indices, largest.values)
    return Said(codes=codes, reconstruction=codes @ w["W_dec"] + w["b_dec"])
