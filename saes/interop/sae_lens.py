"""SAELens, version 6 (github.com/decoderesearch/SAELens).

    cfg.json                 architecture, d_in, d_sae, k, how the input is read; `metadata`
    sae_weights.safetensors  W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_dec [d_in], and
        topk, standard       b_enc [d_sae]
        jumprelu             b_enc, threshold [d_sae]
        gated                b_gate, b_mag, r_mag [d_sae]
        batchtopk, matryoshka_batchtopk (training only)    b_enc, topk_threshold []
    activation_scaler.json   training only: the factor on the input

With y the input after `normalize_activations` and u = (y - b_dec) W_enc, or y W_enc where
`apply_b_dec_to_input` is false:

    standard   f = ReLU(u + b_enc)                     topk     ReLU of the k largest of u + b_enc
    jumprelu   ReLU(u + b_enc) where it exceeds threshold
    gated      ReLU(exp(r_mag) u + b_mag) where u + b_gate > 0
    xhat = f W_dec + b_dec, and the normalisation undone

How its options are read. An encoder that reads y itself is centred exactly: b_enc gains b_dec W_enc
(b_gate too, and b_mag exp(r_mag) times that). `rescale_acts_by_decoder_norm` multiplies u + b_enc
by |W_dec,i| before the choice and divides after it: folded into W_enc, b_enc and W_dec.
`expected_average_only_in` multiplies the input by a number that the inference folder does not hold
(SAELens itself then skips it with a warning): it is taken from activation_scaler.json or from the
person, and folded in with the codes unchanged. `layer_norm` is ours. `constant_norm_rescale` and
`covariance_whitening` are refused. `hook_z` inputs are the heads' outputs one after the other,
which is what `head_out` sites give; an SAE of such a site is written so.

A batchtopk SAE is saved for inference as a jumprelu one; from a training folder its running
threshold is taken, as SAELens does on saving. Versions before 6 are refused: their configs leave
the architecture to be guessed (TopK SAEs were taken for ReLU ones).
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe.errors import Failure, UserError
from probe.runs import write_json
from saes.activations import (
    Activation,
    BatchTopK,
    Gated,
    JumpRelu,
    KSparse,
    Matryoshka,
    Relu,
    TopAfa,
    TopK,
)
from saes.interop.names import site_of_hook
from saes.interop.records import Found, Said
from saes.interop.tensor_files import (
    checked,
    matrix_shape,
    only_known,
    read_description,
    read_safetensors,
    save_tensors,
    whole,
)
from saes.interop.transforms import b_dec_shift, read_scaled_input, with_unit_rows
from saes.models import LAYER_NORM_EPS, Normalize, SaeConfig, SparseAutoencoder

CFG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
WHITENING = "activation_whitening.safetensors"
VERSION = "6.0.0"
"""Version of the format that is written; without it SAELens takes the folder for one of its fifth
version."""
BIASES = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "batchtopk": ("b_enc",),
    "matryoshka_batchtopk": ("b_enc",),
}
"""Tensors [d_sae] of each architecture."""
TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")
INFERENCE_KEYS = {
    "architecture", "d_in", "d_sae", "k", "dtype", "device", "apply_b_dec_to_input",
    "normalize_activations", "reshape_activations", "rescale_acts_by_decoder_norm", "metadata",
}  # fmt: skip
TRAINING_KEYS = {
    "noise", "mse_loss_normalization", "b_dec_init_method", "decoder_init_norm",
    "use_sparse_activations", "aux_loss_coefficient", "topk_threshold_lr", "matryoshka_widths",
    "use_matryoshka_aux_loss", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "l0_coefficient",
    "l0_warm_up_steps", "jumprelu_init_threshold", "jumprelu_bandwidth",
    "jumprelu_sparsity_loss_mode", "pre_act_loss_coefficient", "jumprelu_tanh_scale",
}  # fmt: skip
"""Keys of a training folder: how it was trained, not what it computes."""
NORMALIZE: dict[str, Normalize] = {
    "none": "none", "layer_norm": "layer_norm", "expected_average_only_in": "none",
}  # fmt: skip


def matches(path: Path) -> bool:
    """Whether a folder looks like one of SAELens."""
    return (path / CFG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path, input_scale: float | None = None) -> Found:
    """The SAE of a SAELens folder; `input_scale` is the factor of `expected_average_only_in`.

    Raises `UserError` for a version before 6, an architecture or an option that has no place here,
    `Failure` where a file is damaged.
    """
    cfg = read_description(path / CFG)
    architecture = _architecture(path, cfg)
    stored = read_safetensors(path / WEIGHTS)
    raw = _tensors(path, architecture, cfg, stored)
    scale, notes = _input_scale(path, cfg, input_scale)
    sae = _sae(path, architecture, cfg, raw, scale)
    metadata = dict(cfg["metadata"])
    hook_name = metadata.get("hook_name")
    if isinstance(hook_name, str) and site_of_hook(hook_name):
        metadata["site"] = site_of_hook(hook_name)
    if cfg.get("reshape_activations", "none") == "hook_z":
        notes += ("its input is the heads' outputs one after the other: a head_out site.",)
    if not cfg.get("apply_b_dec_to_input", True):
        notes += ("its encoder reads x itself; b_dec W_enc was folded into its bias, exactly.",)
    if cfg.get("rescale_acts_by_decoder_norm", False):
        notes += ("decoder norms were folded into the encoder and the decoder, exactly.",)
    if metadata.get("prepend_bos"):
        notes += ("it was trained on text with a BOS token in front (prepend_bos).",)
    if architecture in TRAINING_ONLY:
        notes += ("the running threshold of training is every latent's threshold.",)
    says = partial(_say, architecture, cfg, raw, scale)
    return Found(sae=sae, metadata=metadata, notes=notes, says=says)


def write(sae: SparseAutoencoder, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write `sae`, whose activation SAELens knows, into `folder`.

    BatchTopK and Matryoshka become jumprelu with their threshold, as SAELens saves its own.
    """
    activation = sae.config.activation
    architecture = architecture_of(activation)
    if architecture is None or sae.config.tied:
        raise UserError(
            f"SAELens has no architecture for {activation}; let `lorgnette convert` make the "
            "nearest TopK SAE of it."
        )
    save_tensors(folder / WEIGHTS, sae.tensors())
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.config.d_in,
        "d_sae": sae.config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": sae.config.normalize,
        "reshape_activations": "hook_z" if reads_heads(metadata) else "none",
    }
    if isinstance(activation, TopK):
        cfg |= {"k": activation.k, "rescale_acts_by_decoder_norm": False}
    described = {
        "sae_lens_training_version": None,
        "hook_head_index": None,
        "seqpos_slice": [None],
        "model_from_pretrained_kwargs": {},
        "prepend_bos": False,
        **{key: value for key, value in metadata.items() if key != "activation"},
        "training_architecture": _trained_as(activation),
        "sae_lens_version": VERSION,
    }
    if isinstance(activation, BatchTopK | Matryoshka):
        widths = getattr(activation, "prefixes", ())
        described["training_architecture_details"] = {
            "k": activation.k,
            **({"matryoshka_widths": [*widths, sae.config.d_sae]} if widths else {}),
        }
    write_json(folder / CFG, cfg | {"metadata": described})


def reads_heads(metadata: Mapping[str, Any]) -> bool:
    """Whether an SAE reads the heads' outputs, which SAELens has to lay one after the other."""
    return str(metadata.get("hook_name", "")).endswith("hook_z")


def architecture_of(activation: Activation) -> str | None:
    """SAELens's architecture that computes what an activation computes; None where none does."""
    match activation:
        case TopK():
            return "topk"
        case BatchTopK() | Matryoshka() | JumpRelu():
            return "jumprelu"
        case Gated():
            return "gated"
        case Relu():
            return "standard"
        case TopAfa() | KSparse():
            return None


def _trained_as(activation: Activation) -> str:
    match activation:
        case BatchTopK():
            return "batchtopk"
        case Matryoshka():
            return "matryoshka_batchtopk"
        case _:
            return str(architecture_of(activation))


def _architecture(path: Path, cfg: Mapping[str, Any]) -> str:
    """The architecture, once the version and every key are ones that are understood."""
    metadata = cfg.get("metadata")
    version = cfg.get("sae_lens_version")
    if isinstance(metadata, dict):
        version = metadata.get("sae_lens_version") or version
    major = str(version or "0").partition(".")[0]
    if not isinstance(metadata, dict) or not major.isdecimal() or int(major) < 6:
        raise UserError(
            f"{path / CFG} is of SAELens {version or 'before 6'}, whose configs leave the "
            "architecture to be guessed; load it with SAELens 6 (`SAE.load_from_disk`), save it "
            "with `save_model`, and convert that."
        )
    only_known(path / CFG, cfg, INFERENCE_KEYS | TRAINING_KEYS, "keys")
    architecture = cfg.get("architecture")
    if architecture not in BIASES:
        raise UserError(
            f"{path / CFG} has the architecture {architecture!r}; those that have a place here are "
            f"{', '.join(BIASES)} (transcoders and others do not reconstruct their own input)."
        )
    reshape = cfg.get("reshape_activations", "none")
    if reshape not in ("none", "hook_z"):
        raise UserError(
            f"{path / CFG} says reshape_activations = {reshape!r}; none and hook_z are read."
        )
    return architecture


def _tensors(
    path: Path, architecture: str, cfg: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of an architecture, of the sizes that the config says."""
    d_in = whole(path / CFG, "d_in", cfg.get("d_in"))
    d_sae = whole(path / CFG, "d_sae", cfg.get("d_sae"))
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,),
    }  # fmt: skip
    shapes |= dict.fromkeys(BIASES[architecture], (d_sae,))
    if architecture in TRAINING_ONLY:
        shapes["topk_threshold"] = ()
    if "log_threshold" in stored and "threshold" in shapes:
        shapes["log_threshold"] = shapes.pop("threshold")
    only_known(path / WEIGHTS, stored, set(shapes), "tensors")
    matrix_shape(path / WEIGHTS, stored, "W_enc")
    found = checked(path / WEIGHTS, stored, shapes)
    if "log_threshold" in found:
        found["threshold"] = found.pop("log_threshold").exp()
    if "topk_threshold" in found:
        found["threshold"] = found.pop("topk_threshold").expand(d_sae)
    return found


def _input_scale(
    path: Path, cfg: Mapping[str, Any], given: float | None
) -> tuple[float, tuple[str, ...]]:
    """The factor on the input, and what is said of it."""
    kind = cfg.get("normalize_activations", "none")
    if kind not in NORMALIZE:
        raise UserError(
            f"{path / CFG} says normalize_activations = {kind!r}, which has no place here; train "
            f"or choose an SAE with one of {', '.join(NORMALIZE)}."
        )
    if (path / WHITENING).is_file():
        raise UserError(
            f"{path} whitens its input ({WHITENING}); finish its training in SAELens, which folds "
            "that into the weights, and convert the folder it then saves."
        )
    stored = None
    if (path / SCALER).is_file():
        stored = read_description(path / SCALER).get("scaling_factor")
    scale = given if given is not None else stored
    if kind == "expected_average_only_in" and scale is None:
        raise UserError(
            f"{path / CFG} multiplies its input by a number that the folder does not hold "
            "(expected_average_only_in); give it with --input-scale: sqrt(d_in) over the mean norm "
            "of the activations it was trained on."
        )
    if scale is None or (kind != "expected_average_only_in" and given is None and scale == 1):
        return 1.0, ()
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise UserError(f"the factor on the input must be a positive number, got {scale!r}.")
    note = f"it read its input times {scale:g}; that is folded in, with the codes as they were."
    return float(scale), (note,)


def _sae(
    path: Path, architecture: str, cfg: Mapping[str, Any], raw: Mapping[str, Tensor], scale: float
) -> SparseAutoencoder:
    tensors = dict(raw)
    if not cfg.get("apply_b_dec_to_input", True):
        shift = b_dec_shift(tensors["b_dec"], tensors["W_enc"])
        for name, factor in _shifted(architecture, tensors).items():
            tensors[name] = tensors[name] + factor * shift
    if cfg.get("rescale_acts_by_decoder_norm", False):
        # A threshold of training is in units of the scaled pre-activation already.
        kept = {name: tensors[name] for name in ("threshold",) if name in tensors}
        tensors = with_unit_rows(tensors) | kept
    tensors = read_scaled_input(tensors, scale)
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].clamp_min(0)
    d_in, d_sae = tensors["W_enc"].shape
    return SparseAutoencoder.from_tensors(
        SaeConfig(
            d_in=d_in,
            d_sae=d_sae,
            activation=_activation(path, architecture, cfg, d_sae),
            normalize=NORMALIZE[cfg.get("normalize_activations", "none")],
        ),
        tensors,
    )


def _shifted(architecture: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
    """The biases that take in b_dec W_enc, with the factor it reaches them by."""
    if architecture == "gated":
        return {"b_gate": 1.0, "b_mag": tensors["r_mag"].exp()}
    return {"b_enc": 1.0}


def _activation(path: Path, architecture: str, cfg: Mapping[str, Any], d_sae: int) -> Activation:
    match architecture:
        case "topk":
            return TopK(k=whole(path / CFG, "k", cfg.get("k")))
        case "jumprelu":
            return _trained_in_batches(path, cfg, d_sae) or JumpRelu()
        case "gated":
            return Gated()
        case "standard":
            return Relu()
    return _batch_wise(path, cfg, d_sae)


def _trained_in_batches(path: Path, cfg: Mapping[str, Any], d_sae: int) -> Activation | None:
    """The activation of a jumprelu SAE that was trained as a batch-wise one and says so."""
    metadata = cfg["metadata"]
    details = metadata.get("training_architecture_details")
    if metadata.get("training_architecture") not in TRAINING_ONLY or not isinstance(details, dict):
        return None
    return _batch_wise(path, details, d_sae) if "k" in details else None


def _batch_wise(path: Path, described: Mapping[str, Any], d_sae: int) -> Activation:
    """BatchTopK, or Matryoshka where there are inner widths; k is a mean and may be broken."""
    k = described.get("k")
    if not isinstance(k, int | float) or not 0 < k < float("inf"):
        raise Failure(f"{path / CFG} says k = {k!r} where a positive number was wanted.")
    named = described.get("matryoshka_widths") or []
    widths = [whole(path / CFG, "matryoshka_widths", width) for width in named]
    prefixes = tuple(width for width in widths if width < d_sae)
    mean = max(1, round(k))
    return Matryoshka(k=mean, prefixes=prefixes) if prefixes else BatchTopK(k=mean)


def _say(
    architecture: str,
    cfg: Mapping[str, Any],
    w: Mapping[str, Tensor],
    scale: float,
    x: Float[Tensor, "n d"],
) -> Said:
    """The formula of the module's docstring, on the tensors as SAELens has them."""
    y, undo = _normalised(cfg.get("normalize_activations", "none"), x * scale)
    u = (y - w["b_dec"] if cfg.get("apply_b_dec_to_input", True) else y) @ w["W_enc"]
    norms = w["W_dec"].norm(dim=1) if cfg.get("rescale_acts_by_decoder_norm", False) else None
    if architecture == "gated":
        magnitude = torch.relu(u * w["r_mag"].exp() + w["b_mag"])
        codes = torch.where(u + w["b_gate"] > 0, magnitude, 0.0)
    else:
        pre = u + w["b_enc"]
        pre = pre if norms is None else pre * norms
        codes = torch.relu(pre)
        if architecture == "topk":
            largest = torch.topk(pre, int(cfg["k"]), dim=1)
            codes = torch.zeros_like(pre).scatter(1, largest.indices, largest.values.relu())
        elif "threshold" in w:
            codes = torch.where(pre > w["threshold"], codes, 0.0)
    decoded = codes if norms is None else torch.where(norms > 0, codes / norms, 0.0)
    return Said(codes=codes, reconstruction=undo(decoded @ w["W_dec"] + w["b_dec"]) / scale)


def _normalised(kind: str, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    if kind != "layer_norm":
        return x, lambda y: y
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    return (x - mean) / (deviation + LAYER_NORM_EPS), lambda y: y * deviation + mean
