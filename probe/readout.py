"""What a model says next, as one number, and how that number depends on a site.

A metric `m` of the logits `z` after the last token of a prompt is

    z[target] - z[contrast]        where a contrast token is named
    z[target] - mean over v of z   where none is

Both are unchanged when the same number is added to all logits, which changes no probability. The
second is taken rather than the log-probability because that one saturates: where the model is sure
of the target, its gradient is near 0 however much a feature contributes.

Numbers are taken in float32: of a model in bfloat16 the unembedding is done again in float32 (a
logit of 20 has steps of 1/8 in bfloat16), and what remains is the rounding inside its blocks. Load
the model in float32 where effects of a few hundredths matter.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from probe.errors import UserError
from probe.interventions import editing
from probe.language import LanguageModel
from probe.sites import Site
from probe.tokens import Prompt, one_token, token_texts

Vary = Callable[[Float[Tensor, "t d"]], Float[Tensor, "n t d"]]
TOKENS_AT_ONCE = 4096
"""Tokens that run through the model in one pass at most, unless one prompt is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """How much the logits after a prompt favour one token."""

    target: int
    """The token that is asked about."""
    contrast: int | None = None
    """The token it is compared with; None compares it with the mean of all."""

    def of(self, logits: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
        """The metric of each row of logits. Raises `UserError` where there is no such token."""
        size = logits.shape[-1]
        if not all(0 <= token < size for token in (self.target, self.contrast or 0)):
            raise UserError(
                f"tokens {self.target} and {self.contrast} were asked for and the model has the "
                f"tokens 0 to {size - 1}."
            )
        other = logits.mean(-1) if self.contrast is None else logits[:, self.contrast]
        return logits[:, self.target] - other

    def named(self, model: LanguageModel) -> str:
        """The metric in words, with the tokens' texts."""
        target, *rest = token_texts(model, [self.target, *([] if self.contrast is None else
                                                          [self.contrast])])  # fmt: skip
        against = f"logit of {rest[0]!r}" if rest else "mean logit"
        return f"logit of {target!r} minus {against}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteGradient:
    """A site's tensor on a prompt and what a small change of it would do to a metric."""

    x: Float[Tensor, "t d"]
    """The tensor, in the model's dtype."""
    gradient: Float[Tensor, "t d"]
    """Derivative of the metric by each entry of it: float32, out of the model's dtype."""
    metric: Metric
    """The metric."""
    value: float
    """Its value."""


def token_metric(model: LanguageModel, target: str, contrast: str | None = None) -> Metric:
    """The metric of a token's text, against another one's or against the mean logit.

    Raises `UserError` where a text is not one token.
    """
    other = None if contrast is None else one_token(model, contrast)
    return Metric(target=one_token(model, target), contrast=other)


def last_logits(model: LanguageModel, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "n v"]:
    """Logits after the last token in float32, with gradients where they are switched on.

    There are as many rows as the last block sees: more than `b` where an edit makes several of one
    (`varied_metrics`).
    """
    with _float32_at_the_end(model.model.get_output_embeddings()):
        logits = model.model(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits[:, -1].float()


@contextlib.contextmanager
def _float32_at_the_end(head: nn.Module | None) -> Iterator[None]:
    """Let the unembedding see the last position only, and work in float32 where it is linear."""
    if head is None:
        yield
        return

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, -1:], *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not isinstance(module, nn.Linear) or output.dtype == torch.float32:
            return output
        bias = None if module.bias is None else module.bias.float()
        return functional.linear(args[0].float(), module.weight.float(), bias)

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def predicted(model: LanguageModel, prompt: Prompt) -> Float[Tensor, " v"]:
    """Log-probabilities of the token that follows the prompt, in float32."""
    return last_logits(model, prompt.tokens)[0].log_softmax(-1)


def site_gradient(
    model: LanguageModel, site: Site, prompt: Prompt, metric: Metric | None = None
) -> SiteGradient:
    """A site's tensor and the metric's derivative by it: one forward and one backward pass.

    The tensor goes on as it is: the forward pass is the model's own. `metric` None means the token
    that the model predicts, against the mean logit.

    Raises:
        UserError: the site is not in the model, its tensor is not `[1, t, d]`, or the metric does
            not depend on it.
    """
    leaves: list[Tensor] = []

    def change(x: Tensor) -> Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad(), editing(model, site, change):
        logits = last_logits(model, prompt.tokens)
        metric = metric or Metric(target=int(logits[0].argmax()))
        value = metric.of(logits)[0]
        check_rows(site, leaves[-1], prompt)
        (gradient,) = torch.autograd.grad(value, leaves[-1], allow_unused=True)
    if gradient is None:
        raise UserError(f"the prediction does not depend on site {site}; choose another site.")
    return SiteGradient(
        x=leaves[-1].detach()[0],
        gradient=gradient[0].float(),
        metric=metric,
        value=float(value.detach()),
    )


def check_rows(site: Site, x: Tensor, prompt: Prompt) -> None:
    """Raise `UserError` where a site's tensor does not hold a row for each token."""
    if x.ndim != 3 or x.shape[1] != len(prompt):
        raise UserError(
            f"site {site} gave {list(x.shape)} where [1, {len(prompt)} tokens, width] was wanted; "
            "choose another site."
        )


@torch.no_grad()
def varied_metrics(
    model: LanguageModel, site: Site, prompt: Prompt, metric: Metric, vary: Vary, n: int
) -> Float[Tensor, " n"]:
    """The metric of `n` runs of one prompt that differ in a site's tensor alone, in one pass.

    Where the site is a layer's, the blocks below it run once: the edit makes `n` rows of the one
    that arrives, and what was made for one row (positions, masks) is broadcast. A `module:` site
    may lie where that is not so, hence the whole prompt is repeated for it.

    Args:
        model: the model.
        site: where the runs differ.
        prompt: what is run.
        metric: what is measured after its last token.
        vary: from the site's tensor `[t, d]` to the `n` tensors to go on with, in any dtype.
        n: how many.
    """

    def change(x: Tensor) -> Tensor:
        check_rows(site, x, prompt)
        return vary(x[0]).to(x)

    repeats = n if site.kind == "module" else 1
    with editing(model, site, change):
        logits = last_logits(model, prompt.tokens.expand(repeats, -1))
    return metric.of(logits).cpu()


def rows_at_once(prompt: Prompt) -> int:
    """How many runs of a prompt go through the model together."""
    return max(TOKENS_AT_ONCE // len(prompt), 1)
