"""OpenAI's sparse autoencoders (github.com/openai/sparse_autoencoder, `model.py`).

One file of `torch.save` an SAE, `<location>_v5_<size>/autoencoders/<layer>.pt`:

    pre_bias [d], latent_bias [L], encoder.weight [L, d], decoder.weight [d, L] (tied SAEs keep
    decoder.linear.weight [L, d] instead)
    activation: "TopK" or "ReLU"; activation_state_dict: {k, postact_fn}
    stats_last_nonzero, latents_activation_frequency, latents_mean_square: counts of training

The formula: f = activation((y - pre_bias) encoder.weight^T + latent_bias) and
yhat = f decoder.weight^T + pre_bias. Where the activation is TopK, y is x freed of its mean and
divided by its deviation, and xhat gets both back; where it is ReLU, y is x. The name of the
activation alone says so.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe.errors import UserError
from saes.activations import Relu, TopK
from saes.interop.names import hook_of_site
from saes.interop.records import Found, Said
from saes.interop.tensor_files import (
    PICKLES,
    checked,
    matrix_shape,
    only_known,
    read_pickle,
    whole,
)
from saes.models import LAYER_NORM_EPS, SaeConfig, SparseAutoencoder

KNOWN = {
    "pre_bias", "latent_bias", "encoder.weight", "decoder.weight", "decoder.linear.weight",
    "stats_last_nonzero", "latents_activation_frequency", "latents_mean_square", "activation",
    "activation_state_dict", "activation.k", "activation.postact_fn",
}  # fmt: skip
PLACE = re.compile(r"(resid_delta_attn|resid_delta_mlp|resid_post_attn|resid_post_mlp)_v5_\w+")
SITES = {
    "resid_post_mlp": "resid_post",
    "resid_delta_mlp": "mlp_out",
    "resid_delta_attn": "attn_out",
}


def matches(path: Path) -> bool:
    """Whether a file looks like one of OpenAI's."""
    could_be = path.is_file() and path.suffix in PICKLES
    return could_be and {"pre_bias", "latent_bias"} <= set(read_pickle(path))


def read(path: Path) -> Found:
    """The SAE in a file of OpenAI's.

    Raises `UserError` for another activation than TopK and ReLU, `Failure` for a damaged file.
    """
    stored = read_pickle(path)
    only_known(path, stored, KNOWN, "entries")
    L, d = matrix_shape(path, stored, "encoder.weight")
    shapes: dict[str, tuple[int, ...]] = {
        "pre_bias": (d,), "latent_bias": (L,), "encoder.weight": (L, d),
    }  # fmt: skip
    tied = "decoder.linear.weight" in stored
    shapes |= {"decoder.linear.weight": (L, d)} if tied else {"decoder.weight": (d, L)}
    w = checked(path, stored, shapes)
    W_dec = w["decoder.linear.weight"] if tied else w["decoder.weight"].T
    k = _k(path, stored)
    sae = SparseAutoencoder.from_tensors(
        SaeConfig(
            d_in=d,
            d_sae=L,
            activation=Relu() if k is None else TopK(k=k),
            normalize="none" if k is None else "layer_norm",
        ),
        {
            "W_enc": w["encoder.weight"].T,
            "W_dec": W_dec,
            "b_enc": w["latent_bias"],
            "b_dec": w["pre_bias"],
        },
    )
    return Found(sae=sae, metadata=_metadata(path), notes=(), says=partial(_say, w, W_dec, k))


def _k(path: Path, stored: Mapping[str, Any]) -> int | None:
    """The number of latents that TopK keeps; None for ReLU."""
    name = stored.get("activation", "ReLU")
    if name == "ReLU":
        return None
    state = stored.get("activation_state_dict")
    state = state if isinstance(state, Mapping) else {}
    after = state.get("postact_fn", stored.get("activation.postact_fn", "ReLU"))
    if name != "TopK" or after != "ReLU":
        raise UserError(
            f"{path} has the activation {name!r} followed by {after!r}; ReLU, and TopK followed by "
            "ReLU, are read."
        )
    return whole(path, "k", state.get("k", stored.get("activation.k")))


def _metadata(path: Path) -> dict[str, Any]:
    """Where the SAE belongs, as far as its address says."""
    places = [found[1] for part in path.resolve().parts if (found := PLACE.fullmatch(part))]
    if not places or not path.stem.isdecimal():
        return {}
    known = {"model_name": "gpt2", "openai_location": places[-1]}
    if places[-1] in SITES:
        site = f"{SITES[places[-1]]}.{int(path.stem)}"
        known |= {"site": site, "hook_name": hook_of_site(site)}
    return known


def _say(w: Mapping[str, Tensor], W_dec: Tensor, k: int | None, x: Float[Tensor, "n d"]) -> Said:
    """The formula of the module's docstring."""
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    y = x if k is None else (x - mean) / (deviation + LAYER_NORM_EPS)
    pre = (y - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
    codes = torch.relu(pre)
    if k is not None:
        largest = torch.topk(pre, k, dim=1)
        codes = torch.zeros_like(pre).scatter(1, largest.indices, largest.values.relu())
    decoded = codes @ W_dec + w["pre_bias"]
    return Said(codes=codes, reconstruction=decoded if k is None else decoded * deviation + mean)
