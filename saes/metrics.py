"""What the numbers of an evaluation mean: each is defined here, once, and nowhere else.

Names that peers share hide different formulas (an "explained variance" may be taken over all
channels together or averaged over them, against the mean row or against zero), so a report carries
`DEFINITIONS` along. Sums are float64; variances are merged from centred parts (Chan, Golub and
LeVeque 1979), since a residual stream's mean is large beside its spread.

Symbols: x a row of activations [d], xhat its reconstruction, mean the mean row of the evaluation
rows, j a channel, Var over rows.

Intervals are percentile bootstrap (Efron 1979) over whole sequences, because rows of one sequence
resemble each other.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from probe.errors import Failure
from saes.types import SaeOutput

DENSE = 0.1
"""A latent that fires on more than this share of the rows is dense."""
OUTLIER = 10
"""A row whose norm is more than this many times the median norm is an outlier."""
CONFIDENCE = 0.95
"""Share of the resamples that lies between an interval's ends."""

DEFINITIONS: dict[str, str] = {
    "fvu": "fraction of variance unexplained: sum ||x - xhat||^2 / sum ||x - mean||^2 over rows; "
    "0 is perfect, 1 is no better than the mean row",
    "explained_variance": "mean over channels j of 1 - Var_j(x - xhat) / Var_j(x); channels that "
    "are constant are left out. Not 1 - fvu: every channel counts the same however little it "
    "varies, and a constant error costs nothing",
    "fvu_typical": "fvu over typical rows alone, about their own mean: those whose norm is at most "
    "10 times the median norm of the evaluation rows. A handful of rows beyond (massive "
    "activations) can hold most of the variance, and fvu then speaks of that handful",
    "explained_variance_typical": "explained_variance over typical rows alone",
    "cosine": "mean over rows of x . xhat / (||x|| ||xhat||); 0 for a row where either is zero",
    "mse": "mean over rows and channels of (x - xhat)^2",
    "relative_norm": "sum over rows of ||xhat|| / sum over rows of ||x||; below 1 is shrinkage",
    "l0": "mean over rows of the number of non-zero codes",
    "dead_share": "share of latents that fire on none of the evaluation rows",
    "dense_share": "share of latents that fire on more than 10 % of the evaluation rows",
    "ce": "mean cross-entropy in nats of predicting the next token, with xhat put in x's place at "
    "the site; positions that the store dropped (position 0, special tokens, outlier norms) keep "
    "x. Predictions are those of positions 0 to t - 2 of every sequence of t tokens: all whose "
    "target lies in the sequence, across document boundaries too",
    "ce_clean": "ce of the untouched model",
    "ce_zero": "ce with zero put in x's place",
    "ce_mean": "ce with the store's mean row put in x's place",
    "ce_recovered": "(ce_zero - ce) / (ce_zero - ce_clean); 1 is the clean model, 0 is zero "
    "ablation. It flatters: zero ablation is so harmful that poor reconstructions come near 1",
    "ce_recovered_mean": "(ce_mean - ce) / (ce_mean - ce_clean): the same with mean ablation as 0",
    "kl": "mean over predictions of KL(clean || spliced) between next-token distributions, in nats",
    "low, high": "ends of the 95 % percentile bootstrap interval over whole sequences; it speaks "
    "of the choice of text, not of the training seed",
    "rows": "rows of whole sequences from the store's end, which training leaves out; no document "
    "of theirs reaches into the training rows where the corpus has more than one",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Number, mean and sum of squared deviations of some rows, channel by channel."""

    count: int
    """Number of rows."""
    mean: Float64[Tensor, " d"]
    """Mean row."""
    deviation: Float64[Tensor, " d"]
    """Sum over rows of (x - mean)^2."""

    @staticmethod
    def of(rows: Float[Tensor, "n d"]) -> "Moments":
        """Moments of at least one row. Constant channels have a deviation of exactly 0."""
        shift = rows[0].double()
        shifted = rows.double() - shift
        mean = shifted.mean(0)
        return Moments(
            count=len(rows), mean=mean + shift, deviation=(shifted - mean).square().sum(0)
        )

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        difference = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + difference * (other.count / count),
            deviation=self.deviation
            + other.deviation
            + difference.square() * (self.count * other.count / count),
        )


@dataclass(slots=True, kw_only=True)
class FidelityMeter:
    """Sums of how well rows are reconstructed, one sequence at a time.

    Memory: two rows of float64 for each sequence and one count for each latent.
    """

    n_latents: int
    """Size of the dictionary; 0 where there is none."""
    x: Moments | None = None
    """Moments of the rows."""
    residual: Moments | None = None
    """Moments of x - xhat."""
    sequences: list[Moments] = field(default_factory=list)
    """Moments of each sequence's rows."""
    squared_errors: list[float] = field(default_factory=list)
    """Each sequence's sum of ||x - xhat||^2."""
    sums: Float64[Tensor, " 4"] = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    """Sums over rows of cosine, ||x||, ||xhat|| and the number of non-zero codes."""
    fired: Int[Tensor, " s"] | None = None
    """Number of rows that each latent fires on."""

    @property
    def n_rows(self) -> int:
        """Number of rows seen."""
        return 0 if self.x is None else self.x.count

    def update(self, x: Float[Tensor, "n d"], output: SaeOutput) -> None:
        """Add the rows of one sequence, at least one.

        Raises `Failure` where a number is not finite.
        """
        exact, new = x.double().cpu(), output.reconstruction.double().cpu()
        residual = exact - new
        squared_error = float(residual.square().sum())
        if not torch.isfinite(exact).all() or not torch.isfinite(new).all():
            raise Failure(
                "the evaluation met NaN or infinite numbers; run `lorgnette runs` on the store and "
                "the SAE to see which is damaged, and make it again."
            )
        moments = Moments.of(exact)
        self.x = moments if self.x is None else self.x + moments
        errors = Moments.of(residual)
        self.residual = errors if self.residual is None else self.residual + errors
        self.sequences.append(moments)
        self.squared_errors.append(squared_error)
        self._count(exact, new, output)

    def _count(self, x: Tensor, new: Tensor, output: SaeOutput) -> None:
        active = output.codes.values != 0
        norms, new_norms = x.norm(dim=1), new.norm(dim=1)
        product = norms * new_norms
        cosine = torch.where(product > 0, (x * new).sum(1) / product, 0.0)
        totals = [part.sum().double().cpu() for part in (cosine, norms, new_norms, active)]
        self.sums = self.sums + torch.stack(totals)
        fired = torch.bincount(output.codes.indices[active].cpu(), minlength=self.n_latents)
        self.fired = fired if self.fired is None else self.fired + fired

    def metrics(self) -> dict[str, float]:
        """Every metric of fidelity and sparsity; nan where one is not defined."""
        assert self.x is not None and self.residual is not None and self.fired is not None
        n, d = self.x.count, len(self.x.mean)
        cosine, norm, new_norm, n_active = self.sums.tolist()
        varying = self.x.deviation > 0
        unexplained = self.residual.deviation[varying] / self.x.deviation[varying]
        squared_error = sum(self.squared_errors)
        return {
            "fvu": ratio(squared_error, float(self.x.deviation.sum())),
            "explained_variance": float(1 - unexplained.mean()),
            "cosine": cosine / n,
            "mse": squared_error / (n * d),
            "relative_norm": ratio(new_norm, norm),
            "l0": n_active / n,
            "dead_share": ratio(int((self.fired == 0).sum()), self.n_latents),
            "dense_share": ratio(int((self.fired > DENSE * n).sum()), self.n_latents),
        }

    def outlier_share(self, typical: "FidelityMeter") -> float:
        """Share of the variance that is in the rows which `typical`, a meter of the rest, lacks."""
        assert self.x is not None and typical.x is not None
        offset = (typical.x.mean - self.x.mean).square().sum() * typical.x.count
        kept = float(typical.x.deviation.sum() + offset)
        return ratio(max(0.0, float(self.x.deviation.sum()) - kept), float(self.x.deviation.sum()))

    def resampled_fvu(self, weights: Float64[Tensor, "r s"]) -> Float64[Tensor, " r"]:
        """The fvu of every resample, each about its own mean row."""
        assert self.x is not None
        count = torch.tensor([part.count for part in self.sequences], dtype=torch.float64)
        centred = torch.stack([part.mean for part in self.sequences]) - self.x.mean
        within = torch.stack([part.deviation.sum() for part in self.sequences])
        n = weights @ count
        offset = (weights @ (count[:, None] * centred)).square().sum(1) / n
        variance = weights @ (within + count * centred.square().sum(1)) - offset
        errors = torch.tensor(self.squared_errors, dtype=torch.float64)
        return ratios(weights @ errors, variance)


@dataclass(frozen=True, slots=True, kw_only=True)
class Downstream:
    """What a reconstruction does to the model's predictions: sums, one entry a sequence."""

    n_predictions: Float64[Tensor, " s"]
    """Number of predictions."""
    cross_entropy: Float64[Tensor, " s"]
    """Sum of the cross-entropies of the spliced model."""
    kl: Float64[Tensor, " s"]
    """Sum of KL(clean || spliced)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchors:
    """The three cross-entropies that a spliced model is measured against; one entry a sequence."""

    clean: Float64[Tensor, " s"]
    """Sums of the untouched model."""
    zero: Float64[Tensor, " s"]
    """Sums under zero ablation."""
    mean: Float64[Tensor, " s"]
    """Sums under mean ablation."""


def downstream_metrics(
    measured: Downstream, anchors: Anchors, weights: Float64[Tensor, "r s"]
) -> dict[str, Float64[Tensor, " r"]]:
    """The downstream metrics of every resample; a row of ones in `weights` gives the estimate."""
    n = weights @ measured.n_predictions
    ce = weights @ measured.cross_entropy / n
    clean, zero, mean = (weights @ part / n for part in (anchors.clean, anchors.zero, anchors.mean))
    return {
        "ce": ce,
        "ce_clean": clean,
        "ce_zero": zero,
        "ce_mean": mean,
        "ce_recovered": ratios(zero - ce, zero - clean),
        "ce_recovered_mean": ratios(mean - ce, mean - clean),
        "kl": weights @ measured.kl / n,
    }


def resampling_weights(n: int, n_resamples: int, seed: int) -> Float64[Tensor, "r s"]:
    """How often each of `n` sequences is drawn in each bootstrap resample."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (n_resamples, n), generator=generator)
    weights = torch.zeros(n_resamples, n, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights))


def interval(resamples: Float64[Tensor, " r"], n: int) -> tuple[float, float]:
    """Ends of the interval of a metric resampled over `n` sequences; nan where `n` is 1."""
    if n < 2:
        return float("nan"), float("nan")
    tail = (1 - CONFIDENCE) / 2
    low, high = resamples.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def ratio(part: float | int, whole: float | int) -> float:
    """`part / whole`; nan where `whole` is 0."""
    return part / whole if whole else float("nan")


def ratios(part: Float64[Tensor, " r"], whole: Float64[Tensor, " r"]) -> Float64[Tensor, " r"]:
    """`ratio`, element by element."""
    return torch.where(whole != 0, part / whole, torch.nan)
