"""`lorgnette steer`: a model as it is and a steered one, side by side."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, arg

from app.commands.options import Common, plan, say, show
from probe.errors import UserError
from probe.generation import GenerateConfig
from probe.runs import write_json
from saes.recipes import (
    Feature,
    FileDirection,
    Neuron,
    Recipe,
    Strength,
    Target,
    WholeSite,
    read_recipe,
)
from saes.steering import Comparison, Steering, prepare


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Show what recipes do: the model's own text and the steered one, side by side.

    A recipe is a JSON file that says which features, directions, neurons or heads of a model are
    changed, how much and at which tokens; `saes/recipes.py` describes it, the dashboard's page
    Steer makes them. Steering keeps what the SAE cannot reconstruct: the activation becomes
    x + delta.

    Example: lorgnette steer artifacts/recipes/*.json --prompt "The captain looked at"
    """

    recipes: Annotated[Positional[tuple[Path, ...]], arg(metavar="RECIPE")]
    """Files of recipes."""
    prompt: tuple[str, ...] = ()
    """What to go on from; each recipe's own prompts where none is given."""
    chat: bool = False
    """Put the prompts into the model's chat template."""
    times: float = 1.0
    """Multiply every strength by this; 0 is no steering."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    out: Path | None = None
    """Also write everything to this JSON file."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    common: Common = field(default_factory=Common)


def run(command: Command) -> Path | None:
    """Run every recipe on every prompt; gives the file of `--out`, where there is one."""
    recipes = [read_recipe(path) for path in command.recipes]
    if not recipes:
        raise UserError("no recipe was given; name one or more recipes' files.")
    if command.common.dry_run:
        for recipe in recipes:
            say(dry_run_plan(command, recipe))
        return None
    documents: list[dict[str, Any]] = []
    steering: Steering | None = None
    for recipe in recipes:
        # Recipes of one model in a row share it.
        shared = steering.model if steering and steering.recipe.model == recipe.model else None
        steering = prepare(recipe, root=command.common.root, model=shared, device=command.device)
        for prompt in prompts_of(command, recipe):
            compared = steering.compare(
                prompt, command.generate, chat=command.chat, times=command.times
            )
            show(comparison_table(recipe, compared))
            documents.append({"recipe": recipe.name} | document(compared))
    if command.out is not None:
        write_json(command.out, documents)
    return command.out


def prompts_of(command: Command, recipe: Recipe) -> tuple[str, ...]:
    """The prompts asked for, else the recipe's own. Raises `UserError` where there are none."""
    prompts = command.prompt or recipe.prompts
    if not prompts:
        raise UserError(
            f'the recipe {recipe.name!r} has no prompts of its own; give --prompt "...".'
        )
    return prompts


def comparison_table(recipe: Recipe, compared: Comparison) -> Table:
    """Both texts side by side, and what changed at the next token."""
    table = Table(
        "default", "steered", title=escape(f"{recipe.name}: {compared.prompt}"),
        title_justify="left", show_lines=True,
    )  # fmt: skip
    table.add_row(escape(compared.default.text.strip()), escape(compared.steered.text.strip()))
    default, steered = (
        ", ".join(
            f"{row['text']!r} {row[side]:.1%}" for row in compared.next_token.to_dict("records")
        )
        for side in ("default", "steered")
    )
    table.add_row(escape(f"next token: {default}"), escape(f"next token: {steered}"))
    table.caption = f"KL of the next token {compared.kl:.3g} nats"
    return table


def document(compared: Comparison) -> dict[str, Any]:
    """A comparison as JSON."""
    return {
        "prompt": compared.prompt,
        "default": compared.default.text,
        "steered": compared.steered.text,
        "kl": compared.kl,
        "next_token": compared.next_token.astype({"default": float, "steered": float}).to_dict(
            "records"
        ),
    }


def dry_run_plan(command: Command, recipe: Recipe) -> Table:
    """What a recipe would do, in words."""
    rows = {
        "model": recipe.model.spec,
        "SAEs": ", ".join(sae.name for sae in recipe.saes.values()) or "none",
        "prompts": str(len(prompts_of(command, recipe))),
        "tokens": f"up to {command.generate.max_new_tokens} for each, with and without",
    }
    for i, edit in enumerate(recipe.edits, 1):
        amount = strength_words(edit.strength)
        rows[f"edit {i}"] = f"{edit.op} {target_words(edit.target)} at {edit.site}{amount}"
    return plan(f"{recipe.name} would be run", rows)


def target_words(target: Target) -> str:
    """What an edit is of, in words."""
    if isinstance(target, WholeSite):
        return "the whole site"
    if isinstance(target, Feature):
        return f"feature {target.feature} of {target.sae}"
    if isinstance(target, FileDirection):
        return f"the direction in {target.direction}"
    return f"neuron {target.neuron}" if isinstance(target, Neuron) else f"head {target.head}"


def strength_words(strength: Strength | None) -> str:
    """A strength in words; empty where there is none."""
    if strength is None:
        return ""
    unit = "" if strength.unit == "raw" else f" x {strength.unit}"
    return f", strength {strength.value:g}{unit}"
