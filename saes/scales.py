"""How strongly each feature of an SAE fires: the unit of a painter's brush.

An SAE that came with such sizes keeps them in its folder, as `feature_scales.safetensors` (`mean`
and `sd`, [s] float32); of others an index counts its own.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from probe.errors import Failure
from probe.runs import atomic_path
from saes.models import SparseAutoencoder

SCALES = "feature_scales.safetensors"
ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureScales:
    """How strongly each feature fires where it does."""

    mean: Float[Tensor, " s"]
    """Mean activation over the rows it fires on; 0 where it never does."""
    sd: Float[Tensor, " s"]
    """Standard deviation over the same rows (over n, not n - 1); all 0 where nobody says."""

    def times(self, factors: Float[Tensor, " s"]) -> "FeatureScales":
        """The scales of the same features where their codes are that many times as large."""
        return FeatureScales(mean=self.mean * factors, sd=self.sd * factors)


def save_scales(folder: Path, scales: FeatureScales) -> None:
    """Keep scales in an SAE's folder."""
    with atomic_path(folder / SCALES) as temporary:
        save_file({"mean": scales.mean.contiguous(), "sd": scales.sd.contiguous()}, temporary)


def load_scales(folder: Path) -> FeatureScales | None:
    """The scales kept in an SAE's folder; None where it has none.

    Raises `Failure` where the file is damaged.
    """
    path = folder / SCALES
    if not path.is_file():
        return None
    try:
        found = load_file(path)
        return FeatureScales(mean=found["mean"], sd=found["sd"])
    except (SafetensorError, KeyError) as error:
        raise Failure(f"{path} is damaged ({error}); make the SAE's folder again.") from error


def feature_scales(sae: SparseAutoencoder, rows: Float[Tensor, "n d"]) -> FeatureScales:
    """The scales of all features over some activations."""
    n, total, squares = (
        torch.zeros(sae.config.d_sae, dtype=torch.float64) for _ in range(3)
    )  # fmt: skip
    for x in rows.split(ROWS_AT_ONCE):
        with torch.no_grad():
            codes = sae.encode(x)
        values, latents = codes.values.double().flatten(), codes.indices.flatten()
        fires = values != 0
        for sums, power in ((n, 0), (total, 1), (squares, 2)):
            sums.index_add_(0, latents[fires], values[fires] ** power)
    return _scales(n, total, squares)


def _scales(
    n: Float64[Tensor, " s"], total: Float64[Tensor, " s"], squares: Float64[Tensor, " s"]
) -> FeatureScales:
    count = n.clamp_min(1)
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    return FeatureScales(mean=mean.float(), sd=variance.sqrt().float())
