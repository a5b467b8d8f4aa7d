"""Capture to disk: against a plain reference, through kills, full disks and damage."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import probe.store_writing
from probe.errors import Failure, UserError
from probe.language import LanguageModel
from probe.runs import Run, own_files, verify
from probe.sites import parse_site
from probe.store import ActivationStore, StoreConfig
from probe.store_writing import Sums, estimate_store, write_store
from probe.toy import tiny_gpt2, tiny_llama

SITES = ("resid_post.0", "mlp_out.1", "module:model.layers.1.mlp:input")
CONTEXT = 16


def write_corpus(path: Path, n_documents: int = 24) -> str:
    """Documents of 0 to 99 random letters after a short start, as JSON lines."""
    letters = random.Random(7)
    lines = []
    for number in range(n_documents):
        length = letters.randrange(100)
        text = "start " + "".join(letters.choice("abcdefgh \n") for _ in range(length))
        lines.append(json.dumps({"id": f"document-{number}", "text": text}))
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_llama(0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def config_for(corpus: str, **changes) -> StoreConfig:
    values = {
        "model": {"spec": "tiny-llama", "random_weights": None, "dtype": "float32"},
        "corpus": corpus,
        "sites": SITES,
        "tokens": 900,
        "context": CONTEXT,
        "batch_sequences": 4,
        "shard_batches": 3,
    }
    return StoreConfig(**(values | changes))


def capture(parent: Path, model: LanguageModel, config: StoreConfig) -> ActivationStore:
    return write_store(Run.create(parent, "tiny", config.run_config()), model, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in own_files(folder).items()}


# ------------------------------------------------------------------------------ round trip


def reference_rows(model: LanguageModel, config: StoreConfig) -> list[dict]:
    """Every kept row, one by one, with plain transformers outputs and no code of the store."""
    stream: list[tuple[int, int]] = []
    for number, line in enumerate(Path(config.corpus).read_text().split("\n")):
        ids = model.tokenizer(json.loads(line)["text"])["input_ids"]
        stream += [(token, number) for token in [*ids, 0]]
    n_sequences = min(len(stream) // config.context, -(-config.tokens // config.context))
    rows = []
    for first in range(0, n_sequences, config.batch_sequences):
        cut = range(first, min(first + config.batch_sequences, n_sequences))
        pieces = [stream[s * config.context : (s + 1) * config.context] for s in cut]
        tokens = torch.tensor([[token for token, _ in piece] for piece in pieces])
        grabbed = {}
        mlp = model.model.get_submodule("model.layers.1.mlp")
        handle = mlp.register_forward_hook(
            lambda _, args, out, to=grabbed: to.update({SITES[1]: out, SITES[2]: args[0]})
        )
        with torch.no_grad():
            hidden = model.model(tokens, output_hidden_states=True).hidden_states
        handle.remove()
        grabbed[SITES[0]] = hidden[1]
        for i, sequence in enumerate(cut):
            for position, (token, doc) in enumerate(pieces[i]):
                if position > 0 and token != 0:
                    values = {site: grabbed[site][i, position] for site in SITES}
                    rows.append(
                        {"doc": doc, "sequence": sequence, "position": position, "token": token}
                        | values
                    )
    return rows


def all_rows(store: ActivationStore, site: str) -> dict[str, Tensor]:
    shards = [store.shard(i, site) for i in range(store.n_shards)]
    names = ("values", "doc", "sequence", "position", "token")
    return {name: torch.cat([getattr(shard, name) for shard in shards]) for name in names}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_equals_plain_reference(tmp_path, model, corpus, dtype):
    config = config_for(corpus, dtype=dtype)
    store = capture(tmp_path, model, config)
    expected = reference_rows(model, config)
    assert store.n_rows == len(expected) and store.n_shards == 5
    assert store.sites == list(SITES)
    for site in SITES:
        rows = all_rows(store, site)
        for name in ("doc", "sequence", "position", "token"):
            assert rows[name].tolist() == [row[name] for row in expected]
        values = torch.stack([row[site] for row in expected]).to(store.dtype)
        assert rows["values"].dtype == store.dtype
        assert store.d(site) == store.d(parse_site(site)) == 32
        torch.testing.assert_close(rows["values"], values)


def test_shards_hold_whole_sequences_and_follow_one_another(tmp_path, model, corpus):
    store = capture(tmp_path, model, config_for(corpus))
    shards = [store.shard(i, SITES[0]) for i in range(store.n_shards)]
    # 900 tokens = 57 sequences of 16 (rounded up) = shards of 12, 12, 12, 12, 9.
    assert [len(shard.tokens) for shard in shards] == [12, 12, 12, 12, 9]
    assert [shard.first_sequence for shard in shards] == [0, 12, 24, 36, 48]
    assert [shard.first_row for shard in shards] == store.first_rows[:-1]
    for shard in shards:
        local = shard.sequence.long() - shard.first_sequence
        position = shard.position.long()
        assert torch.equal(shard.tokens[local, position], shard.token)
        assert torch.equal(shard.sequence_doc[local, position], shard.doc)
        keep = shard.tokens != 0
        keep[:, 0] = False
        assert int(keep.sum()) == len(shard.values)
        assert shard.doc.dtype == shard.token.dtype == shard.tokens.dtype == torch.int32
        assert shard.position.dtype == torch.int16


def test_statistics_equal_numpy_in_float64(tmp_path, model, corpus):
    store = capture(tmp_path, model, config_for(corpus))
    saved = load_file(store.run.path / "statistics.safetensors")
    for site in SITES:
        values = all_rows(store, site)["values"].double().numpy()
        folder = store.config.folders()[site]
        np.testing.assert_allclose(saved[f"{folder}/mean"], values.mean(0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(saved[f"{folder}/sd"], values.std(0), rtol=1e-10)
        found = store.statistics(site)
        np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-6, atol=1e-7)
        assert found.mean_norm == pytest.approx(np.linalg.norm(values, axis=1).mean(), rel=1e-12)
        assert found.count == store.n_rows == len(values)


def test_sums_by_hand():
    sums = Sums.of(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    assert sums.sum.tolist() == [3.0, 2.0] and sums.sum_squares.tolist() == [9.0, 20.0]
    assert float(sums.norm_sum) == 7.0 and int(sums.count) == 2  # 5 + 2
    both = sums + Sums.of(torch.empty(0, 2))
    assert both.sum.tolist() == [3.0, 2.0] and int(both.count) == 2


def test_manifest_counts_what_was_dropped(tmp_path, model, corpus):
    store = capture(tmp_path, model, config_for(corpus))
    summary = store.run.manifest["summary"]
    tokens = torch.cat([store.shard(i, SITES[0]).tokens for i in range(store.n_shards)])
    assert summary["n_tokens"] == tokens.numel() == 57 * CONTEXT
    assert summary["dropped_position_0"] == 57 == summary["n_sequences"]
    assert summary["dropped_special_tokens"] == int((tokens[:, 1:] == 0).sum()) > 0
    assert summary["dropped_outlier_norms"] == 0
    dropped = summary["dropped_position_0"] + summary["dropped_special_tokens"]
    assert summary["n_rows"] == store.n_rows == summary["n_tokens"] - dropped
    assert summary["widths"] == dict.fromkeys(SITES, 32)
    assert verify(store.run) == []


def test_rows_of_outlier_norm_are_left_out_at_every_site(tmp_path, model, corpus):
    """Make one token's embedding huge: its rows go, all others stay as they were."""
    heavy = tiny_llama(seed=0)
    loud = heavy.tokenizer.encode("e")[0]
    with torch.no_grad():
        heavy.model.model.embed_tokens.weight[loud] *= 300
    kept, whole = (
        capture(tmp_path / str(ratio), heavy, config_for(corpus, max_norm=ratio))
        for ratio in (10.0, 0.0)
    )
    assert whole.n_rows > kept.n_rows > 0
    summary = kept.run.summary
    assert summary["dropped_outlier_norms"] == whole.n_rows - kept.n_rows
    norms = [
        [whole.shard(i, site).values.float().norm(dim=1) for i in range(whole.n_shards)]
        for site in whole.sites
    ]
    # The limit is ten medians of the first batch: the first rows of the store.
    first = int((whole.shard(0, whole.sites[0]).sequence < whole.config.batch_sequences).sum())
    usual = torch.stack(
        [torch.cat(parts) <= 10 * parts[0][:first].median() for parts in norms]
    ).all(0)
    for site in whole.sites:
        rows = [
            torch.cat([store.shard(i, site).values for i in range(store.n_shards)])
            for store in (whole, kept)
        ]
        assert torch.equal(rows[0][usual], rows[1])


def test_documents_are_named(tmp_path, model, corpus):
    store = capture(tmp_path, model, config_for(corpus))
    n_documents = store.run.manifest["summary"]["n_documents"]
    assert store.document_ids() == [f"document-{i}" for i in range(n_documents)]
    table = pq.read_table(store.run.path / "documents.parquet")
    assert table["doc"].to_pylist() == list(range(n_documents))
    assert int(all_rows(store, SITES[0])["doc"].max()) < n_documents


def test_a_corpus_shorter_than_asked_ends_early(tmp_path, model, corpus):
    store = capture(tmp_path, model, config_for(corpus, tokens=10**6, shard_batches=100))
    assert store.n_shards == 1 and store.run.manifest["summary"]["n_tokens"] < 10**4


def test_works_on_another_architecture_and_one_token_of_context_left(tmp_path, corpus):
    config = config_for(corpus, sites=("attn_out.0", "mlp_act.1"), context=2, tokens=40)
    store = capture(tmp_path, tiny_gpt2(0), config)
    assert (store.d("attn_out.0"), store.d("mlp_act.1")) == (32, 128)
    assert set(all_rows(store, "mlp_act.1")["position"].tolist()) == {1}


def test_a_complete_store_is_not_written_again(tmp_path, model, corpus, monkeypatch):
    first = capture(tmp_path, model, config_for(corpus))
    monkeypatch.setattr(probe.store_writing, "capture_rows", None)
    assert capture(tmp_path, model, config_for(corpus)).run.path == first.run.path


def test_progress_goes_to_stderr_only_when_asked(tmp_path, model, corpus, capfd):
    capture(tmp_path / "quiet", model, config_for(corpus))
    assert capfd.readouterr() == ("", "")
    run = Run.create(tmp_path / "loud", "tiny", config_for(corpus).run_config())
    write_store(run, model)
    out, err = capfd.readouterr()
    assert out == "" and "tokens/s" in err


# ---------------------------------------------------------------------------------- resume


class Stop(Exception):
    """Stands for a crash."""


def test_resumes_after_a_stop_at_any_batch(tmp_path, model, corpus, monkeypatch):
    config = config_for(corpus)
    expected = contents(capture(tmp_path / "whole", model, config).run.path)
    plain = probe.store_writing.capture_rows
    for stop in (0, 1, 2, 3, 7, 12, 14):
        calls = []

        def failing(*args, stop=stop, calls=calls):
            calls.append(args)
            if len(calls) == stop + 1:
                raise Stop
            return plain(*args)

        monkeypatch.setattr(probe.store_writing, "capture_rows", failing)
        parent = tmp_path / f"stop-{stop}"
        with pytest.raises(Stop):
            capture(parent, model, config)
        run = Run.open(next(parent.iterdir()))
        assert not run.complete and len(list(run.path.glob("rows-*"))) == stop // 3
        calls.clear()
        monkeypatch.setattr(
            probe.store_writing, "capture_rows", lambda *a, c=calls: c.append(a) or plain(*a)
        )
        assert contents(capture(parent, model, config).run.path) == expected
        again = 15 - stop // 3 * 3
        # A resumed capture looks at the first batch again, for the limit on norms.
        assert len(calls) == again + (stop >= 3), "only what follows the last shard is redone"


KILLED_SCRIPT = """
import sys, time
from pathlib import Path
import torch
import probe.store_writing
from probe.runs import Run
from probe.toy import tiny_llama
torch.set_num_threads(int(sys.argv[2]))
plain = probe.store_writing.capture_rows
def slow(*args):
    time.sleep(0.03)
    return plain(*args)
probe.store_writing.capture_rows = slow
probe.store_writing.write_store(Run.open(Path(sys.argv[1])), tiny_llama(0), progress=False)
"""


def test_resumes_bitwise_after_kill_9(tmp_path, model, corpus):
    config = config_for(corpus)
    expected = contents(capture(tmp_path / "whole", model, config).run.path)
    run = Run.create(tmp_path / "killed", "tiny", config.run_config())
    for shards_before_kill in (1, 3):
        threads = str(torch.get_num_threads())
        arguments = [sys.executable, "-c", KILLED_SCRIPT, str(run.path), threads]
        process = subprocess.Popen(arguments)
        deadline = time.monotonic() + 120
        while len(list(run.path.glob("rows-*"))) < shards_before_kill:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not run.complete
    assert len(list(run.path.glob("rows-*"))) < 5
    assert contents(write_store(run, model, progress=False).run.path) == expected


def test_redoes_torn_and_leftover_files(tmp_path, model, corpus, caplog):
    config = config_for(corpus)
    store = capture(tmp_path, model, config)
    folder, expected = store.run.path, contents(store.run.path)
    (folder / "manifest.json").unlink()
    (folder / "rows-00003.safetensors").unlink()
    torn = folder / "mlp_out.1" / "acts-00002.safetensors"
    torn.write_bytes(torn.read_bytes()[:500])
    (folder / "mlp_out.1" / ".acts-00004.safetensors.123.tmp").write_bytes(b"half")
    assert contents(capture(tmp_path, model, config).run.path) == expected
    assert "capturing again from shard 2 on" in caplog.text
    assert not list(folder.rglob("*.tmp"))


def test_two_writers_exclude_each_other(tmp_path, model, corpus):
    run = Run.create(tmp_path, "tiny", config_for(corpus).run_config())
    with run.lock(), pytest.raises(UserError, match="another process"):
        write_store(run, model, progress=False)


# --------------------------------------------------------------------------------- trouble


def test_empty_or_short_corpus(tmp_path, model):
    for name, text in (("empty", ""), ("blank", "\n \n"), ("short", '{"text": "hi"}')):
        (tmp_path / f"{name}.jsonl").write_text(text)
        config = config_for(str(tmp_path / f"{name}.jsonl"))
        with pytest.raises(UserError, match="corpus"):
            capture(tmp_path, model, config)
        assert not Run.open(next(tmp_path.glob("tiny-*"))).complete


def test_nothing_left_once_special_tokens_are_dropped(tmp_path, model):
    path = tmp_path / "marks.jsonl"
    path.write_text('{"text": "' + "<|endoftext|>" * 50 + '"}')
    with pytest.raises(UserError, match="no row is left"):
        capture(tmp_path, model, config_for(str(path)))


def test_site_not_in_model(tmp_path, model, corpus):
    with pytest.raises(UserError, match=r"resid_post\.7"):
        capture(tmp_path, model, config_for(corpus, sites=("resid_post.7",)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_activation_is_placed(tmp_path, corpus, bad):
    model = tiny_llama(0)
    batches = []

    def spoil(module, args, output):
        if len(output) == 4:
            batches.append(output)
        if len(batches) == 4:
            output[2, 5, 7] = bad
            output[3, 1] = bad

    model.model.get_submodule("model.layers.0").register_forward_hook(spoil)
    with pytest.raises(Failure) as caught:
        capture(tmp_path, model, config_for(corpus))
    # Fourth batch of 4: sequence 3 * 4 + 2 = 14.
    rows = reference_rows(tiny_llama(0), config_for(corpus))
    row = next(row for row in rows if row["sequence"] == 14 and row["position"] == 5)
    assert (
        f"site resid_post.0 gave NaN or infinity at document {row['doc']}, position 5 of sequence "
        f"14 (token {row['token']})" in str(caught.value)
    )
    run = Run.open(next(tmp_path.iterdir()))
    assert not run.complete and not list(run.path.rglob("*.tmp"))


def test_value_too_large_for_float16_says_so(tmp_path, corpus):
    model = tiny_llama(0)
    with torch.no_grad():
        next(model.model.parameters()).mul_(1e7)  # the embedding
    with pytest.raises(Failure, match=r"too large for torch\.float16; store it as bfloat16"):
        capture(tmp_path, model, config_for(corpus, dtype="float16"))
    assert capture(tmp_path, model, config_for(corpus)).n_rows > 0


def test_disk_too_small_is_told_before_any_work(tmp_path, model, corpus, monkeypatch):
    usage = probe.store_writing.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        probe.store_writing.shutil, "disk_usage", lambda _: usage._replace(free=100_000)
    )
    monkeypatch.setattr(probe.store_writing, "capture_rows", None)
    with pytest.raises(Failure, match=r"needs up to 0\.\d+ MB .* has 0\.10 MB free"):
        capture(tmp_path, model, config_for(corpus))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: ... (os error 28)"),
    ],
)
def test_disk_full_while_writing(tmp_path, model, corpus, monkeypatch, error):
    config = config_for(corpus)
    expected = contents(capture(tmp_path / "whole", model, config).run.path)
    plain, calls = probe.store_writing.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 6:
            Path(path).write_bytes(b"half a file")
            raise error
        plain(tensors, path)

    monkeypatch.setattr(probe.store_writing, "save_file", full)
    with pytest.raises(Failure, match="is full; free some space"):
        capture(tmp_path / "full", model, config)
    run = Run.open(next((tmp_path / "full").iterdir()))
    assert not run.complete and not list(run.path.rglob("*.tmp"))
    whole = {path.name for path in run.path.rglob("*.safetensors")}
    assert whole == {"rows-00000.safetensors", "acts-00000.safetensors", "acts-00001.safetensors"}
    assert len(list(run.path.glob("*/acts-00001.safetensors"))) == 1
    assert contents(capture(tmp_path / "full", model, config).run.path) == expected


def test_other_errors_are_not_called_a_full_disk(tmp_path, model, corpus, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(probe.store_writing, "save_file", refuse)
    with pytest.raises(PermissionError):
        capture(tmp_path, model, config_for(corpus))


# --------------------------------------------------------------------------------- opening


def test_open_rejects_what_is_no_whole_store(tmp_path, model, corpus):
    with pytest.raises(UserError, match="not a folder"):
        ActivationStore.open(tmp_path)
    other = Run.create(tmp_path, "sae", {"kind": "sae"})
    with pytest.raises(UserError, match="kind 'sae'"):
        ActivationStore.open(other.path)
    incomplete = Run.create(tmp_path, "tiny", config_for(corpus).run_config())
    with pytest.raises(Failure, match="not complete"):
        ActivationStore.open(incomplete.path)
    later = Run.create(tmp_path, "later", config_for(corpus).run_config() | {"schema": 2})
    with pytest.raises(UserError, match="schema 2"):
        ActivationStore.open(later.path)


def test_open_rejects_truncated_and_missing_files(tmp_path, model, corpus):
    store = capture(tmp_path, model, config_for(corpus))
    path = store.run.path / "mlp_out.1" / "acts-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(Failure, match=rf"acts-00001.* {len(whole)} bytes and has {len(whole) - 1}"):
        ActivationStore.open(store.run.path)
    path.unlink()
    with pytest.raises(Failure, match="has nothing"):
        ActivationStore.open(store.run.path)


def test_tampering_of_the_same_size(tmp_path, model, corpus):
    store = capture(tmp_path, model, config_for(corpus))
    path = store.run.path / "mlp_out.1" / "acts-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert len(verify(store.run)) == 1 and "checksum" in verify(store.run)[0]
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(Failure, match="cannot be read"):
        ActivationStore.open(store.run.path).shard(1, "mlp_out.1")


def test_missing_site_lists_those_there(tmp_path, model, corpus):
    store = capture(tmp_path, model, config_for(corpus))
    for read in (store.d, store.statistics, lambda site: store.shard(0, site)):
        with pytest.raises(UserError, match=r"no site resid_post\.1; it holds resid_post\.0, mlp_"):
            read("resid_post.1")


def test_reading_is_memory_mapped(tmp_path, model, corpus):
    store = capture(tmp_path, model, config_for(corpus))
    values = store.values(0, SITES[0])
    assert "acts-00000.safetensors" in Path("/proc/self/maps").read_text()
    assert len(values) == store.first_rows[1]


# ---------------------------------------------------------------------------- config, estimate


def test_config_round_trip_and_folders(corpus):
    sites = ("module:a.b:input", "module:a.b_input", "resid_post.0")
    config = config_for(corpus, sites=sites)
    assert StoreConfig.from_run_config(json.loads(json.dumps(config.run_config()))) == config
    folders = list(config.folders().values())
    assert len(set(folders)) == 3 and not any(set(":/") & set(folder) for folder in folders)
    unknown = config.run_config() | {"colour": "red"}
    with pytest.raises(UserError, match=r"config\.json"):
        StoreConfig.from_run_config(unknown)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"context": 0},
        {"context": 2**16, "tokens": 2**17},
        {"batch_sequences": -1},
        {"sites": ()},
        {"sites": ("resid_post.0", "resid_post.0")},
        {"sites": ("nowhere.1",)},
    ],
)
def test_config_refuses_nonsense(corpus, change):
    with pytest.raises(UserError):
        config_for(corpus, **change).run_config()


def test_estimate_bounds_the_real_size(tmp_path, model, corpus):
    config = config_for(corpus)
    store = capture(tmp_path, model, config)
    found = estimate_store(config, dict.fromkeys(SITES, 32))
    assert found.sequences == 57 and found.rows == 57 * 15 and found.shards == 5
    files = store.run.manifest["files"]
    data = sum(files[name]["bytes"] for name in files if name.endswith(".safetensors"))
    assert data <= found.disk_bytes <= 1.3 * data
    assert found.memory_bytes == 12 * (15 * (3 * 32 * 2 + 14) + 16 * 8)
