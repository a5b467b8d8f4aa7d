"""The SAE folder on disk: SAELens 6's format, and a golden batch that is checked on every load.

    cfg.json                 shape, activation, normalisation; `metadata` says where the SAE belongs
    sae_weights.safetensors  W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc [d_sae], b_dec [d_in]
                             and what else `SparseAutoencoder.tensors` gives
    golden.safetensors       x [n, d_in], values [n, k], indices [n, k], reconstruction [n, d_in]

`SAE.load_from_disk(folder)` of SAELens 6 reads the first two as they are, for the architectures
that it knows (`ARCHITECTURES`; top-AFA and the k-sparse autoencoder have no home there). A
batch-wise activation is saved as the JumpReLU that it is outside training.
`metadata.sae_lens_version` is the version of the format, without which SAELens takes a TopK SAE for
a ReLU one of its fifth version; `metadata.activation` is our own, exact name of the activation. The
golden batch is what the SAE said when it was saved: a folder
whose files do not belong together, or a reader that computes something else, does not load.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from probe.errors import Failure, UserError
from probe.runs import atomic_path, read_json, write_json
from saes.activations import NAMES, Activation, KSparse, TopK, activation_name
from saes.models import SaeConfig, SparseAutoencoder
from saes.types import Codes

CFG, WEIGHTS, GOLDEN = "cfg.json", "sae_weights.safetensors", "golden.safetensors"
FORMAT_VERSION = "6.0.0"
FIXED = {
    "dtype": "float32",
    "apply_b_dec_to_input": True,
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
}
"""What SAELens leaves open and we do not: an SAE saved otherwise is not ours to read."""
KEYS = {"architecture", "d_in", "d_sae", "device", "normalize_activations", "metadata", *FIXED}
ARCHITECTURES: dict[str, str] = {
    "topk": "topk",
    "batch_topk": "jumprelu",
    "matryoshka": "jumprelu",
    "top_afa": "top_afa",
    "jump_relu": "jumprelu",
    "gated": "gated",
    "relu": "standard",
    "k_sparse": "k_sparse",
}
"""SAELens's names of what each activation does outside training; `top_afa` and `k_sparse`, which it
does not know, are ours."""
NORMALIZE = ("none", "layer_norm")
TOLERANCE = 1e-4
"""Largest difference from the golden batch, relative to its largest number: room for another
machine's order of summation, a thousandth of what a wrong bias or normalisation would give."""
AGREEMENT = 0.98
"""Share of golden latents that must be chosen again: a near tie may fall otherwise elsewhere."""


def save_sae(
    sae: SparseAutoencoder,
    run_dir: Path,
    *,
    metadata: Mapping[str, Any],
    golden_x: Float[Tensor, "n d"],
) -> None:
    """Write `sae` into `run_dir`, with what it says of `golden_x`.

    `metadata` belongs to the reader: `hook_name` (TransformerLens's name of the site),
    `model_name`, `context_size`, `dataset_path`, `prepend_bos`, `exclude_special_tokens` and any
    further keys.
    """
    _save_tensors(run_dir / WEIGHTS, sae.tensors())
    with torch.no_grad():
        output = sae(golden_x)
    golden = {
        "x": golden_x.float(),
        "values": output.codes.values,
        "indices": output.codes.indices,
        "reconstruction": output.reconstruction,
    }
    _save_tensors(run_dir / GOLDEN, {name: tensor.cpu() for name, tensor in golden.items()})
    write_json(run_dir / CFG, _cfg(sae.config, metadata))


def load_sae(path: Path) -> SparseAutoencoder:
    """The SAE saved in the folder `path`, on the CPU.

    Raises `UserError` where there is no SAE, `Failure` where a file is damaged, says something this
    version does not know, or the SAE no longer says what it said of the golden batch.
    """
    path = Path(path)
    config = _config(path)
    weights = _load_tensors(path / WEIGHTS)
    try:
        sae = SparseAutoencoder.from_tensors(config, weights)
    except UserError as error:
        raise Failure(
            f"{path / WEIGHTS} and {path / CFG} do not belong together ({error}); make the SAE "
            "again."
        ) from error
    _check_golden(sae, path)
    return sae.requires_grad_(False).eval()


def sae_metadata(path: Path) -> dict[str, Any]:
    """The `metadata` of the SAE in the folder `path`; raises as `load_sae` does."""
    return _read_cfg(Path(path))["metadata"]


def _cfg(config: SaeConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    name = activation_name(config.activation)
    k = {"k": config.activation.k} if isinstance(config.activation, TopK) else {}
    return {
        "architecture": ARCHITECTURES[name],
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        **k,
        "device": "cpu",
        "normalize_activations": config.normalize,
        **FIXED,
        "metadata": {
            "sae_lens_training_version": None,
            "training_architecture": name,
            "hook_head_index": None,
            "seqpos_slice": [None],
            "model_from_pretrained_kwargs": {},
            "prepend_bos": False,
            **metadata,
            "activation": {"name": name} | asdict(config.activation),
            "sae_lens_version": FORMAT_VERSION,
        },
    }


def _read_cfg(path: Path) -> dict[str, Any]:
    """cfg.json, once every key and value in it is one that this version understands."""
    file = path / CFG
    if not file.is_file():
        raise UserError(
            f"{path} holds no finished SAE (no {CFG}); `lorgnette runs` lists those there are."
        )
    cfg = read_json(file)
    if not isinstance(cfg, dict) or KEYS - set(cfg):
        raise Failure(f"{file} is not the description of an SAE; make the SAE again.")
    unknown = sorted(set(cfg) - KEYS - {"k"})
    if unknown:
        raise Failure(
            f"{file} has keys this version does not know ({', '.join(unknown)}); they may change "
            "what the SAE computes, so it is not loaded: use the version that wrote it."
        )
    architectures = tuple(sorted(set(ARCHITECTURES.values())))
    known = {"architecture": architectures, "normalize_activations": NORMALIZE}
    known |= {key: (value,) for key, value in FIXED.items()}
    for key, values in known.items():
        if cfg[key] not in values:
            raise Failure(
                f"{file} says {key} = {cfg[key]!r} where this version reads "
                f"{' or '.join(map(repr, values))}; use the version that wrote it."
            )
    return cfg


def _config(path: Path) -> SaeConfig:
    cfg = _read_cfg(path)
    try:
        return SaeConfig(
            d_in=int(cfg["d_in"]),
            d_sae=int(cfg["d_sae"]),
            activation=(activation := _activation(cfg)),
            normalize=cfg["normalize_activations"],
            tied=isinstance(activation, KSparse),
        )
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise Failure(f"{path / CFG} describes no SAE ({error}); make the SAE again.") from error


def _activation(cfg: Mapping[str, Any]) -> Activation:
    """The activation by our own name, or what SAELens's architecture says of it."""
    described: dict[str, Any] = dict(cfg["metadata"].get("activation") or {})
    if not described:
        plain = {"topk": "topk", "jumprelu": "jump_relu", "gated": "gated", "standard": "relu"}
        described = {"name": plain[cfg["architecture"]]}
    kind = NAMES[described.pop("name")]
    if "k" in cfg:
        described["k"] = cfg["k"]
    if "prefixes" in described:
        described["prefixes"] = tuple(described["prefixes"])
    activation = kind(**described)
    if ARCHITECTURES[activation_name(activation)] != cfg["architecture"]:
        raise UserError(f"{activation} is no {cfg['architecture']}")
    return activation


def _check_golden(sae: SparseAutoencoder, path: Path) -> None:
    """Compare the SAE with its golden batch.

    The values of a row come strongest first, so a near tie that falls the other way hardly moves
    them; the reconstruction is made from the golden codes and does not depend on ties at all.
    """
    golden = _load_tensors(path / GOLDEN)
    if set(golden) != {"x", "values", "indices", "reconstruction"}:
        raise Failure(f"{path / GOLDEN} is not a golden batch; make the SAE again.")
    x, indices = golden["x"], golden["indices"]
    n = len(x)
    sound = x.shape[1:] == (sae.config.d_in,) and golden["reconstruction"].shape == x.shape
    sound = sound and golden["values"].shape == indices.shape
    sound = sound and indices.ndim == 2 and len(indices) == n
    if isinstance(sae.config.activation, TopK):
        sound = sound and indices.shape[1] == sae.config.activation.k
    if not sound or not bool(((indices >= 0) & (indices < sae.config.d_sae)).all()):
        raise Failure(f"{path / GOLDEN} does not fit {path / CFG}; make the SAE again.")
    codes = Codes(values=golden["values"], indices=indices)
    with torch.no_grad():
        found = sae.encode(x)
        reconstruction = sae.decode(codes, x)
    k = max(found.values.shape[1], codes.values.shape[1])
    same = _close(_wide(found.values, k), _wide(codes.values, k)) and _close(
        reconstruction, golden["reconstruction"]
    )
    if not same or _agreement(found, codes) < AGREEMENT:
        raise Failure(
            f"the SAE in {path} no longer says what it said when it was saved: a file was changed "
            "or mixed up; `lorgnette runs --verify` tells which, or make the SAE again."
        )


def _close(found: Float[Tensor, "n m"], golden: Float[Tensor, "n m"]) -> bool:
    if not golden.numel():
        return True
    return bool((found - golden).abs().max() <= TOLERANCE * golden.abs().max())


def _wide(values: Float[Tensor, "n m"], k: int) -> Float[Tensor, "n k"]:
    """Values of rows whose longest may have lost or won an entry, as `k` columns."""
    return functional.pad(values, (0, k - values.shape[1]))


def _agreement(found: Codes, golden: Codes) -> float:
    """Share of the golden active latents that are active again."""
    active = golden.values != 0
    again = (golden.indices[:, :, None] == found.indices[:, None, :]).any(-1)
    return float(again[active].float().mean()) if bool(active.any()) else 1.0


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise Failure(f"{path} is missing; make the SAE again.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise Failure(f"{path} is damaged ({error}); make the SAE again.") from error
