"""What the directions study concludes: verdicts, tables and words."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from analyses.directions_measured import Chosen, Effects, Measured, Readings
from analyses.report import Verdict
from analyses.statistics import Estimate, crossed_interval, paired_difference
from probe.direction_selection import ADDED, KL, LAYER, NOT_FINITE
from probe.separation import Separation, auroc, resampled_means, separation, wins

SPREAD = (0.025, 0.975)
"""Quantiles between which 95 % of the controls lie."""
EQUAL = 1e-3
"""Hooks and weight edit count as equal where no logit differs by more than this; float32 alone
gives about 1e-4."""
MISSED = {
    KL: "KL too large", ADDED: "score under addition too low", LAYER: "layer too late",
    NOT_FINITE: "not finite",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """AUROC on test prompts at every layer `s` and position `p`."""

    own: Float[np.ndarray, "s p"]
    """Of the difference of means."""
    low: Float[np.ndarray, "s p"]
    """Lower end of its interval over prompts."""
    high: Float[np.ndarray, "s p"]
    """Upper end."""
    random: Float[np.ndarray, "s p q"]
    """Of random directions."""
    shuffled: Float[np.ndarray, "s p r"]
    """Of shuffled labels."""


def auroc_by_place(readings: Readings) -> Places:
    """AUROC of the direction and its controls everywhere."""
    _, s, p = readings.own.shape
    found: Separation = separation(*_groups(readings.own.reshape(-1, s * p), readings.labels))
    shuffled = [
        auroc(*_groups(readings.shuffled[..., r].reshape(-1, s * p), labels)).reshape(s, p)
        for r, labels in enumerate(readings.shuffled_labels)
    ]
    random = [
        auroc(*_groups(readings.random[..., q].reshape(-1, s * p), readings.labels)).reshape(s, p)
        for q in range(readings.random.shape[-1])
    ]
    return Places(
        own=found.auroc.reshape(s, p),
        low=found.low.reshape(s, p),
        high=found.high.reshape(s, p),
        random=np.stack(random, axis=-1),
        shuffled=np.stack(shuffled, axis=-1),
    )


def _groups(
    values: Float[np.ndarray, "n c"], labels: Float[np.ndarray, " n"]
) -> tuple[np.ndarray, np.ndarray]:
    return values[labels == 1], values[labels == 0]


def spread(values: Float[np.ndarray, " n"]) -> Estimate:
    """Mean of controls, with the range of 95 % of them instead of an interval of the mean."""
    low, high = np.quantile(values, SPREAD)
    return Estimate(value=float(values.mean()), low=float(low), high=float(high), n=len(values))


def own_estimate(places: Places, site: int, position: int, n: int) -> Estimate:
    """AUROC of the difference of means at a place, with its interval over `n` prompts a set."""
    at = (site, position)
    return Estimate(
        value=float(places.own[at]), low=float(places.low[at]), high=float(places.high[at]), n=n
    )


def over_random(readings: Readings, place: tuple[int, int], *, seed: int = 0) -> Estimate:
    """AUROC minus the random directions' mean: prompts and directions resampled."""
    own, drawn = readings.own[(slice(None), *place)], readings.random[(slice(None), *place)]
    won = wins(*_groups(np.column_stack([own, drawn]), readings.labels))
    resampled = resampled_means(won, seed=seed)
    q = drawn.shape[1]
    counts = np.random.default_rng(seed + 1).multinomial(q, np.full(q, 1 / q), resampled.shape[1])
    differences = resampled[0] - (counts.T / q * resampled[1:]).sum(axis=0)
    means = won.mean(axis=(1, 2))
    return _estimate(float(means[0] - means[1:].mean()), differences, len(readings.labels) // 2)


def over_twin(measured: Measured, *, seed: int = 0) -> Estimate:
    """AUROC minus the random-weight twin's at the same place, on the same prompts resampled."""
    at = (slice(None), *measured.place)
    both = np.column_stack([measured.trained.own[at], measured.twin.own[at]])
    won = wins(*_groups(both, measured.trained.labels))
    resampled = resampled_means(won, seed=seed)
    means = won.mean(axis=(1, 2))
    n = len(measured.trained.labels) // 2
    return _estimate(float(means[0] - means[1]), resampled[0] - resampled[1], n)


def _estimate(value: float, resampled: Float[np.ndarray, " r"], n: int) -> Estimate:
    low, high = np.quantile(resampled, SPREAD)
    return Estimate(value=value, low=float(low), high=float(high), n=n)


# ------------------------------------------------------------------------------------ verdicts


def verdicts(measured: Measured) -> list[Verdict]:
    """The questions of the study, each with its answer."""
    found = separable(measured)
    if measured.chosen is not None:
        found += [meets_criteria(measured.chosen), *causal(measured.chosen.effects)]
        found += equality(measured.chosen.effects)
    return found


def separable(measured: Measured) -> list[Verdict]:
    """Does the direction separate held-out prompts, and what else does?"""
    places = auroc_by_place(measured.trained)
    n = len(measured.trained.labels) // 2
    own = own_estimate(places, *measured.place, n)
    chance = spread(places.shuffled[measured.place])
    random, twin = over_random(measured.trained, measured.place), over_twin(measured)
    assert chance.high is not None
    where = f"{measured.site}, position {measured.position}"
    return [
        _verdict(
            f"The direction separates held-out prompts ({where}).",
            f"AUROC (shuffled labels: mean {chance.value:.2f}, 95 % below {chance.high:.2f})",
            own,
            own.above(max(0.5, chance.high)),
        ),
        _verdict(
            "It separates them better than random directions do.",
            f"AUROC minus the mean of {measured.trained.random.shape[-1]} random directions",
            random,
            random.above(0),
        ),
        _verdict(
            "Training made it: in a random-weight twin the same place separates them less.",
            "AUROC minus the twin's",
            twin,
            twin.above(0),
        ),
    ]


def meets_criteria(chosen: Chosen) -> Verdict:
    """Does a candidate meet the criteria of the selection?"""
    passing = sum(not misses for misses in chosen.selection.misses)
    named = ", ".join(MISSED[m] for m in chosen.selection.misses[chosen.selection.chosen])
    best = "" if not named else f"; the best of the rest was taken ({named})"
    return Verdict(
        claim=f"A candidate meets the criteria of the selection (KL at most {chosen.criteria.kl:g},"
        f" score under addition at least {chosen.criteria.added:.2f}).",
        statistic=f"candidates that do, of {len(chosen.candidates)}{best}",
        value=float(passing),
        low=None,
        high=None,
        holds=passing > 0,
    )


def causal(effects: Effects) -> list[Verdict]:
    """Is the direction necessary and sufficient for the target tokens, beside its controls?"""
    asked = (
        ("Necessary: ablating it lowers the score of positive prompts more than ablating",
         "score after ablating the controls minus after ablating it", -1, effects.ablated,
         (effects.random_ablated, effects.shuffled_ablated)),
        ("Sufficient: adding it raises the score of negative prompts more than adding",
         "score after adding it minus after adding the controls", 1, effects.added,
         (effects.random_added, effects.shuffled_added)),
    )  # fmt: skip
    controls = (
        "random directions of its length", "directions of shuffled labels, of its length"
    )  # fmt: skip
    found = []
    for claim, statistic, sign, own, others in asked:
        for control, values in zip(controls, others, strict=True):
            gain = crossed_interval(sign * (own[None] - values))
            found.append(
                _verdict(
                    f"{claim} {control}.",
                    f"{statistic}, nats, {len(values)} controls",
                    gain,
                    gain.above(0),
                )
            )
    return found


def equality(effects: Effects) -> list[Verdict]:
    """Do hooks and weight edit give the same logits?"""
    difference = effects.hook_minus_edit
    if math.isnan(difference):
        return []
    return [
        Verdict(
            claim="Ablating by hooks and in the weights is the same.",
            statistic="largest difference of a logit, where the ablation itself changes logits by "
            f"up to {effects.ablation_changes:.3g}:",
            value=difference,
            low=None,
            high=None,
            holds=difference < EQUAL,
        )
    ]


def _verdict(claim: str, statistic: str, value: Estimate, holds: bool) -> Verdict:
    return Verdict(
        claim=claim, statistic=statistic, value=value.value, low=value.low, high=value.high,
        holds=holds,
    )  # fmt: skip


# -------------------------------------------------------------------------------------- tables


def effect_estimates(effects: Effects) -> dict[str, Estimate]:
    """Changes of the score by what was done, with intervals over prompts (and directions)."""
    down, up = effects.plain_positive, effects.plain_negative
    return {
        "ablated: the direction": paired_difference(effects.ablated, down),
        "ablated: random directions": crossed_interval(effects.random_ablated - down[None]),
        "ablated: shuffled labels": crossed_interval(effects.shuffled_ablated - down[None]),
        "added: the direction": paired_difference(effects.added, up),
        "added: random directions": crossed_interval(effects.random_added - up[None]),
        "added: shuffled labels": crossed_interval(effects.shuffled_added - up[None]),
    }


def tables(measured: Measured) -> dict[str, pd.DataFrame]:
    """The tables by name."""
    found: dict[str, pd.DataFrame] = {}
    if measured.chosen is not None:
        found["selection"] = selection_table(measured.chosen)
        found["change_of_the_score"] = pd.DataFrame(
            [
                {"what": name, "change (nats)": e.value, "low": e.low, "high": e.high}
                for name, e in effect_estimates(measured.chosen.effects).items()
            ]
        )
        found["target_tokens"] = pd.DataFrame(
            [
                {
                    "token": repr(target.text),
                    f"probability, {measured.contrast.positive}": target.positive,
                    f"probability, {measured.contrast.negative}": target.negative,
                }
                for target in measured.chosen.targets
            ]
        )
    found["separation_by_layer"] = auroc_table(measured)
    return found


def selection_table(chosen: Chosen) -> pd.DataFrame:
    """Every candidate with its numbers and what it misses, the best first."""
    rows = []
    for number, (c, misses) in enumerate(
        zip(chosen.candidates, chosen.selection.misses, strict=True)
    ):
        rows.append(
            {
                "site": str(c.site),
                "position": c.position,
                "length": c.norm,
                "score, ablated": c.ablated,
                "score, added": c.added,
                "KL": c.kl,
                "misses": ", ".join(MISSED[m] for m in misses) or "nothing",
                "chosen": "chosen" if number == chosen.selection.chosen else "",
            }
        )
    table = pd.DataFrame(rows)
    order = np.lexsort(
        (table["score, ablated"].to_numpy(), np.array([len(m) for m in chosen.selection.misses]))
    )
    return table.iloc[order].reset_index(drop=True)


def auroc_table(measured: Measured) -> pd.DataFrame:
    """AUROC at the chosen position, layer by layer, beside the controls."""
    trained, twin = auroc_by_place(measured.trained), auroc_by_place(measured.twin)
    p = measured.place[1]
    return pd.DataFrame(
        [
            {
                "site": str(site),
                "AUROC": trained.own[s, p],
                "low": trained.low[s, p],
                "high": trained.high[s, p],
                "random directions": trained.random[s, p].mean(),
                "shuffled labels": trained.shuffled[s, p].mean(),
                "random-weight twin": twin.own[s, p],
            }
            for s, site in enumerate(measured.sites)
        ]
    )


def numbers(measured: Measured) -> dict[str, object]:
    """Key figures for metrics.json."""
    places = auroc_by_place(measured.trained)
    found: dict[str, object] = {
        "site": str(measured.site),
        "position": measured.position,
        "auroc": float(places.own[measured.place]),
        "length": measured.norm,
    }
    if measured.chosen is not None:
        e = measured.chosen.effects
        gap = float(e.plain_positive.mean() - e.plain_negative.mean())
        found |= {
            "passed": measured.chosen.selection.passed,
            "score_gap": gap,
            "gap_closed_by_ablation": float(np.mean(e.plain_positive - e.ablated)) / gap,
            "gap_closed_by_addition": float(np.mean(e.added - e.plain_negative)) / gap,
        }
    return found


# --------------------------------------------------------------------------------------- words


def text(measured: Measured) -> str:
    """What was done and how to read it."""
    parts = [_prompts(measured), _separation(measured)]
    parts.append(_no_effects() if measured.chosen is None else _effects(measured, measured.chosen))
    parts.append(_file(measured))
    return "\n\n".join(parts)


def _prompts(measured: Measured) -> str:
    c = measured.contrast
    sizes = [len(split.positive) for split in (c.train, c.validation, c.test)]
    others = [len(split.negative) for split in (c.train, c.validation, c.test)]
    counted = ", ".join(
        f"{a} and {b} for {purpose}"
        for a, b, purpose in zip(sizes, others, ("training", "validation", "the test"), strict=True)
    )
    own = "The prompts are from two files and not shown here."
    if c.builtin:
        own = (
            f'The prompts are the built-in ones, such as "{c.train.positive[0]}" against '
            f'"{c.train.negative[0]}"; training, validation and test have sentences and topics of '
            "their own. They come from few sentences, so intervals over prompts are narrower than "
            "intervals over all ways to say such things would be."
        )
    ending = "".join(repr(t)[1:-1] for t in measured.position_texts[::-1])
    chat = (
        f"They are written through the chat template, whose tokens after the instruction are "
        f"`{ending}` (positions {-len(measured.position_texts)} to -1)."
        if ending
        else "They are plain text, read at the last token."
    )
    return (
        f"Prompts: {c.positive} (positive) and {c.negative} (negative), {counted}. {own} {chat} "
        f"A direction is the difference of the two sets' mean activations at a layer and position "
        f"({measured.config.site}); the place was chosen on validation prompts, and everything "
        "below is measured on test prompts."
    )


def _separation(measured: Measured) -> str:
    q, r = measured.trained.random.shape[-1], measured.trained.shuffled.shape[-1]
    return (
        "AUROC is the share of the pairs of a positive and a negative test prompt in which the "
        "positive one projects further onto the direction; intervals are bootstraps over prompts, "
        "and shrink to a point where all pairs are right. Controls: the same with the labels of "
        f"training and test prompts shuffled ({r} times); {q} random directions, each turned so "
        "that positive training prompts are higher, which is all the fitting they get; and the "
        "same model with random weights. In the figure the bands of random directions and of "
        "shuffled labels hold 95 % of them. A contrast that is visible in the words themselves "
        "separates at random directions and in the twin too: then a high AUROC says little about "
        "what the model has learnt."
    )


def _no_effects() -> str:
    return (
        "No target tokens were given, so only representations were measured: nothing was ablated "
        "or added, and the place is the one of the largest AUROC on validation prompts. Nothing "
        "was generated."
    )


def _effects(measured: Measured, chosen: Chosen) -> str:
    e, selection = chosen.effects, chosen.selection
    asked = measured.config.target_tokens is not None
    which = "given" if asked else "those that positive training prompts raise most"
    outcome = (
        f"Of {len(chosen.candidates)} candidates {sum(not m for m in selection.misses)} meet all "
        f"criteria (of those that do not: {_filtered(chosen)}). By the published threshold for "
        f"addition, 0, it would be {chosen.published}."
    )
    if not selection.passed:
        missed = " and ".join(MISSED[m] for m in selection.misses[selection.chosen])
        outcome += (
            f" **No candidate passes**: what follows is of the best of the rest ({missed}), and "
            "the method's own answer is that none of these candidates is such a direction."
        )
    threshold = (
        "half way between the untouched model's scores of the two sets, as this model gives the "
        "target tokens little probability"
        if measured.config.added is None
        else "as asked"
    )
    edit = (
        " This model normalises what its blocks write, so it was ablated by hooks alone."
        if math.isnan(e.hook_minus_edit)
        else ""
    )
    return (
        f"Score: log p(T) - log(1 - p(T)) of the next token, nats, T the {len(chosen.targets)} "
        f"target tokens ({which}). Untouched test prompts score {e.plain_positive.mean():.2f} "
        f"(positive) and {e.plain_negative.mean():.2f} (negative). A candidate is ablated at every "
        "block's input, attention output and MLP output, and added once at its site, at all "
        "positions; chosen is the lowest score of positive prompts under ablation with KL at most "
        f"{chosen.criteria.kl:g} on negative prompts and their score under addition at least "
        f"{chosen.criteria.added:.2f} ({threshold}), in the first {measured.config.depth:.0%} of "
        f"the layers (Arditi et al. 2024). {outcome}\n\n"
        f"Effects are compared on test prompts with {len(e.random_ablated)} random directions of "
        f"the same length and {len(e.shuffled_ablated)} differences of means of shuffled labels at "
        "the same place, scaled to it: these lie where activations vary, and are the harder "
        "control. Intervals resample prompts and directions together. The effect is on the next "
        f"token alone; nothing was generated.{edit} The paper's claim about refusal is not tested "
        "here: that takes a model that refuses, and SmolLM2-135M-Instruct hardly does."
    )


def _filtered(chosen: Chosen) -> str:
    counts = {m: sum(m in misses for misses in chosen.selection.misses) for m in MISSED}
    named = [f"{MISSED[m]}: {n}" for m, n in counts.items() if n]
    return "; ".join(named) if named else "nothing was filtered"


def _file(measured: Measured) -> str:
    mean, sd, largest = measured.statistics
    return (
        f"`direction.safetensors` in this folder is the direction of {measured.site}, position "
        f"{measured.position}: length {measured.norm:.4g}; reference text of the built-in corpus "
        f"projects onto it with mean {mean:.4g}, standard deviation {sd:.4g}, at most "
        f"{largest:.4g}. Recipes and `probe.directions.load_direction` read it."
    )
