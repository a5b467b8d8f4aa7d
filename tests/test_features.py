"""The feature index against a slow recount: plain Python over the codes of every single row."""

import json
import math
import shutil
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from slow_pairs import strongest_pairs

from probe.errors import Failure, UserError
from probe.runs import Run, verify
from probe.store import ActivationStore, StoreConfig
from saes import feature_coactivation, feature_codes, feature_tables, feature_weights, features
from saes.activations import TopK
from saes.feature_codes import rows_used
from saes.feature_queries import FeatureIndex
from saes.feature_schema import CODES, TABLES, IndexConfig
from saes.feature_tables import (
    HASH_PRIME,
    BuildLimits,
    feature_ranges,
    hash_coefficients,
    histogram_edges,
    open_engine,
    write_parts,
)
from saes.feature_weights import decoder_neighbours, logit_effects
from saes.features import build_index
from saes.models import SaeConfig, SparseAutoencoder
from saes.sorted_parquet import SortedParquet

SITE = "resid_post.1"
D_IN, D_SAE, CONTEXT, N_TOKENS, SPECIAL = 6, 24, 9, 30, 0
DEAD = (5, 23)
FIRES_ONCE = 11
VOCABULARY = [
    f"{' ' * (i % 3 == 0)}{word}{i}"
    for i, word in enumerate(["ab", "Cd", "caf\u00e9", "<x>", "."] * 6)
]
CONFIG = IndexConfig(
    top=3, intervals=4, per_interval=2, random=3, neighbours=5, logits=3, histogram_bins=6,
    batch_rows=7,
)  # fmt: skip


def make_store(parent: Path, n_sequences: int = 53, shard_sequences: int = 16) -> ActivationStore:
    """A store of small whole numbers, so that every code is exact and many are equal."""
    asked = StoreConfig(
        model={"spec": "toy", "random_weights": 0, "dtype": "float32"}, corpus="none",
        sites=(SITE,), tokens=n_sequences * CONTEXT, context=CONTEXT, batch_sequences=1,
        dtype="float32", shard_batches=shard_sequences,
    )  # fmt: skip
    run = Run.create(parent, "store", asked.run_config())
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, N_TOKENS, (n_sequences, CONTEXT), generator=generator).int()
    tokens[7] = SPECIAL
    doc = torch.arange(n_sequences * CONTEXT).view(n_sequences, CONTEXT).int() // 20
    keep = tokens != SPECIAL
    keep[:, 0] = False
    starts = range(0, n_sequences, shard_sequences)
    n_rows = 0
    for number, start in enumerate(starts):
        stop = min(start + shard_sequences, n_sequences)
        sequence, position = keep[start:stop].nonzero(as_tuple=True)
        sequence = sequence + start
        values = torch.randint(-2, 3, (len(sequence), D_IN), generator=generator).float()
        values[:, -1] = (position == 4) & (sequence == 20)
        save_file({"values": values}, _made(run.path / SITE) / f"acts-{number:05d}.safetensors")
        rows = {
            "doc": doc[sequence, position],
            "sequence": sequence.int(),
            "position": position.short(),
            "token": tokens[sequence, position],
            "tokens": tokens[start:stop].contiguous(),
            "sequence_doc": doc[start:stop].contiguous(),
            "first_sequence": torch.tensor(start),
        }
        save_file(rows, run.path / f"rows-{number:05d}.safetensors")
        n_rows += len(sequence)
    ids = [f"doc-{i}" for i in range(int(doc.max()) + 1)]
    documents = pa.table({"doc": pa.array(range(len(ids)), pa.int32()), "id": ids})
    pq.write_table(documents, run.path / "documents.parquet")
    summary = {"n_rows": n_rows, "n_shards": len(starts), "widths": {SITE: D_IN}}
    run.finish(summary=summary, inputs={}, seeds={}, device="cpu")
    return ActivationStore.open(run.path)


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def make_sae() -> SparseAutoencoder:
    """An SAE of small whole numbers with two dead features and one that fires on a single row."""
    sae = SparseAutoencoder(SaeConfig(d_in=D_IN, d_sae=D_SAE, activation=TopK(k=4)))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randint(-2, 3, (D_IN, D_SAE), generator=generator))
        sae.W_enc[-1] = 0
        sae.W_dec.copy_(torch.randn(D_SAE, D_IN, generator=generator))
        sae.b_enc.copy_(torch.randint(-2, 2, (D_SAE,), generator=generator))
        sae.b_enc[list(DEAD)] = -1000
        sae.W_enc[:, FIRES_ONCE] = 0
        sae.W_enc[-1, FIRES_ONCE] = 1000
        sae.b_enc[FIRES_ONCE] = -900
        sae.b_dec[0] = 1
    return sae.requires_grad_(False)


LOGIT_MATRIX = torch.randn(D_IN, N_TOKENS, generator=torch.Generator().manual_seed(5))


def index_in(
    parent: Path,
    store: ActivationStore,
    *,
    sae: SparseAutoencoder | None = None,
    config: IndexConfig = CONFIG,
    limits: BuildLimits | None = None,
    logits: bool = True,
    vocabulary: list[str] = VOCABULARY,
    progress: bool = False,
) -> FeatureIndex:
    run = Run.create(
        parent, "index", config.run_config(sae="0123", store=store.run.path.name, site=SITE)
    )
    return build_index(
        run, sae or make_sae(), store, SITE, config, logit_matrix=LOGIT_MATRIX if logits else None,
        vocabulary=vocabulary, special_ids={SPECIAL}, limits=limits, progress=progress,
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, store: ActivationStore) -> FeatureIndex:
    return index_in(tmp_path_factory.mktemp("sae"), store)


def table(index: FeatureIndex, name: str) -> pa.Table:
    return pq.read_table(index.path / f"{name}.parquet")


# --------------------------------------------------------------------------------- the recount


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """One feature on one row."""

    feature: int
    sequence: int
    position: int
    doc: int
    token: int
    value: float


def recount(store: ActivationStore, sae: SparseAutoencoder) -> list[Firing]:
    """Every firing, from one dense row at a time."""
    assert isinstance(sae.config.activation, TopK)
    found = []
    for number in range(store.n_shards):
        shard = store.shard(number, SITE)
        for i, x in enumerate(shard.values):
            pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
            strongest = sorted(range(D_SAE), key=lambda f, pre=pre: (-float(pre[f]), f))
            for f in strongest[: sae.config.activation.k]:
                if pre[f] > 0:
                    place = (shard.sequence[i], shard.position[i], shard.doc[i], shard.token[i])
                    sequence, position, doc, token = (int(value) for value in place)
                    found.append(
                        Firing(
                            feature=f, sequence=sequence, position=position, doc=doc, token=token,
                            value=float(pre[f]),
                        )
                    )  # fmt: skip
    return found


def by_feature(firings: list[Firing]) -> dict[int, list[Firing]]:
    groups: dict[int, list[Firing]] = defaultdict(list)
    for firing in firings:
        groups[firing.feature].append(firing)
    return groups


def expected_examples(firings: list[Firing], config: IndexConfig, d_sae: int) -> list[dict]:
    """All rows of examples.parquet, by sorting everything."""
    salts = hash_coefficients(d_sae, config.seed).tolist()
    rows = []
    for feature, own in sorted(by_feature(firings).items()):
        a, b, c = salts[feature]
        sequences: dict[int, list[Firing]] = defaultdict(list)
        for firing in own:
            sequences[firing.sequence].append(firing)
        for fired in sequences.values():
            fired.sort(key=lambda firing: firing.position)
        peak = {s: max(f.value for f in fired) for s, fired in sequences.items()}
        largest = max(peak.values())

        def order(s: int, a=a, b=b, c=c) -> int:
            return ((a * (s + 1) + b) % HASH_PRIME * (s + 1) + c) % HASH_PRIME

        def example(kind: str, interval: int, share, rank: int, s: int, value: float) -> dict:
            fired = sequences[s]  # noqa: B023
            at = next(f for f in fired if f.value == value)
            n, high = config.intervals, largest  # noqa: B023
            return {
                "feature": at.feature,
                "kind": kind,
                "interval": interval,
                "interval_low": np.float32(interval * high / n) if interval >= 0 else None,
                "interval_high": np.float32((interval + 1) * high / n) if interval >= 0 else None,
                "interval_share": share,
                "rank": rank,
                "activation": value,
                "sequence": s,
                "position": at.position,
                "doc": at.doc,
                "token": at.token,
                "positions": [f.position for f in fired],
                "activations": [f.value for f in fired],
            }

        for interval in range(config.intervals):
            inside: dict[int, float] = {}
            count = 0
            for firing in own:
                exact = Fraction(firing.value) * config.intervals / Fraction(largest)
                if math.ceil(exact) - 1 == interval:
                    count += 1
                    inside[firing.sequence] = max(firing.value, inside.get(firing.sequence, 0.0))
            drawn = sorted(inside, key=lambda s, i=inside, p=peak: (i[s] < p[s], order(s), s))
            drawn = sorted(drawn[: config.per_interval], key=lambda s, i=inside: (-i[s], s))
            share = count / len(own)
            rows += [
                example("interval", interval, share, rank, s, inside[s])
                for rank, s in enumerate(drawn)
            ]
        drawn = sorted(peak, key=lambda s: (order(s), s))[: config.random]
        rows += [example("random", -1, None, i, s, peak[s]) for i, s in enumerate(drawn)]
        top = sorted(peak, key=lambda s, p=peak: (-p[s], s))[: config.top]
        rows += [example("top", -1, None, i, s, peak[s]) for i, s in enumerate(top)]
    return rows


def token_sums(firings: list[Firing]) -> dict[tuple[int, int], list[float]]:
    sums: dict[tuple[int, int], list[float]] = defaultdict(list)
    for firing in firings:
        sums[firing.token, firing.feature].append(firing.value)
    return sums


@pytest.fixture(scope="module")
def firings(store: ActivationStore) -> list[Firing]:
    return recount(store, make_sae())


# ------------------------------------------------------------------------------------- tables


def test_the_example_is_as_awkward_as_meant(firings):
    groups = by_feature(firings)
    assert not set(DEAD) & set(groups)
    assert len(groups[FIRES_ONCE]) == 1
    values = [firing.value for firing in groups[0]]
    assert len(set(values)) < len(values) / 2, "ties"


def test_feature_statistics_equal_a_recount(index, store, firings):
    rows = table(index, "features").to_pylist()
    groups = by_feature(firings)
    assert [row["feature"] for row in rows] == list(range(D_SAE))
    edges = np.array(index.histogram_edges, np.float32)
    for feature, row in enumerate(rows):
        values = np.array([f.value for f in groups[feature]])
        assert row["n_active"] == len(values)
        assert row["alive"] == bool(len(values))
        assert row["density"] == len(values) / store.n_rows
        assert sum(row["histogram"]) == len(values)
        if not len(values):
            assert row["mean"] is row["sd"] is row["max"] is None
            assert row["histogram"] == [0] * CONFIG.histogram_bins
            assert row["top_tokens"] == row["top_token_shares"] == []
            continue
        assert row["mean"] == np.float32(values.mean())
        assert row["sd"] == pytest.approx(values.std(), abs=1e-6)
        assert row["max"] == values.max()
        bins = np.clip(np.searchsorted(edges, values, "left") - 1, 0, None)
        assert row["histogram"] == np.bincount(bins, minlength=len(edges) - 1).tolist()


def test_top_tokens_equal_a_recount(index, firings):
    for row in table(index, "features").to_pylist():
        sums: dict[int, float] = defaultdict(float)
        for firing in by_feature(firings)[row["feature"]]:
            sums[firing.token] += firing.value
        top = sorted(sums, key=lambda token, sums=sums: (-sums[token], token))[:5]
        assert row["top_tokens"] == [VOCABULARY[token] for token in top]
        shares = [sums[token] / sum(sums.values()) for token in top]
        assert row["top_token_shares"] == pytest.approx(shares, rel=1e-6)


def test_examples_equal_a_recount(index, firings):
    found = table(index, "examples").to_pylist()
    expected = expected_examples(firings, CONFIG, D_SAE)
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert row == wanted


def test_a_feature_that_fires_once_has_one_example_of_each_kind(index):
    rows = index.examples(FIRES_ONCE)
    assert sorted(rows["kind"]) == ["interval", "random", "top"]
    interval = rows[rows["kind"] == "interval"].iloc[0]
    assert (interval["interval"], interval["interval_share"]) == (CONFIG.intervals - 1, 1.0)
    assert rows["activation"].tolist() == [100.0, 100.0, 100.0]


def test_interval_shares_add_up_and_no_interval_that_fires_is_without_example(index, firings):
    rows = table(index, "examples").to_pandas()
    rows = rows[rows["kind"] == "interval"].drop_duplicates(["feature", "interval"])
    total = rows.groupby("feature")["interval_share"].sum()
    assert set(total.index) == set(by_feature(firings))
    np.testing.assert_allclose(total, 1)


@given(
    values=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(0, 6),
            st.integers(0, 4),
            st.one_of(
                st.sampled_from([1.0, 2.0, 3.0]),
                st.floats(2.0**-20, 2.0**20, width=32),
            ),
        ),
        min_size=1,
        max_size=40,
        unique_by=lambda row: row[:3],
    ),
    intervals=st.integers(1, 10),
    seed=st.integers(0, 3),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_examples_of_any_firings(tmp_path, values, intervals, seed):
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    firings = [
        Firing(feature=f, sequence=s, position=p, doc=s, token=p, value=float(np.float32(v)))
        for f, s, p, v in sorted(values)
    ]
    columns = {name: [getattr(f, name) for f in firings] for name in CODES.names}
    pq.write_table(pa.table(columns, schema=CODES), tmp_path / "codes.parquet")
    config = replace(CONFIG, intervals=intervals, seed=seed)
    edges = histogram_edges(1.0, 2.0, 2)
    with open_engine(tmp_path / "spill", BuildLimits(threads=1)) as engine:
        parts = write_parts(
            tmp_path, engine, [tmp_path / "codes.parquet"], [range(0, 2), range(2, 3)], config,
            edges, progress=False,
        )  # fmt: skip
    found = [row for part in parts["examples"] for row in pq.read_table(part).to_pylist()]
    assert found == expected_examples(firings, config, 3)


def test_intervals_by_hand(tmp_path):
    # Of 0.3 in three intervals: (0, 0.1], (0.1, 0.2], (0.2, 0.3], the edges being those of the
    # float32 that is nearest to 0.3. Two firings fall on an edge and belong to the lower interval.
    largest = float(np.float32(0.3))
    values = [0.05, largest / 3 - 1e-8, 0.1000001, largest, largest, largest]
    on_edge = [4.0, 8.0, 12.0, 12.0]
    rows = [(0, s, 1, s, 0, v) for s, v in enumerate(values)]
    rows += [(1, s, 2, s, 0, v) for s, v in enumerate(on_edge)]
    columns = dict(zip(CODES.names, zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table(columns, schema=CODES), tmp_path / "codes.parquet")
    with open_engine(tmp_path / "spill", BuildLimits(threads=1)) as engine:
        parts = write_parts(
            tmp_path, engine, [tmp_path / "codes.parquet"], [range(2)],
            replace(CONFIG, intervals=3, per_interval=1), [0.1, 1.0], progress=False,
        )  # fmt: skip
    found = [row for part in parts["examples"] for row in pq.read_table(part).to_pylist()]
    found = [row for row in found if row["kind"] == "interval"]
    shares = {(row["feature"], row["interval"]): row["interval_share"] for row in found}
    assert shares == {
        (0, 0): 2 / 6, (0, 1): 1 / 6, (0, 2): 3 / 6, (1, 0): 1 / 4, (1, 1): 1 / 4, (1, 2): 2 / 4,
    }  # fmt: skip
    edges = [(row["interval_low"], row["interval_high"]) for row in found if row["feature"] == 1]
    assert edges == [(0.0, 4.0), (4.0, 8.0), (8.0, 12.0)]
    assert all(row["interval_low"] < row["activation"] <= row["interval_high"] for row in found)


def test_coactivations_equal_a_matrix_product(index, store, firings):
    places = {place: i for i, place in enumerate({(f.sequence, f.position) for f in firings})}
    fires = np.zeros((len(places), D_SAE), np.int64)
    for firing in firings:
        fires[places[firing.sequence, firing.position], firing.feature] = 1
    expected = strongest_pairs(fires.T @ fires, store.n_rows, CONFIG.coactive)
    found = table(index, "coactivations").to_pylist()
    assert [(row["feature"], row["rank"], row["other"]) for row in found] == [
        row[:3] for row in expected
    ]
    for row, (_, _, _, n_both, jaccard, pmi) in zip(found, expected, strict=True):
        assert (row["n_both"], row["jaccard"]) == (n_both, jaccard)
        assert row["pmi"] == pytest.approx(pmi, abs=1e-12)


def test_token_table_equals_a_recount(index, store, firings):
    sums = token_sums(firings)
    occurrences: dict[int, int] = defaultdict(int)
    for number in range(store.n_shards):
        for token in store.shard(number, SITE).token.tolist():
            occurrences[token] += 1
    found = table(index, "tokens").to_pylist()
    assert [(row["token"], row["feature"]) for row in found] == sorted(sums)
    for row in found:
        token, feature = row["token"], row["feature"]
        values = sums[token, feature]
        assert row["n"] == len(values)
        assert row["mean"] == np.float32(np.mean(values))
        assert row["max"] == max(values)
        assert row["share"] == len(values) / occurrences[token]
        total = sum(values)
        for_token = [(-sum(v), f) for (t, f), v in sums.items() if t == token]
        for_feature = [(-sum(v), t) for (t, f), v in sums.items() if f == feature]
        assert row["rank_for_token"] == sorted(for_token).index((-total, feature))
        assert row["rank_for_feature"] == sorted(for_feature).index((-total, token))


@pytest.mark.parametrize("firings_at_once", [10**6, 60])
def test_only_the_strongest_pairs_are_kept(tmp_path, store, firings, monkeypatch, firings_at_once):
    monkeypatch.setattr(feature_tables, "TOKEN_RANKS", 3)
    limits = BuildLimits(firings=firings_at_once)
    index = index_in(tmp_path, store, limits=limits)
    sums = {pair: sum(values) for pair, values in token_sums(firings).items()}

    def rank(pair: tuple[int, int], axis: int) -> int:
        other = 1 - axis
        alike = [(-sums[p], p[other]) for p in sums if p[axis] == pair[axis]]
        return sorted(alike).index((-sums[pair], pair[other]))

    expected = [
        (*pair, *(r if (r := rank(pair, axis)) < 3 else None for axis in (0, 1)))
        for pair in sorted(sums)
        if min(rank(pair, 0), rank(pair, 1)) < 3
    ]
    found = table(index, "tokens").to_pylist()
    keys = ("token", "feature", "rank_for_token", "rank_for_feature")
    assert [tuple(row[key] for key in keys) for row in found] == expected
    assert len(expected) < len(sums)


def test_sequences_vocabulary_and_documents(index, store):
    sequences = table(index, "sequences").to_pylist()
    assert [row["sequence"] for row in sequences] == list(range(53))
    shards = [store.shard(number, SITE) for number in range(store.n_shards)]
    assert [row["tokens"] for row in sequences] == torch.cat([s.tokens for s in shards]).tolist()
    docs = torch.cat([s.sequence_doc for s in shards])
    assert [row["docs"] for row in sequences] == docs.tolist()
    vocabulary = table(index, "vocabulary").to_pylist()
    assert [row["text"] for row in vocabulary] == VOCABULARY
    assert [row["token"] for row in vocabulary if row["special"]] == [SPECIAL]
    assert table(index, "documents")["id"].to_pylist() == store.document_ids()


def test_files_have_exactly_the_documented_schemas_and_are_sound(index):
    for name, schema in TABLES.items():
        assert pq.read_schema(index.path / f"{name}.parquet") == schema, name
    assert set(index.run.manifest["files"]) == {f"{name}.parquet" for name in TABLES} | {
        "config.json"
    }
    assert verify(index.run) == []


def test_summary(index, store, firings):
    summary = index.summary
    assert summary["n_features"] == D_SAE
    assert summary["n_alive"] == len(by_feature(firings)) == index.n_alive
    assert summary["n_rows"] == store.n_rows
    assert summary["n_sequences"] == 53
    assert summary["n_firings"] == len(firings)
    assert summary["l0"] == len(firings) / store.n_rows
    assert summary["n_coactive_rows"] == store.n_rows


# ------------------------------------------------------------------------------------ weights


def test_neighbours_equal_numpy(index):
    W_dec = make_sae().W_dec.numpy().astype(np.float64)
    unit = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    rows = table(index, "neighbours").to_pandas()
    assert len(rows) == D_SAE * CONFIG.neighbours
    for feature in range(D_SAE):
        own = rows[rows["feature"] == feature]
        assert own["rank"].tolist() == list(range(CONFIG.neighbours))
        assert own["neighbour"].tolist() == np.argsort(-cosines[feature])[:5].tolist()
        np.testing.assert_allclose(own["cosine"], np.sort(cosines[feature])[::-1][:5], atol=1e-6)
    nearest = table(index, "features")["nearest_cosine"].to_numpy()
    np.testing.assert_allclose(nearest, cosines.max(1), atol=1e-6)


def test_norms_and_encoder_decoder_cosines_equal_numpy(index):
    sae = make_sae()
    W_enc, W_dec = sae.W_enc.numpy().T.astype(np.float64), sae.W_dec.numpy().astype(np.float64)
    rows = table(index, "features")
    norms = np.linalg.norm(W_dec, axis=1)
    np.testing.assert_allclose(rows["decoder_norm"].to_numpy(), norms, rtol=1e-6)
    cosines = (W_enc * W_dec).sum(1) / norms / np.linalg.norm(W_enc, axis=1)
    np.testing.assert_allclose(rows["encoder_decoder_cosine"].to_numpy(), cosines, atol=1e-6)


def test_logits_equal_numpy(index):
    effects = make_sae().W_dec.numpy() @ LOGIT_MATRIX.numpy()
    effects -= effects.mean(1, keepdims=True)
    for row in table(index, "features").to_pylist():
        own = effects[row["feature"]]
        high, low = np.argsort(-own)[:3], np.argsort(own)[:3]
        assert row["positive_tokens"] == [VOCABULARY[i] for i in high]
        assert row["negative_tokens"] == [VOCABULARY[i] for i in low]
        np.testing.assert_allclose(row["positive_logits"], own[high], atol=1e-5)
        np.testing.assert_allclose(row["negative_logits"], own[low], atol=1e-5)


def test_no_logits_where_the_site_has_none(tmp_path, store):
    index = index_in(tmp_path, store, logits=False)
    rows = table(index, "features")
    for name in ("positive_tokens", "positive_logits", "negative_tokens", "negative_logits"):
        assert rows[name].null_count == D_SAE
    assert index.feature(0)["positive_tokens"] is None
    assert index.table(text=index.feature(0)["top_tokens"][0]).total > 0


@pytest.mark.parametrize("rows_at_once", [1, 3, 10**6])
def test_chunks_change_nothing(monkeypatch, rows_at_once):
    W_dec = make_sae().W_dec
    whole, effects = decoder_neighbours(W_dec, 4), logit_effects(W_dec, LOGIT_MATRIX, 4)
    monkeypatch.setattr(feature_weights, "_chunk_rows", lambda width: rows_at_once)
    chunked = decoder_neighbours(W_dec, 4)
    assert torch.equal(chunked.features, whole.features)
    torch.testing.assert_close(chunked.cosines, whole.cosines)
    assert torch.equal(
        logit_effects(W_dec, LOGIT_MATRIX, 4).positive_tokens, effects.positive_tokens
    )


def test_neighbours_of_zero_rows_and_of_a_single_feature():
    W_dec = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-2.0, 0.0]])
    nearest = decoder_neighbours(W_dec, 10)
    assert nearest.features.shape == (3, 2)
    assert nearest.cosines.tolist() == [[0.0, 0.0], [0.0, -1.0], [0.0, -1.0]]
    assert decoder_neighbours(torch.ones(1, 2), 10).features.shape == (1, 0)


# --------------------------------------------------------------------- ranges, resuming, limits


@pytest.mark.parametrize("n_firings, n_parts", [(10**6, 1), (300, 5), (1, D_SAE)])
def test_ranges_change_nothing(tmp_path, store, index, monkeypatch, n_firings, n_parts):
    counted = []
    original = feature_tables._write_range
    monkeypatch.setattr(
        feature_tables, "_write_range", lambda *given: (counted.append(1), original(*given))
    )
    limits = BuildLimits(firings=n_firings, threads=1, memory_gb=0.2)
    again = index_in(tmp_path, store, limits=limits)
    assert abs(len(counted) - n_parts) <= (1 if n_parts == 5 else 0)
    for name in TABLES:
        assert table(again, name).equals(table(index, name)), name


@given(n_active=st.lists(st.integers(0, 50), min_size=1, max_size=30), firings=st.integers(1, 100))
def test_ranges_cover_all_features_once(n_active, firings):
    ranges = feature_ranges(np.array(n_active), firings)
    assert [feature for part in ranges for feature in part] == list(range(len(n_active)))
    for part in ranges:
        assert len(part) == 1 or sum(n_active[feature] for feature in part) <= firings


def test_histogram_edges():
    edges = histogram_edges(0.5, 200.0, 50)
    assert len(edges) == 51
    assert edges[-1] == 200.0
    assert edges[0] == pytest.approx(0.5)
    assert edges == sorted(set(edges))
    assert histogram_edges(1e-9, 100.0, 4) == pytest.approx([0.01, 0.1, 1.0, 10.0, 100.0])
    assert histogram_edges(3.0, 3.0, 2) == pytest.approx([0.3, 0.3 * 10**0.5, 3.0])
    assert histogram_edges(0.0, 0.0, 1) == pytest.approx([0.1, 1.0])


class Stopped(Exception):
    """Stands in for a kill."""


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_encoding_resumes(tmp_path, store, index, monkeypatch, after):
    original, calls = feature_codes.encode_piece, []

    def stopping(*given):
        if len(calls) == after:
            raise Stopped
        calls.append(given[2])
        return original(*given)

    monkeypatch.setattr(feature_codes, "encode_piece", stopping)
    with pytest.raises(Stopped):
        index_in(tmp_path, store)
    run = Run.open(next(tmp_path.glob("index-*")))
    assert not run.complete
    (run.path / "work").mkdir(exist_ok=True)
    (run.path / "work" / ".codes-00009-000000000.parquet.1.tmp").write_bytes(b"half")
    (run.path / ".examples.parquet.1.tmp").write_bytes(b"half")
    monkeypatch.setattr(
        feature_codes, "encode_piece", lambda *given: (calls.append(given[2]), original(*given))[1]
    )
    again = index_in(tmp_path, store)
    assert len(calls) == len(set(calls)) >= store.n_shards, "no piece is encoded twice"
    for name in TABLES:
        assert table(again, name).equals(table(index, name)), name
    left = {path.name for path in run.path.iterdir()}
    assert left == {f"{name}.parquet" for name in TABLES} | {
        "config.json", "manifest.json", ".lock",
    }  # fmt: skip


def test_statistics_resume(tmp_path, store, index, monkeypatch):
    original, calls = feature_tables._write_range, []

    def stopping(*given):
        if len(calls) == 2:
            raise Stopped
        calls.append(given[3]["examples"])
        original(*given)

    limits = BuildLimits(firings=300)
    monkeypatch.setattr(feature_tables, "_write_range", stopping)
    with pytest.raises(Stopped):
        index_in(tmp_path, store, limits=limits)
    monkeypatch.setattr(feature_codes, "encode_piece", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr(
        feature_tables,
        "_write_range",
        lambda *given: (calls.append(given[3]["examples"]), original(*given)),
    )
    again = index_in(tmp_path, store, limits=limits)
    assert len(calls) == len(set(calls)) >= 4
    for name in TABLES:
        assert table(again, name).equals(table(index, name)), name


def test_coactivations_resume(tmp_path, store, index, monkeypatch):
    original, calls = feature_coactivation.Count.strongest, []

    def stopping(count, *given):
        if len(calls) == 3:
            raise Stopped
        calls.append(count.block)
        return original(count, *given)

    limits = BuildLimits(threads=1, memory_gb=1e-6)  # 5 features a block
    monkeypatch.setattr(feature_coactivation.Count, "strongest", stopping)
    monkeypatch.setattr(features, "open_engine", lambda path, _: open_engine(path, BuildLimits()))
    with pytest.raises(Stopped):
        index_in(tmp_path, store, limits=limits)
    assert not Run.open(next(tmp_path.glob("index-*"))).complete
    monkeypatch.setattr(feature_tables, "_write_range", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(
        feature_coactivation.Count,
        "strongest",
        lambda count, *given: (calls.append(count.block), original(count, *given))[1],
    )
    again = index_in(tmp_path, store, limits=limits)
    assert calls == [range(start, min(start + 5, D_SAE)) for start in range(0, D_SAE, 5)]
    for name in TABLES:
        assert table(again, name).equals(table(index, name)), name


def test_too_many_pairs_are_counted_on_drawn_sequences(tmp_path, store, firings):
    pairs = sum(n * n for n in Counter((f.sequence, f.position) for f in firings).values())
    exact = index_in(tmp_path / "all", store, config=replace(CONFIG, coactive_pairs=pairs))
    assert exact.summary["n_coactive_rows"] == store.n_rows
    config = replace(CONFIG, coactive_pairs=pairs // 2)
    index = index_in(tmp_path / "half", store, config=config)
    drawn = np.random.default_rng(CONFIG.seed).random(53) < pairs // 2 / pairs
    counted = torch.cat([store.shard(i, SITE).sequence for i in range(store.n_shards)]).numpy()
    n_rows = int(drawn[counted].sum())
    assert index.summary["n_coactive_rows"] == n_rows < store.n_rows
    some = [f for f in firings if drawn[f.sequence]]
    places = {place: i for i, place in enumerate({(f.sequence, f.position) for f in some})}
    fires = np.zeros((len(places), D_SAE), np.int64)
    for firing in some:
        fires[places[firing.sequence, firing.position], firing.feature] = 1
    expected = strongest_pairs(fires.T @ fires, n_rows, CONFIG.coactive)
    found = table(index, "coactivations").to_pylist()
    names = ("feature", "rank", "other", "n_both", "jaccard")
    assert [tuple(row[name] for name in names) for row in found] == [row[:5] for row in expected]


def test_a_complete_index_is_not_made_again(tmp_path, store, monkeypatch):
    index_in(tmp_path, store)
    monkeypatch.setattr(features, "_measure", lambda *_, **__: pytest.fail("made again"))
    index_in(tmp_path, store)


def test_a_damaged_piece_is_told(tmp_path, store, monkeypatch):
    monkeypatch.setattr(feature_tables, "_write_range", lambda *_: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        index_in(tmp_path, store)
    piece = next(tmp_path.glob("index-*/work/codes-*"))
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(Failure, match=r"is damaged .*delete that folder and run"):
        index_in(tmp_path, store)


def test_a_full_disk_is_told(tmp_path, store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_codes, "encode_piece", full)
    with pytest.raises(Failure, match="is full; free some space and run the same command"):
        index_in(tmp_path, store)


@pytest.mark.parametrize("max_rows", [1, 8, 90, 250])
def test_max_rows_is_rounded_up_to_a_whole_sequence(tmp_path, store, firings, max_rows):
    used = rows_used(store, SITE, max_rows)
    rows = torch.cat([store.shard(i, SITE).sequence for i in range(store.n_shards)])
    n = int((rows <= rows[max_rows - 1]).sum())
    assert sum(used) == n
    index = index_in(tmp_path, store, config=replace(CONFIG, max_rows=max_rows))
    last = int(rows[n - 1])
    some = [firing for firing in firings if firing.sequence <= last]
    assert table(index, "examples").to_pylist() == expected_examples(some, CONFIG, D_SAE)
    assert table(index, "sequences")["sequence"].to_pylist() == list(range(last + 1))
    assert index.summary["n_rows"] == n


def test_more_rows_than_there_are_is_all(store):
    assert sum(rows_used(store, SITE, 10**9)) == store.n_rows
    assert sum(rows_used(store, SITE, None)) == store.n_rows


def test_an_sae_without_a_living_feature(tmp_path, store):
    sae = make_sae()
    sae.b_enc.fill_(-1000)
    index = index_in(tmp_path, store, sae=sae)
    assert index.n_alive == 0
    assert index.summary["l0"] == 0
    assert len(table(index, "examples")) == len(table(index, "tokens")) == 0
    assert index.feature(3)["histogram"] == [0] * CONFIG.histogram_bins
    assert len(index.examples(3)) == len(index.coactive(3)) == 0
    with pytest.raises(UserError, match=r"no feature of .* fires"):
        index.random_alive()
    with pytest.raises(UserError, match=r"no feature of .* fires"):
        index.next_alive(0)


def test_nothing_asked_for_gives_empty_lists(tmp_path, store):
    nothing = replace(CONFIG, neighbours=0, coactive=0, logits=0, random=0, per_interval=0)
    index = index_in(tmp_path, store, config=nothing)
    row = index.feature(0)
    assert row["positive_tokens"] == row["negative_logits"] == []
    assert row["nearest_cosine"] is None
    assert len(index.neighbours(0)) == len(index.coactive(0)) == 0
    assert set(index.examples(0)["kind"]) == {"top"}


def test_non_finite_codes_are_told(tmp_path, store):
    sae = make_sae()
    sae.b_enc[2] = torch.inf
    with pytest.raises(Failure, match="NaN or infinity on row 0 of the store"):
        index_in(tmp_path, store, sae=sae)


def test_another_width_or_vocabulary_is_told(tmp_path, store):
    wide = SparseAutoencoder(SaeConfig(d_in=7, d_sae=8, activation=TopK(k=2)))
    with pytest.raises(UserError, match=f"width 7 and site {SITE} .* has width 6"):
        index_in(tmp_path, store, sae=wide)
    with pytest.raises(Failure, match="token 29 and the vocabulary has 20 pieces"):
        index_in(tmp_path, store, vocabulary=VOCABULARY[:20])


def test_config_out_of_range_is_told():
    with pytest.raises(UserError, match="top of an index must be 1 or more; got 0"):
        IndexConfig(top=0)
    with pytest.raises(UserError, match="max_rows of an index must be 1 or more; got 0"):
        IndexConfig(max_rows=0)
    with pytest.raises(UserError, match="must be above zero"):
        BuildLimits(memory_gb=0.0)


def test_progress_goes_to_stderr_only_when_asked(tmp_path, store, capfd):
    index_in(tmp_path / "quiet", store)
    assert capfd.readouterr() == ("", "")
    index_in(tmp_path / "told", store, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    for bar in ("encode", "statistics", "coactivations", "neighbours", "logits"):
        assert bar in err


# ------------------------------------------------------------------------------------ queries


def test_feature_is_its_row(index):
    rows = table(index, "features").to_pylist()
    for feature in (0, DEAD[0], D_SAE - 1):
        assert index.feature(feature) == rows[feature]


@given(
    sort=st.sampled_from(["feature", "density", "max", "mean", "nearest_cosine", "alive"]),
    descending=st.booleans(),
    alive=st.sampled_from([None, True, False]),
    density=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    text=st.sampled_from(["", "AB", "cd1", "F\u00c9", "<x>", "absent", "%", "_", "'"]),
    among=st.none() | st.lists(st.integers(0, D_SAE - 1), max_size=10),
    limit=st.integers(0, 30),
    offset=st.integers(0, 30),
)
@settings(max_examples=60, deadline=None)
def test_table_equals_pandas(index, sort, descending, alive, density, text, among, limit, offset):
    page = index.table(
        sort=sort, descending=descending, alive=alive, min_density=density[0],
        max_density=density[1], text=text, among=among, limit=limit, offset=offset,
    )  # fmt: skip
    rows = table(index, "features").to_pandas()
    named = [
        any(text.lower() in token.lower() for token in [*top, *positive])
        for top, positive in zip(rows["top_tokens"], rows["positive_tokens"], strict=True)
    ]
    keep = rows["density"].between(*density) & (np.array(named) | (text == ""))
    if alive is not None:
        keep &= rows["alive"] == alive
    if among is not None:
        keep &= rows["feature"].isin(among)
    expected = rows[keep].sort_values(
        [sort, "feature"] if sort != "feature" else "feature",
        ascending=[not descending, True] if sort != "feature" else not descending,
        na_position="last",
    )
    assert page.total == len(expected)
    assert page.rows["feature"].tolist() == expected["feature"][offset : offset + limit].tolist()
    assert "histogram" not in page.rows and "named" not in page.rows


def test_numbers_are_all_of_them(index):
    numbers = index.numbers()
    rows = table(index, "features").to_pandas()
    pd.testing.assert_frame_equal(numbers, rows[list(numbers.columns)])
    assert "top_tokens" not in numbers


def test_examples_carry_their_texts_and_documents(index):
    rows = index.examples(0, "top")
    assert rows["rank"].tolist() == list(range(len(rows)))
    sequences = {row["sequence"]: row for row in table(index, "sequences").to_pylist()}
    for row in rows.itertuples():
        assert row.tokens == sequences[row.sequence]["tokens"]
        assert row.texts == [VOCABULARY[token] for token in row.tokens]
        assert row.tokens[row.position] == row.token
        assert row.document == f"doc-{sequences[row.sequence]['docs'][row.position]}"
        assert row.activations[list(row.positions).index(row.position)] == row.activation
    kinds = [len(index.examples(0, kind)) for kind in ("top", "interval", "random")]
    assert sum(kinds) == len(index.examples(0))


def test_sequences_come_from_any_row_group(tmp_path, store, monkeypatch):
    monkeypatch.setattr(feature_codes, "SEQUENCE_TOKENS_IN_ROW_GROUP", 2 * CONTEXT)
    index = index_in(tmp_path, store)
    assert pq.read_metadata(index.path / "sequences.parquet").num_row_groups == 8 * 3 + 3
    expected = table(index, "sequences")["tokens"].to_pylist()
    assert index.sequences([]) == {}
    for wanted in ([0], [52, 0, 31, 31], list(range(53))):
        assert index.sequences(wanted) == {i: expected[i] for i in wanted}


@given(
    keys=st.lists(st.integers(-3, 12), max_size=40).map(sorted),
    wanted=st.lists(st.integers(-5, 15), max_size=5),
    row_group=st.integers(1, 5),
)
@settings(deadline=None)
def test_sorted_lookups_equal_a_filter(tmp_path_factory, keys, wanted, row_group):
    path = tmp_path_factory.mktemp("sorted") / "file.parquet"
    numbers = list(range(len(keys)))
    rows = pa.table({"key": pa.array(keys, pa.int32()), "n": pa.array(numbers, pa.int64())})
    pq.write_table(rows, path, row_group_size=row_group)
    file = SortedParquet(path, "key")
    expected = [n for key, n in zip(keys, numbers, strict=True) if key in wanted]
    assert file.read(wanted)["n"].to_pylist() == expected
    only = file.read(wanted, ["n"])
    assert only.column_names == ["n"]
    assert only["n"].to_pylist() == expected


def test_neighbours_say_what_they_fire_on(index):
    rows = index.neighbours(2)
    expected = table(index, "neighbours").to_pandas().query("feature == 2")
    assert rows["neighbour"].tolist() == expected["neighbour"].tolist()
    for row in rows.itertuples():
        assert list(row.top_tokens) == index.feature(row.neighbour)["top_tokens"]


def test_coactive_features_say_what_they_fire_on(index):
    rows = index.coactive(0)
    expected = table(index, "coactivations").to_pandas().query("feature == 0")
    assert len(rows) > 2
    assert list(rows.columns) == [
        "rank", "other", "n_both", "jaccard", "pmi", "alive", "density", "max", "top_tokens",
    ]  # fmt: skip
    for name in ("rank", "other", "n_both", "jaccard", "pmi"):
        assert rows[name].tolist() == expected[name].tolist()
    for row in rows.itertuples():
        other = index.feature(row.other)
        assert list(row.top_tokens) == other["top_tokens"]
        assert (row.alive, row.density, row.max) == (True, other["density"], other["max"])
    assert len(index.coactive(DEAD[0])) == len(index.coactive(FIRES_ONCE)) == 0


def test_tokens_for_feature_and_features_for_token(index):
    pairs = table(index, "tokens").to_pandas()
    own = index.tokens_for_feature(1)
    expected = pairs[pairs["feature"] == 1].sort_values("rank_for_feature")
    assert own["token"].tolist() == expected["token"].tolist()
    assert own["text"].tolist() == [VOCABULARY[token] for token in own["token"]]
    token = 6
    found = index.features_for_token(token)
    expected = pairs[pairs["token"] == token].sort_values("rank_for_token")
    assert found["feature"].tolist() == expected["feature"].tolist()
    assert VOCABULARY[token] == " Cd6"
    for text in (" Cd6", "Cd6"):
        pd.testing.assert_frame_equal(index.features_for_token(text), found)


def test_unknown_tokens_are_told(index):
    with pytest.raises(UserError, match="there is no token 30; ids go from 0 to 29"):
        index.features_for_token(30)
    with pytest.raises(UserError, match=r"'d6' is no token of this vocabulary; .*: ' Cd6'"):
        index.features_for_token("d6")
    with pytest.raises(UserError, match="none contains it"):
        index.features_for_token("zzz")


def test_search_by_text_equals_a_recount(index, firings):
    found = index.search_text("AB")
    matching = {i for i, text in enumerate(VOCABULARY) if "ab" in text.lower()}
    expected = {}
    for feature, own in by_feature(firings).items():
        on = sum(firing.value for firing in own if firing.token in matching)
        if on:
            expected[feature] = (on, on / sum(firing.value for firing in own))
    order = sorted(expected, key=lambda f: (-math.prod(expected[f]), f))
    assert found["feature"].tolist() == order
    for row in found.itertuples():
        assert (row.activation, row.share) == pytest.approx(expected[row.feature], rel=1e-6)
        assert all("ab" in text.lower() for text in row.matched)
    assert len(index.search_text("absent")) == 0
    assert index.search_text("AB", limit=2)["feature"].tolist() == order[:2]
    with pytest.raises(UserError, match="a search needs part of a token"):
        index.search_text("")


def test_tokens_like(index):
    found = index.tokens_like("CD")
    assert found["text"].tolist() == ["Cd1", " Cd6", "Cd11", "Cd16", "Cd26", " Cd21"]


def test_walking_the_living_features(index):
    alive = [f for f in range(D_SAE) if f not in DEAD]
    walked, feature = [], D_SAE - 1
    for _ in alive:
        feature = index.next_alive(feature)
        walked.append(feature)
    assert walked == alive
    assert index.next_alive(DEAD[0]) == DEAD[0] + 1
    assert index.previous_alive(DEAD[0]) == DEAD[0] - 1
    assert index.previous_alive(0) == alive[-1]
    assert {index.random_alive(seed) for seed in range(300)} == set(alive)
    assert index.random_alive(7) == index.random_alive(7)


@pytest.mark.parametrize("feature", [-1, D_SAE])
def test_no_such_feature_is_told(index, feature):
    message = f"there is no feature {feature}; this SAE has features 0 to {D_SAE - 1}"
    asks = (index.feature, index.examples, index.neighbours, index.coactive, index.next_alive)
    for ask in asks:
        with pytest.raises(UserError, match=message):
            ask(feature)


def test_a_table_that_cannot_be_is_told(index):
    with pytest.raises(UserError, match=r"features sort by one of feature, alive.*got 'name'"):
        index.table(sort="name")
    with pytest.raises(UserError, match="0 or more; got -1"):
        index.table(limit=-1)


def test_threads_share_an_index(index):
    expected = [index.examples(f)["texts"].tolist() for f in range(D_SAE)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda f: index.examples(f)["texts"].tolist(), range(D_SAE)))
    assert found == expected


def test_a_folder_name_with_quotes_and_wildcards(tmp_path, store):
    index = index_in(tmp_path / "it's [a] *folder*?", store)
    assert len(index.examples(0, "top")) == CONFIG.top


# ------------------------------------------------------------------------------------- opening


@pytest.fixture
def copied(tmp_path: Path, index: FeatureIndex) -> Path:
    return shutil.copytree(index.path, tmp_path / "sae" / "index")


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_or_truncated_file_is_told(copied, name):
    file = copied / f"{name}.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    advice = f"delete .* and run `lorgnette index {copied.parent}`"
    with pytest.raises(Failure, match=f"{name}.parquet has .* bytes, not .*{advice}"):
        FeatureIndex.open(copied)
    file.unlink()
    with pytest.raises(Failure, match=f"{name}.parquet is missing; {advice}"):
        FeatureIndex.open(copied)


@pytest.mark.parametrize("name", ["features", "vocabulary", "sequences", "examples", "tokens"])
def test_a_file_damaged_at_its_length_is_told(copied, name):
    file = copied / f"{name}.parquet"
    file.write_bytes(b"?" * file.stat().st_size)
    with pytest.raises(Failure, match=r"cannot be read .*run `lorgnette index"):
        found = FeatureIndex.open(copied)
        found.examples(0)
        found.tokens_for_feature(0)


def test_an_incomplete_index_is_told(copied):
    (copied / "manifest.json").unlink()
    with pytest.raises(Failure, match=f"not complete; run `lorgnette index {copied.parent}`"):
        FeatureIndex.open(copied)


def test_another_schema_or_kind_is_told(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"schema": 99}))
    with pytest.raises(
        Failure, match=r"has schema 99 where this version reads 2; run `lorgnette index .*beside it"
    ):
        FeatureIndex.open(copied)
    (copied / "config.json").write_text(json.dumps(config | {"kind": "sae"}))
    with pytest.raises(UserError, match="is of kind 'sae'; give the folder"):
        FeatureIndex.open(copied)
    with pytest.raises(UserError, match="is not a folder that lorgnette wrote"):
        FeatureIndex.open(copied.parent)
