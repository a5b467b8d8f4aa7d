"""SAEs in the formats of other projects, written by hand from the formats' descriptions.

Nothing here knows our code: tensors are made by numpy, files by the safetensors and torch.save that
the other projects call, and what each SAE computes is its formula in float64. Every writer gives
that formula: rows -> codes [n, L] and reconstructions [n, d].
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

Array = np.ndarray
Formula = Callable[[Array], tuple[Array, Array]]


def draw(seed: int, d: int, L: int, *, unit: bool = True) -> dict[str, Array]:
    """Weights of an SAE that are no special case of anything."""
    rng = np.random.default_rng(seed)
    W_dec = rng.normal(size=(L, d))
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    if not unit:
        W_dec *= rng.uniform(0.3, 3, (L, 1))
    found = {
        "W_enc": W_dec.T + 0.2 * rng.normal(size=(d, L)),
        "W_dec": W_dec,
        "b_enc": 0.3 * rng.normal(size=L),
        "b_dec": rng.normal(size=d),
        "threshold": rng.uniform(0.05, 0.8, L),
        "b_gate": 0.3 * rng.normal(size=L),
        "b_mag": 0.3 * rng.normal(size=L),
        "r_mag": 0.4 * rng.normal(size=L),
    }
    return {name: tensor.astype(np.float32) for name, tensor in found.items()}


def rows_for(seed: int, d: int, n: int = 40) -> Array:
    """Rows around a mean, of different lengths."""
    rng = np.random.default_rng(seed + 1000)
    rows = 0.5 + rng.normal(size=(n, d)) * rng.uniform(0.2, 5, (n, 1))
    return rows.astype(np.float32)


def keep_largest(pre: Array, k: int) -> Array:
    """ReLU of the k largest of each row."""
    codes = np.zeros_like(pre)
    places = np.argsort(-pre, axis=1, kind="stable")[:, :k]
    np.put_along_axis(codes, places, np.maximum(np.take_along_axis(pre, places, 1), 0), 1)
    return codes


def standardised(x: Array) -> tuple[Array, Array, Array]:
    """Rows without their mean, over their deviation (n - 1) and a little."""
    mean, deviation = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    return (x - mean) / (deviation + 1e-5), mean, deviation


def doubled(weights: dict[str, Array]) -> dict[str, Array]:
    """The same numbers in float64."""
    return {name: tensor.astype(np.float64) for name, tensor in weights.items()}


def save_torch(path: Path, content: Any) -> None:
    """What `torch.save` writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def as_torch(weights: dict[str, Array]) -> dict[str, torch.Tensor]:
    """Arrays as tensors of their own memory."""
    return {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()}


# ------------------------------------------------------------------------------------------ SAELens

SAELENS_BIASES = {
    "topk": ("b_enc",),
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}


def write_saelens(
    folder: Path,
    architecture: str,
    *,
    d: int = 7,
    L: int = 29,
    k: int = 4,
    seed: int = 0,
    unit: bool = True,
    options: dict[str, Any] | None = None,
    scale: float = 1.0,
) -> Formula:
    """A folder of SAELens 6; `scale` is what the SAE multiplies its input by."""
    folder.mkdir(parents=True, exist_ok=True)
    w = draw(seed, d, L, unit=unit)
    names = ("W_enc", "W_dec", "b_dec", *SAELENS_BIASES[architecture])
    save_file({name: w[name] for name in names}, folder / "sae_weights.safetensors")
    cfg: dict[str, Any] = {
        "architecture": architecture, "d_in": d, "d_sae": L, "dtype": "float32", "device": "cuda",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.20.1", "sae_lens_training_version": "6.20.1",
            "model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre",
            "context_size": 128, "prepend_bos": True,
        },
    }  # fmt: skip
    if architecture == "topk":
        cfg |= {"k": k, "rescale_acts_by_decoder_norm": False}
    cfg |= options or {}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return lambda x: saelens_formula(doubled(w), cfg, k, scale, x)


def saelens_formula(
    w: dict[str, Array], cfg: dict[str, Any], k: int, scale: float, x: Array
) -> tuple[Array, Array]:
    """SAELens's `encode` and `decode`."""
    y, mean, deviation = x.astype(np.float64) * scale, 0.0, 1.0
    if cfg["normalize_activations"] == "layer_norm":
        y, mean, deviation = standardised(y)
    u = (y - w["b_dec"] * cfg["apply_b_dec_to_input"]) @ w["W_enc"]
    norm = np.linalg.norm(w["W_dec"], axis=1)
    norm = norm if cfg.get("rescale_acts_by_decoder_norm") else np.ones_like(norm)
    if cfg["architecture"] == "gated":
        opened = u + w["b_gate"] > 0
        codes = opened * np.maximum(u * np.exp(w["r_mag"]) + w["b_mag"], 0)
    else:
        pre = (u + w["b_enc"]) * norm
        codes = np.maximum(pre, 0)
        if cfg["architecture"] == "topk":
            codes = keep_largest(pre, k)
        if cfg["architecture"] == "jumprelu":
            codes = codes * (pre > w["threshold"])
    out = (codes / norm) @ w["W_dec"] + w["b_dec"]
    return codes, (out * deviation + mean) / scale


# ----------------------------------------------------------------------------------------- sparsify


def write_sparsify(
    folder: Path, *, d: int = 7, L: int = 29, k: int = 4, seed: int = 0,
    options: dict[str, Any] | None = None,
) -> Formula:  # fmt: skip
    """A hookpoint's folder of sparsify: `W_dec` is stored as the encoder is."""
    folder.mkdir(parents=True, exist_ok=True)
    w = draw(seed, d, L)
    tensors = {
        "encoder.weight": np.ascontiguousarray(w["W_enc"].T), "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"], "b_dec": w["b_dec"],
    }  # fmt: skip
    save_file(tensors, folder / "sae.safetensors")
    cfg = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": L,
        "k": k, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(cfg | (options or {})))
    v = doubled(w)

    def formula(x: Array) -> tuple[Array, Array]:
        pre = np.maximum((x - v["b_dec"]) @ v["W_enc"] + v["b_enc"], 0)
        codes = keep_largest(pre, k)
        return codes, codes @ v["W_dec"] + v["b_dec"]

    return formula


# ------------------------------------------------------------------------------ dictionary_learning

CLASSES = (
    "AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "GatedAutoEncoder",
    "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE",
)  # fmt: skip
THRESHOLD = 0.4


def dictionary_tensors(name: str, w: dict[str, Array], k: int) -> dict[str, torch.Tensor]:
    """The state_dict of a class of dictionary_learning."""
    t = as_torch(w)
    linear = {"encoder.weight": t["W_enc"].T.contiguous(), "decoder.weight": t["W_dec"].T}
    plain = {"W_enc": t["W_enc"], "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    counted = {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(THRESHOLD)}
    L = len(t["b_enc"])
    return {
        "AutoEncoder": {**linear, "encoder.bias": t["b_enc"], "bias": t["b_dec"]},
        "AutoEncoderNew": {**linear, "encoder.bias": t["b_enc"], "decoder.bias": t["b_dec"]},
        "AutoEncoderTopK": {**linear, "encoder.bias": t["b_enc"], "b_dec": t["b_dec"], **counted},
        "BatchTopKSAE": {**linear, "encoder.bias": t["b_enc"], "b_dec": t["b_dec"], **counted},
        "GatedAutoEncoder": {
            **linear, "decoder_bias": t["b_dec"], "r_mag": t["r_mag"], "gate_bias": t["b_gate"],
            "mag_bias": t["b_mag"],
        },
        "JumpReluAutoEncoder": {**plain, "threshold": t["threshold"]},
        "MatryoshkaBatchTopKSAE": {
            **plain, **counted, "group_sizes": torch.tensor([L // 4, L // 4, L - 2 * (L // 4)]),
        },
    }[name]  # fmt: skip


def dictionary_formula(name: str, w: dict[str, Array], k: int) -> Formula:
    """`encode` and `decode` of a class of dictionary_learning."""
    v = doubled(w)

    def formula(x: Array) -> tuple[Array, Array]:
        reads_x = name in ("AutoEncoderNew", "JumpReluAutoEncoder")
        u = (x.astype(np.float64) - (0 if reads_x else v["b_dec"])) @ v["W_enc"]
        post = np.maximum(u + v["b_enc"], 0)
        if name == "AutoEncoderTopK":
            post = keep_largest(post, k)
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            post = post * (post > THRESHOLD)
        if name == "JumpReluAutoEncoder":
            post = post * (u + v["b_enc"] > v["threshold"])
        if name == "GatedAutoEncoder":
            post = (u + v["b_gate"] > 0) * np.maximum(np.exp(v["r_mag"]) * u + v["b_mag"], 0)
        return post, post @ v["W_dec"] + v["b_dec"]

    return formula


def write_dictionary(
    folder: Path, name: str, *, d: int = 7, L: int = 29, k: int = 4, seed: int = 0
) -> Formula:
    """A trainer's folder of dictionary_learning, at the end of its training."""
    w = draw(seed, d, L)
    save_torch(folder / "ae.pt", dictionary_tensors(name, w, k))
    write_trainer(folder, name)
    return dictionary_formula(name, w, k)


def write_trainer(folder: Path, name: str) -> None:
    """The config.json of a trainer."""
    trainer = {
        "trainer_class": "Trainer", "dict_class": name, "layer": 5, "lm_name": "EleutherAI/p",
        "submodule_name": "resid_post_layer_5", "lr": 1e-3, "device": "cuda:0",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"d": 1}}))


# ------------------------------------------------------------------------------- OpenAI, sdxl-unbox


def write_openai(
    path: Path, activation: str, *, d: int = 7, L: int = 29, k: int = 4, seed: int = 0
) -> Formula:
    """A file of OpenAI's: counts and the names of functions among the tensors."""
    w = draw(seed, d, L)
    t = as_torch(w)
    state: dict[str, Any] = {
        "pre_bias": t["b_dec"], "latent_bias": t["b_enc"], "encoder.weight": t["W_enc"].T,
        "decoder.weight": t["W_dec"].T, "stats_last_nonzero": torch.zeros(L, dtype=torch.long),
        "latents_activation_frequency": torch.ones(L), "latents_mean_square": torch.zeros(L),
        "activation": activation,
    }  # fmt: skip
    if activation == "TopK":
        kept = {"k": k, "postact_fn": "ReLU"}
        state |= {"activation_state_dict": kept, "activation.k": k, "activation.postact_fn": "ReLU"}
    save_torch(path, state)
    v = doubled(w)

    def formula(x: Array) -> tuple[Array, Array]:
        y, mean, deviation = x.astype(np.float64), 0.0, 1.0
        if activation == "TopK":
            y, mean, deviation = standardised(y)
        pre = (y - v["b_dec"]) @ v["W_enc"] + v["b_enc"]
        codes = keep_largest(pre, k) if activation == "TopK" else np.maximum(pre, 0)
        return codes, (codes @ v["W_dec"] + v["b_dec"]) * deviation + mean

    return formula


def write_sdxl_unbox(
    folder: Path, *, d: int = 7, L: int = 29, k: int = 4, seed: int = 0
) -> Formula:
    """A checkpoint of sdxl-unbox."""
    w = draw(seed, d, L)
    t = as_torch(w)
    state = {
        "pre_bias": t["b_dec"], "latent_bias": t["b_enc"],
        "stats_last_nonzero": torch.zeros(L, dtype=torch.long),
        "encoder.weight": t["W_enc"].T, "decoder.weight": t["W_dec"].T,
    }  # fmt: skip
    save_torch(folder / "state_dict.pth", {"state_dict": state})
    save_torch(folder / "mean.pt", torch.rand(L))
    save_torch(folder / "std.pt", torch.rand(L))
    cfg = {"n_dirs_local": L, "d_model": d, "k": k, "auxk": 256, "dead_steps_threshold": 2441}
    (folder / "config.json").write_text(json.dumps(cfg))
    v = doubled(w)

    def formula(x: Array) -> tuple[Array, Array]:
        codes = keep_largest((x - v["b_dec"]) @ v["W_enc"] + v["b_enc"], k)
        return codes, codes @ v["W_dec"] + v["b_dec"]

    return formula


# ------------------------------------------------------------------------------------------ top-AFA


def write_top_afa(
    folder: Path, kind: str, *, d: int = 7, L: int = 29, k: int = 4, seed: int = 0,
    standardise: bool = True, unit: bool = True,
) -> Formula:  # fmt: skip
    """A checkpoint of top-AFA's reference code: an encoder bias is there and is never added."""
    w = draw(seed, d, L, unit=unit)
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    save_torch(folder / "sae.pt", as_torch({name: w[name] for name in names}))
    cfg = {
        "seed": 49, "batch_size": 4096, "lr": 3e-4, "model_name": "gpt2-small", "site": "resid_pre",
        "layer": 8, "act_size": d, "dict_size": L, "sae_type": kind, "top_k": k, "afa_coeff": 0.03,
        "input_unit_norm": standardise, "dtype": "torch.float32", "seq_len": 128,
        "hook_point": "blocks.8.hook_resid_pre", "dataset_path": "Skylion007/openwebtext",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(cfg))
    v = doubled(w)

    def formula(x: Array) -> tuple[Array, Array]:
        y, mean, deviation = x.astype(np.float64), 0.0, 1.0
        if standardise:
            y, mean, deviation = standardised(y)
        acts = np.maximum((y - v["b_dec"]) @ v["W_enc"], 0)
        codes = keep_largest(acts, k)
        if kind == "topafa":
            codes = nearest_prefix(acts, np.linalg.norm(v["W_dec"], axis=1), y - v["b_dec"])
        return codes, (codes @ v["W_dec"] + v["b_dec"]) * deviation + mean

    return formula


def nearest_prefix(acts: Array, norms: Array, centred: Array) -> Array:
    """Row by row: the strongest, as many as bring their norm nearest to the input's."""
    codes = np.zeros_like(acts)
    for row, (a, target) in enumerate(zip(acts, np.linalg.norm(centred, axis=1), strict=True)):
        order = np.argsort(-a * norms, kind="stable")
        lengths = np.sqrt(np.cumsum((a * norms)[order] ** 2))
        kept = order[: int(np.argmin(np.abs(lengths - target))) + 1]
        codes[row, kept] = a[kept]
    return codes
