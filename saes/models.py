"""The sparse autoencoder, the only one: what varies is its activation (`saes.activations`).

For an input x, latents z and reconstruction xhat (Gao et al. 2024, arXiv 2406.04093, section 2,
with the encoder bias of their code):

    z = activate(W_enc^T (x - b_dec) + b_enc)        xhat = W_dec^T z + b_dec

Under `normalize = "layer_norm"` x is first freed of its own mean and divided by its own standard
deviation (unbiased, plus 1e-5), and the reconstruction is given both back, as in OpenAI's code and
in SAELens's `layer_norm`.

Initialisation (their appendix A.1): rows of `W_dec` random unit vectors, `W_enc` its transpose,
`b_enc` zero, `b_dec` the geometric median of a sample. Their code also rescales `W_enc` so that
reconstructions of unit vectors have unit norm, noting no clear benefit. It is left out: after 400
steps on SmolLM2-135M (layer 12, 4608 latents, lr 1e-3) FVU was 0.203 with it and 0.187 without.

Decoder rows keep unit norm. Before a step the gradient loses its component along each row
(`project_decoder_gradient`), after it the rows are normalised (`normalise_decoder`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from probe.errors import Failure, UserError
from saes import kernels
from saes.activations import Activation, activate, top_k
from saes.types import Codes, SaeOutput, TrainingOutput

Normalize = Literal["none", "layer_norm"]

LAYER_NORM_EPS = 1e-5
PRE_BYTES = 2**24
"""Dense pre-activations are made at most this many bytes at a time: they stay in the cache."""
ROWS_AT_ONCE = 512
"""Decoder rows handled at a time by the norm constraint, for the same reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeConfig:
    """The shape of an SAE and how it reads its input."""

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents."""
    activation: Activation
    """What makes codes of pre-activations."""
    normalize: Normalize = "none"
    """`layer_norm`: every input row has its mean removed and is divided by its deviation."""

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_sae < 1:
            raise UserError(
                f"an SAE needs d_in and d_sae of at least 1, got {self.d_in} and {self.d_sae}."
            )
        if self.activation.k > self.d_sae:
            raise UserError(
                f"k = {self.activation.k} latents of {self.d_sae} cannot be active at once; "
                "choose a smaller k or a larger d_sae."
            )


class SparseAutoencoder(nn.Module):
    """Float32 `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_in]`, `b_enc [d_sae]`, `b_dec [d_in]`."""

    def __init__(self, config: SaeConfig) -> None:
        super().__init__()
        self.config = config
        # Held as the transpose of a contiguous [d_sae, d_in]: see saes.kernels.
        self.W_enc = nn.Parameter(torch.zeros(config.d_sae, config.d_in).T)
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))

    def forward(self, x: Float[Tensor, "*b d"]) -> SaeOutput:
        """Codes and reconstruction of `x`; raises as `encode` does."""
        codes = self.encode(x)
        return SaeOutput(reconstruction=self.decode(codes, x), codes=codes)

    def encode(self, x: Float[Tensor, "*b d"]) -> Codes:
        """The codes of `x`, whatever its leading axes.

        Raises `UserError` where `x` has another width than the SAE, `Failure` where it is not
        finite.
        """
        rows = self.training_input(x)
        chosen, none = self._choose(rows, rows.new_zeros(0, dtype=torch.long), 0, torch.float32)
        codes, _ = self._with_values(rows, chosen, none, torch.float32)
        shape = (*x.shape[:-1], self.config.activation.k)
        return Codes(values=codes.values.view(shape), indices=codes.indices.view(shape))

    def decode(self, codes: Codes, x: Float[Tensor, "*b d"] | None = None) -> Float[Tensor, "*b d"]:
        """The activations that `codes` stand for.

        Under `layer_norm` each row's own mean and deviation belong to the reconstruction: they are
        taken from `x`, the input the codes came from. Raises `UserError` where it is needed and
        missing.
        """
        k = codes.values.shape[-1]
        rows = kernels.decode(codes.values.reshape(-1, k), codes.indices.reshape(-1, k), self.W_dec)
        rows = rows + self.b_dec
        if self.config.normalize == "layer_norm":
            if x is None:
                raise UserError(
                    "this SAE normalises each input by its own mean and deviation; pass decode the "
                    "input x that the codes came from."
                )
            _, mean, deviation = self._normalised(self._checked(x))
            rows = rows * deviation + mean
        return rows.view(*codes.values.shape[:-1], self.config.d_in)

    def pre_activations(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b s"]:
        """All pre-activations of `x`, dense; raises as `encode` does."""
        rows = self.training_input(x)
        return ((rows - self.b_dec) @ self.W_enc + self.b_enc).view(
            *x.shape[:-1], self.config.d_sae
        )

    def training_input(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "n d"]:
        """What the encoder reads and the loss compares with: `x` as rows, normalised."""
        return self._normalised(self._checked(x))[0]

    def training_forward(
        self,
        x: Float[Tensor, "b d"],
        *,
        dead: Int[Tensor, " n"],
        k_aux: int,
        encoder_dtype: torch.dtype = torch.float32,
    ) -> TrainingOutput:
        """The forward pass with the dead latents' view of the residual beside it (AuxK).

        The `k_aux` strongest of the latents numbered in `dead` make `residual`. `encoder_dtype` is
        that of the dense product that chooses latents; their values are float32 in any case.
        """
        rows = self.training_input(x)
        chosen, chosen_dead = self._choose(rows, dead, min(k_aux, len(dead)), encoder_dtype)
        codes, codes_dead = self._with_values(rows, chosen, chosen_dead, encoder_dtype)
        return TrainingOutput(
            target=rows,
            reconstruction=kernels.decode(codes.values, codes.indices, self.W_dec) + self.b_dec,
            codes=codes,
            residual=kernels.decode(codes_dead.values, codes_dead.indices, self.W_dec)
            if len(dead)
            else None,
        )

    def _checked(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "n d"]:
        """`x` as rows of float32, once its width and its numbers are known to be sound."""
        if x.shape[-1] != self.config.d_in:
            raise UserError(
                f"this SAE reads activations of width {self.config.d_in} and got {x.shape[-1]}; "
                "use activations of the model and site that it was trained on."
            )
        rows = x.reshape(-1, self.config.d_in).float()
        if not is_finite(rows):
            raise Failure(
                "the activations contain NaN or infinite numbers; capture them again, in float32 "
                "where the model overflows in half precision."
            )
        return rows

    def _normalised(
        self, rows: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
        """Normalised rows, and the mean and deviation that undo it (0 and 1 for `none`)."""
        if self.config.normalize == "none":
            return rows, rows.new_zeros(len(rows), 1), rows.new_ones(len(rows), 1)
        mean = rows.mean(-1, keepdim=True)
        deviation = rows.std(-1, keepdim=True)
        return (rows - mean) / (deviation + LAYER_NORM_EPS), mean, deviation

    @torch.no_grad()
    def _choose(
        self, rows: Float[Tensor, "n d"], dead: Int[Tensor, " m"], k_dead: int, dtype: torch.dtype
    ) -> tuple[Codes, Codes]:
        """The codes of `rows`, and the `k_dead` strongest of the latents `dead`; no gradients.

        The only dense product of all latents, a few rows at a time.
        """
        W_enc, b_enc = self.W_enc.to(dtype), self.b_enc.to(dtype)
        n_rows = min(len(rows), max(1, PRE_BYTES // (self.config.d_sae * dtype.itemsize)))
        memory = torch.empty(n_rows, self.config.d_sae, dtype=dtype, device=rows.device)
        chosen, chosen_dead = [], []
        for part in (rows - self.b_dec).to(dtype).split(max(1, n_rows)):
            pre = torch.addmm(b_enc, part, W_enc, out=memory[: len(part)])
            chosen.append(activate(pre, self.config.activation))
            chosen_dead.append(top_k(pre[:, dead], k_dead))
        found = _concatenated(chosen_dead)
        if k_dead:
            indices = torch.where(found.values > 0, dead[found.indices], 0)
            found = Codes(values=found.values, indices=indices)
        return _concatenated(chosen), found

    def _with_values(
        self,
        rows: Float[Tensor, "n d"],
        chosen: Codes,
        chosen_dead: Codes,
        dtype: torch.dtype,
    ) -> tuple[Codes, Codes]:
        """Both codes with values that gradients reach: one sparse encoder gradient serves both."""
        values = torch.cat([chosen.values, chosen_dead.values], 1)
        indices = torch.cat([chosen.indices, chosen_dead.indices], 1)
        known = values if dtype == torch.float32 else None
        pre = kernels.pre_activations_at(rows, self.b_dec, self.W_enc, self.b_enc, indices, known)
        # A padded entry names latent 0, whose own pre-activation is not meant.
        active = torch.where(values > 0, pre.relu(), 0)
        sizes = [chosen.values.shape[1], chosen_dead.values.shape[1]]
        parts = zip(active.split(sizes, 1), indices.split(sizes, 1), strict=True)
        codes, codes_dead = (Codes(values=v, indices=i) for v, i in parts)
        return codes, codes_dead


def _concatenated(parts: list[Codes]) -> Codes:
    return Codes(
        values=torch.cat([part.values for part in parts]),
        indices=torch.cat([part.indices for part in parts]),
    )


def is_finite(x: Float[Tensor, "*b d"]) -> bool:
    """Whether no entry is NaN or infinite; one cheap pass, as a sum shows either."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


@torch.no_grad()
def initialise(
    sae: SparseAutoencoder, sample: Float[Tensor, "n d"], generator: torch.Generator
) -> None:
    """Set all parameters for training; `sample` is in the units that training will see."""
    rows = sae.training_input(sample)
    directions = torch.randn(sae.config.d_sae, sae.config.d_in, generator=generator)
    sae.W_dec.copy_(functional.normalize(directions, dim=1))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_enc.zero_()
    sae.b_dec.copy_(geometric_median(rows))


def geometric_median(
    points: Float[Tensor, "n d"], *, max_steps: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d"]:
    """The point with the smallest mean distance to `points`, in float64.

    Weiszfeld's iteration from the mean, with the step of Vardi and Zhang (2000) where the estimate
    sits on a data point; it stops once a step is shorter than `tolerance` times the mean distance.
    """
    assert len(points), "the geometric median of no points"
    x = points.double()
    median = x.mean(0)
    for _ in range(max_steps):
        distances = torch.linalg.vector_norm(x - median, dim=1)
        scale = distances.mean()
        away = distances > 1e-12 * scale
        if not away.any():
            break
        weights = torch.where(away, 1 / distances, 0)
        step = (weights @ x) / weights.sum() - median
        pull = torch.linalg.vector_norm(step) * weights.sum()
        step = step * (1 - (~away).sum() / pull.clamp_min(1e-300)).clamp_min(0)
        median = median + step
        if torch.linalg.vector_norm(step) < tolerance * scale:
            break
    return median.to(points.dtype)


@torch.no_grad()
def project_decoder_gradient(sae: SparseAutoencoder) -> None:
    """Remove from the decoder's gradient what would only change the length of its unit rows."""
    assert sae.W_dec.grad is not None, "no gradient to project: call backward first"
    pairs = zip(sae.W_dec.split(ROWS_AT_ONCE), sae.W_dec.grad.split(ROWS_AT_ONCE), strict=True)
    for rows, gradients in pairs:
        gradients.sub_(rows * (rows * gradients).sum(1, keepdim=True))


@torch.no_grad()
def normalise_decoder(sae: SparseAutoencoder) -> None:
    """Give every decoder row unit norm."""
    for rows in sae.W_dec.split(ROWS_AT_ONCE):
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12))


@torch.no_grad()
def fold_scale(sae: SparseAutoencoder, scale: float) -> None:
    """Make an SAE trained on `scale * x` read `x` itself.

    Trained: z = ReLU(TopK(W_enc^T (c x - b_dec) + b_enc)), and c xhat = W_dec^T z + b_dec. Dividing
    the pre-activation by c > 0 gives W_enc^T (x - b_dec / c) + b_enc / c; the k largest stay the k
    largest and ReLU commutes with a positive factor, so z / c are the codes of x under biases b_enc
    / c and b_dec / c, and W_dec^T (z / c) + b_dec / c = xhat. The weights, and the decoder's unit
    norm, stay.
    """
    assert scale > 0, scale
    sae.b_enc.div_(scale)
    sae.b_dec.div_(scale)
