"""What untrained transformers write, and how compressible it is (Teney et al. 2024, section 5).

Each sequence is written greedily by weights of its own, fresh from the architecture's own
initialisation, after one random token. Its complexity is the number of phrases of `lz78`, on tokens
numbered by their first occurrence. Any causal architecture of transformers can be asked; the
activation of its MLPs and the gains of its norms are changed where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from transformers import GPT2Config, PretrainedConfig, PreTrainedModel

from analyses.cells import Frame
from analyses.simplicity.measures import lz78
from analyses.simplicity.networks import Activation, activated
from probe.errors import UserError
from probe.models import make_random_model

LENGTH = 100
"""Tokens of a sequence, the first included."""
VOCABULARY = 1000
"""Tokens that the small GPT-2 knows."""
WEIGHTS_AT_ONCE = 120_000_000
"""Weights of the models that write side by side: half a gigabyte."""
SEQUENCE_ACTIVATIONS: tuple[Activation, ...] = (
    "relu", "gelu", "swish", "selu", "tanh", "gaussian", "sine"
)  # fmt: skip
VARIED_ACTIVATIONS: tuple[Activation, ...] = ("relu", "gelu", "tanh", "sine")
"""Those of which depth and the norms' gains are varied."""
RANDOM = "random tokens"
"""What the sequences at the other end of the scale are called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A transformer and what is changed about it."""

    config: PretrainedConfig
    """Its architecture."""
    activation: Activation | None = None
    """Of the MLPs; None as the architecture has it."""
    norm_scale: float = 1.0
    """What the gains of all norms are multiplied with."""


def tiny_gpt2(depth: int, *, width: int = 128, vocabulary: int = VOCABULARY) -> PretrainedConfig:
    """A GPT-2 that is small enough to be drawn hundreds of times."""
    return GPT2Config(
        n_layer=depth, n_embd=width, n_head=4, vocab_size=vocabulary, n_positions=LENGTH,
        bos_token_id=0, eos_token_id=None,
    )  # fmt: skip


class Phi(nn.Module):
    """An activation of `networks` as a module."""

    def __init__(self, name: Activation) -> None:
        super().__init__()
        self.name: Activation = name

    def forward(self, x: Tensor) -> Tensor:
        """phi(x)."""
        return activated(self.name, x)


def drawn_model(variant: Variant, seed: int) -> PreTrainedModel:
    """A model with weights of its own.

    Raises `UserError` where the architecture has no activation or norm that could be changed.
    """
    model = make_random_model(variant.config, seed, torch.float32).eval()
    if variant.activation is not None:
        found = [one for one in model.modules() if hasattr(one, "act") or hasattr(one, "act_fn")]
        if not found:
            raise UserError(f"no activation is known in {type(model).__name__}; leave it as it is.")
        for one in found:
            setattr(one, "act" if hasattr(one, "act") else "act_fn", Phi(variant.activation))
    if variant.norm_scale != 1:
        _scale_norms(model, variant.norm_scale)
    return model


def _scale_norms(model: PreTrainedModel, scale: float) -> None:
    found: list[Any] = [one for name, one in model.named_modules()
             if "norm" in type(one).__name__.lower() and hasattr(one, "weight")]  # fmt: skip
    if not found:
        raise UserError(f"no norm is known in {type(model).__name__}; leave its scale at 1.")
    with torch.no_grad():
        for one in found:
            one.weight.mul_(scale)


@torch.no_grad()
def written(models: Sequence[PreTrainedModel], seeds: Sequence[int], length: int = LENGTH) -> (
    Int[Tensor, "n t"]
):  # fmt: skip
    """Sequences that begin with a random token and go on greedily: one of each model.

    The models, of one architecture, write side by side: their weights are stacked, and each layer
    is one batched product.
    """
    size = models[0].config.get_text_config().vocab_size
    first = torch.cat(
        [torch.randint(size, (1,), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    for model in models:
        model.set_attn_implementation("eager")  # the fused kernels do not take stacked weights

    def write(weights: dict[str, Tensor], buffers: dict[str, Tensor], token: Tensor) -> Tensor:
        tokens, past = [token], None
        for _ in range(length - 1):
            given = functional_call(
                models[0], (weights, buffers), (tokens[-1].reshape(1, 1),),
                {"past_key_values": past, "use_cache": True},
            )  # fmt: skip
            tokens.append(given.logits[0, -1].argmax())
            past = given.past_key_values
        return torch.stack(tokens)

    return torch.vmap(write)(*stack_module_state(list(models)), first)


def complexity(tokens: Int[Tensor, "n t"]) -> Int[np.ndarray, " n"]:
    """`lz78` of sequences, tokens numbered by their first occurrence in each."""
    rows = tokens.numpy()
    numbered = np.stack([np.unique(_first_seen(row), return_inverse=True)[1] for row in rows])
    return lz78(numbered.astype(np.int64), int(numbered.max()) + 1)


def _first_seen(row: np.ndarray) -> np.ndarray:
    """Each token's first place."""
    _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
    return first[inverse]


def sequences(variant: Variant, n: int, *, seed: int) -> Frame:
    """A row a sequence: `draw`, `lz`, `distinct` tokens."""
    found: list[Tensor] = []
    while len(found) < n:
        first = drawn_model(variant, seed * 100_003 + len(found))
        together = max(1, min(n - len(found), WEIGHTS_AT_ONCE // first.num_parameters()))
        numbers = range(len(found), len(found) + together)
        models = [first, *(drawn_model(variant, seed * 100_003 + one) for one in numbers[1:])]
        found += list(written(models, numbers))
    tokens = torch.stack(found)
    return pd.DataFrame(
        {
            "draw": range(n), "lz": complexity(tokens),
            "distinct": [len(row.unique()) for row in tokens],
        }
    )  # fmt: skip


def random_tokens(n: int, vocabulary: int, *, seed: int) -> Int[Tensor, "n t"]:
    """Sequences of random tokens: the other end of the scale."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (n, LENGTH), generator=generator)
