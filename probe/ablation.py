"""Taking a direction out of a model, by hooks or in the weights, and adding one.

Ablation (Arditi et al. 2024, arXiv 2406.11717, section 2.4 and appendix E), with `r^` of length 1:

    hook        x <- x - r^ (r^ . x)          at every block's input and every attention's and MLP's
                                              output, at all positions
    weights     W_out <- W_out - r^ r^T W_out for embeddings and the output matrices of attention
                                              and MLP, and b <- b - r^ (r^ . b) for their biases

Both keep `r^` out of all that writes to the residual stream, so they give the same logits up to
rounding, but for two things that `ablated_copy` sees to: embeddings tied to the unembedding are
untied first (else the edit would change what reads the stream too), and a model that normalises
between the output matrix and the stream is refused.

Addition: `x <- x + c r` at one site.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from probe.directions import check_vector, unit
from probe.errors import UserError
from probe.interventions import editing
from probe.language import BLOCK_NAMES, LanguageModel
from probe.sites import Site


def ablation_sites(model: LanguageModel) -> list[Site]:
    """Where a direction is taken out: block inputs, attention outputs and MLP outputs."""
    return [
        Site(kind=kind, layer=layer)
        for layer in range(model.n_layers)
        for kind in ("resid_pre", "attn_out", "mlp_out")
    ]


@contextlib.contextmanager
def ablating(model: LanguageModel, vector: Float[Tensor, " d"]) -> Iterator[None]:
    """Take a direction out of everything that writes to the residual stream, inside the block.

    Raises `UserError` where the direction does not fit or the model's blocks are not known.
    """
    direction = _fitting(model, vector).to(model.device)

    def change(x: Tensor) -> Tensor:
        r = direction.to(x.dtype)
        return x - (x @ r)[..., None] * r

    with contextlib.ExitStack() as stack:
        for site in ablation_sites(model):
            stack.enter_context(editing(model, site, change))
        yield


@contextlib.contextmanager
def adding(
    model: LanguageModel,
    vector: Float[Tensor, " d"],
    site: Site,
    *,
    strength: float | int = 1.0,
    positions: Sequence[int] | None = None,
) -> Iterator[None]:
    """Add `strength` times a vector to a site's tensor inside the block.

    Args:
        model: the model.
        vector: what is added; its length counts.
        site: where.
        strength: how many times.
        positions: of a pass's tokens, negative ones from its end; None for all. Not for passes
            that share the beginning of prompts (`last_token_passes`).

    Raises:
        UserError: the vector is not finite or does not fit the site.
    """
    check_vector(vector, "the vector")
    added = (strength * vector.double()).float().to(model.device)

    def change(x: Tensor) -> Tensor:
        check_vector(vector, "the vector", width=x.shape[-1])
        if positions is None:
            return x + added.to(x.dtype)
        changed = x.clone()
        changed[:, list(positions)] += added.to(x.dtype)
        return changed

    with editing(model, site, change):
        yield


def ablated_copy(model: LanguageModel, vector: Float[Tensor, " d"]) -> LanguageModel:
    """The model with a direction taken out of its weights; the model given stays as it was.

    Raises `UserError` where the direction does not fit, the model's blocks are not known, or it
    normalises what a block writes.
    """
    direction = _fitting(model, vector).to(model.device)
    if model.names is BLOCK_NAMES[0]:
        raise UserError(
            f"{model.spec} normalises what attention and MLP give before adding it, so no weight "
            "edit takes a direction out of it: ablate by hooks."
        )
    edited = LanguageModel(
        model.spec, copy.deepcopy(model.model), model.tokenizer, model.random_weights
    )
    untie(edited)
    with torch.no_grad():
        for module in _writers(edited):
            _take_out(module, direction)
    return edited


def untie(model: LanguageModel) -> None:
    """Give the unembedding weights of its own, in place, where it shares the embedding's."""
    head, embedding = model.model.get_output_embeddings(), model.model.get_input_embeddings()
    if isinstance(head, nn.Linear) and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.model.config.tie_word_embeddings = False


def _writers(model: LanguageModel) -> list[nn.Module]:
    """The modules whose outputs make up the residual stream: embeddings and output projections."""
    assert model.names is not None
    tables = [m for m in model.model.modules() if isinstance(m, nn.Embedding)]
    found: list[nn.Module] = [m for m in tables if m.embedding_dim == model.d_model]
    for block in model.model.get_submodule(model.names.blocks).children():
        for path in (model.names.attention_out, model.names.mlp_down):
            found.append(block.get_submodule(path))
    return found


def _take_out(module: nn.Module, direction: Float[Tensor, " d"]) -> None:
    """Edit one module's weight (and bias) so that what it gives has no part along the direction.

    An embedding `[v, d]` and GPT-2's `Conv1D` `[in, d]` keep the output axis last, a linear layer
    `[d, in]` first. In float64, so that the edit itself does not round.
    """
    r = direction.double()
    weight = module.get_parameter("weight")
    last = isinstance(module, nn.Embedding | Conv1D)
    rows = weight.double() if last else weight.double().T
    rows = rows - (rows @ r)[:, None] * r
    weight.copy_(rows if last else rows.T)
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias.copy_(bias.double() - r * (r @ bias.double()))


def _fitting(model: LanguageModel, vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The vector at length 1, where it fits the model."""
    if model.names is None:
        raise UserError(
            f"the blocks of {model.spec} are not known by name, so nothing says where a direction "
            "is written; edit module:<dotted path> sites one by one."
        )
    check_vector(vector, "the direction", width=model.d_model)
    return unit(vector)
