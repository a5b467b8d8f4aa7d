"""Tokens in the colour of a feature's activation, as HTML: one text, or examples in a list."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from app.style import GOLD_RGB
from app.wording import DASH, RETURN, escaped, number, percent, spaced, visible

Context = Literal["Stacked", "Snippet", "Full"]
REACH: Mapping[Context, int | None] = {"Stacked": 5, "Snippet": 16, "Full": None}
"""Tokens shown on either side of the one an example is about; None shows the whole sequence."""
CONTEXT_LABELS: Mapping[Context, str] = {
    "Stacked": "Stacked (\u00b15)",
    "Snippet": "Snippet (\u00b116)",
    "Full": "Full",
}
ExampleKind = Literal["top", "interval", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """Consecutive tokens of one sequence, with one feature's activation on each."""

    tokens: tuple[str, ...]
    """Text of each token, as it would be printed."""
    activations: tuple[float, ...]
    """The feature's activation on each token; 0 where it does not fire."""
    first_position: int = 0
    """Position in the sequence of the first token here."""
    focus: int | None = None
    """Which of these tokens (counted from 0 here) the strip is about; None for none."""
    document: str = ""
    """Name of the document that the focus token belongs to; empty for a person's own text."""

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.activations), "one activation for each token"
        assert self.focus is None or 0 <= self.focus < len(self.tokens), "the focus is a token here"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleGroup:
    """Examples of a feature that belong together, strongest first."""

    kind: ExampleKind
    """Which choice of sequences."""
    low: float
    """Lower bound of the interval; 0 for the other kinds."""
    high: float
    """Upper bound of the interval; 0 for the other kinds."""
    share: float
    """Share of the feature's firings inside the interval, exact; 1 for the other kinds."""
    examples: tuple[Any, ...]
    """Whole sequences with the example's token in focus: each a `Strip`, or a `Tile` of images."""


def first_of(group: ExampleGroup, most: int | None) -> ExampleGroup:
    """A group with its first `most` examples only; with all of them where it is None."""
    return replace(group, examples=group.examples[:most])


def window(strip: Strip, context: Context) -> Strip:
    """The part of a strip around its focus that `context` asks for."""
    reach = REACH[context]
    if reach is None or strip.focus is None:
        return strip
    start, stop = max(strip.focus - reach, 0), strip.focus + reach + 1
    return replace(
        strip,
        tokens=strip.tokens[start:stop],
        activations=strip.activations[start:stop],
        first_position=strip.first_position + start,
        focus=strip.focus - start,
    )


def shade(activation: float, scale: float) -> float:
    """Opacity of the gold behind a token: 0 where nothing fires, else from 0.1 up to 1."""
    if activation <= 0 or scale <= 0 or not math.isfinite(activation):
        return 0.0
    return 0.1 + 0.9 * min(activation / scale, 1.0)


def tokens_html(strip: Strip, *, scale: float, line_breaks: bool) -> str:
    """The strip's tokens as spans: gold by activation, the rest in a hover text.

    Args:
        strip: what to show.
        scale: the activation that is full gold, usually the feature's largest.
        line_breaks: break the line where the text does, instead of only marking the place.
    """
    spans = []
    for offset, (token, activation) in enumerate(zip(strip.tokens, strip.activations, strict=True)):
        alpha = shade(activation, scale)
        classes = "lg-t" + (" lg-on" if alpha > 0.7 else "")
        classes += " lg-focus" if offset == strip.focus else ""
        style = f' style="background:rgba({GOLD_RGB},{alpha:.2f})"' if alpha else ""
        tip = escaped(_tip(strip, offset)).replace("\n", "&#10;")
        text = escaped(visible(token))
        if line_breaks:
            text = text.replace(RETURN, RETURN + "\n")
        spans.append(f'<span class="{classes}"{style} data-tip="{tip}">{text}</span>')
    return "".join(spans)


def _tip(strip: Strip, offset: int) -> str:
    lines = [
        f"token {spaced(strip.tokens[offset])}",
        f"activation {strip.activations[offset]:.4f}",
        f"position {strip.first_position + offset}",
    ]
    return "\n".join([*lines, f"document {strip.document}"] if strip.document else lines)


def strip_html(strip: Strip, *, scale: float, line_breaks: bool = True) -> str:
    """A strip on its own: flowing text."""
    return (
        f'<div class="lg-tokens">{tokens_html(strip, scale=scale, line_breaks=line_breaks)}</div>'
    )


def examples_html(
    strips: Sequence[Strip], *, scale: float, context: Context, line_breaks: bool
) -> str:
    """Examples one under the other, each with the activation of its focus token at the left.

    In the stacked view the focus tokens stand in one column, as in a concordance.
    """
    rows = []
    for full in strips:
        strip = window(full, context)
        focus = strip.focus if strip.focus is not None else int(np.argmax(strip.activations))
        value = f'<span class="lg-value">{strip.activations[focus]:.3g}</span>'
        if context == "Stacked":
            left, right = _split(strip, focus)
            body = "".join(
                f'<span class="lg-tokens {side}">'
                f"{tokens_html(part, scale=scale, line_breaks=False)}</span>"
                for side, part in (("lg-left", left), ("lg-right", right))
            )
            rows.append(f'<div class="lg-row lg-stacked">{value}{body}</div>')
        else:
            text = tokens_html(strip, scale=scale, line_breaks=line_breaks)
            rows.append(f'<div class="lg-row">{value}<span class="lg-tokens">{text}</span></div>')
    return f'<div class="lg-rows">{"".join(rows)}</div>'


def _split(strip: Strip, focus: int) -> tuple[Strip, Strip]:
    left = replace(
        strip, tokens=strip.tokens[:focus], activations=strip.activations[:focus], focus=None
    )
    right = replace(
        strip,
        tokens=strip.tokens[focus:],
        activations=strip.activations[focus:],
        first_position=strip.first_position + focus,
        focus=0,
    )
    return left, right


def interval_title(low: float, high: float, share: float) -> str:
    """Heading of the examples of one interval of activations."""
    return (
        f'<div class="lg-interval">Interval {number(low)} {DASH} {number(high)} '
        f'<span class="lg-muted">(Contains {percent(share)})</span></div>'
    )


def groups_html(
    groups: Sequence[ExampleGroup], *, scale: float, context: Context, line_breaks: bool
) -> str:
    """Groups of examples one under the other, intervals with their bounds and share above them."""
    parts = []
    for group in groups:
        if group.kind == "interval":
            parts.append(interval_title(group.low, group.high, group.share))
        parts.append(
            examples_html(group.examples, scale=scale, context=context, line_breaks=line_breaks)
        )
    return "".join(parts)


def scale_html(scale: float) -> str:
    """The legend of the gold scale."""
    return (
        f'<span class="lg-muted">activation 0<span class="lg-scale"></span>{number(scale)} '
        "(this feature's largest)</span>"
    )
