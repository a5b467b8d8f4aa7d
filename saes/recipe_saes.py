"""The SAEs that a recipe names: found by their weights, read, and the sizes of their features."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from probe.adapters import Model
from probe.errors import Failure, UserError
from probe.models import Dtype, base_spec
from probe.runs import Run, find_runs, newest_run
from saes.feature_queries import FeatureIndex
from saes.folder import WEIGHTS, load_sae
from saes.models import SparseAutoencoder
from saes.recipe_parts import Recipe, SaeReference, Unit
from saes.scales import load_scales
from saes.types import Codes


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSae:
    """An SAE in memory, and where it belongs."""

    run: Run
    """Its folder."""
    sae: SparseAutoencoder
    """Its weights."""
    site: str
    """The site it was trained on."""

    @staticmethod
    def of(run: Run) -> "LoadedSae":
        """The SAE of a run."""
        return LoadedSae(run=run, sae=load_sae(run.path), site=run.config["site"])

    def on(self, device: torch.device) -> "LoadedSae":
        """The same on a device; a copy, since others may use this one, where it is elsewhere."""
        if self.sae.W_dec.device == device:
            return self
        return replace(self, sae=copy.deepcopy(self.sae).to(device))


def needed_saes(
    recipe: Recipe, root: Path, given: Mapping[str, LoadedSae] | None
) -> dict[str, LoadedSae]:
    """A recipe's SAEs by key: those given, else those found below `root`.

    Raises as `find_sae_run` does.
    """
    return {
        key: find_sae(reference, root) if given is None else given[key]
        for key, reference in recipe.saes.items()
    }


def find_sae(reference: SaeReference, root: Path) -> LoadedSae:
    """The SAE below `root` with those weights. Raises as `find_sae_run` does."""
    run = find_sae_run(reference, root)
    return LoadedSae.of(run)


def find_sae_run(reference: SaeReference, root: Path) -> Run:
    """The folder below `root` of the SAE with those weights. Raises `UserError` for none."""
    runs = [run for run in find_runs(root, "sae") if run.complete]
    for run in sorted(runs, key=lambda run: run.path.name != reference.name):
        if run.manifest["files"].get(WEIGHTS, {}).get("sha256") == reference.weights:
            return run
    named = [run.path for run in runs if run.path.name == reference.name]
    but = f"{named[0]} has other weights, whose features mean other things" if named else ""
    raise UserError(
        f"the recipe is for the SAE {reference.name} (weights {reference.weights[:12]}), and "
        f"{but or f'there is none with these weights below {root}'}; make it again with the "
        "command that made it (`lorgnette demo` for the project's own), or copy its folder."
    )


def sae_reference(run: Run) -> SaeReference:
    """How a recipe names an SAE. Raises `Failure` where its training is not complete."""
    if not run.complete:
        raise Failure(f"{run.path} is still in training; run `lorgnette train` again first.")
    return SaeReference(name=run.path.name, weights=run.manifest["files"][WEIGHTS]["sha256"])


def common_dtype(loaded: Mapping[str, LoadedSae]) -> Dtype:
    """The number format of the model that the SAEs were trained on, where it is the same."""
    dtypes = {one.run.config["model"].get("dtype", "auto") for one in loaded.values()}
    return dtypes.pop() if len(dtypes) == 1 else "auto"


def check_model(recipe: Recipe, model: Model, loaded: Mapping[str, LoadedSae]) -> None:
    """Raise `UserError` where recipe, model and SAEs do not belong together.

    An SAE of a model also serves an adapter of it.
    """
    asked = (recipe.model.spec, recipe.model.random_weights)
    if asked != (model.spec, model.random_weights):
        raise UserError(
            f"the recipe {recipe.name!r} is for the model {_model_words(*asked)}, not for "
            f"{_model_words(model.spec, model.random_weights)}; its features and directions mean "
            "nothing there."
        )
    for key, one in loaded.items():
        described = one.run.config["model"]
        of_model = (described["spec"], described.get("random_weights"))
        if of_model not in (asked, (base_spec(asked[0]), asked[1])):
            raise UserError(
                f"the SAE {key!r} of the recipe {recipe.name!r} was trained on "
                f"{_model_words(described['spec'], described.get('random_weights'))} and the "
                f"recipe is for {_model_words(*asked)}; name an SAE of that model."
            )


def _model_words(spec: str, random_weights: int | None) -> str:
    return spec if random_weights is None else f"{spec} with random weights (seed {random_weights})"


class Reader:
    """An SAE's codes of an activation, encoded once however many features are read from it."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae
        self._x: Tensor | None = None
        self._codes: Codes | None = None

    def codes(self, x: Float[Tensor, "b t d"]) -> Codes:
        """The codes of an activation."""
        if self._x is not x or self._codes is None:
            self._codes = self.sae.encode(self._here(x))
            self._x = x
        return self._codes

    def feature(self, feature: int, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t 1"]:
        """One feature's code at each position."""
        codes = self.codes(x)
        return (codes.values * (codes.indices == feature)).sum(-1, keepdim=True).to(x.device)

    def features(
        self, features: Sequence[int], x: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t w"]:
        """Several features' codes at each position, in the order given, each named once."""
        codes, n = self.codes(x), len(features)
        # All others go into a column of their own, which is left out.
        column = torch.full((self.sae.config.d_sae,), n, device=codes.indices.device)
        column[list(features)] = torch.arange(n, device=column.device)
        found = codes.values.new_zeros(*x.shape[:2], n + 1)
        found.scatter_add_(-1, column[codes.indices.long()], codes.values)
        return found[..., :n].to(x.device)

    def reconstruction(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """What the SAE makes of an activation; float32."""
        return self.sae.decode(self.codes(x), self._here(x)).to(x.device)

    def _here(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return x.to(self.sae.W_dec.device, torch.float32)


# -------------------------------------------------------------------------------- sizes of features


def feature_size(sae: Run, feature: int, unit: Unit) -> float:
    """One of a feature's sizes: as its SAE came with it, else from the SAE's newest index.

    Raises `UserError` where neither is there, or the feature never fires.
    """
    scales = load_scales(sae.path)
    if scales is not None and (unit == "mean" or (unit == "sd" and bool(scales.sd.any()))):
        if not scales.mean[feature]:
            raise _never_fires(sae, feature)
        return float(getattr(scales, unit)[feature])
    index = newest_index(sae)
    if index is None:
        raise UserError(
            f"{sae.path} has no feature index to take the unit of a strength from; run "
            f"`lorgnette index {sae.path}`, or give the strength in raw units."
        )
    row = index.feature(feature)
    if not row["alive"]:
        raise _never_fires(sae, feature)
    return float(row[unit])


def _never_fires(sae: Run, feature: int) -> UserError:
    return UserError(
        f"feature {feature} of {sae.path.name} never fires, so its activations have no size "
        "to measure a strength in; give the strength in raw units."
    )


def newest_index(sae: Run) -> FeatureIndex | None:
    """The newest complete feature index of an SAE; None where there is none."""
    newest = newest_run(sae.path, "index")
    return None if newest is None else FeatureIndex.open(newest.path)
