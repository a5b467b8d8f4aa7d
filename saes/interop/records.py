"""What passes between the formats and the rest, as small frozen records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from saes.models import SparseAutoencoder
from saes.scales import FeatureScales

OWN_KEYS = ("model_name", "hook_name", "site", "context_size", "dataset_path", "frozen")


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a format's own formula, written densely, says of some rows."""

    codes: Float[Tensor, "n s"]
    """The code of each row over all latents."""
    reconstruction: Float[Tensor, "n d"]
    """What the codes say the rows were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a format's module reads."""

    sae: SparseAutoencoder
    """The SAE."""
    metadata: dict[str, Any]
    """Where it belongs, in the words of SAELens (`model_name`, `hook_name`, ...) and, where that is
    known, `site` in ours."""
    notes: tuple[str, ...]
    """What changed its meaning or its place on the way, a sentence each."""
    says: Callable[[Float[Tensor, "n d"]], Said]
    """The format's own formula on the tensors as they were read: the SAE is held against it."""
    scales: FeatureScales | None = None
    """How strongly each feature fires, where the format says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """An SAE of another project, once it says what its format says."""

    format: str
    """The format's name, one of `READABLE`."""
    sae: SparseAutoencoder
    """The SAE, on the CPU, not to be trained further by itself."""
    metadata: dict[str, Any]
    """Where it belongs; `converted_from` holds the other project's own description."""
    notes: tuple[str, ...]
    """What changed its meaning or its place on the way, a sentence each."""
    scales: FeatureScales | None = None
    """How strongly each feature fires, where the other project says it."""


OWN_KEY = "lorgnette"
"""Where a description file of another project carries what only we read."""


def own_words(metadata: Mapping[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """What is written under `OWN_KEY`: where the SAE belongs, and what the format does not hold."""
    said = {key: metadata[key] for key in OWN_KEYS if metadata.get(key) is not None}
    return said | {"notes": list(notes)}


def read_own_words(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Where the SAE belongs, as a folder of our own writing says; nothing in others."""
    said = cfg.get(OWN_KEY)
    return {key: said[key] for key in OWN_KEYS if key in said} if isinstance(said, dict) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written of an SAE, in another project's format."""

    sae: SparseAutoencoder
    """The SAE as the format can hold it: the one given, or the nearest that it can."""
    notes: tuple[str, ...]
    """What the format does not hold, a sentence each."""
