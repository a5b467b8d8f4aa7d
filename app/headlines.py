"""A feature's headline numbers, each beside the same number of features of the random-weight twin.

What random weights give too says nothing about what the model learned: a number counts by how far
it is from the twin's. The detection score of a label also has a control of its own: the same score
with another feature's label.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float

from app.wording import DASH, Unit, escaped, number, percent
from saes.feature_reference import Told

SCORE = "score"
SCALED = (
    "Activations of two models differ in size: the twin's are scaled so that its typical feature "
    "has the mean activation of this SAE's"
)
TOLD = (
    "Whether this number tells features of the trained model from the twin's at all (AUROC "
    "beyond .5 +- .1): where it does not, it says nothing of what the model learned"
)
TITLES: Mapping[str, tuple[str, str, Callable[[float | None], str]]] = {
    "density": ("Density", "Share of the indexed {unit} it fires on", percent),
    "max": ("Largest", "Largest activation", number),
    "mean": ("Mean", "Mean activation over the {unit} it fires on", number),
    "nearest_cosine": (
        "Nearest cosine", "Cosine of its decoder direction to the nearest other one", number,
    ),
    SCORE: (
        "Detection score",
        "Balanced accuracy with which the automatic label tells held-out contexts where it fires "
        "from others; 0.5 is chance",
        number,
    ),
}  # fmt: skip
"""Title, explanation and way of writing of each number, by its name in the index; `{unit}` is what
features fire on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinRange:
    """The same number of the twin's living features."""

    median: float
    """Half of them are below."""
    low: float
    """5 % of them are below."""
    high: float
    """5 % of them are above."""
    share_below: float | None
    """Share of them below this feature's number; None where it has none."""
    told: Told | None = None
    """How well the number tells the two SAEs' features apart; None where that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One number and what it is compared with."""

    name: str
    """A key of `TITLES`."""
    value: float | None
    """The number; None where the feature has none."""
    interval: tuple[float, float] | None = None
    """Its 95 % interval, where it has one."""
    control: float | None = None
    """The score of another feature's label; None for other numbers."""
    twin: TwinRange | None = None
    """None where there is no twin that is indexed, or labelled for the score."""


def headlines(
    row: Mapping[str, Any],
    automatic: Mapping[str, Any] | None,
    references: Mapping[str, Any],
    twin_scores: Float[np.ndarray, " n"],
    told: Mapping[str, Told] = MappingProxyType({}),
) -> tuple[Headline, ...]:
    """The headline numbers of a feature.

    Args:
        row: the feature's row of the index.
        automatic: its automatic label's row (score, score_low, score_high, control); None for none.
        references: the twin's statistics by name, each with `median`, `low`, `high` and
            `share_below(value)` (`saes.feature_reference`); empty without a twin.
        twin_scores: detection scores of the twin's own automatic labels; may be empty.
        told: how well each number tells the two SAEs' features apart (`told_apart`).
    """
    found = [
        Headline(
            name=name, value=row[name], twin=_twin(references.get(name), row[name], told.get(name))
        )
        for name in TITLES
        if name != SCORE
    ]
    if automatic is not None:
        score, low, high = (_known(automatic.get(n)) for n in (SCORE, "score_low", "score_high"))
        headline = Headline(
            name=SCORE,
            value=score,
            interval=None if low is None or high is None else (low, high),
            control=_known(automatic.get("control")),
            twin=_scores(twin_scores, score),
        )
        found.append(headline)
    return tuple(found)


def _known(value: Any) -> float | None:
    return None if value is None or np.isnan(value) else float(value)


def _twin(reference: Any, value: float | None, told: Told | None) -> TwinRange | None:
    if reference is None:
        return None
    return TwinRange(
        median=reference.median,
        low=reference.low,
        high=reference.high,
        share_below=None if value is None else float(reference.share_below(value)),
        told=told,
    )


def _scores(scores: Float[np.ndarray, " n"], value: float | None) -> TwinRange | None:
    known = scores[~np.isnan(scores)]
    if not len(known):
        return None
    low, median, high = np.quantile(known, (0.05, 0.5, 0.95))
    below = None if value is None else float((known < value).mean())
    return TwinRange(median=float(median), low=float(low), high=float(high), share_below=below)


def headlines_html(found: Sequence[Headline], unit: Unit = "tokens") -> str:
    """The numbers as a table; the twin's columns only where there is a twin."""
    twin = any(headline.twin for headline in found)
    head = (
        '<tr><th></th><th>this feature</th><th title="The same model with random weights: median, '
        f'5 to 95 % of its living features. {escaped(SCALED)}">random-weight twin</th>'
        '<th title="Share of the twin\'s living features that are below">above</th>'
        f'<th title="{escaped(TOLD)}">tells the twin apart</th></tr>'
    )
    body = "".join(_row_html(headline, twin=twin, unit=unit) for headline in found)
    return f'<table class="lg-table lg-headlines">{head if twin else ""}{body}</table>'


def _row_html(headline: Headline, *, twin: bool, unit: Unit) -> str:
    title, explained, written = TITLES[headline.name]
    name = f'<td title="{escaped(explained.format(unit=unit))}">{escaped(title)}</td>'
    notes = []
    if headline.interval is not None:
        notes.append(" to ".join(map(written, headline.interval)))
    if headline.control is not None:
        notes.append(f"another label {written(headline.control)}")
    small = "".join(f'<br><span class="lg-muted">{note}</span>' for note in notes)
    cells = f"{name}<td><b>{written(headline.value)}</b>{small}</td>"
    if twin:
        cells += _twin_html(headline.twin, written)
    return f"<tr>{cells}</tr>"


def _twin_html(twin: TwinRange | None, written: Callable[[float | None], str]) -> str:
    if twin is None:
        return f"<td>{DASH}</td>" * 3
    spread = f"{written(twin.low)} to {written(twin.high)}"
    return (
        f'<td>{written(twin.median)}<br><span class="lg-muted">{spread}</span></td>'
        f"<td>{percent(twin.share_below)}</td>{_told_html(twin.told)}"
    )


def _told_html(told: Told | None) -> str:
    if told is None:
        return f"<td>{DASH}</td>"
    word = {True: "yes", False: "no", None: "hardly"}[told.tells]
    return (
        f'<td title="AUROC {told.auroc:.2f}, {told.low:.2f} to {told.high:.2f}; .5 is chance">'
        f'{word} <span class="lg-muted">{told.auroc:.2f}</span></td>'
    )
