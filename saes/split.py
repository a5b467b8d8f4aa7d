"""Which rows of a store train an SAE and which ones judge it.

The last `held_out_share` of the store's sequences are held out. A document that was cut in two by
that border would be on both sides, so evaluation starts at the first sequence whose first token
belongs to a document that training has not seen (a corpus of one document has no such sequence:
evaluation then starts at the border itself). Whole sequences are on one side or the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from probe.corpora import TokenBatch
from probe.errors import UserError
from probe.sites import Site
from probe.store import ActivationStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The rows of one sequence."""

    shard: int
    """The shard it is in."""
    start: int
    """Its first row, counted from the shard's first."""
    stop: int
    """The row after its last."""
    sequence: int
    """Its number in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A store cut in two."""

    training_rows: int
    """Training reads rows 0 up to this one."""
    evaluation_start: int
    """Evaluation reads rows from this one to the end."""


def split_store(store: ActivationStore, held_out_share: float) -> Split:
    """Cut a store by the rule in the module's docstring.

    Raises `UserError` where the share is not between 0 and 1, or leaves one side without a row.
    """
    if not 0 < held_out_share < 1:
        raise UserError(
            f"held_out_share must lie between 0 and 1, got {held_out_share}; 0.05 is usual."
        )
    n_sequences: int = store.run.manifest["summary"]["n_sequences"]
    cut = n_sequences - math.ceil(n_sequences * held_out_share)
    shards = [store.shard(i, store.sites[0]) for i in range(store.n_shards)]
    docs = torch.cat([shard.sequence_doc for shard in shards])
    of_row = torch.cat([shard.sequence for shard in shards]).contiguous()
    fresh = docs[cut:, 0] != docs[max(cut - 1, 0), -1]
    first = cut + (int(fresh.nonzero()[0]) if fresh.any() else 0)
    training, start = torch.searchsorted(of_row, torch.tensor([cut, first])).tolist()
    if training == 0 or start == store.n_rows:
        raise UserError(
            f"holding out {held_out_share:g} of the {n_sequences} sequences of {store.run.path} "
            "leaves none to train on or none to evaluate on; capture more tokens."
        )
    return Split(training_rows=training, evaluation_start=start)


def sequence_spans(store: ActivationStore, rows: range) -> list[Span]:
    """The sequences that lie in `rows` (store-wide row numbers, at sequence borders), in order."""
    spans = []
    for number in range(store.n_shards):
        first, stop = store.first_rows[number], store.first_rows[number + 1]
        if stop <= rows.start or first >= rows.stop:
            continue
        sequence = store.shard(number, store.sites[0]).sequence
        values, counts = torch.unique_consecutive(sequence, return_counts=True)
        ends = counts.cumsum(0).tolist()
        for value, end, count in zip(values.tolist(), ends, counts.tolist(), strict=True):
            if rows.start <= first + end - count and first + end <= rows.stop:
                span = Span(shard=number, start=end - count, stop=end, sequence=value)
                spans.append(span)
    return spans


def spread(spans: Sequence[T], n: int) -> list[T]:
    """`n` of them, evenly spaced from first to last; all where there are no more."""
    if n >= len(spans):
        return list(spans)
    return [spans[i * len(spans) // n] for i in range(n)]


def spread_rows(spans: Sequence[Span], n_rows: int) -> list[Span]:
    """Evenly spaced sequences that have about `n_rows` rows together; at least one."""
    total = sum(span.stop - span.start for span in spans)
    return spread(spans, max(1, math.ceil(len(spans) * n_rows / max(total, 1))))


def read_rows(store: ActivationStore, site: Site, span: Span) -> Float[Tensor, "n d"]:
    """A sequence's rows, in float32."""
    return store.values(span.shard, site)[span.start : span.stop].float()


def read_tokens(store: ActivationStore, spans: Sequence[Span]) -> TokenBatch:
    """The whole sequences' tokens; `keep` marks the positions that the store has rows of."""
    tokens, docs, keeps = [], [], []
    for span in spans:
        shard = store.shard(span.shard, store.sites[0])
        place = span.sequence - shard.first_sequence
        keep = torch.zeros(shard.tokens.shape[1], dtype=torch.bool)
        keep[shard.position[span.start : span.stop].long()] = True
        tokens.append(shard.tokens[place].long())
        docs.append(shard.sequence_doc[place])
        keeps.append(keep)
    return TokenBatch(
        tokens=torch.stack(tokens),
        doc=torch.stack(docs),
        keep=torch.stack(keeps),
        first_sequence=spans[0].sequence,
    )
