"""A synthetic map of any size, for the tests of the page and its bench."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from probe.runs import Run, sha256_file
from saes.maps import COLUMNS, MapConfig

N_CLUSTERS = 12


def make_synthetic_map(sae: Run, n_features: int) -> Run:
    """A map of random places in the format of a real one; one feature in 20 has no place.

    The first features of the t-SNE plane lie apart from the rest: features 0 to 9 but the dead one,
    in the lower left corner.
    """
    weights = sha256_file(sae.path / "sae_weights.safetensors")
    run = Run.create(sae.path, "map", MapConfig().run_config(sae=weights, index="i", twin=None))
    rng, features = np.random.default_rng(0), np.arange(n_features)
    features = features[features % 20 != 3]
    angle, radius = (
        rng.uniform(0, 2 * np.pi, len(features)),
        50 * np.sqrt(rng.random(len(features))),
    )
    places = {
        "feature": features,
        "pca_x": rng.normal(size=len(features)),
        "pca_y": rng.normal(size=len(features)),
        "tsne_x": np.where(features < 10, -60 + features / 10, radius * np.cos(angle)),
        "tsne_y": np.where(features < 10, -60 + features / 10, radius * np.sin(angle)),
        "cluster": np.where(angle < 1, (angle * N_CLUSTERS).astype(int), -1),
    }
    arrays = [pa.array(places[field.name]).cast(field.type) for field in COLUMNS]
    table = pa.Table.from_arrays(arrays, schema=COLUMNS)
    for name in ("map", "control-random", "control-shaped"):
        pq.write_table(table, run.path / f"{name}.parquet")
    clusters = pd.DataFrame(
        {
            "cluster": np.arange(N_CLUSTERS, dtype=np.int32),
            "n_features": np.bincount(places["cluster"][places["cluster"] >= 0]).astype(np.int32),
            "cohesion": np.linspace(0.3, 0.1, N_CLUSTERS),
            "chance": 0.19,
            "stands_out": np.arange(N_CLUSTERS) < 6,
            "name": [f"word {cluster}" for cluster in range(N_CLUSTERS)],
        }
    )
    pq.write_table(pa.Table.from_pandas(clusters), run.path / "clusters.parquet")
    numbers = {
        "n_features": len(features), "n_clusters": N_CLUSTERS, "noise_share": 0.8,
        "silhouette": 0.1, "cohesion_median": 0.2, "cohesion_max": 0.3,
    }  # fmt: skip
    summary = {
        "n_features": n_features, "n_placed": len(features), "perplexity": 30.0,
        "pca_variance_share": 0.02, "n_standing_out": 6,
        "clusters": dict.fromkeys(("sae", "random", "shaped"), numbers),
    }  # fmt: skip
    run.finish(summary=summary, inputs={}, seeds={}, device="cpu")
    return run
