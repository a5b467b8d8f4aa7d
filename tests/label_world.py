"""A hand-made index whose features fire where the tests say, counted by plain loops."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from probe.runs import Run
from saes.feature_queries import FeatureIndex
from saes.feature_schema import TABLES, IndexConfig
from saes.label_pool import Pool, by_feature, draw_pool
from saes.label_texts import Texts

WORDS = ("the", "of", "river", "rivers", "bank", "water", "sea", "ship", "harbour", "tree", "stone",
         "walk", "light", "house", "green", "seven", "bird", "cloud", "paper", "night")  # fmt: skip
VOCABULARY = ["<|end|>", *(f" {word}" for word in WORDS), "\n", ".", *"0123456789", "ing", "River"]
CONTEXT, N_SEQUENCES = 48, 120
N_FEATURES = 9
RIVER, NOISE, DEAD, DIGITS, AFTER_OF, BANK, ALWAYS, ONCE, FORMS = range(N_FEATURES)


def token(text: str) -> int:
    """The id of a token."""
    return VOCABULARY.index(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Sequences, and where each feature fires in them."""

    tokens: np.ndarray
    """[sequences, context]"""
    values: np.ndarray
    """Activations, [features, sequences, context]; 0 is silent."""


def make_world(seed: int = 0) -> World:
    """Random words with features planted in them."""
    rng = np.random.default_rng(seed)
    common = np.where(np.arange(len(VOCABULARY)) < 1, 0.0, 1.0)
    for rare in (" river", " rivers", "River", " of", " bank", " water", *"0123456789"):
        common[token(rare)] = 0.15
    common[token(" water")] = 0.0
    shape = (N_SEQUENCES, CONTEXT)
    tokens = rng.choice(len(VOCABULARY), shape, p=common / common.sum())
    tokens[::3, 1:30:8] = token(" water")
    tokens[:, 20] = token(" bank")
    tokens[3, 9] = 0
    before = np.roll(tokens, 1, axis=1)
    digits = [token(digit) for digit in "0123456789"]
    fires = np.zeros((N_FEATURES, *shape), bool)
    fires[RIVER] = tokens == token(" river")
    fires[NOISE] = rng.random(shape) < 0.01
    fires[DIGITS] = np.isin(tokens, digits)
    fires[AFTER_OF] = before == token(" of")
    fires[BANK] = (tokens == token(" bank")) & (np.arange(N_SEQUENCES) % 3 == 0)[:, None]
    fires[ALWAYS] = True
    fires[ONCE, 17, 5] = True
    fires[FORMS] = np.isin(tokens, [token(" river"), token(" rivers"), token("River")])
    fires[:, :, 0] = False
    fires[:, tokens == 0] = False
    return World(tokens=tokens, values=fires * rng.uniform(1, 10, fires.shape))


def write_index(sae: Run, world: World, config: IndexConfig | None = None) -> FeatureIndex:
    """The index of a world, in the real format."""
    config = config or IndexConfig(intervals=4)
    described = config.run_config(sae="0123", store="4567", site="resid_post.1")
    run = Run.create(sae.path, "index", described)
    tables = {
        "features": [_feature(world, feature) for feature in range(len(world.values))],
        "examples": [
            row for feature in range(len(world.values)) for row in _examples(world, feature, config)
        ],
        "sequences": [
            {"sequence": i, "tokens": row.tolist(), "docs": [i] * len(row)}
            for i, row in enumerate(world.tokens)
        ],
        "vocabulary": [
            {"token": i, "text": text, "special": i == 0} for i, text in enumerate(VOCABULARY)
        ],
        "tokens": _pairs(world),
        "neighbours": [],
        "coactivations": [],
        "documents": [{"doc": i, "id": f"doc-{i}"} for i in range(len(world.tokens))],
    }
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows, TABLES[name]), run.path / f"{name}.parquet")
    summary = {
        "n_features": len(world.values),
        "n_rows": int(kept(world.tokens).sum()),
        "n_sequences": len(world.tokens),
        "histogram_edges": [1.0, 10.0],
    }
    run.finish(summary=summary, inputs={}, seeds={}, device="cpu")
    return FeatureIndex.open(run.path)


def kept(tokens: np.ndarray) -> np.ndarray:
    """Places at which a feature may fire."""
    keep = tokens != 0
    keep[:, 0] = False
    return keep


def make_sae_run(folder: Path) -> Run:
    """A folder for the index to lie in."""
    return Run.create(folder, "sae", {"kind": "sae"})


def known_pool(world: World, texts: Texts, n_sequences: int) -> Pool:
    """The pool that an SAE with these codes would give."""
    rows = draw_pool(texts, n_sequences)
    inside = np.isin(np.arange(len(world.tokens)), np.concatenate(list(rows.values())))
    feature, sequence, position = np.nonzero(world.values * inside[:, None])
    flat, values = texts.flat(sequence, position), world.values[feature, sequence, position]
    return Pool(rows=rows, firings=by_feature(feature, flat, values, len(world.values)))


def _feature(world: World, feature: int) -> dict:
    values = world.values[feature]
    fired = values[values > 0]
    alive = len(fired) > 0
    return {
        "feature": feature,
        "alive": alive,
        "n_active": len(fired),
        "density": len(fired) / kept(world.tokens).sum(),
        "mean": fired.mean() if alive else None,
        "sd": fired.std() if alive else None,
        "max": fired.max() if alive else None,
        "histogram": [len(fired)],
        "top_tokens": [],
        "top_token_shares": [],
        "positive_tokens": [" harbour", " sea"],
        "positive_logits": [2.0, 1.0],
        "negative_tokens": [],
        "negative_logits": [],
        "decoder_norm": 1.0,
        "encoder_decoder_cosine": 1.0,
        "nearest_cosine": 0.0,
    }


def _examples(world: World, feature: int, config: IndexConfig) -> list[dict]:
    """Top, interval and random examples: the first that fit, where the real index draws."""
    values = world.values[feature]
    peaks = values.max(1)
    active = np.flatnonzero(peaks)
    if not len(active):
        return []
    step = peaks.max() / config.intervals
    chosen = [("interval", i, rank, sequence)
              for i in range(config.intervals)
              for rank, sequence in enumerate([
                  s for s in active if i * step < peaks[s] <= (i + 1) * step
              ][: config.per_interval])]  # fmt: skip
    drawn = np.random.default_rng(feature).permutation(active)[: config.random]
    chosen += [("random", -1, rank, sequence) for rank, sequence in enumerate(drawn)]
    strongest = active[np.argsort(-peaks[active])][: config.top]
    chosen += [("top", -1, rank, sequence) for rank, sequence in enumerate(strongest)]
    rows = []
    for kind, interval, rank, sequence in chosen:
        positions = np.flatnonzero(values[sequence])
        position = int(values[sequence].argmax())
        rows.append(
            {
                "feature": feature,
                "kind": kind,
                "interval": interval,
                "rank": rank,
                "activation": peaks[sequence],
                "sequence": int(sequence),
                "position": position,
                "doc": int(sequence),
                "token": int(world.tokens[sequence, position]),
                "positions": positions.tolist(),
                "activations": values[sequence, positions].tolist(),
            }
        )
    return rows


def _pairs(world: World) -> list[dict]:
    occurrences = Counter(world.tokens[kept(world.tokens)].tolist())
    rows = []
    for feature, values in enumerate(world.values):
        for number in np.unique(world.tokens[values > 0]).tolist():
            fired = values[(world.tokens == number) & (values > 0)]
            rows.append(
                {
                    "token": number,
                    "feature": feature,
                    "n": len(fired),
                    "mean": fired.mean(),
                    "max": fired.max(),
                    "share": len(fired) / occurrences[number],
                    "rank_for_token": 0,
                    "rank_for_feature": 0,
                }
            )
    return sorted(rows, key=lambda row: (row["token"], row["feature"]))
