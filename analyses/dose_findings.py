"""What the dose-response study concludes: verdicts, figures, tables and words."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy import stats

from analyses.dose_measured import KINDS, MEASURES, Dosed, Kind, Measure, Measured, over_units
from analyses.plots import Axis, Line, panels
from analyses.report import Verdict
from analyses.statistics import mean_interval

EFFECTS: tuple[Measure, ...] = ("tokens", "text", "probe")
CLAIMS: dict[Measure, str] = {
    "tokens": "makes its tokens likelier",
    "text": "makes the model write what its feature fires on",
    "probe": "moves the probe",
}
SHOWN_PROMPTS = 3
"""Prompts of each recipe whose texts are shown."""
AXES: dict[Measure, str] = {
    "tokens": "change (nats)",
    "text": "change of mean code",
    "probe": "change",
    "kl": "nats a token",
    "ce": "nats a token",
    "repetition": "share",
}


def verdicts(measured: Measured) -> list[Verdict]:
    """Does each recipe do more than its controls, and at which cost?"""
    found = []
    for dosed in measured.recipes:
        found += [stands_out(dosed, measure) for measure in EFFECTS if measure in dosed.measures()]
        found.append(costs_no_more(dosed))
    if grows := grows_with_strength(measured.recipes):
        found.append(grows)
    return found


def stands_out(dosed: Dosed, measure: Measure) -> Verdict:
    """Is the effect larger than that of the kind of control that comes nearest?"""
    recipe = dosed.values("recipe", measure, 1.0)
    kinds: list[Kind] = [kind for kind in dosed.kinds() if kind != "recipe"]
    nearest = max(kinds, key=lambda kind: dosed.values(kind, measure, 1.0).mean())
    difference = over_units(recipe - dosed.values(nearest, measure, 1.0))
    means = np.concatenate([dosed.values(kind, measure, 1.0).mean(1) for kind in kinds])
    above = int((recipe.mean() > means).sum())
    own = dosed.estimate("recipe", measure, 1.0)
    return Verdict(
        claim=f"{dosed.name}: the recipe {CLAIMS[measure]}, more than changes of the same size "
        "elsewhere.",
        statistic=f"{MEASURES[measure].lower()}: {own}; more than {above} of {len(means)} "
        f"controls; less the {_plural(nearest)}, which come nearest",
        value=difference.value,
        low=difference.low,
        high=difference.high,
        holds=difference.above(0),
    )


def costs_no_more(dosed: Dosed) -> Verdict:
    """Does it harm neutral text less than random directions?"""
    recipe, random = (dosed.values(kind, "kl", 1.0) for kind in ("recipe", "random direction"))
    difference = over_units(recipe - random)
    own = dosed.estimate("recipe", "kl", 1.0)
    return Verdict(
        claim=f"{dosed.name}: the recipe harms neutral text less than random directions of its "
        "size.",
        statistic=f"KL {own} nats a token; less that of random directions",
        value=difference.value,
        low=difference.low,
        high=difference.high,
        holds=difference.below(0),
    )


def grows_with_strength(recipes: Sequence[Dosed]) -> Verdict | None:
    """Does the effect on the wanted tokens grow up to the recipe's own strength?"""
    rhos = []
    for dosed in recipes:
        times = [0.0, *(t for t in dosed.strengths() if 0 < t <= 1)]
        if "tokens" in dosed.measures() and len(times) > 2:
            values = np.stack([dosed.values("recipe", "tokens", t)[0] for t in times[1:]])
            values = np.concatenate([np.zeros((1, values.shape[1])), values])
            found = [float(stats.spearmanr(times, column)[0]) for column in values.T]  # type: ignore
            rhos.append(float(np.mean(found)))
    if len(rhos) < 2:
        return None
    rho = mean_interval(np.array(rhos))
    return Verdict(
        claim="The effect on the wanted tokens grows with the strength, up to the recipe's own.",
        statistic="rank correlation of strength and effect, by prompt; mean over recipes",
        value=rho.value,
        low=rho.low,
        high=rho.high,
        holds=rho.above(0),
    )


def _plural(kind: Kind) -> str:
    return {"twin": "twin's feature"}.get(kind, f"{kind}s")


def figures(measured: Measured) -> dict[str, go.Figure]:
    """A figure for each measure, a panel for each recipe."""
    present = {name for dosed in measured.recipes for name in dosed.measures()}
    return {
        f"{name}_by_strength": figure(measured.recipes, name)
        for name in MEASURES
        if name in present
    }


def figure(recipes: Sequence[Dosed], measure: Measure) -> go.Figure:
    """One measure against strength, the recipe beside its controls."""
    shown = {
        dosed.name: [dose_line(dosed, kind, measure) for kind in dosed.kinds()]
        for dosed in recipes
        if measure in dosed.measures()
    }
    return panels(
        shown,
        title=MEASURES[measure],
        x=Axis(title="Strength (times the recipe's)", from_zero=True),
        y=Axis(title=AXES[measure]),
    )


def dose_line(dosed: Dosed, kind: Kind, measure: Measure) -> Line:
    """A measure of a kind of candidate at every strength."""
    times = dosed.strengths()
    return Line(name=kind, x=times, y=[dosed.estimate(kind, measure, t) for t in times])


def tables(measured: Measured) -> dict[str, pd.DataFrame]:
    """Everything at the recipes' own strength, the texts, and every dose."""
    return {
        "at_the_recipes_strength": pd.concat([_at_one(dosed) for dosed in measured.recipes]),
        "texts": pd.concat([texts(dosed) for dosed in measured.recipes]),
        "every_dose": pd.concat([_doses(dosed) for dosed in measured.recipes]),
    }


def _at_one(dosed: Dosed) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"recipe": dosed.name, "": kind}
            | {
                MEASURES[measure]: str(dosed.estimate(kind, measure, 1.0))
                for measure in dosed.measures()
            }
            for kind in dosed.kinds()
        ]
    )


def texts(dosed: Dosed) -> pd.DataFrame:
    """What the model and the recipe wrote on the first few prompts."""
    rows = []
    for prompt in dosed.samples["prompt"].unique()[:SHOWN_PROMPTS]:
        of = dosed.samples[dosed.samples["prompt"] == prompt].set_index("times")["text"]
        said = {"default": one_line(str(of[0.0])), "steered": one_line(str(of[1.0]))}
        rows.append({"recipe": dosed.name, "prompt": one_line(prompt)} | said)
    return pd.DataFrame(rows)


def one_line(text: str) -> str:
    """A text whose line breaks are marked."""
    return text.replace("\r", "").replace("\n", "\u21b5")


def _doses(dosed: Dosed) -> pd.DataFrame:
    rows = []
    for measure in dosed.measures():
        for kind in dosed.kinds():
            for times in dosed.strengths():
                found = dosed.estimate(kind, measure, times)
                rows.append(
                    {
                        "recipe": dosed.name, "kind": kind, "measure": measure, "times": times,
                        "value": found.value, "low": found.low, "high": found.high,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def numbers(measured: Measured) -> dict[str, float]:
    """The recipes' own effects and costs."""
    return {
        f"{dosed.name}/{measure}": dosed.estimate("recipe", measure, 1.0).value
        for dosed in measured.recipes
        for measure in dosed.measures()
    }


def text(measured: Measured) -> str:
    """What was done, and how to read it."""
    config = measured.config
    kinds = dict.fromkeys(kind for dosed in measured.recipes for kind in dosed.kinds())
    missing = [kind for kind in KINDS if kind not in kinds]
    left_out = f" Left out: {', '.join(missing)}." if missing else ""
    return (
        f"Each recipe is run at {len(config.times)} multiples of its own strengths, beside "
        f"{config.controls} random directions, {config.controls} random living features and the "
        "feature of the same number of the random-weight twin; a control changes the activation "
        f"by as much as the recipe does at the same token.{left_out} Wanted tokens: change of "
        "ln(p / (1 - p)) of the next token being one of those that the recipe names, after "
        f"{config.prompts} openings of documents. Feature on the text: what the recipe's feature "
        f"is on the {config.new_tokens} tokens that the steered model writes (greedily, after "
        f"{config.written} openings), read in the unsteered model, less the same on the unsteered "
        f"text. KL and cross-entropy are on {config.sequences} sequences of 128 tokens, in which "
        "every token is steered. Bands and intervals have 95 % confidence: over controls and "
        "prompts both where there are 20 prompts or more, else Student's t over prompts (or "
        "sequences) of the controls' mean."
    )
