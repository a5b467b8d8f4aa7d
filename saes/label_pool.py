"""Sequences that are encoded again, so that every firing of every feature in them is known.

An index keeps examples, not all firings; a context in which a feature is *silent* can only be taken
from where everything is known. A few hundred sequences are enough for all features alike.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from probe.store import ActivationStore
from saes.label_sequences import Sequences
from saes.models import SparseAutoencoder

BATCH_ROWS = 2048
"""Rows encoded at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Sequences of which every firing of some features is known, feature by feature."""

    starts: Int[np.ndarray, " features_and_1"]
    """Where each feature's firings begin."""
    flat: Int[np.ndarray, " firings"]
    """Places of the firings, as `Sequences.flat` numbers them."""
    values: Float[np.ndarray, " firings"]
    """How strong they are."""

    def of(self, feature: int) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """Places where a feature fires, and how strongly."""
        part = slice(int(self.starts[feature]), int(self.starts[feature + 1]))
        return self.flat[part], self.values[part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Sequences that were encoded whole: every firing of every feature in them is known."""

    rows: dict[str, Int[np.ndarray, " k"]]
    """Rows of the sequences for making (`make`) and testing (`test`)."""
    firings: Known
    """Where features fire in them, both sides together."""


def draw_pool(texts: Sequences, n_sequences: int) -> dict[str, Int[np.ndarray, " k"]]:
    """Rows of the sequences to encode: the first of the shuffle on each side, in order."""
    tested = texts.held_out[texts.order]
    sides = {"test": texts.order[tested], "make": texts.order[~tested]}
    return {side: np.sort(rows[:n_sequences]) for side, rows in sides.items()}


def encode_pool(
    texts: Sequences, sae: SparseAutoencoder, store: ActivationStore, site: str, n_sequences: int
) -> Pool:
    """Encode the pool's sequences: `n_sequences` for making and as many for testing."""
    rows = draw_pool(texts, n_sequences)
    wanted = texts.numbers[np.concatenate(list(rows.values()))]
    features, flat, values = [], [], []
    for number in range(store.n_shards):
        shard = store.shard(number, site)
        sequence, position = shard.sequence.numpy(), shard.position.numpy()
        chosen = np.flatnonzero(np.isin(sequence, wanted))
        for start in range(0, len(chosen), BATCH_ROWS):
            part = chosen[start : start + BATCH_ROWS]
            x = shard.values[torch.from_numpy(part)].to(sae.W_enc.device, torch.float32)
            with torch.inference_mode():
                codes = sae.encode(x)
            value = codes.values.float().cpu().numpy()
            fires = value > 0
            row = np.nonzero(fires)[0]
            values.append(value[fires])
            features.append(codes.indices.cpu().numpy()[fires])
            flat.append(texts.flat(texts.rows(sequence[part]), position[part])[row])
    firings = by_feature(
        np.concatenate([*features, np.zeros(0, np.int64)]),
        np.concatenate([*flat, np.zeros(0, np.int64)]),
        np.concatenate([*values, np.zeros(0, np.float32)]),
        sae.config.d_sae,
    )
    return Pool(rows=rows, firings=firings)


def by_feature(
    features: Int[np.ndarray, " k"],
    flat: Int[np.ndarray, " k"],
    values: Float[np.ndarray, " k"],
    n_features: int,
) -> Known:
    """Sort firings by feature and place."""
    order = np.lexsort((flat, features))
    starts = np.searchsorted(features[order], np.arange(n_features + 1))
    return Known(starts=starts, flat=flat[order].astype(np.int64), values=values[order])
