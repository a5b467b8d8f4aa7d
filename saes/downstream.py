"""What a reconstruction does to the model: it takes the activation's place in the forward pass.

Gao et al. 2024 (2406.04093, section 4.1) call this downstream loss. The dictionary is trained
without the rows that the store drops (position 0, special tokens, outlier norms), so those
positions keep their activation, and so they do under zero and mean ablation: all candidates are
measured on the same positions. Logits are compared in float32, one sequence at a time; the clean
logits of one batch serve all candidates.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn import functional

from probe.capture import capturing
from probe.corpora import TokenBatch
from probe.errors import Failure, UserError
from probe.interventions import editing
from probe.language import LanguageModel
from probe.sites import Site
from saes.baselines import Candidate, Reconstruct
from saes.metrics import Downstream

CLEAN = "clean"
"""Under this name `measure_downstream` gives the untouched model."""
TOLERANCE = 0.05
"""Squared difference between the model's activations and the stored ones, over their square."""
ADVICE = "evaluate with the model (and random weights' seed) that the store was captured from."


@torch.no_grad()
def measure_downstream(
    model: LanguageModel,
    site: Site,
    candidates: Sequence[Candidate],
    batches: Iterable[TokenBatch],
) -> dict[str, Downstream]:
    """Splice every candidate into the model and compare its predictions with the clean ones.

    Args:
        model: the model that the activations come from.
        site: where the candidates' reconstructions go.
        candidates: what to splice in; names must differ.
        batches: rows of tokens; `keep` marks the positions that are replaced.

    Returns:
        Sums by sequence for each candidate's name, and for the untouched model under `CLEAN`.

    Raises:
        Failure: logits are not finite.
    """
    found: dict[str, list[Tensor]] = {candidate.name: [] for candidate in candidates} | {CLEAN: []}
    for batch in batches:
        tokens = batch.tokens.to(model.device)
        clean = _logits(model, tokens)
        found[CLEAN].append(compare(clean, clean, tokens, CLEAN))
        for candidate in candidates:
            keep = batch.keep.to(model.device)
            with editing(model, site, splice(candidate.reconstruct, keep)):
                logits = _logits(model, tokens)
            found[candidate.name].append(compare(clean, logits, tokens, candidate.label))
    return {name: _by_sequence(torch.cat(parts)) for name, parts in found.items()}


def splice(
    reconstruct: Reconstruct, keep: Bool[Tensor, "b t"]
) -> Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t d"]]:
    """A change that puts the reconstruction in the activation's place where `keep` says so."""

    def change(x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        if x.shape[:2] != keep.shape:
            raise UserError(
                f"the site gave {list(x.shape)} where [sequences, positions, width] = "
                f"[{keep.shape[0]}, {keep.shape[1]}, d] was wanted; choose another site."
            )
        new = x.clone()
        if keep.any():
            new[keep] = reconstruct(x[keep].float()).reconstruction.to(x)
        return new

    return change


def compare(
    clean: Float[Tensor, "b t v"],
    logits: Float[Tensor, "b t v"],
    tokens: Int[Tensor, "b t"],
    label: str,
) -> Float64[Tensor, "b 3"]:
    """Number of predictions, summed cross-entropy and summed KL(clean || logits), by sequence.

    Logits of any dtype; log-probabilities are taken in float32. Raises `Failure` where a sum is not
    finite.
    """
    sums = []
    for clean_row, logits_row, target in zip(clean, logits, tokens[:, 1:], strict=True):
        reference = functional.log_softmax(clean_row[:-1].float(), dim=-1)
        spliced = functional.log_softmax(logits_row[:-1].float(), dim=-1)
        cross_entropy = functional.nll_loss(spliced, target, reduction="none").double().sum()
        kl = functional.kl_div(spliced, reference, reduction="none", log_target=True)
        n = torch.tensor(float(len(target)), dtype=torch.float64, device=cross_entropy.device)
        sums.append(torch.stack([n, cross_entropy, kl.sum(-1).double().sum()]))
    found = torch.stack(sums).cpu()
    if not torch.isfinite(found).all():
        raise Failure(
            f"the model gave NaN or infinite logits with {label} spliced in; run it in float32."
        )
    return found


def check_model(
    model: LanguageModel, site: Site, batch: TokenBatch, stored: Float[Tensor, "n d"]
) -> None:
    """Raise `UserError` where the model does not give the activations that the store holds.

    Args:
        model: the model to check.
        site: the site.
        batch: one or more sequences of the store.
        stored: the store's rows of them.
    """
    if batch.tokens.max() >= model.model.config.get_text_config().vocab_size:
        raise UserError(f"{model.spec} has fewer tokens than the store speaks of; {ADVICE}")
    with torch.no_grad(), capturing(model, [site]) as seen:
        model.run(batch.tokens)
    rows = seen[site][batch.keep.to(seen[site].device)].float().cpu()
    if rows.shape[1] != stored.shape[1]:
        raise UserError(
            f"{model.spec} has width {rows.shape[1]} at {site} and the store has "
            f"{stored.shape[1]}; {ADVICE}"
        )
    # Written so that NaN fails too.
    if not (rows - stored).square().sum() <= TOLERANCE * stored.square().sum():
        raise UserError(
            f"{model.spec} gives other activations at {site} than the store holds; {ADVICE}"
        )


def _logits(model: LanguageModel, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
    logits = model.run(tokens)
    assert logits is not None, "no capture is active, so the pass ran to its end"
    return logits


def _by_sequence(sums: Float64[Tensor, "s 3"]) -> Downstream:
    n_predictions, cross_entropy, kl = sums.unbind(1)
    return Downstream(n_predictions=n_predictions, cross_entropy=cross_entropy, kl=kl)
