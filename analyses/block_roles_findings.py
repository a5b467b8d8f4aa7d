"""The verdicts of the block-roles study: the paper's claims, asked of this model.

Every claim names the model that it was asked of, and is a statement about that model alone.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from analyses.block_roles_locality import KINDS
from analyses.block_roles_measured import (
    CLAIMED,
    DECIDES,
    OPENED,
    OWN,
    ROLES,
    Frame,
    Measured,
    Method,
    Role,
)
from analyses.block_roles_numbers import (
    accuracy_draws,
    at_matched_cost,
    by_unit,
    from_draws,
    locality_by_feature,
    mean_of,
    moved_share,
    mover,
    owned_draws,
    owned_values,
    patches,
    pushed_by_value,
    select,
)
from analyses.block_roles_probes import N_DRAWS, drawn_images
from analyses.report import Verdict
from analyses.statistics import Estimate, welch_difference
from probe.toyturbo.world import FACTORS
from saes.metrics import ratio

WORDS: dict[Role, str] = {
    "composition": "composition (position and size of things)",
    "detail": "local detail (the shape of things)",
    "style": "style (colour, texture, background, light)",
}
TOP_CLAIMS = (
    ("down.2.1", "composition", "composition", 1),
    ("up.0.1", "texture", "texture energy", 1),
    ("up.0.1", "colour", "colour distance", -1),
)
"""What the top images of a block's features should show, by which score, and its sign."""
HOLDS_UP = 0.5
"""Share of what a one-step SAE explains in one step that it must explain in later ones."""
RIVALS: dict[Method, str] = {"whole updates": "activation steering", "neurons": "neurons"}


def verdicts(measured: Measured) -> list[Verdict]:
    """What holds and what does not."""
    found: list[Verdict | None] = []
    if measured.known:
        found += [_role_moved(measured, block) for block in CLAIMED]
        found += [_finds_the_training(measured)]
        found += [_scored_most(measured, *claim) for claim in TOP_CLAIMS]
        found += [_specific(measured)]
        found += [_predicts(measured), _owns(measured), _causal(measured)]
    found += [_local(measured, elsewhere=True), _local(measured, elsewhere=False)]
    found += [
        _trade(measured, "k", "explained", "A larger k explains more of the updates"),
        _trade(measured, "d_sae", "explained", "A wider SAE explains more of the updates"),
    ]
    if measured.known:
        found += [
            _trade(
                measured,
                "k",
                "owned",
                "A larger k leaves fewer values a feature of their own",
                falls=True,
            ),
            _trade(
                measured, "d_sae", "owned", "A wider SAE gives more values a feature of their own"
            ),
        ]
    found += [_holds_up(measured), _still_acts(measured)]
    found += [_transports_better(measured, rival) for rival in RIVALS]
    return [verdict for verdict in found if verdict is not None]


def _verdict(
    measured: Measured, claim: str, statistic: str, found: Estimate, *, holds: bool
) -> Verdict | None:
    """A verdict on this model; None where nothing was measured."""
    if np.isnan(found.value):
        return None
    return Verdict(
        claim=f"On {measured.model}: {claim}.", statistic=statistic, value=found.value,
        low=found.low, high=found.high, holds=holds,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- roles


def _role_moved(measured: Measured, block: str) -> Verdict | None:
    """Does swapping the block's update move most of its factors' pairs, and more than another's?"""
    if block not in measured.blocks or len(measured.blocks) < 2:
        return None
    role = CLAIMED[block]
    units = {b: by_unit(measured, b, ROLES[role]) for b in measured.blocks}
    shown = ", ".join(f"{b} {100 * series.mean():.3g} %" for b, series in units.items())
    rivals = [b for b in measured.blocks if b != block]
    nearest = max(rivals, key=lambda b: ratio(units[b].sum(), len(units[b])))
    difference = mean_of((units[block] - units[nearest]).dropna())
    moved = {factor: moved_share(measured, block, factor).value for factor in ROLES[role]}
    one_by_one = ", ".join(
        f"{name} {100 * share:.3g} %" for name, share in moved.items() if not np.isnan(share)
    )
    return _verdict(
        measured,
        f"{block} is the block that decides {WORDS[role]}",
        f"share of these factors that become the source's when the update is swapped: {shown} "
        f"({block} one by one: {one_by_one}); {block} less {nearest}, which comes nearest",
        difference,
        holds=difference.above(0) and bool(units[block].mean() >= DECIDES),
    )


def _finds_the_training(measured: Measured) -> Verdict | None:
    """Is the block that moves a factor the one that training opened for it?"""
    factors = [f for f in OPENED if set(OPENED[f]) <= set(measured.blocks)]
    if len(factors) < 2 or not measured.has("causes"):
        return None
    agree = np.mean([_agreeing(measured, factor) for factor in factors], axis=0)
    chance = float(np.mean([len(OPENED[f]) / len(measured.blocks) for f in factors]))
    movers = ", ".join(f"{f} {mover(measured, f)}" for f in factors)
    found = from_draws(agree, measured.settings.pairs)
    return _verdict(
        measured,
        "swapping updates finds the split between blocks that training put there",
        f"share of {', '.join(factors)} that the block (or one of the two) opened for them moves "
        f"most ({movers}; {100 * chance:.3g} % by chance)",
        found,
        holds=found.above(chance),
    )


def _agreeing(measured: Measured, factor: str) -> Float64[np.ndarray, " r"]:
    """Whether the block that moves a factor most is one opened for it, and its resamples.

    Resamples draw base captions. Blocks that move it equally often share.
    """
    n = measured.settings.pairs
    weights, shares = drawn_images(n, measured.config.seed), []
    for block in measured.blocks:
        rows = patches(measured, block, factor)
        unit = rows["unit"].to_numpy(int)
        moved = np.bincount(unit, rows["moved"].astype(float), n)
        counted = np.bincount(unit, minlength=n)
        shares.append((weights @ moved) / (weights @ counted).clip(1e-300))
    best = np.stack(shares) >= np.max(shares, axis=0) - 1e-12
    opened = np.isin(measured.blocks, OPENED[factor])
    return best[opened].sum(0) / best.sum(0)


def _scored_most(measured: Measured, block: str, what: str, name: str, sign: int) -> Verdict | None:
    """Is a score's distance from random images larger in a block than in any other?"""
    if block not in measured.blocks or len(measured.blocks) < 2:
        return None
    beyond = {b: sign * beyond_random(measured, name, b) for b in measured.blocks}
    if any(len(values) < 2 for values in beyond.values()):
        return None
    rivals = [b for b in measured.blocks if b != block]
    nearest = max(rivals, key=lambda b: beyond[b].mean())
    difference = welch_difference(beyond[block], beyond[nearest])
    shown = ", ".join(f"{b} {values.mean():.3g}" for b, values in beyond.items())
    return _verdict(
        measured,
        f"judged by the top images of features, {block} is the block of {what}",
        f"{name}, {'below' if sign < 0 else 'above'} that of random images, mean over features: "
        f"{shown}; {block} less {nearest}, which comes nearest",
        difference,
        holds=difference.above(0),
    )


def beyond_random(
    measured: Measured, score: str, block: str | None, weights: str = "trained"
) -> np.ndarray:
    """A score less that of random images, a feature each."""
    wanted: dict[str, object] = {"score": score, "weights": weights}
    rows = select(measured.table("scores"), wanted | ({} if block is None else {"block": block}))
    return (rows["value"] - rows["random"]).to_numpy(float) if len(rows) else np.array([])


def _specific(measured: Measured) -> Verdict | None:
    found = mean_of(beyond_random(measured, "agreement of factors", None))
    return _verdict(
        measured,
        "features are specific: their top images share more factors than random images do",
        "share of pairs that agree in a factor, less that of random images, mean over features",
        found,
        holds=found.above(0),
    )


# -------------------------------------------------------------------------------------- features


def _predicts(measured: Measured) -> Verdict | None:
    """Do the codes predict more than those of the twin?"""
    if not measured.twins:
        return None
    differences = []
    for factor in FACTORS:
        best = [
            np.max([_draws(measured, b, factor, weights) for b in measured.twins], axis=0)
            for weights in ("trained", "twin")
        ]
        differences.append(best[0] - best[1])
    found = from_draws(np.mean(differences, axis=0), measured.settings.images // 2)
    return _verdict(
        measured,
        "the features of the blocks predict the factors better than those of the random-weight "
        "twin",
        "accuracy of a linear probe on the codes of the best block, less that of the twin's best, "
        "mean over factors",
        found,
        holds=found.above(0),
    )


def _draws(measured: Measured, block: str, factor: str, weights: str) -> np.ndarray:
    found = accuracy_draws(measured, block, factor, "codes", weights)
    assert found is not None, "both models were probed"
    return found


def _owns(measured: Measured) -> Verdict | None:
    """Have more true values a feature of their own than by chance?"""
    own = owned_draws(measured)
    twin = owned_draws(measured, "twin")
    rival = owned_draws(measured, control="shuffled") if twin is None else twin
    if own is None or rival is None:
        return None
    n = measured.settings.images // 2
    found = from_draws(own - rival, n)
    floor = "on shuffled labels" if twin is None else "of the random-weight twin"
    return _verdict(
        measured,
        "true values have features of their own",
        f"share of the values of all factors with a feature of F1 {OWN:g} or more in one of the "
        f"blocks: {_percent(from_draws(own, n))}; less that {floor}",
        found,
        holds=found.above(0),
    )


def _causal(measured: Measured) -> Verdict | None:
    """Do features that stand for a value bring it about?"""
    if not measured.has("pushes"):
        return None
    owned = owned_values(measured)
    rates = {kind: pushed_by_value(measured, kind) for kind in KINDS}
    rates = {kind: series[series.index.isin(owned)] for kind, series in rates.items()}
    if not len(rates[KINDS[0]]):
        return None
    nearest = max(KINDS[1:], key=lambda kind: rates[kind].mean())
    difference = mean_of(rates[KINDS[0]] - rates[nearest])
    return _verdict(
        measured,
        "features are causal: adding a value's own feature brings the value about, more than "
        "changes of the same size do",
        f"share of the images that show the value then, mean over doses and over {len(owned)} "
        f"values of blocks: {_percent(mean_of(rates[KINDS[0]]))}; less {nearest}s, which come "
        "nearest",
        difference,
        holds=difference.above(0),
    )


def _local(measured: Measured, *, elsewhere: bool) -> Verdict | None:
    """Is the change where the feature fires, more than elsewhere, or than other changes there?"""
    if not measured.has("locality"):
        return None
    own = locality_by_feature(measured, None, KINDS[0])
    if elsewhere:
        rival = locality_by_feature(measured, None, KINDS[0], elsewhere=True)
        claim = "a feature changes the image where it fires, more than where another one fires"
        what = "the same changes seen through the heat maps of other features"
    else:
        series = {kind: locality_by_feature(measured, None, kind) for kind in KINDS[1:]}
        nearest = max(series, key=lambda kind: series[kind].mean())
        rival = series[nearest]
        claim = "a feature's change is more local than changes of the same size at its places"
        what = f"{nearest}s, which come nearest"
    difference = mean_of((own - rival).dropna())
    return _verdict(
        measured, claim,
        f"share of the change of pixels that is inside the heat map, mean over features: "
        f"{mean_of(own).value:.3g}; less {what}",
        difference, holds=difference.above(0),
    )  # fmt: skip


# -------------------------------------------------------------------------------- k, width, steps


def _trade(
    measured: Measured, by: str, column: str, claim: str, *, falls: bool = False
) -> Verdict | None:
    """What changes from one SAE of a block to the next in k or width, the other held fixed."""
    draws = [step for _, step in neighbours(measured.table("widths"), by, column)]
    if not draws:
        return None
    found = from_draws(np.mean(draws, axis=0), measured.settings.images)
    names = {"k": "k", "d_sae": "width"}
    what = {"explained": "share of the variance", "owned": "share of the values"}[column]
    return _verdict(
        measured,
        f"{claim[0].lower()}{claim[1:]}",
        f"{what}: change from each {names[by]} to the next larger one, the other fixed; mean of "
        f"{len(draws)}",
        found,
        holds=found.below(0) if falls else found.above(0),
    )


def neighbours(
    widths: Frame, by: str, column: str
) -> Sequence[tuple[str, Float64[np.ndarray, " r"]]]:
    """Block and change, with resamples, between SAEs that are next to each other in k or width."""
    found = []
    if not len(widths):
        return found
    fixed = {"k": "d_sae", "d_sae": "k"}[by]
    for (block, _), group in widths.groupby(["block", fixed]):
        ordered = group.sort_values(by).drop_duplicates(by)
        draws = [np.asarray(one, float) for one in ordered[column]]
        found += [(str(block), b - a) for a, b in itertools.pairwise(draws)]
    return found


def _holds_up(measured: Measured) -> Verdict | None:
    """Does an SAE of one step explain later steps?"""
    rows = measured.table("steps")
    if not len(rows):
        return None
    ratios = []
    for block in measured.blocks:
        of = rows[rows["block"] == block]
        one = _explained(of[of["steps"] == 1])
        later = _explained(of[(of["steps"] > 1) & (of["step"] > 1)])
        ratios.append(later.min(0) / one[0])
    found = from_draws(np.mean(ratios, axis=0), N_DRAWS)
    return _verdict(
        measured,
        "SAEs of one step explain the later of four steps at least half as well",
        "share of the variance explained in the worst of steps 2 to 4, over that in one step; mean "
        "over blocks",
        found,
        holds=found.above(HOLDS_UP),
    )


def _explained(rows: Frame) -> Float64[np.ndarray, "s r"]:
    return np.stack([np.asarray(one, float) for one in rows["explained"]])


def _still_acts(measured: Measured) -> Verdict | None:
    """Do features of one step act in four?"""
    rows = measured.table("pushes_in_steps")
    if not len(rows):
        return None
    rows = rows[rows["counts"].astype(bool)]
    if not len(rows):
        return None
    rate = rows.groupby(["when", "kind", "block", "factor", "value"])["became"].mean()
    four = rate["all of 4"]
    difference = mean_of((four[KINDS[0]] - four[KINDS[2]]).dropna())
    one = mean_of(rate["one step"][KINDS[0]]).value
    return _verdict(
        measured,
        "features of SAEs of one step act in a drawing of four steps too",
        f"share of the images that show the value then, pushed at all four steps: "
        f"{_percent(mean_of(four[KINDS[0]]))} ({100 * one:.3g} % in one step); less random "
        "directions, mean over features",
        difference,
        holds=difference.above(0),
    )


def _transports_better(measured: Measured, rival: Method) -> Verdict | None:
    rows = measured.table("transports")
    if not len(rows):
        return None
    found = at_matched_cost(rows, rival)
    return _verdict(
        measured,
        f"transport of features beats {RIVALS[rival]} at the same cost",
        "how much oftener the factor becomes the source's, the cost (share of the drawings in "
        "which another factor changed) being the features' or less",
        found,
        holds=found.above(0),
    )


def _percent(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return f"{100 * found.value:.3g} %"
    return f"{100 * found.value:.3g} % [{100 * found.low:.3g}, {100 * found.high:.3g}]"


def numbers(measured: Measured) -> dict[str, float]:
    """Key figures: what each block moves and its SAE explains, what was drawn as said."""
    found = {f"drawn as said/{name}": float(share) for name, share in measured.fidelity.items()}
    if measured.known:
        for block in measured.blocks:
            for factor in FACTORS:
                found[f"moved/{block}/{factor}"] = moved_share(measured, block, factor).value
    for row in measured.table("widths").to_dict("records"):
        found[f"explained/{row['sae']}"] = float(row["explained"][0])
    if (own := owned_draws(measured)) is not None:
        found["values with a feature of their own"] = float(own[0])
    return {name: value for name, value in found.items() if np.isfinite(value)}
