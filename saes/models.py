"""The sparse autoencoder, the only one: what varies is its activation (`saes.activations`).

For an input x, latents z and reconstruction xhat (Gao et al. 2024, arXiv 2406.04093, section 2,
with the encoder bias of their code):

    z = activate(W_enc^T (x - b_dec) + b_enc)        xhat = W_dec^T z + b_dec

Under `normalize = "layer_norm"` x is first freed of its own mean and divided by its own standard
deviation (unbiased, plus 1e-5), and the reconstruction is given both back, as in OpenAI's code and
in SAELens's `layer_norm`.

Three activations have parameters of their own. `JumpRelu` holds `log_threshold`. `Gated` holds
`b_gate`, `b_mag` and `r_mag` in place of `b_enc`: with u = W_enc^T (x - b_dec), the gate is open
where u + b_gate > 0 and the magnitude is ReLU(exp(r_mag) u + b_mag). `BatchTopK` and `Matryoshka`
hold `threshold`, which training follows and does not optimise. `tied` (the 2013 k-sparse
autoencoder) reads with the transpose of `W_dec`, from x as it is: z = activate(W_dec x + b_enc).

A forward pass chooses entries without gradients (the one dense product, some rows at a time), then
computes the values of these entries with them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe.errors import Failure, UserError
from saes import kernels, selection
from saes.activations import (
    Activation,
    BatchTopK,
    Gated,
    JumpRelu,
    KSparse,
    Matryoshka,
    TopAfa,
    TopK,
    most_active,
)
from saes.reduced import ReducedEncoder, Scores
from saes.types import Chosen, Codes, Entries, SaeOutput, concatenated

Normalize = Literal["none", "layer_norm"]

LAYER_NORM_EPS = 1e-5
PRE_BYTES = 2**26
"""Dense pre-activations are made at most this many bytes at a time."""


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
    tied: bool = False
    """The encoder is the decoder's transpose and reads x itself, not x - b_dec."""

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_sae < 1:
            raise UserError(
                f"an SAE needs d_in and d_sae of at least 1, got {self.d_in} and {self.d_sae}."
            )
        if self.tied != isinstance(self.activation, KSparse):
            raise UserError(
                f"tied = {self.tied} with {self.activation}: k_sparse has a tied encoder and no "
                "other activation has; change one of the two."
            )
        most = most_active(self.activation)
        if most is not None and most > self.d_sae:
            raise UserError(
                f"{most} latents of {self.d_sae} cannot be active at once, as {self.activation} "
                "asks; choose a smaller k or a larger d_sae."
            )
        if isinstance(self.activation, Matryoshka) and self.activation.prefixes[-1] >= self.d_sae:
            raise UserError(
                f"the inner prefixes {self.activation.prefixes} must be smaller than d_sae = "
                f"{self.d_sae}, which is always the last one."
            )


class SparseAutoencoder(nn.Module):
    """Float32 `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_in]`, `b_enc [d_sae]`, `b_dec [d_in]`."""

    threshold: Tensor
    b_enc: Tensor
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor

    def __init__(self, config: SaeConfig) -> None:
        super().__init__()
        self.config = config
        d_in, d_sae = config.d_in, config.d_sae
        if not config.tied:
            # Held as the transpose of a contiguous [d_sae, d_in]: see saes.kernels.
            self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).T)
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        if isinstance(config.activation, Gated):
            for name in ("b_gate", "b_mag", "r_mag"):
                self.register_parameter(name, nn.Parameter(torch.zeros(d_sae)))
        elif isinstance(config.activation, TopAfa) and config.activation.paper_code:
            self.register_buffer("b_enc", torch.zeros(d_sae))
        else:
            self.b_enc = nn.Parameter(torch.zeros(d_sae))
        if isinstance(config.activation, JumpRelu):
            self.log_threshold = nn.Parameter(torch.zeros(d_sae))
        if isinstance(config.activation, BatchTopK | Matryoshka):
            self.register_buffer("threshold", torch.zeros(d_sae))

    @property
    def encoder(self) -> Float[Tensor, "d s"]:
        """What turns centred rows into pre-activations."""
        return self.W_dec.T if self.config.tied else self.W_enc

    @property
    def encoder_bias(self) -> Float[Tensor, " s"]:
        """What is added to them: for `Gated` the gate's bias."""
        return self.b_gate if isinstance(self.config.activation, Gated) else self.b_enc

    @property
    def centre(self) -> Float[Tensor, " d"]:
        """What is taken off the input first."""
        return torch.zeros_like(self.b_dec) if self.config.tied else self.b_dec

    @property
    def thresholds(self) -> Float[Tensor, " s"]:
        """The least pre-activation with which each latent is active outside training."""
        match self.config.activation:
            case JumpRelu():
                return self.log_threshold.exp()
            case BatchTopK() | Matryoshka():
                return self.threshold
            case _:
                return torch.zeros_like(self.encoder_bias)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that makes up the SAE, under SAELens's names, detached and on the CPU."""
        tensors = dict(self.state_dict())
        if "log_threshold" in tensors:
            tensors["threshold"] = tensors.pop("log_threshold").exp()
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    @staticmethod
    def from_tensors(config: SaeConfig, tensors: Mapping[str, Tensor]) -> "SparseAutoencoder":
        """The SAE that `tensors` gave. Raises `UserError` for other names or shapes."""
        sae = SparseAutoencoder(config)
        wanted = {name: list(tensor.shape) for name, tensor in sae.tensors().items()}
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if found != wanted:
            raise UserError(f"an SAE of {config} is made of {wanted}, got {found}.")
        state = {name: tensor.float() for name, tensor in tensors.items()}
        if isinstance(config.activation, JumpRelu):
            # A threshold of 0, which a logarithm cannot say, becomes the smallest positive number.
            tiny = torch.finfo(torch.float32).tiny
            state["log_threshold"] = state.pop("threshold").clamp_min(tiny).log()
        sae.load_state_dict(state)
        return sae

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
        chosen, _ = self.choose(rows)
        pre = self.pre_activations_at(rows, chosen)
        values = self.activated(pre, chosen)
        match self.config.activation:
            case TopK() | KSparse():
                shape = (len(rows), len(values) // max(1, len(rows)))
                codes = Codes(values=values.view(shape), indices=chosen.latents.view(shape))
            case _:
                codes = selection.padded(values, chosen)
        shape = (*x.shape[:-1], codes.values.shape[1])
        return Codes(values=codes.values.view(shape), indices=codes.indices.view(shape))

    def decode(self, codes: Codes, x: Float[Tensor, "*b d"] | None = None) -> Float[Tensor, "*b d"]:
        """The activations that `codes` stand for.

        Under `layer_norm` each row's own mean and deviation belong to the reconstruction: they are
        taken from `x`, the input the codes came from. Raises `UserError` where it is needed and
        missing.
        """
        k = codes.values.shape[-1]
        entries = Entries.of_rows(codes.indices.reshape(codes.indices.shape[:-1].numel(), k))
        rows = self.decoded_rows(codes.values.reshape(-1), entries)
        if self.config.normalize == "layer_norm":
            if x is None:
                raise UserError(
                    "this SAE normalises each input by its own mean and deviation; pass decode the "
                    "input x that the codes came from."
                )
            _, mean, deviation = self._normalised(self._checked(x))
            rows = rows * deviation + mean
        return rows.view(*codes.values.shape[:-1], self.config.d_in)

    def decoded_rows(self, values: Float[Tensor, " m"], entries: Entries) -> Float[Tensor, "n d"]:
        """The reconstruction as the encoder sees inputs, before normalisation is undone."""
        return kernels.decode(values, entries, self.W_dec) + self.b_dec

    def pre_activations(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b s"]:
        """All pre-activations of `x`, dense (of the gates for `Gated`); raises as `encode` does."""
        rows = self.training_input(x)
        pre = (rows - self.centre) @ self.encoder + self.encoder_bias
        return pre.view(*x.shape[:-1], self.config.d_sae)

    def training_input(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "n d"]:
        """What the encoder reads and the loss compares with: `x` as rows, normalised."""
        return self._normalised(self._checked(x))[0]

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
    def choose(
        self,
        rows: Float[Tensor, "n d"],
        *,
        training: bool = False,
        progress: float = 1.0,
        dead: Int[Tensor, " m"] | None = None,
        k_dead: int = 0,
        dtype: torch.dtype = torch.float32,
        make_pool: Callable[[int], selection.Pool] = selection.Pool,
    ) -> tuple[Chosen, Chosen]:
        """The entries of `rows` that are looked at, and the `k_dead` strongest of latents `dead`.

        Args:
            rows: inputs, normalised.
            training: as training chooses: over the whole batch (`BatchTopK`), with the window under
                the thresholds (`JumpRelu`), the wider code of multi-TopK, `KSparse`'s current k.
            progress: share of the training that is done.
            dead: numbers of latents to choose from besides.
            k_dead: how many of them.
            dtype: precision of the dense product; with bfloat16, for `TopK` alone, the choice is
                that of float32 all the same (`saes.reduced`).
            make_pool: what collects the entries of a batch whose rows are in several places.
        """
        chosen, chosen_dead = [], []
        pool = None
        if training and isinstance(self.config.activation, BatchTopK | Matryoshka):
            pool = make_pool(self.config.activation.k * len(rows))
        for scores in self._scores(rows, dtype):
            if pool is None:
                chosen.append(self._pick(scores, training, progress))
            else:
                pool.add(scores.pre)
            if dead is not None and k_dead:
                chosen_dead.append(Chosen.of_codes(scores.top_k(k_dead, dead)))
        nothing = Chosen.of_codes(_no_codes(rows))
        return (
            concatenated(chosen) if pool is None else pool.chosen,
            concatenated(chosen_dead) if chosen_dead else nothing,
        )

    def _scores(self, rows: Tensor, dtype: torch.dtype) -> Iterator[Scores]:
        """Pre-activations of a few rows at a time, in the same memory."""
        encoder, bias, reduced = self.encoder, self.encoder_bias, None
        if dtype == torch.bfloat16:
            reduced = ReducedEncoder.of(encoder, bias)
        n_rows = min(len(rows), max(1, PRE_BYTES // (self.config.d_sae * dtype.itemsize)))
        memory = torch.empty(n_rows, self.config.d_sae, dtype=dtype, device=rows.device)
        for part in (rows - self.centre).split(max(1, n_rows)):
            pre = memory[: len(part)]
            if reduced is None:
                torch.addmm(bias, part, encoder, out=pre)
                yield Scores(pre=pre, rows=part, low_rows=part, reduced=None)
            else:
                yield reduced.scores(part, pre)

    def _pick(self, scores: Scores, training: bool, progress: float) -> Chosen:
        """The entries of some rows."""
        pre = scores.pre
        match self.config.activation:
            case TopK(k=k, multi=multi):
                return Chosen.of_codes(scores.top_k(4 * k if training and multi else k))
            case KSparse() as activation:
                k = activation.k_at(progress) if training else activation.k_encode
                return Chosen.of_codes(selection.signed_top_k(pre, k))
            case TopAfa():
                norms = torch.linalg.vector_norm(self.W_dec, dim=1)
                target = torch.linalg.vector_norm(scores.rows, dim=1)
                return selection.nearest_norm(pre, norms, target)
            case JumpRelu(bandwidth=bandwidth):
                window = bandwidth / 2 if training else 0.0
                return selection.above(pre, self.thresholds - window)
            case _:
                return selection.above(pre, self.thresholds)

    def pre_activations_at(self, rows: Float[Tensor, "n d"], chosen: Chosen) -> Float[Tensor, " m"]:
        """The pre-activations of chosen entries again, with gradients."""
        return kernels.pre_activations_at(
            rows, self.centre, self.encoder, self.encoder_bias, chosen.entries, chosen.values
        )

    def activated(self, pre: Float[Tensor, " m"], chosen: Chosen) -> Float[Tensor, " m"]:
        """The codes' values at chosen entries, from their pre-activations."""
        latents = chosen.latents
        match self.config.activation:
            case KSparse():
                return pre
            case JumpRelu(bandwidth=bandwidth):
                thresholds = self.log_threshold.exp().index_select(0, latents)
                return kernels.jump(pre, thresholds, bandwidth)
            case Gated():
                shared = pre - self.b_gate.index_select(0, latents)
                scale = self.r_mag.exp().index_select(0, latents)
                magnitude = (scale * shared + self.b_mag.index_select(0, latents)).relu()
                return torch.where(pre > 0, magnitude, 0)
            case _:
                # A padded entry names latent 0, whose own pre-activation is not meant.
                return torch.where(chosen.values > 0, pre.relu(), 0)


def is_finite(x: Float[Tensor, "*b d"]) -> bool:
    """Whether no entry is NaN or infinite; one cheap pass, as a sum shows either."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def _no_codes(rows: Tensor) -> Codes:
    indices = torch.zeros(len(rows), 0, dtype=torch.long, device=rows.device)
    return Codes(values=rows.new_zeros(len(rows), 0), indices=indices)
