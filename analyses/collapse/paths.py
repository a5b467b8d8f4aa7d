"""Over-squashing: how much of each token reaches the last, by the theorem and by the gradient.

Theorem B.5 of Barbero et al. 2024 (arXiv 2406.04267): where attention weights do not depend on what
is attended to, and a norm only divides by a number beta, the derivative of the last output by token
i's vector below layer l is at most a constant times

    [ (Lambda_{L-1} / beta + I) ... (Lambda_l / beta + I) ]_{n, i},

Lambda a layer's attention weights: the sum over all paths from i up to n. The last row takes L - l
vector-matrix products. Proposition B.8's scaling, (Lambda + I) / 2, makes each row sum to 1.

Measured beside it is |d y_n / d v_i|, the Frobenius norm of the Jacobian, from random projections:
for u ~ N(0, I), the expected square of |J^T u| is |J|^2. Once as it is, and once with attention
weights held constant, which is what the theorem is about.
"""

import contextlib

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from analyses.collapse.curves import final_site
from probe.attention import AS_IT_IS, Visible, frozen_attention
from probe.capture import reading
from probe.errors import UserError
from probe.language import LanguageModel
from probe.sites import Site, parse_site


def path_sums(
    attention: Float[Tensor, "l t t"], beta: float | Float[Tensor, " l"] = 1.0
) -> Float[Tensor, "depths t"]:
    """What flows to the last token from every token at every depth.

    Args:
        attention: each layer's weights.
        beta: each layer's norm as a divisor.

    Returns:
        For the input of each layer, and last for the output, [prod (Lambda / beta + I)]_{n, i},
        scaled to sum to 1 over the tokens: divided by the product of the layers' 1 / beta + 1.
    """
    layers, n, _ = attention.shape
    betas = torch.as_tensor(beta, dtype=torch.float64).expand(layers)
    row = torch.zeros(n, dtype=torch.float64)
    row[-1] = 1
    rows = [row]
    for layer in range(layers - 1, -1, -1):
        row = row @ attention[layer].double() / betas[layer] + row
        row = row / row.sum()
        rows.append(row)
    return torch.stack(rows[::-1])


def without_first(attention: Float[Tensor, "*l t t"]) -> Float[Tensor, "*l t t"]:
    """Attention with the first token's column taken out and the rest of each row scaled up to 1.

    A row that attends to nothing else attends to itself.
    """
    weights = attention.clone()
    weights[..., 0] = 0
    sums = weights.sum(-1, keepdim=True)
    own = torch.eye(weights.shape[-1], dtype=weights.dtype)
    return torch.where(sums > 0, weights / sums.clamp_min(torch.finfo(weights.dtype).tiny), own)


def through_head(
    rows: Float[Tensor, "depths t"], attention: Float[Tensor, "l h t t"]
) -> Float[Tensor, "l h t"]:
    """Of what flows to the last token, what passes each head, by the token it comes from.

    `rows` are the path sums over the mean of the heads: above layer l they are rows[l + 1].
    """
    return torch.einsum("lq,lhqk->lhk", rows[1:].float(), attention)


def without_empty_start(model: LanguageModel, tokens: Int[Tensor, " t"]) -> Int[Tensor, " u"]:
    """A prompt without its first token where that one's vector is zero, as a random-weight twin's
    end of text may be: a norm of nothing has no bounded derivative."""
    vectors = model.model.get_input_embeddings()
    first = vectors(tokens[:1].to(model.device))
    return tokens if bool(first.any()) else tokens[1:]


def sensitivities(
    model: LanguageModel,
    tokens: Int[Tensor, " t"],
    *,
    probes: int,
    seed: int = 0,
    visible: Visible = AS_IT_IS,
    frozen: bool = False,
) -> Float[Tensor, "depths t"]:
    """The norm of the derivative of the last token's final output by every token at every depth.

    Args:
        model: the model.
        tokens: the prompt.
        probes: random projections; the relative error is about 1 / sqrt(2 probes) or less.
        seed: of the projections.
        visible: which tokens are attended to.
        frozen: hold attention weights constant.

    Returns:
        For the input of each layer, and last for the last layer's output, the Frobenius norm of the
        Jacobian by each token's vector.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        output, depths = _forward(model, tokens, visible, frozen)
        squares = torch.zeros(len(depths), len(tokens), dtype=torch.float64)
        for _ in range(probes):
            direction = torch.randn(len(output), generator=generator).to(output)
            gradients = torch.autograd.grad(output, depths, direction, retain_graph=True)
            squares += torch.stack([g[0].double().square().sum(-1).cpu() for g in gradients])
    return (squares / probes).sqrt()


def _forward(
    model: LanguageModel, tokens: Int[Tensor, " t"], visible: Visible, frozen: bool
) -> tuple[Float[Tensor, " d"], list[Float[Tensor, "1 t d"]]]:
    """The last token's final output and the stream at every depth, with their graph."""
    final = final_site(model)
    stream = [parse_site(f"resid_pre.{layer}") for layer in range(model.n_layers)]
    stream.append(parse_site(f"resid_post.{model.n_layers - 1}"))
    seen: dict[Site, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for site in (*stream, final):
            stack.enter_context(reading(model, site, seen.__setitem__))
        if frozen:
            stack.enter_context(frozen_attention(model))
        model.model(
            input_ids=tokens[None].to(model.device),
            attention_mask=visible.mask(0, len(tokens), model.dtype, model.device),
            use_cache=False, logits_to_keep=1,
        )  # fmt: skip
    if not seen[final].requires_grad:
        raise UserError(f"{model.spec} was loaded without gradients; load it again with them.")
    return seen[final][0, -1], [seen[site] for site in stream]


def rank_correlation(a: Float[Tensor, " t"], b: Float[Tensor, " t"]) -> float:
    """Spearman's rank correlation."""
    return float(stats.spearmanr(a.numpy(), b.numpy())[0])  # type: ignore[arg-type]
