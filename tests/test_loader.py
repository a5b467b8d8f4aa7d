"""Shuffled batches: every row once, well mixed, in bounded memory, restarted exactly."""

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import probe.loader
from probe.corpora import token_batches
from probe.errors import Failure, UserError
from probe.language import LanguageModel
from probe.loader import ActivationSource, StoreReader, StreamSource, repeat_usual
from probe.ranks import Ranks
from probe.runs import Run
from probe.sites import parse_site
from probe.store import ActivationStore, StoreConfig
from probe.store_writing import write_store
from probe.toy import tiny_llama

SITE = "resid_post.0"
ROWS_A_SEQUENCE = 50


def made_store(
    parent: Path, shard_rows: list[int], d: int = 4, dtype: Any = "float32"
) -> ActivationStore:
    """A store written by hand, file by file; column 0 of row i is i, column 1 is its sequence."""
    config = StoreConfig(
        model={"spec": "made", "random_weights": None, "dtype": dtype},
        corpus="made",
        sites=(SITE,),
        dtype=dtype,
    )
    run = Run.create(parent, "made", config.run_config())
    (run.path / SITE).mkdir()
    first = 0
    for i, n in enumerate(shard_rows):
        row = torch.arange(first, first + n)
        values = torch.ones(n, d, dtype=getattr(torch, dtype))
        values[:, 0], values[:, 1] = row, row // ROWS_A_SEQUENCE
        save_file({"values": values}, run.path / SITE / f"acts-{i:05d}.safetensors")
        save_file(
            {"doc": torch.zeros(n, dtype=torch.int32)}, run.path / f"rows-{i:05d}.safetensors"
        )
        first += n
    summary = {"n_shards": len(shard_rows), "widths": {SITE: d}}
    run.finish(summary=summary, inputs={}, seeds={}, device="cpu")
    return ActivationStore.open(run.path)


def row_numbers(batches: list[Tensor]) -> list[int]:
    return torch.cat(batches)[:, 0].long().tolist()


def take(source: ActivationSource, start: int, n: int) -> list[Tensor]:
    return list(itertools.islice(source.batches(start), n))


# ------------------------------------------------------------------------------------ store


@pytest.mark.parametrize(
    ("shard_rows", "batch_size", "buffer_rows"),
    [
        ([700, 650, 13, 137], 32, 256),  # 46 batches an epoch, 28 rows left over
        ([700, 650, 13, 137], 32, 10**6),  # one buffer
        ([700, 650, 13, 137], 32, 1),  # a buffer is never less than a batch
        ([64, 64], 64, 64),  # nothing left over
        ([0, 100, 0, 30], 7, 50),  # empty shards
        ([129], 129, 40),  # one batch an epoch
        ([5], 1, 2),
    ],
)
def test_an_epoch_visits_each_row_at_most_once_and_all_but_the_rest(
    tmp_path, shard_rows, batch_size, buffer_rows
):
    store = made_store(tmp_path, shard_rows)
    reader = StoreReader(store, SITE, batch_size, 0, buffer_rows)
    n_batches = sum(shard_rows) // batch_size
    assert reader.batches_per_epoch == n_batches and reader.n_rows == sum(shard_rows)
    batches = take(reader, 0, 3 * n_batches)
    for batch in batches:
        assert batch.shape == (batch_size, 4) and batch.dtype == torch.float32
        assert torch.equal(batch[:, 1], batch[:, 0] // ROWS_A_SEQUENCE)
        assert torch.equal(batch[:, 2:], torch.ones(batch_size, 2))
    orders = [row_numbers(batches[i * n_batches : (i + 1) * n_batches]) for i in range(3)]
    for order in orders:
        assert len(set(order)) == len(order) == n_batches * batch_size
        assert set(order) <= set(range(sum(shard_rows)))
    if sum(shard_rows) > 5:
        assert orders[0] != orders[1] != orders[2]


def test_rows_left_over_change_from_epoch_to_epoch(tmp_path):
    reader = StoreReader(made_store(tmp_path, [700, 650, 150]), SITE, 400, 0, 800)
    epochs = [set(row_numbers(take(reader, 3 * epoch, 3))) for epoch in range(6)]
    assert all(len(rows) == 1200 for rows in epochs)
    assert len(set.union(*epochs)) == 1500
    assert len({frozenset(rows) for rows in epochs}) == 6


def test_order_depends_on_seed_alone(tmp_path):
    store = made_store(tmp_path, [700, 800])
    first, again, other = (
        row_numbers(take(StoreReader(store, SITE, 32, seed, 256), 0, 60)) for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.parametrize("buffer_rows", [1, 100, 256, 10**6])
def test_restart_at_any_batch_is_exact(tmp_path, buffer_rows):
    reader = StoreReader(made_store(tmp_path, [300, 170, 43]), SITE, 32, 1, buffer_rows)
    reference = take(reader, 0, 55)  # 16 batches an epoch
    for start in range(50):
        for found, expected in zip(take(reader, start, 3), reference[start:], strict=False):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("buffer_rows", [1, 100, 10**6])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_ranks_rows_make_up_every_batch(tmp_path, monkeypatch, size, buffer_rows):
    store, gathered, plain = made_store(tmp_path, [300, 170, 43]), [], StoreReader._gather

    def counting(self, rows, buffer):
        gathered.append(len(rows))
        return plain(self, rows, buffer)

    monkeypatch.setattr(StoreReader, "_gather", counting)
    reader = StoreReader(store, SITE, 32, 1, buffer_rows)
    parts = []
    for rank in range(size):
        gathered.clear()
        own = reader.own_batches(5, Ranks(rank=rank, size=size))
        parts.append(list(itertools.islice(own, 40)))  # 16 batches an epoch
        assert max(gathered) <= -(-32 // size) * max(1, min(16, buffer_rows // 32))
    for batch, *found in zip(take(reader, 5, 40), *parts, strict=True):
        assert torch.equal(torch.cat(found), batch)


def test_restart_reads_nothing_of_what_is_before(tmp_path, monkeypatch):
    reader = StoreReader(made_store(tmp_path, [64 * 1000]), SITE, 64, 0, 640)
    gathered = []
    plain = StoreReader._gather

    def counting(self, rows, buffer):
        gathered.append(len(rows))
        return plain(self, rows, buffer)

    monkeypatch.setattr(StoreReader, "_gather", counting)
    take(reader, 1_000_000_995, 1)
    assert gathered == [640, 640]  # the buffer that the batch is in, and the one after it


@pytest.mark.parametrize("stop_row", [1, 64, 333, 700, 701, 1500, 9999])
def test_rows_from_stop_row_on_are_never_seen(tmp_path, stop_row):
    store = made_store(tmp_path, [700, 800])
    reader = StoreReader(store, SITE, 1, 0, 256, stop_row=stop_row)
    n_rows = min(stop_row, 1500)
    assert reader.n_rows == reader.batches_per_epoch == n_rows
    assert sorted(row_numbers(take(reader, n_rows, n_rows))) == list(range(n_rows))
    assert max(row_numbers([reader.sample(n_rows)])) == n_rows - 1
    with pytest.raises(UserError, match="fewer than one batch"):
        StoreReader(store, SITE, n_rows + 1, stop_row=stop_row)


def test_a_batch_mixes_many_sequences(tmp_path):
    store = made_store(tmp_path, [10_000] * 10)  # 2000 sequences of 50 rows
    reader = StoreReader(store, SITE, 1024, 0, 2**14)
    for batch in take(reader, 5, 5):
        sequences = batch[:, 1].unique()
        # 16384 / 64 = 256 blocks of 64 rows, each touching 2 or 3 of the sequences.
        assert len(sequences) > 350
        assert sequences.min() < 200 and sequences.max() > 1800
        neighbours = (batch[:, 0].diff().abs() == 1).float().mean()
        assert neighbours < 0.01


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_dtype_is_read_back_exactly(tmp_path, dtype):
    store = made_store(tmp_path, [100, 156], dtype=dtype)  # whole numbers to 256 are exact in bf16
    assert sorted(row_numbers(take(StoreReader(store, SITE, 8), 0, 32))) == list(range(256))


def test_memory_is_bounded_by_the_buffers(tmp_path):
    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    store = made_store(tmp_path, [20_000] * 20, d=64)  # 102 MB
    reader = StoreReader(store, parse_site(SITE), 512, 0, 16_384)  # buffers of 4 MB
    stream = reader.batches(0)
    next(stream)
    before = held()
    highest = max(held() for _ in itertools.islice(stream, reader.batches_per_epoch))
    assert highest - before < 30_000  # kB


def test_sample_is_spread_over_the_store(tmp_path):
    reader = StoreReader(made_store(tmp_path, [600, 400]), SITE, 10, 0)
    sample = reader.sample(100)
    assert sample.shape == (100, 4) and sample.dtype == torch.float32
    assert torch.equal(sample, reader.sample(100))
    rows = sample[:, 0].long()
    assert rows.tolist() != sorted(rows.tolist())
    assert (rows.sort().values // 10).tolist() == list(range(100))  # one of each ten
    assert sorted(reader.sample(1000)[:, 0].tolist()) == list(range(1000))
    assert sorted(reader.sample(2000)[:, 0].tolist()) == list(range(1000))


def test_store_reader_refuses(tmp_path):
    store = made_store(tmp_path, [10])
    with pytest.raises(UserError, match="has 10 rows to read, fewer than one batch of 11"):
        StoreReader(store, SITE, 11)
    with pytest.raises(UserError, match="at least 1, got 0"):
        StoreReader(store, SITE, 0)
    with pytest.raises(UserError, match=r"no site mlp_out\.0"):
        StoreReader(store, "mlp_out.0", 5)


def test_trouble_in_the_background_comes_out(tmp_path, monkeypatch):
    reader = StoreReader(made_store(tmp_path, [100]), SITE, 10, 0, 20)
    stream = reader.batches(0)
    next(stream)

    def damaged(self, rows, buffer):
        raise Failure("the disk is gone.")

    monkeypatch.setattr(StoreReader, "_gather", damaged)
    with pytest.raises(Failure, match="the disk is gone"):
        for _ in range(10):
            next(stream)


# ----------------------------------------------------------------------------------- stream


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_llama(0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [f'{{"text": "{"abcdefghij"[i % 10] * (3 * i + 5)}{i}"}}' for i in range(12)]
    path.write_text("\n".join(rows))
    return str(path)


def make_stream(model, corpus, batch_size=16, buffer_rows=64, **changes) -> StreamSource:
    read = functools.partial(
        token_batches, corpus, model, **({"context": 16, "batch_sequences": 4} | changes)
    )
    return StreamSource(model, parse_site(SITE), read, batch_size, 0, buffer_rows)


def test_stream_gives_the_store_s_rows_once_a_round(tmp_path, model, corpus):
    config = StoreConfig(
        model={"spec": "tiny", "random_weights": None, "dtype": "float32"},
        corpus=corpus,
        sites=(SITE,),
        context=16,
        batch_sequences=4,
        dtype="float32",
    )
    run = Run.create(tmp_path, "tiny", config.run_config())
    store = write_store(run, model, progress=False)
    expected = torch.cat([store.values(i, SITE) for i in range(store.n_shards)])
    source = make_stream(model, corpus, batch_size=1, buffer_rows=64)
    assert source.d == 32 and source.n_rows is None
    n_buffers = len(expected) // 64
    rows = torch.cat(take(source, 0, 64 * n_buffers))
    assert not torch.equal(rows, expected[: len(rows)])
    for i in range(n_buffers):
        buffer, whole = rows[64 * i : 64 * i + 64], expected[64 * i : 64 * i + 64]
        order = [int((whole == row).all(1).nonzero()[0]) for row in buffer]
        distinct = len(torch.unique(whole, dim=0))
        assert len(set(order)) == distinct and order != sorted(order)
    assert rows.dtype == torch.float32 and not rows.is_inference()


@pytest.mark.parametrize("buffer_rows", [1, 50, 96, 1000])
def test_stream_restarts_exactly_at_any_batch(model, corpus, buffer_rows):
    source = make_stream(model, corpus, buffer_rows=buffer_rows)
    reference = take(source, 0, 50)  # about 14 batches a round of the corpus
    for start in (0, 1, 5, 13, 14, 15, 29, 44):
        again = make_stream(model, corpus, buffer_rows=buffer_rows)
        for found, expected in zip(take(again, start, 4), reference[start:], strict=False):
            assert torch.equal(found, expected)


def test_stream_skips_without_running_the_model(model, corpus, monkeypatch):
    calls = []
    plain = probe.loader.capture_rows
    monkeypatch.setattr(
        probe.loader, "capture_rows", lambda *args: calls.append(args) or plain(*args)
    )
    take(make_stream(model, corpus, buffer_rows=16), 0, 60)
    all_calls = len(calls)
    calls.clear()
    take(make_stream(model, corpus, buffer_rows=16), 59, 1)
    assert len(calls) <= 2 < all_calls


def test_stream_mixes_sequences(model, corpus):
    read = list(make_stream(model, corpus)._read_tokens())
    assert sum(len(batch.tokens) for batch in read) > 10
    source = make_stream(model, corpus, batch_size=16, buffer_rows=128)
    straight = make_stream(model, corpus, batch_size=128, buffer_rows=128)
    block = next(straight._buffers(0, 128)).clone()
    for batch in take(source, 0, 8):
        places = [int((block == row).all(1).nonzero()[0]) for row in batch]
        assert max(places) - min(places) > 64  # 16 rows drawn from all over the 128


def test_stream_sample(model, corpus):
    source = make_stream(model, corpus)
    assert source.sample(20).shape == (20, 32)
    assert torch.equal(source.sample(20), source.sample(20))
    assert source.sample(1000).shape == (1000, 32)  # more than the corpus has: it goes round


def test_stream_refuses_a_corpus_of_less_than_a_batch(model, corpus, tmp_path):
    source = make_stream(model, corpus, batch_size=100_000)
    with pytest.raises(UserError, match="rows, fewer than one batch of 100000"):
        next(source.batches(0))
    with pytest.raises(UserError, match="fewer than one batch"):
        next(source.batches(7))
    marks = tmp_path / "marks.jsonl"
    marks.write_text('{"text": "' + "<|endoftext|>" * 50 + '"}')
    with pytest.raises(UserError, match="has 0 rows"):
        next(make_stream(model, str(marks)).batches(0))


def test_both_are_activation_sources(tmp_path, model, corpus):
    sources: list[ActivationSource] = [
        StoreReader(made_store(tmp_path, [100]), SITE, 10),
        make_stream(model, corpus),
    ]
    for source in sources:
        shapes = {tuple(batch.shape) for batch in take(source, 0, 3)}
        assert len(shapes) == 1 and shapes.pop()[1] == source.d
        assert np.isfinite(source.sample(5).numpy()).all()


def test_outlier_rows_give_their_place_to_the_usual_row_before():
    rows = torch.tensor([[90.0], [1.0], [2.0], [80.0], [70.0], [3.0]])
    expected = [[1.0], [1.0], [2.0], [2.0], [2.0], [3.0]]
    assert repeat_usual(rows, 10.0).tolist() == expected
    assert repeat_usual(rows, 100.0) is rows
    assert repeat_usual(rows, 0.5) is rows
    assert repeat_usual(rows[:0], 1.0).shape == (0, 1)
