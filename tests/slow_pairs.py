"""The slow, obvious way from counts of pairs to the rows of coactivations.parquet."""

import math

import numpy as np

LEAST = 5


def strongest_pairs(
    together: np.ndarray, n_rows: int, n: int
) -> list[tuple[int, int, int, int, float, float]]:
    """Feature, rank, other, n_both, jaccard, pmi: every pair looked at, sorted.

    Args:
        together: rows on which both of two features fire, [features, features].
        n_rows: rows in all.
        n: features listed for each.
    """
    rows = []
    for feature, counts in enumerate(together.tolist()):
        own, found = counts[feature], []
        for other, both in enumerate(counts):
            its = int(together[other, other])
            if other != feature and both >= LEAST and both * n_rows > own * its:
                jaccard = both / (own + its - both)
                pmi = math.log2((both / n_rows) / ((own / n_rows) * (its / n_rows)))
                found.append((-jaccard, other, both, jaccard, pmi))
        rows += [(feature, rank, *row[1:]) for rank, row in enumerate(sorted(found)[:n])]
    return rows
