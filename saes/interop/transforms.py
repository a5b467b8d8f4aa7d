"""Changes of an SAE's tensors that leave its reconstructions as they are.

With W_enc [d, s], W_dec [s, d], pre = (x - b_dec) W_enc + b_enc and n_i = |W_dec,i|:

- an encoder that reads x itself: x W_enc + b = (x - b_dec) W_enc + (b + b_dec W_enc);
- an SAE of c x: W_enc c, W_dec / c and b_dec / c are an SAE of x with the same codes;
- decoder rows of unit norm: W_dec,i / n_i with codes n_i times as large, which W_enc, b_enc and the
  thresholds times n_i give. For a gate that is open where u + b_gate > 0 and a magnitude
  exp(r_mag) u + b_mag, only the magnitude grows: r_mag + log n and b_mag n. The codes' order then
  is that of f_i n_i, so a TopK SAE may choose other latents; whatever compares a latent with its
  own threshold, and top-AFA, which goes by f_i n_i already, choose the same.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from probe.errors import UserError
from saes.activations import TopK
from saes.interop.records import Said
from saes.interop.verifying import agreeing_rows, probe_rows, says_of, verify
from saes.models import SparseAutoencoder

UNIT = 1e-3
"""Decoder rows whose norm is nearer to 1 than this count as of unit norm."""
LATENTS_AT_ONCE = 4096
SCALED_BY_NORM = ("b_enc", "threshold", "b_mag")


def centred_bias(
    bias: Float[Tensor, " s"], b_dec: Float[Tensor, " d"], W_enc: Float[Tensor, "d s"]
) -> Float[Tensor, " s"]:
    """`bias + b_dec W_enc`, summed in float64: the bias of an encoder that reads x - b_dec."""
    return bias + b_dec_shift(b_dec, W_enc)


def b_dec_shift(b_dec: Float[Tensor, " d"], W_enc: Float[Tensor, "d s"]) -> Float[Tensor, " s"]:
    """`b_dec W_enc` in float64, some latents at a time."""
    parts = [b_dec.double() @ part.double() for part in W_enc.split(LATENTS_AT_ONCE, dim=1)]
    return torch.cat(parts).to(b_dec.dtype)


def read_scaled_input(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The tensors of an SAE of x, from those of an SAE of `scale * x`; the codes are the same."""
    factors = {"W_enc": scale, "W_dec": 1 / scale, "b_dec": 1 / scale}
    return {name: tensor * factors.get(name, 1.0) for name, tensor in tensors.items()}


def decoder_norms(W_dec: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
    """The norm of each decoder row; 1 for a row of zeros, which nothing can make a unit vector."""
    norms = torch.linalg.vector_norm(W_dec, dim=1)
    return torch.where(norms > 0, norms, 1.0)


def have_unit_norm(W_dec: Float[Tensor, "s d"]) -> bool:
    """Whether all decoder rows but those of zeros have unit norm."""
    return bool(((decoder_norms(W_dec) - 1).abs() < UNIT).all())


def say_norms(W_dec: Float[Tensor, "s d"]) -> tuple[str, ...]:
    """A note where decoder rows have another norm than 1."""
    norms = torch.linalg.vector_norm(W_dec, dim=1)
    zero = int((norms == 0).sum())
    notes = (f"{zero} decoder rows are zero: latents that do nothing.",) if zero else ()
    if not have_unit_norm(W_dec):
        low, high = norms.min().item(), norms.max().item()
        notes += (
            f"the decoder's rows have norms from {low:.3g} to {high:.3g} and are kept so: a code "
            "is then not the length of what it adds (--unit-norm rescales both).",
        )
    return notes


def with_unit_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with decoder rows of unit norm and codes that many times as large."""
    norms = decoder_norms(tensors["W_dec"])
    changed = dict(tensors) | {"W_dec": tensors["W_dec"] / norms[:, None]}
    if "r_mag" in tensors:
        changed["r_mag"] = tensors["r_mag"] + norms.log()
    elif "W_enc" in tensors:
        changed["W_enc"] = tensors["W_enc"] * norms
    for name in SCALED_BY_NORM:
        if name in tensors:
            changed[name] = tensors[name] * norms
    return changed


def normalise_rows(sae: SparseAutoencoder) -> tuple[SparseAutoencoder, tuple[str, ...]]:
    """The SAE with decoder rows of unit norm, and a note on what that changed.

    What keeps the largest codes may then choose others, and the note says on how many of some made
    rows it does; anything else says the same, and that is checked. Raises `UserError` for a tied
    SAE, whose encoder has no scale of its own.
    """
    if sae.config.tied:
        raise UserError(
            "a tied SAE reads and writes with the same rows, so they cannot be rescaled; leave "
            "--unit-norm out."
        )
    if have_unit_norm(sae.W_dec):
        return sae, ()
    changed = SparseAutoencoder.from_tensors(sae.config, with_unit_rows(sae.tensors()))
    changed = changed.requires_grad_(False).eval()
    note = "decoder rows were rescaled to unit norm, and each latent's code by its row's old norm."
    rows = probe_rows(sae)
    before, after = says_of(sae, rows), says_of(changed, rows)
    scaled = Said(
        codes=before.codes * decoder_norms(sae.W_dec), reconstruction=before.reconstruction
    )
    if isinstance(sae.config.activation, TopK):
        others = int((~agreeing_rows(after, scaled)).sum())
        note += (
            " It keeps the largest codes, so it may now choose other latents: it does so on "
            f"{others} of {len(rows)} made rows."
        )
    else:
        verify(after, scaled, "the SAE with decoder rows of unit norm")
    return changed, (note,)


def untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with an encoder of their own that reads x - b_dec, where they lack one."""
    if "W_enc" in tensors:
        return dict(tensors)
    W_enc = tensors["W_dec"].T.contiguous()
    shifted = centred_bias(tensors["b_enc"], tensors["b_dec"], W_enc)
    return dict(tensors) | {"W_enc": W_enc, "b_enc": shifted}
