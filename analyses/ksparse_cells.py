"""The cells of the k-sparse study: one method, one seed, one k, each measured once and kept.

A cell learns features from the training images, reads the classes out of them with a linear probe,
and is a run folder below `<root>/saes/ksparse/` whose `result.json` holds what was measured. Its
config says everything that decides the numbers, so a study that was stopped, or asked again with
more seeds, goes on with the cells there are. Autoencoders in training are runs inside the cell's
folder, with checkpoints; once the cell is measured they go, but for a few filters.

Methods:

- `pixels`: the images themselves;
- `pca`: their first principal components (as many as validation prefers);
- `untrained`: codes of a random dictionary of as many units, k of them active (as many as
  validation prefers): what the non-linearity gives without any learning;
- `denoising`: hidden units of a denoising autoencoder (`analyses.denoising`);
- `k_sparse`: codes of the k-sparse autoencoder (Makhzani and Frey 2013, arXiv 1312.5663), with
  alpha k of them kept (section 2.1).
"""

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from scipy import sparse
from torch import Tensor

from analyses.denoising import DenoisingConfig, fit_denoising, hidden_units
from analyses.images import ImageData
from analyses.linear_probes import (
    STRENGTHS,
    Features,
    ProbeResult,
    Rows,
    features_of,
    probe_features,
)
from probe.loader import TensorSource
from probe.runs import Run, atomic_path, read_json, write_json
from saes.activations import KSparse
from saes.baselines import fit_principal_axes, random_dictionary_candidate
from saes.metrics import FidelityMeter
from saes.models import SaeConfig, SparseAutoencoder
from saes.training import Job, TrainConfig, fit
from saes.types import Codes

Method = Literal["pixels", "pca", "untrained", "denoising", "k_sparse"]
CELL, TRAINING = "ksparse_cell", "ksparse_training"
RESULT, FILTERS = "result.json", "filters.safetensors"
SCHEMA = 1
COMPONENTS = (25, 50, 100, 200)
"""Numbers of principal components to choose from."""
N_FILTERS = 48
"""Filters kept for the figure."""
DENSE_FROM = 0.15
"""Share of non-zero codes from which a dense matrix is the faster one for a probe."""
ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all cells of a study share."""

    data: ImageData
    """The images."""
    train: TrainConfig
    """Units, steps, learning rate and its course; seed and activation are the cell's."""
    batch_size: int
    """Images in a batch."""
    ks: tuple[int, ...]
    """What the untrained dictionary chooses its k from."""
    alphas: tuple[float, ...]
    """How many times k units are kept for the probe."""
    k_start: int
    """Active units at the start of an annealed training."""
    anneal_share: float
    """Share of the steps over which their number falls."""
    denoising_lr: float
    """The denoising autoencoder's learning rate."""
    noise: float
    """Share of the pixels that it loses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One thing to train and probe."""

    method: Method
    """How features are made."""
    seed: int = 0
    """Seed of weights and batches."""
    k: int = 0
    """Active units (k_sparse)."""
    annealed: bool = False
    """Whether their number starts higher (k_sparse)."""

    @property
    def name(self) -> str:
        """Its name in folders and progress bars."""
        k = f"-k{self.k}{'-annealed' if self.annealed else ''}" if self.k else ""
        return f"{self.method}{k}-seed{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A probe on one reading of a cell's features."""

    setting: float
    """alpha (k_sparse), k (untrained), number of components (pca); else 0."""
    probe: ProbeResult
    """What the probe gets wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """What was measured of a cell."""

    cell: Cell
    """The cell."""
    variants: tuple[Variant, ...]
    """Its probes."""
    facts: dict[str, float]
    """Of a k-sparse autoencoder: `fvu` on test images, `dead_share` of the units on training
    images, `extent` of its filters."""

    @property
    def best(self) -> Variant:
        """The variant with the smallest validation error; the first one of equal ones."""
        return min(self.variants, key=lambda variant: variant.probe.validation_error)


def measure_cell(cell: Cell, settings: Settings, root: Path) -> tuple[CellResult, Run]:
    """The cell's result, measured now or found; raises as training does."""
    run = Run.create(root / "saes" / "ksparse", cell.name, cell_config(cell, settings))
    with run.lock():
        if not run.complete:
            METHODS[cell.method](cell, settings, run)
            run.finish(
                summary=read_json(run.path / RESULT)["facts"],
                inputs={"images": settings.data.checksum},
                seeds={"train": cell.seed},
                device="cpu",
            )
        for training in run.path.glob("training-*"):
            shutil.rmtree(training)
    return read_result(cell, run), run


def cell_config(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Everything that decides the cell's numbers."""
    return {
        "kind": CELL,
        "schema": SCHEMA,
        "images": settings.data.checksum,
        "n": settings.data.sizes,
        "strengths": STRENGTHS,
        **asdict(cell),
        **_method_config(cell, settings),
    }


def _method_config(cell: Cell, settings: Settings) -> dict[str, Any]:
    match cell.method:
        case "pixels":
            return {}
        case "pca":
            return {"components": COMPONENTS}
        case "untrained":
            return {"units": settings.train.d_sae, "ks": settings.ks}
        case "denoising":
            config = asdict(denoising_config(cell, settings))
            return {"training": config, "batch_size": settings.batch_size}
        case "k_sparse":
            config = asdict(train_config(cell, settings))
            return {
                "training": config,
                "batch_size": settings.batch_size,
                "alphas": settings.alphas,
            }


def train_config(cell: Cell, settings: Settings) -> TrainConfig:
    """How a k-sparse cell is trained."""
    activation = KSparse(
        k=cell.k,
        k_start=settings.k_start if cell.annealed else None,
        anneal_share=settings.anneal_share,
    )
    return replace(settings.train, activation=activation, seed=cell.seed)


def denoising_config(cell: Cell, settings: Settings) -> DenoisingConfig:
    """How a denoising cell is trained: as the k-sparse ones but for the learning rate."""
    train = replace(settings.train, lr=settings.denoising_lr, seed=cell.seed)
    return DenoisingConfig(noise=settings.noise, train=train)


def read_result(cell: Cell, run: Run) -> CellResult:
    """What a cell's folder says. Raises `Failure` where it is damaged."""
    _ = run.manifest
    result = read_json(run.path / RESULT)
    variants = tuple(
        Variant(
            setting=row["setting"],
            probe=ProbeResult(
                strength=row["strength"],
                validation_error=row["validation_error"],
                wrong=np.array(row["wrong"], dtype=np.int64),
            ),
        )
        for row in result["variants"]
    )
    return CellResult(cell=cell, variants=variants, facts=result["facts"])


def read_filters(run: Run, shape: tuple[int, int]) -> Float[np.ndarray, "n h w"]:
    """The filters that a k-sparse cell kept."""
    filters = load_file(run.path / FILTERS)["filters"].float().numpy()
    return filters.reshape(-1, *shape)


# ------------------------------------------------------------------------------ the methods


def _measure_pixels(cell: Cell, settings: Settings, run: Run) -> None:
    _write(run, settings, [(0.0, features_of(settings.data, lambda pixels: pixels))], {})


def _measure_pca(cell: Cell, settings: Settings, run: Run) -> None:
    train = torch.from_numpy(settings.data.train.pixels)
    axes = fit_principal_axes(train.split(ROWS_AT_ONCE), train[0])
    mean, directions = axes.mean.float().numpy(), axes.axes.float().numpy()

    def scores(n: int) -> Features:
        return features_of(settings.data, lambda pixels: (pixels - mean) @ directions[:, :n])

    sizes = sorted({min(n, *train.shape) for n in COMPONENTS})
    _write(run, settings, ((float(n), scores(n)) for n in sizes), {})


def _measure_untrained(cell: Cell, settings: Settings, run: Run) -> None:
    train = torch.from_numpy(settings.data.train.pixels)
    units = settings.train.d_sae

    def codes(k: int) -> Features:
        candidate = random_dictionary_candidate(train, train.mean(0), units, k, cell.seed)
        return code_features(lambda x: candidate.reconstruct(x).codes, settings.data, units)

    _write(run, settings, ((float(k), codes(k)) for k in settings.ks), {})


def _measure_denoising(cell: Cell, settings: Settings, run: Run) -> None:
    train = torch.from_numpy(settings.data.train.pixels)
    source = TensorSource(train, settings.batch_size, cell.seed)
    model = fit_denoising(source, denoising_config(cell, settings))
    features = features_of(settings.data, functools.partial(hidden_units, model))
    _write(run, settings, [(0.0, features)], {})


def _measure_k_sparse(cell: Cell, settings: Settings, run: Run) -> None:
    train = torch.from_numpy(settings.data.train.pixels)
    source = TensorSource(train, settings.batch_size, cell.seed)
    config = train_config(cell, settings)
    inside = Run.create(run.path, "training", {"kind": TRAINING, "config": asdict(config)})
    (sae,) = fit([Job(run=inside, config=config)], source, progress=False)
    seen = meter(sae, train)
    assert seen.fired is not None
    with atomic_path(run.path / FILTERS) as temporary:
        save_file({"filters": kept_filters(sae, seen.fired)}, temporary)
    tested = meter(sae, torch.from_numpy(settings.data.test.pixels))
    facts = {
        "fvu": tested.metrics()["fvu"],
        "dead_share": seen.metrics()["dead_share"],
        "extent": filter_extent(sae.W_dec[seen.fired > 0]),
    }
    variants = (
        (alpha, code_features(with_alpha(sae, alpha).encode, settings.data, config.d_sae))
        for alpha in settings.alphas
        if KSparse(k=cell.k, alpha=alpha).k_encode <= config.d_sae
    )
    _write(run, settings, variants, facts)


METHODS: dict[Method, Callable[[Cell, Settings, Run], None]] = {
    "pixels": _measure_pixels,
    "pca": _measure_pca,
    "untrained": _measure_untrained,
    "denoising": _measure_denoising,
    "k_sparse": _measure_k_sparse,
}


def _write(
    run: Run,
    settings: Settings,
    variants: Sequence[tuple[float, Features]] | Iterator[tuple[float, Features]],
    facts: dict[str, float],
) -> None:
    """Probe every variant and write the result."""
    rows = []
    for setting, features in variants:
        result = probe_features(features, settings.data)
        rows.append({"setting": setting} | asdict(result) | {"wrong": result.wrong.tolist()})
    write_json(run.path / RESULT, {"variants": rows, "facts": facts})


# ------------------------------------------------------------------------------ the autoencoder


def with_alpha(sae: SparseAutoencoder, alpha: float) -> SparseAutoencoder:
    """The same autoencoder keeping alpha k units."""
    activation = sae.config.activation
    assert isinstance(activation, KSparse)
    kept = replace(activation, alpha=alpha, k_start=None)
    config = SaeConfig(
        d_in=sae.config.d_in, d_sae=sae.config.d_sae, activation=kept, tied=sae.config.tied
    )
    return SparseAutoencoder.from_tensors(config, sae.tensors())


def meter(sae: SparseAutoencoder, x: Float[Tensor, "n d"]) -> FidelityMeter:
    """Fidelity and firing counts of an autoencoder on some images."""
    filled = FidelityMeter(n_latents=sae.config.d_sae)
    with torch.no_grad():
        for part in x.split(ROWS_AT_ONCE):
            filled.update(part, sae(part))
    return filled


def kept_filters(sae: SparseAutoencoder, fired: Tensor) -> Float[Tensor, "n d"]:
    """The weights of `N_FILTERS` units that fire, evenly spaced from the most to the least active.

    `fired` counts the images on which each unit fires; fewer are given where fewer fire.
    """
    order = torch.argsort(fired, descending=True, stable=True)[: int((fired > 0).sum())]
    places = torch.linspace(0, len(order) - 1, min(N_FILTERS, len(order))).round().long()
    return sae.W_dec.detach()[order[places]].contiguous()


def filter_extent(weights: Float[Tensor, "s d"]) -> float:
    """Share of the image that a filter covers, mean over units: (sum w^2)^2 / (d sum w^4).

    1 for weights of one size everywhere, 1 / d for a single pixel (the participation ratio, Bell
    and Dean 1970). nan where there is no unit.
    """
    squares = weights.detach().double().square()
    shares = squares.sum(1).square() / squares.square().sum(1).clamp_min(1e-300)
    return float(shares.mean()) / weights.shape[1]


@torch.no_grad()
def code_features(encode: Callable[[Tensor], Codes], data: ImageData, units: int) -> Features:
    """Codes of all three parts, as what a probe reads."""
    return features_of(data, lambda pixels: as_rows(encode(torch.from_numpy(pixels)), units))


def as_rows(codes: Codes, units: int) -> Rows:
    """Codes as a matrix over all units: sparse, or dense where a probe is then faster."""
    n, k = codes.values.shape
    if k > DENSE_FROM * units:
        return codes.dense(units).numpy()
    starts = np.arange(0, n * k + 1, k)
    rows = sparse.csr_array(
        (codes.values.reshape(-1).numpy(), codes.indices.reshape(-1).numpy(), starts),
        shape=(n, units),
    )
    rows.sum_duplicates()  # padding names latent 0, which may be there already
    return rows
