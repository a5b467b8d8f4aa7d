import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from probe import corpora
from probe.corpora import (
    corpus_checksum,
    corpus_name,
    document_ids,
    read_documents,
    token_batches,
)
from probe.errors import Failure, UserError

TEXTS = ["one", "", "three words here", "  ", "last"]


def write_formats(folder: Path) -> dict[str, Path]:
    rows = [{"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    lines = "\n".join(json.dumps(row) for row in rows)
    paths = {name: folder / f"corpus.{name}" for name in ("jsonl", "jsonl.gz", "parquet")}
    paths["jsonl"].write_text(lines)
    with gzip.open(paths["jsonl.gz"], "wt") as file:
        file.write(lines)
    pq.write_table(pa.Table.from_pylist(rows), paths["parquet"])
    return paths


def test_every_format_gives_the_same_documents_without_blank_ones(tmp_path):
    for path in write_formats(tmp_path).values():
        documents = list(read_documents(str(path)))
        assert [d.text for d in documents] == ["one", "three words here", "last"]
        assert document_ids(str(path), 2) == ["d0", "d2"]
        assert corpus_name(str(path)) == "corpus"
        checksum = corpus_checksum(str(path))
        assert checksum is not None and len(checksum) == 64


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("hello\n\nworld")
    (document,) = read_documents(str(tmp_path / "a.txt"))
    assert (document.id, document.text) == ("a.txt", "hello\n\nworld")


def test_packing_by_hand(tmp_path, llama):
    # one byte a token: "ab" -> 2 tokens + separator (id 0), "cde" -> 3 tokens + separator
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "cde"}\n{"text": "f"}\n')
    encode = llama.tokenizer.encode
    a, b, c, d, e, f = (encode(letter)[0] for letter in "abcdef")
    batches = list(token_batches(str(tmp_path / "a.jsonl"), llama, context=4, batch_sequences=1))
    # stream: a b 0 c | d e 0 f | 0 (left out: shorter than a row)
    assert [batch.tokens.tolist() for batch in batches] == [[[a, b, 0, c]], [[d, e, 0, f]]]
    assert [batch.doc.tolist() for batch in batches] == [[[0, 0, 0, 1]], [[1, 1, 1, 2]]]
    assert batches[0].keep.tolist() == [[False, True, False, True]]
    assert batches[1].keep.tolist() == [[False, True, False, True]]
    assert [batch.first_sequence for batch in batches] == [0, 1]


@pytest.mark.parametrize("start", [0, 1, 5, 12, 13])
def test_start_sequence_goes_on_exactly(tmp_path, llama, start):
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 5)
    source = str(tmp_path / "a.txt")
    whole = torch.cat(
        [b.tokens for b in token_batches(source, llama, context=16, batch_sequences=3)]
    )
    rest = list(token_batches(source, llama, context=16, batch_sequences=3, start_sequence=start))
    tokens = torch.cat([b.tokens for b in rest]) if rest else whole[:0]
    assert torch.equal(tokens, whole[start:])
    if rest:
        assert rest[0].first_sequence == start


def test_max_tokens_is_rounded_up_to_rows(tmp_path, llama):
    (tmp_path / "a.txt").write_text("x" * 1000)
    batches = list(
        token_batches(str(tmp_path / "a.txt"), llama, context=10, batch_sequences=4, max_tokens=41)
    )
    assert [len(batch.tokens) for batch in batches] == [4, 1]


def test_real_corpus_is_covered_token_by_token(llama):
    path = Path(__file__).parents[2] / "shared" / "data" / "corpus" / "inaugural.jsonl.gz"
    if not path.exists():
        pytest.skip("the shared corpora are not beside this checkout")
    batches = token_batches(str(path), llama, context=128, batch_sequences=64)
    n_tokens = sum(batch.tokens.numel() for batch in batches)
    with gzip.open(path, "rt") as lines:
        n_bytes = sum(len(json.loads(line)["text"].encode()) + 1 for line in lines)
    assert n_bytes - 128 < n_tokens <= n_bytes


def test_builtin_corpus_is_varied_and_large(smollm2):
    try:
        documents = list(read_documents("builtin"))
    except UserError as error:
        pytest.skip(str(error))
    ids = smollm2.tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]
    assert sum(map(len, ids)) >= 600_000
    assert len({d.text for d in documents}) == len(documents)
    assert len({d.id.split("/")[0] for d in documents}) == 16


def test_bad_corpora_are_one_sentence(tmp_path, llama, monkeypatch):
    def pack(source, **changes):
        options = {"context": 8, "batch_sequences": 2} | changes
        return next(iter(token_batches(str(source), llama, **options)))

    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "odd.doc").write_text("abc")
    (tmp_path / "fields.jsonl").write_text('{"body": "x"}')
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xff")
    for source, sentence in [
        (tmp_path / "empty.txt", "has no text"),
        (tmp_path / "short.txt", "fewer tokens than one row of 8"),
        (tmp_path / "odd.doc", "is no corpus"),
        (tmp_path / "fields.jsonl", "has no `text`"),
        (tmp_path / "latin.txt", "not UTF-8"),
        ("nowhere.txt", "is not there"),
        ("nowhere", "is not there"),
    ]:
        with pytest.raises(UserError, match=sentence):
            pack(source)
    with pytest.raises(UserError, match="--tokens must be at least 1, got 0"):
        pack(tmp_path / "short.txt", max_tokens=0)
    with pytest.raises(UserError, match="--context must be at least 2, got 1"):
        pack(tmp_path / "short.txt", context=1)
    monkeypatch.setattr(corpora, "BUILTIN_ROOT", tmp_path)
    with pytest.raises(UserError, match="lorgnette make corpus"):
        pack("builtin")


def test_damaged_files_are_failures(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": ')
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    for name in ("a.jsonl", "a.parquet", "a.jsonl.gz"):
        with pytest.raises(Failure, match="damaged"):
            list(read_documents(str(tmp_path / name)))
