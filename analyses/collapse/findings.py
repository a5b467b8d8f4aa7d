"""The verdicts of the collapse study: each claim with its statistic, and whether it shows.

Every claim is about the model that was measured. Distances, gradients and their ratios are compared
as ratios (geometric means), with intervals over phrasings, prompts or pairs of digits.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from analyses.cells import select
from analyses.collapse.features import FOLLOWS, MLP
from analyses.collapse.measured import Measured
from analyses.collapse.numbers import (
    LONG,
    PLAIN,
    SLOPE_FROM,
    SLOPE_TO,
    as_ratio,
    by_decade,
    counters_of,
    distances,
    early_over_late,
    floor_crossing,
    geometric,
    in_formats,
    last_telling,
    log_ratios,
    long_lengths,
    long_mean,
    margins_of,
    n_features,
    rank_correlations,
    remedy_margins,
    sensitivity,
    slopes,
    telling_units,
)
from analyses.collapse.parts import PHASE, TEXT
from analyses.collapse.paths import path_sums
from analyses.collapse.remedies import BASELINE, WINDOW_SINKS
from analyses.collapse.theory import (
    B4,
    alternating_distance,
    causal_uniform,
    delta,
    lemma_bound,
    path_count,
    residual_power,
)
from analyses.report import Verdict
from analyses.statistics import (
    mean_interval,
    paired_difference,
    proportion_interval,
)
from probe.attention import Visible

SHORT = 12
"""Up to here a sequence counts as short."""
DEPTHS, TOKENS = 2000, 50
"""Layers and tokens of the check of Proposition B.8."""
LEMMA_PAIRS = 1000
"""Random pairs that Lemma B.2 is checked on."""
PATH_TOKENS, PATH_LAYERS = 50, 12
"""Tokens and layers whose paths are counted."""
EXACT = 1e-6
NOTABLE = 0.5
"""Share of the pairs from which on a format is said to make them equal."""


def verdicts(measured: Measured) -> list[Verdict]:
    """What holds and what does not."""
    found: list[Verdict | None] = []
    parts = measured.config.parts
    for part, of in (
        ("theory", _theory), ("curves", _curves), ("precision", _precision), ("paths", _paths),
        ("behaviour", _behaviour), ("features", _features), ("remedies", _remedies),
    ):  # fmt: skip
        if part in parts:
            found += list(of(measured))
    return [verdict for verdict in found if verdict is not None]


# ------------------------------------------------------------------------------------- theory


def _theory(measured: Measured) -> Iterator[Verdict]:
    apart = max(abs(alternating_distance(n) - B4) for n in (2, 4, 10, 100, 1000, 10_000))
    yield Verdict(
        claim="Proposition B.4: softmaxes of (1, 0, 1, 0, ...) and (0, 1, 0, 1, ...) stay "
        "2 (e - 1) / (e + 1) = 0.924234 apart, at every even length.",
        statistic="largest deviation, n from 2 to 10,000", value=apart, low=None, high=None,
        holds=apart < EXACT,
    )  # fmt: skip
    ratio = largest_lemma_ratio()
    yield Verdict(
        claim="Lemma B.2: the distance of two softmaxes is at most twice the relative change of "
        "their exponentials.",
        statistic=f"largest distance over its bound, {LEMMA_PAIRS} random pairs of sequences",
        value=ratio, low=None, high=None, holds=ratio <= 1,
    )  # fmt: skip
    deviation = path_count_deviation()
    yield Verdict(
        claim="With every weight 1, paths from token i to token n number C(n - i + L - 1, L - 1).",
        statistic=f"largest relative deviation of the path sums, {PATH_TOKENS} tokens, "
        f"{PATH_LAYERS} layers",
        value=deviation, low=None, high=None, holds=deviation < EXACT,
    )  # fmt: skip
    row = residual_power(causal_uniform(TOKENS), DEPTHS)
    yield Verdict(
        claim="Proposition B.8: [(Lambda + I) / 2]^L takes everything to the first token.",
        statistic=f"weight that is elsewhere, {TOKENS} tokens, {DEPTHS} layers",
        value=float(1 - row[0]), low=None, high=None, holds=float(1 - row[0]) < EXACT,
    )  # fmt: skip
    for line in measured.synthetic:
        if line.name == "none":
            slopes_by_seed = by_decade(line.lengths[2:], np.log10(line.values[:, 2:].numpy()))
            estimate = mean_interval(slopes_by_seed)
            yield Verdict.of(
                "One attention layer without positions (figure 10): n and n + 1 tokens come "
                "together as 1 / n.",
                "slope of log distance over log n, 100 to 5,000; mean over seeds", estimate,
                below=-0.9,
            )  # fmt: skip


def largest_lemma_ratio() -> float:
    """How near random pairs of sequences come to Lemma B.2's bound."""
    ratios = []
    for seed in range(LEMMA_PAIRS):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2 + seed % 100, generator=generator, dtype=torch.float64)
        other = x + torch.randn(len(x), generator=generator, dtype=torch.float64) / 10
        ratios.append(float(delta(x.softmax(0), other.softmax(0))) / lemma_bound(x, other))
    return max(ratios)


def path_count_deviation() -> float:
    """How far path sums with every weight 1 are from the number of paths, relative to it."""
    ones = torch.ones(PATH_TOKENS, PATH_TOKENS, dtype=torch.float64).tril(-1)
    sums = path_sums(ones.expand(PATH_LAYERS, -1, -1))[0]
    counts = torch.tensor(
        [path_count(PATH_TOKENS, i, PATH_LAYERS) for i in range(1, PATH_TOKENS + 1)],
        dtype=torch.float64,
    )
    return float((sums / (counts / counts.sum()) - 1).abs().max())


# ------------------------------------------------------------------------------------- curves


def _curves(measured: Measured) -> Iterator[Verdict | None]:
    yield from _fall(measured)
    yield from _commas(measured)
    yield from _controls(measured)


def _fall(measured: Measured) -> Iterator[Verdict | None]:
    span = f"n from {SLOPE_FROM} to {min(SLOPE_TO, measured.settings.longest)}"
    ones, digits = (distances(measured, name) for name in ("ones", "digits"))
    if len(ones):
        yield Verdict.of(
            "Collapse: the last tokens of n and n + 1 ones come together as n grows.",
            f"slope of log distance over log n, {span}", mean_interval(slopes(ones)), below=0,
        )  # fmt: skip
        longest = max(ones.columns)
        if longest > SLOPE_TO:
            later = ones[longest] / ones[[n for n in ones.columns if 400 < n <= SLOPE_TO]].mean(1)
            yield Verdict.of(
                f"Collapse goes on to n = {longest:,}.",
                f"distance there over the mean of n from 400 to {SLOPE_TO:,}", geometric(later),
                below=1,
            )  # fmt: skip
    if len(ones) and len(digits):
        yield Verdict.of(
            "Random digits ending in 1 against 11 collapse less than ones.",
            f"slope of the digits less that of the ones, {span}",
            paired_difference(slopes(digits), slopes(ones)), above=0,
        )  # fmt: skip
        yield Verdict.of(
            "In long sequences the random digits' distance is an order of magnitude larger.",
            f"distance of digits over that of ones, n of {LONG} or more",
            as_ratio(mean_interval(log_ratios(digits, ones))), above=10,
        )  # fmt: skip
    twin = distances(measured, "ones", {"weights": "twin"})
    if len(ones) and len(twin):
        yield Verdict.of(
            "Collapse is learned: with random weights the distance of ones falls less steeply.",
            "slope of the random-weight twin less that of the trained model",
            paired_difference(slopes(twin), slopes(ones)), above=0,
        )  # fmt: skip


def _commas(measured: Measured) -> Iterator[Verdict | None]:
    commas, copying = (distances(measured, name) for name in ("commas", "copying"))
    if len(commas) and len(copying):
        yield Verdict.of(
            "Commas help: with a comma every third digit n and n + 1 stay apart.",
            f"distance with commas over that without, n of {LONG} or more",
            as_ratio(mean_interval(log_ratios(commas, copying))), above=1,
        )  # fmt: skip
    same = {"more": PHASE}
    commas, ones = (distances(measured, name, same) for name in ("commas", "ones"))
    if len(commas) and len(ones):
        yield Verdict.of(
            f"Commas help at the same phase of a group too (n against n + {PHASE}).",
            f"distance with commas over that of ones without, n of {LONG} or more",
            as_ratio(mean_interval(log_ratios(commas, ones))), above=1,
        )  # fmt: skip


def _controls(measured: Measured) -> Iterator[Verdict | None]:
    ones = distances(measured, "ones")
    windows = [
        (name, f"With attention in a {name}, n and n + 1 stay apart.")
        for name in window_names(measured)
    ]
    conditions = [
        ({"form": "shuffled"}, "What collapses is the repetition and not the question: with its "
         "tokens shuffled the distance is within a factor of two.", "factor"),
        ({"attention": "first token hidden"}, "Without the first token, the attention sink, n and "
         "n + 1 stay apart.", "above"),
        ({"form": "chat"}, "Behind a chat template, where the theorem does not speak, n and n + 1 "
         "stay apart.", "above"),
        *(({"attention": attention}, claim, "above") for attention, claim in windows),
    ]  # fmt: skip
    for wanted, claim, how in conditions:
        other = distances(measured, "ones", PLAIN | wanted)
        if not len(ones) or not len(other):
            continue
        ratio = as_ratio(mean_interval(log_ratios(other, ones)))
        statistic = f"distance over that of the plain prompt, n of {LONG} or more"
        if how == "above":
            yield Verdict.of(claim, statistic, ratio, above=1)
        else:
            yield Verdict(
                claim=claim, statistic=statistic, value=ratio.value, low=ratio.low,
                high=ratio.high, holds=ratio.above(0.5) and ratio.below(2),
            )  # fmt: skip


# ---------------------------------------------------------------------------------- precision


def _precision(measured: Measured) -> Iterator[Verdict | None]:
    rows = in_formats(measured, "ones")
    if not len(rows):
        return
    for format in measured.settings.formats:
        if format in ("float64", "float32"):
            continue
        here = select(rows, {"format": format})
        long = here[here["n"].isin(long_lengths(here["n"]))]
        equal = long.groupby("unit")["same_hidden"].mean().to_numpy().astype(float)
        coordinates = long["equal_coordinates"].mean()
        top = long["same_top"].mean()
        yield Verdict.of(
            f"In {format}, n and n + 1 ones become equal.",
            f"share of the pairs, n of {LONG} or more, whose last hidden state is equal bit for "
            f"bit ({100 * coordinates:.2g} % of its coordinates are, and the likeliest next token "
            f"in {100 * top:.3g} % of the pairs)",
            mean_interval(equal), above=NOTABLE,
        )  # fmt: skip
        yield _floor(measured, format)


def _floor(measured: Measured, format: str) -> Verdict:
    rows = in_formats(measured, "ones")
    longest = int(rows["n"].max())
    at = rows[rows["n"] > longest / 2]
    exact = select(at, {"format": "float64"}).groupby("unit")["distance"].mean()
    floor = select(at, {"format": format}).groupby("unit")["floor"].mean()
    crossing = floor_crossing(measured, "ones", format)
    words = "at no length" if crossing is None else f"from n = {crossing:,} on"
    return Verdict.of(
        f"In {format}, what tells n from n + 1 ones is lost in rounding.",
        f"exact distance over the format's own error, n above {longest // 2:,} (below 1 {words})",
        geometric((exact / floor).to_numpy()), below=1,
    )  # fmt: skip


# -------------------------------------------------------------------------------------- paths


def _paths(measured: Measured) -> Iterator[Verdict | None]:
    for of, words in (("ones", "ones"), ("digits", "random digits"), (TEXT, "ordinary text")):
        rows = sensitivity(measured, of)
        if not len(rows):
            continue
        yield Verdict.of(
            f"Early tokens are the more sensitive ones ({words}).", EARLY,
            as_ratio(mean_interval(early_over_late(rows))), above=1,
        )  # fmt: skip
        yield from _predicted(rows, words)
    twin = sensitivity(measured, "ones", weights="twin")
    if len(twin):
        yield Verdict.of(
            "Early tokens are the more sensitive ones in the random-weight twin (ones).", EARLY,
            as_ratio(mean_interval(early_over_late(twin))), above=1,
        )  # fmt: skip
        yield Verdict.of(
            "Path sums as Proposition B.8 scales them predict which tokens are sensitive in the "
            "random-weight twin (ones).",
            "rank correlation with the gradient, over tokens",
            mean_interval(rank_correlations(twin, "beta 1", "gradient")), above=0,
        )  # fmt: skip


EARLY = (
    "gradient by the first quarter of the sequence over that by the last quarter, geometric means, "
    "the last token left out"
)


def _predicted(rows: Any, words: str) -> Iterator[Verdict]:
    for column, name in (
        ("beta 1", "as Proposition B.8 scales them, (Lambda + I) / 2,"),
        ("measured beta", "with each layer's own norm as the divisor"),
        ("beta 10", "with attention counted a tenth"),
    ):
        held = rank_correlations(rows, column, "frozen").mean()
        yield Verdict.of(
            f"Path sums {name} predict which tokens are sensitive ({words}).",
            "rank correlation with the gradient, over tokens (with attention weights held constant "
            f"{held:.2f})",
            mean_interval(rank_correlations(rows, column, "gradient")), above=0,
        )  # fmt: skip
    own, uniform = (rank_correlations(rows, name, "gradient") for name in ("beta 10", "uniform"))
    yield Verdict.of(
        f"The model's own attention predicts more than position alone ({words}).",
        "rank correlation of its path sums, attention counted a tenth, less that of uniform "
        "attention's",
        paired_difference(own, uniform), above=0,
    )  # fmt: skip


# ---------------------------------------------------------------------------------- behaviour


def _behaviour(measured: Measured) -> Iterator[Verdict | None]:
    last, first = (margins_of(measured, {"end": end}) for end in ("last", "first"))
    hinted = margins_of(measured, {"end": "last", "hint": True})
    if len(last) and len(first):
        lengths = f"sequences of {LONG} digits or more"
        yield Verdict.of(
            "The first digit is copied better than the last.",
            f"margin of the first less that of the last, nats, {lengths}",
            paired_difference(long_mean(first), long_mean(last)), above=0,
        )  # fmt: skip
        yield Verdict.of(
            "A hint helps to copy the last digit.", f"margin with the hint less without, {lengths}",
            paired_difference(long_mean(hinted), long_mean(last)), above=0,
        )  # fmt: skip
        yield Verdict.of(
            "The last digit's margin falls as the sequence grows.",
            f"nats for each factor of ten in length, from {min(last.columns)} to "
            f"{max(last.columns)} digits",
            mean_interval(by_decade(last.columns, last.to_numpy())), below=0,
        )  # fmt: skip
    counting = measured.table("counting")
    if len(counting):
        yield Verdict.of(
            "The true count is favoured over the next one.",
            "margin, nats, over lengths and four sorts of counting",
            mean_interval(counting["margin"].to_numpy()), above=0,
        )  # fmt: skip


# ----------------------------------------------------------------------------------- features


def _features(measured: Measured) -> Iterator[Verdict | None]:
    saes = {*measured.table("telling").get("source", ())} - {MLP}
    for words, of_saes in ((MLP, False), (f"features of {len(saes)} SAEs", True)):
        told = telling_units(measured, "ones", of_saes=of_saes)
        if not len(told):
            continue
        short = told[[n for n in told.columns if n <= SHORT]].mean(axis=1).to_numpy()
        long = long_mean(told)
        yield Verdict.of(
            f"Fewer features tell n from n + 1 ones as n grows ({words}).",
            f"number that tell at n of {LONG} or more (mean {long.mean():,.0f}) less that at n of "
            f"{SHORT} or less ({short.mean():,.0f})",
            paired_difference(long, short), below=0,
        )  # fmt: skip
    yield _dies(measured)
    yield _counts(measured)


def _dies(measured: Measured) -> Verdict | None:
    """Is there a layer where no feature tells any more at the longest length?"""
    last = select(last_telling(measured, "ones"), {"source": MLP})
    if not len(last):
        return None
    dead = last[last["n"] < measured.settings.longest]
    named = ", ".join(
        f"layer {layer} after n = {n:,}" for layer, n in zip(dead["layer"], dead["n"], strict=True)
    )
    return Verdict(
        claim="There is a layer at which the last MLP unit that tells n from n + 1 ones dies "
        f"before n = {measured.settings.longest:,}.",
        statistic=f"layers where none tells at that length in most phrasings ({named or 'none'})",
        value=float(len(dead)), low=None, high=None, holds=bool(len(dead)),
    )  # fmt: skip


def _counts(measured: Measured) -> Verdict | None:
    counted = counters_of(measured, FOLLOWS)
    if not len(counted) or not counted["ones"].sum():
        return None
    total = counted[["ones", "words", "digits", "count", "all_words"]].sum()
    twin = counters_of(measured, FOLLOWS, "twin")
    in_twin = int(twin["count"].sum()) if len(twin) else 0
    share = proportion_interval(int(total["count"]), int(total["ones"]))
    base = total["all_words"] / 2 / n_features(measured)
    return Verdict.of(
        "Features that follow n in ones keep a count: they follow it in words the same way, and "
        "not the position in random digits, more often than others follow n in words.",
        f"share of the {int(total['ones']):,} that follow n in ones ({int(total['count'])} do; "
        f"{int(total['digits'])} follow the position too; of any feature {100 * base:.2g} % follow "
        f"n in words in a given direction; {in_twin} do both in the random-weight twin)",
        share, above=float(base),
    )  # fmt: skip


# ----------------------------------------------------------------------------------- remedies


def _remedies(measured: Measured) -> Iterator[Verdict | None]:
    plain = remedy_margins(measured, BASELINE)
    if not len(plain):
        return
    for remedy, claim in remedy_claims(measured):
        found = remedy_margins(measured, remedy)
        if len(found):
            yield Verdict.of(
                claim, "last digit's margin less that without the remedy, nats",
                paired_difference(found.mean(axis=1).to_numpy(), plain.mean(axis=1).to_numpy()),
                above=0,
            )  # fmt: skip
    yield from _clamped(measured)


def remedy_claims(measured: Measured) -> list[tuple[str, str]]:
    """Remedies that are compared with doing nothing."""
    return [
        ("hint", "Remedy: a hint raises the last digit's margin."),
        ("commas", "Remedy: commas raise the last digit's margin."),
        *((name, f"Remedy: with attention in a {name} the last digit's margin rises.")
          for name in window_names(measured)),
    ]  # fmt: skip


def window_names(measured: Measured) -> list[str]:
    """The windows of attention, by name."""
    return [
        Visible(window=window, sink=sink).name
        for window in measured.settings.windows
        for sink in WINDOW_SINKS
    ]


def _clamped(measured: Measured) -> Iterator[Verdict]:
    lengths = measured.settings.clamp_lengths
    plain = remedy_margins(measured, BASELINE, lengths)
    clamped = remedy_margins(measured, "separator feature", lengths)
    if not len(clamped):
        return
    own = clamped.mean(axis=1).to_numpy()
    yield Verdict.of(
        "Remedy: setting the separator feature behind every third digit raises the last digit's "
        "margin.",
        "margin less that without, nats", paired_difference(own, plain.mean(axis=1).to_numpy()),
        above=0,
    )  # fmt: skip
    for control in ("random direction", "random feature"):
        others = remedy_margins(measured, control, lengths).mean(axis=1).to_numpy()
        yield Verdict.of(
            f"The separator feature does more than a {control} of the same size.",
            "difference of margins, nats", paired_difference(own, others), above=0,
        )  # fmt: skip


# ------------------------------------------------------------------------------------ numbers


def numbers(measured: Measured) -> dict[str, float]:
    """Key figures: final distances of every family at the paper's lengths."""
    found = {}
    for family in measured.config.families:
        table = distances(measured, family)
        for n in (11, 101, 501, 1001, 2001):
            if len(table) and n in table.columns:
                found[f"{family}/{n}"] = geometric(table[n].to_numpy()).value
    return found
