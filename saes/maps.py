"""A map of an SAE's features: its decoder directions in two dimensions.

    map.parquet        a row a feature that has a place: feature, pca_x, pca_y, tsne_x, tsne_y,
                       cluster (-1: none)
    clusters.parquet   a row a cluster: cluster, n_features, cohesion, chance, stands_out, name
    control-*.parquet  the same as map.parquet for directions of chance, and for the SAE of the
                       random-weight twin where one is given

Rows of `W_dec` are taken at unit length; features that never fire on the index, and rows of zeros,
have learned no direction and have no place. Two layouts:

- PCA: the first two principal components. They hold a small share of the variance, which the
  summary states.
- t-SNE (van der Maaten and Hinton 2008; Barnes-Hut, van der Maaten 2014) by cosine distance, from
  the PCA scaled to a spread of 1e-4 (Kobak and Berens 2019), with a stated perplexity, lowered to a
  third of the features where there are few. Who is whose neighbour can be read off it, and neither
  distance between groups nor density can.

All is computed on one thread and is the same for the same seed. Clusters and what they are worth:
`saes.map_clusters`. Controls go through exactly the same steps. A subject is written when it is
done, so a job that was killed goes on with the next.
"""

import contextlib
import io
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from probe.errors import Failure, UserError
from probe.runs import Run, atomic_path
from saes import chance
from saes.map_clusters import (
    cluster_sizes,
    cluster_table,
    cohesion,
    find_clusters,
    measure,
    neighbourhoods,
)

logger = logging.getLogger(__name__)

SCHEMA = 1
FEW = 5
"""Below so many features t-SNE has nothing to arrange, and its columns are those of the PCA."""
LEAST_STEPS = 400
"""The first 250 only gather (early exaggeration): groups come apart after them."""
SPREAD = 1e-4
"""Standard deviation of the first coordinate that t-SNE starts from."""
COLUMNS = pa.schema(
    [
        pa.field("feature", pa.int32()),
        *(pa.field(name, pa.float32()) for name in ("pca_x", "pca_y", "tsne_x", "tsne_y")),
        pa.field("cluster", pa.int32()),
    ]
)
CONTROLS = {"random": "random directions", "shaped": "random directions of the same covariance"}
"""Directions of chance, by the name in `control-<name>.parquet`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapConfig:
    """How the map is drawn."""

    perplexity: float = 30.0
    """t-SNE's perplexity: about how many neighbours a feature has a say in."""
    steps: int = 1000
    """t-SNE's steps at most; it stops where nothing moves any more."""
    min_cluster_size: int = 10
    """Features that a cluster has at least."""
    seed: int = 0
    """Seed of the controls and of t-SNE."""

    def __post_init__(self) -> None:
        if not 1 <= self.perplexity < float("inf"):
            raise UserError(f"the perplexity must be 1 or more; got {self.perplexity}.")
        if self.steps < LEAST_STEPS:
            raise UserError(f"t-SNE takes {LEAST_STEPS} steps or more; got {self.steps}.")
        if self.min_cluster_size < 2:
            raise UserError(f"a cluster has 2 features or more; got {self.min_cluster_size}.")

    def run_config(self, *, sae: str, index: str | None, twin: str | None) -> dict[str, Any]:
        """The run's config: hashes of the weights, of the index's manifest, of the twin's weights.

        `index` is None where the SAE has none, `twin` where none is given.
        """
        asked = {"sae": sae, "index": index, "twin": twin}
        return {"kind": "map", "schema": SCHEMA, **asked, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Directions in the plane, twice."""

    pca: Float[np.ndarray, "n 2"]
    """The first two principal components."""
    tsne: Float[np.ndarray, "n 2"]
    """The t-SNE plane."""


def build_map(
    run: Run,
    decoder: Float[np.ndarray, "s d"],
    config: MapConfig,
    *,
    alive: Bool[np.ndarray, " s"] | None = None,
    tokens: Sequence[list[str]] | None = None,
    twin: Float[np.ndarray, "m e"] | None = None,
    progress: bool = True,
) -> Run:
    """Fill the folder of a map.

    Args:
        run: its folder; finished parts in it are kept.
        decoder: rows of `W_dec`, of any length.
        config: how.
        alive: whether each feature fires at all; None where no index says.
        tokens: the tokens that drive each feature most; None where no index says.
        twin: rows of `W_dec` of the SAE of the random-weight twin, as one more control.
        progress: show bars.

    Raises `UserError` where no feature has a direction, or the twin's width is another.
    """
    features = placed(decoder, alive)
    if not len(features):
        raise UserError(
            f"no feature of {run.path.parent} has a direction to place: all are dead or zero; "
            "train the SAE before mapping it."
        )
    if twin is not None and twin.shape[1] != decoder.shape[1]:
        raise UserError(
            f"the twin's directions have width {twin.shape[1]} where the SAE's have "
            f"{decoder.shape[1]}; give the SAE that was trained at the same site of the twin."
        )
    directions = chance.unit(decoder[features])
    with run.lock(), threadpool_limits(1):
        own = _subject(run, "map", directions, features, config, progress)["cluster"].to_numpy()
        found = {"sae": measure(directions, own)}
        sizes, of_chance = sorted({*cluster_sizes(own).tolist()}), {}
        for name, (rows, numbers) in _controls(directions, config.seed, twin).items():
            table = _subject(run, f"control-{name}", rows, numbers, config, progress)
            found[name] = measure(rows, table["cluster"].to_numpy())
            if name in CONTROLS:
                best = neighbourhoods(rows, sizes)
                of_chance = {n: max(best[n], of_chance.get(n, -1.0)) for n in sizes}
        named = cluster_table(
            cohesion(directions, own),
            own,
            of_chance,
            None if tokens is None else [tokens[feature] for feature in features.tolist()],
        )
        _write(run, "clusters", pa.Table.from_pandas(named, preserve_index=False))
        summary = {
            "n_features": len(decoder),
            "n_placed": len(features),
            "perplexity": perplexity_of(len(features), config.perplexity),
            "pca_variance_share": variance_share(directions),
            "n_standing_out": int(np.count_nonzero(named["stands_out"])),
            "clusters": {name: clustering.summary() for name, clustering in found.items()},
        }
        inputs = {name: run.config[name] for name in ("sae", "index", "twin") if run.config[name]}
        run.finish(summary=summary, inputs=inputs, seeds={"map": config.seed}, device="cpu")
    return run


def _controls(
    directions: Float[np.ndarray, "n d"], seed: int, twin: Float[np.ndarray, "m d"] | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Directions to hold the SAE's own against, and their numbers, by name."""
    n, d = directions.shape
    numbers = np.arange(n)
    found = {
        "random": (chance.isotropic(n, d, seed), numbers),
        "shaped": (chance.shaped(directions, seed), numbers),
    }
    kept = numbers[:0] if twin is None else placed(twin, None)
    return found | (
        {"twin": (chance.unit(twin[kept]), kept)} if twin is not None and len(kept) else {}
    )


def placed(
    decoder: Float[np.ndarray, "s d"], alive: Bool[np.ndarray, " s"] | None
) -> Int[np.ndarray, " n"]:
    """Features that have a direction: alive, and with a decoder row that is not zero."""
    has_direction = np.linalg.norm(decoder, axis=1) > 0
    return np.flatnonzero(has_direction if alive is None else has_direction & alive)


def _subject(
    run: Run,
    name: str,
    directions: Float[np.ndarray, "n d"],
    numbers: Int[np.ndarray, " n"],
    config: MapConfig,
    progress: bool,
) -> pd.DataFrame:
    """One table of places; read where it is written already."""
    path = run.path / f"{name}.parquet"
    if not path.exists():
        found = lay_out(directions, config, label=name, progress=progress)
        columns = {
            "feature": numbers,
            "pca_x": found.pca[:, 0],
            "pca_y": found.pca[:, 1],
            "tsne_x": found.tsne[:, 0],
            "tsne_y": found.tsne[:, 1],
            "cluster": find_clusters(found.tsne, config.min_cluster_size),
        }
        arrays = [pa.array(columns[field.name]).cast(field.type) for field in COLUMNS]
        _write(run, name, pa.Table.from_arrays(arrays, schema=COLUMNS))
    return pq.read_table(path).to_pandas()


def _write(run: Run, name: str, table: pa.Table) -> None:
    with atomic_path(run.path / f"{name}.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd")


# ----------------------------------------------------------------------------------- layouts


def lay_out(
    directions: Float[np.ndarray, "n d"],
    config: MapConfig,
    *,
    label: str = "map",
    progress: bool = False,
) -> Layout:
    """Directions of unit length in two dimensions, by PCA and by t-SNE."""
    from sklearn.manifold import TSNE

    pca = principal_plane(directions)
    perplexity, spread = perplexity_of(len(directions), config.perplexity), pca[:, 0].std()
    if perplexity is None or spread < 1e-6:
        return Layout(pca=pca, tsne=pca)
    with _steps(f"t-SNE of {label}", config.steps, progress):
        tsne = TSNE(
            metric="cosine",
            init=(pca * (SPREAD / spread)).astype(np.float32),
            perplexity=perplexity,
            max_iter=config.steps,
            random_state=config.seed,
            verbose=2,
        ).fit_transform(directions)
    return Layout(pca=pca, tsne=tsne)


def perplexity_of(n: int, asked: float) -> float | None:
    """The perplexity that `n` features can have; None where there are too few for t-SNE."""
    return None if n < FEW else min(asked, (n - 1) / 3)


def principal_plane(directions: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """Coordinates along the first two principal components; 0 where there are fewer."""
    from sklearn.decomposition import PCA

    size = min(2, *directions.shape)
    plane = np.zeros((len(directions), 2), dtype=np.float32)
    if directions.var(0).sum() > 1e-12:
        fitted = PCA(size, svd_solver="covariance_eigh").fit_transform(directions)
        plane[:, :size] = fitted
    return plane


def variance_share(directions: Float[np.ndarray, "n d"]) -> float | None:
    """Share of the directions' variance that the first two principal components hold."""
    total = float(directions.var(0).sum())
    return float(principal_plane(directions).var(0).sum()) / total if total > 1e-12 else None


@contextlib.contextmanager
def _steps(label: str, total: int, progress: bool) -> Iterator[None]:
    """A bar of t-SNE's steps; scikit-learn says them on stdout only, where they do not belong."""
    with (
        tqdm(total=total, desc=label, unit=" steps", disable=not progress) as shown,
        contextlib.redirect_stdout(_Steps(shown)),
    ):
        yield


class _Steps(io.TextIOBase):
    """Reads the number of the step from each line that scikit-learn writes."""

    def __init__(self, shown: tqdm) -> None:
        self.shown = shown

    def write(self, text: str, /) -> int:
        said = re.search(r"Iteration (\d+)", text)
        if said:
            self.shown.update(int(said[1]) - self.shown.n)
        return len(text)


# ----------------------------------------------------------------------------------- reading


def read_map(run: Run, control: str | None = None) -> pd.DataFrame:
    """The places of the features, or of a control (`random`, `shaped`, `twin`).

    Raises `Failure` where the map is not complete or a file is damaged.
    """
    return _read(run, "map" if control is None else f"control-{control}")


def read_clusters(run: Run) -> pd.DataFrame:
    """The clusters, the largest first; raises as `read_map` does."""
    return _read(run, "clusters")


def _read(run: Run, name: str) -> pd.DataFrame:
    _ = run.manifest
    try:
        return pq.read_table(run.path / f"{name}.parquet").to_pandas()
    except (OSError, pa.ArrowInvalid) as error:
        raise Failure(
            f"the map in {run.path} cannot be read ({str(error).splitlines()[0]}); delete it and "
            f"run `lorgnette map {run.path.parent}`."
        ) from error
