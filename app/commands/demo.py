"""`lorgnette demo`: the main job on a small scale, from weights to features in the browser."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from rich.table import Table

from analyses.report import Report, Verdict
from app.commands import capture, dashboard, evaluate, index, label, train
from app.commands.options import Common, duration, plan, say
from app.resolve import manifest_hash, weights_hash
from probe.runs import Run, find_runs, read_json
from probe.store import ActivationStore
from saes.activations import TopK
from saes.evaluation import METRICS, EvaluateConfig
from saes.training import TrainConfig

logger = logging.getLogger(__name__)

TWIN_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """From SmolLM2's weights to features in the browser, in one go.

    Captures activations, trains a TopK sparse autoencoder and one on the model's random-weight
    twin as a control, evaluates, indexes and labels the features of both, writes a report, and
    serves the dashboard. What is there already is used again; what was stopped goes on.

    Example: lorgnette demo --tokens 200000 --steps 100
    """

    model: str = "smollm2"
    """smollm2, a local folder in the Hugging Face layout, or a Hugging Face id."""
    corpus: str = "builtin"
    """builtin, a .txt, .jsonl[.gz] or .parquet file, or a Hugging Face dataset id."""
    site: str = "resid_post.12"
    """Where to read the model."""
    tokens: int = 600_000
    """Tokens to read."""
    d_sae: int = 4608
    """Number of latents: 8 times SmolLM2's width."""
    k: int = 32
    """Latents kept for each token."""
    steps: int = 600
    """Training steps of 2,048 tokens."""
    port: int = 8501
    """Port of the dashboard on 127.0.0.1."""
    serve: bool = "LORGNETTE_NO_SERVE" not in os.environ
    """Serve the dashboard at the end; LORGNETTE_NO_SERVE=1 in the environment turns it off."""
    common: Common = field(default_factory=Common)


def run(command: Command) -> Path | None:
    """Make everything, then serve it; gives the SAE's folder where it does not serve."""
    if command.common.dry_run:
        say(dry_run_plan(command))
        return None
    if command.serve:
        dashboard.check_port(command.port)
    clock = Clock()
    sae_run, store = make_sae(command, None, clock)
    twin_run, twin_store = make_sae(command, TWIN_SEED, clock)
    evaluated = clock.time("evaluate", lambda: run_evaluation(command, sae_run, twin_run, store))
    indexed = clock.time("index", lambda: run_index(command, sae_run, store))
    clock.time("index (random-weight twin)", lambda: run_index(command, twin_run, twin_store))
    clock.time("label", lambda: run_labels(command, sae_run))
    clock.time("label (random-weight twin)", lambda: run_labels(command, twin_run))
    measured = read_json(evaluated.path / METRICS)
    report = write_report(command, sae_run, evaluated, measured, clock)
    say(evaluate.results_table(measured))
    say(summary_table(sae_run, indexed, report, clock))
    if not command.serve:
        return sae_run.path
    dashboard.run(dashboard.Command(port=command.port, common=command.common))
    return None


class Clock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, stage: str, work: Callable[[], Any]) -> Any:
        """Do the work of a stage and note how long it took."""
        logger.info("%s", stage)
        started = time.perf_counter()
        result = work()
        self.seconds[stage] = time.perf_counter() - started
        return result


def make_sae(
    command: Command, random_weights: int | None, clock: Clock
) -> tuple[Run, ActivationStore]:
    """Capture and train, for the model or for its random-weight twin."""
    of = "" if random_weights is None else " (random-weight twin)"
    captured = clock.time(f"capture{of}", lambda: run_capture(command, random_weights))
    store = ActivationStore.open(captured)
    options = train.Command(
        source=str(captured), site=command.site, train=train_config(command), common=command.common
    )
    made = clock.time(f"train{of}", lambda: train.train(options, train.from_store(options)))
    return made, store


def run_capture(command: Command, random_weights: int | None) -> Path:
    """The store of the model, or of its twin."""
    options = capture.Command(
        model=command.model,
        corpus=command.corpus,
        sites=(command.site,),
        tokens=command.tokens,
        random_weights=random_weights,
        common=command.common,
    )
    folder = capture.run(options)
    assert folder is not None
    return folder


def train_config(command: Command) -> TrainConfig:
    """The recipe, the same for the model and its twin."""
    return TrainConfig(d_sae=command.d_sae, activation=TopK(k=command.k), steps=command.steps)


def run_evaluation(command: Command, sae_run: Run, twin_run: Run, store: ActivationStore) -> Run:
    """The evaluation beside its controls, on as many rows as a short demo has time for."""
    options = evaluate.Command(
        sae=sae_run.path,
        twin=twin_run.path,
        evaluate=EvaluateConfig(n_rows=16_384, n_ce_tokens=8_192),
        common=command.common,
    )
    return evaluate.measure(options, sae_run, store)


def run_index(command: Command, sae_run: Run, store: ActivationStore) -> Run:
    """The feature index."""
    options = index.Command(sae=sae_run.path, common=command.common)
    return index.index(options, sae_run, weights_hash(sae_run), store)


def run_labels(command: Command, sae_run: Run) -> Path | None:
    """A label for every feature, with its score."""
    return label.run(label.Command(sae=sae_run.path, common=command.common))


def write_report(
    command: Command, sae_run: Run, evaluated: Run, measured: dict[str, Any], clock: Clock
) -> Run:
    """The report of the demo; made once, with the times of the call that made it."""
    config = {"kind": "report", "study": "demo", "evaluation": manifest_hash(evaluated)}
    folder = Run.create(command.common.root / "reports" / "demo", sae_run.path.name, config)
    if not folder.complete:
        with folder.lock():
            report = make_report(sae_run, measured, clock)
            report.write(folder, inputs={"evaluation": config["evaluation"]}, seeds={})
    return folder


def make_report(sae_run: Run, measured: dict[str, Any], clock: Clock) -> Report:
    """What the demo found."""
    rows = {row["name"]: row for row in measured["rows"]}
    table = pd.DataFrame(
        [{"": row["label"]} | {n: row.get(n) for n in evaluate.COLUMNS} for row in rows.values()]
    )
    stages = pd.DataFrame({"stage": clock.seconds.keys(), "seconds": clock.seconds.values()})
    config = sae_run.config
    return Report(
        title=f"A first dictionary: {config['model']['spec']} at {config['site']}",
        text=(
            f"A TopK sparse autoencoder with {config['train']['d_sae']} latents, "
            f"{config['train']['activation']['k']} of them active at a time, trained for "
            f"{config['train']['steps']} steps of {config['source']['batch_size']} tokens. "
            f"Everything below is measured on {measured['n_rows']} held-out rows, what happens to "
            f"the model on {measured['n_ce_tokens']} held-out tokens. FVU is the share of variance "
            "that the reconstruction misses; CE recovered is 0 where the reconstruction is no "
            "better than zeros, and 1 where it costs the model nothing."
        ),
        verdicts=tuple(verdicts(rows)),
        numbers={name: rows["sae"].get(name) for name in evaluate.COLUMNS},
        tables={"candidates": table, "time": stages},
        figures={"fidelity": fidelity_figure(list(rows.values()))},
    )


def verdicts(rows: dict[str, dict[str, Any]]) -> list[Verdict]:
    """Does the SAE beat its controls? Each by the distance of 95 % intervals of the FVU."""
    claims = {
        "pca": "The SAE reconstructs better than PCA with as many components as it has latents "
        "active.",
        "random_dictionary": "The SAE reconstructs better than an untrained dictionary of its "
        "size.",
        "random_weight_twin": "The trained model's activations are easier for an SAE than those "
        "of its random-weight twin.",
    }
    sae = rows["sae"]
    return [
        Verdict(
            claim=claim,
            statistic=f"FVU {sae['fvu']:.4g} [{sae['fvu_low']:.4g}, {sae['fvu_high']:.4g}] "
            f"against {rows[name]['label']}",
            value=rows[name]["fvu"],
            low=rows[name]["fvu_low"],
            high=rows[name]["fvu_high"],
            holds=sae["fvu_high"] < rows[name]["fvu_low"],
        )
        for name, claim in claims.items()
        if name in rows
    ]


def fidelity_figure(rows: list[dict[str, Any]]) -> go.Figure:
    """FVU of every candidate with its interval."""
    shown = [row for row in rows if row.get("fvu") is not None]
    figure = go.Figure(
        go.Bar(
            x=[row["fvu"] for row in shown],
            y=[row["label"] for row in shown],
            orientation="h",
            error_x={
                "type": "data",
                "array": [row["fvu_high"] - row["fvu"] for row in shown],
                "arrayminus": [row["fvu"] - row["fvu_low"] for row in shown],
            },
        )
    )
    figure.update_xaxes(title="fraction of variance unexplained (FVU), lower is better")
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(template="plotly_white", margin={"l": 220, "r": 20, "t": 20, "b": 60})
    return figure


def summary_table(sae_run: Run, indexed: Run, report: Run, clock: Clock) -> Table:
    """Where everything is and how long it took."""
    table = Table("stage", "time", title="lorgnette demo")
    for stage, seconds in clock.seconds.items():
        table.add_row(stage, duration(seconds))
    table.add_row("all", duration(sum(clock.seconds.values())), end_section=True)
    table.add_row("SAE", str(sae_run.path))
    table.add_row(
        "features", f"{indexed.summary['n_alive']} of {indexed.summary['n_features']} alive"
    )
    table.add_row("report", str(report.path / "report.md"))
    return table


def dry_run_plan(command: Command) -> Table:
    """What a demo does, and what is there already."""
    there = find_runs(command.common.root)
    return plan(
        "lorgnette demo would make",
        {
            "store": f"{command.tokens} tokens of {command.corpus} at {command.site}, and of the "
            "random-weight twin: about 1.4 GB",
            "SAEs": f"two of {command.d_sae} latents, k = {command.k}, {command.steps} steps",
            "then": "evaluation, a feature index and labels of each, report"
            + (f", dashboard at http://127.0.0.1:{command.port}" if command.serve else ""),
            "time": "about 10 minutes on 2 cores with bfloat16 units, longer without",
            "there": f"{sum(run.complete for run in there)} complete runs below "
            f"{command.common.root}, used again where they fit",
        },
    )
