"""What the benchmark found, in words: its text, tables, key figures, and verdicts on its claims."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analyses.benchmark_measured import NAMES, SUITES, Config, Measured, Results, Suite
from analyses.report import Verdict
from analyses.statistics import Estimate, proportion_interval, welch_difference
from probe.corpora import BUILTIN
from probe.runs import Run

ALIKE = 0.7
"""|cosine| above which two latents count as alike."""
TOLD = 0.5
"""F1 above which main latents tell their letter."""
DETAILS: dict[Suite, str] = {
    "probing": "classes",
    "scr": "spurious_probes",
    "absorption": "letters",
}
"""The table that explains a suite's own."""
BUILTIN_TEXTS = (
    "The built-in texts were written by SmolLM2 itself, asked for a form and a topic; their class "
    "is the form. An SAE trained on the built-in corpus has seen them, without their classes. Both "
    "flatter: for a claim about a model, give texts of your own."
)
"""What to know of them."""

TEXTS: dict[Suite, str] = {
    "probing": "**probing**: a logistic probe sees k codes of a text (averaged over its tokens), "
    "those that differ most between the class and the rest in the training texts, and says on test "
    "texts whether a text is of the class. Half are, so guessing gives 0.5; the numbers are means "
    "over classes. `whole activation` is what a linear probe finds in all channels together, and "
    "shuffled training labels show what choosing among thousands of latents finds in noise.",
    "tpp": "**tpp** (targeted probe perturbation): the n latents that matter most to one class's "
    "probe are taken out of every activation, what the SAE misses staying in. The score is the "
    "loss of accuracy of that class's probe minus the mean loss of the others': near 0.5 where "
    "exactly one class is lost, 0 where nothing or everything is. Components and channels are set "
    "to their mean; n of the few there are is a larger part of the activation than n latents. `the "
    "probe's own direction` is the ceiling: one number whose loss blinds the probe altogether.",
    "scr": "**scr** (spurious-correlation removal): a probe for one property is trained where a "
    "second one always goes with it. The n latents that matter most to the second property are "
    "taken out, and the probe is tested where the two are independent. 0 is no better than the "
    "biased probe, 1 as good as one trained without the bias. The claims and the figure are about "
    "the target of which the bias costs more; where it costs little the score is a ratio of small "
    "numbers and its interval is wide. `the probe's own direction` is that of the probe for the "
    "second property.",
    "absorption": "**absorption**: the share of a first letter's direction that other latents "
    "carry where the letter's own main latents fall short, on test words that a probe recognises; "
    "0 is none. Under `paper` every latent with a positive share counts, so any dictionary that "
    "spreads a direction over many latents scores high, a random one above all; under `released` "
    "only the three most aligned count, and only where they carry .4 of it. Two controls: the "
    "whole procedure with letters shuffled among words, and random directions in place of the "
    "letters'. A score no higher than both says nothing of letters, and where main latents tell "
    "their letter badly (`main F1`) there is no letter latent to be absorbed.",
    "matching": "**matching**: the |cosine| of decoder rows paired one to one. Random directions, "
    "as many and as wide, show what pairing thousands gives by chance. The activations of a "
    "random-weight twin have nothing to do with the model's, so that matching with its SAE is a "
    "control too.",
    "coherence": "**coherence**: each latent's largest |cosine| with another of its dictionary. "
    "High values are near-duplicates, split features or a bundle of dense directions; the Welch "
    "bound is the least that the largest can be.",
}
"""How to read each suite."""


def text(config: Config, saes: Mapping[str, Run], results: Results) -> str:
    """What was done, and how to read it; `saes` are the runs by their part in the config."""
    sae = saes["sae"]
    others = {"compare": "compared SAE", "twin": "SAE of the random-weight twin"}
    beside = "; ".join(
        f"{words}: {_described(saes[name])}" for name, words in others.items() if name in saes
    )
    counts = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in results.counts.items())
    parts = [
        f"Suites beyond reconstruction, on {sae.config['model']['spec']}, for {_described(sae)}"
        f"{f'; {beside}' if beside else ''}. "
        f"{f'Measured on {counts}. ' if counts else ''}Intervals "
        "are 95 % percentile bootstrap over test texts, those of cosines over latents: they speak "
        "of the choice of texts, not of the SAE's training seed. A claim holds where its interval "
        "lies above 0 (`most`: above one half); the claims are not corrected for their number. All "
        "numbers are in `estimates.parquet`."
    ]
    if config.dataset == BUILTIN and results.counts.get("texts"):
        parts.append(BUILTIN_TEXTS)
    parts += [TEXTS[suite] for suite in SUITES if suite in config.suites]
    if results.notes:
        parts.append("Left out:\n\n" + "\n".join(f"- {note}" for note in results.notes))
    return "\n\n".join(parts)


def _described(sae: Run) -> str:
    """An SAE's name, site and training seed, where the seed is known."""
    seed = sae.config.get("train", {}).get("seed")
    place = sae.config["site"] if seed is None else f"{sae.config['site']}, seed {seed}"
    return f"`{sae.path.name}` ({place})"


# ------------------------------------------------------------------------------ tables


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """The suites' tables, each followed by its details."""
    ordered: dict[str, pd.DataFrame] = {}
    for suite in SUITES:
        if estimates := results.of(suite):
            ordered[NAMES.get(suite, suite)] = wide_table(estimates)
        for name in (suite, DETAILS.get(suite, "")):
            if name in results.tables:
                ordered[name] = results.tables[name]
    return ordered


def estimates_table(results: Results) -> pd.DataFrame:
    """Every number with its interval, a row each; missing where it is not defined."""
    rows = [
        {
            "suite": each.suite,
            "target": each.variant,
            "activations": each.subject,
            "name": each.name,
            "label": each.label,
            "setting": each.setting,
            "value": each.estimate.value,
            "low": each.estimate.low,
            "high": each.estimate.high,
            "n_texts": each.n_texts,
        }
        for each in results.estimates
    ]
    columns = ["suite", "target", "activations", "name", "label", "setting"]
    return pd.DataFrame(rows, columns=[*columns, "value", "low", "high", "n_texts"])


def wide_table(estimates: Sequence[Measured]) -> pd.DataFrame:
    """A row a dictionary, by target; a column a setting, growing; value and interval as text."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for each in estimates:
        row = rows.setdefault((each.variant, each.subject, each.label), {})
        if each.variant:
            row["target"] = each.variant
        row["what"] = each.label
        row[_setting(each)] = shown(each.estimate)
    targets = list(dict.fromkeys(target for target, _, _ in rows))
    ordered = sorted(rows.items(), key=lambda item: targets.index(item[0][0]))
    settings = {each.setting: _setting(each) for each in estimates}
    numbers = sorted((name for name in settings if name.isdigit()), key=int)
    columns = [*numbers, *(name for name in settings if not name.isdigit())]
    named = ["target", "what"] if targets != [""] else ["what"]
    return pd.DataFrame(
        [row for _, row in ordered], columns=[*named, *(settings[name] for name in columns)]
    )


def _setting(estimate: Measured) -> str:
    symbols = {"probing": "k", "tpp": "n", "scr": "n", "absorption": "rule"}
    return f"{symbols[estimate.suite]} = {estimate.setting}"


def shown(estimate: Estimate) -> str:
    """A number and its interval."""
    if math.isnan(estimate.value):
        return "-"
    ends = "" if estimate.low is None else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:.3f}{ends}"


def key_figures(config: Config, results: Results) -> dict[str, Any]:
    """The few numbers worth listing."""
    k, n, target = str(config.ks[0]), str(config.headline_n), results.headline_target
    wanted = {
        f"probing_{k}": ("probing", k, ""),
        f"tpp_{n}": ("tpp", n, ""),
        f"scr_{n}": ("scr", n, target),
        "absorption_paper": ("absorption", "paper", ""),
        "absorption_released": ("absorption", "released", ""),
    }
    found: dict[str, Any] = {}
    for name, (suite, setting, variant) in wanted.items():
        measured = results.find(suite, "sae", "sae", setting, variant)
        if measured is not None and math.isfinite(measured.estimate.value):
            found[name] = measured.estimate.value
    if "coherence" in results.tables:
        found["coherence"] = float(results.tables["coherence"]["largest cosine"].iloc[0])
    return found | results.counts


# ------------------------------------------------------------------------------ verdicts


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """That the SAE's number is above another."""

    suite: Suite
    """Where both were measured."""
    setting: str
    """k, n or rule of the SAE's number."""
    against: str
    """The dictionary or control that has the other number."""
    subject: str = "sae"
    """The SAE on whose activations that was measured."""
    against_setting: str = ""
    """k, n or rule of the other number; the same where empty."""
    words: str
    """The claim as a sentence."""


def claims(config: Config) -> list[Claim]:
    """The claims that are put to the test."""
    few, many, n = str(config.ks[0]), str(config.ks[-1]), str(config.headline_n)
    one = "One latent tells" if few == "1" else f"{few} latents tell"
    as_one = "one {} does" if few == "1" else f"{few} {{}}s do"
    probing = {
        "shuffled": f"{one} a class better than latents chosen by shuffled labels.",
        "channels": f"{one} a class better than {as_one.format('residual channel')}.",
        "pca": f"{one} a class better than {as_one.format('principal component')}.",
        "random_dictionary": f"{one} a class better than one chosen from random directions.",
    }
    out = f"Taking out {n} latents"
    tpp = {
        "random_latents": f"{out} of a class harms that class most, beyond random latents.",
        "random_dictionary": f"{out} is more targeted than as many of a random dictionary.",
        "pca": f"{out} is more targeted than as many principal components.",
        "channels": f"{out} is more targeted than as many residual channels.",
    }
    scr = {
        "random_latents": f"{out} removes a spurious correlation, beyond random latents.",
        "random_dictionary": f"{out} removes it better than as many of a random dictionary.",
        "pca": f"{out} removes it better than as many principal components.",
    }
    return [
        *(Claim(suite="probing", setting=few, against=a, words=w) for a, w in probing.items()),
        Claim(suite="probing", setting=many, against="pca",
              words=f"The same for {many} latents and {many} principal components."),
        Claim(suite="probing", setting=few, against="sae", subject="twin",
              words=f"{one} a class better than in the random-weight twin."),
        *(Claim(suite="tpp", setting=n, against=a, words=w) for a, w in tpp.items()),
        Claim(suite="tpp", setting=n, against="sae", subject="twin",
              words=f"{out} is more targeted than in the random-weight twin."),
        *(Claim(suite="scr", setting=n, against=a, words=w) for a, w in scr.items()),
        Claim(suite="scr", setting=n, against="probe", against_setting="1",
              words=f"{out} removes it better than taking out the spurious probe's direction."),
        Claim(suite="absorption", setting="released", against="sae/shuffled",
              words="First letters are absorbed more than shuffled ones (released rule)."),
        Claim(suite="absorption", setting="released", against="sae/random",
              words="First letters are absorbed more than random directions (released rule)."),
    ]  # fmt: skip


def verdicts(config: Config, results: Results) -> tuple[Verdict, ...]:
    """Each claim by the interval of a difference; what was not measured is left out."""
    found = [_verdict(claim, results) for claim in claims(config)]
    found += [*_letters(results), *_geometry(results)]
    return tuple(each for each in found if each is not None)


def _verdict(claim: Claim, results: Results) -> Verdict | None:
    variant = results.headline_target if claim.suite == "scr" else ""
    one = results.find(claim.suite, "sae", "sae", claim.setting, variant)
    setting = claim.against_setting or claim.setting
    other = results.find(claim.suite, claim.subject, claim.against, setting, variant)
    if one is None or other is None:
        return None
    name = "gain in mean accuracy" if claim.suite == "probing" else "difference of the scores"
    values = f"{one.estimate.value:.3f} against {other.estimate.value:.3f}"
    return _above(claim.words, f"{name} ({values})", one.minus(other))


def _above(claim: str, statistic: str, estimate: Estimate, bound: float = 0.0) -> Verdict | None:
    """That an estimate is above a bound; None where it is not defined or has no interval."""
    if math.isnan(estimate.value) or estimate.low is None:
        return None
    return Verdict(
        claim=claim, statistic=statistic, value=estimate.value, low=estimate.low,
        high=estimate.high, holds=estimate.above(bound),
    )  # fmt: skip


def _letters(results: Results) -> Iterator[Verdict | None]:
    if (table := results.tables.get("letters")) is not None:
        known = sum(row["main F1"] > TOLD for row in table.to_dict("records"))
        yield _above(
            "Most letters have main latents that tell them.",
            f"share of letters whose main latents have an F1 above {TOLD}",
            proportion_interval(known, len(table)), 0.5,
        )  # fmt: skip


def _geometry(results: Results) -> Iterator[Verdict | None]:
    """What is claimed of directions; every control follows its own in `results`."""
    matched = list(results.matched.items())
    for (name, cosines), (_, random) in zip(matched[::2], matched[1::2], strict=True):
        yield _above(
            f"Matched {name}, latents are more alike than random directions.",
            _difference("mean |cos|", cosines, random), welch_difference(cosines, random),
        )  # fmt: skip
        yield _above(
            f"Most pairs are alike, matched {name}.",
            f"share of pairs with |cos| above {ALIKE} (random directions: "
            f"{(random > ALIKE).mean():.3f})",
            proportion_interval(int((cosines > ALIKE).sum()), len(cosines)), 0.5,
        )  # fmt: skip
    if results.nearest:
        own, *_, random = results.nearest.values()
        yield _above(
            "The SAE's latents are nearer to one another than random directions.",
            _difference("mean of the nearest |cos|", own, random), welch_difference(own, random),
        )  # fmt: skip


def _difference(name: str, a: np.ndarray, b: np.ndarray) -> str:
    return f"difference of the {name} ({a.mean():.3f} against {b.mean():.3f})"
