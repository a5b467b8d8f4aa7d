"""The states that circuit breakers are about: embeddings, every block's output, the last normed.

Blocks above the last one that is trained are taken off for as long as training lasts, as published:
they and the unembedding cost nothing then, and the last state is what the final norm makes of the
last block left.

A fixed set's reference states are computed once and kept on disk, a row's one after another:
several runs (seeds, ablations) read the same ones.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from analyses.circuit_breakers.losses import States
from analyses.circuit_breakers.rows import Batch, TokenRow, batch_of, row_batches
from probe.capture import reading
from probe.errors import UserError
from probe.language import LanguageModel
from probe.runs import atomic_path
from probe.sites import Site


@contextlib.contextmanager
def first_blocks(model: LanguageModel, n: int) -> Iterator[None]:
    """Leave a model its first `n` blocks for the length of the block.

    Raises `UserError` where it has fewer, or its blocks are not known by name.
    """
    if model.names is None or n > model.n_layers:
        raise UserError(
            f"target layers up to {n - 1} need {n} blocks and {model.spec} has {model.n_layers}; "
            f"name layers from 1 to {model.n_layers - 1}."
        )
    path, _, name = model.names.blocks.rpartition(".")
    parent, blocks = model.model.get_submodule(path), model.model.get_submodule(model.names.blocks)
    assert isinstance(blocks, nn.ModuleList)
    setattr(parent, name, blocks[:n])
    try:
        yield
    finally:
        setattr(parent, name, blocks)


def run_states(model: LanguageModel, batch: Batch) -> States:
    """Every state of the blocks there are: `[blocks + 1, b, t, d]`, with gradients where they are
    switched on. Numbered as transformers' `hidden_states`: what enters each block, then what the
    final norm makes of the last one's output."""
    assert model.names is not None, "check_layers has looked"
    blocks = model.model.get_submodule(model.names.blocks)
    seen: dict[Site, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for layer in range(len(blocks)):  # type: ignore[arg-type]
            site = Site(kind="resid_pre", layer=layer)
            stack.enter_context(reading(model, site, seen.__setitem__))
        last = model.model.base_model(
            input_ids=batch.tokens.to(model.device),
            attention_mask=batch.attended.long().to(model.device),
            use_cache=False,
        ).last_hidden_state
    return torch.stack([*seen.values(), last])


class LiveReference:
    """Reference states computed when they are asked for: adapters off, no dropout."""

    def __init__(
        self,
        model: LanguageModel,
        adapted: PeftModel,
        rows: Sequence[TokenRow],
        entries: Sequence[int] | None,
    ) -> None:
        self.model, self.adapted, self.rows, self.entries = model, adapted, rows, entries

    @torch.no_grad()
    def of(self, numbers: Sequence[int], length: int) -> States:
        """Those of some rows; anything at padding."""
        with self.adapted.disable_adapter():
            states = run_states(
                self.model, batch_of([self.rows[n] for n in numbers], "padding", length=length)
            )
        return states if self.entries is None else states[list(self.entries)]


class StoredReference:
    """Reference states read from a file that `store_reference` wrote."""

    def __init__(self, path: Path, rows: Sequence[TokenRow]) -> None:
        self._file = safe_open(path, "pt")
        self._ends = [0]
        for row in rows:
            self._ends.append(self._ends[-1] + len(row.ids))

    def of(self, numbers: Sequence[int], length: int) -> States:
        """Those of some rows; 0 at padding."""
        stored, parts = self._file.get_slice("states"), []
        for number in numbers:
            values = stored[self._ends[number] : self._ends[number + 1]]
            parts.append(nn.functional.pad(values, (0, 0, 0, 0, 0, length - len(values))))
        return torch.stack(parts).permute(2, 0, 1, 3)


Reference = LiveReference | StoredReference


@torch.no_grad()
def store_reference(
    path: Path,
    model: LanguageModel,
    rows: Sequence[TokenRow],
    entries: Sequence[int] | None,
    blocks: int,
) -> None:
    """Write the states of all rows, `[tokens, entries, d]`, where they are not there yet.

    Args:
        path: the file.
        model: without adapters, in evaluation mode.
        rows: what is run.
        entries: numbers of the states to keep; None for all.
        blocks: blocks that are run.
    """
    if path.is_file():
        return
    found: list[Float[Tensor, "n e d"]] = []
    with first_blocks(model, blocks):
        for some, batch in row_batches(rows):
            states = run_states(model, batch)
            states = states if entries is None else states[list(entries)]
            found += [
                states[:, i, : len(row.ids)].transpose(0, 1).cpu() for i, row in enumerate(some)
            ]
    with atomic_path(path) as temporary:
        save_file({"states": torch.cat(found).contiguous()}, temporary)


def rows_digest(rows: Sequence[TokenRow]) -> str:
    """First 16 hex digits of the SHA-256 of the rows' tokens."""
    text = ";".join(",".join(map(str, row.ids)) for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
