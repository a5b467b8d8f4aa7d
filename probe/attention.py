"""What attends to what in a language model: the weights, and which earlier tokens are visible.

    attention_weights(model, tokens)                    # [l, h, t, t], rows sum to 1
    with frozen_attention(model): ...                   # gradients do not pass through the weights

`Visible` says which earlier tokens a token may attend to: the latest few (a sliding window), the
first token as all others, always, or never. The first token is where trained models send attention
that has nothing better to do (the attention sink, Xiao et al. 2023, arXiv 2309.17453).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from probe.errors import UserError
from probe.language import LanguageModel

Sink = Literal["like others", "kept", "hidden"]
FROZEN = "lorgnette_frozen"

# The interface hands over options by name that differ from version to version.
AttentionInterface.register(
    FROZEN,
    lambda module, query, key, *rest, **options: sdpa_attention_forward(
        module, query.detach(), key.detach(), *rest, **options
    ),
)
AttentionMaskInterface.register(FROZEN, sdpa_mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Visible:
    """Which tokens up to itself a token may attend to. Raises `UserError` for an empty window.

    Where nothing is set, the model attends as it does; else this takes the place of the windows
    that the model may have of its own.
    """

    window: int | None = None
    """How many of the latest tokens, itself among them; None: all."""
    sink: Sink = "like others"
    """The first token: visible like the others, outside the window too, or to itself alone."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f"a window of {self.window} tokens was asked for; give 1 or more.")

    @property
    def name(self) -> str:
        """What is visible, in a few words."""
        if self.window is None:
            return "all" if self.sink == "like others" else f"first token {self.sink}"
        kept = "" if self.sink == "like others" else f", first token {self.sink}"
        return f"window {self.window}{kept}"

    def seen(self, query: Int[Tensor, "q 1"], key: Int[Tensor, " k"]) -> Bool[Tensor, "q k"]:
        """Whether tokens at some positions see those at others."""
        seen = key <= query
        if self.window is not None:
            seen &= query - key < self.window
        if self.sink == "kept":
            seen |= key == 0
        if self.sink == "hidden":
            seen &= (key > 0) | (query == 0)
        return seen

    def mask(
        self, start: int, end: int, dtype: torch.dtype, device: torch.device
    ) -> Float[Tensor, "1 1 q k"] | None:
        """What is added to the scores of tokens `start` to `end` (exclusive) for the tokens before
        `end`, as `additive` makes it; None for the model's own."""
        if self == AS_IT_IS:
            return None
        return additive(
            self.seen(torch.arange(start, end)[:, None], torch.arange(end)), dtype, device
        )


def additive(
    seen: Bool[Tensor, "q k"], dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "1 1 q k"]:
    """What is added to attention scores: 0 where a token is seen, else the lowest number."""
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[None, None].to(device)


AS_IT_IS = Visible()
"""The model's own attention."""


@torch.no_grad()
def attention_weights(
    model: LanguageModel, tokens: Int[Tensor, " t"], *, visible: Visible = AS_IT_IS
) -> Float[Tensor, "l h t t"]:
    """The attention weights of every layer and head: row i is what token i attends to, sums to 1.

    They are on the CPU. Raises `UserError` where the model gives none, as those without attention
    do.
    """
    n = len(tokens)
    with _implementation(model, "eager"):
        out = model.model(
            input_ids=tokens[None].to(model.device),
            attention_mask=visible.mask(0, n, model.dtype, model.device),
            use_cache=False, output_attentions=True, logits_to_keep=1,
        )  # fmt: skip
    found = [layer for layer in out.get("attentions") or () if layer is not None]
    if not found or any(layer.shape[-2:] != (n, n) for layer in found):
        raise UserError(
            f"{model.spec} gives no attention weights ({type(model.model).__name__}); choose a "
            "transformer whose every layer attends."
        )
    return torch.cat(found).float().cpu()


@contextlib.contextmanager
def frozen_attention(model: LanguageModel) -> Iterator[None]:
    """Let gradients treat attention weights as constants, as bounds of over-squashing do.

    Raises `UserError` where the model's attention cannot be exchanged.
    """
    with _implementation(model, FROZEN):
        yield


@contextlib.contextmanager
def _implementation(model: LanguageModel, name: str) -> Iterator[None]:
    """Run the model's attention in another way for a while."""
    config = model.model.config
    before = config._attn_implementation or "eager"
    model.model.set_attn_implementation(name)
    if config._attn_implementation != name:
        raise UserError(
            f"the attention of {model.spec} ({type(model.model).__name__}) cannot be looked into; "
            "choose a transformer whose attention goes through transformers' attention interface."
        )
    try:
        yield
    finally:
        model.model.set_attn_implementation(before)
