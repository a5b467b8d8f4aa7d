"""Running a recipe: its features, directions, neurons and heads become edits of a model.

    recipe = read_recipe(Path("artifacts/recipes/sea.json"))
    steering = prepare(recipe, root=Path("artifacts"))
    compared = steering.compare("The captain looked at")
    compared.default.text, compared.steered.text

`saes.recipe_targets` says what a change of a feature is; `saes.drawing` does the same for images.

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

from probe.capture import capturing
from probe.corpora import token_batches
from probe.errors import Failure, UserError
from probe.generation import GenerateConfig, Generation, generate, prompt_tokens
from probe.interventions import Edit, Plain, Where, applying, positions_of_text
from probe.language import LanguageModel
from probe.models import load_language_model
from probe.sites import Site
from probe.tokens import token_texts
from saes.recipe_checks import WITH_SOURCE
from saes.recipe_saes import LoadedSae, check_model, common_dtype, needed_saes
from saes.recipe_targets import Prepared, prepared_edits
from saes.recipes import Positions, Recipe, RecipeEdit, checked

REFERENCE_SEQUENCES, REFERENCE_CONTEXT = 8, 128
"""Rows of reference text, and tokens of each."""


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
    if recipe.draw is not None:
        raise UserError(
            f"the recipe {recipe.name!r} draws images and a recipe of texts was wanted; run it "
            "with `lorgnette steer`, or prepare it with saes.drawing."
        )
    loaded = needed_saes(recipe, root, saes)
    if model is None:
        model = load_language_model(
            recipe.model.spec,
            random_weights=recipe.model.random_weights,
            dtype=common_dtype(loaded),
            device=device,
        )
    check_model(recipe, model, loaded)
    measure = functools.partial(reference_values, model)
    prepared = prepared_edits(recipe, model, loaded, measure)
    return Steering(recipe=recipe, model=model, saes=loaded, prepared=prepared)


def reference_values(model: LanguageModel, site: Site, component: Plain) -> Float[Tensor, "n w"]:
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


def _masked(mask: Sequence[bool], n: int, where: str) -> Bool[Tensor, " t"]:
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
    generated = edit.positions.named in ("all", "generated") and edit.op not in WITH_SOURCE
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
        value = one.at(times)
        if one.edit.op in WITH_SOURCE:
            there = self._numbers_there(one, where.prompt, name)
            value = there if one.edit.op == "patch" else value * there
        return Edit(
            site=one.site, component=one.component, op=one.op, where=where, value=value, row=row
        )

    def _numbers_there(
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
                f"{where} takes {int(chosen.sum())} tokens from {int(there.sum())} of its "
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
