"""Labelled activations: what a site says of texts whose class is known, captured once.

1. Texts with labels (`saes.labelled_texts`), split into training and test.
2. Each is run through the model, cut at `context` tokens. `pool = "mean"` keeps the row of every
   token but position 0, special tokens and rows of outlier norm (`probe.rows`), and a text is later
   the mean of its rows; `pool = "last"` keeps the row of the last token. Rows are kept one by one
   because an SAE is made for single tokens: its codes are pooled, never codes of a pooled row.
3. The first-letter task shows a word after a short prompt that says nothing of spelling, and keeps
   the row of the word.

    config.json               `TaskConfig`
    texts.parquet             id, text, label, attribute, test
    rows-00000.safetensors    values [n, d] in the model's number format, text [n]
    manifest.json

A killed capture goes on with the first part that is missing.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from probe.corpora import BUILTIN, TokenBatch, corpus_checksum
from probe.errors import Failure, UserError
from probe.language import LanguageModel
from probe.rows import capture_rows, norm_limits, row_norms
from probe.runs import Run, atomic_path
from probe.sites import Site, parse_site
from probe.store import open_tensors
from saes.labelled_texts import (
    FIRST_LETTER,
    LabelledText,
    first_letter_words,
    read_labelled,
    split_texts,
)

KIND, SCHEMA = "task", 1
TEXTS = "texts.parquet"
WORD_PROMPT = "Here is a word:"
"""What stands before a word of the first-letter task."""
PART_BATCHES = 16
"""Forward passes in one part: the most that a killed capture does again."""

Pool = Literal["mean", "last"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """Which texts, and what is captured of them."""

    model: dict[str, Any]
    """The model: `spec`, `random_weights` (seed or None) and `dtype`."""
    site: str
    """Where in the model."""
    source: str = BUILTIN
    """The labelled texts, by the names of `saes.labelled_texts`."""
    label: str = "form"
    """Column of the labels; the first-letter task has none."""
    attribute: str | None = "topic"
    """Second column, for spurious-correlation removal."""
    pool: Pool = "mean"
    """How a text's rows become one: their mean, or the last alone."""
    context: int = 128
    """Tokens of each text, at most."""
    max_per_class: int | None = None
    """Texts of each label, at most."""
    min_per_class: int = 20
    """Labels of fewer texts are left out."""
    test_share: float = 0.3
    """Share of each label's texts that test."""
    max_norm: float = 10.0
    """Under `mean`, rows of a norm above so many medians of the first batch are left out, as the
    store leaves them out; 0 keeps all."""
    batch_texts: int = 16
    """Texts in one forward pass."""
    seed: int = 0
    """Decides the split, with the texts."""

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise UserError(f"test_share must lie between 0 and 1, got {self.test_share}.")
        for name, least in (("context", 2), ("min_per_class", 4), ("batch_texts", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.max_per_class is not None and self.max_per_class < self.min_per_class:
            raise UserError(
                f"max_per_class must be at least min_per_class = {self.min_per_class}, got "
                f"{self.max_per_class}."
            )
        if self.source == FIRST_LETTER and self.pool != "last":
            raise UserError("the first-letter task reads the word's own row: set pool to last.")

    def run_config(self) -> dict[str, Any]:
        """The run folder's `config.json`, with the checksum of the file that is read."""
        checksum = None if self.source == FIRST_LETTER else corpus_checksum(self.source)
        return {"kind": KIND, "schema": SCHEMA, "source_sha256": checksum} | asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """Labelled activations in memory."""

    rows: Float[Tensor, "n d"]
    """Activations, those of one text together and in the order of the texts."""
    text: Int[Tensor, " n"]
    """Number of the text that each row belongs to; every text has at least one."""
    names: tuple[str, ...]
    """The texts, or for long ones their ids: one entry a text, like all that follows."""
    labels: tuple[str, ...]
    """Their classes."""
    attributes: tuple[str, ...]
    """Their values in the second column; empty strings where there is none."""
    test: Bool[Tensor, " m"]
    """Which of them test."""

    @property
    def n_texts(self) -> int:
        """Number of texts."""
        return len(self.labels)

    def pooled(self) -> Float[Tensor, "m d"]:
        """The mean of each text's rows, in float32."""
        sums = torch.zeros(self.n_texts, self.rows.shape[1])
        for rows, text in zip(self.rows.split(8192), self.text.split(8192), strict=True):
            sums.index_add_(0, text, rows.float())
        return sums / torch.bincount(self.text, minlength=self.n_texts)[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A text as the model reads it."""

    text: LabelledText
    """The text."""
    tokens: list[int]
    """Its tokens."""


def task_name(config: TaskConfig) -> str:
    """Name of the run folder, without its hash."""
    source = config.source.rsplit("/", 1)[-1].split(".")[0] or "texts"
    model = config.model["spec"].rsplit("/", 1)[-1]
    twin = config.model["random_weights"]
    return f"{model}{'' if twin is None else f'-random{twin}'}-{config.site}-{source}"


def write_task(
    run: Run, config: TaskConfig, model: LanguageModel, *, progress: bool = True
) -> TaskData:
    """Capture what is missing of a task, finish its run, and give what it holds.

    Args:
        run: a run of this config; a complete one is read as it is.
        config: what to capture.
        model: the model that the config names.
        progress: show a bar on stderr.

    Raises:
        UserError: there are no such texts, columns or site, or a text has too few tokens.
        Failure: a file is damaged, or an activation is not finite.
    """
    with run.lock():
        if run.complete:
            return load_task(run)
        site = parse_site(config.site)
        prepared = prepare_texts(config, model)
        _write_texts(run, prepared)
        size = config.batch_texts * PART_BATCHES
        limit: float | None = None
        starts = range(0, len(prepared), size)
        for number, start in enumerate(tqdm(starts, desc="labelled texts", disable=not progress)):
            path = run.path / part_name(number)
            if path.exists():
                continue
            if limit is None:
                limit = norm_limit(config, model, prepared)
            values, text = capture_part(config, model, prepared, start, start + size, site, limit)
            with atomic_path(path) as temporary:
                save_file({"values": values, "text": text}, temporary)
        summary = {
            "n_texts": len(prepared),
            "n_test": sum(each.text.test for each in prepared),
            "n_labels": len({each.text.label for each in prepared}),
            "n_parts": len(starts),
        }
        inputs = {"source": run.config["source_sha256"]} if run.config["source_sha256"] else {}
        run.finish(
            summary=summary, inputs=inputs, seeds={"seed": config.seed}, device=str(model.device)
        )
    return load_task(run)


def load_task(run: Run) -> TaskData:
    """Read a complete task. Raises `Failure` where it is not complete or damaged."""
    n_parts = run.manifest["summary"]["n_parts"]
    parts = [open_tensors(run.path / part_name(number)) for number in range(n_parts)]
    table = pq.read_table(run.path / TEXTS).to_pylist()
    data = TaskData(
        rows=torch.cat([part.get_tensor("values") for part in parts]),
        text=torch.cat([part.get_tensor("text") for part in parts]).long(),
        names=tuple(row["id"] if len(row["text"]) > 40 else row["text"] for row in table),
        labels=tuple(row["label"] for row in table),
        attributes=tuple(row["attribute"] for row in table),
        test=torch.tensor([row["test"] for row in table]),
    )
    if int(data.text.max()) != data.n_texts - 1:
        raise Failure(f"the parts of {run.path} do not belong together; delete it and run again.")
    return data


def part_name(number: int) -> str:
    """File of one part."""
    return f"rows-{number:05d}.safetensors"


def prepare_texts(config: TaskConfig, model: LanguageModel) -> list[Prepared]:
    """The kept texts and their tokens, in the order in which they are captured: short ones first.

    Raises `UserError` as `write_task` does.
    """
    words = config.source == FIRST_LETTER
    if words:
        texts = first_letter_words(model.token_text())
    else:
        texts = read_labelled(config.source, config.label, config.attribute)
    kept = split_texts(
        texts,
        max_per_class=config.max_per_class,
        min_per_class=config.min_per_class,
        test_share=config.test_share,
        seed=config.seed,
    )
    if words:
        prompt = _tokens(model, [WORD_PROMPT])[0]
        tokens = [[*prompt, int(text.id)] for text in kept]
    else:
        tokens = [ids[: config.context] for ids in _tokens(model, [text.text for text in kept])]
    prepared = [Prepared(text=t, tokens=ids) for t, ids in zip(kept, tokens, strict=True)]
    for each in prepared:
        if not any(token not in model.special_ids for token in each.tokens[1:]):
            raise UserError(
                f"text {each.text.id} has a single token, and a text's first token says nothing "
                "(its activation is an outlier); give longer texts."
            )
    return sorted(prepared, key=lambda each: len(each.tokens))


def _tokens(model: LanguageModel, texts: list[str]) -> list[list[int]]:
    return model.tokenizer(texts, add_special_tokens=False)["input_ids"]


def make_batch(
    prepared: list[Prepared], first: int, model: LanguageModel, pool: Pool
) -> TokenBatch:
    """Some texts as one batch, padded on the right: what comes later changes nothing before it."""
    length = max(len(each.tokens) for each in prepared)
    tokens = torch.full((len(prepared), length), model.separator_id)
    keep = torch.zeros(len(prepared), length, dtype=torch.bool)
    for row, each in enumerate(prepared):
        n = len(each.tokens)
        tokens[row, :n] = torch.tensor(each.tokens)
        keep[row, 1:n] = True
    keep &= ~torch.isin(tokens, torch.tensor(sorted(model.special_ids)))
    if pool == "last":
        last = torch.arange(length).where(keep, -1).amax(1, keepdim=True)
        keep = torch.arange(length) == last
    doc = torch.arange(first, first + len(prepared), dtype=torch.int32)
    return TokenBatch(
        tokens=tokens, doc=doc[:, None].repeat(1, length), keep=keep, first_sequence=first
    )


def norm_limit(config: TaskConfig, model: LanguageModel, prepared: list[Prepared]) -> float:
    """The largest usual norm, by the first batch; infinity where every row is kept."""
    if config.pool == "last":
        return float("inf")
    site = parse_site(config.site)
    batch = make_batch(prepared[: config.batch_texts], 0, model, config.pool)
    return norm_limits(capture_rows(model, batch, [site], model.dtype), config.max_norm)[site]


def capture_part(
    config: TaskConfig,
    model: LanguageModel,
    prepared: list[Prepared],
    start: int,
    stop: int,
    site: Site,
    limit: float,
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """Rows of texts `start` up to `stop`, without outliers, and the text of each."""
    values, texts = [], []
    stop = min(stop, len(prepared))
    for first in range(start, stop, config.batch_texts):
        some = prepared[first : min(first + config.batch_texts, stop)]
        batch = make_batch(some, first, model, config.pool)
        rows = capture_rows(model, batch, [site], model.dtype)[site].cpu()
        text = batch.doc[batch.keep]
        usual = row_norms(rows) <= limit
        # A text of outliers alone keeps them: it must have a row.
        left = torch.bincount(text - first, weights=usual.double(), minlength=len(some))
        usual |= left[text - first] == 0
        values.append(rows[usual])
        texts.append(text[usual])
    return torch.cat(values), torch.cat(texts)


def _write_texts(run: Run, prepared: list[Prepared]) -> None:
    table = pa.Table.from_pylist([asdict(each.text) for each in prepared])
    with atomic_path(run.path / TEXTS) as temporary:
        pq.write_table(table, temporary)
