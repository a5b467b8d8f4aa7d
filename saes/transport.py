"""Taking what makes one image into another: recipes from two prompts.

After Surkov et al. 2024 (2410.22366, version 4; code: github.com/wendlerc/RIEBench). Both prompts
are drawn from the same seed. Of each feature r of several blocks together

    score_r = mean_src_r / sum(mean_src) - mean_tgt_r / sum(mean_tgt)

with means of its codes over the places of the source's mask and of the target's, at the first step
or over all steps. The k features of largest score are added, m times the source's codes at the
source's mask; the k of smallest score are removed, m times the target's own codes at the target's
mask; both at every step. The target is then drawn again.

Two baselines of the same kind: the blocks' whole updates instead of codes (activation steering),
and neurons, which are the GEGLU outputs of the blocks' feed-forward layers, scored after each is
divided by its norm over the mask's places. Masks are weights; the authors' are of 0 and 1.

What comes out is a plain recipe: it holds prompts, features and masks, and needs nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probe.diffusion import DiffusionModel, DrawConfig
from probe.errors import UserError
from probe.passes import read_passes
from probe.sites import Site, parse_site
from saes.drawing import on_grid
from saes.recipe_checks import checked
from saes.recipe_parts import (
    Features,
    ModelReference,
    Neurons,
    Positions,
    Recipe,
    RecipeEdit,
    Strength,
    Target,
    WholeSite,
)
from saes.recipe_saes import LoadedSae, Reader, sae_reference

Aggregate = Literal["first", "mean"]
"""Scores from the first step, or from the mean over steps."""
Removal = Literal["running", "clean"]
"""Codes taken off: those of the pass that is being edited (as the authors do with features), or
those of the target drawn without edits (as they do in the baselines)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two prompts drawn from the same seed."""

    source: str
    """The prompt that gives."""
    target: str
    """The prompt that is drawn again."""
    seed: int = 42
    """Of both."""
    draw: DrawConfig
    """How."""
    source_mask: Float[Tensor, "_h _w"] | None = None
    """Weights from 0 to 1 of the places that give, at any size of the images' aspect; None for
    all."""
    target_mask: Float[Tensor, "_h _w"] | None = None
    """The same of the places that something is removed at. To add an object give the source's mask
    for both, to delete one the target's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Features or neurons to add and to remove, by site."""

    added: Mapping[Site, tuple[int, ...]]
    """Numbers, largest score first."""
    removed: Mapping[Site, tuple[int, ...]]
    """Numbers, smallest score first."""


def transport_recipe(
    model: DiffusionModel,
    saes: Mapping[str, LoadedSae],
    pair: Pair,
    *,
    k: int,
    m: float = 1.0,
    aggregate: Aggregate = "first",
    removal: Removal = "running",
    balanced: bool = False,
    only_add: bool = False,
) -> Recipe:
    """The recipe that transports features.

    Args:
        model: the image model.
        saes: an SAE for each block, by the key that the recipe names it by.
        pair: the prompts.
        k: features added, and removed, of all blocks together.
        m: how many times.
        aggregate: what scores are made of.
        removal: whose codes are removed.
        balanced: multiply what a block removes by the decoder norms of the features that it adds
            over those of the ones that it removes, as the authors' code does.
        only_add: remove nothing.

    Raises `UserError` where k is too large, a mask is empty or of another aspect, or nothing fires
    in it.
    """
    source, target = _codes(model, saes, pair)
    return recipe_of_features(
        model, saes, pair, choose(source, target, k=k, aggregate=aggregate), m=m, removal=removal,
        balanced=balanced, only_add=only_add, what=f"features, k {k}, m {m:g}",
    )  # fmt: skip


def recipe_of_features(
    model: DiffusionModel,
    saes: Mapping[str, LoadedSae],
    pair: Pair,
    chosen: Chosen,
    *,
    m: float = 1.0,
    removal: Removal = "running",
    balanced: bool = False,
    only_add: bool = False,
    what: str = "chosen features",
) -> Recipe:
    """The recipe that transports features which somebody chose; the rest as `transport_recipe`.

    Args:
        model: the image model.
        saes: an SAE for each block, by the key that the recipe names it by.
        pair: the prompts.
        chosen: the features, of any number.
        m: how many times.
        removal: whose codes are removed.
        balanced: as in `transport_recipe`.
        only_add: remove nothing.
        what: what is transported, for the recipe's name.

    Raises `UserError` where nothing is chosen.
    """
    edits: list[RecipeEdit] = []
    for site, key in _keys(saes).items():
        added = chosen.added.get(site, ())
        removed = () if only_add else chosen.removed.get(site, ())
        norms = saes[key].sae.W_dec.norm(dim=1)
        ratio = norms[list(added)].sum() / norms[list(removed)].sum() if balanced else 1.0
        edits += _edits(
            pair, str(site), Features(features=added, sae=key), Features(features=removed, sae=key),
            m=m, removed_m=m * float(ratio), removal=removal,
        )  # fmt: skip
    if not edits:
        raise UserError("there is nothing to transport; choose a feature to add or to remove.")
    named = {key: sae_reference(one.run) for key, one in saes.items()}
    return _recipe(model, pair, what, edits, named)


def feature_scores(
    model: DiffusionModel,
    saes: Mapping[str, LoadedSae],
    pair: Pair,
    *,
    aggregate: Aggregate = "first",
) -> pd.DataFrame:
    """What `transport_recipe` chooses by: every feature of the blocks, the largest score first.

    Columns `site`, `feature`, `source` and `target` (its mean in the mask as a share of the sum of
    all means) and `score`, their difference. The k to add are the first k rows, the k to remove the
    last k from the end. Raises as `transport_recipe` does.
    """
    source, target = _codes(model, saes, pair)
    shares = [_shares(side, aggregate) for side in (source, target)]
    sizes = {str(site): values.shape[-1] for site, (values, _) in source.items()}
    frame = pd.DataFrame(
        {
            "site": [site for site, size in sizes.items() for _ in range(size)],
            "feature": [number for size in sizes.values() for number in range(size)],
            "source": shares[0].numpy(),
            "target": shares[1].numpy(),
            "score": (shares[0] - shares[1]).numpy(),
        }
    )
    order = (shares[0] - shares[1]).sort(descending=True, stable=True).indices
    return frame.iloc[order.numpy()].reset_index(drop=True)


def steering_recipe(
    model: DiffusionModel,
    sites: Sequence[Site],
    pair: Pair,
    *,
    m: float = 1.0,
    only_add: bool = False,
) -> Recipe:
    """The baseline of activation steering: whole updates instead of codes.

    Raises `UserError` as `DiffusionModel.block` does, or for a mask that does not fit.
    """
    edits: list[RecipeEdit] = []
    for site in sites:
        model.block(site)
        removed = None if only_add else WholeSite()
        edits += _edits(pair, str(site), WholeSite(), removed, m=m, removed_m=m, removal="clean")
    return _recipe(model, pair, f"whole updates, m {m:g}", edits, {})


def neuron_recipe(
    model: DiffusionModel,
    blocks: Sequence[Site],
    pair: Pair,
    *,
    k: int,
    m: float = 1.0,
    aggregate: Aggregate = "first",
    only_add: bool = False,
) -> Recipe:
    """The baseline of neuron transport: GEGLU outputs, chosen as features are.

    Raises `UserError` as `transport_recipe` does.
    """
    sites = [site for block in blocks for site in neuron_sites(model, block)]
    sides = []
    for prompt, mask in ((pair.source, pair.source_mask), (pair.target, pair.target_mask)):
        values = _read(model, prompt, pair, sites)
        inside = {site: _in_mask(x, model, site, mask, pair.draw) for site, x in values.items()}
        sides.append({site: _normalised(*one) for site, one in inside.items()})
    chosen = choose(sides[0], sides[1], k=k, aggregate=aggregate)
    edits: list[RecipeEdit] = []
    for site in sites:
        removed = () if only_add else chosen.removed[site]
        edits += _edits(
            pair, str(site), Neurons(neurons=chosen.added[site]), Neurons(neurons=removed),
            m=m, removed_m=m, removal="clean",
        )  # fmt: skip
    return _recipe(model, pair, f"neurons, k {k}, m {m:g}", edits, {})


def neuron_sites(model: DiffusionModel, block: Site) -> list[Site]:
    """The GEGLU outputs of a block's feed-forward layers, in order."""
    inside = model.block(block)
    path = next(name for name, one in model.parts.named_modules() if one is inside)
    layers = inside.get_submodule("transformer_blocks")
    n_layers = len(list(layers.children()))
    return [parse_site(f"module:{path}.transformer_blocks.{n}.ff.net.0") for n in range(n_layers)]


# ---------------------------------------------------------------------------------------- scores

Inside = tuple[Float[Tensor, "_s _t _n"], Float[Tensor, " _t"]]
"""Numbers at each step and place, and the weights of the places."""


def choose(
    source: Mapping[Site, Inside], target: Mapping[Site, Inside], *, k: int, aggregate: Aggregate
) -> Chosen:
    """The k numbers of largest and of smallest score, of all sites together.

    Raises `UserError` where there are not 2 k of them, or all are 0 in one of the masks.
    """
    scores = _shares(source, aggregate) - _shares(target, aggregate)
    if not 1 <= k <= len(scores) // 2:
        raise UserError(
            f"k must be from 1 to {len(scores) // 2}, half of the {len(scores)} there are, got {k}."
        )
    order = scores.sort(descending=True, stable=True).indices
    widths = {site: values.shape[-1] for site, (values, _) in source.items()}
    return Chosen(added=_by_site(order[:k], widths), removed=_by_site(order.flip(0)[:k], widths))


def _shares(inside: Mapping[Site, Inside], aggregate: Aggregate) -> Float[Tensor, " n"]:
    """Each number's mean over places, as a share of the sum of all means."""
    means = []
    for values, weights in inside.values():
        over_places = torch.einsum("stw,t->sw", values, weights) / weights.sum()
        means.append(over_places[0] if aggregate == "first" else over_places.mean(0))
    joined = torch.cat(means)
    if not joined.any():
        raise UserError("nothing fires at the places of the mask; choose other places.")
    return joined / joined.sum()


def _by_site(numbers: Int[Tensor, " k"], widths: Mapping[Site, int]) -> dict[Site, tuple[int, ...]]:
    found, start = {}, 0
    for site, width in widths.items():
        here = numbers[(numbers >= start) & (numbers < start + width)] - start
        found[site] = tuple(here.tolist())
        start += width
    return found


def _keys(saes: Mapping[str, LoadedSae]) -> dict[Site, str]:
    """The key of each block's SAE. Raises `UserError` for two of one block."""
    keys = {parse_site(one.site): key for key, one in saes.items()}
    if len(keys) < len(saes):
        named = ", ".join(f"{one.run.path.name} ({one.site})" for one in saes.values())
        raise UserError(f"one SAE of each block was wanted, got {named}.")
    return keys


def _codes(
    model: DiffusionModel, saes: Mapping[str, LoadedSae], pair: Pair
) -> tuple[dict[Site, Inside], dict[Site, Inside]]:
    """The codes of both images of a pair."""
    readers = {site: Reader(saes[key].sae) for site, key in _keys(saes).items()}
    sides = []
    for prompt, mask in ((pair.source, pair.source_mask), (pair.target, pair.target_mask)):
        values = _read(model, prompt, pair, list(readers))
        codes = {
            site: readers[site].codes(x).dense(readers[site].sae.config.d_sae)
            for site, x in values.items()
        }
        sides.append({site: _in_mask(x, model, site, mask, pair.draw) for site, x in codes.items()})
    return sides[0], sides[1]


def _normalised(values: Float[Tensor, "s t n"], weights: Float[Tensor, " t"]) -> Inside:
    """Numbers divided by their norm over the places of the mask, at each step."""
    norms = torch.einsum("stw,t->sw", values.square(), weights).sqrt()
    return values / norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None], weights


def _read(
    model: DiffusionModel, prompt: str, pair: Pair, sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "_s _t _d"]]:
    passes = read_passes(model, [prompt], [pair.seed], pair.draw, list(sites))
    return {site: values[:, 0].float() for site, values in passes.values.items()}


def _in_mask(
    values: Float[Tensor, "s t n"],
    model: DiffusionModel,
    site: Site,
    mask: Float[Tensor, "h w"] | None,
    draw: DrawConfig,
) -> Inside:
    values = values.detach().cpu()
    if mask is None:
        return values, torch.ones(values.shape[1])
    weights = on_grid(mask, model.grid(site, draw), "the transport").flatten()
    if not weights.any():
        raise UserError("the mask of the transport is 0 everywhere; choose some place.")
    return values, weights


# ------------------------------------------------------------------------------------ the recipe


def _edits(
    pair: Pair,
    site: str,
    added: Target,
    removed: Target | None,
    *,
    m: float,
    removed_m: float,
    removal: Removal,
) -> list[RecipeEdit]:
    """A site's edits; none for empty sets."""
    found = []
    if _names_any(added):
        found.append(
            RecipeEdit(
                site=site, op="transport", target=added, strength=Strength(value=m),
                source=pair.source, positions=_positions(pair.source_mask),
            )
        )  # fmt: skip
    if removed is not None and _names_any(removed):
        running = removal == "running"
        found.append(
            RecipeEdit(
                site=site,
                op="scale" if running else "transport",
                target=removed,
                strength=Strength(value=1 - removed_m if running else -removed_m),
                source=None if running else pair.target,
                positions=_positions(pair.target_mask),
            )
        )
    return found


def _names_any(target: Target) -> bool:
    if isinstance(target, Features):
        return bool(target.features)
    return bool(target.neurons) if isinstance(target, Neurons) else True


def _positions(mask: Float[Tensor, "h w"] | None) -> Positions:
    if mask is None:
        return Positions()
    return Positions(named=None, canvas=tuple(map(tuple, mask.float().tolist())))


def _recipe(
    model: DiffusionModel,
    pair: Pair,
    what: str,
    edits: Sequence[RecipeEdit],
    saes: Mapping,
) -> Recipe:
    recipe = Recipe(
        name=f"transport of {what}",
        note=f"From {pair.source!r} to {pair.target!r}, seed {pair.seed}.",
        model=ModelReference(spec=model.spec, random_weights=model.random_weights),
        saes=dict(saes),
        edits=tuple(edits),
        prompts=(pair.target,),
        seeds=(pair.seed,),
        draw=pair.draw,
    )
    return checked(recipe)
