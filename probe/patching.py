"""Activation patching between two prompts: where does what distinguishes them pass through?

Two prompts of as many tokens, clean and corrupted, that differ in what the model goes on to say.
One is run with a single activation (a layer's, at one position) taken from the other, and the
metric says how far that alone moves the prediction (Meng et al. 2022, 2202.05262; Heimersheim &
Nanda 2024, 2404.15255):

    effect = (m(patched) - m(corrupted)) / (m(clean) - m(corrupted))     0 = corrupted, 1 = clean

Where both prompts give the same metric there is nothing to divide by, and the effect is the plain
difference `m(patched) - m(run that was patched)`, in logits. Positions before the first token that
differs hold the same activations in both runs and are left out. The control puts the activation of
an unrelated prompt of as many tokens in the same places: what it does, any disturbance does.

Axes: `l` layers, `p` positions that are patched, `t` all positions, `n` runs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probe.capture import capturing
from probe.errors import UserError
from probe.language import LanguageModel
from probe.readout import Metric, check_rows, predicted, rows_at_once, varied_metrics
from probe.sites import Site
from probe.tokens import Prompt, as_prompt, token_texts

PatchedKind = Literal["resid_post", "attn_out", "mlp_out"]
PATCHED_KINDS: tuple[PatchedKind, ...] = get_args(PatchedKind)
Into = Literal["corrupted", "clean"]
EQUAL = 1e-4
"""Metrics (in logits) that are nearer than this count as equal."""
UNRELATED = (
    "The committee met on Thursday to discuss new rules for parking near the old railway station, "
    "although most of its members had never been there and few owned a car. "
)
"""What the control's prompt is made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two prompts to patch between and what tells them apart."""

    clean: Prompt
    """The prompt whose metric is 1."""
    corrupted: Prompt
    """The prompt whose metric is 0; as many tokens."""
    metric: Metric
    """The metric."""
    clean_value: float
    """The metric on the clean prompt, in logits."""
    corrupted_value: float
    """The metric on the corrupted prompt."""

    @property
    def gap(self) -> float | None:
        """Clean minus corrupted; None where the two count as equal."""
        gap = self.clean_value - self.corrupted_value
        return gap if abs(gap) > EQUAL else None

    @property
    def differing(self) -> tuple[int, ...]:
        """Positions at which the tokens differ."""
        both = zip(self.clean.ids, self.corrupted.ids, strict=True)
        return tuple(i for i, (one, other) in enumerate(both) if one != other)

    def normalised(self, metric: Float[Tensor, "*n"], base: Into) -> Float[Tensor, "*n"]:
        """The effect of patches into `base` from the metrics after them; never NaN."""
        if self.gap is None:
            return metric - (self.corrupted_value if base == "corrupted" else self.clean_value)
        return (metric - self.corrupted_value) / self.gap


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchGrid:
    """Effects of patching one activation at a time."""

    pair: Pair
    """The prompts."""
    kind: PatchedKind
    """What was patched."""
    into: Into
    """The run that was patched, with activations of the other one."""
    layers: tuple[int, ...]
    """Rows."""
    positions: tuple[int, ...]
    """Columns: from the first token that differs on."""
    effect: Float[Tensor, "l p"]
    """Effects: 0 = corrupted, 1 = clean, or logits where `pair.gap` is None."""
    control: Float[Tensor, "l p"]
    """The same of patches from an unrelated prompt."""

    def table(self) -> pd.DataFrame:
        """Columns: layer, position, clean, corrupted (the tokens there), effect, control."""
        places = [(layer, position) for layer in self.layers for position in self.positions]
        return pd.DataFrame(
            {
                "layer": [layer for layer, _ in places],
                "position": [position for _, position in places],
                "clean": [self.pair.clean.texts[i] for _, i in places],
                "corrupted": [self.pair.corrupted.texts[i] for _, i in places],
                "effect": self.effect.flatten().numpy(),
                "control": self.control.flatten().numpy(),
            }
        )


def make_pair(
    model: LanguageModel,
    clean: str | Prompt,
    corrupted: str | Prompt,
    metric: Metric | None = None,
) -> Pair:
    """Two prompts with their metrics.

    Args:
        model: the model.
        clean: one prompt.
        corrupted: the other.
        metric: what tells them apart; None: the clean prompt's most likely next token against the
            corrupted one's (against the mean logit where the two are the same).

    Raises:
        UserError: the prompts have different numbers of tokens, or are the same.
    """
    pair = as_prompt(model, clean), as_prompt(model, corrupted)
    check_alike(*pair)
    if metric is None:
        one, other = (int(predicted(model, prompt).argmax()) for prompt in pair)
        metric = Metric(target=one, contrast=None if one == other else other)
    # Through the same code as the patched runs, so that all are rounded alike.
    site = Site(kind="resid_post", layer=model.n_layers - 1)
    values = [
        float(varied_metrics(model, site, prompt, metric, lambda x: x[None], 1)) for prompt in pair
    ]
    return Pair(
        clean=pair[0], corrupted=pair[1], metric=metric, clean_value=values[0],
        corrupted_value=values[1],
    )  # fmt: skip


def check_alike(clean: Prompt, corrupted: Prompt) -> None:
    """Raise `UserError` where two prompts cannot be patched into each other."""
    if len(clean) != len(corrupted):
        raise UserError(
            f"patching needs two prompts of the same number of tokens: the clean one has "
            f"{len(clean)} and the corrupted one {len(corrupted)}; change a word for one of as "
            "many tokens."
        )
    if clean.ids == corrupted.ids:
        raise UserError("the two prompts are the same: change at least one word of the second.")


def patch_grid(
    model: LanguageModel,
    pair: Pair,
    *,
    kind: PatchedKind = "resid_post",
    into: Into = "corrupted",
    layers: Sequence[int] | None = None,
    unrelated: str | None = None,
) -> PatchGrid:
    """Patch every layer at every position from the first that differs on, one at a time.

    Args:
        model: the model.
        pair: the prompts (`make_pair`).
        kind: what is patched.
        into: the run that is changed; the activations are the other one's.
        layers: which layers; None for all.
        unrelated: the text that the control's activations come from; None for a built-in one. It is
            cut or repeated to the prompts' length.
    """
    layers = tuple(range(model.n_layers)) if layers is None else tuple(layers)
    base, source = (
        (pair.corrupted, pair.clean) if into == "corrupted" else (pair.clean, pair.corrupted)
    )
    control = unrelated_prompt(model, base, unrelated or UNRELATED)
    positions = tuple(range(pair.differing[0], len(base)))
    cells = torch.eye(len(base), dtype=torch.bool)[list(positions)]
    sites = [Site(kind=kind, layer=layer) for layer in layers]
    ours, others = (_tensors(model, sites, prompt) for prompt in (source, control))
    rows = []
    for site in sites:
        # Both in one batch: the blocks below the site run once for all of them.
        sources = torch.stack([ours[site], others[site]]).repeat_interleave(len(cells), 0)
        rows.append(patched_metrics(model, site, base, sources, cells.repeat(2, 1), pair.metric))
    effects = pair.normalised(torch.stack(rows), into).split(len(cells), dim=1)
    return PatchGrid(
        pair=pair, kind=kind, into=into, layers=layers, positions=positions, effect=effects[0],
        control=effects[1],
    )  # fmt: skip


def patched_metrics(
    model: LanguageModel,
    site: Site,
    base: Prompt,
    sources: Float[Tensor, "n t d"],
    cells: Bool[Tensor, "n t"],
    metric: Metric,
) -> Float[Tensor, " n"]:
    """The metric of runs of `base`, each with its source's tensor at the site in its cells."""
    parts = []
    at_once = rows_at_once(base)
    for some, source in zip(cells.split(at_once), sources.split(at_once), strict=True):

        def vary(x: Tensor, some: Tensor = some, source: Tensor = source) -> Tensor:
            return torch.where(some[:, :, None].to(x.device), source.to(x), x)

        parts.append(varied_metrics(model, site, base, metric, vary, len(some)))
    return torch.cat(parts)


def unrelated_prompt(model: LanguageModel, like: Prompt, text: str = UNRELATED) -> Prompt:
    """A prompt of as many tokens as `like` that says something else.

    Position 0 and special tokens stay, so that chats keep their form; the others become the text's,
    which is repeated as often as needed.
    """
    ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("the unrelated text is empty: type a word or more.")
    words = itertools.cycle(ids)
    both = zip(like.ids, like.keep, strict=True)
    new = tuple(next(words) if keep else token for token, keep in both)
    return replace(like, ids=new, texts=token_texts(model, new))


def _tensors(
    model: LanguageModel, sites: Sequence[Site], prompt: Prompt
) -> dict[Site, Float[Tensor, "t d"]]:
    """The sites' tensors on a prompt."""
    with torch.no_grad(), capturing(model, sites) as seen:
        model.run(prompt.tokens)
    for site in sites:
        check_rows(site, seen[site], prompt)
    return {site: seen[site][0] for site in sites}
