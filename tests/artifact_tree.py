"""Artifact trees for the tests of the dashboard: a small real one, and a wide synthetic index."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from analyses import report
from analyses.plots import Axis, bars
from analyses.report import Report, Verdict
from analyses.statistics import Estimate
from app.commands import capture, evaluate, index, train
from app.commands.options import Common
from probe.runs import Run, sha256_file
from probe.toy import tiny_llama
from saes.activations import TopK
from saes.constraints import initialise
from saes.evaluation import EvaluateConfig
from saes.feature_schema import LEAST_TOGETHER, TABLES, IndexConfig
from saes.folder import save_sae
from saes.models import SaeConfig, SparseAutoencoder
from saes.training import TrainConfig

SITE = "resid_post.1"
K, D_SAE = 4, 64
LINES = (
    "The lighthouse keeper wrote a letter to his sister every winter.",
    "Rain fell on the harbour, and <b>the gulls</b> & the ferry came home late.",
    "Copper conducts heat; silver does so better,\nand costs more.",
    "She counted twelve boats, then eleven, then none at all.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A root with one SAE that has everything and one that is still in training."""

    root: Path
    """What LORGNETTE_ROOT names."""
    sae: Run
    """Trained, evaluated, indexed."""
    unfinished: Run
    """Has metrics, the last line half written, and no manifest."""


def make_tree(folder: Path) -> Tree:
    """A tree made by the commands themselves, on a tiny byte-level model."""
    root, spec = folder / "artifacts", str(make_model(folder / "model"))
    common = Common(root=root)
    corpus = folder / "corpus.jsonl"
    rows = [{"id": f"line-{i}", "text": LINES[i % len(LINES)]} for i in range(96)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = capture.run(
        capture.Command(
            model=spec, corpus=str(corpus), sites=(SITE,), tokens=4096, context=64,
            dtype="float32", device="cpu", common=common,
        )
    )  # fmt: skip
    options = TrainConfig(
        d_sae=D_SAE, activation=TopK(k=K), steps=30, warmup_steps=5, log_every=2, init_rows=512,
        k_aux=16, dead_after_tokens=2000,
    )  # fmt: skip
    sae = train.run(
        train.Command(
            source=str(store), train=options, batch_size=128, buffer_rows=1024, device="cpu",
            common=common,
        )
    )  # fmt: skip
    assert sae is not None
    few = EvaluateConfig(n_rows=512, n_ce_tokens=512, n_fit_rows=2048)
    evaluate.run(evaluate.Command(sae=sae, evaluate=few, device="cpu", common=common))
    index.run(index.Command(sae=sae, index=IndexConfig(top=8), device="cpu", common=common))
    return Tree(root=root, sae=Run.open(sae), unfinished=make_unfinished(Run.open(sae)))


def make_report(root: Path) -> Run:
    """A report with a claim that holds and one that does not, a figure and a table."""
    ours = Estimate(value=4.5, low=4.0, high=5.0, n=3)
    figure = bars({"ours <b>": ours}, title="Errors by method", x=Axis(title="Error (%)"))
    shown = Verdict(
        claim="Ours is <b>better</b>.", statistic="difference", value=2.5, low=1.5, high=3.5,
        holds=True,
    )  # fmt: skip
    other = Verdict(
        claim="It is faster.", statistic="ratio", value=0.5, low=None, high=None, holds=False
    )
    made = Report(
        title="A toy study",
        text="What was done, in **two** words.",
        verdicts=(shown, other),
        numbers={"error": 4.5},
        tables={"by_method": pd.DataFrame({"method": ["<b>ours"], "error (%)": [4.5]})},
        figures={"errors_by_method": figure},
    )
    run = Run.create(root / "reports" / "toy", "study", {"kind": "report"})
    with pytest.MonkeyPatch.context() as here:
        here.setattr(report, "CHROMIUM", root / "none")  # a picture takes seconds
        made.write(run, inputs={}, seeds={})
    return run


def make_model(folder: Path) -> Path:
    """Save a tiny byte-level Llama as a Hugging Face folder."""
    llama = tiny_llama()
    llama.model.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    return folder


def make_unfinished(sae: Run) -> Run:
    """A copy of an SAE's config and metrics as they are in the middle of training."""
    run = Run.create(sae.path.parent, "unfinished", sae.config)
    rows = (sae.path / "metrics.jsonl").read_text().splitlines(keepends=True)[:5]
    (run.path / "metrics.jsonl").write_text("".join(rows) + '{"step": 11, "lo')
    return run


# ------------------------------------------------------------------------- a wide synthetic index

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "was",
    "he",
    "that",
    "it",
    "his",
    "her",
    "with",
    "as",
    "had",
    "for",
    "she",
    "not",
    "at",
    "but",
    "be",
    "on",
    "they",
    "you",
    "have",
    "him",
    "were",
    "said",
    "which",
    "there",
    "from",
    "would",
    "all",
    "this",
    "one",
    "been",
    "when",
    "out",
    "up",
    "into",
    "them",
    "we",
    "so",
    "more",
    "who",
    "could",
    "time",
    "then",
    "its",
    "about",
    "other",
    "very",
    "some",
    "what",
    "know",
    "upon",
    "only",
    "any",
    "little",
    "like",
    "now",
    "than",
    "great",
    "after",
    "come",
    "made",
    "good",
    "two",
    "such",
    "never",
    "down",
    "day",
    "man",
    "must",
    "before",
    "over",
    "see",
    "should",
    "might",
    "well",
    "much",
    "even",
    "too",
    "hand",
    "still",
    "where",
    "long",
    "here",
    "way",
    "same",
    "life",
    "again",
    "own",
    "eyes",
    "through",
    "being",
    "harbour",
    "winter",
    "letter",
]


def make_wide_tree(folder: Path, n_features: int) -> Path:
    """A root with one untrained SAE and a synthetic index of that many features."""
    config = {
        "kind": "sae",
        "schema": 1,
        "model": {"spec": "none", "random_weights": None, "dtype": "float32"},
        "site": SITE,
        "source": {"corpus": "none"},
        "train": {"d_sae": n_features, "activation": {"k": K}},
    }
    run = Run.create(folder / "artifacts" / "saes", "wide", config)
    sae = SparseAutoencoder(SaeConfig(d_in=4, d_sae=n_features, activation=TopK(k=K)))
    sample = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    initialise(sae, sample, torch.Generator().manual_seed(0))
    save_sae(sae, run.path, metadata={"hook_name": SITE}, golden_x=sample)
    run.finish(summary={}, inputs={}, seeds={}, device="cpu")
    make_synthetic_index(run, n_features, top=2 if n_features > 1000 else 20)
    return folder / "artifacts"


def synthetic_vocabulary() -> list[str]:
    """An end of text, a line break, and words with a space in front."""
    return ["<|endoftext|>", "\n", ",", ".", *(f" {word}" for word in WORDS)]


def make_synthetic_index(
    sae: Run, n_features: int, *, n_sequences: int = 60, context: int = 128, top: int = 20
) -> Run:
    """An index of random numbers in the format of a real one; one feature in 20 is dead."""
    config = IndexConfig(top=top, per_interval=min(5, top), random=min(10, top))
    weights = sha256_file(sae.path / "sae_weights.safetensors")
    described = config.run_config(sae=weights, store="none", site=SITE)
    run = Run.create(sae.path, "index", described)
    rng, texts = np.random.default_rng(0), synthetic_vocabulary()
    tokens = rng.integers(1, len(texts), (n_sequences, context))
    edges = np.geomspace(0.01, 100, config.histogram_bins + 1)
    features = _features(rng, n_features, n_sequences * (context - 1), edges, texts)
    alive = [row for row in features if row["alive"]]
    tables = {
        "features": features,
        "examples": [
            row for f in alive for row in _examples(rng, f["feature"], f["max"], tokens, config)
        ],
        "sequences": [
            {"sequence": i, "tokens": row.tolist(), "docs": [i // 2] * context}
            for i, row in enumerate(tokens)
        ],
        "vocabulary": [
            {"token": i, "text": text, "special": i == 0} for i, text in enumerate(texts)
        ],
        "tokens": _token_pairs(rng, alive, texts),
        "neighbours": [
            {
                "feature": f,
                "rank": r,
                "neighbour": (f + r + 1) % n_features,
                "cosine": 0.6 - 0.05 * r,
            }
            for f in range(n_features)
            for r in range(min(config.neighbours, n_features - 1))
        ],
        "coactivations": [row for i in range(len(alive)) for row in _together(i, alive, config)],
        "documents": [{"doc": i, "id": f"doc-{i:03d}"} for i in range(n_sequences)],
    }
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows, TABLES[name]), run.path / f"{name}.parquet")
    summary = {
        "n_features": n_features,
        "n_alive": len(alive),
        "n_rows": n_sequences * (context - 1),
        "n_coactive_rows": n_sequences * (context - 1),
        "n_sequences": n_sequences,
        "histogram_edges": edges.tolist(),
    }
    run.finish(summary=summary, inputs={}, seeds={}, device="cpu")
    return run


def _together(place: int, alive: list[dict], config: IndexConfig) -> list[dict]:
    """Pairs with the living features that follow, half of the rarer one's rows shared."""
    own, rows = alive[place], []
    for step in range(1, min(config.coactive, len(alive) - 1) + 1):
        other = alive[(place + step) % len(alive)]
        both = min(own["n_active"], other["n_active"]) // 2
        n_rows = own["n_active"] / own["density"]
        if both < LEAST_TOGETHER or both * n_rows <= own["n_active"] * other["n_active"]:
            continue
        union = own["n_active"] + other["n_active"] - both
        rows.append(
            {
                "feature": own["feature"],
                "other": other["feature"],
                "n_both": both,
                "jaccard": both / union,
                "pmi": math.log2(both * n_rows / own["n_active"] / other["n_active"]),
            }
        )
    rows.sort(key=lambda row: (-row["jaccard"], row["other"]))
    return [row | {"rank": rank} for rank, row in enumerate(rows)]


def _features(
    rng: np.random.Generator, n: int, n_rows: int, edges: np.ndarray, texts: list[str]
) -> list[dict]:
    rows = []
    for feature in range(n):
        dead = feature % 20 == 3
        n_active = 0 if dead else max(int(n_rows * 10 ** rng.normal(-2.2, 0.6)) % n_rows, 1)
        values = rng.lognormal(0.5, 0.8, min(n_active, 500))
        picked = rng.choice(len(texts) - 4, 25, replace=False) + 4
        names = [texts[i] for i in picked]
        rows.append(
            {
                "feature": feature,
                "alive": not dead,
                "n_active": n_active,
                "density": n_active / n_rows,
                "mean": None if dead else float(values.mean()),
                "sd": None if dead else float(values.std()),
                "max": None if dead else float(values.max()),
                "histogram": np.histogram(values, edges)[0].tolist(),
                "top_tokens": [] if dead else names[:5],
                "top_token_shares": [] if dead else [0.4, 0.2, 0.1, 0.05, 0.02],
                "positive_tokens": names[5:15],
                "positive_logits": np.sort(rng.uniform(0.1, 1.2, 10))[::-1].tolist(),
                "negative_tokens": names[15:25],
                "negative_logits": np.sort(rng.uniform(-1, -0.1, 10)).tolist(),
                "decoder_norm": 1.0,
                "encoder_decoder_cosine": float(rng.uniform(0.3, 0.9)),
                "nearest_cosine": float(rng.uniform(0.1, 0.9)),
            }
        )
    return rows


def _examples(
    rng: np.random.Generator, feature: int, peak: float, tokens: np.ndarray, config: IndexConfig
) -> list[dict]:
    rows = []
    kinds = [("top", -1, rank, 1 - 0.02 * rank) for rank in range(config.top)]
    kinds += [
        ("interval", i, rank, (i + 0.7) / config.intervals)
        for i in range(config.intervals)
        for rank in range(config.per_interval)
    ]
    kinds += [
        ("random", -1, rank, share)
        for rank, share in enumerate(rng.uniform(0.05, 0.9, config.random))
    ]
    n, places = len(kinds), tokens.shape[1] - 1
    sequences, focuses = rng.integers(len(tokens), size=n).tolist(), rng.integers(4, size=n)
    chosen = np.sort(np.argpartition(rng.random((n, places)), 4)[:, :4] + 1)
    values = peak * np.array([kind[3] for kind in kinds])[:, None] * rng.uniform(0.2, 0.95, (n, 4))
    for number, (kind, interval, rank, share) in enumerate(kinds):
        sequence, focus = sequences[number], focuses[number]
        positions, activations = chosen[number], values[number]
        activations[focus] = peak * share
        rows.append(
            {
                "feature": feature,
                "kind": kind,
                "interval": interval,
                "interval_low": peak * interval / config.intervals if interval >= 0 else None,
                "interval_high": peak * (interval + 1) / config.intervals
                if interval >= 0
                else None,
                "interval_share": 1 / config.intervals if interval >= 0 else None,
                "rank": rank,
                "activation": peak * share,
                "sequence": sequence,
                "position": int(positions[focus]),
                "doc": sequence // 2,
                "token": int(tokens[sequence, positions[focus]]),
                "positions": positions.tolist(),
                "activations": activations.tolist(),
            }
        )
    return rows


def _token_pairs(rng: np.random.Generator, alive: list[dict], texts: list[str]) -> list[dict]:
    rows = [
        {
            "token": texts.index(text),
            "feature": row["feature"],
            "n": int(rng.integers(1, 90)),
            "mean": row["mean"],
            "max": row["max"],
            "share": float(rng.uniform(0.01, 1)),
            "rank_for_token": row["feature"] % 32,
            "rank_for_feature": rank,
        }
        for row in alive
        for rank, text in enumerate(row["top_tokens"])
    ]
    return sorted(rows, key=lambda row: row["token"])
