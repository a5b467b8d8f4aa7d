"""Text to run models on, and its packing into rows of tokens.

A corpus is named by

    builtin                      the corpus that ships with the project (`probe/writing.py`)
    PATH.txt                     one document
    PATH.jsonl, PATH.jsonl.gz    one document a line: {"text": ..., "id": ... (optional)}
    PATH.parquet                 one document a row: columns `text` and, optionally, `id`
    org/name, org/name:config    a Hugging Face dataset, streamed: split `train`, column `text`

Packing: documents are tokenised, joined with the end-of-text token between, and cut into rows
("sequences") of `context` tokens; a last short row is left out. A row may hold the end of one
document and the start of the next, which then sees it through attention. Rows of the result keep
position 0 and special tokens out (`keep`): their activations have outlier norms.
"""

import gzip
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probe.errors import Failure, UserError
from probe.language import LanguageModel
from probe.runs import sha256_file

BUILTIN = "builtin"
BUILTIN_ROOT = Path(__file__).resolve().parent.parent / "artifacts" / "corpora"
DOCUMENTS = "documents.parquet"
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
TOKENISE_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A piece of text that belongs together."""

    id: str
    """The corpus's own name for it."""
    text: str
    """The text itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Consecutive rows of a packed corpus."""

    tokens: Int[Tensor, "b t"]
    """Token ids, int64."""
    doc: Int[Tensor, "b t"]
    """Number of the document that each token comes from, in the corpus's order, int32."""
    keep: Bool[Tensor, "b t"]
    """False at position 0 and at special tokens."""
    first_sequence: int
    """Number of the first row in the packed corpus."""

    def named(self, sequence: int, position: int) -> str:
        """A place in words, for messages."""
        return (
            f"document {int(self.doc[sequence, position])}, position {position} of sequence "
            f"{self.first_sequence + sequence} (token {int(self.tokens[sequence, position])})"
        )


def token_batches(
    source: str,
    model: LanguageModel,
    *,
    context: int,
    batch_sequences: int,
    max_tokens: int | None = None,
    start_sequence: int = 0,
) -> Iterator[TokenBatch]:
    """Pack a corpus into batches of token rows.

    Args:
        source: a corpus, as in the module's docstring.
        model: whose tokenizer cuts the text.
        context: tokens a row.
        batch_sequences: rows a batch; the last batch may have fewer.
        max_tokens: stop after so many tokens, rounded up to whole rows; None for all.
        start_sequence: leave out the rows before this one, so that resumed work goes on exactly.

    Raises:
        UserError: there is no such corpus, it is empty or shorter than one row, or a size is below
            its least sensible value.
        Failure: a file of the corpus is damaged.
    """
    _check_sizes(context, batch_sequences, max_tokens)
    limit = None if max_tokens is None else -(-max_tokens // context)
    special = torch.tensor(sorted(model.special_ids))
    rows = itertools.islice(_packed_rows(source, model, context), start_sequence, limit)
    first = start_sequence
    while chunk := list(itertools.islice(rows, batch_sequences)):
        tokens = torch.from_numpy(np.stack([row[0] for row in chunk]).astype(np.int64))
        doc = torch.from_numpy(np.stack([row[1] for row in chunk]).astype(np.int32))
        keep = ~torch.isin(tokens, special)
        keep[:, 0] = False
        yield TokenBatch(tokens=tokens, doc=doc, keep=keep, first_sequence=first)
        first += len(chunk)
    if first == 0:
        raise UserError(
            f"corpus {source!r} has fewer tokens than one row of {context}; "
            "give more text or a smaller --context."
        )


def _check_sizes(context: int, batch_sequences: int, max_tokens: int | None) -> None:
    for name, value, least in (
        ("context", context, 2),
        ("batch-sequences", batch_sequences, 1),
        ("tokens", context if max_tokens is None else max_tokens, 1),
    ):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}.")


def _packed_rows(
    source: str, model: LanguageModel, context: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of `context` tokens with the document number of each token."""
    tokens, docs = np.empty(0, np.int32), np.empty(0, np.int32)
    numbered = enumerate(read_documents(source))
    while chunk := list(itertools.islice(numbered, TOKENISE_AT_ONCE)):
        encoded = model.tokenizer(
            [document.text for _, document in chunk], add_special_tokens=False
        )["input_ids"]
        pieces = [np.array([*ids, model.separator_id], np.int32) for ids in encoded]
        numbers = [np.full(len(p), n, np.int32) for p, (n, _) in zip(pieces, chunk, strict=True)]
        tokens = np.concatenate([tokens, *pieces])
        docs = np.concatenate([docs, *numbers])
        n_rows = len(tokens) // context
        for row in range(n_rows):
            cut = slice(row * context, (row + 1) * context)
            yield tokens[cut], docs[cut]
        tokens, docs = tokens[n_rows * context :], docs[n_rows * context :]


def corpus_name(source: str) -> str:
    """A corpus's name as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", Path(source).name.split(".")[0]) or "corpus"


def corpus_checksum(source: str) -> str | None:
    """SHA-256 of the file that a corpus is read from; None for a streamed data set."""
    path = builtin_path() if source == BUILTIN else Path(source)
    return sha256_file(path) if path.is_file() else None


def document_ids(source: str, n_documents: int) -> list[str]:
    """Ids of the corpus's first `n_documents` documents."""
    return [document.id for document in itertools.islice(read_documents(source), n_documents)]


def read_documents(source: str) -> Iterator[Document]:
    """The documents of a corpus, one after another; blank ones are left out.

    Raises:
        UserError: there is no such corpus, or it has no text.
        Failure: its file is damaged.
    """
    documents = (document for document in _open_corpus(source) if document.text.strip())
    first = next(documents, None)
    if first is None:
        raise UserError(f"corpus {source!r} has no text in it; give one that has.")
    return itertools.chain([first], documents)


def _open_corpus(source: str) -> Iterator[Document]:
    if source == BUILTIN:
        return _read_parquet(builtin_path())
    path = Path(source)
    if path.is_file():
        return _open_file(path)
    if source.endswith(SUFFIXES) or path.exists() or "/" not in source:
        raise UserError(
            f"corpus {source!r} is not there: wanted {BUILTIN}, a file ending in "
            f"{', '.join(SUFFIXES)}, or a Hugging Face dataset id (org/name)."
        )
    return _stream_dataset(source)


def _open_file(path: Path) -> Iterator[Document]:
    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(path)
    if path.name.endswith(".txt"):
        return _read_text(path)
    raise UserError(f"{path} is no corpus: wanted a file ending in {', '.join(SUFFIXES)}.")


def builtin_path() -> Path:
    """The file of the built-in corpus. Raises `UserError` where it has not been made."""
    found = sorted(BUILTIN_ROOT.glob(f"{BUILTIN}-*/{DOCUMENTS}"))
    complete = [path for path in found if (path.parent / "manifest.json").is_file()]
    if not complete:
        raise UserError(
            f"the built-in corpus is not in {BUILTIN_ROOT}; make it with `lorgnette make corpus`."
        )
    return complete[-1]


def _read_text(path: Path) -> Iterator[Document]:
    try:
        yield Document(id=path.name, text=path.read_text())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    open_text = gzip.open if path.name.endswith(".gz") else open
    try:
        with open_text(path, "rt") as lines:
            for number, line in enumerate(lines):
                if line.strip():
                    yield _document(json.loads(line), f"{path.name}:{number + 1}")
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise Failure(
            f"{path} is damaged or not JSON lines ({error}); get the file again."
        ) from error


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        file = pq.ParquetFile(path)
        columns = [name for name in ("id", "text") if name in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                yield _document(row, f"{path.name}:{number}")
                number += 1
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise Failure(f"{path} is damaged or not Parquet ({error}); get the file again.") from error


def _stream_dataset(source: str) -> Iterator[Document]:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        rows: Iterable[Any] = load_dataset(name, config or None, split="train", streaming=True)
        for number, row in enumerate(rows):
            yield _document(row, f"{source}:{number}")
    except (OSError, ValueError, ConnectionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"corpus {source!r} is neither a file nor a Hugging Face dataset with a `train` split "
            f"that can be reached from here ({type(error).__name__})."
        ) from error


def _document(row: Any, fallback_id: str) -> Document:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f"{fallback_id} has no `text`: wanted one text a row, in a field `text`.")
    return Document(id=str(row.get("id") or fallback_id), text=row["text"])
