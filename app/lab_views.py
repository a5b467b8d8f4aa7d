"""Tables and words of the prompt lab, without Streamlit."""

import urllib.parse
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.lab_figures import heat_map, shown
from app.wording import escaped, number, percent, spaced
from saes.attribution import Agreement
from saes.prompts import PromptCodes, strongest_by_token


def by_token_html(codes: PromptCodes, top: int) -> str:
    """Each token of a text with the features that are strongest on it."""
    rows = []
    for place, best in enumerate(strongest_by_token(codes, top)):
        faint = "" if codes.keep[place] else ' class="lg-muted"'
        cells = "".join(
            f"<td>{feature} <span class='lg-muted'>{number(value)}</span></td>"
            for feature, value in best
        )
        cells += "<td></td>" * (top - len(best))
        rows.append(
            f"<tr{faint}><td>{place}&ensp;<span class='lg-tokens'>"
            f"{escaped(spaced(codes.texts[place]))}</span></td>{cells}</tr>"
        )
    head = "".join(f"<th>{rank}.</th>" for rank in range(1, top + 1))
    return f'<table class="lg-table"><tr><th>Token</th>{head}</tr>{"".join(rows)}</table>'


def agreement_words(found: Agreement) -> str:
    """How well estimates predict measurements, in one line of Markdown."""
    if found.pearson is None:
        return f"Too few features ({found.n}), or no spread among them, for a correlation."
    interval = "" if found.low is None else f" [{number(found.low)}, {number(found.high)}]"
    return (
        f"Estimate against measurement, {found.n} features: correlation "
        f"**{number(found.pearson)}**{interval}, of ranks **{number(found.spearman)}**; shuffled, "
        f"95 % stay below {number(found.shuffled)}. Largest difference "
        f"**{number(found.largest_difference)}** logits."
    )


def with_links(table: pd.DataFrame, sae: str, labels: Sequence[str]) -> pd.DataFrame:
    """A table of features with the address of each one's page and what is known of it."""
    name = urllib.parse.quote(sae)
    linked = table.assign(
        feature=[f"/feature?sae={name}&feature={feature}" for feature in table["feature"]],
        label=list(labels),
    )
    if "token" in linked:
        linked["token"] = [spaced(token) for token in linked["token"]]
    return linked


def layers_figure(rows: Sequence[tuple[str, PromptCodes]]) -> go.Figure:
    """The strongest feature of each token, a row an SAE; colour is its share of the row's largest.

    Args:
        rows: name of an SAE -> its codes of the same text.
    """
    texts = rows[0][1].texts
    best = [[some[0] if some else (-1, 0.0) for some in strongest_by_token(codes, 1)]
            for _, codes in rows]  # fmt: skip
    values = np.array([[value for _, value in row] for row in best])
    kept = np.where([codes.keep.tolist() for _, codes in rows], values, 0)
    scale = kept.max(axis=1, keepdims=True)
    hover = [
        [f"{name}, token {place} {shown(texts[place])}<br>" + (
            f"feature {feature}, activation {value:.4g}" if value else "nothing fires")
         for place, (feature, value) in enumerate(row)]
        for (name, _), row in zip(rows, best, strict=True)
    ]  # fmt: skip
    return heat_map(
        np.minimum(values / np.where(scale > 0, scale, 1), 1),
        rows=[name for name, _ in rows],
        columns=[f"{i} {shown(text)}" for i, text in enumerate(texts)],
        hover=hover,
        limits=(0.0, 1.0),
        cells=[[str(f) if f >= 0 else "" for f, _ in row] for row in best],
        title="share of the row's largest",
    )


def predicted_words(tokens: Sequence[tuple[int, str, float]]) -> str:
    """The likeliest next tokens as HTML chips."""
    chips = " ".join(
        f'<span class="lg-chip" style="display:inline-block;background:rgba(224,165,38,'
        f'{0.08 + 0.6 * share:.2f})">{escaped(spaced(text))}</span> '
        f'<span class="lg-muted">{percent(share)}</span>&ensp;'
        for _, text, share in tokens
    )
    return f"<div>The model goes on with &ensp;{chips}</div>"
