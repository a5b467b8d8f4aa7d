"""A step of circuit-breaker training, against the loop as one would write it down."""

import tempfile
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel

from analyses.circuit_breakers.concepts import find_concept
from analyses.circuit_breakers.losses import Mask, States, cosines, lengths, masked_mean, schedule
from analyses.circuit_breakers.passages import ordinary_passages
from analyses.circuit_breakers.rows import Batch, TokenRow, batch_of, token_rows
from analyses.circuit_breakers.settings import RECIPES
from analyses.circuit_breakers.states import first_blocks, store_reference
from analyses.circuit_breakers.training import References, Trainer, TrainingRows, draw
from probe.language import LanguageModel
from probe.lora import Lora, adapter_tensors, lora_adapters
from probe.models import load_language_model
from saes.memory import keep_freed_memory
from tests.bench.timing import side_by_side

TRAINING = RECIPES["smollm2"]
ROWS = 16


def rows_of(model: LanguageModel) -> TrainingRows:
    """Ordinary passages in the place of both sets: what they say costs nothing."""
    kindred = find_concept("recipes").kindred
    passages = ordinary_passages(3 * ROWS, trained=True, without=kindred)
    rows = token_rows(
        model, passages, request_length=TRAINING.request_length,
        response_length=TRAINING.response_length,
    )  # fmt: skip
    parts = [tuple(rows[i * ROWS : (i + 1) * ROWS]) for i in range(3)]
    return TrainingRows(
        breaking=parts[0], blanked=(), retain=parts[1], borderline=parts[2], held_out=parts[0],
        held_out_retain=parts[1],
    )  # fmt: skip


class PlainLoop:
    """Every block, the unembedding and the states before training, at every step, set by set."""

    def __init__(self, model: LanguageModel, rows: TrainingRows, adapted: PeftModel) -> None:
        self.model, self.rows, self.adapted, self.done = model, rows, adapted, 0
        self.optimiser = torch.optim.AdamW(
            adapter_tensors(self.adapted).values(), lr=TRAINING.lr, weight_decay=0.0
        )

    def step(self) -> None:
        """One step."""
        self.done += 1
        c_s, c_r = schedule(self.done, 10_000, TRAINING.alpha)
        breaking, retain = draw(self.rows, TRAINING, 0, self.done)
        targets = list(TRAINING.target_layers)
        before, after, counted = self._both([self.rows.all_breaking[n] for n in breaking])
        cosine = cosines(after[targets], before[targets]).relu()
        loss = c_s * masked_mean(cosine, counted)
        before, after, counted = self._both([self.rows.all_retain[n] for n in retain])
        kept = masked_mean(lengths(after - before) / lengths(before), counted)
        loss = loss + c_r * TRAINING.retain_weight * kept
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

    def _both(self, rows: list[TokenRow]) -> tuple[States, States, Mask]:
        """States without adapters and with them, and the tokens that count."""
        batch = batch_of(rows, "shared")
        with torch.no_grad(), self.adapted.disable_adapter():
            before = self._states(batch)
        return before, self._states(batch), batch.counted

    def _states(self, batch: Batch) -> States:
        given = self.model.model(
            input_ids=batch.tokens, attention_mask=batch.attended.long(), use_cache=False,
            output_hidden_states=True,
        ).hidden_states  # fmt: skip
        return torch.stack(given[: TRAINING.blocks + 1])


def measure() -> pd.DataFrame:
    """Training steps a second of SmolLM2, 4 + 4 rows of up to 128 tokens."""
    keep_freed_memory()
    lora = Lora(
        layers=TRAINING.blocks, r=TRAINING.lora_r, alpha=TRAINING.lora_alpha, dropout=0.0,
        b_std=TRAINING.b_std,
    )  # fmt: skip
    plain_model, live_model, model = (
        load_language_model("smollm2", dtype="float32") for _ in range(3)
    )
    rows = rows_of(model)
    with tempfile.TemporaryDirectory() as folder:
        paths = References(breaking=Path(folder) / "breaking", retain=Path(folder) / "retain")
        assert paths.breaking and paths.retain
        store_reference(
            paths.breaking, model, rows.all_breaking, list(TRAINING.target_layers), TRAINING.blocks
        )
        store_reference(paths.retain, model, rows.all_retain, None, TRAINING.blocks)
        with (
            first_blocks(live_model, TRAINING.blocks),
            first_blocks(model, TRAINING.blocks),
            lora_adapters(plain_model, lora, seed=0) as plain_adapted,
            lora_adapters(live_model, lora, seed=0) as live_adapted,
            lora_adapters(model, lora, seed=0) as adapted,
        ):
            plain = PlainLoop(plain_model, rows, plain_adapted)
            live = Trainer(live_model, live_adapted, rows, TRAINING, 0, References())
            stored = Trainer(model, adapted, rows, TRAINING, 0, paths)
            return side_by_side(
                {
                    "every block, both models, set by set": plain.step,
                    "first blocks alone, both sets in one pass": live.step,
                    "the same, states before training stored": stored.step,
                },
                1, "steps", rounds=5,
            )  # fmt: skip
