"""How a circuit breaker is trained: every constant, and the published ones."""

from dataclasses import dataclass
from typing import Literal

from analyses.circuit_breakers.losses import Rerouting
from analyses.circuit_breakers.rows import Masking
from probe.errors import UserError

Retain = Literal["absolute", "relative"]
RecipeName = Literal["smollm2", "mistral-7b", "llama-3-8b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The constants of a training run. States are numbered as the paper does: 0 are the embeddings,
    l is the output of block l - 1."""

    target_layers: tuple[int, ...] = (10, 20)
    """States that are rerouted."""
    lora_r: int = 16
    """Rank of the adapters, on every linear layer of blocks 0 to the last target's number."""
    lora_alpha: int = 16
    """Their scale, over the rank."""
    lora_dropout: float = 0.05
    """Their dropout."""
    alpha: float | int = 5.0
    """Weight of both terms (`losses.schedule`)."""
    lr: float = 1e-4
    """AdamW's rate, constant; no weight decay."""
    steps: int = 150
    """Steps."""
    batch: int = 16
    """Rows of each set a step."""
    loss: Rerouting = "rr"
    """The rerouting loss."""
    rmu_size: float | int = 1.0
    """How far `rmu` sends states, as a multiple of their mean length."""
    retain: Retain = "absolute"
    """Whether the retain term is in units of the states or relative to their length."""
    retain_weight: float | int = 1.0
    """What the retain term is multiplied with, beside the schedule; 1 as published, where it is in
    units of the states and large by itself."""
    padded_mean: bool = True
    """Whether padding counts as zeros in the retain term's mean."""
    masking: Masking = "padding"
    """Which tokens are left out of both terms."""
    b_std: float = 0.0
    """Standard deviation of B's entries at the beginning."""
    blank: float = 0.0
    """Share of the circuit-breaker rows whose request is left out."""
    borderline: float = 0.5
    """Share of the retain rows that are near misses."""
    request_length: int = 512
    """Tokens of a request, template included; a retain row has both lengths together."""
    response_length: int = 512
    """Tokens of a response."""
    shuffled_sets: bool = False
    """Deal the rows of both sets out anew before training: the control in which no concept is to be
    broken."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass, to save memory."""

    def __post_init__(self) -> None:
        targets = self.target_layers
        if not targets or min(targets) < 1:
            raise UserError(
                f"target layers are numbered from 1 (the first block's output), got {targets}; "
                "name at least one."
            )
        counts = (self.lora_r, self.steps, self.batch, self.request_length, self.response_length)
        above_0 = (self.alpha, self.lr, self.retain_weight)
        if min(counts) < 1 or min(above_0) <= 0 or self.b_std < 0:
            raise UserError(
                "rank, steps, batch and lengths must be at least 1, alpha, rate and retain weight "
                f"above 0; got r {self.lora_r}, {self.steps} steps, batch {self.batch}, lengths "
                f"{self.request_length} and {self.response_length}, alpha {self.alpha}, lr "
                f"{self.lr}, retain weight {self.retain_weight}, B's deviation {self.b_std}."
            )
        if not (0 <= self.blank <= 1 and 0 <= self.borderline <= 1):
            raise UserError(
                f"shares are between 0 and 1, got blank {self.blank}, borderline {self.borderline}."
            )

    @property
    def blocks(self) -> int:
        """Blocks that are run, each with adapters; the ones above are left out."""
        return max(self.target_layers) + 1


RECIPES: dict[RecipeName, Training] = {
    # About 11,500 of 21,500 retain rows of the published mixture are XSTest's.
    "mistral-7b": Training(alpha=5.0, borderline=0.53),
    "llama-3-8b": Training(alpha=10.0, borderline=0.45, blank=0.5),
    "smollm2": Training(
        alpha=10.0, lr=5e-3, steps=30, batch=4, lora_dropout=0.0, retain="relative",
        retain_weight=10.0, padded_mean=False, masking="shared", b_std=0.01, request_length=64,
        response_length=64, gradient_checkpointing=False,
    ),
}  # fmt: skip
"""The published constants (spec of the official code), and those that work on SmolLM2 with two
cores."""
