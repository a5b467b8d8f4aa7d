"""The k-sparse autoencoder on images: the experiments of Makhzani and Frey 2013 (arXiv 1312.5663).

Asked of the product's one `SparseAutoencoder`, with `KSparse` and tied weights:

1. Is a linear probe on its codes best at an intermediate k (their figure 1 and tables 1 and 2)?
2. Does it beat raw pixels, PCA, a denoising autoencoder of the same budget, and an untrained
   dictionary, which the paper has not?
3. Does starting with more active units keep units from dying at small k (their section 4.2.1)?
4. Does it help the probe to keep alpha k units, alpha > 1 (section 2.1)?
5. Do the k largest entries of W^T x name the right units wherever their theorem promises it?

Every probe error is measured on images that neither an autoencoder nor a choice has seen. Intervals
resample seeds and test images together (`analyses.statistics.crossed_interval`); comparisons pair
the methods on seeds and images. Their own numbers come from 60,000 training images and 5,000
epochs, so they are no yardstick for fewer.
"""

from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from analyses import support_recovery
from analyses.images import ImageData, load_images
from analyses.ksparse_cells import COMPONENTS, Cell, Settings, measure_cell, read_filters
from analyses.ksparse_figures import figures
from analyses.ksparse_findings import numbers, tables, text, verdicts
from analyses.ksparse_measured import Config, Measured, is_annealed, spread
from analyses.linear_probes import STRENGTHS
from analyses.report import Report
from probe.errors import UserError
from probe.runs import Run
from saes.training import TrainConfig

__all__ = ["Config", "estimate", "figures", "measure", "run"]

FILTER_PANELS = 4
"""Values of k whose filters are shown."""
SECONDS_PER_STEP = 1.5e-10
"""Of k-sparse training on one core, for each image of a batch, pixel and unit."""
SECONDS_PER_PROBE = 1e-4
"""Of fitting a probe on one core, for each training image."""


def make_cells(config: Config) -> list[Cell]:
    """Everything to train and probe, the quick ones first."""
    seeds = range(config.seeds)
    cells = [Cell(method="pixels"), Cell(method="pca")]
    cells += [Cell(method="untrained", seed=seed) for seed in seeds]
    for seed in seeds:
        cells += [
            Cell(method="k_sparse", seed=seed, k=k, annealed=is_annealed(config, k))
            for k in config.ks
        ]
        cells += [
            Cell(method="k_sparse", seed=seed, k=k)
            for k in config.small_ks
            if is_annealed(config, k)
        ]
    return cells + [Cell(method="denoising", seed=seed) for seed in seeds]


def make_settings(config: Config, data: ImageData) -> Settings:
    """What all cells share. Raises `UserError` where the images are fewer than a batch."""
    n = len(data.train.labels)
    if config.batch_size > n:
        raise UserError(f"batch_size {config.batch_size} is more than the {n} training images.")
    steps = config.epochs * (n // config.batch_size)
    train = TrainConfig(
        d_sae=config.units, steps=steps, normalize="none", lr=config.lr,
        warmup_steps=steps // 20, decay_share=0.3, auxk_alpha=0.0, init_rows=min(n, 8192),
    )  # fmt: skip
    return Settings(
        data=data, train=train, batch_size=config.batch_size, ks=config.ks, alphas=config.alphas,
        k_start=config.k_start, anneal_share=config.anneal_share,
        denoising_lr=config.denoising_lr, noise=config.noise,
    )  # fmt: skip


def estimate(config: Config) -> dict[str, str]:
    """What the study would do."""
    data = load_images(config.images)
    settings, cells = make_settings(config, data), make_cells(config)
    n_train, n_validation, n_test = data.sizes
    trained = [cell for cell in cells if cell.method in ("k_sparse", "denoising")]
    readings = {"pca": len(COMPONENTS), "untrained": len(config.ks), "k_sparse": len(config.alphas)}
    n_probes = len(STRENGTHS) * sum(readings.get(cell.method, 1) for cell in cells)
    step = SECONDS_PER_STEP * config.batch_size * data.d * config.units
    seconds = len(trained) * settings.train.steps * step + n_probes * n_train * SECONDS_PER_PROBE
    return {
        "images": f"{data.name} ({data.source}), {data.shape[0]} x {data.shape[1]}: {n_train} to "
        f"train on, {n_validation} to choose on, {n_test} to test on",
        "autoencoders": f"{len(trained)}: {config.units} units, {settings.train.steps} steps of "
        f"{config.batch_size} images each",
        "probes": f"{n_probes} fits",
        "kept in": "saes/ksparse below the root, a folder each; what is there is not done again",
        "time": f"about {max(1, round(seconds / 60))} min on one core",
    }


def measure(config: Config, root: Path) -> Measured:
    """Train and probe every cell that is not there yet, and check the theorem."""
    data = load_images(config.images)
    settings, results, filters = make_settings(config, data), [], {}
    shown = spread(config.ks, FILTER_PANELS)
    with tqdm(make_cells(config), desc="ksparse", unit="cell") as bar:
        for cell in bar:
            bar.set_postfix_str(cell.name)
            result, run = measure_cell(cell, settings, root)
            results.append(result)
            in_sweep = cell.annealed == is_annealed(config, cell.k)
            if cell.method == "k_sparse" and cell.seed == 0 and cell.k in shown and in_sweep:
                filters[f"k = {cell.k}"] = read_filters(run, data.shape)
    return Measured(
        config=config,
        images=data.name,
        source=data.source,
        n=data.sizes,
        results=tuple(results),
        filters=filters,
        trials=support_recovery.check_theorem(config.trials, seed=0),
    )


def run(config: Config, root: Path) -> Run:
    """Measure and write the report, or find it; gives its run.

    Raises `UserError` where images and options do not fit, before anything is written.
    """
    data = load_images(config.images)
    make_settings(config, data)
    described = asdict(config) | {"images": data.checksum}
    folder = Run.create(
        root / "reports" / "ksparse",
        data.name,
        {"kind": "report", "schema": 1, "study": "ksparse", **described},
    )
    with folder.lock():
        if not folder.complete:
            measured = measure(config, root)
            seeds = {f"training {seed}": seed for seed in range(config.seeds)} | {"theorem": 0}
            make_report(measured).write(folder, inputs={"images": data.checksum}, seeds=seeds)
    return folder


def make_report(measured: Measured) -> Report:
    """What was found."""
    return Report(
        title=f"The k-sparse autoencoder on {measured.images}",
        text=text(measured),
        verdicts=tuple(verdicts(measured)),
        numbers=numbers(measured),
        tables=tables(measured),
        figures=figures(measured),
    )
