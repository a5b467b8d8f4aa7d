"""The break in an SAE's feature space: which features were rerouted, which appeared, and whether
putting them back undoes it.

The same tokens are read by the original and by the broken model, and both states are encoded by an
SAE of the original. A feature is *lost* by as much as its mean activation falls on the concept, and
*appeared* by as much as it rises. Then, in the broken model, at the SAE's site:

    none        nothing: the broken model
    N lost      the N most lost features are set to their original mean: a recipe (`readding`)
    N random    as many other features that are active on the concept, set likewise: the control
    codes       every feature gets the value it had in the original at that token
    state       the original's own state: what no dictionary leaves out

and the share of the lost likelihood of the original's responses that comes back is measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.circuit_breakers.asking import mean_nll
from analyses.circuit_breakers.capability import response_pairs
from analyses.circuit_breakers.rows import TokenRow
from probe.capture import capturing
from probe.interventions import editing
from probe.language import LanguageModel
from probe.sites import Site, parse_site
from probe.tokens import token_texts
from saes.recipe_parts import Feature, ModelReference, Recipe, RecipeEdit, Strength
from saes.recipe_saes import LoadedSae, sae_reference

SHOWN = 20
"""Lost and appeared features that are listed."""
COUNTS = (1, 5, 20, 100)
"""Features that are put back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A row's states at an SAE's site and their dense codes."""

    state: Float[Tensor, "t d"]
    """The states."""
    codes: Float[Tensor, "t f"]
    """The codes."""
    rebuilt: Float[Tensor, "t d"]
    """What the SAE makes of them."""
    own: slice
    """The row's own tokens: those that not all prompts share."""


@torch.no_grad()
def read_row(model: LanguageModel, row: TokenRow, loaded: LoadedSae) -> Read:
    """A row at an SAE's site."""
    site = parse_site(loaded.site)
    with capturing(model, [site]) as seen:
        model.run(torch.tensor([row.ids]))
    x = seen[site][0].float().cpu()
    codes = loaded.sae.encode(x)
    return Read(
        state=x, codes=codes.dense(loaded.sae.config.d_sae), rebuilt=loaded.sae.decode(codes, x),
        own=slice(max(1, row.shared), len(row.ids)),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What became of a set's features."""

    original: Float[np.ndarray, " f"]
    """Mean activation over the rows' own tokens in the original model."""
    broken: Float[np.ndarray, " f"]
    """The same in the broken one."""
    shared: float
    """Mean over tokens of the share of the original's active features that are still active."""
    fvu_original: float
    """Share of the original states' variance that the SAE misses."""
    fvu_broken: float
    """The same of the broken states."""
    places: list[dict[str, object]]
    """Of each feature that changes most at a token: where (`feature`, `row`, `place` in the
    response, `token`)."""


def difference(
    model: LanguageModel,
    reads: Sequence[tuple[Read, Read]],
    rows: Sequence[TokenRow],
) -> Difference:
    """What became of the features on some rows, of which both models' readings are given."""
    n, d = 0, reads[0][0].codes.shape[1]
    sums = np.zeros((2, d))
    kept, strongest = [], [np.zeros(d), np.full(d, -1), np.full(d, -1)]
    for number, (before, after) in enumerate(reads):
        a, b = before.codes[before.own].numpy(), after.codes[after.own].numpy()
        sums += np.stack([a.sum(0), b.sum(0)])
        n += len(a)
        active = (a > 0).sum(1).clip(1)
        kept.append((((a > 0) & (b > 0)).sum(1) / active).mean())
        change = np.abs(b - a)
        best, where = change.max(0), change.argmax(0)
        higher = best > strongest[0]
        strongest[0][higher] = best[higher]
        strongest[1][higher] = number
        strongest[2][higher] = where[higher] + before.own.start
    texts = [token_texts(model, row.ids) for row in rows]
    places = [
        {
            "feature": feature, "row": int(strongest[1][feature]),
            "place": int(strongest[2][feature]) - rows[int(strongest[1][feature])].answer,
            "token": texts[int(strongest[1][feature])][int(strongest[2][feature])],
        }
        for feature in np.flatnonzero(strongest[0])
    ]  # fmt: skip
    return Difference(
        original=sums[0] / n, broken=sums[1] / n, shared=float(np.mean(kept)),
        fvu_original=_fvu([before for before, _ in reads]),
        fvu_broken=_fvu([after for _, after in reads]), places=places,
    )  # fmt: skip


def _fvu(reads: Sequence[Read]) -> float:
    states = torch.cat([read.state[read.own] for read in reads])
    rebuilt = torch.cat([read.rebuilt[read.own] for read in reads])
    missed = (states - rebuilt).square().sum()
    return float(missed / (states - states.mean(0)).square().sum())


def feature_rows(concept: Difference, ordinary: Difference) -> pd.DataFrame:
    """The most lost and the most appeared features, beside ordinary text."""
    change = concept.broken - concept.original
    order = np.argsort(change)
    chosen = [("lost", order[:SHOWN]), ("appeared", order[::-1][:SHOWN])]
    places = pd.DataFrame(concept.places).set_index("feature") if concept.places else None
    rows = []
    for kind, features in chosen:
        for rank, feature in enumerate(features.tolist(), start=1):
            where = {} if places is None or feature not in places.index else places.loc[feature]
            rows.append(
                {
                    "kind": kind, "rank": rank, "feature": feature,
                    "original": concept.original[feature], "broken": concept.broken[feature],
                    "ordinary_original": ordinary.original[feature],
                    "ordinary_broken": ordinary.broken[feature],
                    "token": where.get("token", ""), "place": where.get("place", 0),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------ putting back


def readding(
    spec: str, loaded: LoadedSae, features: Sequence[int], values: Sequence[float]
) -> Recipe:
    """A recipe that sets features of the broken model (`spec`) to what they were."""
    edits = tuple(
        RecipeEdit(
            site=loaded.site, op="set", target=Feature(feature=int(feature), sae="main"),
            strength=Strength(value=float(value), unit="raw"),
        )
        for feature, value in zip(features, values, strict=True)
    )  # fmt: skip
    return Recipe(
        name=f"put back {len(features)} features",
        model=ModelReference(spec=spec),
        saes={"main": sae_reference(loaded.run)},
        edits=edits,
    )


Change = Callable[[int, Float[Tensor, "t d"], Float[Tensor, "t f"]], Float[Tensor, "t d"]]
"""From a row's number, the broken model's state and its codes, what is added to the state."""


@torch.no_grad()
def restored_nll(
    broken: LanguageModel, rows: Sequence[TokenRow], loaded: LoadedSae, change: Change | None
) -> Float[np.ndarray, " n"]:
    """Mean negative log-likelihood a token of each row's response, with a change at the SAE's site
    on the row's own tokens."""
    site, found = parse_site(loaded.site), []
    for number, row in enumerate(rows):
        prompts, responses = response_pairs([row])
        with _changed(broken, site, row, number, loaded, change):
            logits = broken.run(torch.tensor([row.ids]))
        assert logits is not None, "no capture is active"
        logprobs = logits[0, len(prompts[0]) - 1 : -1].float().log_softmax(-1).cpu()
        found.append(mean_nll(logprobs, responses[0]))
    return np.array(found)


def _changed(
    broken: LanguageModel, site: Site, row: TokenRow, number: int, loaded: LoadedSae,
    change: Change | None,
):  # fmt: skip
    own = torch.zeros(len(row.ids), 1)
    own[max(1, row.shared) :] = 1

    def apply(x: Tensor) -> Tensor:
        if change is None:
            return x
        state = x[0].float().cpu()
        codes = loaded.sae.encode(state).dense(loaded.sae.config.d_sae)
        return x + (own * change(number, state, codes)).to(x)[None]

    return editing(broken, site, apply)


def putting_back(
    broken: LanguageModel,
    rows: Sequence[TokenRow],
    loaded: LoadedSae,
    reads: Sequence[tuple[Read, Read]],
    found: Difference,
    *,
    seed: int,
    say: Callable[[int], None] = lambda _: None,
) -> pd.DataFrame:
    """The responses' likelihood with features put back: `change`, `n`, `row`, `nll`."""
    lost = np.argsort(found.broken - found.original)
    active = np.flatnonzero(found.original > 0)
    active = active[~np.isin(active, lost[: max(COUNTS)])]
    shuffled = np.random.default_rng(seed).permutation(active)
    W_dec, means = loaded.sae.W_dec.detach().float().cpu(), torch.tensor(found.original).float()

    def set_to_mean(features: np.ndarray) -> Change:
        chosen = torch.tensor(features.copy())
        return lambda _, __, codes: (means[chosen] - codes[:, chosen]) @ W_dec[chosen]

    wanted: list[tuple[str, int, Change | None]] = [("none", 0, None)]
    for n in COUNTS:
        wanted.append(("lost", n, set_to_mean(lost[:n])))
        wanted.append(("random", n, set_to_mean(shuffled[:n])))
    wanted.append(("codes", 0, lambda i, _, codes: (reads[i][0].codes - codes) @ W_dec))
    wanted.append(("state", 0, lambda i, state, _: reads[i][0].state - state))
    tables = []
    for name, n, change in wanted:
        nll = restored_nll(broken, rows, loaded, change)
        tables.append(
            pd.DataFrame({"change": name, "n": n, "row": np.arange(len(nll)), "nll": nll})
        )
        say(1)
    return pd.concat(tables)
