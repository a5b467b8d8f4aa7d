"""Clusters on a map of features, and whether they say more than chance does.

**Where**: HDBSCAN (Campello, Moulavi and Sander 2013) runs in the t-SNE plane. Decoder directions
are nearly orthogonal, and among a few thousand of them in hundreds of dimensions all distances are
nearly the same: in the original space, and in its leading fifty principal components, a density
finds next to nothing (more than nine tenths is noise). The plane keeps who is whose neighbour, and
there neighbourhoods can be found. `leaf` clusters are taken, since the excess of mass prefers one
continent of thousands.

**What they are worth**: a t-SNE plane has islands for random directions too, and about as many. So
each cluster is judged outside the plane, by its cohesion: the mean cosine between its members'
directions. It *stands out* where that is more than chance can give: more than the most cohesive
neighbourhood of the same size among random directions, a neighbourhood being a direction with those
nearest to it in the original space. That is a high bar (as many neighbourhoods as there are
directions compete, and none has to be a cluster), and it does not depend on whether the controls
have clusters of that size. How many clusters there are, how much is noise and how well they are
apart (the silhouette of Rousseeuw 1987, by cosine, in the original space) is reported beside the
same numbers of the controls.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

NOISE = -1
"""The cluster of a feature that belongs to none."""
ROWS_AT_ONCE = 256
"""Directions whose neighbourhoods are summed at once."""
TOKENS_NAMED = 3
"""Tokens in a cluster's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clustering:
    """What clusters there are among some directions, in numbers."""

    n_features: int
    """Directions that were looked at."""
    n_clusters: int
    """Clusters that were found."""
    noise_share: float
    """Share of the directions that belong to none."""
    silhouette: float | None
    """Mean cosine silhouette of those that belong to one, between -1 and 1; null below two
    clusters."""
    cohesion_median: float | None
    """Median over clusters of the mean cosine between members; null where there is none."""
    cohesion_max: float | None
    """The largest of them."""

    def summary(self) -> dict[str, float | int | None]:
        """The same as JSON."""
        return asdict(self)


def cluster_sizes(clusters: Int[np.ndarray, " n"]) -> Int[np.ndarray, " c"]:
    """Members of each cluster."""
    return np.bincount(clusters[clusters >= 0])


def find_clusters(places: Float[np.ndarray, "n 2"], min_size: int) -> Int[np.ndarray, " n"]:
    """Number of each point's cluster in a plane, the largest cluster first; `NOISE` for none."""
    from sklearn.cluster import HDBSCAN

    if len(places) < max(2 * min_size, 3):
        return np.full(len(places), NOISE)
    found = HDBSCAN(
        min_cluster_size=min_size,
        cluster_selection_method="leaf",
        copy=True,  # pyright: ignore[reportArgumentType]
    ).fit_predict(places.astype(np.float64))
    sizes = np.bincount(found[found >= 0])
    order = np.argsort(-sizes, kind="stable")
    renumbered = np.empty(len(sizes), dtype=found.dtype)
    renumbered[order] = np.arange(len(sizes))
    return np.array([NOISE if place < 0 else renumbered[place] for place in found], dtype=int)


def cohesion(directions: Float[np.ndarray, "n d"], clusters: Int[np.ndarray, " n"]) -> list[float]:
    """Mean cosine between different members of each cluster; directions have unit length."""
    found = []
    for cluster in range(clusters.max(initial=NOISE) + 1):
        members = directions[clusters == cluster].astype(np.float64)
        n, total = len(members), members.sum(0)
        found.append(float((total @ total - (members**2).sum()) / max(n * (n - 1), 1)))
    return found


def measure(directions: Float[np.ndarray, "n d"], clusters: Int[np.ndarray, " n"]) -> Clustering:
    """The numbers of a clustering."""
    from sklearn.metrics import silhouette_score

    inside, cohesions = clusters >= 0, cohesion(directions, clusters)
    apart = None
    if 1 < len(cohesions) < inside.sum():
        apart = float(silhouette_score(directions[inside], clusters[inside], metric="cosine"))
    return Clustering(
        n_features=len(directions),
        n_clusters=len(cohesions),
        noise_share=float(1 - inside.mean()) if len(inside) else 1.0,
        silhouette=apart,
        cohesion_median=float(np.median(cohesions)) if cohesions else None,
        cohesion_max=max(cohesions, default=None),
    )


def neighbourhoods(
    directions: Float[np.ndarray, "n d"], sizes: Sequence[int]
) -> Mapping[int, float]:
    """Cohesion of the most cohesive neighbourhood of each size.

    Args:
        directions: of unit length.
        sizes: numbers of directions, from 2 to all of them.
    """
    largest, found = max(sizes, default=0), dict.fromkeys(sizes, -1.0)
    at_once = max(1, ROWS_AT_ONCE * 64 // max(largest, 64))
    for start in range(0, len(directions) if sizes else 0, at_once):
        cosines = directions[start : start + at_once] @ directions.T
        itself = np.arange(len(cosines))
        cosines[itself, itself + start] = np.inf
        near = np.argpartition(-cosines, largest - 1, axis=1)[:, :largest]
        order = np.argsort(-np.take_along_axis(cosines, near, 1), axis=1, kind="stable")
        members = directions[np.take_along_axis(near, order, 1)]
        sums = members.cumsum(1, dtype=np.float64)
        for size in found:
            agreed = (sums[:, size - 1] ** 2).sum(1) - size
            found[size] = max(found[size], float(agreed.max()) / (size * (size - 1)))
    return found


def cluster_table(
    cohesions: Sequence[float],
    clusters: Int[np.ndarray, " n"],
    of_chance: Mapping[int, float],
    tokens: Sequence[list[str]] | None,
) -> pd.DataFrame:
    """A row a cluster: size, cohesion, that of chance, whether it stands out, and its name.

    Args:
        cohesions: mean cosine between members, by cluster.
        clusters: number of each feature's cluster.
        of_chance: the cohesion that a cluster has to exceed, by its size.
        tokens: the tokens that drive each feature most; None where no index says.
    """
    sizes = cluster_sizes(clusters)
    names = {} if tokens is None else _names(clusters, tokens)
    table = pd.DataFrame(
        {
            "cluster": np.arange(len(cohesions), dtype=np.int32),
            "n_features": sizes.astype(np.int32),
            "cohesion": np.asarray(cohesions, dtype=np.float64),
            "name": [names.get(cluster, "") for cluster in range(len(cohesions))],
        }
    )
    table.insert(3, "chance", [of_chance[size] for size in sizes.tolist()])
    table.insert(4, "stands_out", table["cohesion"] > table["chance"])
    return table


def _names(clusters: Int[np.ndarray, " n"], tokens: Sequence[list[str]]) -> Mapping[int, str]:
    """Each cluster by its most common driving tokens.

    A token counts for each member that it drives, and by how few features it drives on the whole
    map (the logarithm of the inverse share, as texts are indexed): else every cluster were called
    after the most frequent words.
    """
    everywhere = Counter(token for own in tokens for token in {*map(_plain, own)})
    weight = {token: math.log(len(tokens) / n) for token, n in everywhere.items()}
    by_cluster: dict[int, Counter[str]] = {}
    for cluster, own in zip(clusters.tolist(), tokens, strict=True):
        by_cluster.setdefault(cluster, Counter()).update({*map(_plain, own)})
    names = {}
    for cluster, counted in by_cluster.items():
        score = {token: n * weight[token] for token, n in counted.items() if n > 1}
        order = sorted(score, key=lambda token: (-score[token], token))
        names[cluster] = "  ".join(order[:TOKENS_NAMED])
    return names


def _plain(token: str) -> str:
    """A token without the space before it and in small letters, unless that is all there is."""
    return token.strip().lower() or repr(token)[1:-1].replace(" ", "\u00b7")
