"""The rows that are kept of a model's pass over a batch: which tokens, and which norms.

Of text, position 0 and special tokens carry outlier norms (Sun et al. 2024, 2402.17762) and are
left out. Where a sequence begins with a repeated or a punctuation token the outlier moves to a
later position, so rows whose norm is over `max_norm` medians of the first batch are left out too:
in SmolLM2's middle layers 1 row in 4,000, with nine tenths of the variance. Of images every place
is kept, or a sample of them, whatever its norm.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from probe.capture import capturing
from probe.corpora import TokenBatch
from probe.diffusion import DiffusionModel, Generated
from probe.errors import Failure, UserError
from probe.image_prompts import PassBatch
from probe.language import LanguageModel
from probe.sites import Site

Batch = TokenBatch | PassBatch


def capture_rows(
    model: LanguageModel | DiffusionModel,
    batch: Batch,
    sites: Sequence[Site],
    dtype: torch.dtype,
    drawn: Callable[[Generated], None] | None = None,
) -> dict[Site, Float[Tensor, "n d"]]:
    """The activations of a batch's kept places at each site, in `dtype`, on the model's device.

    Args:
        model: a language model for token batches, an image model for passes.
        batch: what it reads or draws.
        sites: where to read it.
        dtype: the rows'.
        drawn: called with the images, which are finished only then.

    Raises `UserError` where a site is not reached or is not `[b, t, d]`, and `Failure` where a
    value is not finite: the message says which site, document and position.
    """
    seen = _run(model, batch, sites, drawn)
    kept = batch.keep.flatten().nonzero().squeeze(1)
    rows = {}
    for site in sites:
        if site not in seen or seen[site].shape[:-1] != batch.tokens.shape:
            found = list(seen[site].shape) if site in seen else "nothing"
            raise UserError(
                f"site {site} gave {found} where [sequences, positions, width] = "
                f"[{', '.join(map(str, batch.tokens.shape))}, d] was wanted; choose another site."
            )
        raw = seen[site].flatten(0, 1).index_select(0, kept.to(seen[site].device))
        rows[site] = raw.to(dtype)
        if not rows[site].isfinite().all():
            raise _not_finite(site, batch, kept, raw, rows[site])
    return rows


def _run(
    model: LanguageModel | DiffusionModel,
    batch: Batch,
    sites: Sequence[Site],
    drawn: Callable[[Generated], None] | None,
) -> dict[Site, Tensor]:
    if isinstance(batch, PassBatch):
        assert isinstance(model, DiffusionModel), "only an image model draws"
        values, images = batch.run(model, list(sites), draw=drawn is not None)
        if drawn is not None and images is not None:
            drawn(images)
        return values
    assert isinstance(model, LanguageModel), "only a language model reads tokens"
    with torch.no_grad(), capturing(model, sites) as seen:
        model.run(batch.tokens)
    return seen


def norm_limits(rows: Mapping[Site, Float[Tensor, "n d"]], max_norm: float) -> dict[Site, float]:
    """The largest usual norm at each site: `max_norm` medians of these rows; infinity for 0."""
    if max_norm == 0:
        return dict.fromkeys(rows, math.inf)
    return {site: max_norm * float(row_norms(values).median()) for site, values in rows.items()}


def row_norms(values: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Euclidean norm of each row, in float32."""
    return torch.linalg.vector_norm(values, dim=1, dtype=torch.float32)


def without_outliers(
    batch: Batch, rows: Mapping[Site, Float[Tensor, "n d"]], limits: Mapping[Site, float]
) -> tuple[Batch, dict[Site, Float[Tensor, "m d"]]]:
    """The batch and its rows without those whose norm is above the limit at any site."""
    usual = torch.stack([row_norms(values) <= limits[site] for site, values in rows.items()]).all(0)
    if usual.all():
        return batch, dict(rows)
    keep = batch.keep.clone()
    keep[batch.keep] = usual.to(keep.device)
    return replace(batch, keep=keep), {site: values[usual] for site, values in rows.items()}


def _not_finite(site: Site, batch: Batch, kept: Tensor, raw: Tensor, row: Tensor) -> Failure:
    first = int((~row.isfinite()).any(1).nonzero()[0])
    where = batch.named(*divmod(int(kept[first]), batch.tokens.shape[1]))
    if raw[first].isfinite().all():
        return Failure(
            f"site {site} gave {float(raw[first].abs().max()):g} at {where}, too large for "
            f"{row.dtype}; store it as bfloat16 or float32."
        )
    what = "document" if isinstance(batch, TokenBatch) else "prompt"
    return Failure(
        f"site {site} gave NaN or infinity at {where}; run the model in float32, or leave out that "
        f"{what}."
    )
