"""The feature index: one streaming pass against a loop over features."""

import contextlib
import itertools
import shutil
import tempfile
from pathlib import Path

import pandas as pd
import torch

from probe.corpora import read_documents
from probe.runs import Run
from probe.store import ActivationStore, StoreConfig
from probe.store_writing import write_store
from probe.toy import tiny_llama
from saes.activations import TopK
from saes.constraints import initialise
from saes.features import IndexConfig, build_index
from saes.models import SaeConfig, SparseAutoencoder
from tests.bench.timing import side_by_side

SITE = "resid_post.1"
D_MODEL, D_SAE, K = 128, 2048, 16
LOOPED = 64
"""Features that the loop does; its rate is by feature, so a part of them is enough."""


def measure() -> pd.DataFrame:
    """Features a second over 60,000 rows."""
    with tempfile.TemporaryDirectory() as folder:
        store, sae = made(Path(folder))
        streaming = side_by_side(
            {"one streaming pass": lambda: build(Path(folder), store, sae)},
            D_SAE,
            "features",
            rounds=3,
        )
        loop = side_by_side(
            {f"a loop over features (timed on {LOOPED})": lambda: loop_over_features(store, sae)},
            LOOPED,
            "features",
            rounds=3,
        )
    table = pd.concat([streaming, loop], ignore_index=True)
    table["times as fast as the first"] = table["features/s"] / table["features/s"][0]
    return table


def made(folder: Path) -> tuple[ActivationStore, SparseAutoencoder]:
    """A store of a small random Llama that reads the built-in corpus, and an untrained SAE."""
    model = tiny_llama(d_model=D_MODEL)
    text = folder / "text.txt"
    texts = []
    for document in read_documents("builtin"):
        texts.append(document.text)
        if sum(map(len, texts)) > 62_000:
            break
    text.write_text("\n".join(texts))
    config = StoreConfig(
        model={"spec": "tiny-llama", "random_weights": 0, "dtype": "float32"},
        corpus=str(text),
        sites=(SITE,),
        tokens=60_000,
    )
    store = write_store(Run.create(folder, "store", config.run_config()), model, progress=False)
    sae = SparseAutoencoder(SaeConfig(d_in=D_MODEL, d_sae=D_SAE, activation=TopK(k=K)))
    sample = store.values(0, SITE).float()[:4096]
    initialise(sae, sample, torch.Generator().manual_seed(0))
    return store, sae


def build(folder: Path, store: ActivationStore, sae: SparseAutoencoder) -> None:
    """The whole index, made anew."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder / "index")
    config = IndexConfig()
    model = tiny_llama(d_model=D_MODEL)
    run = Run.create(folder / "index", "index", config.run_config(sae="s", store="t", site=SITE))
    build_index(
        run,
        sae,
        store,
        SITE,
        config,
        logit_matrix=model.logit_matrix(),
        vocabulary=model.token_text(),
        special_ids=model.special_ids,
        progress=False,
    )


@torch.no_grad()
def loop_over_features(store: ActivationStore, sae: SparseAutoencoder) -> None:
    """Statistics and examples of a few features, one after another, from codes made dense.

    The codes of all rows are made once, outside the loop's count, as a dashboard generator that
    works feature by feature would hold them.
    """
    codes = dense_codes(store, sae)
    for feature in range(LOOPED):
        column = codes[:, feature]
        firing = column[column > 0]
        firing.mean() if len(firing) else None
        column.topk(20)
        edges = torch.linspace(0, float(column.max()), 11)
        for low, high in itertools.pairwise(edges):
            inside = ((column > low) & (column <= high)).nonzero().squeeze(1)
            inside[torch.randperm(len(inside))[:5]]


CODES: dict[int, torch.Tensor] = {}


def dense_codes(store: ActivationStore, sae: SparseAutoencoder) -> torch.Tensor:
    """All rows' codes as one dense matrix, kept for the next round."""
    if id(sae) not in CODES:
        parts = [store.values(i, SITE).float() for i in range(store.n_shards)]
        CODES[id(sae)] = torch.cat([sae.encode(part).dense(D_SAE) for part in parts])
    return CODES[id(sae)]
