"""Views: what an artifact holds -> a figure, a table or a piece of HTML, without Streamlit.

This module makes the tables and lists, and passes on the other views: `app.figures`, `app.strips`.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from app.figures import (
    AXIS_TITLES,
    METRIC_TITLES,
    activation_figure,
    density_figure,
    training_figure,
    zf_figure,
)
from app.strips import (
    CONTEXT_LABELS,
    ExampleGroup,
    Strip,
    first_of,
    groups_html,
    scale_html,
    strip_html,
)
from app.style import ACCENT, BLUE_RGB, GOLD_RGB, RUST_RGB, SERIES, STYLE
from app.wording import (
    DASH,
    Unit,
    escaped,
    fact,
    flatten,
    markdown,
    number,
    percent,
    pill,
    short,
    spaced,
    token_list,
)

__all__ = [
    "ACCENT", "AXIS_TITLES", "BLUE_RGB", "COMPARED", "CONTEXT_LABELS", "DASH", "METRIC_TITLES",
    "NORMS", "RUST_RGB", "STYLE", "ExampleGroup", "Strip", "Unit", "activation_figure", "bars_html",
    "comparison_html",
    "density_figure", "escaped", "facts_html", "first_of", "groups_html", "legend_html", "markdown",
    "next_commands", "number", "numbers_html", "percent", "pill", "provenance_facts", "sae_size",
    "scale_html", "short", "spaced", "strip_html", "table_html", "token_list", "tokens_table_html",
    "training_figure", "training_row", "zf_figure",
]  # fmt: skip

COMPARED: Mapping[str, str] = {
    "fvu": "FVU",
    "cosine": "Cosine",
    "ce_recovered": "CE recovered",
    "kl": "KL (nats)",
    "pixel": "Pixels moved (of 255)",
    "pixel_recovered": "Pixels recovered",
    "latent_recovered": "Latents recovered",
    "l0": "L0",
    "dead_share": "Dead",
    "dense_share": "Dense",
}
NORMS: Mapping[str, str] = {
    "code_over_input": "code over input (median)",
    "over_share": "over-activated rows",
    "under_share": "under-activated rows",
    "elbo": "epsilon-LBO, over all latents",
    "elbo_support": "over active ones",
    "elbo_reconstruction": "of the reconstruction",
    "welch": "Welch bound",
}
"""Names of `saes.afa`'s numbers."""
SHARES = {
    "ce_recovered", "ce_recovered_mean", "pixel_recovered", "latent_recovered", "dead_share",
    "dense_share",
}  # fmt: skip


def bars_html(labels: Sequence[str], values: Sequence[float], *, colour: str) -> str:
    """Tokens with a number each: a chip tinted and a bar drawn by size, and the number itself.

    Args:
        labels: token texts.
        values: numbers of one sign, in the order to show them.
        colour: "r,g,b" of the full colour.
    """
    largest = max((abs(value) for value in values), default=0.0) or 1.0
    cells = []
    for label, value in zip(labels, values, strict=True):
        share = abs(value) / largest
        cells.append(
            f'<span class="lg-chip" style="background:rgba({colour},{0.1 + 0.3 * share:.2f})">'
            f"{escaped(spaced(label))}</span>"
            f'<span class="lg-bar" style="background:rgb({colour});width:{100 * share:.1f}%">'
            "</span>"
            f'<span class="lg-number">{number(value)}</span>'
        )
    return f'<div class="lg-bars">{"".join(cells)}</div>'


def facts_html(facts: Mapping[str, Any]) -> str:
    """Name and value pairs, nested ones flattened with dots; empty values are left out."""
    items = [
        f"<dt>{escaped(name)}</dt><dd>{escaped(fact(value))}</dd>"
        for name, value in flatten(facts).items()
        if value is not None and value != ""
    ]
    return f'<dl class="lg-facts">{"".join(items)}</dl>'


def provenance_facts(name: str, known: Mapping[str, Any], unit: Unit = "tokens") -> dict[str, Any]:
    """The few facts of an SAE's provenance that belong on every feature's page."""
    model, train, source = (known.get(part) or {} for part in ("model", "train", "source"))
    fidelity, made = known.get("evaluation") or {}, known.get("made") or {}
    seed, steps, rows = model.get("random_weights"), train.get("steps"), source.get("batch_size")
    return {
        "SAE": name,
        "model": model.get("spec"),
        "weights": "trained" if seed is None else f"random (seed {seed})",
        "site": known.get("site"),
        "trained on": source.get("store") or source.get("corpus"),
        unit: short(steps * rows) if steps and rows else None,
        "size": sae_size({"train": train}, {}),
        "FVU": number(fidelity["fvu"]) if "fvu" in fidelity else None,
        "CE recovered": percent(fidelity["ce_recovered"]) if "ce_recovered" in fidelity else None,
        "pixels recovered": percent(fidelity["pixel_recovered"])
        if "pixel_recovered" in fidelity
        else None,
        f"indexed {unit}": short((known.get("index") or {}).get("rows")),
        "made": made.get("created"),
        "commit": (made.get("git_commit") or "")[:12],
    }


def sae_size(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """An SAE's width and sparsity in words, from its config or its summary; empty where unknown."""
    known = flatten(config.get("train") or {}) | dict(summary)
    by_last_name = {name.rpartition(".")[2]: value for name, value in known.items()}
    words = [
        f"{by_last_name['d_sae']:,} features" if "d_sae" in by_last_name else "",
        f"k = {by_last_name['k']}" if "k" in by_last_name else "",
    ]
    return ", ".join(word for word in words if word)


def next_commands(
    *,
    unfinished_stores: Sequence[Path],
    stores: Sequence[Path],
    trained_on: Collection[str],
    unfinished_saes: Sequence[Path],
    not_evaluated: Sequence[Path],
    not_indexed: Sequence[Path],
) -> list[tuple[str, str]]:
    """What would finish or add to what is there: a reason and a command each, most urgent first.

    Args:
        unfinished_stores: activation stores whose capture has not finished.
        stores: complete activation stores.
        trained_on: names of the stores that some SAE was trained on.
        unfinished_saes: SAEs whose training has not finished.
        not_evaluated: trained SAEs without an evaluation.
        not_indexed: trained SAEs without a feature index.
    """
    steps = [
        (f"The capture of `{path.name}` has not finished; the same `lorgnette capture` command "
         "resumes it. See what it was asked for:", f"cat {path / 'config.json'}")
        for path in unfinished_stores
    ]  # fmt: skip
    steps += [
        (f"The training of `{path.name}` has not finished; the same `lorgnette train` command "
         "resumes it. See what it was asked for:", f"cat {path / 'config.json'}")
        for path in unfinished_saes
    ]  # fmt: skip
    steps += [
        (f"No SAE is trained on `{path.name}` yet:", f"lorgnette train {path}")
        for path in stores
        if not any(path.name in name for name in trained_on)
    ]
    steps += [
        (f"How faithful `{path.name}` is has not been measured:", f"lorgnette evaluate {path}")
        for path in not_evaluated
    ]
    steps += [
        (f"The features of `{path.name}` cannot be browsed yet:", f"lorgnette index {path}")
        for path in not_indexed
    ]
    if not steps:
        steps = [("All is complete. Check the installation and every file:", "lorgnette doctor")]
    return steps


def tokens_table_html(tokens: pd.DataFrame, unit: Unit = "tokens") -> str:
    """A feature's tokens, or places: how often each makes it fire, and how strongly."""
    one = unit.removesuffix("s")
    rows = "".join(
        f'<tr><td><span class="lg-chip" style="background:rgba({GOLD_RGB},.25)">'
        f"{escaped(spaced(row['text']))}</span></td><td>{row['n']:,}</td>"
        f"<td>{percent(row['share'])}</td><td>{number(row['mean'])}</td>"
        f"<td>{number(row['max'])}</td></tr>"
        for row in tokens.to_dict("records")
    )
    return (
        f'<table class="lg-table"><tr><th>{one.capitalize()}</th>'
        f'<th title="Times it fires on this {one}">Fires</th>'
        f'<th title="Share of this {one}\'s uses on which it fires">of its uses</th>'
        f"<th>Mean</th><th>Largest</th></tr>{rows}</table>"
    )


def comparison_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """An evaluation's rows, the SAE first and its controls under it, as a table.

    Columns that no row has a value for are left out.
    """
    columns = [name for name in COMPARED if any(row.get(name) is not None for row in rows)]
    head = "".join(f"<th>{COMPARED[name]}</th>" for name in columns)
    body = []
    for row in rows:
        cells = "".join(_measured(row, name) for name in columns)
        lead = ' class="lg-lead"' if row["name"] == "sae" else ""
        body.append(f"<tr{lead}><td>{escaped(row.get('label') or row['name'])}</td>{cells}</tr>")
    return f'<table class="lg-table"><tr><th></th>{head}</tr>{"".join(body)}</table>'


def _measured(row: Mapping[str, Any], name: str) -> str:
    """A cell with a metric, and its 95 % interval to see on hovering where there is one."""
    show = percent if name in SHARES else number
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    hover = f' title="95 % interval {show(low)} to {show(high)}"' if low is not None else ""
    return f"<td{hover}>{show(row.get(name))}</td>"


def table_html(frame: pd.DataFrame, *, words: Collection[str] = ()) -> str:
    """A small table; its first column and those named in `words` are set to the left."""
    left = [' class="lg-words"' if name in words else "" for name in frame.columns]
    head = "".join(
        f"<th{side}>{escaped(name)}</th>" for side, name in zip(left, frame.columns, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{side}>{escaped(cell)}</td>" for side, cell in zip(left, row, strict=True))
        + "</tr>"
        for row in frame.itertuples(index=False)
    )
    return f'<table class="lg-table"><tr>{head}</tr>{body}</table>'


def numbers_html(frame: pd.DataFrame) -> str:
    """A small table of plain values as a person would write them; columns of texts to the left."""
    rows = [
        {name: DASH if value is None else fact(value) for name, value in row.items()}
        for row in frame.to_dict("records")
    ]
    texts = [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])]
    return table_html(pd.DataFrame(rows, columns=frame.columns), words=texts)


def training_row(name: str, table: pd.DataFrame, *, complete: bool) -> dict[str, str]:
    """Where a run stands: the last row of its metrics, as a row of a small table."""
    last: Mapping[str, Any] = table.iloc[-1].to_dict() if len(table) else {}
    return {
        "run": name,
        "step": fact(int(last["step"])) if "step" in last else DASH,
        "tokens": short(last.get("tokens")),
        "loss": number(last.get("loss")),
        "FVU": number(last.get("fvu")),
        "L0": number(last.get("l0")),
        "dead": percent(last.get("dead_share")),
        "state": "complete" if complete else "not complete",
    }


def legend_html(names: Sequence[str]) -> str:
    """Which line is which run."""
    items = [
        f'<span class="lg-key" style="background:{SERIES[place % len(SERIES)]}"></span>'
        f"{escaped(name)}"
        for place, name in enumerate(names)
    ]
    return f'<div class="lg-muted">{"".join(items)}</div>'
