"""The figures of the circuit-breaker study."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import plotly.graph_objects as go

from analyses.cells import Frame, select
from analyses.circuit_breakers.measured import HARMFUL, KEPT, MAIN, ORIGINAL, Measured
from analyses.circuit_breakers.numbers import (
    ATTACKS,
    ablation,
    ablation_names,
    answers,
    at_layers,
    concepts,
    crossed,
    curve,
    put_back,
    recovered,
    rise,
    selected,
)
from analyses.plots import Axis, Line, Point, grouped_bars, heat_maps, lines, panels, point_rows
from analyses.statistics import crossed_interval, mean_interval

LAYER = Axis(title="State (0: embeddings, l: output of block l - 1)")
COSINE = Axis(title="Cosine with the original")
NAMES = {"concept": "the concept", "near": "near misses", "ordinary": "ordinary"}


def figures(measured: Measured) -> dict[str, go.Figure]:
    """Every figure of what was measured."""
    makers: dict[str, Callable[[Measured], go.Figure | None]] = {
        "training": training,
        "terms": terms,
        "cosine_by_layer": lambda m: by_layer(m, "cosine", COSINE),
        "length_by_layer": lambda m: by_layer(m, "log_ratio", LENGTH),
        "cosine_by_layer_and_token": by_token,
        "attacks": attacks,
        "likelihood_under_attacks": likelihoods,
        "ablations": ablation_rows,
        "probes_by_layer": probes,
        "direction_by_layer": directions,
        "fine_tuning": tuning,
        "soft_tokens": soft,
        "longer_conversations": turns,
        "putting_features_back": putting_back,
    }
    drawn = {name: make(measured) for name, make in makers.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


LENGTH = Axis(title="Log of the length over the original's")


# ---------------------------------------------------------------------------------------- training


def training(measured: Measured) -> go.Figure | None:
    """Cosines by step, a panel a subject: on the batch and on what is held out."""
    names = {
        "cb_cos_sim": "cb_cos_sim", "retain_cos_sim": "retain_cos_sim",
        "held_out_cos": "held out, to be rerouted", "held_out_retain_cos": "held out, to be kept",
    }  # fmt: skip
    shown = _by_step(measured, names, (-1.0, 1.0))
    if not shown:
        return None
    return panels(shown, title="Training: cosine with the original at the target layers",
                  x=Axis(title="Step"), y=Axis(title="Cosine"))  # fmt: skip


def terms(measured: Measured) -> go.Figure | None:
    """The two terms of the loss by step."""
    names = {"breaking_term": "c_s L_s (reroute)", "retain_term": "c_r L_r (retain)"}
    shown = _by_step(measured, names, (0.0, math.inf))
    if not shown:
        return None
    return panels(shown, title="Training: the two terms of the loss", x=Axis(title="Step"),
                  y=Axis(title="Weighted loss", from_zero=True))  # fmt: skip


def _by_step(
    measured: Measured, names: dict[str, str], limits: tuple[float, float]
) -> dict[str, list[Line]]:
    table, shown = measured.table("training"), {}
    for subject in measured.subjects if len(table) else []:
        rows = select(table, {"subject": subject, "run": MAIN})
        series = []
        for column, name in names.items():
            wide = rows.pivot_table(index="step", columns="seed", values=column).dropna()
            values = [mean_interval(row.astype(float)).clipped(*limits) for row in wide.to_numpy()]
            series.append(Line(name=name, x=[int(step) for step in wide.index], y=values))
        shown[subject] = series
    return shown


# ------------------------------------------------------------------------------------------ states


def by_layer(measured: Measured, value: str, axis: Axis) -> go.Figure | None:
    """Cosine or length by layer: a panel for concepts and one for harmful prompts."""
    groups = {"concepts": concepts(measured)}
    if HARMFUL in measured.subjects:
        groups["harmful prompts"] = [HARMFUL]
    shown = {}
    for group, of in groups.items():
        series = []
        for name in ("concept", *KEPT):
            table = at_layers(measured, name, range(measured.n_layers + 1), of)
            if len(table):
                series.append(_layer_line(NAMES[name] if of != [HARMFUL] or name != "concept"
                                          else "harmful prompts", table, value))  # fmt: skip
        others = selected(select(measured.table("layers"), {"run": MAIN}), of)
        others = others[others["set"].str.endswith("(not trained)")] if len(others) else others
        if len(others):
            others = others.assign(row=others["set"] + others["row"].astype(str))
            series.append(_layer_line("other concepts", others, value))
        if series:
            shown[group] = series
    if not shown:
        return None
    title = "States of the broken model beside the original's"
    if len(shown) == 1:
        return lines(next(iter(shown.values())), title=title, x=LAYER, y=axis)
    return panels(shown, title=title, x=Axis(title="State"), y=axis, columns=2)


def _layer_line(name: str, table: Frame, value: str) -> Line:
    layers = sorted(table["layer"].unique().tolist())
    found = [crossed(table[table["layer"] == layer], value) for layer in layers]
    return Line(name=name, x=layers, y=[one for one in found if one is not None])


def by_token(measured: Measured) -> go.Figure | None:
    """Cosine by layer and token around the beginning of the response."""
    table = selected(select(measured.table("profile"), {"run": MAIN}), concepts(measured))
    if not len(table):
        return None
    shown, places = {}, sorted(table["place"].unique().tolist())
    for name, word in NAMES.items():
        rows = table[table["set"] == name]
        wide = rows.pivot_table(index="layer", columns="place", values="cosine")
        shown[word] = wide.reindex(columns=places).to_numpy(dtype=float)
    return heat_maps(
        shown, title="Cosine with the original by layer and token",
        x=Axis(title="Token of the response"), y=Axis(title="State"), columns=places,
        amount="cosine", limits=(-0.5, 1.0),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- outputs


def attacks(measured: Measured) -> go.Figure | None:
    """Answers that comply by attack, of both models."""
    found = {
        name: {
            attack: crossed(answers(measured, attack, run, concepts(measured)), "complies")
            for attack in ATTACKS
        }
        for name, run in (("original", ORIGINAL), ("broken", MAIN))
    }
    kept = {name: {a: e for a, e in row.items() if e is not None} for name, row in found.items()}
    if not all(kept.values()):
        return None
    return grouped_bars(
        kept,
        title="Answers that are coherent and on the concept",
        y=Axis(title="Share of the answers", percent=True, from_zero=True),
    )


def likelihoods(measured: Measured) -> go.Figure | None:
    """How much less likely the original's answers became, by attack and concept."""
    found = {
        name: {attack: rise(measured, attack, [name]) for attack in ATTACKS}
        for name in concepts(measured)
    }
    kept = {name: {a: e for a, e in row.items() if e is not None} for name, row in found.items()}
    kept = {name: row for name, row in kept.items() if row}
    if not kept:
        return None
    return grouped_bars(
        kept,
        title="The original's answers become unlikely",
        y=Axis(title="Rise of their NLL (nats a token)", from_zero=True),
    )


def ablation_rows(measured: Measured) -> go.Figure | None:
    """Every way to train: how much it breaks, and what it costs."""
    shown = []
    for run in ablation_names(measured):
        broken, cost = ablation(measured, run, "concept"), ablation(measured, run, "KL: ordinary")
        if broken.size and cost.size:
            group = "rerouting" if run == MAIN else "changed"
            shown.append(
                Point(name=run, x=crossed_interval(broken), y=crossed_interval(cost), group=group)
            )
    if len(shown) < 2:
        return None
    return point_rows(
        shown,
        title="One thing changed: what is broken, and what it costs",
        x=Axis(title="Rise of the concept's NLL (nats a token)"),
        y=Axis(title="KL on ordinary responses (nats a token)", log=True),
    )


# ------------------------------------------------------------------------------------------ probes

READ = {
    "before": "original states", "moved": "broken states, same probe",
    "anew": "broken states, new probe", "shuffled": "labels shuffled",
}  # fmt: skip


def probes(measured: Measured) -> go.Figure | None:
    """AUROC of linear probes by layer, a panel a subject."""
    return _readings(measured, select(measured.table("probes"), {"probe": "linear"}),
                     "Linear probes of tokens, unseen topics")  # fmt: skip


def directions(measured: Measured) -> go.Figure | None:
    """AUROC of the difference of means by layer."""
    return _readings(measured, measured.table("directions"),
                     "The difference of means at a request's last token")  # fmt: skip


def _readings(measured: Measured, table: Frame, title: str) -> go.Figure | None:
    if not len(table):
        return None
    shown, names = {}, READ | {"cosine": "cosine of both directions"}
    for subject in measured.subjects:
        series = []
        for read, name in names.items():
            rows = select(table, {"subject": subject, "read": read})
            if len(rows):
                wide = rows.pivot_table(index="layer", columns="seed", values="auroc").dropna()
                least = -1 if read == "cosine" else 0
                values = [
                    mean_interval(row.astype(float)).clipped(least, 1) for row in wide.to_numpy()
                ]
                series.append(Line(name=name, x=[int(layer) for layer in wide.index], y=values))
        shown[subject] = series
    return panels(shown, title=title, x=Axis(title="State"), y=Axis(title="AUROC"), columns=2)


# -------------------------------------------------------------------------------------- robustness


def tuning(measured: Measured) -> go.Figure | None:
    """Likelihood of the concept's responses by steps of fine-tuning."""
    wanted = {
        f"{name}, {text}": curve(measured, "tuning", "steps", run, text=text)
        for name, run in (("broken", MAIN), ("original", ORIGINAL))
        for text in ("ordinary", "concept")
    }
    return _worn(wanted, "Fine-tuning after the break, by the text tuned on", "Steps")


def soft(measured: Measured) -> go.Figure | None:
    """The same by steps of soft tokens."""
    wanted = {
        name: curve(measured, "soft", "steps", run)
        for name, run in (("broken", MAIN), ("original", ORIGINAL))
    }
    return _worn(wanted, "Soft tokens moved against the break", "Steps")


def turns(measured: Measured) -> go.Figure | None:
    """The same by turns of other talk in front of the request."""
    wanted = {
        name: curve(measured, "turns", "turns", run)
        for name, run in (("broken", MAIN), ("original", ORIGINAL))
    }
    return _worn(wanted, "Other talk in front of the request", "Turns")


def _worn(curves: dict[str, dict[int, np.ndarray]], title: str, axis: str) -> go.Figure | None:
    shown = [
        Line(name=name, x=list(found), y=[mean_interval(values) for values in found.values()])
        for name, found in curves.items()
        if len(found) > 1
    ]
    if not shown:
        return None
    y = Axis(title="NLL of the concept's answers (nats a token)", from_zero=True)
    return lines(shown, title=title, x=Axis(title=axis), y=y)


# ---------------------------------------------------------------------------------------- features


def putting_back(measured: Measured) -> go.Figure | None:
    """Share of the lost likelihood that comes back by number of features, a panel an SAE."""
    table, shown = measured.table("readded"), {}
    for sae in dict.fromkeys(table["sae"]) if len(table) else []:
        found = put_back(measured, sae)
        broken, original = found[("none", 0)], found[("original", 0)]
        shown[sae.split("-")[1] if "-" in sae else sae] = [
            _back_line(name, change, found, broken, original)
            for change, name in (("lost", "most lost features"), ("random", "other features"))
        ]
    if not shown:
        return None
    return panels(
        shown, title="Features put back at their original mean, by the SAE's site",
        x=Axis(title="Features", log=True), y=Axis(title="Share that comes back", percent=True),
        columns=2,
    )  # fmt: skip


def _back_line(
    name: str,
    change: str,
    found: dict[tuple[str, int], np.ndarray],
    broken: np.ndarray,
    original: np.ndarray,
) -> Line:
    counts: Sequence[int] = sorted(n for of, n in found if of == change)
    values = [recovered(broken, found[(change, n)], original) for n in counts]
    return Line(name=name, x=list(counts), y=values)
