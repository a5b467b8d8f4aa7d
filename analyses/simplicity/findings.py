"""The verdicts of the simplicity-bias study: each claim with its statistic, and whether it shows.

Claims are those of Neural Redshift (Teney et al. 2024), of Valle-Perez et al. 2018 and of Mingard
et al. 2019, asked of the networks that were drawn. Differences of complexity are base-2 logarithms
of ratios.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from analyses.report import Verdict
from analyses.simplicity.measured import Measured
from analyses.simplicity.networks import ACTIVATIONS, PRIORS
from analyses.simplicity.numbers import (
    GENTLE,
    MEASURES,
    RISING,
    agreement,
    at_best,
    best_prefactors,
    cell_means,
    component_change,
    corners,
    crossed_frame,
    estimate,
    fit_prediction,
    functions,
    kept_order,
    law_ratio,
    paired,
    rise,
    slopes,
    spread,
    written,
)
from analyses.simplicity.sequences import RANDOM
from analyses.statistics import Estimate, mean_interval, welch_difference
from saes.feature_reference import TELLING, Told

SAME = 0.14
"""log2 of a ratio within which two complexities count as the same: 10 %."""
FLAT_SLOPE = 0.1
"""log2 of complexity over log2 of weight scale, below which scale does nothing."""
SMOOTH = 4.0
"""Cycles below which functions are smooth hills."""
AGREE = 0.8
"""Rank correlation from which on two measures agree."""
RATIO = "log2 of the ratio of Fourier complexities"


def verdicts(measured: Measured) -> list[Verdict]:
    """What holds and what does not."""
    found: list[Verdict | None] = []
    for part, of in (
        ("maps", _maps), ("maps", _measures), ("components", _components), ("laws", _laws),
        ("boolean", _boolean), ("perceptron", _perceptron), ("modulo", _modulo),
        ("shortcut", _shortcut), ("sequences", _sequences), ("twins", _twins),
    ):  # fmt: skip
        if part in measured.config.parts:
            found += list(of(measured))
    return [verdict for verdict in found if verdict is not None]


def _verdict(
    claim: str, statistic: str, found: Estimate | None, *, above: float | int | None = None,
    below: float | int | None = None, within: float | int | None = None,
) -> Verdict | None:  # fmt: skip
    """`Verdict.of`, or that an interval lies within +- a bound; None where nothing was measured."""
    if found is None or not np.isfinite(found.value):
        return None
    if within is None:
        return Verdict.of(claim, statistic, found, above=above, below=below)
    return Verdict(
        claim=claim, statistic=statistic, value=found.value, low=found.low, high=found.high,
        holds=found.above(-within) and found.below(within),
    )  # fmt: skip


# ------------------------------------------------------------------------------------- functions


def _maps(measured: Measured) -> Iterator[Verdict | None]:
    names = measured.config.activations
    (shallow, small), (deep, large) = corners(measured)
    way = f"from {shallow} layer(s) at scale {small:g} to {deep} at {large:g}"
    relu = rise(measured, "relu")
    for name in (n for n in RISING if n in names):
        yield _verdict(
            f"{name.capitalize()} networks grow complex with depth and weight scale.",
            f"{RATIO} {way}", estimate(rise(measured, name)), above=1.0,
        )  # fmt: skip
        if len(relu):
            yield _verdict(
                f"ReLU's complexity rises less than {name}'s.",
                f"difference of the two, ReLU's less {name}'s",
                paired(relu, rise(measured, name)), below=0.0,
            )  # fmt: skip
    yield _verdict(
        "ReLU's complexity does not rise at all.", f"{RATIO} {way}", estimate(relu), within=SAME
    )
    for name in (n for n in GENTLE if n in names):
        yield _verdict(
            f"{name.upper() if name != 'swish' else 'Swish'} rises less than tanh.",
            f"rise {way}, less tanh's", paired(rise(measured, name), rise(measured, "tanh")),
            below=0.0,
        )  # fmt: skip
    yield from _lowest(measured)
    found = {name: spread(measured, name) for name in ("relu", *RISING) if name in names}
    if "relu" in found and len(found) > 1:
        others = sum(found[name] for name in found if name != "relu") / (len(found) - 1)
        yield _verdict(
            "ReLU varies less from draw to draw than tanh, Gaussian and sine.",
            "standard deviation of log2 complexity over draws, ReLU's less the others' mean; mean "
            "over depths and scales", paired(found["relu"], others), below=0.0,
        )  # fmt: skip


def _lowest(measured: Measured) -> Iterator[Verdict | None]:
    """Whether ReLU is the least complex: at the smallest and at the largest scale."""
    names = [n for n in measured.config.activations if n not in ("relu", "fourier")]
    if "relu" not in measured.config.activations or not names:
        return
    for scale, word in ((min(measured.settings.scales), "smallest"),
                        (max(measured.settings.scales), "largest")):  # fmt: skip
        columns = {
            name: np.log2(cell_means(measured, name, "fourier")[scale]) for name in ("relu", *names)
        }
        simplest = np.minimum.reduce([columns[name] for name in names])
        yield _verdict(
            f"ReLU is the least complex of all at the {word} weight scale.",
            f"{RATIO}, ReLU's over the least of the others' at scale {scale:g}, over depths",
            estimate(columns["relu"] - simplest), below=0.0,
        )  # fmt: skip


def _measures(measured: Measured) -> Iterator[Verdict | None]:
    for name, title in list(MEASURES.items())[1:]:
        yield _verdict(
            f"Networks rank alike by Fourier complexity and by {title}.",
            "Spearman correlation over activations, depths and scales",
            agreement(measured, "fourier", name), above=AGREE,
        )  # fmt: skip
    for title, below in (
        ("", None),
        (f" where functions are smooth (below {SMOOTH:g} cycles)", SMOOTH),
    ):
        yield _verdict(
            "A plain Fourier transform, which takes the grid's edges for a step, would do as well"
            f"{title}.",
            "Spearman correlation with the cosine transform's",
            agreement(measured, "fourier", "plain_fourier", below=below), above=AGREE,
        )  # fmt: skip


def _components(measured: Measured) -> Iterator[Verdict | None]:
    for name in measured.settings.component_activations:
        normed, plain = (
            slopes(functions(measured, "components", activation=name, component=component))
            for component in ("layer norm", "plain")
        )
        yield _verdict(
            f"Layer norm takes the weight scale's effect away ({name}).",
            "slope of log2 complexity over log2 scale", estimate(normed), within=FLAT_SLOPE,
        )  # fmt: skip
        yield _verdict(
            f"Layer norm makes the weight scale's effect smaller ({name}).",
            "the same slope, less the plain network's", paired(normed, plain), below=0.0,
        )  # fmt: skip
        for component, word, way in (
            ("residual", "Residual connections lower complexity", {"below": 0.0}),
            ("gated", "Gates raise complexity", {"above": 0.0}),
        ):
            yield _verdict(
                f"{word} ({name}).", f"{RATIO} to the plain network's, deep and at scale 2 to 8",
                estimate(component_change(measured, component, name)),
                above=way.get("above"), below=way.get("below"),
            )  # fmt: skip


def _laws(measured: Measured) -> Iterator[Verdict | None]:
    settings = measured.settings
    table = measured.table("functions")
    if not len(table):
        return
    for name in ("relu", "tanh", "sine"):
        for word, column, values in (
            ("width", "width", settings.widths), ("size of the biases", "bias_scale",
                                                  settings.bias_scales),
        ):  # fmt: skip
            yield _verdict(
                f"The {word} does nothing ({name}).",
                f"{RATIO}, {values[-1]:g} over {values[0]:g}; 10 % is {SAME}",
                law_ratio(measured, name, column, values[-1], values[0]), within=SAME,
            )  # fmt: skip
        for prior in PRIORS[1:]:
            yield _verdict(
                f"The law of the weights does nothing ({name}, {prior}).",
                f"{RATIO}, over uniform weights'",
                law_ratio(measured, name, "prior", prior, "uniform"), within=SAME,
            )  # fmt: skip


# --------------------------------------------------------------------------------------- Boolean


def _boolean(measured: Measured) -> Iterator[Verdict | None]:
    table = measured.table("boolean_fits")
    if not len(table):
        return
    yield _verdict(
        "The most probable function of a complexity is the less probable the more complex it is.",
        "a of the bound 2^(-a C - b) on the probability, batches of networks",
        estimate(table["bound"]), above=0.0,
    )  # fmt: skip
    yield _verdict(
        "Probabilities by rank follow Zipf's law.",
        "slope of log probability over log rank, less -1; functions that a batch has ten times or "
        "more; 0.1 counts as the same",
        estimate(table["zipf"] + 1), within=0.1,
    )  # fmt: skip
    yield _verdict(
        "Half of all networks or more are constant.", "share of the two constants",
        estimate(table["constant"]), above=0.5,
    )  # fmt: skip


def _perceptron(measured: Measured) -> Iterator[Verdict | None]:
    table = measured.table("signs")
    if not len(table):
        return
    bijective = (table["different"] == table["signs"]) & (table["least"] == 0)
    bijective &= table["most"] == table["signs"] - 1
    for claim, column in (
        ("Every choice of signs gives a perceptron another number of points mapped to 1, from 0 to "
         "2^n - 1.", bijective),
        ("On centred inputs half of the points are mapped to 1, whatever the weights.",
         table["centred_half"]),
    ):  # fmt: skip
        yield Verdict(
            claim=claim, statistic=f"share of n = {table['inputs'].min()} to "
            f"{table['inputs'].max()} for which it is so, exactly", value=float(column.mean()),
            low=None, high=None, holds=bool(column.all()),
        )  # fmt: skip


# ----------------------------------------------------------------------------------------- tasks


def _modulo(measured: Measured) -> Iterator[Verdict | None]:
    table = measured.table("modulo")
    if not len(table):
        return
    for modulus in measured.settings.moduli:
        rows = table[table["modulus"] == modulus]
        target = float(rows["target"].iloc[0])
        yield _verdict(
            f"Networks generalise best where their complexity before training is the task's, M = "
            f"{modulus}.",
            "rank correlation of the distance of the two complexities with balanced test accuracy, "
            "over activations and prefactors", _mean(fit_prediction(rows, target)), below=0.0,
        )  # fmt: skip
        yield _verdict(
            f"Complexity before training decides that of what is learnt, M = {modulus}.",
            "rank correlation of complexity before and after, over activations and prefactors",
            _mean(kept_order(rows)), above=0.0,
        )  # fmt: skip
        if "relu" in set(rows["activation"]):
            best = at_best(rows[rows["activation"] == "relu"], "test")["relu"]
            yield _verdict(
                f"ReLU networks solve the task, M = {modulus}.",
                "balanced test accuracy at the best prefactor of the other seeds",
                estimate(best, share=True), above=0.9,
            )  # fmt: skip
    easy, hard = measured.settings.moduli[0], measured.settings.moduli[-1]
    places = [best_prefactors(table[table["modulus"] == m]) for m in (hard, easy)]
    yield _verdict(
        "The more complex the task, the larger the best prefactor.",
        f"log2 of the best prefactor, M = {hard} less M = {easy}, activations and seeds",
        crossed_frame(places[0] - places[1]), above=0.0,
    )  # fmt: skip


def _shortcut(measured: Measured) -> Iterator[Verdict | None]:
    table = measured.table("shortcut")
    if not len(table):
        return
    least, most = min(measured.settings.prefactors), max(measured.settings.prefactors)
    wide = {
        column: table.pivot_table(index="seed", columns=["prefactor", "activation"], values=column)
        for column in ("digit", "colour")
    }
    yield _verdict(
        "At a small prefactor the simple cue, the colour, is what is learnt.",
        f"share of the predictions' variance that is the colour's less the digit's, prefactor "
        f"{least:g}", crossed_frame((wide["colour"] - wide["digit"])[least]), above=0.0,
    )  # fmt: skip
    best = at_best(table, "digit")
    for place, word in ((least, "the smallest"), (most, "the largest")):
        yield _verdict(
            f"The digit counts most at a prefactor between; more than at {word}.",
            f"the digit's share at the best prefactor of the other seeds, less that at {place:g}",
            crossed_frame(best - wide["digit"][place][list(best.columns)]), above=0.0,
        )  # fmt: skip


def _mean(values: np.ndarray) -> Estimate | None:
    known = values[~np.isnan(values)]
    return mean_interval(known) if len(known) else None


# -------------------------------------------------------------------------------------- sequences


def _sequences(measured: Measured) -> Iterator[Verdict | None]:
    depths = measured.settings.transformer_depths
    kind: dict[str, Any] = {"depth": depths[-1], "norm_scale": 1.0}
    gelu = written(measured, activation="gelu", **kind)
    if not len(gelu):
        return
    yield _difference(
        "Untrained transformers write more simply than at random.",
        "phrases of LZ-78, GPT-2's less random tokens'", gelu, written(measured, model=RANDOM),
        above=None,
    )  # fmt: skip
    for name in ("relu", "selu", "tanh", "sine", "gaussian"):
        low = name == "relu"
        yield _difference(
            f"With {name} they write {'more simply' if low else 'less simply'} than with GELU.",
            "phrases of LZ-78, less GELU's", written(measured, activation=name, **kind), gelu,
            above=None if low else 0.0,
        )  # fmt: skip
    for name in ("relu", "tanh", "sine"):
        ends = [written(measured, activation=name, depth=d, norm_scale=1.0)
                for d in (depths[-1], depths[0])]  # fmt: skip
        yield _difference(
            f"Depth makes sequences more complex ({name}).",
            f"phrases of LZ-78, {depths[-1]} blocks less {depths[0]}", *ends, above=0.0,
        )  # fmt: skip
        scales = measured.settings.norm_scales
        ends = [written(measured, activation=name, depth=depths[-1], norm_scale=float(s))
                for s in (scales[-1], scales[0])]  # fmt: skip
        yield _difference(
            f"Larger gains of the norms make sequences more complex ({name}).",
            f"phrases of LZ-78, gains x {scales[-1]:g} less x {scales[0]:g}", *ends, above=0.0,
        )  # fmt: skip


def _difference(
    claim: str, statistic: str, a: np.ndarray, b: np.ndarray, above: float | None
) -> Verdict | None:
    if min(len(a), len(b)) < 2:
        return None
    found = welch_difference(a, b)
    return _verdict(claim, statistic, found, above=above, below=None if above is not None else 0.0)


# ------------------------------------------------------------------------------------------ twins


def _twins(measured: Measured) -> Iterator[Verdict | None]:
    for row in measured.table("scores").to_dict("records"):
        found = Estimate(value=row["difference"], low=row["low"], high=row["high"], n=row["n"])
        yield _verdict(
            f"The score tells a trained model's SAE from the twin's: {row['score']}.",
            f"trained {row['trained']:.3f} less twin {row['twin']:.3f}", found, above=0.0,
        )  # fmt: skip
    for row in measured.table("headlines").to_dict("records"):
        told = Told(**{name: row[name] for name in ("auroc", "low", "high", "n")})
        yield Verdict(
            claim=f"A feature's {row['number'].replace('_', ' ')} tells a trained model's feature "
            "from the twin's.",
            statistic=f"AUROC, which has to be beyond .5 +- {TELLING}", value=told.auroc,
            low=told.low, high=told.high, holds=bool(told.tells),
        )  # fmt: skip
    yield from _lines(measured)


def _lines(measured: Measured) -> Iterator[Verdict | None]:
    table = measured.table("lines")
    if not len(table):
        return
    wide = table.pivot_table(index="line", columns=["weights", "read"], values="variation")
    for read, word in (("feature", "Features"), ("random", "Random directions")):
        yield _verdict(
            f"{word} of the trained model vary more along lines between texts than the twin's.",
            "total variation in standard deviations, trained less twin",
            paired(wide["trained"][read], wide["twin"][read]), above=0.0,
        )  # fmt: skip
    yield _verdict(
        "Features vary more than random directions do, more so in the trained model.",
        "difference of feature and random direction, trained less twin",
        paired(wide["trained"]["feature"] - wide["trained"]["random"],
               wide["twin"]["feature"] - wide["twin"]["random"]), above=0.0,
    )  # fmt: skip


# ------------------------------------------------------------------------------------ key figures


def numbers(measured: Measured) -> dict[str, Any]:
    """The few numbers worth listing."""
    found: dict[str, Any] = {}
    for name in (n for n in ACTIVATIONS if n in measured.config.activations):
        made = estimate(rise(measured, name))
        if made is not None:
            found[f"rise_{name}"] = made.value
    for name, column in (("bound_a", "bound"), ("zipf_slope", "zipf")):
        table = measured.table("boolean_fits")
        made = estimate(table[column]) if len(table) else None
        if made is not None:
            found[name] = made.value
    return found
