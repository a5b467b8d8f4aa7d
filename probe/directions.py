"""Directions that tell two sets of prompts apart: the difference of their mean activations.

    r(s, p) = mean over positive prompts of x(s, p) - mean over negative prompts of x(s, p)

with `x(s, p)` the activation at site `s` and position `p`, counted from the end of the prompt
(Arditi et al. 2024, arXiv 2406.11717, equations 1 to 3, who read `resid_pre` at the tokens of the
chat template after the instruction; Marks and Tegmark 2023, arXiv 2310.06824, as a probe). Means
are summed up in float64, pass by pass: nothing of the prompts is kept.

A direction on disk is one safetensors file, `direction` [d] float32, whose metadata is the JSON of
`Direction` but for the vector, under the key `lorgnette`. The vector keeps its length: adding it
once moves the mean of the negative prompts to that of the positive ones. `mean`, `sd` and `max` are
of the projection `x . r^` of reference text on the direction of length 1.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from probe.capture import capturing
from probe.corpora import TokenBatch
from probe.errors import UserError
from probe.language import LanguageModel
from probe.prompt_sets import Row, last_token_passes
from probe.runs import atomic_path
from probe.sites import Site, parse_site

SCHEMA = 1
TENSOR, METADATA = "direction", "lorgnette"
NUMBER = (float, int, type(None))
FIELDS: dict[str, tuple[type, ...]] = {
    "site": (str,), "model": (str,), "random_weights": (int, type(None)), "name": (str,),
    "position": (int,), "mean": NUMBER, "sd": NUMBER, "max": NUMBER,
}  # fmt: skip
"""What the metadata holds beside the schema, and of which kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """A direction in a model's activations, with its length."""

    vector: Float[Tensor, " d"]
    """The direction, float32; its length is the difference of the means."""
    site: Site
    """Where it was found."""
    model: str
    """The model, as it was asked for."""
    random_weights: int | None = None
    """Seed of the model's weights where they are random."""
    name: str = "direction"
    """What it tells apart, in a word or two."""
    position: int = -1
    """Position at which it was found, counted from the end of the prompt."""
    mean: float | int | None = None
    """Mean of the projection of reference text on the unit direction; None where unmeasured."""
    sd: float | int | None = None
    """Its standard deviation."""
    max: float | int | None = None
    """Its largest value."""

    def __post_init__(self) -> None:
        check_vector(self.vector, f"direction {self.name!r}")

    @property
    def norm(self) -> float:
        """Length of the vector."""
        return float(self.vector.double().norm())

    @property
    def unit(self) -> Float[Tensor, " d"]:
        """The vector at length 1."""
        return unit(self.vector)

    def check_model(self, model: LanguageModel) -> None:
        """Raise `UserError` where the direction is not as wide as a model's residual stream."""
        check_vector(self.vector, f"direction {self.name!r}", width=model.d_model)


def check_vector(vector: Tensor, what: str, *, width: int | None = None) -> None:
    """Raise `UserError` unless a vector is a direction: one axis, finite, not zero, of a width."""
    if vector.ndim != 1 or not len(vector):
        raise UserError(f"{what} must be one vector, got the shape {list(vector.shape)}.")
    if width is not None and len(vector) != width:
        raise UserError(
            f"{what} has {len(vector)} numbers where the model is {width} wide; "
            "give one that was made for this model."
        )
    if not torch.isfinite(vector).all():
        raise UserError(f"{what} is not finite; make it again.")
    if not vector.any():
        raise UserError(f"{what} is zero everywhere, which points nowhere; make it again.")


def unit(vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """A vector at length 1, float32."""
    return (vector.double() / vector.double().norm()).float()


@torch.inference_mode()
def weighted_sums(
    model: LanguageModel,
    rows: Sequence[Row],
    weights: Float[Tensor, "r n"],
    sites: Sequence[Site],
    positions: Sequence[int],
) -> Float64[Tensor, "r s p d"]:
    """`sum_i weights[r, i] x_i(s, p)` over prompts i, for every site and position, in one go.

    Args:
        model: the model.
        rows: the prompts.
        weights: one row for each sum wanted.
        sites: where to read; all of one width.
        positions: below 0, counted from the end of the prompt.

    Raises:
        UserError: there is no prompt, a site is not in the model, or a prompt is too short.
    """
    total: Tensor | None = None
    for members, values in _readings(model, rows, sites, positions):
        part = weights[:, members].double().to(values.device)
        summed = torch.einsum("rn,nspd->rspd", part, values.double())
        total = summed if total is None else total + summed
    assert total is not None, "there is a prompt"
    return total.cpu()


@torch.inference_mode()
def read_rows(
    model: LanguageModel, rows: Sequence[Row], sites: Sequence[Site], positions: Sequence[int]
) -> Float[Tensor, "n s p d"]:
    """Every prompt's activation at every site and position, float32. Raises as `weighted_sums`."""
    found: dict[int, Tensor] = {}
    for members, values in _readings(model, rows, sites, positions):
        found |= dict(zip(members, values.float().cpu(), strict=True))
    return torch.stack([found[number] for number in range(len(rows))])


def _readings(
    model: LanguageModel, rows: Sequence[Row], sites: Sequence[Site], positions: Sequence[int]
) -> Iterable[tuple[list[int], Float[Tensor, "n s p d"]]]:
    """Prompts' activations pass by pass, with the prompts' numbers."""
    _check_asked(rows, sites, positions)
    with capturing(model, sites, early_exit=False) as seen:
        for done in last_token_passes(model, rows, keep=-min(positions)):
            ends = [seen[site][:, list(positions)] for site in sites]
            if len({end.shape[-1] for end in ends}) > 1:
                raise UserError("sites of one width were wanted; ask for the others on their own.")
            yield done.members, torch.stack(ends, dim=1)


def _check_asked(rows: Sequence[Row], sites: Sequence[Site], positions: Sequence[int]) -> None:
    if not rows:
        raise UserError("no prompt was given; a direction takes at least one of each set.")
    if not sites:
        raise UserError("no site was given; name at least one, such as resid_pre.*.")
    if not positions or max(positions) >= 0:
        raise UserError(
            f"positions count back from the end, -1 the last token; got {list(positions)}."
        )


def mean_differences(
    model: LanguageModel,
    positive: Sequence[Row],
    negative: Sequence[Row],
    sites: Sequence[Site],
    positions: Sequence[int],
) -> Float64[Tensor, "s p d"]:
    """Mean of the positive prompts minus mean of the negative ones, by site and position.

    Raises `UserError` where a set is empty, and as `weighted_sums`.
    """
    for name, rows in (("positive", positive), ("negative", negative)):
        if not rows:
            raise UserError(f"the {name} set has no prompt; a direction takes at least one.")
    weights = contrast_weights(torch.tensor([True] * len(positive) + [False] * len(negative)))
    return weighted_sums(model, [*positive, *negative], weights[None], sites, positions)[0]


def contrast_weights(positive: Tensor) -> Float64[Tensor, " n"]:
    """What each prompt weighs in a difference of means: 1 / n of its set, negative ones minus."""
    chosen = positive.double()
    return chosen / chosen.sum() - (1 - chosen) / (1 - chosen).sum()


@torch.inference_mode()
def projection_statistics(
    model: LanguageModel,
    vector: Float[Tensor, " d"],
    site: Site,
    batches: Iterable[TokenBatch],
) -> tuple[float, float, float]:
    """Mean, standard deviation and maximum of `x . r^` over the tokens of a text that are kept.

    Raises `UserError` where no token is kept.
    """
    n, total, squares, largest = 0, 0.0, 0.0, -math.inf
    for batch in batches:
        with capturing(model, [site]) as seen:
            model.run(batch.tokens)
        values = seen[site][batch.keep.to(model.device)].double() @ unit(vector).double().to(
            model.device
        )
        n, total = n + len(values), total + float(values.sum())
        squares += float((values**2).sum())
        largest = max(largest, float(values.max())) if len(values) else largest
    if n == 0:
        raise UserError("the reference text has no token that is kept; give more text.")
    return total / n, math.sqrt(max(0.0, squares / n - (total / n) ** 2)), largest


def save_direction(path: Path, direction: Direction) -> None:
    """Write a direction's file, whole or not at all."""
    facts: dict[str, Any] = {
        name: value for name, value in _plain(direction).items() if name != "vector"
    }
    metadata = {METADATA: json.dumps({"schema": SCHEMA} | facts, allow_nan=False)}
    tensor = direction.vector.detach().float().cpu().contiguous()
    with atomic_path(path) as temporary:
        save_file({TENSOR: tensor}, temporary, metadata=metadata)


def _plain(direction: Direction) -> dict[str, Any]:
    return asdict(direction) | {"site": str(direction.site)}


def load_direction(path: Path) -> Direction:
    """Read a direction's file. Raises `UserError` where it is not one that this version reads."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(METADATA)
            vector = file.get_tensor(TENSOR) if TENSOR in file.keys() else None  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a direction file ({error}); give one that `lorgnette analyse "
            "directions` wrote."
        ) from error
    facts = _facts(path, metadata)
    if vector is None:
        raise UserError(f"{path} holds no tensor {TENSOR!r}; make the direction again.")
    check_vector(vector, str(path))
    return Direction(vector=vector.float(), **facts)


def _facts(path: Path, metadata: str | None) -> dict[str, Any]:
    """The fields that the metadata gives."""
    try:
        facts = json.loads(metadata or "null")
    except ValueError as error:
        raise UserError(f"the metadata of {path} is not JSON ({error}); make it again.") from error
    found = facts.pop("schema", None) if isinstance(facts, dict) else None
    if found != SCHEMA:
        raise UserError(
            f"{path} has the schema {found!r} of a direction where this version reads {SCHEMA}; "
            "make it again."
        )
    wrong = [name for name, kinds in FIELDS.items() if not _is(facts, name, kinds)]
    wrong += sorted(set(facts) - set(FIELDS))
    if wrong:
        raise UserError(
            f"the metadata of {path} is not right at {', '.join(wrong)}; make the direction again."
        )
    return facts | {"site": parse_site(facts["site"])}


def _is(facts: dict[str, Any], name: str, kinds: tuple[type, ...]) -> bool:
    return name in facts and isinstance(facts[name], kinds) and not isinstance(facts[name], bool)
