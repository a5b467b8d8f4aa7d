"""The tables of the circuit-breaker study's report."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from analyses.cells import Frame, select
from analyses.circuit_breakers.findings import let_through
from analyses.circuit_breakers.measured import HARMFUL, KEPT, MAIN, ORIGINAL, Measured
from analyses.circuit_breakers.numbers import (
    ATTACKS,
    ablation,
    ablation_names,
    ablation_state,
    answers,
    at_layers,
    by_seed,
    concepts,
    crossed,
    curve,
    put_back,
    recovered,
    rise,
)
from analyses.circuit_breakers.parts import ablations
from analyses.statistics import Estimate, crossed_interval, mean_interval

MEASURES = {
    "text": "negative log-likelihood of held-out text, nats a token",
    "chat: ordinary": "the same of responses to ordinary requests",
    "chat: near": "the same of responses to near misses",
    "KL: ordinary": "KL on responses to ordinary requests, nats a token",
    "KL: near": "KL on responses to near misses, nats a token",
    "choice": "multiple-choice accuracy",
}
CHANGES = {
    "lost": "the most lost features at their mean", "random": "other features at their mean",
    "codes": "every feature at its own value", "state": "the state itself",
}  # fmt: skip
LISTED = 8
"""Lost and appeared features that the report lists of each."""


def tables(measured: Measured) -> dict[str, pd.DataFrame]:
    """Every table of what was measured."""
    made = {
        "states": states(measured),
        "attacks": attacks(measured),
        "answers": coherence(measured),
        "capability": capability(measured),
        "ablations": ablation_table(measured),
        "probe_or_control": probe_or_control(measured),
        "probes": probes(measured),
        "wearing_down": wearing(measured),
        "dictionaries": dictionaries(measured),
        "features": features(measured),
        "putting_back": putting_back(measured),
    }
    return {name: table for name, table in made.items() if len(table)}


def shown(estimate: Estimate | None) -> str:
    """An estimate in a cell of a table."""
    return "-" if estimate is None else str(estimate)


def states(measured: Measured) -> pd.DataFrame:
    """Cosine and length by subject and set, at the control layer and the targets."""
    targets = measured.training.target_layers
    control, rows = max(1, min(targets) // 2), []
    for subject in measured.subjects:
        for name in ("concept", *KEPT):
            values = {
                f"cosine, layer {layer}": shown(
                    crossed(at_layers(measured, name, (layer,), (subject,)), "cosine")
                )
                for layer in (control, *targets, measured.n_layers)
            }
            at_last = crossed(at_layers(measured, name, targets, (subject,)), "last_cosine")
            values |= {"cosine, targets, last token": shown(at_last)}
            longer = crossed(at_layers(measured, name, targets, (subject,)), "log_ratio")
            if longer is not None:
                times = {"length over original's, targets": f"{np.exp(longer.value):.3g}"}
                rows.append({"broken": subject, "read on": name} | values | times)
    return pd.DataFrame(rows)


def attacks(measured: Measured) -> pd.DataFrame:
    """Every attack on every concept: answers that comply, and the original's likelihood."""
    rows = []
    for subject in [*concepts(measured), "all"]:
        of = concepts(measured) if subject == "all" else [subject]
        for attack in ATTACKS:
            before, after = (
                crossed(answers(measured, attack, run, of), "complies") for run in (ORIGINAL, MAIN)
            )
            if before is None or after is None:
                continue
            rows.append(
                {
                    "broken": subject, "attack": attack, "complies, original": shown(before),
                    "complies, broken": shown(after),
                    "rise of the answers' NLL": shown(rise(measured, attack, of)),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def coherence(measured: Measured) -> pd.DataFrame:
    """What answers are like: of both models, just asked, by subject and set."""
    names = {
        "nll_original": "NLL under the original", "repetition": "repeated 4-grams",
        "entropy": "entropy of its predictions", "coherent": "coherent",
        "refuses": "refusal's keyword", "tokens": "tokens",
    }  # fmt: skip
    rows = []
    for subject in measured.subjects:
        for attack in ("none", *KEPT):
            for run in (ORIGINAL, MAIN):
                table = answers(measured, attack, run, [subject])
                if len(table):
                    table = table.replace(np.inf, np.nan)
                    means = {
                        said: round(float(table[name].mean()), 3) for name, said in names.items()
                    }
                    asked = {"none": "the concept", "near": "near misses"}.get(attack, attack)
                    if subject == HARMFUL and attack == "none":
                        asked = "harmful prompts"
                    rows.append({"broken": subject, "model": run, "asked": asked} | means)
    return pd.DataFrame(rows)


def capability(measured: Measured) -> pd.DataFrame:
    """Every measure of capability, of both models."""
    table, rows = measured.table("capability"), []
    for subject in measured.subjects:
        for measure, what in MEASURES.items():
            some = select(table, {"measure": measure, "subject": subject})
            if len(some):
                change = by_seed(
                    some.assign(difference=some["broken"] - some["original"]), "difference"
                )
                rows.append(
                    {
                        "broken": subject, "measure": what,
                        "original": float(some["original"].mean()),
                        "broken model": float(some["broken"].mean()),
                        "difference": shown(crossed_interval(change)),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def ablation_table(measured: Measured) -> pd.DataFrame:
    """Every way to train: states, the concept, and what it costs."""
    known = ablations(measured.training)
    rows = []
    for run in ablation_names(measured):
        training = measured.training if run == MAIN else known[run][0]
        targets = training.target_layers
        seeds = ablation(measured, run, "concept").shape[0]
        rows.append(
            {
                "training": run, "seeds": seeds,
                "cosine, concept": shown(ablation_state(measured, run, "concept", targets)),
                "cosine, ordinary": shown(ablation_state(measured, run, "ordinary", targets)),
                "cosine, near misses": shown(ablation_state(measured, run, "near", targets)),
            }
            | {
                f"NLL rise, {measure}": shown(_crossed(ablation(measured, run, measure)))
                for measure in ("concept", "prefill", "few-shot")
            }
            | {
                measure: shown(_crossed(ablation(measured, run, measure)))
                for measure in ("KL: near", "KL: ordinary")
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _crossed(values: np.ndarray) -> Estimate | None:
    return crossed_interval(values) if values.size else None


def probe_or_control(measured: Measured) -> pd.DataFrame:
    """A probe as the defence at every threshold, beside rerouting."""
    table, subjects = measured.table("detection"), concepts(measured)
    if not len(table):
        return pd.DataFrame()
    groups = {"concepts": subjects, "harmful prompts": [HARMFUL]}
    rows = []
    for group, of in groups.items():
        chosen = table[table["subject"].isin(of)]
        for (kind, how, threshold), some in _by_threshold(chosen):
            on = some["attack"].isin(ATTACKS)
            rows.append(
                {
                    "against": group, "defence": f"{kind} probe",
                    "threshold": how if how == "matched" else f"{threshold:.14g}",
                    "ordinary and near misses flagged": float(some[~on]["flagged"].mean()),
                    "answers flagged": float(some[on]["flagged"].mean()),
                }
            )  # fmt: skip
    for name, values in let_through(measured, subjects).items():
        rows.append(
            {
                "against": "concepts", "defence": name, "threshold": "matched",
                "lets through": shown(mean_interval(values).clipped(0, 1)),
            }
        )  # fmt: skip
    return pd.DataFrame(rows + _rerouting_row(measured, subjects))


def _rerouting_row(measured: Measured, subjects: list[str]) -> list[dict[str, object]]:
    kept: Frame = pd.concat([answers(measured, name, MAIN, subjects) for name in KEPT])
    if not len(kept):
        return []
    return [
        {
            "against": "concepts", "defence": "rerouting", "threshold": "-",
            "ordinary and near misses flagged": float(1 - kept["coherent"].mean()),
            "lets through": shown(answers_of_words(measured, subjects)),
        }
    ]  # fmt: skip


def _by_threshold(table: Frame) -> Iterator[tuple[tuple[str, str, float], Frame]]:
    """Rows by probe and threshold; the matched ones, which differ, together."""
    for (kind, how), some in table.groupby(["probe", "how"]):
        if how == "matched":
            yield (str(kind), str(how), float("nan")), some
        else:
            for threshold, rows in some.groupby("threshold"):
                yield (str(kind), str(how), float(threshold)), rows


def answers_of_words(measured: Measured, subjects: list[str]) -> Estimate | None:
    """Share of rerouting's answers that comply, attacks made of words."""
    table = pd.concat(
        [answers(measured, attack, MAIN, subjects) for attack in ATTACKS[:4]]
    ).reset_index(drop=True)
    table = table.assign(row=table["attack"] + table["row"].astype(str))
    return crossed(table, "complies")


def probes(measured: Measured) -> pd.DataFrame:
    """AUROC of probes on unseen topics, by layer and what they read."""
    table = measured.table("probes")
    if not len(table):
        return table
    wide = table.pivot_table(
        index=["subject", "probe", "layer"], columns="read", values="auroc", aggfunc="mean"
    )
    order = [name for name in ("before", "moved", "anew", "shuffled") if name in wide.columns]
    return wide[order].reset_index().rename(columns={"subject": "broken"})


def wearing(measured: Measured) -> pd.DataFrame:
    """What comes back under fine-tuning, soft tokens and talk."""
    rows = []
    kinds = [("tuning", "steps", "fine-tuning on ordinary text", {"text": "ordinary"}),
             ("tuning", "steps", "fine-tuning on the concept", {"text": "concept"}),
             ("soft", "steps", "soft tokens", {}),
             ("turns", "turns", "turns of other talk", {})]  # fmt: skip
    for table, by, name, wanted in kinds:
        broken = curve(measured, table, by, MAIN, **wanted)
        before = curve(measured, table, by, ORIGINAL, **wanted)
        for n, values in broken.items():
            rows.append(
                {
                    "worn down by": name, "number": n,
                    "NLL, original": shown(mean_interval(before[n])),
                    "NLL, broken": shown(mean_interval(values)),
                    "back": shown(recovered(broken[0], values, before[0])) if n else "-",
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def dictionaries(measured: Measured) -> pd.DataFrame:
    """How well the SAEs still describe the states."""
    table = measured.table("dictionary")
    if not len(table):
        return table
    named = table.rename(columns={"shared": "active features still active"})
    return named[["sae", "subject", "set", "active features still active", "fvu original",
                  "fvu broken"]]  # fmt: skip


def features(measured: Measured) -> pd.DataFrame:
    """The most lost and the most appeared features."""
    table = measured.table("features")
    if not len(table):
        return table
    shown = table[(table["rank"] <= LISTED) & (table["seed"] == 0)]
    return shown[
        ["sae", "subject", "kind", "rank", "feature", "original", "broken", "ordinary_original",
         "ordinary_broken", "token", "place"]
    ].rename(
        columns={
            "ordinary_original": "ordinary text, original",
            "ordinary_broken": "ordinary text, broken", "place": "place in the answer",
        }
    )  # fmt: skip


def putting_back(measured: Measured) -> pd.DataFrame:
    """What comes back with features put back."""
    table, rows = measured.table("readded"), []
    for sae in dict.fromkeys(table["sae"]) if len(table) else []:
        found = put_back(measured, sae)
        broken, original = found[("none", 0)], found[("original", 0)]
        for (change, n), values in found.items():
            if change in CHANGES:
                rows.append(
                    {
                        "sae": sae, "put back": CHANGES[change], "features": str(n or "-"),
                        "NLL": shown(mean_interval(values)),
                        "back": shown(recovered(broken, values, original)),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)
