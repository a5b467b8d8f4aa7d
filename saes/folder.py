"""The SAE folder on disk: SAELens 6's format, and a golden batch that is checked on every load.

    cfg.json                 shape, activation, normalisation; `metadata` says where the SAE belongs
    sae_weights.safetensors  W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc [d_sae], b_dec [d_in]
    golden.safetensors       x [n, d_in], values [n, k], indices [n, k], reconstruction [n, d_in]

`SAE.load_from_disk(folder)` of SAELens 6 reads the first two as they are;
`metadata.sae_lens_version` is the version of the format, without which SAELens takes a TopK SAE for
a ReLU one of its fifth version. The golden batch is what the SAE said when it was saved: a folder
whose files do not belong together, or a reader that computes something else, does not load.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from probe.errors import Failure, UserError
from probe.runs import atomic_path, read_json, write_json
from saes.activations import TopK
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
KEYS = {
    "architecture", "d_in", "d_sae", "k", "device", "normalize_activations", "metadata", *FIXED
}  # fmt: skip
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
    weights = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    _save_tensors(run_dir / WEIGHTS, weights)
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
    sae = SparseAutoencoder(config)
    weights = _load_tensors(path / WEIGHTS)
    wanted = {name: list(tensor.shape) for name, tensor in sae.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    if found != wanted:
        raise Failure(
            f"{path / WEIGHTS} holds {found} where {path / CFG} asks for {wanted}; the two do not "
            "belong together: make the SAE again."
        )
    sae.load_state_dict(weights)
    _check_golden(sae, path)
    return sae.requires_grad_(False).eval()


def sae_metadata(path: Path) -> dict[str, Any]:
    """The `metadata` of the SAE in the folder `path`; raises as `load_sae` does."""
    return _read_cfg(Path(path))["metadata"]


def _cfg(config: SaeConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architecture": "topk",
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "k": config.activation.k,
        "device": "cpu",
        "normalize_activations": config.normalize,
        **FIXED,
        "metadata": {
            "sae_lens_training_version": None,
            "training_architecture": "topk",
            "hook_head_index": None,
            "seqpos_slice": [None],
            "model_from_pretrained_kwargs": {},
            "prepend_bos": False,
            **metadata,
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
    unknown = sorted(set(cfg) - KEYS)
    if unknown:
        raise Failure(
            f"{file} has keys this version does not know ({', '.join(unknown)}); they may change "
            "what the SAE computes, so it is not loaded: use the version that wrote it."
        )
    known = {"architecture": ("topk",), "normalize_activations": NORMALIZE}
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
            activation=TopK(k=int(cfg["k"])),
            normalize=cfg["normalize_activations"],
        )
    except (UserError, TypeError, ValueError) as error:
        raise Failure(f"{path / CFG} describes no SAE ({error}); make the SAE again.") from error


def _check_golden(sae: SparseAutoencoder, path: Path) -> None:
    """Compare the SAE with its golden batch.

    The values of a row come strongest first, so a near tie that falls the other way hardly moves
    them; the reconstruction is made from the golden codes and does not depend on ties at all.
    """
    golden = _load_tensors(path / GOLDEN)
    if set(golden) != {"x", "values", "indices", "reconstruction"}:
        raise Failure(f"{path / GOLDEN} is not a golden batch; make the SAE again.")
    x, indices = golden["x"], golden["indices"]
    n, k = len(x), sae.config.activation.k
    sound = x.shape[1:] == (sae.config.d_in,) and golden["reconstruction"].shape == x.shape
    sound = sound and golden["values"].shape == indices.shape == (n, k)
    if not sound or not bool(((indices >= 0) & (indices < sae.config.d_sae)).all()):
        raise Failure(f"{path / GOLDEN} does not fit {path / CFG}; make the SAE again.")
    codes = Codes(values=golden["values"], indices=indices)
    with torch.no_grad():
        found = sae.encode(x)
        reconstruction = sae.decode(codes, x)
    same = _close(found.values, codes.values) and _close(reconstruction, golden["reconstruction"])
    if not same or _agreement(found, codes) < AGREEMENT:
        raise Failure(
            f"the SAE in {path} no longer says what it said when it was saved: a file was changed "
            "or mixed up; `lorgnette runs --verify` tells which, or make the SAE again."
        )


def _close(found: Float[Tensor, "n m"], golden: Float[Tensor, "n m"]) -> bool:
    if not golden.numel():
        return True
    return bool((found - golden).abs().max() <= TOLERANCE * golden.abs().max())


def _agreement(found: Codes, golden: Codes) -> float:
    """Share of the golden active latents that are active again."""
    active = golden.values > 0
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
