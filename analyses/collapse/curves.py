"""How far apart a model's last tokens are at n and at n + 1 repetitions.

Primary: the relative distance |y - y*| / |y| (Euclidean) of the final norm's output y at the last
token, and of the residual stream behind every block. Second: of each head's output before the
output projection, the largest absolute difference (L-infinity), its mean and range over heads; the
paper's figure 5 says no more than "averaged over each head".

A whole curve is one pass over the longest prompt (`probe.growing`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.collapse.families import Family, Form
from analyses.collapse.prompts import Growing, Merged, grow
from probe.attention import AS_IT_IS, Visible
from probe.errors import UserError
from probe.growing import LastTokens, Say, read_last_tokens
from probe.language import LanguageModel
from probe.sites import Site, parse_site
from probe.tokens import context_size

PUBLISHED = (1, 2, 6, 11, 51, 101, 501, 1001, 2001)
"""Lengths of figure 5."""
PER_DECADE = 12
"""Lengths between two powers of ten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What a curve is of."""

    family: Family
    """What is repeated."""
    form: Form = "raw"
    """What stands around it."""
    visible: Visible = AS_IT_IS
    """Which tokens are attended to."""
    more: tuple[int, ...] = (1,)
    """By how many repetitions the partner is longer."""


def lengths_up_to(longest: int) -> list[int]:
    """The paper's lengths and others between them, evenly on a logarithmic axis."""
    steps = torch.arange(0, 8 * PER_DECADE) / PER_DECADE
    spread = {round(10 ** float(step)) for step in steps}
    return sorted(n for n in spread | set(PUBLISHED) | {longest} if n <= longest)


def final_site(model: LanguageModel) -> Site:
    """The final norm's output. Raises `UserError` where the model's norm is not known by name."""
    if model.names is None:
        raise UserError(
            f"{model.spec} is a {type(model.model).__name__}, whose layers are not known by name; "
            "choose another model."
        )
    return parse_site(f"module:{model.names.final_norm}")


def stream_sites(model: LanguageModel) -> list[Site]:
    """The residual stream behind every block, then the final norm's output."""
    layers = [parse_site(f"resid_post.{layer}") for layer in range(model.n_layers)]
    return [*layers, final_site(model)]


def longest_that_fits(model: LanguageModel, growing: Growing) -> int:
    """Repetitions that the model's context has room for, at most those of `growing`."""
    size = context_size(model)
    behind = len(growing.suffix) + 2 * len(growing.last)
    fits = [n for n, end in enumerate(growing.ends) if size is None or end + behind <= size]
    return fits[-1]


def curve(
    model: LanguageModel,
    condition: Condition,
    lengths: Sequence[int],
    *,
    unit: int = 0,
    merged: Merged = "correct",
    say: Say | None = None,
) -> pd.DataFrame:
    """A curve of one phrasing.

    Args:
        model: the model.
        condition: what is measured.
        lengths: numbers of repetitions, each 1 or more.
        unit: which phrasing, and the seed of what is random.
        merged: what to do where the tokenizer merges digits.
        say: told of progress.

    Returns:
        A row a length, partner and layer: `n`, `more`, `layer` (the block; one past the last: the
        final norm), `distance`, and of blocks `head_mean`, `head_low`, `head_high`; of the final
        norm `same_top`, whether the likeliest next token is the same.

    Raises `UserError` where a length is beyond the context, or as `grow` does.
    """
    longest = max(lengths) + max(condition.more)
    growing = grow(
        model, condition.family, longest, form=condition.form, phrasing=unit, seed=unit,
        merged=merged,
    )  # fmt: skip
    stream = stream_sites(model)
    heads = [parse_site(f"head_out.{layer}") for layer in range(model.n_layers)]
    readings = [growing.reading(n, extra) for n in lengths for extra in (0, *condition.more)]
    last = read_last_tokens(
        model, growing.trunk, readings, [*stream, *heads], visible=condition.visible, say=say
    )
    stride = 1 + len(condition.more)
    tables = [
        _pairs(model, last, stream, heads, stride, place).assign(more=more)
        for place, more in enumerate(condition.more, start=1)
    ]
    return pd.concat([table.assign(n=_by_layer(lengths, len(stream))) for table in tables])


def _by_layer(lengths: Sequence[int], n_layers: int) -> list[int]:
    return [n for _ in range(n_layers) for n in lengths]


def _pairs(
    model: LanguageModel,
    last: LastTokens,
    stream: Sequence[Site],
    heads: Sequence[Site],
    stride: int,
    place: int,
) -> pd.DataFrame:
    """Distances of each length's prompt and one of its partners, layer by layer."""
    frames = []
    for layer, site in enumerate(stream):
        rows = last.values[site]
        frame = {"layer": layer, "distance": relative(rows[::stride], rows[place::stride]).numpy()}
        if layer < len(heads):
            rows = last.values[heads[layer]]
            furthest = by_head(rows[::stride], rows[place::stride], n_heads(model))
            frame |= {
                "head_mean": furthest.mean(-1).numpy(), "head_low": furthest.amin(-1).numpy(),
                "head_high": furthest.amax(-1).numpy(),
            }  # fmt: skip
        else:
            top = last.logits.argmax(-1)
            frame["same_top"] = (top[::stride] == top[place::stride]).float().numpy()
        frames.append(pd.DataFrame(frame))
    return pd.concat(frames)


def n_heads(model: LanguageModel) -> int:
    """Attention heads of a layer."""
    return model.model.config.get_text_config().num_attention_heads


def relative(y: Float[Tensor, "r d"], other: Float[Tensor, "r d"]) -> Float[Tensor, " r"]:
    """Euclidean distance of rows over the length of the first."""
    return (y.double() - other.double()).norm(dim=-1) / y.double().norm(dim=-1)


def by_head(
    z: Float[Tensor, "r d"], other: Float[Tensor, "r d"], heads: int
) -> Float[Tensor, "r h"]:
    """The largest absolute difference of each head's part."""
    return (z - other).abs().unflatten(-1, (heads, -1)).amax(-1)
