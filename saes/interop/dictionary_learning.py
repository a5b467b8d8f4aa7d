"""dictionary_learning (github.com/saprmarks/dictionary_learning; on PyPI under the same name).

    <save_dir>/trainer_<i>/ae.pt         the dictionary's tensors, as `torch.save`
    <save_dir>/trainer_<i>/config.json   {"trainer": {dict_class, k, layer, lm_name, ...}, "buffer"}
    <save_dir>/trainer_<i>/checkpoints/ae_<step>.pt

The class is known by the tensors, whether or not there is a config (and must be what it says):

    AutoEncoder              encoder.weight [L, d], encoder.bias, decoder.weight [d, L], bias [d]
                             f = ReLU((x - bias) E + b),      xhat = f D + bias
    AutoEncoderNew           ..., decoder.bias instead of bias
                             f = ReLU(x E + b),               xhat = f D + decoder.bias
    AutoEncoderTopK          ..., b_dec, k, threshold: the k largest of ReLU((x - b_dec) E + b)
    BatchTopKSAE             the same tensors: what of it exceeds the threshold
    GatedAutoEncoder         encoder.weight, decoder.weight, decoder_bias, r_mag, gate_bias,
                             mag_bias: with u = (x - decoder_bias) E
                             ReLU(exp(r_mag) u + mag_bias) where u + gate_bias > 0
    JumpReluAutoEncoder      W_enc [d, L], W_dec [L, d], b_enc, b_dec, threshold
                             x W_enc + b_enc where it exceeds the threshold: x itself is read
    MatryoshkaBatchTopKSAE   W_enc, W_dec, b_enc, b_dec, k, threshold, group_sizes: as BatchTopKSAE

AutoEncoderTopK and BatchTopKSAE differ by nothing but the config's word, so a file of theirs
without a config has to be named. A TopK SAE's threshold is not used. A BatchTopKSAE whose threshold
was never set (it is negative before step 1000) is a plain ReLU SAE, and said to be.

`backup_steps` writes another dictionary over ae.pt while training goes on: {step, ae, optimizer,
config, norm_factor}, whose tensors still read inputs divided by norm_factor. The factor on the
biases and thresholds that the end of training would apply is applied here.

Some versions multiply the codes of the gated and JumpReLU classes by |D_i| and divide by it in the
decoder; with rows of unit norm, which training keeps, that is the same, and with others it is what
`--unit-norm` gives.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe.errors import UserError
from saes.activations import Activation, BatchTopK, Gated, JumpRelu, Matryoshka, Relu, TopK
from saes.interop.names import hook_of_site
from saes.interop.records import Found, Said
from saes.interop.tensor_files import (
    PICKLES,
    checked,
    matrix_shape,
    only_known,
    read_description,
    read_pickle,
    whole,
)
from saes.interop.transforms import centred_bias
from saes.models import SaeConfig, SparseAutoencoder

WEIGHTS, CFG = "ae.pt", "config.json"
LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
CLASSES: dict[str, set[str]] = {
    "AutoEncoder": LINEAR | {"bias"},
    "AutoEncoderNew": LINEAR | {"decoder.bias"},
    "AutoEncoderTopK": LINEAR | {"b_dec", "k", "threshold"},
    "BatchTopKSAE": LINEAR | {"b_dec", "k", "threshold"},
    "GatedAutoEncoder": {
        "encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias",
    },
    "JumpReluAutoEncoder": {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"},
    "MatryoshkaBatchTopKSAE": {
        "W_enc", "W_dec", "b_enc", "b_dec", "k", "threshold", "group_sizes",
    },
}  # fmt: skip
"""The tensors of each class."""
OPTIONAL = {"AutoEncoderTopK": {"threshold"}}
"""Those that older versions did not save."""
SCALED = {
    "encoder.bias", "bias", "decoder.bias", "b_dec", "b_enc", "decoder_bias", "gate_bias",
    "mag_bias", "threshold",
}  # fmt: skip
"""What is in units of the activations."""
BACKUP = {"step", "ae", "optimizer", "config", "norm_factor"}
KINDS = {"resid_pre": "resid_pre", "resid_post": "resid_post", "mlp_out": "mlp_out"}


def matches(path: Path) -> bool:
    """Whether a folder, or a file, looks like one of dictionary_learning."""
    if path.is_dir():
        return (path / WEIGHTS).is_file()
    if not path.is_file() or path.suffix not in PICKLES:
        return False
    stored = read_pickle(path)
    return {"step", "ae"} <= set(stored) or bool(_classes(set(stored)))


def read(path: Path) -> Found:
    """The SAE of a trainer's folder, or of one file of it.

    Raises `UserError` for a class that has no place here or cannot be told, `Failure` where a file
    is damaged.
    """
    file = path / WEIGHTS if path.is_dir() else path
    stored = read_pickle(file)
    described, notes, factor = _trainer(file), (), 1.0
    if {"step", "ae"} <= set(stored):
        stored, described, notes, factor = _backup(file, stored, described)
    name = _class_name(file, set(stored), described)
    raw = _tensors(file, name, stored)
    sae, more = _sae(file, name, raw, factor)
    says = partial(_say, name, raw, sae.config.activation, factor)
    return Found(sae=sae, metadata=_metadata(described), notes=notes + more, says=says)


def _trainer(file: Path) -> dict[str, Any]:
    """What config.json, beside the file or a folder above it, says of the trainer."""
    for folder in (file.parent, file.parent.parent):
        if (folder / CFG).is_file():
            trainer = read_description(folder / CFG).get("trainer")
            return trainer if isinstance(trainer, dict) else {}
    return {}


def _backup(
    file: Path, stored: Mapping[str, Any], described: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...], float]:
    """The dictionary inside a backup, and the factor that its biases still need."""
    only_known(file, stored, BACKUP, "entries")
    inner, config = stored["ae"], stored.get("config")
    factor = stored.get("norm_factor")
    factor = 1.0 if factor is None else float(factor)
    note = f"{file.name} is a backup from step {stored['step']} of a training, not its end."
    if factor != 1:
        note += f" Its biases were multiplied by norm_factor = {factor:g}, as the end would do."
    found = dict(inner) if isinstance(inner, Mapping) else {}
    return found, described or (config if isinstance(config, dict) else {}), (note,), factor


def _classes(names: set[str]) -> list[str]:
    return [
        name
        for name, wanted in CLASSES.items()
        if wanted - OPTIONAL.get(name, set()) <= names <= wanted
    ]


def _class_name(file: Path, names: set[str], described: Mapping[str, Any]) -> str:
    """The dictionary's class, by its tensors and the config's word."""
    possible, said = _classes(names), described.get("dict_class")
    if said in possible:
        return str(said)
    if said is not None or not possible:
        raise UserError(
            f"{file} holds {', '.join(sorted(names)) or 'nothing'} and its config names the class "
            f"{said!r}; those that are read are {', '.join(CLASSES)}."
        )
    if len(possible) > 1:
        raise UserError(
            f"{file} may be of the class {' or '.join(possible)}, which have the same tensors and "
            f"other codes; put a {CFG} with "
            '{"trainer": {"dict_class": ...}} beside it.'
        )
    return possible[0]


def _tensors(file: Path, name: str, stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """The class's tensors, checked; `k` and `group_sizes` as they are."""
    by_linear = "encoder.weight" in CLASSES[name]
    first, second = matrix_shape(file, stored, "encoder.weight" if by_linear else "W_enc")
    L, d = (first, second) if by_linear else (second, first)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (L, d), "decoder.weight": (d, L), "W_enc": (d, L), "W_dec": (L, d),
        "bias": (d,), "decoder.bias": (d,), "b_dec": (d,), "decoder_bias": (d,),
        "threshold": (L,) if name == "JumpReluAutoEncoder" else (),
    }  # fmt: skip
    plain = {"k", "group_sizes"}
    wanted = {key: shapes.get(key, (L,)) for key in CLASSES[name] - plain if key in stored}
    return checked(file, stored, wanted) | {key: stored[key] for key in plain & set(stored)}


def _sae(
    file: Path, name: str, raw: Mapping[str, Tensor], factor: float
) -> tuple[SparseAutoencoder, tuple[str, ...]]:
    w = {key: tensor * factor if key in SCALED else tensor for key, tensor in raw.items()}
    W_enc = w["encoder.weight"].T if "encoder.weight" in w else w["W_enc"]
    W_dec = w["decoder.weight"].T if "decoder.weight" in w else w["W_dec"]
    d, L = W_enc.shape
    activation, threshold, notes = _activation(file, name, w, L)
    b_dec = next(w[key] for key in ("b_dec", "bias", "decoder.bias", "decoder_bias") if key in w)
    tensors = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec}
    if name == "GatedAutoEncoder":
        tensors |= {"b_gate": w["gate_bias"], "b_mag": w["mag_bias"], "r_mag": w["r_mag"]}
    else:
        tensors["b_enc"] = w["encoder.bias"] if "encoder.bias" in w else w["b_enc"]
    if name in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        tensors["b_enc"] = centred_bias(tensors["b_enc"], b_dec, W_enc)
        notes += ("its encoder reads x itself; b_dec W_enc was folded into its bias, exactly.",)
    if threshold is not None:
        tensors["threshold"] = threshold
    config = SaeConfig(d_in=d, d_sae=L, activation=activation)
    return SparseAutoencoder.from_tensors(config, tensors), notes


def _activation(
    file: Path, name: str, w: Mapping[str, Tensor], L: int
) -> tuple[Activation, Tensor | None, tuple[str, ...]]:
    """The activation, each latent's threshold where it has one, and what is said of it."""
    if name in ("AutoEncoder", "AutoEncoderNew"):
        return Relu(), None, ()
    if name == "GatedAutoEncoder":
        return Gated(), None, ()
    if name == "JumpReluAutoEncoder":
        return JumpRelu(), w["threshold"].clamp_min(0), ()
    k = whole(file, "k", w.get("k"))
    if name == "AutoEncoderTopK":
        return TopK(k=k), None, ()
    notes = ()
    if float(w["threshold"]) < 0:
        notes = ("its threshold was never set: every positive pre-activation is a code.",)
    prefixes = _prefixes(file, w, L) if name == "MatryoshkaBatchTopKSAE" else ()
    activation = Matryoshka(k=k, prefixes=prefixes) if prefixes else BatchTopK(k=k)
    return activation, w["threshold"].clamp_min(0).expand(L), notes


def _prefixes(file: Path, w: Mapping[str, Tensor], L: int) -> tuple[int, ...]:
    """The inner prefixes of the dictionary, from the sizes of its groups."""
    ends = torch.as_tensor(w["group_sizes"]).flatten().cumsum(0).tolist()
    if not ends or ends[-1] != L:
        raise UserError(
            f"{file} has groups of {torch.as_tensor(w['group_sizes']).tolist()} latents, which are "
            f"not {L} together; save the SAE again."
        )
    return tuple(int(end) for end in ends[:-1])


def _metadata(described: Mapping[str, Any]) -> dict[str, Any]:
    """Where the SAE belongs, as far as the trainer says."""
    metadata: dict[str, Any] = {"dictionary_learning": dict(described)} if described else {}
    if isinstance(described.get("lm_name"), str):
        metadata["model_name"] = described["lm_name"]
    layer, module = described.get("layer"), described.get("submodule_name")
    kinds = [kind for kind in KINDS if isinstance(module, str) and module.startswith(kind)]
    if isinstance(layer, int) and kinds:
        metadata["site"] = f"{KINDS[kinds[0]]}.{layer}"
        metadata["hook_name"] = hook_of_site(metadata["site"])
    return metadata


def _say(
    name: str,
    w: Mapping[str, Tensor],
    activation: Activation,
    factor: float,
    x: Float[Tensor, "n d"],
) -> Said:
    """The formulas of the module's docstring on x / factor, in whose units the tensors are."""
    y = x / factor
    E = w["encoder.weight"].T if "encoder.weight" in w else w["W_enc"]
    D = w["decoder.weight"].T if "decoder.weight" in w else w["W_dec"]
    bias = next(w[key] for key in ("b_dec", "bias", "decoder.bias", "decoder_bias") if key in w)
    reads_x = name in ("AutoEncoderNew", "JumpReluAutoEncoder")
    u = y @ E if reads_x else (y - bias) @ E
    if name == "GatedAutoEncoder":
        magnitude = torch.relu(w["r_mag"].exp() * u + w["mag_bias"])
        codes = magnitude * (u + w["gate_bias"] > 0)
    else:
        codes = torch.relu(u + (w["encoder.bias"] if "encoder.bias" in w else w["b_enc"]))
    if isinstance(activation, TopK):
        largest = torch.topk(codes, activation.k, dim=1)
        codes = torch.zeros_like(codes).scatter(1, largest.indices, largest.values)
    elif "threshold" in w:
        codes = codes * (codes > w["threshold"])
    return Said(codes=codes * factor, reconstruction=(codes @ D + bias) * factor)
