"""Representation rerouting (Zou et al. 2024, arXiv 2406.04313, algorithm 1), resumable exactly.

    train(model, sets, Training(), seed=0, folder=folder, references=references)

Each step draws rows of the circuit-breaker set and of the retain set, runs the first blocks with
adapters on both, and takes an AdamW step on `c_s L_s + c_r L_r` (`losses`). What a step draws and
its dropout follow from the seed and the step's number alone, so that going on after a checkpoint is
the same as never having stopped. The folder gets the adapter as peft writes it, and the log: a row
a step, with the published script's `cb_cos_sim` and `retain_cos_sim`.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor

from analyses.circuit_breakers.losses import (
    TINY,
    States,
    cosines,
    lengths,
    masked_mean,
    random_target,
    rerouting_loss,
    retain_loss,
    schedule,
)
from analyses.circuit_breakers.rows import Batch, TokenRow, batch_of
from analyses.circuit_breakers.settings import Training
from analyses.circuit_breakers.states import (
    LiveReference,
    Reference,
    StoredReference,
    first_blocks,
    run_states,
)
from probe.errors import Failure
from probe.language import LanguageModel
from probe.lora import Lora, adapter_tensors, lora_adapters, save_adapter
from probe.runs import atomic_path
from saes.checkpoints import FOLDER, load_checkpoint, save_checkpoint
from saes.memory import keep_freed_memory

ADAPTER, LOG = "adapter", "log.parquet"
CHECKPOINT_EVERY, JUDGE_EVERY = 10, 10
"""Steps between checkpoints, and between looks at held-out rows."""
JUDGED = 16
"""Held-out rows of each set that are looked at during training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRows:
    """What a run is trained on and watched with."""

    breaking: tuple[TokenRow, ...]
    """The circuit-breaker set."""
    blanked: tuple[TokenRow, ...]
    """The same without requests; empty where none is blanked."""
    retain: tuple[TokenRow, ...]
    """The retain set."""
    borderline: tuple[TokenRow, ...]
    """Near misses, to be retained too; may be empty."""
    held_out: tuple[TokenRow, ...]
    """Rows on the concept that are not trained on."""
    held_out_retain: tuple[TokenRow, ...]
    """Ordinary rows that are not trained on."""

    @property
    def all_breaking(self) -> tuple[TokenRow, ...]:
        """Rows to be rerouted, with and without requests."""
        return self.breaking + self.blanked

    @property
    def all_retain(self) -> tuple[TokenRow, ...]:
        """Rows to be retained, near misses last."""
        return self.retain + self.borderline


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """Files with the sets' states before training; None where they are computed as they are
    needed."""

    breaking: Path | None = None
    """Of `all_breaking`, the target layers."""
    retain: Path | None = None
    """Of `all_retain`, every entry."""


def train(
    model: LanguageModel,
    rows: TrainingRows,
    training: Training,
    *,
    seed: int,
    folder: Path,
    references: References | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> None:
    """Train adapters into `folder`, from its last checkpoint on where there is one.

    Args:
        model: as it was before and will be afterwards.
        rows: the sets.
        training: the constants.
        seed: decides adapters, dropout, draws and random targets.
        folder: gets `adapter/` and `log.parquet`.
        references: the sets' states, stored.
        on_step: called with each step's number, the resumed one first.

    Raises:
        UserError: the model has not the layers.
        Failure: the loss is not finite; the last good checkpoint is kept.
    """
    keep_freed_memory()
    lora = Lora(
        layers=training.blocks, r=training.lora_r, alpha=training.lora_alpha,
        dropout=training.lora_dropout, b_std=training.b_std,
    )  # fmt: skip
    with first_blocks(model, training.blocks), lora_adapters(model, lora, seed=seed) as adapted:
        if training.gradient_checkpointing:
            model.model.activation_checkpointing_enable({"use_reentrant": False})
        try:
            trainer = Trainer(model, adapted, rows, training, seed, references or References())
            trainer.resume(folder)
            on_step(trainer.done)
            while trainer.done < training.steps:
                trainer.step()
                if trainer.done % CHECKPOINT_EVERY == 0:
                    trainer.save(folder)
                on_step(trainer.done)
            trainer.finish(folder)
        finally:
            if training.gradient_checkpointing:
                model.model.activation_checkpointing_disable()


class Trainer:
    """The state of a run: adapters, their optimiser, steps done, the log.

    The model has its first blocks alone (`states.first_blocks`) and its adapters for as long.
    """

    def __init__(
        self,
        model: LanguageModel,
        adapted: PeftModel,
        rows: TrainingRows,
        training: Training,
        seed: int,
        references: References,
    ) -> None:
        self.model, self.adapted, self.rows, self.training = model, adapted, rows, training
        self.seed, self.done, self.log = seed, 0, []
        self.weights = adapter_tensors(adapted)
        self.optimiser = torch.optim.AdamW(self.weights.values(), lr=training.lr, weight_decay=0.0)
        self.targets = list(training.target_layers)
        self.breaking = self._reference(references.breaking, rows.all_breaking, self.targets)
        self.retain = self._reference(references.retain, rows.all_retain, None)
        self._held_out: dict[str, tuple[Batch, States]] = {}

    def _reference(
        self, path: Path | None, rows: Sequence[TokenRow], entries: list[int] | None
    ) -> Reference:
        if path is None:
            return LiveReference(self.model, self.adapted, rows, entries)
        return StoredReference(path, rows)

    # ------------------------------------------------------------------------------- one step

    def step(self) -> None:
        """One step of the optimiser, logged."""
        t = self.done + 1
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed * 1_000_003 + t)  # decides what dropout leaves out
            found = self._losses(t)
            loss = found["breaking_term"] + found["retain_term"]
            if not torch.isfinite(loss):
                raise Failure(
                    f"the loss was {loss.item()} at step {t} of {self.training.steps}; the last "
                    "good checkpoint is kept. Train with a smaller --lr or --alpha."
                )
            self.optimiser.zero_grad()
            loss.backward()
        self.adapted.eval()
        self.optimiser.step()
        self.done = t
        self.log.append({"step": t, "loss": loss.item()} | {k: v.item() for k, v in found.items()})
        if t % JUDGE_EVERY == 0 or t == self.training.steps:
            self.log[-1] |= self._held_out_measures()

    def _losses(self, t: int) -> dict[str, Tensor]:
        training = self.training
        c_s, c_r = schedule(t, training.steps, training.alpha)
        breaking, retain = draw(self.rows, training, self.seed, t)
        n, device = len(breaking), self.model.device
        chosen = [self.rows.all_breaking[number] for number in breaking]
        # Both sets in one pass: products of twice as many rows waste less.
        batch = batch_of([*chosen, *(self.rows.all_retain[m] for m in retain)], training.masking)
        length = batch.tokens.shape[1]
        before = [
            self.breaking.of(breaking, length).to(device), self.retain.of(retain, length).to(device)
        ]  # fmt: skip
        masks = batch.counted.to(device).split(n)
        self.adapted.train()  # until the backward pass is over, which may run blocks again
        after = run_states(self.model, batch)
        rerouted, kept = after[self.targets, :n], after[:, n:]
        target = None
        if training.loss != "rr":
            size = training.rmu_size * float(masked_mean(lengths(before[0].float()), masks[0]))
            target = random_target(
                training.loss, rerouted.shape[-1], seed=self.seed, step=t, size=size
            )
        broken = rerouting_loss(training.loss, rerouted, before[0], masks[0], target)
        padded = training.request_length + training.response_length
        kept_loss = retain_loss(
            kept, before[1], masks[1], relative=training.retain == "relative",
            padded=padded if training.padded_mean else None,
        )  # fmt: skip
        return {
            "rerouting_loss": broken.detach(), "retain_loss": kept_loss.detach(),
            "breaking_term": c_s * broken, "retain_term": c_r * training.retain_weight * kept_loss,
            "cb_cos_sim": masked_mean(cosines(rerouted, before[0]), masks[0]).detach(),
            "retain_cos_sim": masked_mean(
                cosines(kept[self.targets], before[1][self.targets]), masks[1]
            ).detach(),
        }  # fmt: skip

    @torch.no_grad()
    def _held_out_measures(self) -> dict[str, float]:
        """Cosine and length at the target layers on rows that are not trained on."""
        found = {}
        sets = {"held_out": self.rows.held_out, "held_out_retain": self.rows.held_out_retain}
        for name, rows in sets.items():
            if name not in self._held_out:
                batch = batch_of(rows[:JUDGED], "shared")
                with self.adapted.disable_adapter():
                    self._held_out[name] = batch, run_states(self.model, batch)[self.targets]
            batch, before = self._held_out[name]
            mask = batch.counted.to(self.model.device)
            after = run_states(self.model, batch)[self.targets]
            found[f"{name}_cos"] = float(masked_mean(cosines(after, before), mask))
            ratio = lengths(after.float()) / lengths(before.float()).clamp(min=TINY)
            found[f"{name}_norm"] = float(masked_mean(ratio, mask))
        return found

    # ------------------------------------------------------------------------------- on disk

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        tensors = {f"weight.{name}": weight.detach() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            state = self.optimiser.state[weight]
            tensors |= {f"{key}.{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        save_checkpoint(folder, self.done, tensors, {"log": self.log})

    def resume(self, folder: Path) -> None:
        """Go on from the last checkpoint, where there is one."""
        found = load_checkpoint(folder)
        if found is None:
            return
        tensors, numbers = found
        self.done, self.log = numbers["step"], numbers["log"]
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"weight.{name}"])
                self.optimiser.state[weight] = {
                    key: tensors[f"{key}.{name}"].to(weight.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }

    def finish(self, folder: Path) -> None:
        """Write the adapter and the log; checkpoints are not needed any more."""
        save_adapter(self.adapted, folder / ADAPTER)
        with atomic_path(folder / LOG) as temporary:
            pd.DataFrame(self.log).to_parquet(temporary, index=False)
        shutil.rmtree(folder / FOLDER, ignore_errors=True)


def draw(rows: TrainingRows, training: Training, seed: int, t: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows of step t: of `all_breaking`, and of `all_retain`.

    Each set is gone through in shuffled order, again and again; whether a row's request is blanked,
    and whether a retain row is a near miss, is drawn each time.
    """
    n = training.batch
    places = range((t - 1) * n, t * n)
    rng = np.random.default_rng([seed, t])
    blanked = rng.random(n) < (training.blank if rows.blanked else 0.0)
    near = rng.random(n) < (training.borderline if rows.borderline else 0.0)
    breaking = [
        _shuffled(len(rows.breaking), seed, place) + (len(rows.breaking) if blank else 0)
        for place, blank in zip(places, blanked, strict=True)
    ]
    retain = [
        len(rows.retain) + _shuffled(len(rows.borderline), seed + 2, place)
        if borderline
        else _shuffled(len(rows.retain), seed + 1, place)
        for place, borderline in zip(places, near, strict=True)
    ]
    return breaking, retain


def _shuffled(n: int, seed: int, place: int) -> int:
    """The row at a place of shuffled passes over n rows, one after another."""
    passed, inside = divmod(place, n)
    return int(np.random.default_rng([seed, passed]).permutation(n)[inside])
