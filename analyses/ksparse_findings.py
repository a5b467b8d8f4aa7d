"""What the k-sparse study concludes: verdicts, tables and words."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float64

from analyses import support_recovery
from analyses.ksparse_cells import COMPONENTS, CellResult, Method
from analyses.ksparse_measured import (
    HUNDRED,
    LABELS,
    Measured,
    at_setting,
    best_wrong,
    dead_units,
    difference,
    error,
    fact,
    is_annealed,
    wrong,
)
from analyses.report import Verdict
from analyses.statistics import Estimate, crossed_interval, mean_interval, proportion_interval


def verdicts(measured: Measured) -> list[Verdict]:
    """The claims of the paper, and whether they show."""
    return [
        *u_shape(measured),
        *(beats(measured, method) for method in ("pixels", "pca", "denoising", "untrained")),
        *annealing(measured),
        *larger_alpha(measured),
        theorem(measured),
    ]


def make_verdict(claim: str, statistic: str, value: Estimate, holds: bool) -> Verdict:
    """A verdict on an estimate."""
    return Verdict(
        claim=claim, statistic=statistic, value=value.value, low=value.low, high=value.high,
        holds=holds,
    )  # fmt: skip


def u_shape(measured: Measured) -> list[Verdict]:
    """Is the best k between the ends of the sweep better than both ends?"""
    ks, n_test = measured.config.ks, measured.n[2]
    if len(ks) < 3:
        return []
    best = measured.best_of(ks[1:-1])
    at_best = best_wrong(measured.sweep(best), n_test)
    above = {k: difference(best_wrong(measured.sweep(k), n_test), at_best) for k in (ks[0], ks[-1])}
    lesser = min(above, key=lambda k: above[k].value)
    return [
        make_verdict(
            "The probe does best at an intermediate k, worse at either end of the sweep.",
            f"error at k = {lesser}, the better end, minus error at k = {best}, which validation "
            "prefers of those between, in percentage points",
            above[lesser],
            all(estimate.above(0) for estimate in above.values()),
        )
    ]


def beats(measured: Measured, rival: Method) -> Verdict:
    """Is the k-sparse autoencoder's error below a rival's?"""
    n_test = measured.n[2]
    gain = difference(
        best_wrong(measured.rival(rival), n_test), best_wrong(measured.rival("k_sparse"), n_test)
    )
    return make_verdict(
        f"A linear probe errs less on k-sparse codes than on {RIVALS[rival]}.",
        f"error of the rival minus error at k = {measured.best_k}, in percentage points",
        gain,
        gain.above(0),
    )


RIVALS: dict[Method, str] = {
    "pixels": "raw pixels",
    "pca": "principal components",
    "denoising": "the hidden units of a denoising autoencoder of the same budget",
    "untrained": "the codes of an untrained dictionary of as many units",
}


def annealing(measured: Measured) -> list[Verdict]:
    """Are fewer units dead at small k where training starts with more active ones?"""
    pairs = [
        (measured.cells("k_sparse", k=k), measured.cells("k_sparse", k=k, annealed=True))
        for k in measured.config.small_ks
        if is_annealed(measured.config, k)
    ]
    if not pairs:
        return []
    saved = [
        [
            HUNDRED * (a.facts["dead_share"] - b.facts["dead_share"])
            for a, b in zip(*pair, strict=True)
        ]
        for pair in pairs
    ]
    estimate = mean_interval(np.array(saved).mean(0))
    small = ", ".join(map(str, measured.config.small_ks))
    return [
        make_verdict(
            "Starting with more active units leaves fewer units dead at small k.",
            f"share of dead units without annealing minus with it, mean over k = {small}, in "
            "percentage points over seeds",
            estimate,
            estimate.above(0),
        )
    ]


def larger_alpha(measured: Measured) -> list[Verdict]:
    """Does the probe err less on alpha k units than on k?"""
    gains = [alpha_gain(measured, k) for k in measured.config.ks]
    known = [gain for gain in gains if gain is not None]
    if not known:
        return []
    estimate = crossed_interval(np.mean(known, axis=0))
    return [
        make_verdict(
            "The probe errs less where more units are kept than in training (alpha > 1).",
            "error with alpha = 1 minus error with the larger alpha that validation prefers, mean "
            f"over {len(known)} values of k, in percentage points",
            estimate,
            estimate.above(0),
        )
    ]


def alpha_gain(measured: Measured, k: int) -> Float64[np.ndarray, "s n"] | None:
    """What each seed's choice of a larger alpha saves on each image; None without a larger one."""
    results, n_test = measured.sweep(k), measured.n[2]
    larger = [[v for v in result.variants if v.setting > 1] for result in results]
    if not all(larger):
        return None
    chosen = [min(some, key=lambda v: v.probe.validation_error) for some in larger]
    return wrong(at_setting(results, 1.0), n_test) - wrong(chosen, n_test)


def theorem(measured: Measured) -> Verdict:
    """Is every support found where the condition holds?"""
    missed, trials = measured.trials.errors(within=True)
    return make_verdict(
        "The encoder names the right units wherever the theorem's condition k mu <= z_k / (2 z_1) "
        "holds.",
        f"{missed} supports missed in {trials} trials within the condition, share",
        proportion_interval(missed, trials),
        missed == 0,
    )


def tables(measured: Measured) -> dict[str, pd.DataFrame]:
    """The numbers behind the figures."""
    return {
        "methods": methods_table(measured),
        "k_sweep": sweep_table(measured),
        "alpha": alpha_table(measured),
        "annealing": annealing_table(measured),
        "theorem": support_recovery.summary(measured.trials),
    }


def methods_table(measured: Measured) -> pd.DataFrame:
    """Probe errors of all methods."""
    rows = []
    for method, label in LABELS.items():
        results = measured.rival(method)
        estimate = error(results, measured.n[2])
        rows.append(
            {
                "method": label,
                "error (%)": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "seeds": len(results),
                "chosen": chosen(results),
            }
        )
    return pd.DataFrame(rows)


def chosen(results: Sequence[CellResult]) -> str:
    """What validation chose for a method's cells, in words."""
    settings = sorted({result.best.setting for result in results})
    values = " or ".join(f"{setting:g}" for setting in settings)
    words = {
        "pca": f"{values} components",
        "untrained": f"k {values}",
        "k_sparse": f"k {results[0].cell.k}, alpha {values}",
    }
    return words.get(results[0].cell.method, "-")


def sweep_table(measured: Measured) -> pd.DataFrame:
    """What changes with k."""
    rows = []
    for k in measured.config.ks:
        results = measured.sweep(k)
        plain = crossed_interval(wrong(at_setting(results, 1.0), measured.n[2]))
        best = error(results, measured.n[2])
        rows.append(
            {
                "k": k,
                "error, alpha 1 (%)": plain.value,
                "error (%)": best.value,
                "low": best.low,
                "high": best.high,
                "FVU": fact(results, "fvu").value,
                "dead units (%)": dead_units(results).value,
                "extent of filters (%)": HUNDRED * fact(results, "extent").value,
            }
        )
    return pd.DataFrame(rows)


def alpha_table(measured: Measured) -> pd.DataFrame:
    """Probe error in per cent by k and alpha."""
    rows = []
    for k in measured.config.ks:
        errors = {
            f"alpha {alpha:g}": alpha_error(measured, k, alpha) for alpha in measured.config.alphas
        }
        rows.append({"k": k} | {name: e and e.value for name, e in errors.items()})
    return pd.DataFrame(rows).astype({name: float for name in rows[0] if name != "k"})


def alpha_error(measured: Measured, k: int, alpha: float) -> Estimate | None:
    """Probe error in per cent with alpha k units kept; None where that is more than all units."""
    variants = at_setting(measured.sweep(k), alpha)
    return crossed_interval(wrong(variants, measured.n[2])) if variants else None


def annealing_table(measured: Measured) -> pd.DataFrame:
    """Dead units and probe errors with and without annealing."""
    rows = []
    for k in measured.config.small_ks:
        for annealed in (False, True):
            results = measured.cells("k_sparse", k=k, annealed=annealed)
            if results:
                dead = dead_units(results)
                rows.append(
                    {
                        "k": k,
                        "annealed": "yes" if annealed else "no",
                        "dead units (%)": dead.value,
                        "low": dead.low,
                        "high": dead.high,
                        "error (%)": error(results, measured.n[2]).value,
                        "FVU": fact(results, "fvu").value,
                    }
                )
    return pd.DataFrame(rows)


def numbers(measured: Measured) -> dict[str, float | int | str]:
    """Key figures."""
    errors = {
        f"error_{method}": error(measured.rival(method), measured.n[2]).value for method in LABELS
    }
    return {"images": measured.images, "n_test": measured.n[2], "best_k": measured.best_k} | errors


def text(measured: Measured) -> str:
    """What was done and how to read it."""
    config, (train, validation, test) = measured.config, measured.n
    components = ", ".join(map(str, COMPONENTS))
    paragraphs = (
        f"Images: {measured.images} ({measured.source}); {train} to learn from, {validation} to "
        f"choose on, {test} to test on. Every autoencoder has {config.units} units and sees "
        f"{config.epochs} passes in batches of {config.batch_size} (Adam). The k-sparse one has "
        f"tied weights, linear units and no other penalty; where k is below {config.k_start}, "
        f"training starts with {config.k_start} active units and takes them down to k over the "
        f"first {config.anneal_share:.0%} of the steps. The denoising one loses "
        f"{config.noise:.0%} of the pixels, has sigmoid units and tied weights, and sees the same "
        f"batches. PCA chooses among {components} components, the untrained dictionary (random "
        "directions) among the same k.",
        "The probe is a logistic regression on frozen features; its penalty, alpha, and all other "
        "choices are made on the validation images. Errors are in per cent of the test images. "
        f"Their intervals resample {config.seeds} seeds and the test images together, which counts "
        "the images' noise in full and of the seeds' somewhat less; those of dead units and FVU "
        "are Student's t over seeds. They speak of these images and this budget: the paper's own "
        "numbers come from 60,000 training images and 5,000 epochs of gradient descent with "
        "momentum, and are no yardstick here.",
        "The extent of a filter is the share of the image that it covers, (sum w^2)^2 / (d sum "
        "w^4). The theorem is checked on dictionaries made for it, through the same encoder; the "
        "adversarial ones meet its bounds with equality, which shows how much it gives away: "
        "recovery fails there from (2 k - 1) mu = 1 on at equal entries, just beyond the "
        "condition.",
    )
    return "\n\n".join(paragraphs)
