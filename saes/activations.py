"""The family: what makes codes of pre-activations, one frozen config each.

With pre = W_enc^T (x - b_dec) + b_enc, d_i the decoder row of latent i and f its code:

1. `TopK` (Gao et al. 2024, 2406.04093, section 2.3): ReLU of the k largest of a row. `multi` adds
   their multi-TopK loss, L(k) + L(4k) / 8, so that the SAE can be read at other k.
2. `BatchTopK` (Bussmann et al. 2024, 2412.06410): ReLU of the b x k largest of a batch of b rows. A
   row's code then depends on its batch, so outside training a latent is active where pre exceeds a
   threshold: the running mean of the smallest activation that training kept.
3. `Matryoshka` (Bussmann et al. 2025, 2503.17547): BatchTopK whose dictionary has prefixes that
   each have to reconstruct the input alone; coarse features come first.
4. `TopAfa` (Lee et al. 2025, 2503.24277): as many of the strongest scaled codes f_i |d_i| as bring
   their norm nearest to |x - b_dec|, so that every input decides its own number; the loss pulls the
   two norms together.
5. `JumpRelu` (Rajamanoharan et al. 2024, 2407.14435): pre where it exceeds the latent's own learnt
   threshold, with an L0 penalty through a straight-through estimate.
6. `Gated` (Rajamanoharan et al. 2024, 2404.16014): a gate decides whether, a magnitude how much;
   both share the encoder's directions. The L1 penalty falls on the gate alone.
7. `Relu` (Bricken et al. 2023; Cunningham et al. 2023, 2309.08600): ReLU with an L1 penalty on
   f_i |d_i|.
8. `KSparse` (Makhzani and Frey 2013, 1312.5663): the k largest, signed, of linear hidden units.

The penalties are dimensionless: L1 norms are divided by the square root of the source's total
variance, squared norm differences by the variance of one coordinate.
"""

from dataclasses import dataclass

from probe.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """Keep the `k` largest pre-activations of each row."""

    k: int = 32
    """Latents kept for each row (L0 is at most this). Gao et al. 2024 use 32 for GPT-2 small."""
    multi: bool = False
    """Also reconstruct from the 4 k largest, with an eighth of the weight (multi-TopK)."""

    def __post_init__(self) -> None:
        check_k(self.k)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTopK:
    """Keep the largest pre-activations of a batch, `k` a row on average."""

    k: int = 32
    """Latents kept for each row on average."""

    def __post_init__(self) -> None:
        check_k(self.k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matryoshka:
    """BatchTopK whose prefixes reconstruct alone."""

    k: int = 32
    """Latents kept for each row on average."""
    prefixes: tuple[int, ...] = (64, 256, 1024)
    """Sizes of the inner prefixes, growing; the whole dictionary is always the last."""

    def __post_init__(self) -> None:
        check_k(self.k)
        if (
            not self.prefixes
            or self.prefixes[0] < 1
            or sorted(set(self.prefixes)) != list(self.prefixes)
        ):
            raise UserError(
                f"prefixes must be growing numbers of latents from 1 on, got {self.prefixes}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TopAfa:
    """Keep as many as bring the code's norm nearest to the input's."""

    afa: float = 1 / 32
    """Weight of the squared difference of the two norms. Lee et al. 2025: 1/128 to 1/16."""
    paper_code: bool = False
    """Mix conventions as the authors' code does: the loss compares the plain code's norm with that
    of the input before b_dec is taken off, and there is no encoder bias."""

    def __post_init__(self) -> None:
        check_weight("afa", self.afa)


@dataclass(frozen=True, slots=True, kw_only=True)
class JumpRelu:
    """Keep what exceeds the latent's own learnt threshold."""

    l0: float = 1e-3
    """Weight of the mean number of active latents."""
    bandwidth: float = 1.0
    """Width of the window around a threshold in which it gets a gradient, in units of the
    normalised input. The paper's 0.001 wants billions of tokens."""
    start: float = 1.5
    """Every latent's first threshold, in the same units."""

    def __post_init__(self) -> None:
        check_weight("l0", self.l0)
        if not self.bandwidth > 0 or not self.start > 0:
            raise UserError(
                f"bandwidth and start must be above 0, got {self.bandwidth} and {self.start}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """A gate says whether a latent is active, a magnitude how much."""

    l1: float = 0.02
    """Weight of the L1 norm of the gates' positive parts."""

    def __post_init__(self) -> None:
        check_weight("l1", self.l1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Relu:
    """Keep every positive pre-activation."""

    l1: float = 0.02
    """Weight of the L1 norm of the decoder-scaled code."""

    def __post_init__(self) -> None:
        check_weight("l1", self.l1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KSparse:
    """Keep the `k` largest of linear hidden units, whatever their sign."""

    k: int = 25
    """Units kept for each row at the end of training."""
    alpha: float = 1.0
    """Outside training alpha x k units are kept. Makhzani and Frey 2013: more than in training."""
    k_start: int | None = None
    """Units kept at the start of training; None for `k` all along."""
    anneal_share: float = 0.5
    """Share of all steps over which the number falls from `k_start` to `k`, linearly."""

    def __post_init__(self) -> None:
        check_k(self.k)
        if self.alpha < 1 or not 0 < self.anneal_share <= 1:
            raise UserError(
                f"alpha must be at least 1 and anneal_share in (0, 1], got {self.alpha} and "
                f"{self.anneal_share}."
            )
        if self.k_start is not None and self.k_start < self.k:
            raise UserError(f"k_start must be at least k = {self.k}, got {self.k_start}.")

    @property
    def k_encode(self) -> int:
        """Units kept outside training."""
        return round(self.alpha * self.k)

    def k_at(self, progress: float) -> int:
        """Units kept when this share of training is done."""
        if self.k_start is None:
            return self.k
        done = min(1.0, progress / self.anneal_share)
        return round(self.k_start + (self.k - self.k_start) * done)


Activation = TopK | BatchTopK | Matryoshka | TopAfa | JumpRelu | Gated | Relu | KSparse
"""Every activation there is."""

NAMES: dict[str, type[Activation]] = {
    "topk": TopK,
    "batch_topk": BatchTopK,
    "matryoshka": Matryoshka,
    "top_afa": TopAfa,
    "jump_relu": JumpRelu,
    "gated": Gated,
    "relu": Relu,
    "k_sparse": KSparse,
}
"""Each by the name that the command line and the files call it."""


def activation_name(activation: Activation) -> str:
    """The name of an activation."""
    return next(name for name, kind in NAMES.items() if type(activation) is kind)


def short_name(activation: Activation) -> str:
    """Name and main number of an activation, for the name of a folder: topk32, top_afa0.03125."""
    match activation:
        case TopK(k=number) | BatchTopK(k=number) | Matryoshka(k=number) | KSparse(k=number):
            pass
        case TopAfa(afa=number) | JumpRelu(l0=number) | Gated(l1=number) | Relu(l1=number):
            pass
    return f"{activation_name(activation)}{number:.4g}"


def most_active(activation: Activation) -> int | None:
    """The most latents that a row of the activation can have; None where nothing limits them."""
    match activation:
        case TopK(k=k, multi=multi):
            return 4 * k if multi else k
        case KSparse():
            return max(activation.k_encode, activation.k_start or 0)
        case BatchTopK(k=k) | Matryoshka(k=k):
            return k
        case _:
            return None


def check_k(k: int) -> None:
    """Raises `UserError` for fewer than one."""
    if k < 1:
        raise UserError(f"k must be at least 1, got {k}; 32 is the usual choice.")


def check_weight(name: str, weight: float) -> None:
    """Raises `UserError` for what is no finite weight of at least 0."""
    if not 0 <= weight < float("inf"):
        raise UserError(f"{name} must be a number of at least 0, got {weight}.")
