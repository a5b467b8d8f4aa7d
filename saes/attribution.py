"""What each feature of an SAE contributes to a prediction: estimated for all, measured for a few.

The activation at the SAE's site is kept whole: `x(t) = sum over f of a(t, f) W_dec[f] + b_dec +
error(t)`, the error being what the SAE does not explain (Marks et al. 2024, 2403.19647, section
3.1). With the error held fixed, taking feature `f` out at token `t` moves `x(t)` by
`-a(t, f) W_dec[f]`, so to first order (attribution patching: Nanda 2023; Syed et al. 2023,
2310.10348)

    m(with f) - m(without f)  ~  attribution(t, f) = a(t, f) * W_dec[f] . dm/dx(t)

for all features of all tokens by one backward pass. Positive: the feature speaks for the metric's
target. The estimate is exact where the metric is linear in `x`; how good it is elsewhere is
measured: `ablate` takes the strongest ones out in earnest, each beside a random direction of the
same length at the same tokens, and `Ablation.agreement` compares.

An SAE that normalises its input (`layer_norm`) speaks of the normalised row: its features are
multiplied by the row's deviation first.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from probe.errors import UserError
from probe.language import LanguageModel
from probe.readout import Metric, rows_at_once, site_gradient, varied_metrics
from probe.sites import Site, parse_site
from probe.tokens import Prompt, as_prompt
from saes.models import SparseAutoencoder

Where = Literal["token", "everywhere"]
WHERE: tuple[Where, ...] = get_args(Where)
N_SHUFFLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """The estimated contribution of every feature that is active on a prompt."""

    prompt: Prompt
    """The tokens, the last one being where the prediction is read."""
    site: str
    """Where the SAE reads."""
    metric: Metric
    """What is explained."""
    value: float
    """The metric's value on the prompt."""
    values: Float[Tensor, "t k"]
    """Codes; 0 where fewer than `k` features are active."""
    indices: Int[Tensor, "t k"]
    """The features they belong to."""
    effects: Float[Tensor, "t k"]
    """Attribution of each, in units of the metric (logits)."""
    scale: Float[Tensor, " t"]
    """What a decoder row is multiplied by at each token: 1, or the row's deviation."""
    error: Float[Tensor, " t"]
    """Attribution of what the SAE leaves unexplained at each token: `error(t) . dm/dx(t)`."""

    @property
    def keep(self) -> Bool[Tensor, " t"]:
        """The tokens that count: position 0 and special tokens, which the SAE has not seen in
        training, do not."""
        return torch.tensor(self.prompt.keep)

    def by_token(self, top: int | None = None) -> pd.DataFrame:
        """A row for each active feature of each token that counts, the largest effects first.

        Columns: feature, position, token, activation, attribution.
        """
        position, place = ((self.values != 0) & self.keep[:, None]).nonzero().unbind(1)
        rows = pd.DataFrame(
            {
                "feature": self.indices[position, place].numpy(),
                "position": position.numpy(),
                "token": [self.prompt.texts[i] for i in position.tolist()],
                "activation": self.values[position, place].numpy(),
                "attribution": self.effects[position, place].numpy(),
            }
        )
        return _strongest(rows, top)

    def by_feature(self, top: int | None = None) -> pd.DataFrame:
        """A row for each feature with its sum over the tokens that count, the largest first.

        Columns: feature, attribution, n_tokens (where it is active), and the token at which its
        attribution is largest in size: position, token, activation there.
        """
        rows = self.by_token()
        columns = ["feature", "attribution", "n_tokens", "position", "token", "activation"]
        if rows.empty:
            return pd.DataFrame(columns=columns)
        by_feature = rows.groupby("feature", sort=False)
        peak = by_feature[["feature", "position", "token", "activation"]].head(1)
        sums = by_feature["attribution"].agg(attribution="sum", n_tokens="size")
        return _strongest(peak.merge(sums, on="feature"), top).loc[:, columns]

    def total(self) -> dict[str, float]:
        """Sums over the tokens that count: of the features, and of what the SAE leaves out."""
        return {
            "features": float(self.effects[self.keep].sum()),
            "error": float(self.error[self.keep].sum()),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How well estimates predict what was measured."""

    n: int
    """Pairs compared."""
    pearson: float | None
    """Pearson's correlation; None where fewer than three pairs or no spread."""
    low: float | None
    """Lower end of its 95 % interval (Fisher's transformation)."""
    high: float | None
    """Upper end of it."""
    spearman: float | None
    """Correlation of the ranks."""
    shuffled: float | None
    """The control: 95 % of Pearson's correlations are smaller in size where the estimates are
    shuffled among the pairs."""
    largest_difference: float
    """Largest absolute difference between estimate and measurement, in logits; 0 without pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """Features taken out in earnest."""

    where: Where
    """`token`: each at one token; `everywhere`: each at all tokens that count."""
    value: float
    """The metric with nothing taken out."""
    table: pd.DataFrame
    """Columns: feature, position, token, activation (for `everywhere` those of the token with the
    largest attribution), attribution (for `everywhere` summed), ablation = m(with) - m(without),
    control = the same with a random direction of the same length in the feature's place."""

    def agreement(self) -> Agreement:
        """How well the attributions in the table predict its ablations."""
        return compare(self.table["attribution"].to_numpy(), self.table["ablation"].to_numpy())


def attribute(
    model: LanguageModel,
    sae: SparseAutoencoder,
    site: str,
    text: str | Prompt,
    metric: Metric | None = None,
    *,
    position: int | None = None,
) -> Attribution:
    """Estimate what every active feature contributes to a prediction.

    Args:
        model: the model; gradients are taken in its dtype, so load it in float32 for small effects.
        sae: the SAE.
        site: where it reads, by name.
        text: what the model reads.
        metric: what is explained (`probe.readout.token_metric`); None: the token that the model
            predicts, against the mean logit.
        position: the token after which the prediction is read; None for the last one.

    Raises:
        UserError: an empty or too long text, an unknown site, an SAE of another width.
    """
    prompt = as_prompt(model, text).up_to(position)
    found = site_gradient(model, parse_site(site), prompt, metric)
    x = found.x.to(sae.W_dec.device, torch.float32)
    gradient = found.gradient.to(x)
    with torch.no_grad():
        codes = sae.encode(x)
        scale = decoder_scale(sae, x)
        along = scale[:, None] * (gradient @ sae.W_dec.T).gather(1, codes.indices.long())
        error = ((x - sae.decode(codes, x)) * gradient).sum(-1)
    return Attribution(
        prompt=prompt,
        site=site,
        metric=found.metric,
        value=found.value,
        values=codes.values.float().cpu(),
        indices=codes.indices.long().cpu(),
        effects=(codes.values * along).float().cpu(),
        scale=scale.cpu(),
        error=error.cpu(),
    )


def decoder_scale(sae: SparseAutoencoder, x: Float[Tensor, "t d"]) -> Float[Tensor, " t"]:
    """What decoder rows are multiplied by in each row of the SAE's input: 1, or its deviation."""
    return x.std(-1) if sae.config.normalize == "layer_norm" else x.new_ones(len(x))


def ablate(
    model: LanguageModel,
    sae: SparseAutoencoder,
    found: Attribution,
    *,
    top: int = 20,
    where: Where = "token",
    seed: int = 0,
) -> Ablation:
    """Take the features of largest attribution out, one at a time, and measure the metric again.

    All runs go through the model together, as far as `probe.readout.TOKENS_AT_ONCE` allows.

    Args:
        model: the model.
        sae: the SAE.
        found: what `attribute` gave.
        top: how many.
        where: at the one token that the attribution is of, or at all tokens that count, where it is
            then compared with the feature's sum.
        seed: of the random directions.
    """
    if where not in WHERE or top < 1:
        raise UserError(
            f"wanted top of at least 1 and where out of {', '.join(WHERE)}; got {top} and "
            f"{where!r}."
        )
    rows = found.by_token(top) if where == "token" else found.by_feature(top)
    places = zip(rows["feature"], rows["position"], strict=True)
    taken = [
        _contribution(sae, found, int(f), None if where == "everywhere" else int(p))
        for f, p in places
    ]
    generator = torch.Generator().manual_seed(seed)
    others = [random_direction(part, generator) for part in taken]
    site = parse_site(found.site)
    effects = effects_of_removing(model, site, found.prompt, found.metric, [*taken, *others])
    measured, control = effects[: len(taken)], effects[len(taken) :]
    table = rows.assign(ablation=measured.numpy(), control=control.numpy())
    return Ablation(where=where, value=found.value, table=table)


def effects_of_removing(
    model: LanguageModel,
    site: Site,
    prompt: Prompt,
    metric: Metric,
    parts: list[tuple[Float[Tensor, " t"], Float[Tensor, " d"]]],
) -> Float[Tensor, " n"]:
    """`m(x) - m(x - amount(t) direction)` for each part, an amount a token and a direction.

    The untouched prompt runs along in every pass, so that both terms are rounded alike.
    """
    effects = []
    at_once = max(rows_at_once(prompt) - 1, 1)
    for start in range(0, len(parts), at_once):
        some = parts[start : start + at_once]
        amounts = torch.stack([torch.zeros(len(prompt)), *(amount for amount, _ in some)])
        directions = torch.stack([torch.zeros_like(some[0][1]), *(row for _, row in some)])

        def vary(x: Tensor, amounts: Tensor = amounts, directions: Tensor = directions) -> Tensor:
            return x.float() - (amounts[:, :, None] * directions[:, None, :]).to(x.device)

        metrics = varied_metrics(model, site, prompt, metric, vary, len(amounts))
        effects.append(metrics[0] - metrics[1:])
    return torch.cat(effects) if effects else torch.zeros(0)


def compare(estimated: np.ndarray, measured: np.ndarray) -> Agreement:
    """Correlations of pairs, with an interval and a control, and their largest difference."""
    n = len(estimated)
    largest = float(np.abs(estimated - measured).max()) if n else 0.0
    if n < 3 or min(np.ptp(estimated), np.ptp(measured)) == 0:
        return Agreement(
            n=n, pearson=None, low=None, high=None, spearman=None, shuffled=None,
            largest_difference=largest,
        )  # fmt: skip
    found: Any = stats.pearsonr(estimated, measured)
    ranks: Any = stats.spearmanr(estimated, measured)
    low, high = found.confidence_interval() if n > 3 else (None, None)
    rng = np.random.default_rng(0)
    shuffled = [np.corrcoef(rng.permutation(estimated), measured)[0, 1] for _ in range(N_SHUFFLES)]
    return Agreement(
        n=n,
        pearson=float(found.statistic),
        low=None if low is None else float(low),
        high=None if high is None else float(high),
        spearman=float(ranks.statistic),
        shuffled=float(np.quantile(np.abs(shuffled), 0.95)),
        largest_difference=largest,
    )


def _contribution(
    sae: SparseAutoencoder, found: Attribution, feature: int, position: int | None
) -> tuple[Tensor, Tensor]:
    """How much of the feature's decoder row is in `x` at each token, and that row."""
    amount = (found.values * (found.indices == feature)).sum(-1) * found.scale
    counts = found.keep if position is None else torch.arange(len(found.prompt)) == position
    return amount * counts, sae.W_dec[feature].detach().cpu()


def random_direction(
    part: tuple[Float[Tensor, " t"], Float[Tensor, " d"]], generator: torch.Generator
) -> tuple[Float[Tensor, " t"], Float[Tensor, " d"]]:
    """The same amounts of a random direction of the same length: the control of every effect."""
    amount, row = part
    other = torch.randn(len(row), generator=generator)
    return amount, other * (row.norm() / other.norm())


def _strongest(rows: pd.DataFrame, top: int | None) -> pd.DataFrame:
    order = np.argsort(-rows["attribution"].abs().to_numpy(), kind="stable")
    return rows.iloc[order[:top]].reset_index(drop=True)
