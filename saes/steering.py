"""Running a recipe: its features, directions, neurons and heads become edits of a model.

    recipe = read_recipe(Path("artifacts/recipes/sea.json"))
    steering = prepare(recipe, root=Path("artifacts"))
    compared = steering.compare("The captain looked at")
    compared.default.text, compared.steered.text

A feature is pushed along its decoder direction: with `a` its code at a token and `a'` what the
recipe makes of it, `x` becomes `x + (a' - a) W_dec[f]`. The part of `x` that the SAE does not
reconstruct is kept as it is. `a` is read where the operation needs it; adding does not.

Position 0 and special tokens are left alone unless the recipe says otherwise (`saes.recipes`).
Means that ablate, and the units of neurons, are measured on reference text: the first
`REFERENCE_SEQUENCES` rows of the built-in corpus.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probe.capture import capturing, site_width
from probe.corpora import token_batches
from probe.directions import Direction, load_direction
from probe.errors import Failure, UserError
from probe.generation import GenerateConfig, Generation, generate, prompt_tokens
from probe.interventions import (
    Channels,
    Coordinate,
    Edit,
    Op,
    Where,
    applying,
    positions_of_text,
)
from probe.language import LanguageModel
from probe.models import load_language_model
from probe.runs import Run, find_runs
from probe.sites import Site, parse_site
from probe.tokens import token_texts
from saes.feature_queries import FeatureIndex
from saes.folder import WEIGHTS, load_sae
from saes.models import SparseAutoencoder
from saes.recipes import (
    Feature,
    FileDirection,
    Head,
    ModelReference,
    Neuron,
    Positions,
    Recipe,
    RecipeEdit,
    SaeReference,
    Statistics,
    Strength,
    checked,
)
from saes.types import Codes

REFERENCE_SEQUENCES, REFERENCE_CONTEXT = 8, 128
"""Rows of reference text, and tokens of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSae:
    """An SAE in memory, and where it belongs."""

    run: Run
    """Its folder."""
    sae: SparseAutoencoder
    """Its weights."""
    site: str
    """The site it was trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An edit of a recipe with everything but the prompt known."""

    edit: RecipeEdit
    """What the recipe says."""
    site: Site
    """Its site."""
    component: Coordinate | Channels
    """Its target."""
    value: Float[Tensor, " w"]
    """Its strength in raw units, or the mean that ablates; unused by `patch` and others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A prompt gone on from by the model as it is and by the steered one."""

    prompt: str
    """The prompt."""
    default: Generation
    """The model as it is."""
    steered: Generation
    """With the recipe's edits."""
    next_token: pd.DataFrame
    """Tokens whose probability of coming next changes most: `text`, `default`, `steered`."""
    kl: float
    """KL(default || steered) of the next token after the prompt, nats."""


# ----------------------------------------------------------------------------------- what it needs


def prepare(
    recipe: Recipe,
    *,
    root: Path,
    model: LanguageModel | None = None,
    saes: Mapping[str, LoadedSae] | None = None,
    device: str = "auto",
) -> "Steering":
    """Load what a recipe needs and check that it fits.

    Args:
        recipe: what to do.
        root: the folder below which its SAEs are looked for.
        model: the model, where it is in memory already; loaded otherwise.
        saes: the SAEs by their keys, likewise.
        device: where to load a model to.

    Raises:
        UserError: the recipe is for another model, an SAE is not there or of another width or
            model, or there is no such feature, neuron, head or site.
    """
    recipe = checked(recipe)
    loaded = {
        key: find_sae(reference, root) if saes is None else saes[key]
        for key, reference in recipe.saes.items()
    }
    if model is None:
        dtypes = {sae.run.config["model"]["dtype"] for sae in loaded.values()}
        model = load_language_model(
            recipe.model.spec,
            random_weights=recipe.model.random_weights,
            dtype=dtypes.pop() if len(dtypes) == 1 else "auto",
            device=device,
        )
    _check_model(recipe, model, loaded)
    readers = {key: Reader(one.sae) for key, one in loaded.items()}
    prepared = tuple(
        _prepared(edit, recipe, model, loaded, readers, f"edit {i} of the recipe {recipe.name!r}")
        for i, edit in enumerate(recipe.edits, 1)
    )
    return Steering(recipe=recipe, model=model, saes=loaded, prepared=prepared)


def find_sae(reference: SaeReference, root: Path) -> LoadedSae:
    """The SAE below `root` with those weights. Raises as `find_sae_run` does."""
    run = find_sae_run(reference, root)
    return LoadedSae(run=run, sae=load_sae(run.path), site=run.config["site"])


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


class Reader:
    """An SAE's codes of an activation, encoded once however many features are read from it."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae
        self._x: Tensor | None = None
        self._codes: Codes | None = None

    def codes(self, x: Float[Tensor, "b t d"]) -> Codes:
        """The codes of an activation."""
        if self._x is not x or self._codes is None:
            self._codes = self.sae.encode(x.to(self.sae.W_dec.device, torch.float32))
            self._x = x
        return self._codes

    def feature(self, feature: int, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t 1"]:
        """One feature's code at each token."""
        codes = self.codes(x)
        return (codes.values * (codes.indices == feature)).sum(-1, keepdim=True).to(x.device)


def _check_model(recipe: Recipe, model: LanguageModel, loaded: Mapping[str, LoadedSae]) -> None:
    asked = (recipe.model.spec, recipe.model.random_weights)
    if asked != (model.spec, model.random_weights):
        raise UserError(
            f"the recipe {recipe.name!r} is for the model {_model_words(*asked)}, not for "
            f"{_model_words(model.spec, model.random_weights)}; its features and directions mean "
            "nothing there."
        )
    for key, one in loaded.items():
        described = one.run.config["model"]
        if (described["spec"], described.get("random_weights")) != asked:
            raise UserError(
                f"the SAE {key!r} of the recipe {recipe.name!r} was trained on "
                f"{_model_words(described['spec'], described.get('random_weights'))} and the "
                f"recipe is for {_model_words(*asked)}; name an SAE of that model."
            )


def _model_words(spec: str, random_weights: int | None) -> str:
    return spec if random_weights is None else f"{spec} with random weights (seed {random_weights})"


# -------------------------------------------------------------------------------- targets and units


def _prepared(
    edit: RecipeEdit,
    recipe: Recipe,
    model: LanguageModel,
    loaded: Mapping[str, LoadedSae],
    readers: Mapping[str, Reader],
    where: str,
) -> Prepared:
    site = parse_site(edit.site)
    width = site_width(model, site)
    component, statistics = _component(edit, recipe, model, loaded, readers, width, where)
    value = torch.zeros(1)
    if edit.op == "mean_ablate":
        value = reference_values(model, site, component).mean(0)
    elif edit.strength is not None:
        unit = edit.strength.unit
        if unit != "raw" and statistics is None:
            statistics = _measured(model, site, component)
        scale = 1.0 if unit == "raw" or statistics is None else getattr(statistics, unit)
        value = torch.tensor([edit.strength.value * scale])
    return Prepared(edit=edit, site=site, component=component, value=value)


def _component(
    edit: RecipeEdit,
    recipe: Recipe,
    model: LanguageModel,
    loaded: Mapping[str, LoadedSae],
    readers: Mapping[str, Reader],
    width: int,
    where: str,
) -> tuple[Coordinate | Channels, Statistics | None]:
    """What the target is in the activation, and the sizes that its strength is measured in."""
    target = edit.target
    if isinstance(target, Feature):
        one = loaded[target.sae]
        _check_feature(edit, target, one, width, where)
        coordinate = Coordinate(
            vector=one.sae.W_dec[target.feature].detach().float(),
            read=functools.partial(readers[target.sae].feature, target.feature),
        )
        needs = edit.strength is not None and edit.strength.unit != "raw"
        known = target.statistics or (index_statistics(one.run, target.feature) if needs else None)
        return coordinate, known
    if isinstance(target, FileDirection):
        path = (recipe.folder or Path()) / target.direction
        found = load_direction(path)
        if len(found.vector) != width:
            raise UserError(
                f"{where}: the direction {path} has width {len(found.vector)} and {edit.site} has "
                f"width {width}; give a direction of that site."
            )
        return Coordinate(vector=found.unit), target.statistics or _recorded(found)
    if isinstance(target, Neuron):
        if target.neuron >= width:
            raise UserError(
                f"{where}: {edit.site} has no neuron {target.neuron}, only 0 to {width - 1}."
            )
        return Channels(start=target.neuron, stop=target.neuron + 1), target.statistics
    if isinstance(target, Head):
        n_heads = model.model.config.get_text_config().num_attention_heads
        if target.head >= n_heads:
            raise UserError(
                f"{where}: {edit.site} has no head {target.head}, only 0 to {n_heads - 1}."
            )
        size = width // n_heads
        return Channels(start=target.head * size, stop=(target.head + 1) * size), None
    return Channels(start=0, stop=width), None


def _recorded(direction: Direction) -> Statistics | None:
    """The projections that a direction's file records; None where it records none."""
    if direction.mean is None or direction.max is None or direction.sd is None:
        return None
    return Statistics(mean=direction.mean, max=direction.max, sd=direction.sd)


def _check_feature(
    edit: RecipeEdit, target: Feature, one: LoadedSae, width: int, where: str
) -> None:
    d_sae, d_in = one.sae.config.d_sae, one.sae.config.d_in
    if target.feature >= d_sae:
        raise UserError(
            f"{where}: {one.run.path.name} has no feature {target.feature}, only 0 to {d_sae - 1}."
        )
    if d_in != width:
        raise UserError(
            f"{where}: {one.run.path.name} has width {d_in} and {edit.site} has width {width}; "
            f"its features belong at {one.site}."
        )
    if edit.site != one.site and edit.op not in ("add", "project_out"):
        raise UserError(
            f"{where}: op {edit.op} reads the feature, which can only be read at {one.site}, not "
            f"at {edit.site}; add works at any site of that width."
        )


def index_statistics(sae: Run, feature: int) -> Statistics:
    """A feature's mean, largest and sd from the SAE's newest complete index.

    Raises `UserError` where there is no index, or the feature never fires in it.
    """
    index = newest_index(sae)
    if index is None:
        raise UserError(
            f"{sae.path} has no feature index to take the unit of a strength from; run "
            f"`lorgnette index {sae.path}`, or give the strength in raw units."
        )
    row = index.feature(feature)
    if not row["alive"]:
        raise UserError(
            f"feature {feature} of {sae.path.name} never fires, so its activations have no size "
            "to measure a strength in; give the strength in raw units."
        )
    return Statistics(mean=row["mean"], max=row["max"], sd=row["sd"])


def newest_index(sae: Run) -> FeatureIndex | None:
    """The newest complete feature index of an SAE; None where there is none."""
    runs = [run for run in find_runs(sae.path, "index") if run.complete]
    if not runs:
        return None
    return FeatureIndex.open(max(runs, key=lambda run: run.manifest["created"]).path)


def _measured(model: LanguageModel, site: Site, component: Coordinate | Channels) -> Statistics:
    values = reference_values(model, site, component)[:, 0]
    return Statistics(mean=float(values.mean()), max=float(values.max()), sd=float(values.std()))


def reference_values(
    model: LanguageModel, site: Site, component: Coordinate | Channels
) -> Float[Tensor, "n w"]:
    """A component's numbers on the reference text, position 0 and special tokens left out."""
    batches = token_batches(
        "builtin",
        model,
        context=REFERENCE_CONTEXT,
        batch_sequences=REFERENCE_SEQUENCES,
        max_tokens=REFERENCE_SEQUENCES * REFERENCE_CONTEXT,
    )
    batch = next(iter(batches))
    with torch.no_grad(), capturing(model, [site]) as seen:
        model.run(batch.tokens)
        return component.values(seen[site])[batch.keep.to(seen[site].device)].cpu()


# --------------------------------------------------------------------------------------- positions


def tokens_chosen(
    positions: Positions,
    tokens: Int[Tensor, " t"],
    model: LanguageModel,
    *,
    special_tokens: bool,
    where: str,
) -> Bool[Tensor, " t"]:
    """The tokens of a prompt that positions mean.

    Raises `UserError` where a mask has another length, a range lies outside, or a text is not
    there.
    """
    n = len(tokens)
    if positions.mask is not None:
        return _masked(positions.mask, n, where)
    chosen = torch.zeros(n, dtype=torch.bool)
    if positions.range is not None:
        first, end = positions.range
        chosen[slice(first, end)] = True
        if not chosen.any() or first >= n or (end or 0) > n:
            raise UserError(
                f"{where}: the range {list(positions.range)} is not in the prompt, which has "
                f"{n} tokens with the end-of-text token in front."
            )
    elif positions.text is not None:
        chosen = positions_of_text(token_texts(model, tokens.tolist()), positions.text)
    elif positions.named == "last":
        chosen[-1] = True
    elif positions.named != "generated":
        chosen[:] = True
    if not special_tokens:
        chosen[0] = False
        chosen &= ~torch.isin(tokens, torch.tensor(sorted(model.special_ids)))
    return chosen


def _masked(mask: Sequence[object], n: int, where: str) -> Bool[Tensor, " t"]:
    if isinstance(mask[0], tuple):
        raise UserError(
            f"{where}: the mask is of an image, {len(mask)} by {len(mask[0])}, and a language "
            f"model's prompt wants a list of {n} values."
        )
    if len(mask) != n:
        raise UserError(
            f"{where}: the mask has {len(mask)} values and the prompt {n} tokens with the "
            "end-of-text token in front; give one for each."
        )
    return torch.tensor(mask, dtype=torch.bool)


def _where(
    edit: RecipeEdit,
    tokens: Int[Tensor, " t"],
    model: LanguageModel,
    special_tokens: bool,
    where: str,
) -> Where:
    chosen = tokens_chosen(
        edit.positions, tokens, model, special_tokens=special_tokens, where=where
    )
    first, end = edit.steps or (0, None)
    if first > 0:
        chosen = torch.zeros_like(chosen)
    generated = edit.positions.named in ("all", "generated") and edit.op != "patch"
    steps = (max(first, 1), end) if generated else (1, 1)
    if not chosen.any() and steps == (1, 1):
        raise UserError(
            f"{where} chooses no token of the prompt: position 0 and special tokens are left alone "
            'unless the recipe says "special_tokens": true, and steps from 1 on are of what is '
            "generated."
        )
    return Where(prompt=chosen, steps=steps)


# --------------------------------------------------------------------------------------- steering


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """A recipe ready to run. Made by `prepare`."""

    recipe: Recipe
    """What it does."""
    model: LanguageModel
    """The model."""
    saes: Mapping[str, LoadedSae]
    """Its SAEs by key."""
    prepared: tuple[Prepared, ...]
    """Its edits."""

    def edits(
        self, tokens: Int[Tensor, " t"], *, times: float = 1.0, row: int | None = None
    ) -> list[Edit]:
        """The edits for one prompt.

        Args:
            tokens: the prompt's ids, as `probe.generation.prompt_tokens` gives them.
            times: strengths are multiplied by it; a factor f to scale by becomes 1 + times (f - 1).
            row: the row of the batch that they are for; None for all.

        Raises `UserError` where positions or a mask do not fit the prompt.
        """
        return [self._edit(i, one, tokens, times, row) for i, one in enumerate(self.prepared, 1)]

    def _edit(
        self, i: int, one: Prepared, tokens: Int[Tensor, " t"], times: float, row: int | None
    ) -> Edit:
        name = f"edit {i} of the recipe {self.recipe.name!r}"
        where = _where(one.edit, tokens, self.model, self.recipe.special_tokens, name)
        value = one.value
        if one.edit.op == "scale":
            value = 1 + times * (value - 1)
        elif one.edit.strength is not None:
            value = times * value
        elif one.edit.op == "patch":
            value = self._patched(one, where.prompt, name)
        return Edit(
            site=one.site, component=one.component, op=one.edit.op, where=where, value=value,
            row=row,
        )  # fmt: skip

    def _patched(
        self, one: Prepared, chosen: Bool[Tensor, " t"], where: str
    ) -> Float[Tensor, "t w"]:
        """The component's numbers in the source prompt, at the positions they go to."""
        assert one.edit.source is not None
        tokens = prompt_tokens(self.model, one.edit.source)
        there = tokens_chosen(
            one.edit.positions, tokens, self.model,
            special_tokens=self.recipe.special_tokens, where=f"{where}, in its source",
        )  # fmt: skip
        if int(there.sum()) != int(chosen.sum()):
            raise UserError(
                f"{where} patches {int(chosen.sum())} tokens from {int(there.sum())} of its "
                f"source {one.edit.source!r}; its positions must choose as many in both."
            )
        with torch.no_grad(), capturing(self.model, [one.site]) as seen:
            self.model.run(tokens[None])
            values = one.component.values(seen[one.site])[0].cpu()
        placed = torch.zeros(len(chosen), values.shape[1])
        placed[chosen] = values[there]
        return placed

    def compare(
        self,
        prompt: str,
        config: GenerateConfig | None = None,
        *,
        chat: bool = False,
        times: float = 1.0,
        top: int = 5,
        on_token: Callable[[int], None] | None = None,
    ) -> Comparison:
        """Go on from a prompt with and without the recipe.

        Args:
            prompt: the prompt, or, with `chat`, what the user says.
            config: how to generate; the same draws for both.
            chat: use the tokenizer's chat template.
            times: strengths are multiplied by it.
            top: tokens listed in `next_token`.
            on_token: called with each token's id as it is written, of both texts.

        Raises `UserError` for an empty or too long prompt, or one that the positions do not fit.
        """
        config = config or GenerateConfig()
        tokens = prompt_tokens(self.model, prompt, chat=chat, room=config.max_new_tokens)
        edits = self.edits(tokens, times=times)
        before, after = self.next_token(tokens, ()), self.next_token(tokens, edits)
        return Comparison(
            prompt=prompt,
            default=generate(self.model, tokens, config=config, on_token=on_token),
            steered=generate(self.model, tokens, edits=edits, config=config, on_token=on_token),
            next_token=_changes(self.model, before, after, top),
            kl=float((before.exp() * (before - after)).sum()),
        )

    @torch.no_grad()
    def next_token(self, tokens: Int[Tensor, " t"], edits: Sequence[Edit]) -> Float[Tensor, " v"]:
        """Log-probabilities of the token after a prompt, float32."""
        with applying(self.model, edits):
            logits = self.model.run(tokens[None])
        assert logits is not None, "no capture is active, so the pass ran to its end"
        found = logits[0, -1].float().log_softmax(-1).cpu()
        if not torch.isfinite(found).all():
            raise Failure("the model gave NaN or infinite logits; try a smaller strength.")
        return found


def _changes(
    model: LanguageModel, before: Float[Tensor, " v"], after: Float[Tensor, " v"], top: int
) -> pd.DataFrame:
    """Tokens whose probability changes most, likeliest under the edits first."""
    moved = (after.exp() - before.exp()).abs().topk(top).indices
    moved = moved[after[moved].argsort(descending=True)]
    return pd.DataFrame(
        {
            "text": token_texts(model, moved.tolist()),
            "default": before[moved].exp().numpy(),
            "steered": after[moved].exp().numpy(),
        }
    )


def feature_recipe(
    sae: Run,
    feature: int,
    *,
    op: Op = "add",
    strength: Strength | None = None,
    statistics: Statistics | None = None,
    name: str = "",
) -> Recipe:
    """The recipe that a person begins with: one feature pushed at every token.

    Args:
        sae: the SAE's folder.
        feature: its feature.
        op: what is done to it.
        strength: how much; for operations that take none, None.
        statistics: its activations, kept in the recipe; None to leave them to the SAE's index.
        name: a few words; None to make them.

    Raises `Failure` where the SAE is not complete, `UserError` where the parts do not fit.
    """
    described = sae.config["model"]
    target = Feature(feature=feature, sae="main", statistics=statistics)
    edit = RecipeEdit(site=sae.config["site"], op=op, target=target, strength=strength)
    recipe = Recipe(
        name=name or f"{op} feature {feature}",
        model=ModelReference(
            spec=described["spec"], random_weights=described.get("random_weights")
        ),
        saes={"main": sae_reference(sae)},
        edits=(edit,),
    )
    return checked(recipe)
